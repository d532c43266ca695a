"""Count the bytes that a compiled program moves from its optimised HLO (`compiled.as_text()`)."""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_PLACED = re.compile(_ARRAY.pattern + r"(?:\{([\d,]*):T\(([\d,]+)\)(?:\([\d,]+\))*(S\(1\))?)?")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(?:body|to_apply|calls|called_computations|branch_computations)=\{?([^,}\s]+(?:, %[^,}\s]+)*)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NAME = re.compile(r'op_name="([^"]*)"')
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "collective-broadcast",
)
# They name memory, or wait for an instruction that is counted at its start.
_MOVE_NOTHING = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier"}
_MOVE_NOTHING |= {"partition-id", "replica-id", "iota", "while", "call", "conditional", "async-start"}


class Instruction(NamedTuple):
    """An instruction of the entry computation, or of one that it calls.

    Attributes:
      opcode: HLO's; of a custom call its target.
      source: its place in the Python program.
      shape: of the result, in HLO's notation.
      read, written: bytes of the operands and of the result at each execution.
      times: number of executions in one run of the program.
      stored: bytes read from and written to main memory as laid out there: padded, and without arrays that a TPU keeps
        on the chip. Elsewhere the sum of `read` and `written`.
    """

    opcode: str
    source: str
    shape: str
    read: int
    written: int
    times: int
    stored: int

    @property
    def moved(self) -> int:
        """Bytes of operands and results in one run of the program."""
        return (self.read + self.written) * self.times


class _Line(NamedTuple):
    shape: str
    opcode: str
    operands: list[str]
    text: str


def size_of(shape: str) -> int:
    """Count the bytes of an array or of all arrays of a tuple, in HLO's notation: `(bf16[16,8]{1,0}, f32[])`."""
    bits = 0
    for dtype, dims in _ARRAY.findall(shape):
        width = _BITS.get(dtype) or int((re.search(r"\d+", dtype) or [0])[0])
        bits += width * math.prod(int(n) for n in dims.split(",") if n)
    return bits // 8


def stored(shape: str) -> int:
    """Count bytes in the main memory of a TPU: rows padded to whole tiles, nothing for arrays on the chip."""
    total = 0
    for dtype, dims, order, tile, on_chip in _PLACED.findall(shape):
        sizes = [int(n) for n in dims.split(",") if n]
        if tile and order:
            sizes = [sizes[int(axis)] for axis in order.split(",")]
            tiles = [int(n) for n in reversed(tile.split(","))]
            tiles += [1] * (len(sizes) - len(tiles))
            sizes = [-(-size // unit) * unit for size, unit in zip(sizes, tiles, strict=False)]
        total += 0 if on_chip else size_of(f"{dtype}[{','.join(map(str, sizes))}]")
    return total


def instructions(text: str) -> Iterator[Instruction]:
    """Iterate over the executed instructions: those of the entry, and of loops, calls and branches within it.

    A loop counts by its trip count where XLA knows it, else once. Instructions inside a fusion move nothing.
    """
    computations, entry = _parse(text)

    def walk(name: str, times: int) -> Iterator[Instruction]:
        lines = computations[name]
        for line in lines.values():
            if line.opcode in ("while", "call", "conditional", "async-start"):
                trips = _TRIPS.search(line.text) if line.opcode == "while" else None
                called = _CALLED.search(line.text)
                for inner in called.group(1).replace("%", "").split(", ") if called else ():
                    yield from walk(inner, times * int(trips.group(1)) if trips else times)
            elif line.opcode not in _MOVE_NOTHING and not line.opcode.endswith(("-done", "-update")):
                target = re.search(r'custom_call_target="([^"]*)"', line.text)
                source = _NAME.search(line.text)
                yield Instruction(
                    opcode=target.group(1) if target else line.opcode,
                    source=source.group(1) if source else "",
                    shape=line.shape,
                    read=sum(size_of(lines[operand].shape) for operand in line.operands if operand in lines),
                    written=size_of(line.shape),
                    times=times,
                    stored=_in_main_memory(line, [lines[name].shape for name in line.operands if name in lines]),
                )

    return walk(entry, 1)


def _in_main_memory(line: _Line, operands: list[str]) -> int:
    if line.opcode == "slice-start":  # its result names the whole operand but it reads only the slice
        piece = line.shape.split("), ")[-1]
        return stored(piece.replace("S(1)", "")) + stored(piece)
    # The result of an asynchronous copy names its operand, too.
    return stored(line.shape) + (0 if line.opcode == "copy-start" else sum(map(stored, operands)))


def collectives(found: list[Instruction]) -> dict[str, tuple[int, int]]:
    """Count (instructions, bytes) of each kind of collective in one run on one device: bytes of the whole arrays."""
    totals: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for instruction in found:
        kind = instruction.opcode.removesuffix("-start")
        if kind in _COLLECTIVES:
            read, result = instruction.read, instruction.written
            if instruction.opcode != kind and result > read:
                result -= read  # the result of an asynchronous start may hold its operands, too
            count, total = totals[kind]
            totals[kind] = count + instruction.times, total + instruction.times * max(read, result)
    return dict(totals)


def _parse(text: str) -> tuple[dict[str, dict[str, _Line]], str]:
    computations: dict[str, dict[str, _Line]] = {}
    entry, lines = "", {}
    for row in text.splitlines():
        if head := _HEAD.match(row):
            lines = computations[head.group(1)] = {}
            entry = head.group(1) if row.startswith("ENTRY ") else entry
        elif found := _INSTRUCTION.match(row):
            name, rest = found.groups()
            end = _closing(rest) if rest.startswith("(") else rest.index(" ")
            shape, rest = rest[:end], rest[end:].lstrip()
            start = rest.index("(")
            end = _closing(rest, start)
            lines[name] = _Line(shape, rest[:start], re.findall(r"%([\w.\-]+)", rest[start:end]), rest[end:])
    return computations, entry


def _closing(text: str, start: int = 0) -> int:
    """Return the index after the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    return len(text)
