"""Tokenise the images of a dataset as a job of its own, on all devices of one or many hosts.

    python -m ivr_jax.tokenise DATASET --image_tokenizer=WORKDIR --out=runs/mine/sft/examples
    ... the same on every host of a pod, with --distributed; DATASET and the folder of --out are shared by all hosts
    ... once, with --engine=ray --shards=64, on the machines of a Ray cluster that share them (docs/how-to/ray.md)

Fine-tuning does this by itself when it finds no examples, in its first process alone; when it finds them in
WORKDIR/examples, made of the same dataset with the same tokenizers, it reads them.  Every process encodes its part of
the dataset, each batch of images spread over the devices of its host; process 0 joins the parts.  What comes out is the
same, byte by byte, whatever their number.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from ivr_jax import cli, distributed, files
from ivr_jax.checkpoints import system as systems
from ivr_jax.cluster import engine as cluster
from ivr_jax.cluster.part import Part
from ivr_jax.data import examples
from ivr_jax.data.sources import open_dataset
from ivr_jax.errors import UserError
from ivr_jax.models.image_codec import ImageCodec
from ivr_jax.protocol.text import TextTokenizer

_ANY_LENGTH = 1 << 30
_PLAN = "plan.json"


def add_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("source", None, "the dataset; may also stand without --source=", flag_values=values)
    flags.DEFINE_string("image_tokenizer", None, "workdir of an image_tokenizer run", flag_values=values)
    flags.DEFINE_string("text_tokenizer", systems.MICRO, "micro, or the folder of an Emu3.5 tokenizer",
                        flag_values=values)
    flags.DEFINE_string("out", None, "the new folder: WORKDIR/examples of an sft run", flag_values=values)
    flags.DEFINE_integer("length", 0, "most tokens of a trajectory; 0: any number", lower_bound=0, flag_values=values)
    flags.DEFINE_enum("too_long", "error", ["error", "drop"], "what a longer trajectory is: an error, or left out",
                      flag_values=values)
    distributed.add_flags(values)
    cluster.add_flags(values)


def main(call: cli.Call) -> None:
    given, engine = call.flags, cluster.from_call(call)
    for name in ("source", "image_tokenizer", "out"):
        if not getattr(given, name):
            raise UserError(f"no --{name} was named.",
                            "Write: DATASET --image_tokenizer=WORKDIR --out=SFT_WORKDIR/examples.")
    distributed.start(given)
    if engine is not None and jax.process_count() > 1:
        raise UserError("--engine=ray starts its own processes.", "Leave out --distributed and --coordinator.")
    dataset, out = open_dataset(given.source), Path(given.out).expanduser()
    if examples.read_manifest(out) is None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and holds no token examples.", "Name a new folder: SFT_WORKDIR/examples.")
    image_codec, tokenizer = _tokenizers(given)
    part, parts = jax.process_index(), jax.process_count()
    longest, left_out = given.length or _ANY_LENGTH, frozenset()
    if given.length:  # every process reads the headers of all images: they are a small part of the work
        left_out = examples.too_long(dataset, tokenizer, image_codec.config.factor, longest, given.too_long == "drop")
    if engine is not None:
        fingerprint = examples.source_fingerprint(dataset, tokenizer, systems.fingerprint(image_codec.params))
        _report(out, _on_cluster(call, engine, out, fingerprint, longest, left_out, len(dataset)))
        return
    folder = files.NewFolder(out, overwrite=True) if distributed.is_primary() else None
    distributed.barrier("begin")
    partial = files.partial_folder(out)
    examples.write_part(dataset, tokenizer, image_codec.encode, partial, longest, part, parts, left_out=left_out)
    distributed.barrier("parts")
    if folder is not None:
        fingerprint = examples.source_fingerprint(dataset, tokenizer, systems.fingerprint(image_codec.params))
        manifest = examples.join_parts(partial, fingerprint, longest, parts)
        folder.publish()
        _report(out, manifest)
    distributed.barrier("joined")


def _tokenizers(given: flags.FlagValues) -> tuple[ImageCodec, TextTokenizer]:
    image_codec = systems.load_image_codec(given.image_tokenizer)
    return image_codec, systems.text_tokenizer(given.text_tokenizer, image_codec.config.n_embed)


def _report(out: Path, manifest: dict[str, Any]) -> None:
    print(f"tokenise: {out}: {manifest['counts']}, {manifest['tokens']:,} tokens, longest {manifest['longest']}")


def _parts_folder(out: Path) -> Path:
    """Where the parts of a run on a cluster are kept until all of them are there."""
    out = Path(os.path.abspath(out))
    return out.with_name(f".{out.name}.parts")


def _on_cluster(
    call: cli.Call, engine: cluster.Engine, out: Path, fingerprint: str, longest: int, left_out: frozenset[int],
    trajectories: int,
) -> dict[str, Any]:  # fmt: skip
    """Writes the parts that are missing, joins all of them, and returns the manifest."""
    kept = _parts_folder(out)
    plan = {"made of": fingerprint, "parts": engine.parts, "longest": longest, "left_out": sorted(left_out)}
    with files.writing(kept):
        kept.mkdir(parents=True, exist_ok=True)
    with files.Lock(kept):
        if not (kept / _PLAN).exists() or files.read_json(kept / _PLAN) != plan:
            for stale in kept.iterdir():
                stale.unlink()
            files.write_json(kept / _PLAN, plan)
        open_ = [part for part in range(engine.parts) if not examples.part_file(kept, part).exists()]
        with tqdm(desc="tokenise", unit="trajectory", total=trajectories) as bar:
            engine.run("ivr_jax.tokenise.__main__:run_part", call.argv, kept, bar, open_)
        with files.NewFolder(out, overwrite=True) as partial:
            for file in kept.iterdir():
                if file.name != _PLAN:
                    shutil.copyfile(file, partial / file.name)
            manifest = examples.join_parts(partial, fingerprint, longest, engine.parts)
        shutil.rmtree(kept)
    return manifest


def run_part(argv: Sequence[str], part: Part) -> None:
    """Writes one part of a run with `--engine=ray`."""
    given = cli.parse(argv, config=False, workdir=False, add_flags=add_flags).flags
    kept, dataset = _parts_folder(Path(given.out).expanduser()), open_dataset(given.source)
    plan = files.read_json(kept / _PLAN)
    image_codec, tokenizer = _tokenizers(given)
    chunks = range(part.index * examples.CHUNK, len(dataset), part.count * examples.CHUNK)
    part.bar.reset(total=sum(min(examples.CHUNK, len(dataset) - start) for start in chunks))
    lock = kept / f"lock.{part.index}"
    lock.touch()
    with files.Lock(lock):  # a machine that was taken for lost may still write
        examples.write_part(
            dataset, tokenizer, image_codec.encode, kept, plan["longest"], part.index, part.count,
            left_out=frozenset(plan["left_out"]), on_chunk=part.bar.update,
        )  # fmt: skip


def entry() -> None:
    argv = cli.with_named_source(sys.argv, ["distributed"])
    cli.run(main, config=False, workdir=False, add_flags=add_flags, argv=argv,
            urls=("source", "image_tokenizer", "text_tokenizer"))


if __name__ == "__main__":
    entry()
