"""`import ivr_jax`: what it offers, what each name says of itself, and what an import costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from commands import environment

import ivr_jax


def test_every_public_name_is_there_and_documented():
    for name in ivr_jax.__all__:
        value = getattr(ivr_jax, name)
        assert inspect.getdoc(value), name
    assert set(ivr_jax.__all__) == set(ivr_jax._EXPORTS) <= set(dir(ivr_jax))


def test_public_functions_are_typed():
    functions = [getattr(ivr_jax, name) for name in ivr_jax.__all__ if inspect.isfunction(getattr(ivr_jax, name))]
    assert len(functions) >= 6
    for function in functions:
        signature = inspect.signature(function)
        assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values()), function


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError):
        ivr_jax.no_such_name  # noqa: B018


def test_the_import_alone_loads_neither_jax_nor_numpy():
    code = "import sys, ivr_jax; print(sorted({'jax', 'numpy', 'flax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
