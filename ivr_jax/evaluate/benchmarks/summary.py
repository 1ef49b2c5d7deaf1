"""The summary of a run: both modes of every figure with intervals and coverage, answers and judge."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ivr_jax.evaluate.benchmarks.figures import Figure, Score, estimate, flat
from ivr_jax.evaluate.benchmarks.interface import MODES, NOT_JUDGED, Benchmark, Item, Judged, Judgement, State
from ivr_jax.evaluate.benchmarks.run_folder import SCHEMA, AnswerRecord, Found

ANSWER_MODES = ("direct", "reflection", "multi_step", "interleaved", "invalid")


def summarise(
    benchmark: Benchmark,
    items: Sequence[Item],
    judged: Judged,
    judgements: Iterable[Judgement],
    found: Found,
    answers: Sequence[tuple[Item, AnswerRecord]],
    run: Mapping[str, Any],
    modes: Sequence[str] = MODES,
    partial: bool = False,
) -> dict[str, Any]:
    """`summary.json` as a JSON object.

    Args:
      judgements: those of this run and judge, for the counts of states.
      answers: the model's answers; empty when the images are another model's.
      run: `run.json`.
      modes: which figures were asked for.
      partial: give a headline figure also below full coverage.

    Returns:
      `headline` (None below full coverage or without a passed sanity check, unless `partial`), `figures` (name ->
      mode -> estimate, with its coverage), `states`, `answers`, and `run`.
    """
    strata = {item.key: item.category for item in items}
    with_image = found.prompts_with_image()
    seed = int(run.get("seed", 0))
    figures: dict[str, dict[str, Any]] = {}
    for mode in modes:
        for figure in benchmark.figures(items, judged, mode):
            figures.setdefault(figure.name, {"category": figure.category})[mode] = {
                **estimate(figure, strata, seed),
                "coverage": coverage(figure, with_image),
            }
    states = collections.Counter(judgement.state.value for judgement in judgements)
    summary = {
        "schema": SCHEMA,
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "headline_figure": benchmark.headline,
        "headline": None,
        "reasons": [],
        "run": dict(run),
        "prompts": len(items),
        "figures": figures,
        "states": {state.value: states.get(state.value, 0) for state in State},
        "answers": summarise_answers(answers, seed),
        "notes": list(benchmark.notes),
    }
    summary["reasons"] = withheld(benchmark, summary)
    headline = figures.get(benchmark.headline)
    if headline is not None and (partial or not summary["reasons"]):
        summary["headline"] = {mode: headline[mode]["value"] for mode in modes}
    return summary


def coverage(figure: Figure, with_image: set[str]) -> dict[str, list[int]]:
    """`prompts`: [with an image, all] and `judgements`: [got, wanted] of a figure."""
    items = figure.items
    return {
        "prompts": [sum(key in with_image for key in items), len(items)],
        "judgements": [figure.got, figure.wanted],
    }


def withheld(benchmark: Benchmark, summary: Mapping[str, Any]) -> list[str]:
    """Why there is no headline figure; empty when there may be one."""
    if (summary["run"].get("judge") or {}).get("name") == NOT_JUDGED:
        return [NOT_JUDGED]
    reasons = []
    headline = summary["figures"].get(benchmark.headline)
    if headline is None:
        return [f"there is no figure {benchmark.headline!r}"]
    for mode in MODES:
        for name, unit in (("prompts", "prompts have an image"), ("judgements", "judgements were got")):
            got, wanted = headline.get(mode, {}).get("coverage", {}).get(name, (0, 0))
            if got < wanted:
                reasons.append(f"{mode}: {got} of {wanted} {unit}")
    if benchmark.count and summary["prompts"] != benchmark.count:
        reasons.append(f"{summary['prompts']} prompts, {benchmark.count} are published")
    sanity = summary["run"].get("sanity")
    if sanity != "passed":
        reasons.append(f"the judge's sanity check: {sanity or 'not run'}")
    return reasons


def summarise_answers(answers: Sequence[tuple[Item, AnswerRecord]], seed: int) -> dict[str, Any]:
    """Images and tokens an answer, and shares of the modes: over all, and by category; {} without answers."""
    if not answers:
        return {}
    groups: dict[str, list[tuple[Item, AnswerRecord]]] = {"": list(answers)}
    for item, record in answers:
        groups.setdefault(item.category, []).append((item, record))
    described = {name: _describe(group, seed) for name, group in groups.items()}
    return {"overall": described.pop(""), "by_category": described}


def _describe(answers: Sequence[tuple[Item, AnswerRecord]], seed: int) -> dict[str, Any]:
    strata = {item.key: item.category for item, _ in answers}
    drawn = [(item, record) for item, record in answers if record.images]
    modes = collections.Counter(record.mode for _, record in answers)

    def of(name: str, counted: Sequence[tuple[Item, AnswerRecord]]) -> dict[str, Any]:
        scores = [Score(item.key, float(getattr(record, name))) for item, record in counted]
        return estimate(flat(name, scores), strata, seed)

    return {
        "answers": len(answers),
        "images": of("images", drawn),
        "tokens": of("tokens", answers),
        "model_calls": of("model_calls", answers),
        "modes": {mode: modes[mode] / len(answers) for mode in ANSWER_MODES if modes[mode]},
    }
