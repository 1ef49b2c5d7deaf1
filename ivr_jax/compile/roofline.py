"""An estimate of a compiled program's time: its schedule, played through with the compiler's own cycle counts.

What is known: the schedule, each fusion's `estimated_cycles`, every collective with its size and group.  What is
assumed: `EFFICIENCY` of the attention kernel, whose cycles the compiler does not know; that a group of chips uses both
directions of as many torus dimensions as its size needs; that asynchronous collectives share the links one after
another.  So a time is a prediction, and has been checked on no TPU.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter

from ivr_jax.compile.hlo import Array, Instruction, Module
from ivr_jax.compile.topologies import Topology

EFFICIENCY = 0.5  # share of the peak that splash attention is taken to reach
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "copy-start", "iota",
        "after-all", "partition-id", "slice-start", "slice-done")  # fmt: skip


@dataclasses.dataclass
class Estimate:
    """Of one call of a program, on one chip.

    Attributes:
      seconds: the whole; `exposed`: the part of it that waits for collectives.
      hbm_bytes: read and written by the instructions, as far as their types say.
      wire_bytes: moved by collectives, by kind.
      synchronous, asynchronous: how many collectives run, counted with their loops; `waiting` names those in loops that
        are synchronous, by bytes.
    """

    seconds: float = 0.0
    exposed: float = 0.0
    hbm_bytes: float = 0.0
    wire_bytes: Counter = dataclasses.field(default_factory=Counter)
    synchronous: float = 0.0
    asynchronous: float = 0.0
    waiting: Counter = dataclasses.field(default_factory=Counter)

    def add(self, other: Estimate, times: float) -> None:
        """Adds `times` times `other`."""
        for field in ("seconds", "exposed", "hbm_bytes", "synchronous", "asynchronous"):
            setattr(self, field, getattr(self, field) + times * getattr(other, field))
        for field in ("wire_bytes", "waiting"):
            for key, value in getattr(other, field).items():
                getattr(self, field)[key] += times * value


class Player:
    """Plays a module's schedule for one topology; see `estimate`."""

    def __init__(self, module: Module, topology: Topology):
        self._module, self._topology = module, topology
        self._done: dict[tuple[str, int], Estimate] = {}

    def play(self, name: str, trips: int = 1) -> Estimate:
        """One pass through computation `name`, the body of a loop of `trips` passes."""
        key = name, trips
        if key not in self._done:
            self._done[key] = self._play(self._module.computations[name], trips)
        return self._done[key]

    def _play(self, instructions: list[Instruction], trips: int) -> Estimate:
        found, links, pending, prepared = Estimate(), 0.0, {}, {}
        types = {i.name: i.arrays for i in instructions}
        for instruction in instructions:
            opcode = instruction.opcode
            if opcode == "while":
                times = self._module.trips(instruction)
                found.add(self.play(instruction.called("body"), times), times)
            elif opcode == "call":
                found.add(self.play(instruction.called("to_apply")), 1)
            elif opcode == "conditional":  # which branch runs is known only at run time: the longest one is counted
                found.add(max(map(self.play, instruction.branches), key=lambda branch: branch.seconds), 1)
            elif opcode.endswith("-done") and instruction.operands and instruction.operands[0] in pending:
                wait = max(0.0, pending.pop(instruction.operands[0]) - found.seconds)
                found.seconds, found.exposed = found.seconds + wait, found.exposed + wait
            elif opcode == "async-update" and instruction.operands and instruction.operands[0] in pending:
                end, seconds = pending.pop(instruction.operands[0]), prepared.pop(instruction.operands[0], 0.0)
                pending[instruction.name] = links = max(links, found.seconds) + seconds if seconds else end
            elif (kind := self._collective(instruction)) is not None:
                seconds = self._wire_seconds(kind[1], kind[2])
                found.wire_bytes[kind[0]] += kind[1]
                if not opcode.endswith("-start"):
                    found.seconds, found.exposed = found.seconds + seconds, found.exposed + seconds
                    found.synchronous += 1
                    found.waiting[f"{kind[0]} {_shape(instruction)}"] += kind[1]
                    continue
                found.asynchronous += 1
                if opcode == "async-start" and not instruction.operands:  # it gets its operands with its update
                    pending[instruction.name], prepared[instruction.name] = found.seconds, seconds
                else:
                    pending[instruction.name] = links = max(links, found.seconds) + seconds
            elif opcode not in FREE and not opcode.endswith("-done"):
                bytes_ = self._hbm_bytes(instruction, types, trips)
                found.hbm_bytes += bytes_
                if not opcode.endswith("-start"):
                    found.seconds += self._seconds(instruction, types, bytes_)
        return found

    def _seconds(self, instruction: Instruction, types: dict[str, tuple[Array, ...]], bytes_: float) -> float:
        chip = self._topology.chip
        if instruction.opcode == "custom-call":
            return self._attention_seconds(instruction, types) or bytes_ / chip.bandwidth
        cycles = instruction.cycles
        return cycles / chip.clock if cycles is not None else bytes_ / chip.bandwidth

    def _attention_seconds(self, instruction: Instruction, types: dict[str, tuple[Array, ...]]) -> float:
        """Of a splash attention kernel, from its largest operand [B, H, T, h]; 0 for another custom call."""
        kernel = re.search(r"splash\w*?_(fwd|dkv|dq)", instruction.name)
        if kernel is None:
            return 0.0
        arrays = [array for name in instruction.operands for array in types.get(name, ()) if len(array.shape) >= 3]
        shape = max((array.shape for array in arrays), key=math.prod, default=(0, 0, 0))
        products = {"fwd": 2, "dq": 3, "dkv": 5}[kernel.group(1)]
        return products * math.prod(shape) * shape[-2] / (EFFICIENCY * self._topology.chip.flops)

    def _hbm_bytes(self, instruction: Instruction, types: dict[str, tuple[Array, ...]], trips: int) -> float:
        """Operands and results in HBM; of an array stacked over the loop's passes, one pass's share.

        A scatter (a fusion without cycles, done in place) reads its updates and writes as much.
        """
        if instruction.opcode == "fusion" and instruction.cycles is None and instruction.in_place is not None:
            updates = [types.get(name, ()) for i, name in enumerate(instruction.operands) if i != instruction.in_place]
            return 2 * sum(array.size for arrays in updates for array in arrays if not array.near)
        arrays = [*instruction.arrays, *(array for name in instruction.operands for array in types.get(name, ()))]
        stacked = trips if trips > 1 else 0
        if "decode_attention" in instruction.name:  # gets the cache of all layers and reads one
            layers = next((array.shape[0] for array in arrays if len(array.shape) == 5), 1)
            return sum(array.size * _read_share(array, layers) for array in arrays)
        return sum(array.size / (trips if array.shape[:1] == (stacked,) else 1) for array in arrays if not array.near)

    def _collective(self, instruction: Instruction) -> tuple[str, float, int] | None:
        """(kind, bytes that a chip receives, size of its group) of a collective, or of a fusion around one."""
        opcode = instruction.opcode.removesuffix("-start")
        inner, results = instruction, instruction.arrays
        if opcode in ("fusion", "async"):
            name = instruction.called("calls")
            inner = next((i for i in self._flat(name) if i.opcode.removesuffix("-start") in COLLECTIVES), None)
            if inner is None:
                return None
            opcode = inner.opcode.removesuffix("-start")
            results = next((i.arrays for i in self._module.computations[name] if i.root), results)
        if opcode not in COLLECTIVES:
            return None
        group = group_size(inner.rest, self._topology.count)
        whole = max((array.size for array in inner.arrays), default=0.0)
        if opcode == "reduce-scatter":
            whole *= group
        elif opcode == "all-reduce" and max((array.size for array in results), default=0.0) <= whole / 1.5:
            opcode = "reduce-scatter"  # of what is added up but a share is kept
        if opcode == "collective-permute":
            return opcode, whole, group
        return opcode, whole * (group - 1) / group * (2 if opcode == "all-reduce" else 1), group

    def _flat(self, name: str | None) -> list[Instruction]:
        found = []
        for instruction in self._module.computations.get(name or "", []):
            found.append(instruction)
            if instruction.opcode in ("fusion", "call", "async-start", "custom-call"):
                found += self._flat(instruction.called("calls|to_apply|called_computations"))
        return found

    def _wire_seconds(self, size: float, group: int) -> float:
        chip, dimensions, reach = self._topology.chip, 0, 1
        for length in sorted(self._topology.shape, reverse=True):
            if reach >= group:
                break
            dimensions, reach = dimensions + 1, reach * length
        return size / (chip.link * min(chip.links, 2 * max(1, dimensions)))


def estimate(module: Module, topology: Topology, one_pass: bool = False) -> Estimate:
    """The whole program on one chip of `topology`; with `one_pass` one pass through its first loop alone."""
    player = Player(module, topology)
    loop = next((i for i in module.computations[module.entry] if i.opcode == "while"), None) if one_pass else None
    return player.play(loop.called("body") if loop else module.entry)


def group_size(attributes: str, chips: int) -> int:
    """Chips that take part in one group of a collective, from its attributes."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found.group(2)))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(found.group(2))
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found.group(1).split(","))
    return 2 if "source_target_pairs" in attributes else chips


def _read_share(array: Array, layers: int) -> float:
    """What the decode-attention kernel reads of an operand: one layer, and of scales [K, L, B, S] 8 rows for each."""
    if len(array.shape) == 5:
        return 1 / layers
    is_scale = len(array.shape) == 4 and array.dtype == "f32" and array.shape[1] == layers
    return min(8, array.shape[2]) / layers if is_scale else 1.0


def _shape(instruction: Instruction) -> str:
    largest = max(instruction.arrays, key=lambda array: array.size, default=None)
    return f"{largest.dtype}[{','.join(map(str, largest.shape))}]" if largest else ""
