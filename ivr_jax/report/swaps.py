"""The result of a swap test (`ivr_jax.evaluate.swap`) on disk: `swap.json`, read by the report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivr_jax import files

SWAP_FILE = "swap.json"
SCHEMA = "ivr_jax.swap/1"


def write_swap(folder: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Writes `swap.json` into `folder` (made when missing)."""
    files.write_json(Path(folder) / SWAP_FILE, {"schema": SCHEMA, **result})


def read_swap(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads `swap.json`.  Raises UserError when it is missing or of another schema."""
    return files.read_json_object(Path(folder) / SWAP_FILE, "Run the swap test again.", SCHEMA)
