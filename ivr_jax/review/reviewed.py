"""The reviewed dataset: what both reviewers accepted."""

from __future__ import annotations

import os

from ivr_jax.data.store import TrajectoryDataset, TrajectoryWriter
from ivr_jax.errors import UserError
from ivr_jax.review.agreement import Agreement, agreement
from ivr_jax.review.decisions import Decisions


def write_reviewed(dataset: TrajectoryDataset, decisions: Decisions, out: str | os.PathLike) -> Agreement:
    """Writes the unanimously accepted trajectories of `dataset` to the dataset folder `out`, in their order.

    Samples that a reviewer has not judged are left out like rejected ones; the provenance counts them apart.

    Returns:
      The agreement of the reviewers.

    Raises:
      UserError: nothing was accepted by both, or `out` cannot be written.
    """
    standing = decisions.standing()
    found = agreement(standing, decisions.reviewers)
    accepted: dict[int, int] = {}
    for decision in standing:
        if decision.verdict == "accept":
            accepted[decision.position] = accepted.get(decision.position, 0) + 1
    kept = sorted(position for position, count in accepted.items() if count == 2)
    if not kept:
        raise UserError(f"{decisions.reviewers[0]} and {decisions.reviewers[1]} accepted no sample in common.",
                        "Review first; --report shows how far it has come.")
    review = {
        "reviewers": list(decisions.reviewers),
        "judged_by_both": found.both,
        "not_judged_by_both": len(dataset) - found.both,
        "verdicts": {f"{one}/{two}": n for (one, two), n in found.pairs.items()},
        "accepted_by_both": len(kept),
        "kappa": found.kappa,
    }
    provenance = {"source_provenance": dataset.manifest["provenance"], "review": review}
    with TrajectoryWriter(out, provenance) as writer:
        for position in kept:
            trajectory = dataset[position]
            writer.add(trajectory, dataset.images(trajectory))
    return found
