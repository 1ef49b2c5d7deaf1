"""What `pip install .` takes along is what the program needs: commands, configs, templates."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import importlib.metadata
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from commands import environment

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


# libraries need them without declaring it
NOT_IMPORTED_BY_US = {"gcsfs", "google_cloud_storage", "importlib_resources", "python_multipart", "s3fs"}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def declared(requirements: list[str]) -> set[str]:
    return {normalised(re.match(r"[A-Za-z0-9_.-]+", requirement)[0]) for requirement in requirements}


def imported() -> set[str]:
    """Distributions, by normalised name, that the package imports anywhere."""
    owners = importlib.metadata.packages_distributions()
    names = set()
    for file in (ROOT / "ivr_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    outside = names - set(sys.stdlib_module_names) - {"ivr_jax"}
    return {normalised(owners[name][0]) for name in outside}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    arguments = setup_arguments()
    own = [name for name in arguments["extras_require"] if name not in ("test", "docs", "tpu", "tpu-aot", "gpu")]
    extras = [requirement for name in own for requirement in arguments["extras_require"][name]]
    assert declared([*arguments["install_requires"], *extras]) - NOT_IMPORTED_BY_US == imported()


def test_training_and_generation_need_no_extra():
    arguments = setup_arguments()
    extras = declared(arguments["extras_require"]["all"]) | {"torch"}
    extras -= declared(arguments["install_requires"])
    owners = importlib.metadata.packages_distributions()
    blocked = sorted(name for name, owner in owners.items() if normalised(owner[0]) in extras)
    code = f"""
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Blocked())
for module in ("train", "training.image_tokenizer", "training.sft", "training.grpo", "generate.__main__"):
    importlib.import_module("ivr_jax." + module)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
