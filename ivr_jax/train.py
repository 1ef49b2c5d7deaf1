"""Train one stage: the image tokenizer, supervised fine-tuning (also of the base model), or RL.

    python -m ivr_jax.train --config=configs/micro_image_tokenizer.py --workdir=runs/demo/image_tokenizer
    python -m ivr_jax.train --config=configs/micro_sft.py --workdir=runs/demo/sft --config.optimizer.peak=1e-3

The same command goes on where a stopped run was: checkpoints hold parameters, optimiser, data position and config.
"""

from __future__ import annotations

import importlib

from ivr_jax import cli
from ivr_jax.config import check_positive, claim_workdir
from ivr_jax.errors import UserError
from ivr_jax.training import checkpoint, loop

STAGES = {
    "image_tokenizer": "ivr_jax.training.image_tokenizer",
    "sft": "ivr_jax.training.sft",
    "rl": "ivr_jax.training.grpo",
}
MAY_CHANGE = ("log_every", "checkpoint_every", "keep")
COUNTS = (
    "steps", "batch", "accumulation", "chunk", "log_every", "checkpoint_every", "codebook_images", "eval_images",
    "prompts_per_step", "group", "answer_length", "minibatch", "updates",
)  # fmt: skip


def main(call: cli.Call) -> None:
    config, workdir = call.config, call.workdir
    if config.stage not in STAGES:
        raise UserError(f"unknown stage {config.stage!r}.", f"Use one of {', '.join(STAGES)}.")
    check_positive(config, COUNTS)
    claim_workdir(workdir, config, resuming=(workdir / checkpoint.FOLDER).exists(), ignore=MAY_CHANGE)
    stage = importlib.import_module(STAGES[config.stage]).build(config, workdir)
    loop.run(stage, workdir, config.steps, config.log_every, config.checkpoint_every, config.keep, workdir.name)


def entry() -> None:
    cli.run(main, config=True)


if __name__ == "__main__":
    entry()
