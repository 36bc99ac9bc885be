"""Sets of heads, scores of heads, and the file that carries them between programs.

A finder returns scores [L,H] (`HeadScores`), a wrapper takes a mask or gates [L,H], and heads.json
carries either from one program to the next.
"""

from jaxheads.heads.files import HeadsFile, from_json, to_json
from jaxheads.heads.scores import HeadScores
from jaxheads.heads.sets import (
    Head,
    Heads,
    check_range,
    check_shape,
    from_mask,
    is_mask,
    label,
    leave_one_out,
    mask,
    parse_head,
    parse_heads,
    random_heads,
    top_k,
)
from jaxheads.heads.statistics import Control, Interval, bootstrap, correlation, random_control

__all__ = [
    "Control",
    "Head",
    "HeadScores",
    "Heads",
    "HeadsFile",
    "Interval",
    "bootstrap",
    "check_range",
    "check_shape",
    "correlation",
    "from_json",
    "from_mask",
    "is_mask",
    "label",
    "leave_one_out",
    "mask",
    "parse_head",
    "parse_heads",
    "random_control",
    "random_heads",
    "to_json",
    "top_k",
]
