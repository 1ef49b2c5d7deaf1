"""Look inside a dataset, token examples, an answer or a rollout: every token as the model sees it.

    python -m ivr_jax.inspect runs/demo/construct/dataset --index=3
    python -m ivr_jax.inspect runs/demo/construct/dataset --filter=mode=reflection --filter=loss=0 --limit=5
    python -m ivr_jax.inspect runs/demo/sft/examples --checkpoint=runs/demo/sft --html=example.html
    python -m ivr_jax.inspect runs/answers/ID --checkpoint=runs/demo/rl --figures
    python -m ivr_jax.inspect runs/demo/rl --checkpoint=runs/demo/rl --filter="advantage>0" --figures
    python -m ivr_jax.inspect --rollout --checkpoint=runs/demo/rl --task=3 --group_size=4

Shows position, id, text, segment (G an image, E its evaluation, R a reflection, S a step) and whether it carries loss;
with --figures log-probability and entropy under the model, and of a rollout reward and advantage too.  An RL run stores
rollouts with --config.gallery.every=N; its newest are shown, those of another step by naming their file.  Images are
decoded from their codes.  Tokenizers are those of --checkpoint (the small model of the package by default).
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from absl import flags
from rich.console import Console

from ivr_jax import cli, files
from ivr_jax.checkpoints import packed
from ivr_jax.checkpoints import system as systems
from ivr_jax.errors import UserError
from ivr_jax.heartbeat import announced
from ivr_jax.inspect import rollouts, sources
from ivr_jax.inspect.render import html_page, print_item
from ivr_jax.inspect.tokens import Inspected


def add_flags(values: flags.FlagValues) -> None:
    def text(name: str, default: str | None, meaning: str) -> None:
        flags.DEFINE_string(name, default, meaning, flag_values=values)

    def number(name: str, default: int, meaning: str, least: int = 0) -> None:
        flags.DEFINE_integer(name, default, meaning, lower_bound=least, flag_values=values)

    def switch(name: str, meaning: str) -> None:
        flags.DEFINE_boolean(name, False, meaning, flag_values=values)

    text("source", None, "a dataset, token examples, an answer or an RL run; may also stand without --source=")
    text("checkpoint", packed.PACKED_MICRO, "whose tokenizers and, with --figures, probabilities are shown")
    text("text_tokenizer", None, "folder of the text tokenizer, if it was moved or the checkpoint imported")
    text("image_tokenizer", None, "workdir of the image tokenizer, if it was moved or the checkpoint imported")
    number("index", 0, "the first item that is looked at")
    text("key", None, "the sample of this key")
    flags.DEFINE_multi_string("filter", [], "NAME=VALUE, also with != < > <= >= ~; several hold together",
                              flag_values=values)
    number("limit", 1, "items that are shown", 1)
    switch("figures", "log-probability and entropy of every answer token under the model")
    switch("all_tokens", "a line for every image token in the terminal too")
    switch("rollout", "sample a group of answers to a request of the micro-world")
    number("task", 0, "number of that request")
    number("group_size", 4, "answers of the group", 1)
    number("seed", 0, "of request and answers")
    text("html", None, "write one HTML page to this file")


def chosen(call: cli.Call, system: systems.System) -> list[Inspected]:
    """What the flags ask for.  Raises UserError when nothing passes the filters."""
    wanted = call.flags
    if wanted.rollout:
        return rollouts.inspect_group(system, wanted.task, wanted.group_size, wanted.seed)
    filters = [sources.parse_filter(text) for text in wanted.filter]
    every = sources.items(Path(wanted.source).expanduser(), system, wanted.index, wanted.key)
    passing = (item for item in every if all(passes(item) for passes in filters))
    found = []
    for item in itertools.islice(passing, wanted.limit):
        figures = rollouts.with_model_figures(system, item) if wanted.figures else None
        found.append(item.inspected(system, figures))
    if not found:
        raise UserError("nothing passes the filters.", "Loosen them, or begin at a smaller --index.")
    return found


def main(call: cli.Call) -> None:
    wanted = call.flags
    if wanted.rollout == (wanted.source is not None):
        raise UserError("name either a source or --rollout.", "See --help.")
    for text in wanted.filter:  # before a model is loaded
        sources.parse_filter(text)
    system = systems.load(wanted.checkpoint, wanted.image_tokenizer, text_tokenizer_path=wanted.text_tokenizer)
    with announced("compiling and computing" if wanted.figures or wanted.rollout else f"reading {wanted.source}"):
        found = chosen(call, system)
    if wanted.html:
        files.write_file(wanted.html, html_page(wanted.source or f"Rollout of task {wanted.task}", found))
        print(f"{wanted.html}: {len(found)} items")
        return
    console = Console()
    for item in found:
        print_item(console, item, wanted.all_tokens)


def entry() -> None:
    argv = cli.with_named_source(sys.argv, ["figures", "all_tokens", "rollout"])
    cli.run(main, config=False, workdir=False, add_flags=add_flags, argv=argv,
            reads=("source",), urls=("checkpoint", "image_tokenizer", "text_tokenizer"))


if __name__ == "__main__":
    entry()
