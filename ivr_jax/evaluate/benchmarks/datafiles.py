"""Reading published prompt files: JSON, JSON lines and Parquet, with one clear error for what is wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ivr_jax import files
from ivr_jax.errors import UserError
from ivr_jax.images import decode_image, image_name, save_png

_AGAIN = "Fetch the file again."


def existing_folder(path: Path, title: str) -> Path:
    """`path`, when it is a folder."""
    if not path.is_dir():
        raise UserError(f"there is no folder {path} with the data of {title}.", "Name it with --data=FOLDER.")
    return path


def find_file(data: Path, names: Sequence[str], title: str) -> Path:
    """The first of `names` (glob patterns below `data`) that exists."""
    existing_folder(data, title)
    for name in names:
        found = sorted(path for path in data.glob(name) if path.is_file())
        if found:
            return found[0]
    raise UserError(f"{data} does not hold the prompts of {title}: there is no {' or '.join(names)}.",
                    f"Name the folder of {title} with --data=FOLDER, as its authors publish it.")


def read_json(path: Path) -> Any:
    """The JSON value of a published file.  Raises UserError when there is none."""
    try:
        return files.read_json(path, _AGAIN)
    except FileNotFoundError:
        raise UserError(f"there is no {path}.", _AGAIN) from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, in order; blank lines are left out."""
    rows = []
    for where, row in files.read_json_lines(path, _AGAIN):
        if not isinstance(row, dict):
            raise UserError(f"{where} is no JSON object.", _AGAIN)
        rows.append(row)
    return rows


def read_rows(path: Path, scratch: Path) -> list[dict[str, Any]]:
    """The rows of a `.jsonl`, `.json` (a list) or `.parquet` file.

    Images that stand inside a Parquet file ({"bytes", "path"}) are written once into `scratch`, and replaced by their
    paths there.
    """
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    if path.suffix == ".json":
        rows = read_json(path)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path} is no list of JSON objects.", _AGAIN)
        return rows
    return _read_parquet(path, scratch)


def _read_parquet(path: Path, scratch: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path} is a Parquet file, and pyarrow is not installed.",
                        "pip install pyarrow, or convert the file to JSON lines.") from None
    rows = []
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=16):
                rows += [_with_files(row, scratch, str(path)) for row in batch.to_pylist()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({error}).", "Fetch the file again.") from None
    return rows


def _with_files(value: Any, scratch: Path, what: str) -> Any:
    """`value` with every image inside it written to `scratch` and replaced by its path."""
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes):
            pixels = decode_image(value["bytes"], f"an image in {what}")
            file = scratch / f"{image_name(pixels)}.png"
            if not file.exists():
                save_png(file, pixels)
            return str(file)
        return {key: _with_files(inner, scratch, what) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_files(inner, scratch, what) for inner in value]
    return value


def fields(row: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]], where: str, title: str) -> None:
    """Raises UserError, naming the field, unless `row` holds every field of `kinds` with a value of its type."""
    for name, kind in kinds.items():
        if name not in row:
            raise UserError(f"{where} has no `{name}`: this is not the prompt file of {title}.",
                            f"Name the folder of {title} with --data=FOLDER.")
        value = row[name]
        if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
            raise UserError(f"{where}: `{name}` is {str(value)[:60]!r}.", "Fetch the file again.")


def unique(keys: Iterable[str], where: str) -> None:
    """Raises UserError when a key occurs twice."""
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise UserError(f"{where} holds the key {key!r} twice.", "Fetch the file again.")
        seen.add(key)


def fingerprint(files: Sequence[Path], data: Path) -> dict[str, str]:
    """SHA-256 of every prompt file, by its path below `data`, or by its name when it is `data`."""
    hashes = {}
    for path in files:
        try:
            name = path.name if path == data else path.relative_to(data).as_posix()
            hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}).", "Fetch the file again.") from None
    return hashes


def changed(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Sentences that say which prompt files differ from those of the run, with their hashes."""
    sentences = []
    for name in sorted({*recorded, *now}):
        before, after = recorded.get(name, "")[:12], now.get(name, "")[:12]
        if before != after:
            sentences.append(f"{name} was {before or 'not there'}, is {after or 'missing'}")
    return sentences
