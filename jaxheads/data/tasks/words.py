"""Words that several tasks share."""

NAMES = tuple(
    """
    Mary John Tom James Robert Michael David William Richard Joseph Thomas Charles Daniel Matthew
    Anthony Mark Paul Steven Andrew Kevin Brian George Edward Jason Ryan Jacob Gary Eric Jonathan
    Stephen Larry Justin Scott Brandon Benjamin Samuel Frank Patrick Jack Dennis Jerry Tyler Aaron
    Henry Adam Peter Kyle Walter Jeremy Sean Christian Ben Max Sam Tim Jim Bob Lily Lucy Anna Jane
    Sarah Lisa Emily Amy Laura Emma Alice Rachel Julia Grace Rose Kate Sue Mia Ellen Helen Maria
    """.split()  # noqa: SIM905
)
PLACES = (
    "station", "market", "school", "library", "garden", "hospital", "museum", "office", "park",
    "theater",
)  # fmt: skip
THINGS = ("letter", "book", "ring", "ball", "phone", "bag", "key", "map", "card", "picture")
COLORS = ("red", "blue", "green", "black", "yellow", "orange", "purple", "brown")
OBJECTS = (
    "pencil", "necklace", "lighter", "mug", "plate", "cup", "notebook", "bottle", "wallet",
    "bracelet", "scarf", "hat", "pen", "stick", "paper", "belt", "fan",
)  # fmt: skip
CODES = (*THINGS, *COLORS, *OBJECTS)
"""Words that a sentence may hide as a code."""
NUMBERS = tuple(str(n) for n in range(10, 60))
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
