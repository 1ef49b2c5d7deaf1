r"""The swap test: does a model's verdict depend on the image, on any dataset with images known to be right and wrong?

    python -m ivr_jax.evaluate.swap --config=configs/swap_test.py --workdir=runs/mine/swap \
        --config.checkpoint=runs/mine/sft --config.data=runs/mine/construct/dataset

Constructed trajectories of reflection and multi-step kind hold both for one prompt: their first image failed its
evaluation and their last one passed.  Each is put in the same place, right behind the prompt, and

    sight = mean over prompts of P(pass | right image) - P(pass | wrong image)

is 0 for a verdict that ignores the image and 1 for a perfect one (`ivr_jax.evaluate.paired`, where the right image is
called exact and the wrong one own).  Name a dataset that the model was not trained on.  Writes swap.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from ivr_jax import cli, files, sharding
from ivr_jax.checkpoints import system as systems
from ivr_jax.checkpoints.system import System
from ivr_jax.cloud import inputs
from ivr_jax.config import as_dataclass, check_least, claim_workdir
from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.errors import UserError
from ivr_jax.evaluate.paired import EXACT, MASKED, OWN, Case, paired_test
from ivr_jax.evaluate.verdicts import VerdictScorer
from ivr_jax.heartbeat import announced
from ivr_jax.protocol import codec
from ivr_jax.protocol.grammar import GrammarOptions
from ivr_jax.report import tables
from ivr_jax.report.swaps import SWAP_FILE, read_swap, write_swap
from ivr_jax.trajectory import Trajectory


def main(call: cli.Call) -> None:
    check_least(call.config, ("prompts", "batch", "evaluation_length"))
    with files.Lock(call.workdir):
        result = finished_or_made(call.config, call.workdir)
    console = Console()
    for name, title in (("sight", "sight"), ("pass_exact", "P(pass | right)"), ("pass_own_wrong", "P(pass | wrong)")):
        estimate = result["overall"][name]
        share = tables.BY_NAME["accuracy"]
        interval = tables.format_interval(share, estimate)
        console.print(f"{title:16} {tables.format_value(share, estimate)} [{interval}] over {estimate['n']} prompts")


def finished_or_made(config: Any, workdir: Path) -> dict[str, Any]:
    """The swap test in `workdir` if it has this checkpoint and config; otherwise it is run and written there."""
    about = {"checkpoint": systems.name_of(config.checkpoint), "config": config.to_dict()}
    about = json.loads(json.dumps(about))  # as it will be read back: tuples are lists
    if (workdir / SWAP_FILE).exists():
        claim_workdir(workdir, config, resuming=True)
        result = read_swap(workdir)
        if result["about"] == about:
            print(f"swap: {workdir} is complete")
            return result
    claim_workdir(workdir, config, resuming=False)
    dataset = TrajectoryDataset(inputs.local(config.data))
    chosen = known_pairs(dataset, config.prompts)  # before the weights are read
    mesh = sharding.mesh_of(config.mesh)
    with jax.set_mesh(mesh):
        system = systems.load(
            config.checkpoint,
            config.image_tokenizer or None,
            text_tokenizer_path=config.text_tokenizer or None,
            mesh=mesh,
        )
        cases = swap_cases(system, dataset, chosen)
        scorer = VerdictScorer(
            system, as_dataclass(GrammarOptions, config.grammar), config.evaluation_length, config.batch
        )
        with announced(f"swap: scoring {len(cases)} pairs of images"):
            result = {"about": about, **paired_test(cases, scorer, config.seed)}
    write_swap(workdir, result)
    return result


def known_pairs(dataset: TrajectoryDataset, most: int) -> list[Trajectory]:
    """The first `most` trajectories of one prompt each whose first image failed and whose last one passed.

    Raises UserError when there is none.
    """
    chosen: dict[str, Trajectory] = {}
    for trajectory in dataset:
        first, last = trajectory.rounds[0], trajectory.rounds[-1]
        differ = first.image != last.image and last.evaluation.passed and not first.evaluation.passed
        if differ and len(chosen) < most:
            chosen.setdefault(trajectory.sample.key, trajectory)
    if not chosen:
        raise UserError(
            f"{dataset.path} has no prompt with an image known to be wrong beside one known to be right.",
            "Name a dataset with reflection or multi-step trajectories: their first image failed, their last passed.",
        )
    return list(chosen.values())


def swap_cases(system: System, dataset: TrajectoryDataset, trajectories: Sequence[Trajectory]) -> list[Case]:
    """A case a trajectory: its last image as the exact one, its first as the wrong one, right behind the prompt."""
    cases = []
    for trajectory in trajectories:
        images = dataset.images(trajectory)
        codes = dict(zip(images, system.image_codec.encode(list(images.values())), strict=True))
        prompt = codec.encode_prompt(system.tokenizer, trajectory.sample, codes)
        right, wrong = codes[trajectory.images[-1]], codes[trajectory.images[0]]
        cases.append(
            Case(
                context=np.array(prompt, np.int32),
                images={EXACT: np.asarray(right), OWN: np.asarray(wrong), MASKED: np.zeros_like(wrong)},
                own_right=False,
                groups={"by_mode": (trajectory.mode.value,), "by_category": (trajectory.sample.category,)},
            )
        )
    return cases


def entry() -> None:
    cli.run(main, config=True)


if __name__ == "__main__":
    entry()
