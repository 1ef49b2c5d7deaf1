"""The notebook runs as it stands, and what it shows is what it stores."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def executed():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute(cwd=str(ROOT), env=environment)
    return notebook


def outputs(notebook: nbformat.NotebookNode, kind: str) -> list[nbformat.NotebookNode]:
    return [out for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == kind]


def test_it_runs_and_shows_an_image_and_scores(executed):
    assert not outputs(executed, "error")
    assert any("image/png" in out.data for out in outputs(executed, "display_data"))
    (scores,) = outputs(executed, "execute_result")
    values = eval(scores.data["text/plain"], {"__builtins__": {}})
    assert set(values) == {"outcome", "format", "step", "reflection", "total"}
    assert 0.2 <= values["total"] <= 1 and values["format"] == 1.0


def test_it_is_stored_with_its_outputs():
    stored = nbformat.read(NOTEBOOK, as_version=4)
    assert any("image/png" in out.data for out in outputs(stored, "display_data"))
