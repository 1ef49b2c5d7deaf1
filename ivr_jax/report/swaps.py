"""The result of a swap test (`ivr_jax.evaluate.swap`) on disk: `swap.json`, read by the report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivr_jax import files
from ivr_jax.errors import UserError

SWAP_FILE = "swap.json"
SCHEMA = "ivr_jax.swap/1"


def write_swap(folder: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Writes `swap.json` into `folder` (made when missing)."""
    files.write_json(Path(folder) / SWAP_FILE, {"schema": SCHEMA, **result})


def read_swap(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads `swap.json`.  Raises UserError when it is missing or of another schema."""
    path = Path(folder) / SWAP_FILE
    try:
        result = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}.", "Run the swap test again.") from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise UserError(f"{path} is not a swap test of schema {SCHEMA}.", "Run the swap test again.")
    return result
