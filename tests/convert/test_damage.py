"""Weights and folders as they go wrong in practice: each is one line that says how to mend it, and leaves nothing."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import commands
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml
from checkpoints_fixture import CONFIG, IMAGES, decoder_params, export_decoder, random_tree

from ivr_jax.checkpoints import hf
from ivr_jax.checkpoints.safetensors_io import INDEX
from ivr_jax.models import image_tokenizer


@pytest.fixture
def exported(tmp_path):
    return export_decoder(tmp_path / "model", decoder_params())


def images_folder(folder: Path) -> Path:
    hf.export_image_tokenizer(IMAGES, random_tree(image_tokenizer.param_shapes(IMAGES)), folder)
    return folder


def convert(form: str, source: Path, target: Path, *words: object) -> commands.Done:
    other = "hf" if form == "orbax" else "orbax"
    return commands.run("convert", f"--from={form}", f"--from_path={source}", f"--to={other}", f"--to_path={target}",
                        *words)  # fmt: skip


def change_config(folder: Path, **fields: object) -> None:
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**held, **fields}))


def change_tensor(folder: Path, name: str, change) -> None:
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = safetensors.numpy.load_file(file)
    tensors[name] = change(tensors[name])
    safetensors.numpy.save_file(tensors, file)


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(exported, tmp_path, value):
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensor(exported, name, lambda tensor: np.where(np.arange(tensor.size).reshape(tensor.shape) == 5, value, 1)
                  .astype(np.float32))  # fmt: skip
    said = convert("hf", exported, tmp_path / "run").complaint
    assert said.startswith(f"tensor {name} holds NaN or infinite values. ")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_that_would_overflow_its_dtype_is_refused(tmp_path):
    params = decoder_params()
    params["final_norm"] = params["final_norm"] + 1e5
    hf.export_backbone(CONFIG, params, tmp_path / "model")
    assert convert("hf", tmp_path / "model", tmp_path / "run").returncode == 0
    said = convert("orbax", tmp_path / "run", tmp_path / "half", "--dtype=float16").complaint
    assert said == "tensor model.norm.weight would hold NaN or infinite values. Take another step of the run, or a " \
                   "wider --dtype."  # fmt: skip
    assert not (tmp_path / "half").exists()
    assert convert("orbax", tmp_path / "run", tmp_path / "half", "--dtype=bfloat16").returncode == 0


def test_a_config_that_fits_the_shapes_but_not_the_model_fails_the_comparison(exported, tmp_path, monkeypatch):
    """The certificate's last line of defence: the same tensors, other mathematics."""
    from ivr_jax.checkpoints import parity

    theirs = parity.transformers_logits

    def other(config, folder, tokens, update):
        return theirs(config, folder, tokens, update) + 0.5

    monkeypatch.setattr(parity, "transformers_logits", other)
    said = convert("hf", exported, tmp_path / "run").complaint
    assert "the logits of" in said and "differ from transformers' by 0.5" in said
    assert not (tmp_path / "run").exists()


def test_files_of_several_dtypes_become_one(exported, tmp_path):
    """Norms are often kept in float32 beside bfloat16 matrices."""
    change_tensor(exported, "model.norm.weight", lambda tensor: tensor.astype(jnp.bfloat16))
    change_tensor(exported, "lm_head.weight", lambda tensor: tensor.astype(np.float16))
    done = convert("hf", exported, tmp_path / "run")
    assert "float32 master parameters from bfloat16 and float16 and float32 files: each value exactly" in done.stdout
    assert "bit-equal    36 of 36" in done.stdout
    narrow = convert("hf", exported, tmp_path / "narrow", "--param_dtype=bfloat16")
    assert "each value rounded from the file's, which cannot be undone" in narrow.stdout


# -- config files -----------------------------------------------------------------------------------------------------

WRONG_FIELDS = [
    {"hidden_size": "8"}, {"hidden_size": 8.0}, {"hidden_size": True}, {"hidden_size": -8}, {"hidden_size": 10**30},
    {"num_hidden_layers": 10**9}, {"rms_norm_eps": "1e-6"}, {"rms_norm_eps": "small"}, {"rms_norm_eps": [1]},
    {"rms_norm_eps": float("nan")}, {"rope_theta": "1e6"}, {"rope_theta": 10**400}, {"rope_theta": float("inf")},
    {"rope_parameters": "default"}, {"rope_scaling": "linear"}, {"rope_scaling": {"type": "linear", "factor": "2"}},
    {"rope_scaling": {"type": "yarn", "factor": 2.0}}, {"rope_scaling": {"type": "dynamic", "factor": float("nan")}},
    {"tie_word_embeddings": "false"}, {"model_type": None}, {"model_type": 3}, {"head_dim": None}, {"vocab_size": {}},
]  # fmt: skip


@pytest.mark.parametrize("fields", WRONG_FIELDS, ids=str)
def test_a_config_json_with_wrong_values_names_the_field(exported, tmp_path, fields):
    change_config(exported, **fields)
    name = next(iter(fields))
    said = convert("hf", exported, tmp_path / "run").complaint
    assert ("rope_scaling" if name == "rope_parameters" and name not in said else name) in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "fields",
    [
        {"ch_mult": 2}, {"ch_mult": "12"}, {"ch_mult": [1, "2"]}, {"ch_mult": []}, {"ch_mult": [1] * 99},
        {"attn_resolutions": 4}, {"double_z": "no"}, {"dropout": "0"}, {"num_res_blocks": 10**9}, {"resolution": None},
        {"ch": "4"}, {"norm_groups": 3}, {"beta": "x"}, {"n_embed": 12},
    ],
    ids=str,
)  # fmt: skip
def test_an_image_tokenizers_config_with_wrong_values_names_the_field(tmp_path, fields):
    folder = images_folder(tmp_path / "hf")
    held = yaml.safe_load((folder / "config.yaml").read_text())
    for name, value in fields.items():
        (held["ddconfig"] if name in held["ddconfig"] else held)[name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(held))
    said = convert("hf", folder, tmp_path / "run").complaint
    assert next(iter(fields)) in said or "quantize.embedding.weight" in said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'"text"', b"[" * 100_000, b'{"a": NaN'], ids=lambda x: str(x[:9])
)
@pytest.mark.parametrize("file", ["config.json", INDEX, "header"])
def test_files_that_are_no_json_are_named(exported, tmp_path, file, content):
    if file == "header":
        file = sorted(exported.glob("*.safetensors"))[0].name
        content = len(content).to_bytes(8, "little") + content
    (exported / file).write_bytes(content)
    assert file in convert("hf", exported, tmp_path / "run").complaint
    assert not (tmp_path / "run").exists()


def test_an_image_tokenizer_may_have_a_model_type_of_its_own(tmp_path):
    folder = images_folder(tmp_path / "hf")
    fields = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").unlink()
    flat = {**fields.pop("ddconfig"), **fields, "model_type": "Emu3VisionVQ", "architectures": ["Emu3VisionVQModel"]}
    (folder / "config.json").write_text(json.dumps(flat))
    done = convert("hf", folder, tmp_path / "run")
    assert done.returncode == 0 and ": image_tokenizer," in done.stdout


# -- folders ----------------------------------------------------------------------------------------------------------


def test_shards_may_be_links_as_the_hubs_cache_has_them(exported, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, shard in enumerate(sorted(exported.glob("*.safetensors"))):
        shard.rename(blobs / str(number))
        shard.symlink_to(blobs / str(number))
    assert "bit-equal    36 of 36" in convert("hf", exported, tmp_path / "run").stdout
    (blobs / "1").unlink()
    assert "model-00002-of" in convert("hf", exported, tmp_path / "again").complaint


def test_what_is_converted_is_not_replaced_by_what_becomes_of_it(exported, tmp_path):
    before = sorted(path.name for path in exported.iterdir())
    for target in (exported, tmp_path, tmp_path / "other" / ".." / "model"):
        said = convert("hf", exported, target, "--overwrite").complaint
        assert "holds what is to be converted, and would be replaced" in said
    assert sorted(path.name for path in exported.iterdir()) == before
    assert convert("hf", exported, exported / "inside").returncode == 0


@pytest.mark.parametrize("target", ["/proc/run", "/dev/null/run", "/dev/null"])
def test_a_place_that_cannot_be_written(exported, target):
    assert convert("hf", exported, Path(target)).complaint


def test_a_failed_conversion_removes_the_folders_it_made_above(exported, tmp_path):
    change_tensor(exported, "model.norm.weight", lambda tensor: tensor * np.nan)
    assert convert("hf", exported, tmp_path / "a" / "b" / "run").complaint
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(exported, tmp_path, form):
    """A limit on the size of files is what a full disk looks like to the program: writes fail half-way."""
    source = exported
    if form == "orbax":
        assert convert("hf", exported, tmp_path / "run").returncode == 0
        source = tmp_path / "run"
    before = sorted(path.name for path in tmp_path.iterdir())
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
        done = convert(form, source, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in done.complaint and "File too large" in done.complaint
    assert sorted(path.name for path in tmp_path.iterdir()) == before


WRONG_META = [{}, {"kind": "backbone"}, {"kind": "backbone", "model": [1]},
              {"kind": "backbone", "model": {"layers": 2}}, {"kind": "poem", "model": {}}]  # fmt: skip


@pytest.mark.parametrize("meta", WRONG_META, ids=str)
def test_a_checkpoint_that_does_not_say_what_it_is(exported, tmp_path, meta):
    assert convert("hf", exported, tmp_path / "run").returncode == 0
    (file,) = (path for path in (tmp_path / "run").rglob("meta/*") if "kind" in path.read_text())
    file.write_text(json.dumps(meta))
    assert "checkpoint" in convert("orbax", tmp_path / "run", tmp_path / "new").complaint
    file.write_text("{")
    assert "damaged" in convert("orbax", tmp_path / "run", tmp_path / "new").complaint
    assert not (tmp_path / "new").exists()


def test_a_bar_shows_bytes_and_layers(exported, tmp_path):
    shown = convert("hf", exported, tmp_path / "run").stderr
    size = 4 * sum(int(np.prod(slot.shape)) for slot in hf.backbone_slots(CONFIG).values())
    assert "convert" in shown and "verify" in shown and "compare logits" in shown and "layer" in shown
    assert f"/{size / 1000:.2f}k" in shown
