"""Answer a prompt, with or without images, and show how the answer unfolded.

    python -m ivr_jax.generate --checkpoint=runs/demo/rl --prompt="Put a red circle at b2." --out=runs/answer
    python -m ivr_jax.generate --checkpoint=runs/demo/rl --image=board.png --prompt="Clear a1." --out=runs/answer

Writes every drawn image as PNG, answer.json (the trajectory) and answer.html (one page).  Without --image the prompt is
text-to-image.  Several --image flags give several references, in order.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time

import jax
from absl import flags

from ivr_jax import cli
from ivr_jax import system as systems
from ivr_jax.errors import UserError
from ivr_jax.evaluation.answers import Answer as ShownAnswer
from ivr_jax.evaluation.benchmark import shown_segments
from ivr_jax.evaluation.gallery import Shelf, Shown
from ivr_jax.evaluation.report import write_report
from ivr_jax.images import fit, image_name, load_image, save_png
from ivr_jax.protocol import codec as codec_lib
from ivr_jax.protocol import markers
from ivr_jax.protocol.grammar import Grammar, GrammarOptions
from ivr_jax.sampling.chain import SamplingOptions
from ivr_jax.sampling.rollout import roll_out
from ivr_jax.sampling.sampler import pad_prompts
from ivr_jax.trajectory import MAX_REFLECTIONS, MAX_STEPS, Mode, Sample, trajectory_to_json

MAX_CELLS = 99  # a side of an image, in latent cells: its size is written in two digits


def add_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "checkpoint", None, "workdir of an sft or rl run, or one of its checkpoints/<step> folders", flag_values=values
    )
    flags.DEFINE_string("prompt", None, "what to draw, or how to change the image", flag_values=values)
    flags.DEFINE_multi_string("image", [], "a reference image file; may be given several times", flag_values=values)
    flags.DEFINE_string("out", None, "folder for the answer", flag_values=values)
    flags.DEFINE_string("image_tokenizer", None, "workdir of the image tokenizer, if it was moved", flag_values=values)
    flags.DEFINE_multi_enum(
        "mode", [m.value for m in Mode], [m.value for m in Mode], "modes the answer may use", flag_values=values
    )
    flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token", lower_bound=0.0, flag_values=values)
    flags.DEFINE_float(
        "cfg", 1.0, "classifier-free guidance on image tokens; 1 is off", lower_bound=0.0, flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "of the draw", flag_values=values)
    flags.DEFINE_integer("answer_length", 384, "most answer tokens", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("text_cap", 64, "most tokens of one free text", lower_bound=1, flag_values=values)


def read_request(prompt: str, files: list[str], system: systems.System) -> tuple[Sample, dict]:
    """The sample and its pixels; images are resized to the image tokenizer's area, in multiples of its factor."""
    if not prompt or not prompt.strip():
        raise UserError("the prompt is empty.", 'Give one, such as --prompt="Put a red circle at b2."')
    markers.check_user_text(prompt, "the prompt")
    codec = system.codec.config
    pixels = []
    for file in files:
        whole = load_image(file)
        pixels.append(fit(whole, codec.resolution**2, codec.factor))
        if max(pixels[-1].shape) > MAX_CELLS * codec.factor:
            raise UserError(
                f"{file} is too long and narrow: {whole.shape[1]}x{whole.shape[0]} pixels.",
                f"Crop it; at its area a side may take {MAX_CELLS} cells of {codec.factor} pixels.",
            )
    images = {image_name(x): x for x in pixels}
    return Sample("request", prompt, tuple(image_name(x) for x in pixels)), images


def room(system: systems.System, sample: Sample, images: dict, wanted: int) -> int:
    """`wanted` answer tokens, or what the prompt leaves of the context; UserError when that is less than one image."""
    codes = dict(zip(images, system.codec.encode(list(images.values())), strict=True))
    prompts, _ = pad_prompts([codec_lib.encode_prompt(system.tokenizer, sample, codes)], system.tokenizer.vocab.pad)
    context, image = system.config.max_position_embeddings, system.codec.config
    left = context - prompts.shape[1]
    if left <= (image.resolution // image.factor) ** 2:
        raise UserError(
            f"the prompt takes {prompts.shape[1]} of the {context} tokens of the context.",
            "Shorten it, or give fewer images.",
        )
    return min(wanted, left)


def main(call: cli.Call) -> None:
    wanted = call.flags
    for name in ("checkpoint", "prompt", "out"):
        if getattr(wanted, name) is None:
            raise UserError(f"--{name} is missing.", "See --help.")
    out = cli.prepare_workdir(wanted.out)
    system = systems.load(wanted.checkpoint, wanted.image_tokenizer)
    sample, images = read_request(wanted.prompt, wanted.image, system)
    options = GrammarOptions(
        modes=tuple(wanted.mode), max_reflections=MAX_REFLECTIONS, max_steps=MAX_STEPS, text_cap=wanted.text_cap
    )
    sampling = SamplingOptions(temperature=wanted.temperature, guidance=wanted.cfg)
    clock = time.perf_counter()
    rollout = roll_out(
        system,
        Grammar(system.tokenizer, options),
        [sample],
        [images],
        jax.random.key(wanted.seed),
        room(system, sample, images, wanted.answer_length),
        sampling,
    )
    seconds, tokens = time.perf_counter() - clock, int(rollout.samples.lengths[0])
    answer = rollout.answers[0]
    if answer is None:
        raise UserError(
            f"the answer did not come to an end: {rollout.errors[0]}", "Raise --answer_length, or try another --seed."
        )
    write_answer(
        out,
        wanted.prompt,
        answer,
        {"checkpoint": wanted.checkpoint, "seed": wanted.seed, "temperature": wanted.temperature, "cfg": wanted.cfg},
    )
    for number, round_ in enumerate(answer.trajectory.rounds, 1):
        verdict = "pass" if round_.evaluation.passed else "fail"
        print(f"G{number}: {out / f'G{number}.png'}  own verdict: {verdict}")
    print(f"{answer.trajectory.mode.value}, {tokens} tokens in {seconds:.1f} s with compilation; {out / 'answer.html'}")


def write_answer(out: pathlib.Path, prompt: str, answer, about: dict) -> None:
    """PNG files, answer.json and answer.html of one parsed answer; the images of an earlier answer there go."""
    trajectory = answer.trajectory
    if (out / "answer.json").exists():
        for name in ("source", "G"):
            for old in out.glob(f"{name}[1-9].png"):
                old.unlink()
    for number, name in enumerate(trajectory.sample.sources, 1):
        save_png(out / f"source{number}.png", answer.images[name])
    for number, name in enumerate(trajectory.images, 1):
        save_png(out / f"G{number}.png", answer.images[name])
    save_png(out / "final.png", answer.images[trajectory.images[-1]])
    (out / "answer.json").write_text(json.dumps({"about": about, **trajectory_to_json(trajectory)}, indent=1) + "\n")
    segments = tuple(dataclasses.replace(s, loss=True) for s in shown_segments(trajectory, answer.segments))
    shown = ShownAnswer(trajectory.sample, trajectory, "", trajectory.images, segments=segments, mode=trajectory.mode)
    shelf = Shelf("Answer", "As it unfolded.", (Shown("answer", shown, answer.images),))
    write_report(out / "answer.html", prompt, (), {}, (shelf,), (), ())


def entry() -> None:
    cli.run(main, config=False, workdir=False, add_flags=add_flags)


if __name__ == "__main__":
    entry()
