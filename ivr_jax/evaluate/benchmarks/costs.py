"""What a run will cost, before anything is spent: prompts, answers, judge calls, tokens and price."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ivr_jax.evaluate.benchmarks import prompts
from ivr_jax.evaluate.benchmarks.interface import Benchmark, Item, Kind, for_mode
from ivr_jax.services.config import ServiceConfig

_CHARACTERS_PER_TOKEN = 3.5
_REPLY_TOKENS = 250  # of a reply with reasoning, when the service's max_tokens does not bound it


@dataclasses.dataclass(frozen=True)
class Costs:
    """Tokens are estimates: text by its length, an image by `ServiceConfig.image_tokens`, a reply by `max_tokens`."""

    prompts: int
    answers: int
    judge_calls: int
    pictures: int
    tokens_in: int
    tokens_out: int
    price: float

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"prompts       {self.prompts:,}",
            f"answers       {self.answers:,}",
            f"judge calls   {self.judge_calls:,}, showing {self.pictures:,} images",
            f"judge tokens  about {self.tokens_in:,} in, {self.tokens_out:,} out",
            f"price         {self.price:,.2f}" if self.price else "price         not known: set config.judge.price_in "
            "and price_out, per million tokens",
        ]


def estimate(
    benchmark: Benchmark,
    items: Sequence[Item],
    samples: int,
    form: str,
    modes: Sequence[str],
    judge: ServiceConfig | None,
    own_prompts: Path | None = None,
) -> Costs:
    """The costs of a whole run, nothing of it on record.

    Args:
      form: of the judge; only a "chat" judge has tokens and a price.
      judge: its settings; None when none is named.
    """
    calls = pictures = tokens_in = tokens_out = 0
    for item in items:
        for question in for_mode(benchmark.questions(item, 0, form), modes):
            calls += samples
            if form != "chat":
                continue
            pictures += samples * len(question.pictures)
            text = int(len(prompts.render(question, own_prompts)) / _CHARACTERS_PER_TOKEN)
            tokens_in += samples * (text + len(question.pictures) * (judge.image_tokens if judge else 0))
            reply = 1 if question.kind == Kind.PROBABILITY else (judge.max_tokens if judge else 0) or _REPLY_TOKENS
            tokens_out += samples * reply
    price = (tokens_in * judge.price_in + tokens_out * judge.price_out) / 1e6 if judge else 0.0
    return Costs(len(items), len(items) * samples, calls, pictures, tokens_in, tokens_out, price)
