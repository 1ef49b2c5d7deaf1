"""`python -m ivr_jax.construct` in processes that can be killed: forked from a server that has imported it already."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import resource
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CONSTRUCT = "ivr_jax.construct.__main__"
KEY = "sk-test-0123456789abcdef"


def construct(arguments: list[str], log: str, file_limit: int | None = None) -> None:
    """The command, its output in the file `log`; files may not grow beyond `file_limit` bytes."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["TEST_KEY"] = KEY
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = [CONSTRUCT, *arguments]
    importlib.import_module(CONSTRUCT).entry()


def start(arguments: list[str], log: Path, file_limit: int | None = None) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([CONSTRUCT])
    process = context.Process(target=construct, args=(arguments, str(log), file_limit))
    process.start()
    return process


def kill(process: multiprocessing.Process, after: float, ready: Callable[[], bool] = lambda: True) -> bool:
    """Kills the process so many seconds after it is `ready`; false when it had ended by itself."""
    while process.is_alive() and not ready():
        process.join(0.005)
    process.join(after)
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return alive


def recorded(journal: Path) -> set[str]:
    """Ids of the questions whose answers the journal holds: the service writes them into its texts; names of images."""
    file = journal / "journal.sqlite"
    if not file.exists():
        return set()
    database = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    try:
        rows = database.execute("select text, image from calls").fetchall()
    except sqlite3.OperationalError:  # killed before the tables were made
        return set()
    finally:
        database.close()
    return {found for text, _ in rows if text for found in re.findall(r"\b[0-9a-f]{16}\b", text)} | {
        image for _, image in rows if image
    }


ENDS = ("direct", "reflection 1", "multi 1", "ambiguous", "direct", "reflection 2", "multi 2", "stuck")


def write_samples(folder: Path, count: int, images: int = 20, side: int = 24, ends: tuple[str, ...] = ENDS) -> Path:
    """A list of `count` samples over small pictures; every seventh has none, every eleventh a ready candidate.

    How they end goes round `ends` (see `openai_service.destiny`).
    """
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for i in range(images):
        pixels = np.random.default_rng(i).integers(0, 255, (side, side + i % 3 * 4, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
    words = ("grey", "mirrored", "like dusk", "a negative", "a poster")
    entries: list[dict[str, Any]] = [
        {
            "key": f"sample_{i:05d}",
            "src_path": None if i % 7 == 6 else f"pictures/{i % images}.png",
            "edit_prompt": f"Make picture {i} {words[i % len(words)]}. [{ends[i % len(ends)]}]",
            "edit_path": f"pictures/{(i + 1) % images}.png" if i % 11 == 10 else None,
            "edit_key": {"category": "tone"},
        }
        for i in range(count)
    ]
    file = folder / "samples.json"
    file.write_text(json.dumps(entries), encoding="utf-8")
    return file


def arguments(url: str, samples: Path, workdir: Path, **settings: object) -> list[str]:
    """The command line for `samples`, both services at `url`; `services` settings apply to both."""
    given = {"passes": 3, "folders": False, "gallery": False, "image_area": 576, "image_multiple": 8} | settings
    both = {"base_url": url, "key_variable": "TEST_KEY", "first_wait": 0.01, "longest_wait": 2.0, "timeout": 120.0}
    both |= given.pop("services", {})
    words = ["--config=photographs_construct", f"--workdir={workdir}", f"--config.samples={samples}"]
    words += [f"--config.{name}={value}" for name, value in given.items()]
    for role in ("analyzer", "generator"):
        words += [f"--config.services.{role}.{name}={value}" for name, value in both.items()]
    return words


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
