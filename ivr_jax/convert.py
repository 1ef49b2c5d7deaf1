"""Convert a model between our checkpoints (Orbax) and what PyTorch users have (safetensors), either way.

    python -m ivr_jax.convert --from=orbax runs/demo/rl --to=hf runs/demo/export
    python -m ivr_jax.convert --from=hf Emu3.5 --to=orbax runs/emu35

`orbax` is a workdir of ivr_jax.train or one of its checkpoints/<step> folders. `hf` is a folder with safetensors and
config.json (the decoder, as transformers loads it), or with safetensors or model.ckpt and config.yaml or config.json
(the image tokenizer). What is inside decides which of the two is converted. A part of one tensor is in memory at a
time; a model need not fit. Files of a text tokenizer go along, optimiser state never does.

The new folder appears when it is complete and a certificate holds, which is printed: tensors, bytes, dtypes, SHA-256 of
every tensor on both sides and, for a decoder and where PyTorch is installed, the largest difference of logits between
this program and transformers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from ivr_jax import cli
from ivr_jax.errors import UserError
from ivr_jax.models import backbone, hf, image_tokenizer, parity
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.models.image_tokenizer import ImageTokenizerConfig
from ivr_jax.models.safetensors_io import digest, row_blocks
from ivr_jax.protocol.emu_text import RANKS_FILE, VISION_FILE
from ivr_jax.training import checkpoint, store

BACKBONE, IMAGE_TOKENIZER = "backbone", "image_tokenizer"
EXTRA = "ivr_jax.json"  # what our checkpoints know beyond an export's config: vocabulary, image tokenizer, the run
TOKENIZER = "tokenizer"  # folder of a workdir for the files that came with a decoder's weights
FORMS = ("orbax", "hf")
_THEIRS = {"architectures", "attention_dropout"}  # fields that an imported config.json keeps
_EMU_FILES = {RANKS_FILE, VISION_FILE}
_COMPANIONS = {".json", ".jsonl", ".txt", ".tiktoken", ".model", ".jinja", ".py", ".md"}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of either kind: config, parameters (a tree of arrays or LazyArrays), and what is known beyond them.

    `companions` are the text tokenizer's files, to be copied along.
    """

    kind: str
    config: BackboneConfig | ImageTokenizerConfig
    params: Mapping[str, Any]
    extra: dict[str, Any]
    companions: tuple[Path, ...] = ()

    @property
    def slots(self) -> dict[str, hf.Slot]:
        """Every tensor name of an export, with its place in `params`."""
        if isinstance(self.config, BackboneConfig):
            return hf.backbone_slots(self.config)
        return hf.image_tokenizer_slots(self.config)


def read_orbax(path: Path) -> Model:
    """A checkpoint, to be read a part at a time; optimiser state is left where it is."""
    meta = checkpoint.read_meta(path)
    classes = {BACKBONE: (BackboneConfig, backbone), IMAGE_TOKENIZER: (ImageTokenizerConfig, image_tokenizer)}
    if meta.get("kind") not in classes:
        raise UserError(f"{str(path)!r} holds a checkpoint of kind {meta.get('kind')!r}.",
                        "Name a backbone's or an image tokenizer's.")
    make, module = classes[meta["kind"]]
    config = make(**{key: tuple(value) if isinstance(value, list) else value for key, value in meta["model"].items()})
    params = store.open_params(path, module.param_shapes(config))
    workdir = checkpoint.resolve(path).absolute().parent.parent
    recorded = Path(meta.get("text_tokenizer", ""))  # a folder's full name, or one that is built in
    folders = [folder for folder in (workdir / TOKENIZER, recorded) if folder.is_absolute() and folder.is_dir()]
    companions = _companions(folders[0]) if folders else ()
    extra = {key: meta[key] for key in meta if key not in ("kind", "model", "lora")}  # adapters are merged
    return Model(meta["kind"], config, params, extra, companions if meta["kind"] == BACKBONE else ())


def read_hf(path: Path, param_dtype: str, vocab_multiple: int = 1) -> Model:
    """A folder of weights, to be read a part at a time: an image tokenizer if a config says so, else a decoder.

    `vocab_multiple` is the decoder's (see `BackboneConfig`).
    """
    fields = hf.read_mapping(path, ("config.yaml", "config.json"))
    if (path / "config.yaml").is_file() or "model_type" not in fields and ImageTokenizerConfig.describes(fields):
        image_config, params = hf.open_image_tokenizer(path, param_dtype=param_dtype)
        return Model(IMAGE_TOKENIZER, image_config, params, _extra(path))
    config, params = hf.open_backbone(path, param_dtype=param_dtype, vocab_multiple=vocab_multiple)
    return Model(BACKBONE, config, params, {"hf_config": dict(fields), **_extra(path)}, _companions(path))


def _companions(folder: Path) -> tuple[Path, ...]:
    """Files beside weights that are neither weights nor about them: a text tokenizer's, remote code, licences."""
    names = {"config.json", hf.INDEX, EXTRA}
    found = (file for file in sorted(folder.iterdir()) if file.is_file() and file.name not in names)
    return tuple(file for file in found if file.suffix in _COMPANIONS or file.name.startswith(("LICENSE", "NOTICE")))


def write_orbax(model: Model, folder: Path, final: Path | None = None) -> None:
    """A workdir with one checkpoint, step 0, which training can start from; `final` is the name it will have."""
    extra = dict(model.extra)
    if _EMU_FILES <= {file.name for file in model.companions}:
        extra["text_tokenizer"] = str((final or folder).absolute() / TOKENIZER)
    store.write(folder, model.params, {"kind": model.kind, "model": dataclasses.asdict(model.config), **extra})
    _copy(model.companions, folder / TOKENIZER)


def write_hf(model: Model, folder: Path, model_type: str | None = None, dtype: str | None = None) -> None:
    """A folder of safetensors; see `hf.export_backbone`.

    `model_type` is by default what the decoder was imported from, or else "qwen3". Fields of an imported config.json
    that are not about sizes come back as they were, if the model type does.
    """
    if isinstance(model.config, BackboneConfig):
        imported = model.extra.get("hf_config", {})
        model_type = model_type or imported.get("model_type", "qwen3")
        hf.export_backbone(model.config, model.params, folder, model_type=model_type, dtype=dtype)
        fields = hf.read_mapping(folder, ("config.json",))
        if imported.get("model_type") == model_type:
            kept = {key: imported[key] for key in imported if key not in fields or key in _THEIRS}
            (folder / "config.json").write_text(json.dumps({**fields, **kept}, indent=2))
        _copy(model.companions, folder)
    else:
        hf.export_image_tokenizer(model.config, model.params, folder, dtype=dtype)
    known = {key: value for key, value in model.extra.items() if key != "hf_config"}
    if known:
        (folder / EXTRA).write_text(json.dumps(known, indent=1))


def _copy(files: Sequence[Path], folder: Path) -> None:
    if files:
        folder.mkdir(exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)


def certificate(model: Model, folder: Path) -> dict[str, Any]:
    """Compares `model` with the weights in `folder`, reading a part of a tensor at a time on both sides.

    Returns:
      tensors, bytes and dtypes of the files; `equal`, how many tensors have the same SHA-256 on both sides (our
      parameters brought to the files' dtype); `digest`, over all of the files' tensors; `logits`, the largest
      difference of logits on a fixed prompt against transformers, and `scale`, the largest logit (a decoder's in
      safetensors; None without PyTorch).
    """
    stored = hf.open_weights(folder)
    digests, equal = {}, 0
    for name, slot in sorted(model.slots.items(), key=lambda item: item[1].path):
        theirs = stored[name]
        planned = hf.planned_tensors({name: slot}, model.params, theirs.dtype.name)[0]
        blocks = row_blocks(slot.shape, theirs.dtype.itemsize)
        rest = tuple(slice(0, size) for size in slot.shape[1:])
        digests[name] = digest(theirs.read((slice(*bounds), *rest)) for bounds in blocks)
        equal += digest(planned.parts()) == digests[name]
    total = hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()
    size = sum(tensor.dtype.itemsize * int(np.prod(tensor.shape)) for tensor in stored.values())
    dtypes = sorted({tensor.dtype.name for tensor in stored.values()})
    logits, scale = None, None
    if isinstance(model.config, BackboneConfig):
        tokens = parity.prompt(model.config)
        theirs = parity.transformers_logits(model.config, folder, tokens)
        if theirs is not None:
            scale = float(np.abs(theirs).max())
            logits = float(np.abs(parity.logits(model.config, model.params, tokens) - theirs).max())
    return {"tensors": len(stored), "bytes": size, "dtypes": dtypes, "equal": equal, "digest": total,
            "logits": logits, "scale": scale}


def _extra(path: Path) -> dict[str, Any]:
    return dict(hf.read_mapping(path, (EXTRA,))) if (path / EXTRA).is_file() else {}


def add_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("from", None, FORMS, "what the first folder holds", flag_values=values)
    flags.DEFINE_string("from_path", None, "the first folder; may also follow --from", flag_values=values)
    flags.DEFINE_enum("to", None, FORMS, "what to make of it", flag_values=values)
    flags.DEFINE_string("to_path", None, "the new folder; may also follow --to", flag_values=values)
    flags.DEFINE_enum("model_type", None, ["qwen3", "Emu3"],
                      "for config.json; by default that of an imported decoder, or else qwen3", flag_values=values)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"],
                      "of exported tensors; by default that of the parameters", flag_values=values)
    flags.DEFINE_integer("vocab_multiple", 1, "pad an imported decoder's vocabulary inside to a multiple of this, so "
                         "that a mesh can divide it", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("overwrite", False, "replace the new folder if it is there already", flag_values=values)
    flags.DEFINE_enum("param_dtype", "float32", ["float32", "bfloat16"],
                      "of imported parameters; float32 is what training should start from", flag_values=values)


def main(call: cli.Call) -> None:
    source_form, target_form = call.flags["from"].value, call.flags["to"].value
    paths = call.flags.from_path, call.flags.to_path
    if None in paths or {source_form, target_form} != set(FORMS):
        raise UserError("which way to convert is not clear.",
                        "Write --from=orbax DIR --to=hf DIR, or --from=hf DIR --to=orbax DIR.")
    source, target = Path(paths[0]).expanduser(), Path(paths[1]).expanduser()
    with hf.new_directory(target, call.flags.overwrite) as folder:
        if source_form == "orbax":
            model = read_orbax(source)
            write_hf(model, folder, call.flags.model_type, call.flags.dtype)
            found = certificate(model, folder)
        else:
            write_orbax(read_hf(source, call.flags.param_dtype, call.flags.vocab_multiple), folder, target)
            model = read_orbax(folder)
            found = certificate(model, source)
        report(found, model, target, exported=source_form == "orbax")


def report(found: Mapping[str, Any], model: Model, target: Path, exported: bool) -> None:
    """Prints the certificate. Raises UserError when tensors differ although nothing was rounded on import."""
    held, theirs = jax.tree.leaves(model.params)[0].dtype.name, found["dtypes"]
    kept = all(jnp.promote_types(name, held) == jnp.dtype(held) for name in theirs)
    count = sum(int(np.prod(slot.shape)) for slot in model.slots.values())
    print(f"{target}: {model.kind}, {count:,} parameters")
    print(f"  tensors      {found['tensors']}, {found['bytes']:,} bytes in the files")
    print(f"  dtypes       {dtypes_in_words(theirs, held, exported)}")
    print(f"  bit-equal    {found['equal']} of {found['tensors']} tensors (SHA-256 of each, in the files' dtype)")
    print(f"  SHA-256      {found['digest']} over all tensors")
    if model.kind == BACKBONE:
        compared = found["logits"] is not None
        shown = (f"{found['logits']:.2e} at most, logits up to {found['scale']:.3g}" if compared
                 else "not compared, PyTorch is not installed")
        print(f"  logits       difference to transformers: {shown}")
        names = ", ".join(file.name for file in model.companions) or "no files"
        print(f"  tokenizer    {names}")
        unknown = [name for name in ("text_tokenizer", "image_tokenizer") if name not in model.extra]
        if unknown and not exported:
            print("  vocabulary   the weights do not say what their token ids mean: generating and training need "
                  f"{' and '.join(f'--{name}=FOLDER' for name in unknown)}")
    if found["equal"] != found["tensors"] and (exported or kept):
        raise UserError(f"{found['tensors'] - found['equal']} tensors of {target} differ from their source.",
                        "Nothing was written; convert again.")


def dtypes_in_words(files: Sequence[str], held: str, exported: bool) -> str:
    """What the step between the files' dtypes and the parameters' means for the values."""
    names = " and ".join(files)
    if list(files) == [held]:
        return f"{held} in the files and here"
    narrow, wide = (held, files) if exported else (files, [held])
    narrow = [narrow] if isinstance(narrow, str) else narrow
    exact = all(jnp.promote_types(a, b) == jnp.dtype(b) for a in narrow for b in wide)
    if exported:
        effect = "each value exactly the parameter's" if exact else "each value rounded from the parameter's"
        return f"{names} files of {held} parameters: {effect}"
    master = "master " if held == "float32" else ""
    effect = "each value exactly the file's" if exact else "each value rounded from the file's, which cannot be undone"
    return f"{held} {master}parameters from {names} files: {effect}"


def with_named_paths(argv: Sequence[str]) -> list[str]:
    """`--from=hf DIR` as `--from=hf --from_path=DIR`, the same for `--to`."""
    words: list[str] = []
    for word in argv:
        last = words[-1].lstrip("-").partition("=")[0] if words else ""
        words.append(f"--{last}_path={word}" if last in ("from", "to") and not word.startswith("-") else word)
    return words


def entry() -> None:
    cli.run(main, config=False, workdir=False, add_flags=add_flags, argv=with_named_paths(sys.argv))


if __name__ == "__main__":
    entry()
