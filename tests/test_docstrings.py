"""Every public name of the package has a docstring, or inherits one.

Public: modules, classes, functions and methods whose names do not begin with an underscore, outside functions.  A
method needs none where a base class, or a class that its own class's docstring names in backquotes, documents the
method of that name.  The functions that every command has (`COMMAND`) are documented by their module, the command's
help.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "ivr_jax"
COMMAND = ("main", "entry", "add_flags")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def modules() -> dict[str, ast.Module]:
    files = sorted(PACKAGE.rglob("*.py"))
    return {str(file.relative_to(PACKAGE)): ast.parse(file.read_text()) for file in files if file.read_text().strip()}


def public(node: ast.AST) -> Iterator[Definition]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            if not child.name.startswith("_"):
                yield child
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from public(child)


def classes(trees: dict[str, ast.Module]) -> dict[str, ast.ClassDef]:
    return {node.name: node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def documented(cls: ast.ClassDef, method: str, known: dict[str, ast.ClassDef]) -> bool:
    """Whether `cls`, a base of it, or a class that its docstring refers to documents `method`."""
    for child in cls.body:
        if isinstance(child, Definition) and child.name == method and ast.get_docstring(child):
            return True
    bases = [ast.unparse(base).split("[")[0].split(".")[-1] for base in cls.bases]
    named = re.findall(r"`([A-Z]\w+)`", ast.get_docstring(cls) or "")
    others = [known[name] for name in (*bases, *named) if name in known and known[name] is not cls]
    return any(documented(other, method, {k: v for k, v in known.items() if v is not cls}) for other in others)


def undocumented(trees: dict[str, ast.Module]) -> list[str]:
    known, missing = classes(trees), []
    for file, tree in trees.items():
        if not ast.get_docstring(tree):
            missing.append(file)
        for node in public(tree):
            command = node.name in COMMAND
            if not ast.get_docstring(node) and not command:
                missing.append(f"{file}: {node.name}")
            if isinstance(node, ast.ClassDef):
                methods = [method for method in public(node) if not documented(node, method.name, known)]
                missing += [f"{file}: {node.name}.{method.name}" for method in methods]
    return missing


def test_every_public_name_has_a_docstring():
    assert undocumented(modules()) == []


def test_a_new_public_name_without_one_is_found():
    source = '''"""A module."""
class Base:
    """A base."""
    def told(self):
        """What it does."""
class Child(Base):
    """A child."""
    def told(self): ...
    def other(self): ...
    def _private(self): ...
class Named:
    """See `Base`."""
    def told(self): ...
def function(): ...
def main(): ...
'''
    assert undocumented({"a.py": ast.parse(source)}) == ["a.py: Child.other", "a.py: function"]


def test_a_folder_of_several_modules_lists_them():
    trees = modules()
    folders = {file.parent for file in PACKAGE.rglob("*.py")} - {PACKAGE}
    missing = []
    for folder in sorted(folders):
        names = {file.stem for file in folder.glob("*.py")} - {"__init__", "__main__"}
        tree = trees.get(str((folder / "__init__.py").relative_to(PACKAGE)))
        told = set(re.findall(r"\w+", (ast.get_docstring(tree) if tree else None) or ""))
        missing += [f"{folder.name}: {name}" for name in sorted(names - told) if len(names) > 4]
    assert missing == []
