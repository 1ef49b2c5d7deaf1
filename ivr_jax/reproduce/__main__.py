"""The paper's ablation in miniature, by one command: which part of the reward saves images, and which mode pays.

    python -m ivr_jax.reproduce --config=configs/micro_reproduce.py --workdir=runs/reproduce

Trains one base and one fine-tuned model, then RL arms (full reward, without step reward, without complexity bonus;
every seed), variants of the rule, and fine-tuning on four mode mixes; evaluates all on the same held-out prompts at
temperature 1 and 0; writes ablation.json, ablation.html and its plots.  Every step is an ordinary command that
resumes by itself, so a run that was stopped resumes where it was.
"""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags
from rich.console import Console

from ivr_jax import cli
from ivr_jax.demo.steps import Branch, Step, configured, run_branches, run_step
from ivr_jax.errors import UserError
from ivr_jax.report.gates import write_gates
from ivr_jax.reproduce import ablation
from ivr_jax.reproduce.ablation import eval_folder


def trunk(root: pathlib.Path, config: Any) -> list[Step]:
    """Steps that every arm starts from: image tokenizer, base model, its trajectories, the fine-tuned model."""
    images, base = root / "image_tokenizer", root / "base"
    built = root / "construct"
    return [
        configured("Train the image tokenizer", "train", "micro_image_tokenizer", images),
        configured(
            "Train the base model", "train", "micro_base", base,
            f"image_tokenizer={images}", *config.base,
        ),
        configured(
            "Construct trajectories from its own images", "construct", "micro_construct", built,
            f"baseline={base}", *config.construct,
        ),
        _fine_tune("Fine-tune on them", root, root / "sft", *config.sft),
    ]  # fmt: skip


def branches(root: pathlib.Path, config: Any) -> list[Branch]:
    """All steps that depend on the trunk alone, in order of interest."""
    sft, steps = root / "sft", []
    for mode in ("base", "", "direct", "multi_step"):
        model = root / "base" if mode == "base" else sft
        for temperature in (1, 0):
            if mode in ("", "direct") or temperature:
                steps.append(_evaluate(root, config, mode or "sft", model, temperature, kind=mode))
    steps.append(_evaluate(root, config, "kinds", root / "base", 0, kind="kinds"))
    found = [Branch("sft", tuple(steps))]
    rules = {**config.arms, **config.variants}
    runs = [(arm, seed) for seed in config.seeds for arm in config.arms]
    for arm, seed in [*runs, *((arm, config.seeds[0]) for arm in config.variants)]:
        name, folder = ablation.run_name(arm, seed), root / "arms" / arm / str(seed)
        settings = (f"init={sft}", f"seed={seed}", f"prompts.seed={100 + seed}", *config.rl, *rules[arm])
        train = configured("RL", "train", "micro_rl", folder, *settings)
        found.append(Branch(name, (train, *(_evaluate(root, config, name, folder, t) for t in (1, 0)))))
    for mix, settings in config.mixes.items():
        folder = root / "mixes" / mix
        train = _fine_tune("Fine-tuning", root, folder, *config.mix_sft, *settings)
        found.append(Branch(f"mix_{mix}", (train, _evaluate(root, config, f"mix_{mix}", folder, 1))))
    return found


def _fine_tune(title: str, root: pathlib.Path, folder: pathlib.Path, *settings: str) -> Step:
    common = (f"init={root / 'base'}", f"data.path={root / 'construct' / 'dataset'}")
    return configured(title, "train", "micro_sft", folder, *common, f"image_tokenizer={root / 'image_tokenizer'}",
                      *settings)  # fmt: skip


def _evaluate(
    root: pathlib.Path, config: Any, name: str, model: pathlib.Path, temperature: int, kind: str = ""
) -> Step:
    """`kind`: the argument of micro_evaluate; "multi_step" answers fewer prompts, "kinds" its own."""
    answered = {"multi_step": config.forced, "kinds": ()}.get(kind, config.evaluate)
    settings = {"checkpoint": model, "sampling.temperature": float(temperature)}
    settings |= dict(setting.split("=", 1) for setting in answered)
    if not temperature:
        settings |= {"each_split": 0, "paired_prompts": 0}
    if name != "sft" or not temperature:
        settings["probe_prompts"] = 0
    return configured(
        f"evaluation at temperature {temperature}", "evaluate", f"micro_evaluate:{kind}" if kind else "micro_evaluate",
        eval_folder(root, name, temperature), *(f"{key}={value}" for key, value in settings.items()),
    )  # fmt: skip


def main(call: cli.Call) -> None:
    root, config, console = call.workdir, call.config, Console()
    before, after = trunk(root, config), branches(root, config)
    if call.flags.dry_run:
        print("\n".join(step.command for step in (*before, *(step for branch in after for step in branch.steps))))
        return
    if call.flags.jobs < 1:
        raise UserError(f"--jobs is {call.flags.jobs}.", "Give a whole number of at least 1.")
    if not call.flags.report_only:
        for number, step in enumerate(before, 1):
            run_step(step, number, len(before), console)
        run_branches(after, call.flags.jobs, root / "logs", "reproduce")
    found = ablation.gather(root, config)
    ablation.write(root, found)
    write_gates(root, (*found.gates, *found.claims))
    ablation.print_tables(found, console)
    console.print(f"Page: {root / 'reproduction.html'}\nFigures: {root / 'reproduction.json'}", soft_wrap=True)


def add_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_boolean("dry_run", False, "print the commands instead of running them", flag_values=values)
    flags.DEFINE_boolean("report_only", False, "run nothing; write the page from what is there", flag_values=values)
    flags.DEFINE_integer("jobs", 1, "arms at the same time, each on its share of the cores", flag_values=values)


def entry() -> None:
    cli.run(main, config=True, add_flags=add_flags)


if __name__ == "__main__":
    entry()
