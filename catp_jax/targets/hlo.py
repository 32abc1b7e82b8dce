"""XLA's optimised HLO, read from its text."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

# name, type, opcode; the operands follow
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO. `shapes` are those of its results: bits of an element, and sizes."""

    name: str
    opcode: str
    shapes: tuple[tuple[int, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    number: int
    is_root: bool
    attributes: str

    @property
    def elements(self) -> int:
        return sum(math.prod(sizes) for _, sizes in self.shapes)

    @property
    def nbytes(self) -> int:
        return sum(-(-bits * math.prod(sizes) // 8) for bits, sizes in self.shapes)

    def named(self, attribute: str) -> str:
        """The computation of an attribute; empty if it has none."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """The numbers of lhs_contracting_dims={1}, or of "lhs_contracting_dimensions":["1"]."""
        found = re.search(rf'\b{attribute}"?[=:] ?[{{\[]([\d,"\s]*)[}}\]]', self.attributes)
        return tuple(int(n) for n in re.findall(r"\d+", found[1])) if found else ()

    @property
    def target(self) -> str:
        """The function of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation: its instructions by name, in order."""

    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(one for one in self.instructions.values() if one.is_root)

    @property
    def parameters(self) -> list[Instruction]:
        parameters = [one for one in self.instructions.values() if one.opcode == "parameter"]
        return sorted(parameters, key=lambda one: one.number)

    def operand(self, one: Instruction, index: int = 0) -> Instruction:
        return self.instructions[one.operands[index]]

    def behind(self, one: Instruction) -> Instruction:
        """What it is a bitcast of."""
        while one.opcode == "bitcast":
            one = self.operand(one)
        return one


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of the one that runs.

    Raises ValueError for text that is no HLO module.
    """
    found: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            header = HEADER.match(line)
            if header:
                current = found[header[2]] = {}
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            one = parse_instruction(line)
            if one is not None:
                current[one.name] = one
    if not entry:
        raise ValueError("the text of an optimised HLO module is wanted; this has no ENTRY")
    return {name: Computation(lines) for name, lines in found.items()}, entry


def parse_instruction(line: str) -> Instruction | None:
    line = COMMENT.sub("", line)
    match = INSTRUCTION.match(line)
    if match is None:
        return None
    # a tuple's type may hold tuples, which the pattern's shortest match ends too early
    if match[2].startswith("("):
        start = match.start(2)
        end = closing(line, start)
        rest = re.match(r" ([a-z][\w\-]*)\(", line[end:])
        if rest is None:
            return None
        kind, opcode, opened = line[start:end], rest[1], end + rest.end() - 1
    else:
        kind, opcode, opened = match[2], match[3], match.end() - 1
    closed = closing(line, opened)
    inside = line[opened + 1 : closed - 1]
    return Instruction(
        name=match[1],
        opcode=opcode,
        shapes=tuple(shapes_in(kind)),
        operands=() if opcode == "constant" else tuple(re.findall(r"%([\w.\-]+)", inside)),
        number=int(inside) if opcode == "parameter" else 0,
        is_root=line.lstrip().startswith("ROOT "),
        attributes=line[closed:],
    )


def closing(line: str, opened: int) -> int:
    """The place after the bracket that closes the one at `opened`."""
    depth = 0
    for place in range(opened, len(line)):
        depth += {"(": 1, ")": -1}.get(line[place], 0)
        if depth == 0:
            return place + 1
    return len(line)


def shapes_in(kind: str) -> Iterator[tuple[int, tuple[int, ...]]]:
    for dtype, sizes in SHAPE.findall(kind):
        if dtype != "token":
            yield bits(dtype), tuple(int(size) for size in sizes.split(",") if size)


def bits(dtype: str) -> int:
    """Of an element in memory: bf16 → 16, pred → 8, s4 → 4, f8e4m3fn → 8, c64 → 64."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits and dtype != "pred" else 8
