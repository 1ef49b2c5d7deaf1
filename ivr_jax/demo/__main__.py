"""The whole method on one CPU: prompts to report, every stage for real.

    python -m ivr_jax.demo --workdir=runs/demo

Trains an image tokenizer and a base model on the micro-world, constructs reasoning trajectories with the base model's
own images, fine-tunes on them, improves the result with RL, evaluates all three on held-out prompts, exports the
model for transformers and writes a report.  Each stage is one command, printed before it runs; on a CPU evaluations
run beside the training that follows them.  A run that was stopped resumes where it was.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time

from absl import flags
from rich.console import Console

from ivr_jax import cli
from ivr_jax.demo.steps import Beside, Step, accelerator_possible, configured, run_step
from ivr_jax.evaluate import typed
from ivr_jax.report import metrics, tables
from ivr_jax.report.answers import read_answers
from ivr_jax.report.collect import ARMS, FURTHER
from ivr_jax.report.gates import DEMO, entry_gates, print_gates, write_gates


def plan(root: pathlib.Path, overrides: dict[str, tuple[str, ...]] | None = None) -> list[Step]:
    """All commands in order; `overrides` maps a folder name to extra arguments of its step."""
    more = overrides or {}

    def step(title: str, module: str, config: str, name: str, **keys: object) -> Step:
        settings = (f"{key.replace('__', '.')}={value}" for key, value in keys.items())
        made = configured(title, module, config, root / name, *settings)
        beside = module == "evaluate" and name != "eval_rl"  # no training follows eval_rl
        return dataclasses.replace(made, arguments=(*made.arguments, *more.get(name, ())), beside=beside)

    images, base, sft, rl = (root / name for name in ("image_tokenizer", "base", "sft", "rl"))
    built = root / "construct" / "dataset"
    check = "micro_evaluate"
    steps = [
        step("Train the image tokenizer", "train", "micro_image_tokenizer", "image_tokenizer"),
        step("Train the base model", "train", "micro_base", "base", image_tokenizer=images),
        step("Evaluate the base model", "evaluate", f"{check}:base", "eval_base", checkpoint=base),
        step("Evaluate it on single edits of each kind", "evaluate", f"{check}:kinds", "eval_kinds", checkpoint=base),
        step("Construct trajectories from its own images", "construct", "micro_construct", "construct", baseline=base),
        step(
            "Fine-tune on them", "train", "micro_sft", "sft",
            init=base, data__path=built, data__practice_share=0.5, image_tokenizer=images,
        ),
        step("Evaluate the fine-tuned model", "evaluate", check, "eval_sft", checkpoint=sft),
        *(
            step(
                f"Evaluate it held to {name[5:].replace('_', '-')} answers",
                "evaluate",
                f"{check}:{name[5:]}",
                name,
                checkpoint=sft,
            )
            for name in ("eval_direct", "eval_multi_step")
        ),
        step("Improve it with RL", "train", "micro_rl", "rl", init=sft, gallery__every=4),
        step("Ask it twenty typed requests", "evaluate", f"{check}:typed", "eval_typed", checkpoint=rl),
        step("Evaluate the result", "evaluate", check, "eval_rl", checkpoint=rl),
    ]
    export = ("--from=orbax", str(rl), "--to=hf", str(root / "export"), "--overwrite")
    return [*steps, Step("Export for transformers", "ivr_jax.convert", export)]


def main(call: cli.Call) -> None:
    root, console = call.workdir, Console()
    steps = plan(root)
    if call.flags.dry_run:
        print("\n".join(step.command for step in steps))
        return
    clock, count, seconds = time.perf_counter(), len(steps) + 1, {}
    alone = accelerator_possible()
    with Beside(root / "logs", count, console) as beside:
        for number, step in enumerate(steps, 1):
            if step.beside and not alone:
                beside.add(step, number)
            else:
                seconds[step.title] = run_step(step, number, count, console)
            seconds |= beside.show()
        seconds |= beside.show(wait=True)
    results = {name: metrics.read_evaluation(root / name) for name in (*ARMS, *FURTHER)}
    gates = entry_gates({name.removeprefix("eval_"): result for name, result in results.items()}, DEMO)
    write_gates(root, gates)
    report = Step("Write the report", "ivr_jax.report", (f"--workdir={root}",))
    seconds[report.title] = run_step(report, count, count, console)
    console.rule("[bold]Done")
    for step in (*steps, report):
        side = ", beside others" if step.beside and not alone else ""
        console.print(f"{seconds[step.title]:7.0f} s  {step.title}{side}", highlight=False)
    console.print(f"{time.perf_counter() - clock:7.0f} s  in all", highlight=False)
    print_gates(gates, console)
    tables.print_table({title: results[name] for name, title in ARMS.items()}, console)
    typed.print_answers(read_answers(root / "eval_typed"), console)
    console.print(f"Report: {root / 'report.html'}\nModel for transformers: {root / 'export'}", soft_wrap=True)
    console.print("Next, ask the model yourself:", soft_wrap=True)
    prompt = "Put a red circle at b2. Put a blue square at a1. Swap b2 with a1."
    answer = ("--checkpoint=" + str(root / "rl"), f"--prompt={prompt}", "--out=runs/answer")
    console.print("  " + Step("", "ivr_jax.generate", answer).command, highlight=False, soft_wrap=True)


def add_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_boolean("dry_run", False, "print the commands instead of running them", flag_values=values)


def entry() -> None:
    cli.run(main, config=False, add_flags=add_flags)


if __name__ == "__main__":
    entry()
