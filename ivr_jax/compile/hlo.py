"""Reads the text of a compiled, scheduled TPU program: computations, their instructions, the lengths of loops."""

from __future__ import annotations

import dataclasses
import math
import re

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(\S+) = (.*?)(?<![\w%.\-])([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\](?:\{[^}]*?(S\(\d+\))?\})?")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ALIASED = re.compile(r'"aliasing_operands":\{"lists":\[\{"indices":\["(\d+)"')
_UNKNOWN = 1 << 60  # what the compiler writes where it has no estimate


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's type; `near` when it is in the chip's own memory (VMEM, SMEM), not in HBM."""

    dtype: str
    shape: tuple[int, ...]
    near: bool

    @property
    def size(self) -> float:
        """Bytes."""
        return BYTES.get(self.dtype, 0) * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`rest` is everything after the opening bracket: operands and attributes."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate, or None."""
        found = _CYCLES.search(self.rest)
        return int(found.group(1)) if found and int(found.group(1)) < _UNKNOWN else None

    @property
    def in_place(self) -> int | None:
        """Which operand the result is written into, where the compiler says so."""
        found = _ALIASED.search(self.rest)
        return int(found.group(1)) if found else None

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the computations of which a `conditional` runs one."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        named = listed.group(1).split(",") if listed else re.findall(r"(?:true|false)_computation=([^\s,]+)", self.rest)
        return tuple(name.strip().lstrip("%") for name in named)

    def called(self, role: str) -> str | None:
        """Name of the computation in `role`= (calls, body, condition, to_apply, …; several with | between)."""
        found = re.search(rf"\b(?:{role})=\{{?%?([^\s,}})]+)", self.rest)
        return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Module:
    """All computations by name, in the order in which their instructions are scheduled."""

    computations: dict[str, list[Instruction]]
    entry: str

    def trips(self, loop: Instruction) -> int:
        """How often a counted `while` runs: the constant that its condition compares with; 1 when there is none."""
        condition = self.computations.get(loop.called("condition") or "", [])
        limits = {i.name: int(m.group(1)) for i in condition
                  if i.opcode == "constant" and (m := re.match(r"(\d+)\)", i.rest))}  # fmt: skip
        for instruction in condition:
            if instruction.opcode in ("compare", "fusion") and instruction.root:
                found = [limits[name] for name in instruction.operands if name in limits]
                return found[0] if found else 1
        return 1


def read(text: str) -> Module:
    """Parses the text.  Raises ValueError when it holds no entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            root, name, kind, opcode, rest = found.groups()
            operands = tuple(re.findall(r"%([^\s,()]+)", rest.split("), ")[0]))
            current.append(Instruction(name, opcode, _arrays(kind), operands, rest, bool(root)))
        elif line == "}":
            current = None
    if entry is None:
        raise ValueError("this text holds no compiled program")
    return Module(computations, entry)


def _arrays(kind: str) -> tuple[Array, ...]:
    return tuple(Array(dtype, tuple(int(n) for n in dims.split(",") if n), bool(near))
                 for dtype, dims, near in _ARRAY.findall(kind))  # fmt: skip
