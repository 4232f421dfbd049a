"""What devices send each other in a compiled program, read from its text.

A collective inside a loop runs as often as the loop: the count is the compiler's `known_trip_count`, else the constant
that the loop's condition compares its counter with (a scan counts from 0 by ones). Of a conditional, the branch that
sends most is taken. A TPU program splits a collective that overlaps with computing into several fusions, which share its
channel: they are one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "token": 0}  # other types end in their bits: bf16, f8e4m3fn, s4, c64
_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([0-9,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?(\S+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*)$")
_TRIPS = re.compile(r'known_trip_count[^0-9]*(\d+)')


@dataclass(frozen=True)
class Collective:
    """One collective operation of the program.

    `group`: members of one of its groups, as positions in the flattened mesh; a permutation's are the two ends of one pair that
    differ. Empty between slices, whose network the program names by itself. `bytes`: what a device sends, once, when it runs as a
    ring of g members: (g - 1) operands for all-gather, (g - 1) / g of one for reduce-scatter and all-to-all, twice that
    for all-reduce, one for a permutation.
    """

    kind: str
    group: tuple[int, ...]
    link: str
    bytes: int
    times: int = 1


class Program(NamedTuple):
    """Every collective, and how many loops with collectives inside have a length that the text does not tell (taken as 1)."""

    collectives: tuple[Collective, ...]
    unknown_loops: int


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


def read(text: str, slices: int = 1) -> Program:
    """The collectives of `compiled.as_text()`. `slices`: how many the program runs on."""
    return _Reader(text, slices).read()


def size_of(shape: str) -> int:
    """Bytes of "bf16[8,128]{1,0}", or of all arrays of a tuple."""
    total = 0
    for kind, dims in _ARRAY.findall(shape):
        digits = re.search(r"\d+", kind)
        bits = _BITS.get(kind, int(digits[0]) if digits else 0)
        total += math.prod(int(d) for d in dims.split(",") if d) * bits / 8
    return math.ceil(total)


def groups_of(rest: str, devices: int) -> tuple[int, ...]:
    """The first of an instruction's `replica_groups` (or the first pair of a permutation that moves anything)."""
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", rest)
    if pairs:
        ends = (tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", pairs[1]))
        return next((pair for pair in ends if pair[0] != pair[1]), ())
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*)\))?\s*\{([^}]*)\}", rest)
    if mesh:
        return _mesh_group(*mesh.groups())
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        shape, source, order = (tuple(map(int, part.split(","))) if part else None for part in iota.groups())
        numbers = np.arange(math.prod(source)).reshape(source).transpose(order)
        return tuple(int(n) for n in numbers.reshape(shape)[0])
    written = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    return tuple(map(int, written[1].split(","))) if written else tuple(range(devices))


def _mesh_group(axes: str, ids: str | None, used: str) -> tuple[int, ...]:
    """"'a'=4,'b'=8" with {'b'}, or {'b':(2)4}: 4 of b's positions, 2 of its own being outside of them."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    numbers = np.arange(math.prod(sizes.values())) if not ids else np.array([int(n) for n in re.findall(r"\d+", ids)])
    split, inside = [], []
    parts = {name: (int(before or 1), int(size) if size else sizes[name])
             for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", used)}
    for name, size in sizes.items():
        before, own = parts.get(name, (1, 1))
        split += [before, own, size // (before * own)]
        inside += [False, name in parts, False]
    index = tuple(slice(None) if keep else 0 for keep in inside)
    return tuple(int(n) for n in numbers.reshape(split)[index].reshape(-1))


class _Reader:
    def __init__(self, text: str, slices: int) -> None:
        self.computations, self.entry = _computations(text)
        header = text.split("\n", 1)[0]
        found = re.search(r"num_partitions=(\d+)", header)
        self.devices, self.slices, self.unknown = int(found[1]) if found else 1, slices, 0

    def read(self) -> Program:
        return Program(tuple(self._frame(self.entry)), self.unknown)

    def _frame(self, name: str) -> list[Collective]:
        """The collectives of a computation that runs as one, called or looped over."""
        return list(self._inside(name, set(), fused=False))

    def _inside(self, name: str, channels: set[str], fused: bool) -> Iterator[Collective]:
        instructions = self.computations.get(name, {})
        for instruction in instructions.values():
            opcode, rest = instruction.opcode, instruction.rest
            if opcode == "while":
                body = self._frame(_called(rest, "body")[0])
                trips = self._trips(rest) if body else 1
                yield from (replace(c, times=c.times * trips) for c in body)
            elif opcode == "conditional":
                branches = [self._frame(branch) for branch in _called(rest, "branch_computations", "true_computation", "false_computation")]
                yield from max(branches, key=lambda found: sum(c.bytes * c.times for c in found))
            elif opcode == "fusion":
                yield from self._inside(_called(rest, "calls")[0], channels, fused=True)
            elif opcode in ("call", "async-start"):
                for called in _called(rest, "to_apply", "calls", "called_computation"):
                    yield from self._frame(called)
            else:
                found = self._collective(instruction, instructions, name)
                channel = re.search(r"channel_id=(\d+)", rest)
                if found is None or (fused and channel and channel[1] in channels):
                    continue
                if fused and channel:
                    channels.add(channel[1])
                yield found

    def _collective(self, instruction: _Instruction, around: dict[str, _Instruction], computation: str) -> Collective | None:
        kind, link = instruction.opcode.removesuffix("-start"), "ici"
        group: tuple[int, ...] = ()
        if instruction.opcode == "send" and "_xla_megascale_transfer_type" in instruction.rest:
            kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)[1].lower().replace("_", "-")
            members, link, operands = self.slices, "dcn", instruction.operands[:1]
        elif kind in KINDS:
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # how a TPU program writes one
            group = groups_of(instruction.rest, self.devices)
            members, operands = len(group), instruction.operands
        else:
            return None
        size = sum(size_of(around[name].shape) for name in operands if name in around)
        shares = {"all-gather": members - 1, "all-reduce": 2 * (members - 1) / members, "collective-permute": 1} if members else {}
        sent = round(size * shares.get(kind, (members - 1) / members)) if members > 1 else 0
        return Collective(kind, group, link, sent) if sent else None

    def _trips(self, rest: str) -> int:
        known = _TRIPS.search(rest)
        if known:
            return int(known[1])
        condition = self._with_fusions(_called(rest, "condition")[0])
        compared = [i for i in condition if i.opcode == "compare" and "direction=LT" in i.rest]
        constants = {i.operands[0] for i in condition if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.shape)}
        if len(compared) == 1 and len(constants) == 1:
            return int(constants.pop())
        self.unknown += 1
        return 1

    def _with_fusions(self, name: str) -> list[_Instruction]:
        found = list(self.computations.get(name, {}).values())
        return found + [inner for i in found if i.opcode == "fusion" for inner in self._with_fusions(_called(i.rest, "calls")[0])]


def _called(rest: str, *attributes: str) -> list[str]:
    names: list[str] = []
    for attribute in attributes:
        found = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|%?([^\s,]+))", rest)
        if found:
            names += [name.strip().lstrip("%") for name in (found[1] or found[2]).split(",")]
    return names


def _computations(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith("HloModule"):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(*found.groups())
            if instruction:
                current[instruction.name] = instruction
    return computations, entry


def _instruction(name: str, text: str) -> _Instruction | None:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    opcode = re.match(r" ([\w-]+)\(", text[end:])
    if not opcode:
        return None
    start = end + opcode.end()
    stop = _closing(text, start - 1)
    operands = tuple(part.split()[-1].lstrip("%") for part in _comma_split(text[start:stop]) if part.strip())
    return _Instruction(name, text[:end], opcode[1], operands, text[stop + 1:])


def _closing(text: str, start: int) -> int:
    """The place of the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def _comma_split(text: str) -> list[str]:
    """Parts between the commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]
