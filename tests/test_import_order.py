"""Data flows one way: a module imports only from folders above its own, imports inside functions included."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ivr_jax"
LAYERS = (
    "errors files cloud images trajectory thresholds interfaces config heartbeat cli",
    "distributed sharding",
    "protocol",
    "world",
    "models",
    "checkpoints",
    "data",
    "sampling",
    "services",
    "cluster",
    "report",
    "construct",
    "rewards",
    "training",
    "evaluate",
    "review export tokenise convert generate compile score",
    "inspect serve",
    "demo reproduce train",
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    """Dotted name without `ivr_jax`: "models.layers"; the empty name for the package itself."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(file) for file in MODULES}


def imports(file: Path) -> set[str]:
    """Modules of the package that `file` imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("ivr_jax.") for alias in node.names if alias.name.startswith("ivr_jax.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ivr_jax":
            base = ".".join(node.module.split(".")[1:])
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                found.add(inner if inner in NAMES else base)
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{file}: relative import")
    return found - {""}


GRAPH = {name_of(file): imports(file) for file in MODULES}


@pytest.mark.parametrize("module", sorted(name for name in NAMES if name))
def test_a_module_imports_only_from_folders_above_it(module):
    folder = module.split(".")[0]
    for target in GRAPH[module]:
        other = target.split(".")[0]
        below_or_beside = other != folder and RANK[other] >= RANK[folder]
        same_line_of_root_modules = RANK[other] == RANK[folder] and RANK[folder] <= 1
        assert not below_or_beside or same_line_of_root_modules or (folder, other) == ("reproduce", "demo"), target


def test_no_module_imports_itself_through_others():
    reached: dict[str, set[str]] = defaultdict(set)
    for start in GRAPH:
        waiting = list(GRAPH[start])
        while waiting:
            module = waiting.pop()
            if module not in reached[start]:
                reached[start].add(module)
                waiting += GRAPH.get(module, ())
    assert [module for module in GRAPH if module and module in reached[module]] == []


def test_only_train_stands_as_a_command_beside_the_ground_floor():
    root = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"}
    assert root == {name for line in LAYERS[:2] for name in line.split()} & root | {"train"}
