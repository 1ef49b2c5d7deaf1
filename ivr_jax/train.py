"""Train one stage: the image tokenizer, supervised fine-tuning (also of the base model), or RL.

    python -m ivr_jax.train --config=configs/micro_image_tokenizer.py --workdir=runs/demo/image_tokenizer
    python -m ivr_jax.train --config=configs/micro_sft.py --workdir=runs/demo/sft --config.optimizer.learning_rate=1e-3

The same command resumes a stopped run: checkpoints hold parameters, optimiser, data position and config.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags

from ivr_jax import cli, distributed, files, sharding
from ivr_jax.checkpoints import store
from ivr_jax.config import as_dataclass, check_least, claim_workdir, saved_config
from ivr_jax.errors import UserError
from ivr_jax.evaluate.sight import SightOptions, SightProbe
from ivr_jax.protocol.grammar import GrammarOptions
from ivr_jax.services.config import CHANGEABLE
from ivr_jax.training import loop

STAGES = {
    "image_tokenizer": "ivr_jax.training.image_tokenizer",
    "sft": "ivr_jax.training.sft",
    "rl": "ivr_jax.training.rl_stage",
}
MAY_CHANGE = (
    "log_every", "checkpoint_every", "max_checkpoints", "mesh", "staging_gib", "monitor", "gallery",
    "judge.concurrency", "judge.deadline", "grad_accum_steps", "loss_chunk_tokens", "buckets", "packed_rows",
    "model.remat",
    "model.fsdp_over_tensor", "sight", "held_out",
    *(f"judge.{part}.{name}" for part in ("outcome", "step", "reasoning", "held_out") for name in CHANGEABLE),
)  # fmt: skip
COUNTS = (
    "steps", "batch", "grad_accum_steps", "loss_chunk_tokens", "log_every", "checkpoint_every", "codebook_images",
    "eval_images", "prompts_per_step", "group_size", "answer_length", "micro_batch", "num_iterations",
    "num_minibatches",
)  # fmt: skip
NOT_NEGATIVE = ("max_checkpoints", "staging_gib", "continuous_steps", "packed_rows")


def add_flags(values: flags.FlagValues) -> None:
    distributed.add_flags(values)
    flags.DEFINE_string("profile", None, "profile the steps START:STOP into WORKDIR/profile", flag_values=values)
    flags.DEFINE_float("peak_tflops", None, "of one device, for MFU on hardware that is not known", flag_values=values)


def main(call: cli.Call) -> None:
    config, workdir = call.config, call.workdir
    if config.stage not in STAGES:
        raise UserError(f"unknown stage {config.stage!r}.", f"Use one of {', '.join(STAGES)}.")
    check_least(config, COUNTS)
    check_least(config, NOT_NEGATIVE, 0)
    names = ("steps", "log_every", "checkpoint_every", "max_checkpoints", "staging_gib")
    peak = call.flags.peak_tflops and call.flags.peak_tflops * 1e12
    plan = loop.Plan(**{name: config[name] for name in names}, profile=call.flags.profile, peak=peak)
    distributed.start(call.flags)
    mesh = sharding.mesh_of(config.mesh)
    plan = dataclasses.replace(plan, devices=mesh.devices.size)
    primary = distributed.is_primary()
    with contextlib.ExitStack() as stack:
        if call.bucket is not None:
            stack.enter_context(distributed.open_bucket(call.bucket, store.written_directly(call.bucket)))
        stack.enter_context(files.Lock(workdir) if primary else contextlib.nullcontext())
        stack.enter_context(jax.set_mesh(mesh))
        resuming = store.has_any(workdir)
        if resuming:
            check_same_steps(saved_config(workdir), config, workdir)
        claim_workdir(workdir, config, resuming=resuming, ignore=MAY_CHANGE, write=primary)
        extra = {"probes": probes(config, workdir)} if config.stage == "rl" else {}
        stage = importlib.import_module(STAGES[config.stage]).build(config, workdir, mesh, **extra)
        loop.run(stage, workdir, plan, workdir.name)


def probes(config: Any, workdir: pathlib.Path) -> list[Any]:
    """What an rl config measures of the policy now and then: sight (the paired verdict test), a held-out benchmark."""
    from ivr_jax.training.grpo import Probe  # with all that the rl stage needs, which other stages do not load

    grammar, found = as_dataclass(GrammarOptions, config.grammar), []
    if config.sight.every:
        sight = SightProbe(as_dataclass(SightOptions, config.sight), grammar, config.answer_length, config.seed)
        found.append(Probe(config.sight.every, lambda system, step: sight(system)))
    if config.held_out.every:
        # What these need, runs without such a benchmark do without (the extra `services`).
        from ivr_jax.evaluate.benchmarks.held_out import HeldOutBenchmark, HeldOutOptions
        from ivr_jax.sampling.engine import EngineOptions
        from ivr_jax.sampling.logits_processors import SamplingOptions
        from ivr_jax.services.config import ServiceConfig

        settings = {name: value for name, value in config.held_out.items() if name != "judge"}
        options = as_dataclass(HeldOutOptions, settings)
        judge = as_dataclass(ServiceConfig, config.held_out.judge) if config.held_out.judge.kind else None
        measure = HeldOutBenchmark(
            options, judge, grammar, as_dataclass(SamplingOptions, config.sampling),
            as_dataclass(EngineOptions, config.engine), config.answer_length, config.seed, workdir / "held_out",
        )  # fmt: skip
        found.append(Probe(options.every, measure))
    return found


def check_same_steps(saved: Mapping[str, Any] | None, config: Any, workdir: pathlib.Path) -> None:
    """Raises UserError for a run that is asked to be longer or shorter than its learning-rate schedule."""
    steps = (saved or {}).get("steps", config.steps)
    if steps != config.steps:
        further = "" if config.stage == "image_tokenizer" else f" --config.init={workdir}"
        raise UserError(
            f"{workdir} is a run of {steps} steps: its learning rate ends there, so it cannot be one of "
            f"{config.steps}.",
            f"Resume it with --config.steps={steps}; to train further, start a run in another --workdir{further}.",
        )


def entry() -> None:
    cli.run(main, config=True, add_flags=add_flags, opens_bucket=True)


if __name__ == "__main__":
    entry()
