r"""Evaluate a checkpoint on held-out prompts of the micro-world: scores, images an answer, modes, calibration.

    python -m ivr_jax.evaluate --config=configs/micro_evaluate.py --workdir=runs/demo/eval_sft \
        --config.checkpoint=runs/demo/sft

Writes evaluation.json (every figure with its 95% interval), answers.jsonl and images/ for the report.  A finished
evaluation of the same checkpoint and config is kept.

With --prompts=FILE, prompts of your own, judged when a judge is named; with --benchmark=NAME, a public benchmark
(`python -m ivr_jax.evaluate --benchmark=geneval --help`); with --compare A B, two of its runs side by side.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ivr_jax import cli, files
from ivr_jax.checkpoints import system as systems
from ivr_jax.checkpoints.system import System
from ivr_jax.cloud.mirror import with_urls
from ivr_jax.config import as_dataclass, check_least, claim_workdir
from ivr_jax.evaluate import micro_world, paired, probes, typed
from ivr_jax.evaluate.verdicts import VerdictScorer
from ivr_jax.heartbeat import announced
from ivr_jax.protocol.grammar import GrammarOptions
from ivr_jax.report import metrics, tables
from ivr_jax.report.answers import read_answers, write_answers
from ivr_jax.sampling.layout import load_sampler


def main(call: cli.Call) -> None:
    check_least(call.config, ("batch", "answer_length", "most_edits"))
    check_least(call.config, ("prompts", "each_split", "each_kind", "probe_prompts", "paired_prompts"), 0)
    with files.Lock(call.workdir):
        result = finished_or_made(call.config, call.workdir)
    tables.print_table({call.workdir.name: result})
    if call.config.typed:
        typed.print_answers(read_answers(call.workdir))


def finished_or_made(config: Any, workdir: Path) -> dict[str, Any]:
    """The evaluation in `workdir` if it has this checkpoint and config; otherwise it is run and written there."""
    about = {"checkpoint": systems.name_of(config.checkpoint), "config": config.to_dict()}
    del about["config"]["mesh"]  # the answers are the same on every mesh
    about = json.loads(json.dumps(about))  # as it will be read back: tuples are lists
    if (workdir / metrics.EVALUATION_FILE).exists():
        claim_workdir(workdir, config, resuming=True, ignore=("mesh",))
        result = metrics.read_evaluation(workdir)
        if result["about"] == about:
            print(with_urls(f"evaluate: {workdir} is complete"))
            return result
    claim_workdir(workdir, config, resuming=False)
    tokenizers = config.image_tokenizer or None, config.text_tokenizer or None
    system = load_sampler(config.checkpoint, config.mesh, config.rollout, *tokenizers)
    with system.on_mesh():
        found = micro_world.run(system, config)
        result = metrics.evaluate(found.answers, config.seed, about)
        if config.probe_prompts:
            with announced("evaluate: probes of its verdicts and repairs"):
                result["probes"] = probes.probe(
                    system, config.level, config.probe_prompts, config.most_edits, config.seed + 1, config.batch,
                    config.observe,
                )  # fmt: skip
        if config.paired_prompts:
            with announced("evaluate: the paired verdict test"):
                result["paired"] = paired_verdicts(system, config, found)
    write_answers(workdir, found.answers, found.images)
    metrics.write_evaluation(workdir, result)
    return result


def paired_verdicts(system: System, config: Any, found: micro_world.Evaluated) -> dict[str, Any]:
    """The paired verdict test on the first `config.paired_prompts` prompts of the training mixture."""
    rows = [row for row, split in enumerate(found.splits) if split == micro_world.MIXTURE][: config.paired_prompts]
    cases = paired.world_cases(system, found.tasks, found.rollout, rows, config.seed, paired.reads_request)
    grammar = as_dataclass(GrammarOptions, config.grammar)
    scorer = VerdictScorer(system, grammar, config.answer_length, config.batch)
    return paired.paired_test(cases, scorer, config.seed)


def entry() -> None:
    named = {word.partition("=")[0].lstrip("-") for word in sys.argv[1:] if word.startswith("-")}
    if named & {"benchmark", "compare", "prompts"}:
        from ivr_jax.evaluate.benchmarks import command  # needs the extra `services`

        command.entry()
    cli.run(main, config=True)


if __name__ == "__main__":
    entry()
