"""What `pip install .` takes along is what the program needs: commands, configs, templates."""

from __future__ import annotations

import fnmatch
import importlib
import runpy
from pathlib import Path
from unittest import mock

import pytest

import ivr_jax

ROOT = Path(__file__).resolve().parent.parent


def setup_arguments() -> dict:
    """What setup.py passes to setuptools."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


@pytest.mark.parametrize("line", setup_arguments()["entry_points"]["console_scripts"])
def test_every_command_is_there(line):
    module, _, function = line.partition(" = ")[2].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_configs_are_installed_inside_the_package():
    arguments = setup_arguments()
    assert arguments["package_dir"] == {"ivr_jax.configs": "configs"} and "ivr_jax.configs" in arguments["packages"]


def test_every_folder_with_modules_is_a_package_that_is_installed():
    folders = {file.parent for file in (ROOT / "ivr_jax").rglob("*.py")}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} <= set(setup_arguments()["packages"])


def test_every_data_file_of_the_package_is_installed():
    patterns = [f"{package.replace('.', '/')}/{pattern}"
                for package, names in setup_arguments()["package_data"].items() for pattern in names]
    files = [file.relative_to(ROOT).as_posix() for file in (ROOT / "ivr_jax").rglob("*")
             if file.is_file() and file.suffix not in (".py", ".pyc")]
    assert files and all(any(fnmatch.fnmatch(file, pattern) for pattern in patterns) for file in files)


def test_the_version_has_one_source():
    assert setup_arguments()["version"] == ivr_jax.__version__


def test_tensorflow_is_no_requirement_of_any_kind():
    arguments = setup_arguments()
    named = [*arguments["install_requires"], *(r for extra in arguments["extras_require"].values() for r in extra)]
    assert not [requirement for requirement in named if requirement.startswith(("tensorflow>", "tensorflow="))]
