"""Parts of one construction, for several machines.

Each machine constructs the samples whose key falls into its part, in a workdir of its own; where a model draws the
first images, the batches whose number does (see `construct.baseline`).  Merging copies what their journals hold into
one journal, and construction continues from there with all samples.  So the merged dataset does not depend on the
number of parts, and samples that a part left pending are simply constructed then.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ivr_jax.config import check_same_config, saved_config
from ivr_jax.errors import UserError
from ivr_jax.services.journal import Journal


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index` of `count`: the samples whose key's hash falls there, or every `count`-th batch of samples."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "i/n", i from 0 to n - 1; "" is everything.  Raises UserError for anything else."""
        if not text:
            return cls()
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if match is None or not int(match.group(1)) < int(match.group(2)):
            raise UserError(f"the shard {text!r} is not i/n with i in [0, n).", "Write it as in --shard=0/8.")
        return cls(int(match.group(1)), int(match.group(2)))

    def holds(self, key: str) -> bool:
        """Whether the sample of this key belongs to the part; the same on every machine."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8]) % self.count == self.index

    def holds_batch(self, number: int) -> bool:
        """Whether the batch of this number belongs to the part, where samples are handed out in whole batches."""
        return number % self.count == self.index

    def share(self, quotas: Mapping[str, int]) -> dict[str, int]:
        """The part's share of each quota; all parts' shares add up to it."""
        return {kind: n // self.count + (self.index < n % self.count) for kind, n in quotas.items()}


def merge(journal: Journal, workdirs: Iterable[str], config: Any, ignore: Iterable[str]) -> None:
    """Copies what the journals of `workdirs` know into `journal`.  Doing it again, after a kill say, changes nothing.

    Args:
      config: the run's configuration; those of the parts must be the same but for `ignore`.

    Raises:
      UserError: a workdir holds no journal, was made with another configuration, or is in use.
    """
    for name in workdirs:
        workdir = Path(name).expanduser()
        saved = saved_config(workdir)
        if saved is None or not (workdir / "journal").is_dir():
            raise UserError(f"{workdir} holds no journal of a construction.", "Name the workdirs of its shards.")
        try:
            check_same_config(saved, config, ignore)
        except UserError as error:
            raise UserError(f"{workdir}: {error.what}", "Merge parts of one construction only.") from error
        if (workdir / "journal").resolve() == journal.path.resolve():
            raise UserError(f"{workdir} is to be merged into itself.", "Use another --workdir.")
        with Journal(workdir / "journal") as part:
            journal.take(part)
