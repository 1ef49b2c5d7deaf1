"""What a variable of the environment that JAX refuses looks like."""

from __future__ import annotations

import pytest

from ivr_jax.errors import refused_variable


@pytest.mark.parametrize(
    "text",
    [
        "Invalid value 'abc' for environment variable 'JAX_SOME_OPTION'",
        "bad value for jax_some_option",
        "invalid literal for int() with base 10: 'abc'",
    ],
)
def test_a_value_that_jax_refuses_is_named_with_its_variable(monkeypatch, text):
    monkeypatch.setenv("JAX_SOME_OPTION", "abc")
    refused = refused_variable(ValueError(text))
    assert refused is not None and "JAX_SOME_OPTION=abc" in refused.what


def test_another_error_is_left_alone(monkeypatch):
    monkeypatch.setenv("JAX_SOME_OPTION", "abc")
    assert refused_variable(ValueError("invalid literal for int() with base 10: 'def'")) is None
    assert refused_variable(TypeError("'JAX_SOME_OPTION'")) is None
