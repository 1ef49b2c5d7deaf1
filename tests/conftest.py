"""One strict, repeatable session for all tests: CPU, no network, no display, no silent rank promotion.

Programs run for a moment here and compile for seconds: XLA leaves out LLVM's optimisations, emits loops by its older
way, and does not split modules, which together compile four times as fast and change neither the graph nor how it is
partitioned; `make test-default-flags` runs the numerics as XLA compiles them by default.

Compiled programs are kept under `.cache/` and shared with the processes that tests start.  The number of devices is
left alone: a test of sharding starts its own process with as many as it needs.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
CACHE = TESTS.parent / ".cache"

# Read by the libraries on import, and inherited by subprocesses.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("XLA_FLAGS", " ".join([
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
]))  # fmt: skip
# Idle threads of PyTorch and of numpy's BLAS spin: on models this small they take half of the time and gain none.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Tracing makes many small objects that live on; to search them for garbage at every 700 new ones costs noticeable time.
gc.set_threshold(50_000, 10, 10)

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# The same examples every time; a slow machine is no failure.
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

# The longest first, all to one of two workers while the other takes the rest: what starts last ends soon, and the
# fixtures of a module are made once.
LONGEST = [
    "test_end_to_end", "test_processes", "test_engine", "test_resume", "test_generate", "test_sharding", "test_on_mesh",
    "test_quickstart",
]  # fmt: skip


# Pure functions and formats: what `make test-fast` runs.  Everything else carries the marker `slow`.
FAST = {
    "protocol", "world", "rewards", "data", "review", "test_import_order", "test_images", "test_cli", "test_config",
    "test_install", "test_readme",
}  # fmt: skip


def is_slow(path: Path) -> bool:
    parts = path.relative_to(TESTS).with_suffix("").parts
    return parts[0] not in FAST or path.stem == "test_browser"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make test-fast` need not import the modules whose tests it leaves out."""
    inside = TESTS in collection_path.parents
    return True if config.option.markexpr == "not slow" and inside and is_slow(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_slow(item.path):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="module", autouse=True)
def few_memory_mappings():
    """Every compiled program holds mappings, of which Linux grants a process 65,530: a worker gives them up in time."""
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config and a command, made the current one."""
    import tiny_command

    tiny_command.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
