r"""Run a public benchmark, or prompts of your own: generate, judge, summarise.

    python -m ivr_jax.evaluate --benchmark=kris --data=DATA/KRIS_Bench --checkpoint=runs/rl --workdir=runs/kris \
        --config.judge.model=gpt-4o-2024-11-20
    python -m ivr_jax.evaluate --benchmark=geneval --data=DATA/geneval --judge_only --answers=OTHER_MODEL/images \
        --detector=MODELS/mask2former --clip=MODELS/clip --sanity=DATA/sanity --workdir=runs/other
    python -m ivr_jax.evaluate --prompts=mine.jsonl --checkpoint=runs/rl --workdir=runs/mine
    python -m ivr_jax.evaluate --compare runs/a runs/b --data=DATA/KRIS_Bench --workdir=runs/a_b

Everything is resumed by the same command: answers that are written are not drawn again, judgements on record are not
asked for again.  --dry_run says what a run will cost.  Settings stand in --config (benchmark by default).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from absl import flags

from ivr_jax import cli, distributed
from ivr_jax.cloud import inputs
from ivr_jax.cluster import engine as cluster
from ivr_jax.cluster.part import Part
from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import registry
from ivr_jax.evaluate.benchmarks.comparison import compare_runs
from ivr_jax.evaluate.benchmarks.interface import FIXED, STRICT
from ivr_jax.evaluate.benchmarks.session import Session
from ivr_jax.evaluate.benchmarks.suites import own

CONFIG = "benchmark"
READS = ("compare", "data", "rewritten", "answers", "judge_prompts", "detector", "clip", "sanity")
URLS = ("prompts", "checkpoint", "image_tokenizer", "text_tokenizer")


def add_flags(values: flags.FlagValues) -> None:
    distributed.add_flags(values)
    cluster.add_flags(values)

    def text(name: str, meaning: str) -> None:
        flags.DEFINE_string(name, None, meaning, flag_values=values)

    def switch(name: str, meaning: str) -> None:
        flags.DEFINE_boolean(name, False, meaning, flag_values=values)

    text("benchmark", f"one of {', '.join(registry.names())}")
    flags.DEFINE_multi_string("compare", [], "two run folders, written --compare A B", flag_values=values)
    text("data", "folder of the benchmark's published files")
    text("prompts", "a JSONL file of your own prompts, as generate takes it, in place of --benchmark and --data")
    text("checkpoint", "workdir of an sft or rl run or of an import, or one of its checkpoints/<step> folders")
    text("text_tokenizer", "folder of the text tokenizer, if it was moved or the checkpoint imported")
    text("image_tokenizer", "workdir of the image tokenizer, if it was moved or the checkpoint imported")
    text("model", "name of the model in tables and result files; by default that of the checkpoint or answers folder")
    flags.DEFINE_integer("samples", None, "answers to a prompt; as published by default", 1, flag_values=values)
    text("rewritten", "JSON file of rewritten prompts by item key; such figures are not comparable with others")
    switch("generate_only", "write answers and images, and stop")
    switch("judge_only", "judge the images that are there")
    text("answers", "with --judge_only: a folder of images in the official layout, made by any model")
    flags.DEFINE_list("figures", [STRICT, FIXED], "which figures: strict, fixed or both", flag_values=values)
    text("judge_prompts", "folder of prompts of your own for the judge, which replace the installed ones")
    text("detector", "folder of a transformers detector, for GenEval")
    text("clip", "folder of a CLIP model, for the colours of GenEval")
    text("sanity", "folder of photographs on which a detector must be right")
    switch("skip_sanity", "judge without the sanity check; there is then no headline figure")
    flags.DEFINE_list("retry", [], "states to ask again: refused, unparsable", flag_values=values)
    switch("partial", "give a headline figure also below full coverage")
    switch("force", "compare runs that are not comparable")
    switch("dry_run", "say what the run will cost, and stop")


def arguments(argv: Sequence[str]) -> list[str]:
    """The command line with `--compare A B` as two flags, and the default config where none is named."""
    words = list(argv)
    if "--compare" in words:
        at = words.index("--compare")
        named = [word for word in words[at + 1 : at + 3] if not word.startswith("-")]
        if len(named) != 2:
            raise UserError("--compare needs two run folders.", "Write --compare RUN_A RUN_B.")
        words[at : at + 3] = [f"--compare={name}" for name in named]
    if not any(word in ("--config", "-config") or word.startswith(("--config=", "-config=")) for word in words):
        words.insert(1, f"--config={CONFIG}")
    return words


def main(call: cli.Call) -> None:
    wanted = call.flags
    if wanted.compare:
        compare_runs(call)
        return
    session = _session(call)
    if wanted.dry_run:
        print("\n".join(session.costs().lines()))
        return
    if call.workdir is None:
        raise UserError("no work directory was named.", "Add --workdir=runs/NAME; it is made when it does not exist.")
    session.run()


def _session(call: cli.Call) -> Session:
    """The run of a benchmark, or of prompts of one's own."""
    wanted = call.flags
    if wanted.prompts:
        if wanted.benchmark or wanted.data:
            raise UserError("--prompts does not go with --benchmark and --data.", "Give one or the other.")
        wanted.benchmark, wanted.data = own.BENCHMARK.name, str(inputs.local_list(wanted.prompts))
    if not wanted.benchmark:
        raise UserError("--benchmark is missing.", f"Use one of {', '.join(registry.names())}.")
    return Session(call)


def _session_of_part(argv: Sequence[str]) -> Session:
    """The run that the command line asks for, on a machine of a cluster."""
    call = cli.parse(argv, config=True, workdir=False, add_flags=add_flags)
    with contextlib.ExitStack() as stack:  # nothing here writes to a bucket
        cli.localise(call.flags, READS, (), URLS, stack)
    return _session(call)


def generate_part(argv: Sequence[str], part: Part) -> None:
    """`Session.generate_part` of the run that the command line asks for."""
    _session_of_part(argv).generate_part(part)


def judge_part(argv: Sequence[str], part: Part) -> None:
    """`Session.judge_part` of the run that the command line asks for."""
    _session_of_part(argv).judge_part(part)


def entry() -> None:
    try:
        argv = arguments(sys.argv)
    except UserError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)
    cli.run(main, config=True, workdir=False, add_flags=add_flags, argv=argv, reads=READS, urls=URLS)
