"""How far two reviewers agree: counts, and Cohen's kappa (Cohen 1960)."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence

from ivr_jax.review.decisions import Decision

PAIRS = (("accept", "accept"), ("accept", "reject"), ("reject", "accept"), ("reject", "reject"))


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Two reviewers' verdicts on the samples that both have judged.

    Attributes:
      reviewers: the first and the second.
      pairs: how often (verdict of the first, verdict of the second) occurred.
      judged: how many samples each has judged.
    """

    reviewers: tuple[str, str]
    pairs: dict[tuple[str, str], int]
    judged: tuple[int, int]

    @property
    def both(self) -> int:
        """Samples that both reviewers decided."""
        return sum(self.pairs.values())

    @property
    def observed(self) -> float | None:
        """The share of samples with equal verdicts; None before both have judged one."""
        return (self.pairs["accept", "accept"] + self.pairs["reject", "reject"]) / self.both if self.both else None

    @property
    def kappa(self) -> float | None:
        """(p_o - p_e) / (1 - p_e), p_e the agreement of chance at both reviewers' own rates.

        None where it is undefined: nothing judged by both, or both gave one and the same verdict throughout.
        """
        if not self.both:
            return None
        first = (self.pairs["accept", "accept"] + self.pairs["accept", "reject"]) / self.both
        second = (self.pairs["accept", "accept"] + self.pairs["reject", "accept"]) / self.both
        if first == second and first in (0, 1):
            return None
        chance = first * second + (1 - first) * (1 - second)
        return (self.observed - chance) / (1 - chance)


def agreement(decisions: Iterable[Decision], reviewers: Sequence[str]) -> Agreement:
    """The agreement of the two `reviewers` over their standing `decisions`."""
    first, second = ({d.position: d.verdict for d in decided} for decided in _by(decisions, reviewers))
    pairs = collections.Counter((first[position], second[position]) for position in first.keys() & second.keys())
    return Agreement((reviewers[0], reviewers[1]), {pair: pairs[pair] for pair in PAIRS}, (len(first), len(second)))


def agreement_text(found: Agreement, samples: int) -> str:
    """What the command prints."""
    one, two = found.reviewers
    width = max(len(one) + 9, 16)
    shown = "undefined (nothing to compare, or one verdict throughout)" if found.kappa is None else f"{found.kappa:.3f}"
    observed = "-" if found.observed is None else f"{found.observed:.1%}"
    return "\n".join(
        [
            f"judged: {one} {found.judged[0]} of {samples}, {two} {found.judged[1]} of {samples}, both {found.both}",
            f"{'':<{width}}{two + ' accepts':>{len(two) + 10}}{two + ' rejects':>{len(two) + 10}}",
            *(
                f"{one} {verdict + 's':<{width - len(one) - 1}}"
                f"{found.pairs[verdict, 'accept']:>{len(two) + 10}}{found.pairs[verdict, 'reject']:>{len(two) + 10}}"
                for verdict in ("accept", "reject")
            ),
            f"agreement: {observed}; Cohen's kappa: {shown}",
        ]
    )


def _by(decisions: Iterable[Decision], reviewers: Sequence[str]) -> list[list[Decision]]:
    every = list(decisions)
    return [[d for d in every if d.reviewer == reviewer] for reviewer in reviewers]
