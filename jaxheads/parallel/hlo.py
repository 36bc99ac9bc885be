"""Reading the text of a compiled program: instructions, computations, loops.

`parse` turns ``compiled.as_text()`` into a `Program`; `trip_count` finds how often a loop runs.
Nothing here touches a device. What the instructions cost is the business of `program.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

_BITS: Mapping[str, int] = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64,
    "c64": 64, "c128": 128, "token": 0, "opaque": 0,
}  # fmt: skip

_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*(\(.*)?->.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)$", re.DOTALL)
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\]")
_COMMENT = re.compile(r"/\*.*?\*/")


class Shape(NamedTuple):
    """An array of the program, as one device holds it."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Bytes without the padding of tiles."""
        if self.dtype.startswith(("f8", "f4")):
            bits = 8 if self.dtype.startswith("f8") else 4
        else:
            bits = _BITS.get(self.dtype, 0)
        return -(-self.size * bits // 8)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """The result; several for a tuple, nested tuples flattened."""
    operands: tuple[str, ...]
    attributes: str
    """Everything after the operands."""
    arguments: str
    """The text between the parentheses: the operands, or a constant's value."""

    def called(self, attribute: str) -> tuple[str, ...]:
        """Names of the computations in ``attribute=%name`` or ``attribute={%a, %b}``."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return tuple(re.findall(r"[\w.\-]+", found[1])) if found else ()

    def attribute(self, name: str) -> str | None:
        """The value of ``name=value`` up to the next comma or brace, None when absent."""
        found = re.search(rf"\b{name}=([^,{{}}\s]+)", self.attributes)
        return found[1].strip("%") if found else None

    def braces(self, name: str) -> str | None:
        """The inside of ``name={...}``, braces balanced, None when absent."""
        found = re.search(rf"\b{name}=\{{", self.attributes)
        return _balanced(self.attributes, found.end() - 1) if found else None


@dataclass(frozen=True)
class Computation:
    """A named list of instructions, in schedule order."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""


@dataclass(frozen=True)
class Program:
    """A parsed module."""

    computations: dict[str, Computation]
    entry: str
    num_partitions: int
    is_scheduled: bool


def parse(text: str) -> Program:
    """The program of ``compiled.as_text()``.

    Raises:
      ValueError: for text that is no HLO module.
    """
    header = text.split("\n", 1)[0]
    if not header.startswith("HloModule"):
        raise ValueError(
            f"the text begins with {header[:40]!r}, needed an HLO module: pass compiled.as_text()."
        )
    computations: dict[str, Computation] = {}
    entry, current, lines = "", None, []

    def finish():
        if current is not None and lines:
            _add(current, "\n".join(lines))
        lines.clear()

    roots: dict[str, str] = {}
    for line in text.split("\n")[1:]:
        if current is not None and (line.rstrip() == "}" or line.startswith("}, execution_")):
            finish()
            current = None
        elif current is None:
            found = _HEADER.match(line)
            if found:
                current = computations.setdefault(found[2], Computation(found[2]))
                entry = found[2] if found[1] else entry
        elif re.match(r"^\s+(ROOT\s+)?%?[\w.\-]+\s*=\s", line):
            finish()
            lines.append(line)
            if line.lstrip().startswith("ROOT"):
                found = _INSTRUCTION.match(line)
                roots[current.name] = found[2] if found else ""
        elif lines:
            lines.append(line)  # attributes of Pallas kernels run over several lines
    for name, root in roots.items():
        old = computations[name]
        computations[name] = Computation(name, old.instructions, root)
    partitions = re.search(r"num_partitions=(\d+)", header)
    return Program(
        computations, entry, int(partitions[1]) if partitions else 1, "is_scheduled=true" in header
    )


def _add(computation: Computation, text: str) -> None:
    found = _INSTRUCTION.match(text)
    if not found:
        return
    name, rest = found[2], found[3]
    if rest.startswith("("):
        close = len(_balanced(rest, 0)) + 2
        shape_text, rest = rest[:close], rest[close:].lstrip()
    else:
        shape_text, _, rest = rest.partition(" ")
    rest = rest.lstrip()
    opcode, paren, _ = rest.partition("(")
    if not paren:
        return
    arguments = _balanced(rest, len(opcode))
    attributes = rest[len(opcode) + len(arguments) + 2 :]
    computation.instructions[name] = Instruction(
        name, opcode.strip(), shapes(shape_text), _operands(arguments), attributes, arguments
    )


def shapes(text: str) -> tuple[Shape, ...]:
    """Every array shape in `text`: ``"(f32[2,3]{1,0}, s32[])"`` gives two."""
    return tuple(
        Shape(dtype, tuple(int(re.sub(r"\D", "", d)) for d in dims.split(",") if d.strip()))
        for dtype, dims in _SHAPE.findall(_COMMENT.sub("", text))
        if dtype in _BITS or dtype.startswith(("f8", "f4"))
    )


def _balanced(text: str, start: int) -> str:
    """What lies between the bracket at `start` and its partner."""
    opening = text[start]
    closing = {"(": ")", "{": "}"}[opening]
    depth, quoted = 0, False
    for i in range(start, len(text)):
        c = text[i]
        if c == '"' and text[i - 1] != "\\":
            quoted = not quoted
        elif quoted:
            continue
        elif c == opening:
            depth += 1
        elif c == closing:
            depth -= 1
            if depth == 0:
                return text[start + 1 : i]
    return text[start + 1 :]


def _operands(arguments: str) -> tuple[str, ...]:
    """Names of the operands, with or without their shapes in front."""
    plain = _COMMENT.sub("", arguments)
    names, depth, start = [], 0, 0
    for i, c in enumerate(plain + ","):
        if c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == "," and depth == 0:
            word = plain[start:i].split()
            start = i + 1
            if word:
                names.append(word[-1].lstrip("%"))
    return tuple(names)


@dataclass(frozen=True)
class Frame:
    """A computation as it is called: where its parameters come from."""

    computation: Computation
    call: Instruction | None = None
    parent: Frame | None = None


class Trips(NamedTuple):
    """How often a loop runs."""

    count: int | None
    """None: the text does not tell."""
    is_bound: bool = False
    """The count is the most it can run: another condition may end it sooner."""


class _Linear(NamedTuple):
    """A scalar: ``carry[index] + offset`` of the loop looked at, or a constant (index None)."""

    index: int | None
    offset: int


_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier")


def trip_count(program: Program, frame: Frame, loop: Instruction) -> Trips:
    """Times the `while` instruction `loop` of `frame` runs its body.

    From the compiler's ``known_trip_count`` where it left one; otherwise from the condition
    (``carry[i] < constant``), the start of that carry and its step in the body.
    """
    known = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes)
    if known:
        return Trips(int(known[1]))
    inside = Frame(program.computations[loop.called("condition")[0]], loop, frame)
    body = Frame(program.computations[loop.called("body")[0]], loop, frame)
    found = [
        _count(program, inside, body, compare)
        for compare in _comparisons(program, inside, inside.computation.root)
    ]
    counts = [c for c in found if c is not None]
    if not counts:
        return Trips(None)
    return Trips(min(counts), is_bound=len(found) > len(counts) or len(found) > 1)


def _comparisons(program: Program, frame: Frame, name: str) -> list[tuple[Frame, Instruction]]:
    """The terms of a condition; terms that are no comparison count as opaque ones."""
    instruction = frame.computation.instructions[name]
    if instruction.opcode == "and":
        return [
            c for operand in instruction.operands for c in _comparisons(program, frame, operand)
        ]
    if instruction.opcode in ("fusion", "call"):
        called = instruction.called("calls") or instruction.called("to_apply")
        inner = Frame(program.computations[called[0]], instruction, frame)
        return _comparisons(program, inner, inner.computation.root)
    if instruction.opcode in _SAME:
        return _comparisons(program, frame, instruction.operands[0])
    if instruction.opcode == "parameter" and frame.call and frame.call.opcode != "while":
        operand = _argument(frame.call, instruction)
        if operand is not None and frame.parent is not None:
            return _comparisons(program, frame.parent, operand)
    return [(frame, instruction)]


def _count(program, inside: Frame, body: Frame, term: tuple[Frame, Instruction]) -> int | None:
    frame, compare = term
    direction = compare.attribute("direction")
    if compare.opcode != "compare" or direction is None:
        return None
    left, right = (_linear(program, frame, o, inside) for o in compare.operands)
    if left is None or right is None:
        return None
    if left.index is None:
        left, right = right, left
        direction = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}.get(direction, direction)
    if left.index is None or right.index is not None:
        return None
    if inside.parent is None or inside.call is None:
        return None
    start = _element(program, inside.parent, inside.call.operands[0], left.index, None)
    after = _element(program, body, body.computation.root, left.index, body)
    if start is None or start.index is not None or after is None or after.index != left.index:
        return None
    return _iterations(start.offset + left.offset, right.offset, after.offset, direction)


def _iterations(start: int, limit: int, step: int, direction: str) -> int | None:
    if direction in ("GT", "GE"):
        start, limit, step = -start, -limit, -step
        direction = {"GT": "LT", "GE": "LE"}[direction]
    if step <= 0 and direction != "NE":
        return None
    if direction == "NE":
        whole = step != 0 and (limit - start) % step == 0 and (limit - start) // step >= 0
        return (limit - start) // step if whole else None
    if direction not in ("LT", "LE"):
        return None
    return max(0, -(-(limit + (direction == "LE") - start) // step))


def _linear(program, frame: Frame, name: str, loop: Frame | None) -> _Linear | None:
    """The scalar `name` as a function of the carry of `loop`, None when it is not linear."""
    instruction = frame.computation.instructions.get(name)
    if instruction is None:
        return None
    match instruction.opcode:
        case "constant":
            value = re.fullmatch(r"\s*(-?\d+)\s*", instruction.arguments)
            return _Linear(None, int(value[1])) if value else None
        case "get-tuple-element":
            index = int(instruction.attribute("index") or 0)
            return _element(program, frame, instruction.operands[0], index, loop)
        case "parameter":
            if frame.call is None or frame.call.opcode == "while" or frame.parent is None:
                return None
            operand = _argument(frame.call, instruction)
            return None if operand is None else _linear(program, frame.parent, operand, loop)
        case "fusion" | "call":
            called = instruction.called("calls") or instruction.called("to_apply")
            inner = Frame(program.computations[called[0]], instruction, frame)
            return _linear(program, inner, inner.computation.root, loop)
        case "add" | "subtract":
            a, b = (_linear(program, frame, o, loop) for o in instruction.operands)
            if a is None or b is None or (a.index is not None and b.index is not None):
                return None
            if instruction.opcode == "subtract":
                if b.index is not None:
                    return None
                return _Linear(a.index, a.offset - b.offset)
            return _Linear(b.index if a.index is None else a.index, a.offset + b.offset)
        case opcode if opcode in _SAME:
            return _linear(program, frame, instruction.operands[0], loop)
    return None


def _element(program, frame: Frame, name: str, index: int, loop: Frame | None) -> _Linear | None:
    """Element `index` of the tuple `name`, as `_linear`."""
    instruction = frame.computation.instructions.get(name)
    if instruction is None:
        return None
    match instruction.opcode:
        case "tuple":
            return _linear(program, frame, instruction.operands[index], loop)
        case "parameter":
            if frame.call is None or frame.parent is None:
                return None
            if frame.call.opcode != "while":
                operand = _argument(frame.call, instruction)
                if operand is None:
                    return None
                return _element(program, frame.parent, operand, index, loop)
            if _is_invariant(program, frame.call, index):
                return _element(program, frame.parent, frame.call.operands[0], index, None)
            is_asked = loop is not None and frame.call is loop.call
            return _Linear(index, 0) if is_asked else None
        case "fusion" | "call":
            called = instruction.called("calls") or instruction.called("to_apply")
            inner = Frame(program.computations[called[0]], instruction, frame)
            return _element(program, inner, inner.computation.root, index, loop)
        case "while":
            if _is_invariant(program, instruction, index):
                return _element(program, frame, instruction.operands[0], index, loop)
            return None
        case opcode if opcode in _SAME:
            return _element(program, frame, instruction.operands[0], index, loop)
    return None


def _argument(call: Instruction, parameter: Instruction) -> str | None:
    """What `call` passes as `parameter`; None where it passes nothing yet (async-start)."""
    number = int(parameter.arguments)
    return call.operands[number] if number < len(call.operands) else None


def _is_invariant(program, loop: Instruction, index: int) -> bool:
    """Whether the body hands element `index` of its carry on untouched."""
    body = program.computations[loop.called("body")[0]]
    root = body.instructions[body.root]
    if root.opcode != "tuple" or index >= len(root.operands):
        return False
    name = root.operands[index]
    while True:
        instruction = body.instructions[name]
        if instruction.opcode in _SAME:
            name = instruction.operands[0]
            continue
        return (
            instruction.opcode == "get-tuple-element"
            and int(instruction.attribute("index") or -1) == index
            and body.instructions[instruction.operands[0]].opcode == "parameter"
        )
