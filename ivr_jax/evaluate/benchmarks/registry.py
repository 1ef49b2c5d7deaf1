"""The benchmarks by name: one module of `suites/` each."""

from __future__ import annotations

import importlib
import pkgutil

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import suites
from ivr_jax.evaluate.benchmarks.interface import Benchmark


def names() -> list[str]:
    """Every benchmark's name, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(suites.__path__))


def load(name: str) -> Benchmark:
    """The benchmark `name`.  Raises UserError when there is none."""
    if name not in names():
        raise UserError(f"there is no benchmark {name!r}.", f"Use one of {', '.join(names())}.")
    return importlib.import_module(f"{suites.__name__}.{name}").BENCHMARK
