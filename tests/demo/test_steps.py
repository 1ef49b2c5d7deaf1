"""The variables that a step runs with, and steps beside others."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from ivr_jax.demo import steps
from ivr_jax.errors import UserError


def test_steps_ask_for_huge_pages_unless_the_user_set_tunables(monkeypatch):
    monkeypatch.delenv(steps.MALLOC_VARIABLE, raising=False)
    found = steps.environment(**{steps.CORES_VARIABLE: "2"})
    assert found[steps.MALLOC_VARIABLE] == steps.HUGE_PAGES and found[steps.CORES_VARIABLE] == "2"
    monkeypatch.setenv(steps.MALLOC_VARIABLE, "glibc.malloc.check=1")
    assert steps.environment()[steps.MALLOC_VARIABLE] == "glibc.malloc.check=1"


WAITS = """
import pathlib, sys, time
print("begun", flush=True)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
print("a bar\\rended", flush=True)
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """What makes a `Beside`, and the text that its console writes; steps of `waits` end when `tmp_path/go` is there."""
    (tmp_path / "waits.py").write_text(WAITS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    console = Console(file=io.StringIO(), width=60)
    return lambda: steps.Beside(tmp_path / "logs", 3, console), console.file


def waits(tmp_path: Path, title: str, status: int = 0) -> steps.Step:
    return steps.Step(title, "waits", (str(tmp_path / "go"), str(status)), beside=True)


def test_what_runs_beside_the_others_is_shown_when_it_has_ended(tmp_path, beside):
    make, shown = beside
    with make() as others:
        others.add(waits(tmp_path, "First"), 1)
        others.add(waits(tmp_path, "Second"), 2)
        assert others.show() == {} and "ended" not in shown.getvalue()
        (tmp_path / "go").touch()  # as another step does, meanwhile
        seconds = others.show(wait=True)
    assert list(seconds) == ["First", "Second"] and min(seconds.values()) > 0
    lines = [line.strip() for line in shown.getvalue().splitlines()]
    assert lines.count("ended") == 2 and "a bar" not in shown.getvalue()


def test_a_failed_step_shows_what_it_said_and_an_error_drops_those_that_wait(tmp_path, beside):
    make, shown = beside
    (tmp_path / "go").touch()
    with pytest.raises(UserError) as error, make() as others:
        others.add(waits(tmp_path, "First", status=3), 1)
        others.show(wait=True)
    assert "First" in error.value.what and "01_waits.log" in error.value.remedy and "ended" in shown.getvalue()
    (tmp_path / "go").unlink()
    with pytest.raises(KeyError), make() as others:
        others.add(waits(tmp_path, "Endless"), 1)
        others.add(waits(tmp_path, "Never"), 2)
        raise KeyError
    assert not (tmp_path / "logs" / "02_waits.log").exists()


def test_programs_share_a_cpu_and_no_accelerator(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    (tmp_path / "jax_plugins" / "xla_cuda12").mkdir(parents=True)  # as jax[cuda12] installs it
    before = steps.accelerator_possible()
    monkeypatch.syspath_prepend(tmp_path)
    assert not before and steps.accelerator_possible()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not steps.accelerator_possible()
