"""TPU topologies by name ("v5p:4x4x8"), what is published of their chips, and how the real compiler is reached.

The compiler is the package `libtpu` (`pip install libtpu`), or the file that TPU_LIBRARY_PATH names.  It needs no TPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from pathlib import Path

from ivr_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip; figures are the vendor's published ones, but for `hbm`, which is what the compiler lets a program use.

    Attributes:
      hbm: bytes.
      flops: dense bfloat16 operations a second.
      bandwidth: bytes a second from and to HBM.
      link: bytes a second one way over one link to a neighbour; `links`: how many a chip has.
      clock: Hz, what turns the compiler's estimated cycles into seconds.
      dimensions: of its torus.
    """

    hbm: float
    flops: float
    bandwidth: float
    link: float
    links: int
    clock: float
    dimensions: int


CHIPS = {
    "v4": Chip(31.25 * GIB, 275e12, 1228e9, 45e9, 6, 1.05e9, 3),
    "v5p": Chip(95.73 * GIB, 459e12, 2765e9, 90e9, 6, 1.75e9, 3),
    "v5e": Chip(15.75 * GIB, 197e12, 819e9, 45e9, 4, 1.5e9, 2),
    "v6e": Chip(31.24 * GIB, 918e12, 1640e9, 90e9, 4, 1.75e9, 2),
}

# What a slice of a kind has to be described with beside its name: both cores of a v4 chip work as one device.
DESCRIPTION: dict[str, dict[str, str]] = {"v4": {"chip_config_name": "megacore"}}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a pod: kind of chip, and how many there are along each dimension of its torus."""

    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """Its chips' figures."""
        return CHIPS[self.kind]

    @property
    def count(self) -> int:
        """Its number of chips."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"


def parse_topology(name: str) -> Topology:
    """"v5p:4x4x8" → Topology.  Raises UserError for an unknown kind of chip or a shape that its torus cannot have."""
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name.strip())
    if match is None or match.group(1) not in CHIPS:
        raise UserError(f"{name!r} is not a TPU topology.",
                        f"Write KIND:SIZES, as v5p:4x4x8 or v6e:4x8; kinds: {', '.join(CHIPS)}.")
    kind, shape = match.group(1), tuple(map(int, match.group(2).split("x")))
    if len(shape) != CHIPS[kind].dimensions or min(shape) < 1:
        example = "4x4x8" if CHIPS[kind].dimensions == 3 else "4x8"
        raise UserError(f"{kind} slices have {CHIPS[kind].dimensions} dimensions, {name!r} has {len(shape)}.",
                        f"Write for instance {kind}:{example}.")
    return Topology(kind, shape)


def compiler_library() -> Path:
    """The file of the TPU compiler.  Raises UserError when it is not installed."""
    named = os.environ.get("TPU_LIBRARY_PATH")
    if named:
        path = Path(named)
    else:
        found = importlib.util.find_spec("libtpu")
        path = Path(found.origin).with_name("libtpu.so") if found is not None and found.origin else Path("libtpu.so")
    if not path.is_file():
        raise UserError("the TPU compiler is not installed." if not named else f"TPU_LIBRARY_PATH={named} is no file.",
                        "Run pip install libtpu (Linux on x86-64; no TPU is needed), or 'ivr_jax[tpu-aot]'.")
    return path


def compiler_environment(dump: Path) -> dict[str, str]:
    """Environment of a process that compiles for a TPU: quiet, asking no metadata server, dumping its HLO to `dump`."""
    return {
        **os.environ,
        "TPU_LIBRARY_PATH": str(compiler_library()),
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process stops at the first one's lock file
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "XLA_FLAGS": f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*",
    }
