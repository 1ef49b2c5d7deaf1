"""Tokenise the images of a dataset as a job of its own, on all devices of one or many hosts.

    python -m ivr_jax.tokenise DATASET --image_tokenizer=WORKDIR --out=runs/mine/sft/examples
    ... the same on every host of a pod, with --distributed; DATASET and the folder of --out are shared by all hosts

Fine-tuning does this by itself when it finds no examples, in its first process alone; when it finds them in
WORKDIR/examples, made of the same dataset with the same tokenizers, it reads them.  Every process encodes its part of
the dataset, each batch of images spread over the devices of its host; process 0 joins the parts.  What comes out is the
same, byte by byte, whatever their number.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
from absl import flags

from ivr_jax import cli, distributed, files
from ivr_jax.checkpoints import system as systems
from ivr_jax.data import examples
from ivr_jax.data.sources import open_dataset
from ivr_jax.errors import UserError

_ANY_LENGTH = 1 << 30


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


def main(call: cli.Call) -> None:
    given = call.flags
    for name in ("source", "image_tokenizer", "out"):
        if not getattr(given, name):
            raise UserError(f"no --{name} was named.",
                            "Write: DATASET --image_tokenizer=WORKDIR --out=SFT_WORKDIR/examples.")
    distributed.start(given)
    dataset, out = open_dataset(given.source), Path(given.out).expanduser()
    if examples.read_manifest(out) is None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and holds no token examples.", "Name a new folder: SFT_WORKDIR/examples.")
    codec = systems.load_image_codec(given.image_tokenizer)
    tokenizer = systems.text_tokenizer(given.text_tokenizer, codec.config.n_embed)
    part, parts = jax.process_index(), jax.process_count()
    longest, left_out = given.length or _ANY_LENGTH, frozenset()
    if given.length:  # every process reads the headers of all images: they are a small part of the work
        left_out = examples.too_long(dataset, tokenizer, codec.config.factor, longest, given.too_long == "drop")
    folder = files.NewFolder(out, overwrite=True) if distributed.is_primary() else None
    distributed.barrier("begin")
    partial = files.partial_folder(out)
    examples.write_part(dataset, tokenizer, codec.encode, partial, longest, part, parts, left_out=left_out)
    distributed.barrier("parts")
    if folder is not None:
        fingerprint = examples.source_fingerprint(dataset, tokenizer, systems.fingerprint(codec.params))
        manifest = examples.join_parts(partial, fingerprint, longest, parts)
        folder.publish()
        print(f"tokenise: {out}: {manifest['counts']}, {manifest['tokens']:,} tokens, longest {manifest['longest']}")
    distributed.barrier("joined")


def entry() -> None:
    argv = cli.with_named_source(sys.argv, ["distributed"])
    cli.run(main, config=False, workdir=False, add_flags=add_flags, argv=argv,
            urls=("source", "image_tokenizer", "text_tokenizer"))


if __name__ == "__main__":
    entry()
