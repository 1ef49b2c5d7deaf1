"""Answer a prompt, with or without images, and show the answer step by step.

    python -m ivr_jax.generate --checkpoint=runs/demo/rl --prompt="Put a red circle at b2." --out=runs/answer
    python -m ivr_jax.generate --checkpoint=runs/demo/rl --image=board.png --prompt="Clear a1." --out=runs/answer
    python -m ivr_jax.generate --checkpoint=runs/demo/rl --prompts=prompts.jsonl --out=runs/answers

Writes every drawn image as PNG, answer.json and answer.html (one page).  Without --image the prompt is text-to-image;
several --image flags give several references, in order.  --prompts answers a file, one folder a line; a run that was
stopped resumes where it was.  An imported checkpoint needs --text_tokenizer and --image_tokenizer.  A model that one
device cannot hold is sharded with --mesh, and cast with --dtype as it is read.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from ivr_jax import cli, sharding
from ivr_jax.checkpoints import system as systems
from ivr_jax.cloud.mirror import with_urls
from ivr_jax.errors import UserError
from ivr_jax.generate.answer_folder import PAGE, InterleavedAnswer, check_writable, read_about, write_answer
from ivr_jax.generate.answering import IMAGE, MODES, Answering, make_answering
from ivr_jax.heartbeat import Heartbeat
from ivr_jax.protocol.grammar import INTERLEAVED
from ivr_jax.sampling import requests as requests_lib
from ivr_jax.sampling.batch import Usage
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.requests import Request
from ivr_jax.sampling.rollout import Answer
from ivr_jax.trajectory import TASKS

SAMPLING = {  # flag -> field of SamplingOptions
    "temperature": "temperature", "image_temperature": "image_temperature", "cfg": "guidance",
    "image_cfg": "image_guidance", "text_top_k": "text_top_k", "text_top_p": "text_top_p",
    "image_top_k": "image_top_k", "image_top_p": "image_top_p",
}  # fmt: skip


def add_flags(values: flags.FlagValues) -> None:
    def text(name: str, meaning: str, default: str | None = None) -> None:
        flags.DEFINE_string(name, default, meaning, flag_values=values)

    def number(name: str, default: int, meaning: str, least: int = 0) -> None:
        flags.DEFINE_integer(name, default, meaning, lower_bound=least, flag_values=values)

    def real(name: str, default: float | None, meaning: str) -> None:
        flags.DEFINE_float(name, default, meaning, lower_bound=0.0, flag_values=values)

    text("checkpoint", "workdir of an sft or rl run or of an import, or one of its checkpoints/<step> folders")
    text("prompt", "what to draw, or how to change the image")
    flags.DEFINE_multi_string("image", [], "a reference image file; may be given several times", flag_values=values)
    text("prompts", "a JSONL file of requests, in place of --prompt and --image")
    text("out", "folder for the answer, or for the folders of the answers")
    flags.DEFINE_enum("task", None, TASKS, "task word of the prompt; x2i with images, else t2i", flag_values=values)
    text("aspect_ratio", "WIDTH:HEIGHT, free (the model chooses) or auto (one reference: its size; several: free)",
         requests_lib.AUTO)  # fmt: skip
    number("image_area", 0, "pixels of an image, about; 0: the image tokenizer's resolution, squared")
    text("text_tokenizer", "folder of the text tokenizer, if it was moved or the checkpoint imported")
    text("image_tokenizer", "workdir of the image tokenizer, if it was moved or the checkpoint imported")
    flags.DEFINE_multi_enum(
        "mode", [], [*MODES, INTERLEAVED, IMAGE], "modes the answer may use; by default all of a model that was "
        "trained on trajectories, else interleaved: texts and images in any order; image: one image and nothing else",
        flag_values=values,
    )  # fmt: skip
    real("temperature", 1.0, "0 takes the likeliest token")
    real("image_temperature", None, "--temperature of image tokens; the same when not given")
    real("cfg", 1.0, "classifier-free guidance on image tokens; 1 is off")
    real("image_cfg", None, "guidance by the references (the three-way form)")
    number("text_top_k", 0, "keep the k likeliest tokens; 0 keeps all")
    real("text_top_p", 1.0, "keep the likeliest tokens that hold this much probability")
    number("image_top_k", 0, "--text_top_k of image tokens")
    real("image_top_p", 1.0, "--text_top_p of image tokens")
    text("mesh", "devices by axis, such as tensor:4 or fsdp:2,tensor:4; one device by default")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "cast the weights to this as they are read, and compute "
                      "in it; by default as the checkpoint says", flag_values=values)
    flags.DEFINE_enum("weight_dtype", None, ["int8"], "hold the layers' kernels as int8", flag_values=values)
    flags.DEFINE_enum("cache_dtype", None, ["int8"], "hold keys and values as int8", flag_values=values)
    number("seed", 0, "of the draw; the same seed gives the same answer")
    number("answer_length", 0, "most answer tokens; 0: five images' worth, 640 at least, as far as the context goes")
    number("text_cap", 0, "most tokens of one free text; 0: 96 with the micro tokenizer, else 512")


def load(wanted: flags.FlagValues) -> Answering:
    """The model that the flags name, ready to answer."""
    mesh = sharding.parse_mesh(wanted.mesh) if wanted.mesh else None
    rounded = {name: getattr(wanted, name) for name in ("weight_dtype", "cache_dtype") if getattr(wanted, name)}
    system = systems.load(
        wanted.checkpoint, wanted.image_tokenizer, text_tokenizer_path=wanted.text_tokenizer, mesh=mesh,
        **systems.answering_options(mesh, wanted.dtype, **rounded),
    )
    about = {"checkpoint": wanted.checkpoint, **{flag: getattr(wanted, flag) for flag in SAMPLING}}
    if wanted.dtype:
        about["dtype"] = wanted.dtype
    about |= rounded
    return make_answering(
        system,
        SamplingOptions(**{field: getattr(wanted, flag) for flag, field in SAMPLING.items()}),
        wanted.mode,
        image_area=wanted.image_area,
        answer_length=wanted.answer_length,
        text_cap=wanted.text_cap,
        about=about,
    )


def main(call: cli.Call) -> None:
    wanted = call.flags
    for name in ("checkpoint", "out"):
        if not getattr(wanted, name):
            raise UserError(f"--{name} is missing.", "See --help.")
    if (wanted.prompt is None) == (wanted.prompts is None):
        raise UserError("--prompt is missing." if wanted.prompt is None else "both --prompt and --prompts were given.",
                        "Give --prompt=TEXT, or --prompts=FILE.jsonl.")
    if wanted.prompts is not None and wanted.image:
        raise UserError("--image does not go with --prompts.", "Name images in the file: {\"image\": [...]}.")
    SamplingOptions(**{field: getattr(wanted, flag) for flag, field in SAMPLING.items()})
    out = Path(wanted.out).expanduser()
    if wanted.prompts is not None:
        answer_all(wanted, out)
        return
    task = wanted.task or ""
    request = Request("request", wanted.prompt, tuple(wanted.image), task, wanted.aspect_ratio, wanted.seed)
    requests_lib.check(request)
    check_writable(out)
    answering = load(wanted)
    clock = time.perf_counter()
    # how many tokens it will be, nobody knows
    with tqdm(desc="compile", unit=" tokens", leave=False) as bar, Heartbeat(bar) as heartbeat:
        heartbeat.begin("compiling")

        def show(usage: Usage) -> None:
            heartbeat.begin("drawing, or compiling for longer answers")
            bar.set_description_str("draw", refresh=False)
            bar.update(usage.tokens - bar.n)

        answer, tokens = answering.answer(request, show)
    seconds = time.perf_counter() - clock
    images = write_answer(out, answer, answering.about_request(request))
    report(answer, images)
    kind = answering.about["modes"][0] if isinstance(answer, InterleavedAnswer) else answer.trajectory.mode.value
    if isinstance(answer, InterleavedAnswer) and not answer.finished:
        print(f"the answer was cut after {tokens:,} tokens, before its end: raise --answer_length")
    print(with_urls(f"{kind}, {speed(tokens, seconds)}; {out / PAGE}"))


def speed(tokens: int, seconds: float) -> str:
    """Tokens, seconds and their quotient, for people."""
    return f"{tokens} tokens in {seconds:.1f} s with compilation ({tokens / max(seconds, 1e-9):.0f} tokens/s)"


def report(answer: Answer | InterleavedAnswer, images: list[Path]) -> None:
    """One line a drawn image."""
    for number, path in enumerate(images, 1):
        verdict = ""
        if isinstance(answer, Answer):
            passed = answer.trajectory.rounds[number - 1].evaluation.passed
            verdict = f"  own verdict: {'pass' if passed else 'fail'}"
        print(with_urls(f"G{number}: {path}{verdict}"))


def answer_all(wanted: flags.FlagValues, out: Path) -> None:
    """Answers every line of a file, each in its own folder of `out`; finished ones are left as they are."""
    requests = requests_lib.read_requests(wanted.prompts, wanted.seed, wanted.task or "", wanted.aspect_ratio)
    check_writable(out)
    answering = load(wanted)
    todo = [request for request in requests if not _finished(out / request.key, answering.about_request(request))]
    for request in todo:  # a bad image is said before anything is drawn
        requests_lib.prepare(request, answering.system, answering.area)
    failed, total, clock = [], 0, time.perf_counter()

    def show(usage: Usage) -> None:
        heartbeat.begin("drawing, or compiling for longer answers")
        rate = (total + usage.tokens) / (time.perf_counter() - clock)
        bar.set_postfix_str(f"{usage.tokens} tokens of the next, {rate:.0f} tokens/s")

    done = len(requests) - len(todo)
    with (
        tqdm(desc="answer", unit="answer", initial=done, total=len(requests)) as bar,
        Heartbeat(bar) as heartbeat,
    ):
        heartbeat.begin("compiling")
        for request in todo:
            try:
                answer, tokens = answering.answer(request, show)
            except UserError as error:
                failed.append(f"{request.key}: {error.what}")
                continue
            write_answer(out / request.key, answer, answering.about_request(request))
            total += tokens
            bar.update()
    seconds = time.perf_counter() - clock
    there, made = len(requests) - len(todo), len(todo) - len(failed)
    print(with_urls(f"{out}: {there} answers were there, {made} made, {speed(total, seconds)}"))
    if failed:
        raise UserError(f"{len(failed)} of {len(requests)} requests have no answer; {failed[0]}",
                        "The others are kept: the same command tries again only these.")


def _finished(folder: Path, about: dict[str, Any]) -> bool:
    found = read_about(folder)
    if found is not None and found != about:
        differing = next(key for key in (*about, *found) if about.get(key) != found.get(key))
        raise UserError(
            f"{folder} holds an answer to another request: {differing} was {found.get(differing)!r}, is "
            f"{about.get(differing)!r}.",
            "Use another --out, or remove that folder.",
        )
    return found is not None


def entry() -> None:
    cli.run(main, config=False, workdir=False, add_flags=add_flags, writes=("out",),
            urls=("checkpoint", "image", "image_tokenizer", "prompts", "text_tokenizer"))


if __name__ == "__main__":
    entry()
