"""README and docs tell the truth: the tree of folders, and every command, which is parsed as if a user had typed it."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest

from ivr_jax import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACEHOLDERS = ("…", "...", "$")  # of commands that a reader completes


class Parsed(Exception):
    """Raised in place of running the command."""


def tree() -> dict[str, str]:
    """Path relative to the repository, as README's tree has it, with its annotation."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- tree:.*?-->\n```\n(.*?)```", text, re.DOTALL)[1]
    found = {}
    for line in block.splitlines():
        path, _, meaning = line.strip().partition(" ")
        found[("ivr_jax/" if line.startswith("  ") else "") + path] = meaning.strip()
    return found


def test_the_tree_names_every_folder_and_root_module_and_nothing_else():
    package = ROOT / "ivr_jax"
    folders = {f"ivr_jax/{file.parent.name}/" for file in package.glob("*/__init__.py")}
    modules = {f"ivr_jax/{file.name}" for file in package.glob("*.py") if file.name != "__init__.py"}
    beside = {"ivr_jax/", "configs/", "launch/", "tests/", "benchmarks/", "docs/", "examples/"}
    beside = {name for name in beside if (ROOT / name).is_dir()}
    assert set(tree()) == folders | modules | beside


def commands() -> list[tuple[str, str]]:
    """(page, command) of every `python -m ivr_jax.NAME …` in a code block, continuation lines joined."""
    found = []
    for page in PAGES:
        for block in FENCE.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.match(r"\s*(?:[A-Z_]+=\S+ )*(python -m ivr_jax\..*)", line)
                if command and not any(sign in line for sign in PLACEHOLDERS):
                    found.append((page.relative_to(ROOT).as_posix(), command[1].strip()))
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_parses(page, command, tmp_path, monkeypatch):
    words = shlex.split(command, comments=True)
    module = words[2]
    if importlib.util.find_spec(module).submodule_search_locations is not None:
        module += ".__main__"

    def parse(main, *, config, workdir=True, add_flags=None, argv=None, **of_buckets):
        arguments = list(words[2:] if argv is None else argv)
        cli.parse(arguments, config=config, workdir=workdir, add_flags=add_flags)
        raise Parsed

    monkeypatch.setattr(cli, "prepare_workdir", lambda path, *names, **options: tmp_path)
    monkeypatch.setattr("sys.argv", words[2:])
    with mock.patch.object(cli, "run", parse), pytest.raises((Parsed, SystemExit)) as end:
        importlib.import_module(module).entry()
    assert end.type is Parsed or end.value.code == 0  # 0: --help


@pytest.mark.parametrize("page", [page.relative_to(ROOT).as_posix() for page in PAGES])
def test_links_lead_to_files(page):
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]+)", text):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", [page.relative_to(ROOT).as_posix() for page in PAGES])
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for block in FENCE.findall((ROOT / page).read_text(encoding="utf-8")):
        assert set(re.findall(r"^make ([a-z-]+)", block, re.MULTILINE)) <= targets


@pytest.mark.parametrize("page", [page.relative_to(ROOT).as_posix() for page in PAGES])
def test_code_that_a_page_names_exists(page):
    """Python files by their path, and the test that `pytest … -k NAME` chooses."""
    text = re.sub(r"--out=\S+", "", (ROOT / page).read_text(encoding="utf-8"))
    known = {file.name for folder in ("ivr_jax", "tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")}
    for path in re.findall(r"(?<![\w/.])((?:[\w-]+/)*[\w-]+\.py)(?!\w)", text):
        exists = (ROOT / path).is_file() or (ROOT / "ivr_jax" / path).is_file()
        assert exists or "/" not in path and path in known, path
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    for chosen in re.findall(r"-k (\w+)", text):
        assert re.search(rf"def test_\w*{chosen}", tests), chosen
