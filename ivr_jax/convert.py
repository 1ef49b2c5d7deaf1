"""Convert a model between our checkpoints (Orbax) and what PyTorch users have (safetensors), either way.

    python -m ivr_jax.convert --from=orbax runs/demo/rl --to=hf runs/demo/export
    python -m ivr_jax.convert --from=hf Emu3.5 --to=orbax runs/emu35

`orbax` is a workdir of ivr_jax.train or one of its checkpoints/<step> folders; `hf` is a folder with safetensors and
config.json (the decoder, as transformers loads it) or config.yaml (the image tokenizer). What is inside decides which
of the two is converted. The new folder appears when it is complete. Then a certificate is printed: tensors, bytes,
dtypes, SHA-256 of every tensor on both sides and, for a decoder and where PyTorch is installed, the largest difference
of logits between this program and transformers. Optimiser state never enters an export.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
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
from ivr_jax.models import backbone, hf, image_tokenizer
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.models.image_tokenizer import ImageTokenizerConfig
from ivr_jax.models.safetensors_io import open_directory
from ivr_jax.training import checkpoint

BACKBONE, IMAGE_TOKENIZER = "backbone", "image_tokenizer"
EXTRA = "ivr_jax.json"  # what our checkpoints know beyond an export's config: vocabulary, image tokenizer, the run
FORMS = ("orbax", "hf")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of either kind in memory: config, parameters, and what its checkpoint says beyond the config."""

    kind: str
    config: BackboneConfig | ImageTokenizerConfig
    params: Mapping[str, Any]
    extra: dict[str, Any]

    @property
    def slots(self) -> dict[str, hf.Slot]:
        """Every tensor name of an export, with its place in `params`."""
        if isinstance(self.config, BackboneConfig):
            return hf.backbone_slots(self.config)
        return hf.image_tokenizer_slots(self.config)


def read_orbax(path: Path) -> Model:
    """The parameters of a checkpoint, without optimiser state."""
    meta = checkpoint.read_meta(path)
    classes = {BACKBONE: (BackboneConfig, backbone), IMAGE_TOKENIZER: (ImageTokenizerConfig, image_tokenizer)}
    if meta.get("kind") not in classes:
        raise UserError(f"{str(path)!r} holds a checkpoint of kind {meta.get('kind')!r}.",
                        "Name a backbone's or an image tokenizer's.")
    make, module = classes[meta["kind"]]
    config = make(**{key: tuple(value) if isinstance(value, list) else value for key, value in meta["model"].items()})
    params, _ = checkpoint.read_params(path, meta["kind"], module.param_shapes(config))
    return Model(meta["kind"], config, params, {key: meta[key] for key in meta if key not in ("kind", "model")})


def read_hf(path: Path, param_dtype: str) -> Model:
    """A folder of safetensors: a decoder if it has a config.json with a model type, else an image tokenizer."""
    fields = _json(path / "config.json")
    extra = _json(path / EXTRA)
    if "model_type" in fields:
        config, params = hf.import_backbone(path, param_dtype=param_dtype)
        return Model(BACKBONE, config, params, extra)
    image_config, params = hf.import_image_tokenizer(path, param_dtype=param_dtype)
    return Model(IMAGE_TOKENIZER, image_config, params, extra)


def write_orbax(model: Model, path: Path, overwrite: bool = False) -> None:
    """A workdir with one checkpoint, step 0, which training can start from."""
    with hf.new_directory(path, overwrite) as folder:
        checkpointer = checkpoint.Checkpointer(folder)
        meta = {"kind": model.kind, "model": dataclasses.asdict(model.config), **model.extra}
        checkpointer.save(0, {"params": model.params}, None, meta)
        checkpointer.wait()
        checkpointer.close()


def write_hf(model: Model, path: Path, model_type: str, dtype: str | None, overwrite: bool = False) -> None:
    """A folder of safetensors; see `hf.export_backbone`."""
    with hf.new_directory(path, overwrite) as folder:
        if isinstance(model.config, BackboneConfig):
            hf.export_backbone(model.config, model.params, folder, model_type=model_type, dtype=dtype)
        else:
            hf.export_image_tokenizer(model.config, model.params, folder, dtype=dtype)
        (folder / EXTRA).write_text(json.dumps(model.extra, indent=1))


def certificate(model: Model, folder: Path) -> dict[str, Any]:
    """Compares `model`, as it now stands in memory, with the safetensors in `folder`.

    Returns:
      tensors, bytes and dtypes of the files; `equal`, how many tensors have the same SHA-256 on both sides (our
      parameters brought to the files' dtype); `digest`, over all of the files' tensors; `logits`, the largest
      difference of logits on a fixed prompt against transformers (a decoder's, None without PyTorch).
    """
    stored = open_directory(folder)
    total, equal = hashlib.sha256(), 0
    for name, slot in model.slots.items():
        theirs = stored[name]
        planned = hf.planned_tensors({name: slot}, model.params, theirs.dtype.name)[0]
        ours, digest = (_sha256(array) for array in (planned.fetch(), theirs.read()))
        equal += ours == digest
        total.update(f"{name} {digest}\n".encode())
    size = sum(tensor.dtype.itemsize * int(np.prod(tensor.shape)) for tensor in stored.values())
    dtypes = sorted({tensor.dtype.name for tensor in stored.values()})
    logits = _logit_difference(model, folder) if isinstance(model.config, BackboneConfig) else None
    return {"tensors": len(stored), "bytes": size, "dtypes": dtypes, "equal": equal, "digest": total.hexdigest(),
            "logits": logits}


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _logit_difference(model: Model, folder: Path) -> float | None:
    try:
        import torch
        import transformers
    except ImportError:
        return None
    config = dataclasses.replace(model.config, dtype="float32")
    tokens = (7919 * np.arange(1, 33, dtype=np.int32) % config.vocab_size)[None]
    positions = np.arange(32, dtype=np.int32)[None]
    hidden, _ = backbone.apply(config, model.params, jnp.asarray(tokens), jnp.asarray(positions))
    ours = backbone.logits(config, model.params, hidden)
    fields = transformers.Qwen3Config(**config.to_hf("qwen3"))
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(
        folder, config=fields, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    return float(np.abs(np.asarray(ours) - expected).max())


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON mapping.", "Get the file again.")
    return value


def add_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("from", None, FORMS, "what the first folder holds", flag_values=values)
    flags.DEFINE_string("from_path", None, "the first folder; may also follow --from", flag_values=values)
    flags.DEFINE_enum("to", None, FORMS, "what to make of it", flag_values=values)
    flags.DEFINE_string("to_path", None, "the new folder; may also follow --to", flag_values=values)
    flags.DEFINE_enum("model_type", "qwen3", ["qwen3", "Emu3"], "for config.json", flag_values=values)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "of exports", flag_values=values)
    flags.DEFINE_boolean("overwrite", False, "replace the new folder if it is there already", flag_values=values)
    flags.DEFINE_enum("param_dtype", "float32", ["float32", "bfloat16"], "of imported parameters", flag_values=values)


def main(call: cli.Call) -> None:
    source_form, target_form = call.flags["from"].value, call.flags["to"].value
    paths = call.flags.from_path, call.flags.to_path
    if None in paths or {source_form, target_form} != set(FORMS):
        raise UserError("which way to convert is not clear.",
                        "Write --from=orbax DIR --to=hf DIR, or --from=hf DIR --to=orbax DIR.")
    source, target = Path(paths[0]).expanduser(), Path(paths[1]).expanduser()
    if source_form == "orbax":
        model = read_orbax(source)
        write_hf(model, target, call.flags.model_type, call.flags.dtype, call.flags.overwrite)
        folder = target
    else:
        write_orbax(read_hf(source, call.flags.param_dtype), target, call.flags.overwrite)
        model, folder = read_orbax(target), source
    if not any(folder.glob("*.safetensors")):
        print(f"{target}: {len(model.slots)} tensors from a pickle, float32; no certificate without safetensors.")
        return
    report(certificate(model, folder), model, target)


def report(found: Mapping[str, Any], model: Model, target: Path) -> None:
    """Prints the certificate. Raises UserError when tensors differ although no dtype was narrowed."""
    held = jax.tree.leaves(model.params)[0].dtype
    print(f"{target}: {model.kind}")
    dtypes = ", ".join(found["dtypes"])
    print(f"  tensors      {found['tensors']}, {found['bytes']:,} bytes, {dtypes}; parameters here are {held}")
    print(f"  bit-equal    {found['equal']} of {found['tensors']} tensors (SHA-256 of each, both sides)")
    print(f"  SHA-256      {found['digest']} over all tensors")
    if model.kind == BACKBONE:
        compared = found["logits"] is not None
        shown = f"{found['logits']:.2e} at most" if compared else "not compared, PyTorch is not installed"
        print(f"  logits       difference to transformers: {shown}")
    narrowed = held.itemsize < max(jnp.dtype(name).itemsize for name in found["dtypes"])
    if found["equal"] != found["tensors"] and not narrowed:
        raise UserError(f"{found['tensors'] - found['equal']} tensors of {target} differ from their source.",
                        "Do not use it; convert again.")


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
