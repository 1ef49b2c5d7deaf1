"""Convert a model between our checkpoints (Orbax) and what PyTorch users have (safetensors), either way.

    python -m ivr_jax.convert --from=orbax runs/demo/rl --to=hf runs/demo/export
    python -m ivr_jax.convert --from=hf Emu3.5 --to=orbax runs/emu35
    python -m ivr_jax.convert --pack=runs/demo/rl --pack_to=ivr_jax/checkpoints/micro --figures=runs/demo/eval_rl

`orbax` is a workdir of ivr_jax.train or one of its checkpoints/<step> folders. `hf` is a folder with safetensors and
config.json (the decoder, as transformers loads it), or with safetensors or model.ckpt and config.yaml or config.json
(the image tokenizer). What is inside decides which of the two is converted. A part of one tensor is in memory at a
time; a model need not fit. Files of a text tokenizer go along, optimiser state never does.

`--pack` writes a small model and its image tokenizer together as safetensors with what they came from: such a folder is
a checkpoint by itself, and the package carries one (`--checkpoint=micro`).

The new folder appears when it is complete and a certificate holds, which is printed: tensors, bytes, dtypes, SHA-256 of
every tensor on both sides (no value of which may be NaN or infinite) and, for a decoder and where PyTorch is installed,
the largest difference of logits between this program and transformers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from ivr_jax import cli, files
from ivr_jax.checkpoints import hf, parity, store, streaming
from ivr_jax.checkpoints.lazy import Index, LazyArray
from ivr_jax.checkpoints.safetensors_io import digest, row_blocks
from ivr_jax.cloud import inputs, mirror
from ivr_jax.cloud.objects import is_url
from ivr_jax.convert.pack import pack_model
from ivr_jax.errors import UserError
from ivr_jax.heartbeat import Heartbeat
from ivr_jax.models import backbone, image_tokenizer
from ivr_jax.models.backbone_config import MODEL_TYPES, BackboneConfig
from ivr_jax.models.image_tokenizer import ImageTokenizerConfig
from ivr_jax.protocol.emu_text import RANKS_FILE, VISION_FILE

BACKBONE, IMAGE_TOKENIZER = "backbone", "image_tokenizer"
EXTRA = "ivr_jax.json"  # what our checkpoints know beyond an export's config: vocabulary, image tokenizer, the run
TOKENIZER = "tokenizer"  # folder of a workdir for the files that came with a decoder's weights
FORMS = ("orbax", "hf")
_THEIRS = {"architectures", "attention_dropout"}  # fields that an imported config.json keeps
_EMU_FILES = {RANKS_FILE, VISION_FILE}
_ADAPTER = "adapter_config.json"
_COMPANIONS = (
    "*token*.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template*", "*.jinja", "*.tiktoken", "*.model",
    VISION_FILE, "tokenization_*.py", "LICEN[CS]E*", "NOTICE*", "COPYING*",
)  # fmt: skip


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
    def slots(self) -> dict[str, hf.TensorPlace]:
        """Every tensor name of an export, with its place in `params`."""
        if isinstance(self.config, BackboneConfig):
            return hf.backbone_slots(self.config)
        return hf.image_tokenizer_slots(self.config)


def read_orbax(path: str | os.PathLike[str]) -> Model:
    """A checkpoint, to be read a part at a time; optimiser state is left where it is."""
    meta = store.read_meta(path)
    classes = {BACKBONE: (BackboneConfig, backbone), IMAGE_TOKENIZER: (ImageTokenizerConfig, image_tokenizer)}
    if meta.get("kind") not in classes:
        raise UserError(f"{str(path)!r} holds a checkpoint of kind {meta.get('kind')!r}.",
                        "Name a backbone's or an image tokenizer's.")
    make, module = classes[meta["kind"]]
    try:
        sizes = {key: tuple(value) if isinstance(value, list) else value for key, value in meta["model"].items()}
        config = make(**sizes)
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"the checkpoint {str(path)!r} does not say what its model is ({error}).",
                        "It is damaged, or of another version of the program; use another step.") from None
    params = streaming.open_params(path, module.param_shapes(config))
    folders = _tokenizer_folders(path, meta.get("text_tokenizer", ""))
    companions = _companions(folders[0], code=folders[0].name == TOKENIZER) if folders else ()
    extra = {key: meta[key] for key in meta if key not in ("kind", "model", "lora")}  # adapters are merged
    return Model(meta["kind"], config, params, extra, companions if meta["kind"] == BACKBONE else ())


def _tokenizer_folders(path: str | os.PathLike[str], recorded: str) -> list[Path]:
    """Folders with the text tokenizer of a checkpoint, here: in its workdir, and the recorded one.

    `recorded`: a folder's full name or URL, or one that is built in.
    """
    if is_url(path):
        run = re.sub(rf"/{store.FOLDER}/\d+/?$", "", str(path).rstrip("/"))
        named = [url for url in (f"{run}/{TOKENIZER}", recorded) if not is_url(url) or inputs.listed(url)]
    else:
        named = [str(store.step_folder(path).parent.parent / TOKENIZER), recorded]
    found = [inputs.local(name) for name in named if name]
    return [folder for folder in found if folder.is_absolute() and folder.is_dir()]


def read_hf(path: Path, param_dtype: str | None = None, vocab_multiple: int = 1) -> Model:
    """A folder of weights, to be read a part at a time: an image tokenizer if a config says so, else a decoder.

    Args:
      param_dtype: of the parameters, in which a decoder also computes; None: bfloat16 when all files are, else float32.
      vocab_multiple: of a decoder (see `BackboneConfig`).
    """
    if (path / _ADAPTER).is_file() and not any((path / name).is_file() for name in ("config.json", "config.yaml")):
        raise UserError(f"{path} holds an adapter, and not the model that it belongs to.",
                        "Merge it into its model (peft: merge_and_unload), and name the folder of the result.")
    if param_dtype is None:
        found = {tensor.dtype.name for tensor in hf.open_weights(path).values()}
        param_dtype = "bfloat16" if found == {"bfloat16"} else "float32"
    fields = hf.read_mapping(path, ("config.yaml", "config.json"))
    decodes = str(fields.get("model_type")).lower() in MODEL_TYPES
    if (path / "config.yaml").is_file() or not decodes and ImageTokenizerConfig.describes(fields):
        image_config, params = hf.open_image_tokenizer(path, param_dtype=param_dtype)
        return Model(IMAGE_TOKENIZER, image_config, params, _extra(path))
    dtypes = {"param_dtype": param_dtype, "dtype": param_dtype}
    config, params = hf.open_backbone(path, vocab_multiple=vocab_multiple, **dtypes)
    companions = _companions(path, code=bool(fields.get("auto_map")))  # modules that config.json names
    return Model(BACKBONE, config, params, {"hf_config": dict(fields), **_extra(path)}, companions)


def _companions(folder: Path, code: bool) -> tuple[Path, ...]:
    """Files beside weights that belong to an export too: a text tokenizer's, licences and, with `code`, Python files.

    What training and adapters left behind describes other weights.
    """
    patterns = (*_COMPANIONS, "*.py") if code else _COMPANIONS
    found = (file for file in sorted(folder.iterdir()) if file.is_file())
    return tuple(file for file in found if any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns))


def write_orbax(model: Model, folder: Path, final: str | None = None) -> None:
    """A workdir with one checkpoint, step 0, which training can start from; `final` is the full name it will have."""
    extra = dict(model.extra)
    if _EMU_FILES <= {file.name for file in model.companions}:
        extra["text_tokenizer"] = f"{final or folder.absolute()}/{TOKENIZER}"
    streaming.write(folder, model.params, {"kind": model.kind, "model": dataclasses.asdict(model.config), **extra})
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


def _copy(companions: Sequence[Path], folder: Path) -> None:
    if companions:
        folder.mkdir(exist_ok=True)
    for file in companions:
        shutil.copyfile(file, folder / file.name)


def _bar(what: str, size: int) -> tqdm:
    return tqdm(total=size, desc=what, unit="B", unit_scale=True, leave=False)


@contextlib.contextmanager
def shown(model: Model) -> Iterator[Model]:
    """The same model, and a progress bar of the bytes of its parameters that are read."""

    def one(array: LazyArray) -> LazyArray:
        def read(index: Index) -> np.ndarray:
            part = array.read(index)
            bar.update(part.nbytes)
            return part

        return LazyArray(array.shape, array.dtype, read)

    with _bar("convert", sum(array.nbytes for array in jax.tree.leaves(model.params))) as bar:
        yield dataclasses.replace(model, params=jax.tree.map(one, model.params))


def certificate(model: Model, folder: Path) -> dict[str, Any]:
    """Compares `model` with the weights in `folder`, reading a part of a tensor at a time on both sides.

    Returns:
      tensors, bytes and dtypes of the files; `copies`, tensors that repeat what others or the config say, and do so
      rightly (`hf.needed_weights`); `equal`, how many tensors have the same SHA-256 on both sides (our
      parameters brought to the files' dtype); `unfit`, names of the files' tensors with values that are NaN or
      infinite; `digest`, over all of the files' tensors; `logits`, the largest difference of logits on a fixed prompt
      against transformers, and `scale`, the largest logit (a decoder's in safetensors, if every value is finite; None
      without PyTorch).
    """
    everything = hf.open_weights(folder)
    stored = everything
    if isinstance(model.config, BackboneConfig):
        stored = hf.needed_weights(model.config, everything, folder)
    copies = sorted(everything.keys() - stored.keys())
    size = sum(tensor.dtype.itemsize * int(np.prod(tensor.shape)) for tensor in stored.values())
    digests, equal, unfit = {}, 0, set()
    with _bar("verify", size) as bar:

        def checked(name: str, parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
            for part in parts:
                if not np.isfinite(part).all():
                    unfit.add(name)
                bar.update(part.nbytes)
                yield part

        for name, slot in sorted(model.slots.items(), key=lambda item: item[1].path):
            theirs = stored[name]
            planned = hf.planned_tensors({name: slot}, model.params, theirs.dtype.name)[0]
            blocks = row_blocks(slot.shape, theirs.dtype.itemsize)
            rest = tuple(slice(0, size) for size in slot.shape[1:])
            digests[name] = digest(checked(name, (theirs.read((slice(*bounds), *rest)) for bounds in blocks)))
            equal += digest(planned.parts()) == digests[name]
    total = hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()
    logits, scale = (None, None) if unfit else _compared_logits(model, folder)
    return {
        "tensors": len(everything), "copies": copies, "bytes": size, "equal": equal + len(copies),
        "dtypes": sorted({tensor.dtype.name for tensor in stored.values()}), "unfit": sorted(unfit), "digest": total,
        "logits": logits, "scale": scale,
    }  # fmt: skip


def _compared_logits(model: Model, folder: Path) -> tuple[float | None, float | None]:
    if not isinstance(model.config, BackboneConfig):
        return None, None
    tokens = parity.prompt(model.config)
    total = 2 * model.config.num_hidden_layers + 1  # theirs counts the last norm
    with tqdm(total=total, desc="compare logits", unit="layer", leave=False) as bar, Heartbeat(bar) as heartbeat:
        heartbeat.begin("starting PyTorch")
        theirs = parity.transformers_logits(model.config, folder, tokens, bar.update)
        if theirs is None:
            return None, None
        ours = parity.logits(model.config, model.params, tokens, bar.update)
    return float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())


def _extra(path: Path) -> dict[str, Any]:
    return dict(hf.read_mapping(path, (EXTRA,))) if (path / EXTRA).is_file() else {}


def add_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("from", None, FORMS, "what the first folder holds", flag_values=values)
    flags.DEFINE_string("from_path", None, "the first folder; may also follow --from", flag_values=values)
    flags.DEFINE_enum("to", None, FORMS, "what to make of it", flag_values=values)
    flags.DEFINE_string("to_path", None, "the new folder; may also follow --to", flag_values=values)
    flags.DEFINE_string("pack", None, "workdir of a model of the micro-world, to be packed", flag_values=values)
    flags.DEFINE_string("pack_to", None, "the packed folder; one that is there is replaced", flag_values=values)
    flags.DEFINE_string("figures", None, "an evaluation's workdir, whose figures go along", flag_values=values)
    flags.DEFINE_string("made_by", "make demo", "the command that trained the model, for the record",
                        flag_values=values)
    flags.DEFINE_enum("model_type", None, ["qwen3", "Emu3"],
                      "for config.json; by default that of an imported decoder, or else qwen3", flag_values=values)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"],
                      "of exported tensors; by default that of the parameters", flag_values=values)
    flags.DEFINE_integer("vocab_multiple", 1, "pad an imported decoder's vocabulary inside to a multiple of this, so "
                         "that a mesh can divide it", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("overwrite", False, "replace the new folder if it is there already", flag_values=values)
    flags.DEFINE_enum("param_dtype", None, ["float32", "bfloat16"],
                      "of imported parameters; by default that of the files; float32 makes a master copy for training",
                      flag_values=values)


def main(call: cli.Call) -> None:
    if call.flags.pack or call.flags.pack_to:
        pack_model(call.flags.pack, call.flags.pack_to, call.flags.figures, call.flags.made_by)
        return
    forms = {name: call.flags[name].value for name in ("from", "to")}
    if not (call.flags.from_path and call.flags.to_path) or set(forms.values()) != set(FORMS):
        raise UserError("which way to convert is not clear.",
                        "Write --from=orbax DIR --to=hf DIR, or --from=hf DIR --to=orbax DIR.")
    given = {name: getattr(call.flags, name) for name in ("model_type", "dtype", "vocab_multiple", "param_dtype")}
    convert_checkpoint(call.flags.from_path, call.flags.to_path, forms["to"], overwrite=call.flags.overwrite, **given)


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    *,
    overwrite: bool = False,
    model_type: str | None = None,
    dtype: str | None = None,
    vocab_multiple: int = 1,
    param_dtype: str | None = None,
) -> None:
    """Converts a backbone or an image tokenizer, a part of a tensor at a time, and prints the certificate.

    Args:
      source: a workdir or step folder (`to="hf"`), or a folder with safetensors and its config (`to="orbax"`).
      target: the new folder; it appears when it is complete and its certificate holds.
      to: "hf" (safetensors, as transformers loads them) or "orbax" (a workdir that training starts from).
      overwrite: replace `target` if it exists.
      model_type, dtype: of an export, see `--help`; vocab_multiple, param_dtype: of an import.

    Raises:
      UserError: a damaged or unknown checkpoint, no space, a certificate that does not hold; nothing new is left.
    """
    exported, new = to == "hf", Path(target).expanduser()
    origin = source if exported and is_url(source) else inputs.local(source)
    if isinstance(origin, Path) and origin.resolve().is_relative_to(new.resolve()):
        raise UserError(f"{new} holds what is to be converted, and would be replaced.", "Name another folder.")
    read = read_orbax(origin) if exported else read_hf(origin, param_dtype, vocab_multiple)
    with files.NewFolder(new, overwrite=overwrite) as folder:
        with shown(read) as model:
            if exported:
                write_hf(model, folder, model_type, dtype)
            else:
                write_orbax(model, folder, mirror.url_of(new) or str(new.absolute()))
        model = read if exported else read_orbax(folder)
        report(certificate(model, folder if exported else origin), model, new, exported)


def check(found: Mapping[str, Any], target: Path, exact: bool, exported: bool) -> None:
    """Raises UserError when a certificate does not hold.

    It does not when a value is NaN or infinite, or when tensors or logits differ although nothing was rounded
    (`exact`): the logits by more than a thousandth of the largest.
    """
    if unfit := found["unfit"]:
        more = f" and {len(unfit) - 1} more" if len(unfit) > 1 else ""
        raise UserError(f"tensor {unfit[0]}{more} {'would hold' if exported else 'holds'} NaN or infinite values.",
                        "Take another step of the run, or a wider --dtype." if exported
                        else "Download or export the checkpoint again.")
    if found["equal"] != found["tensors"] and (exported or exact):
        raise UserError(f"{found['tensors'] - found['equal']} tensors of {target} differ from their source.",
                        "Nothing was written; convert again.")
    if found["logits"] is not None and exact and not found["logits"] <= 1e-3 * max(1.0, found["scale"]):
        raise UserError(f"the logits of {target} differ from transformers' by {found['logits']:.2g}, the largest is "
                        f"{found['scale']:.3g}.", "Nothing was written; check that the config belongs to the weights.")


def report(found: Mapping[str, Any], model: Model, target: Path, exported: bool) -> None:
    """Prints the certificate; raises UserError instead when it does not hold (see `check`)."""
    held, files = jax.tree.leaves(model.params)[0].dtype.name, found["dtypes"]
    check(found, target, _is_exact(files, held, exported), exported)
    count = sum(int(np.prod(slot.shape)) for slot in model.slots.values())
    print(mirror.with_urls(f"{target}: {model.kind}, {count:,} parameters"))
    print(f"  tensors      {found['tensors']}, {found['bytes']:,} bytes in the files")
    print(f"  dtypes       {dtypes_in_words(files, held, exported)}")
    print(f"  bit-equal    {found['equal']} of {found['tensors']} tensors (SHA-256 of each, in the files' dtype)")
    print(f"  SHA-256      {found['digest']} over all tensors")
    if found["copies"]:
        print(f"  left behind  {', '.join(found['copies'][:3])}: copies, equal to what is kept")
    if model.kind == BACKBONE:
        compared = found["logits"] is not None
        shown = (f"{found['logits']:.2e} at most, logits up to {found['scale']:.3g}" if compared
                 else "not compared, PyTorch is not installed")
        print(f"  logits       difference to transformers: {shown}")
        code = [file.name for file in model.companions if file.suffix == ".py"]
        names = ", ".join(file.name for file in model.companions if file.suffix != ".py") or "no files"
        print(f"  tokenizer    {names}")
        if code:
            print(f"  code         {', '.join(code)}: copied, never run")
        unknown = [name for name in ("text_tokenizer", "image_tokenizer") if name not in model.extra]
        if unknown and not exported:
            print("  vocabulary   the weights do not say what their token ids mean: generating and training need "
                  f"{' and '.join(f'--{name}=FOLDER' for name in unknown)}")


def _is_exact(files: Sequence[str], held: str, exported: bool) -> bool:
    """Whether every value survives the step from parameters of dtype `held` to `files` (or, on import, back)."""
    steps = ((held, name) if exported else (name, held) for name in files)
    return all(jnp.promote_types(before, after) == jnp.dtype(after) for before, after in steps)


def dtypes_in_words(files: Sequence[str], held: str, exported: bool) -> str:
    """What the step between the files' dtypes and the parameters' means for the values."""
    names, exact = " and ".join(files), _is_exact(files, held, exported)
    if list(files) == [held]:
        return f"{held} in the files and here"
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
    cli.run(main, config=False, workdir=False, add_flags=add_flags, argv=with_named_paths(sys.argv),
            urls=("from_path", "image_tokenizer"), writes=("to_path",))


if __name__ == "__main__":
    entry()
