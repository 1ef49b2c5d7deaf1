"""A buffer of drafts on disk: first images by one checkpoint, which several continuations of an answer start from."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from ivr_jax import files
from ivr_jax.errors import UserError
from ivr_jax.sampling.rollout import Drafts

ABOUT = "about.json"


class DraftBuffer:
    """Drafts of one checkpoint in a folder, one file a prompt, so that a resumed run reads the same ones.

    Args:
      fingerprint: of the checkpoint whose policy samples the drafts.

    Raises UserError for a folder that another checkpoint's drafts are in.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str):
        self._folder = pathlib.Path(folder)
        about = self._folder / ABOUT
        if about.is_file():
            saved = json.loads(about.read_text()).get("fingerprint")
            if saved != fingerprint:
                raise UserError(
                    f"{self._folder} holds drafts of another checkpoint than config.init.",
                    "Delete the folder, or train in another --workdir.",
                )
            return
        files.write_json(about, {"fingerprint": fingerprint})

    def _file(self, key: str) -> pathlib.Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"

    def read(self, keys: Sequence[str]) -> Drafts | None:
        """The drafts of prompts, those of a prompt adjacent; None where one has none."""
        paths = [self._file(key) for key in keys]
        if not all(path.is_file() for path in paths):
            return None
        arrays = []
        for path in paths:
            with np.load(path, allow_pickle=False) as stored:
                arrays.append({name: stored[name] for name in stored.files})
        joined = {name: np.concatenate([a[name] for a in arrays]) for name in arrays[0]}
        return Drafts(joined["tokens"], joined["log_probs"], joined.get("kept"))

    def write(self, keys: Sequence[str], drafts: Drafts) -> None:
        """Stores the drafts of prompts, len(drafts) / len(keys) of each; those that are there already stay."""
        each = len(drafts) // len(keys)
        for number, key in enumerate(keys):
            if self._file(key).is_file():
                continue
            part = slice(number * each, (number + 1) * each)
            arrays = {"tokens": drafts.tokens[part], "log_probs": drafts.log_probs[part]}
            if drafts.kept is not None:
                arrays["kept"] = drafts.kept[part]
            with files.new_file(self._file(key)) as file:
                np.savez(file, **arrays)
