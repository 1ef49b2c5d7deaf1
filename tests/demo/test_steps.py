"""The variables that a step runs with."""

from __future__ import annotations

from ivr_jax.demo import steps


def test_steps_ask_for_huge_pages_unless_the_user_set_tunables(monkeypatch):
    monkeypatch.delenv(steps.MALLOC_VARIABLE, raising=False)
    found = steps.environment(**{steps.CORES_VARIABLE: "2"})
    assert found[steps.MALLOC_VARIABLE] == steps.HUGE_PAGES and found[steps.CORES_VARIABLE] == "2"
    monkeypatch.setenv(steps.MALLOC_VARIABLE, "glibc.malloc.check=1")
    assert steps.environment()[steps.MALLOC_VARIABLE] == "glibc.malloc.check=1"
