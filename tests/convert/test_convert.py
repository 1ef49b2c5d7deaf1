"""Converting there and back: what comes out is bit-equal, what is said of it is true, and what fails leaves nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml
from checkpoints_fixture import CONFIG, IMAGES, assert_trees_equal, decoder_params, export_decoder, random_tree

from ivr_jax.checkpoints import hf, lazy, parity, safetensors_io, store, streaming
from ivr_jax.convert import __main__ as convert
from ivr_jax.errors import UserError
from ivr_jax.models import backbone, image_tokenizer, lora

UNPADDED = dataclasses.replace(CONFIG, vocab_multiple=1)


@pytest.fixture
def params():
    return decoder_params()


@pytest.fixture
def exported(tmp_path, params):
    return export_decoder(tmp_path / "model", params)


def convert_command(*words) -> None:
    argv = convert.with_named_paths(["convert", *map(str, words)])
    convert.main(convert.cli.parse(argv, config=False, workdir=False, add_flags=convert.add_flags))


def save_run(workdir, state, meta) -> None:
    """A checkpoint as training saves it."""
    checkpointer = store.Checkpointer(workdir)
    checkpointer.save(3, jax.tree.map(jnp.asarray, state), {"position": 1}, meta)
    checkpointer.wait()
    checkpointer.close()


def contents(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_convert_there_and_back(exported, tmp_path, params, capsys):
    (exported / "tokenizer.json").write_text("a b c")
    (exported / "notes.bin").write_bytes(b"weights of something else")
    fields = json.loads((exported / "config.json").read_text())
    fields |= {"model_type": "Emu3", "eos_token_id": 7, "attention_dropout": 0.1, "auto_map": {"AutoModel": "x.Y"}}
    (exported / "config.json").write_text(json.dumps(fields))
    convert_command("--from=hf", exported, "--to=orbax", tmp_path / "run")
    said = capsys.readouterr().out
    assert "36 of 36" in said and "float32 in the files and here" in said and "tokenizer.json" in said
    assert "generating and training need --text_tokenizer=FOLDER and --image_tokenizer=FOLDER" in said
    read, meta = store.read_params(tmp_path / "run", "backbone", backbone.param_shapes(UNPADDED))
    assert meta["model"] == dataclasses.asdict(UNPADDED)
    np.testing.assert_array_equal(read["lm_head"], params["lm_head"][:, :21])
    np.testing.assert_array_equal(read["layers"]["mlp"]["up"], params["layers"]["mlp"]["up"])

    convert_command("--from=orbax", tmp_path / "run", "--to=hf", tmp_path / "back")
    assert "36 of 36" in capsys.readouterr().out
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: back[key] for key in fields} == fields
    assert sorted(contents(tmp_path / "back")) == ["config.json", "model.safetensors", "tokenizer.json"]
    first = {name: tensor.read() for name, tensor in hf.open_weights(exported).items()}
    second = {name: tensor.read() for name, tensor in hf.open_weights(tmp_path / "back").items()}
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)

    convert_command("--from=orbax", tmp_path / "run", "--to=hf", tmp_path / "stock", "--model_type=qwen3")
    plain = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert plain["model_type"] == "qwen3" and "auto_map" not in plain


def test_an_emu_tokenizer_beside_the_weights_is_recorded_and_follows_training(exported, tmp_path, params, capsys):
    for name in ("emu3.tiktoken", "emu3_vision_tokens.txt"):
        (exported / name).write_text(name)
    convert_command("--from=hf", exported, "--to=orbax", tmp_path / "run")
    assert "need --image_tokenizer=FOLDER" in capsys.readouterr().out
    meta = store.read_meta(tmp_path / "run")
    assert meta["text_tokenizer"] == str(tmp_path / "run" / "tokenizer")
    trained = {"kind": "backbone", "model": dataclasses.asdict(CONFIG), "text_tokenizer": meta["text_tokenizer"]}
    save_run(tmp_path / "trained", {"params": params}, trained)
    convert_command("--from=orbax", tmp_path / "trained", "--to=hf", tmp_path / "hf")
    assert (tmp_path / "hf" / "emu3.tiktoken").read_text() == "emu3.tiktoken"


def test_an_import_keeps_the_dtype_of_its_files_and_computes_in_it(tmp_path, params, capsys):
    hf.export_backbone(CONFIG, params, tmp_path / "hf", dtype="bfloat16")
    convert_command("--from=hf", tmp_path / "hf", "--to=orbax", tmp_path / "run")
    assert "bfloat16 in the files and here" in capsys.readouterr().out
    model = convert.read_orbax(tmp_path / "run")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}
    assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "bfloat16")
    assert convert.read_hf(tmp_path / "hf", "float32").config.dtype == "float32"
    hf.export_backbone(CONFIG, params, tmp_path / "wide", dtype="float32")
    assert convert.read_hf(tmp_path / "wide").config.param_dtype == "float32"


def test_bfloat16_files_make_float32_masters_and_come_back_bit_equal(tmp_path, params, capsys):
    hf.export_backbone(CONFIG, params, tmp_path / "hf", dtype="bfloat16")
    convert_command("--from=hf", tmp_path / "hf", "--to=orbax", tmp_path / "run", "--param_dtype=float32")
    assert "float32 master parameters from bfloat16 files: each value exactly the file's" in capsys.readouterr().out
    convert_command("--from=orbax", tmp_path / "run", "--to=hf", tmp_path / "back", "--dtype=bfloat16")
    assert "bfloat16 files of float32 parameters: each value rounded from the parameter's" in capsys.readouterr().out
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("hf", "back"))
    assert first == second


def test_narrowing_on_import_is_said(exported, tmp_path, capsys):
    convert_command("--from=hf", exported, "--to=orbax", tmp_path / "run", "--param_dtype=bfloat16")
    said = capsys.readouterr().out
    assert "bfloat16 parameters from float32 files: each value rounded from the file's, which cannot be undone" in said
    assert "bit-equal    0 of 36" in said


def test_export_of_a_training_checkpoint_leaves_out_the_optimiser(tmp_path, params):
    meta = {"kind": "backbone", "model": dataclasses.asdict(CONFIG), "text_tokenizer": "micro", "vocabulary": "abc"}
    state = {"params": params, "optimizer": {"mu": jax.tree.map(np.zeros_like, params)}, "step": np.int32(3)}
    save_run(tmp_path / "run", state, meta)
    convert_command("--from=orbax", tmp_path / "run", "--to=hf", tmp_path / "hf")
    config, back = hf.import_backbone(tmp_path / "hf", vocab_multiple=8)
    assert config == CONFIG and set(hf.open_weights(tmp_path / "hf")) == set(hf.backbone_slots(CONFIG))
    assert_trees_equal(back, params)
    assert convert.read_hf(tmp_path / "hf", "float32").extra["vocabulary"] == "abc"


def test_export_of_an_adapted_checkpoint_merges_the_adapters(tmp_path, params):
    options = lora.LoraOptions(rank=2, alpha=3.0, targets=("q", "down"))
    adapted = lora.add(params, options, jax.random.key(0))
    for group in adapted["lora"].values():
        for pair in group.values():
            pair["b"] = jax.random.normal(jax.random.key(1), pair["b"].shape)
    meta = {"kind": "backbone", "model": dataclasses.asdict(CONFIG), "lora": dataclasses.asdict(options)}
    save_run(tmp_path / "run", {"params": adapted}, meta)
    convert_command("--from=orbax", tmp_path / "run", "--to=hf", tmp_path / "hf")
    _, found = hf.import_backbone(tmp_path / "hf", vocab_multiple=8)
    expected = lora.merge(jax.tree.map(jnp.asarray, adapted))
    assert np.abs(np.asarray(expected["layers"]["mlp"]["down"]) - params["layers"]["mlp"]["down"]).max() > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_large_chunks_are_read_once_and_parts_of_arrays_otherwise(tmp_path, params, monkeypatch):
    """A store made by training may hold an array as one chunk; one made by converting never does."""
    save_run(tmp_path / "trained", {"params": params}, {"kind": "backbone"})
    monkeypatch.setattr(streaming, "PART_BYTES", 200)
    monkeypatch.setattr(lazy, "PART_BYTES", 200)
    shapes = backbone.param_shapes(CONFIG)
    streaming.write(tmp_path / "written", streaming.open_params(tmp_path / "trained", shapes), {"kind": "backbone"})
    assert len(list((tmp_path / "written" / "checkpoints" / "0" / "state" / "params.embed").iterdir())) > 4
    for run in ("trained", "written"):
        found = streaming.open_params(tmp_path / run, shapes)
        assert_trees_equal(jax.tree.map(lambda leaf: leaf[()], found), params)
        assert_trees_equal(store.read_params(tmp_path / run, "backbone", shapes)[0], params)


@pytest.mark.parametrize("damage", ["missing chunk", "truncated chunk", "missing array", "other shape"])
def test_damaged_store(exported, tmp_path, damage):
    convert_command("--from=hf", exported, "--to=orbax", tmp_path / "run")
    array = tmp_path / "run" / "checkpoints" / "0" / "state" / "params.layers.mlp.up"
    if damage == "missing array":
        shutil.rmtree(array)
    elif damage == "other shape":
        shutil.rmtree(array)
        shutil.copytree(array.with_name("params.layers.mlp.down"), array)
    else:
        (chunk,) = (file for file in array.iterdir() if file.name != ".zarray")
        chunk.unlink() if damage == "missing chunk" else chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(UserError, match="params.layers.mlp.up"):
        convert_command("--from=orbax", tmp_path / "run", "--to=hf", tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def test_zeros_are_stored_and_not_taken_for_missing(tmp_path, params):
    zeros = jax.tree.map(np.zeros_like, params)
    hf.export_backbone(CONFIG, zeros, tmp_path / "hf")
    streaming.write(tmp_path / "run", hf.open_backbone(tmp_path / "hf", vocab_multiple=8)[1], {"kind": "backbone"})
    assert_trees_equal(store.read_params(tmp_path / "run", "backbone", backbone.param_shapes(CONFIG))[0], zeros)


def spoil(folder, fault):
    """Spoils a checkpoint of several shards in one way; returns words that the error must have."""
    shards = sorted(folder.glob("model-*.safetensors"))
    name = "model.layers.0.self_attn.q_proj.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][name]
    tensors = safetensors.numpy.load_file(file)
    if fault == "missing shard":
        shards[1].unlink()
        return shards[1].name
    if fault == "truncated":
        shards[-1].write_bytes(shards[-1].read_bytes()[:-4])
        return f"{shards[-1].name} is truncated"
    if fault == "model type":
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**fields, "model_type": "gemma"}))
        return "'gemma'"
    if fault == "wrong shape":
        tensors[name] = tensors[name][:-1]
    elif fault == "absent":
        del tensors[name], index["weight_map"][name]
    elif fault == "unexpected":
        tensors["model.extra"] = np.zeros(2, np.float32)
        index["weight_map"]["model.extra"] = file.name
    safetensors.numpy.save_file(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {"wrong shape": r"has shape \[15, 8\]", "absent": f"lacks tensor {name}", "unexpected": "model.extra"}[fault]


FAULTS = ["missing shard", "truncated", "wrong shape", "absent", "unexpected", "model type"]


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_weights_are_one_clear_error_and_leave_nothing(exported, tmp_path, fault):
    words = spoil(exported, fault)
    with pytest.raises(UserError, match=words):
        convert_command("--from=hf", exported, "--to=orbax", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"])
def test_stopped_half_way_leaves_nothing_and_keeps_what_was_there(exported, tmp_path, monkeypatch, error):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("old")
    reads = []
    read = safetensors_io.StoredTensor.read

    def fails(tensor, index=()):
        reads.append(tensor.name)
        if len(reads) > 20:
            raise error
        return read(tensor, index)

    monkeypatch.setattr(safetensors_io.StoredTensor, "read", fails)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        convert_command("--from=hf", exported, "--to=orbax", tmp_path / "run", "--overwrite")
    assert len(reads) > 20 and sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]
    assert contents(tmp_path / "run") == {"precious": b"old"}


def test_a_certificate_that_does_not_hold_leaves_nothing(exported, tmp_path, monkeypatch):
    write = streaming.write

    def other(workdir, params, meta):
        write(workdir, {**params, "final_norm": params["embed"]}, meta)

    monkeypatch.setattr(streaming, "write", other)
    with pytest.raises(UserError, match="params.final_norm"):
        convert_command("--from=hf", exported, "--to=orbax", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_certificate_finds_a_changed_tensor(exported, tmp_path, params):
    params["layers"]["mlp"]["up"] = params["layers"]["mlp"]["up"] + 1
    model = convert.Model(convert.BACKBONE, CONFIG, params, {})
    found = convert.certificate(model, exported)
    assert found["equal"] == found["tensors"] - 3 and found["logits"] > 1e-3
    with pytest.raises(UserError, match="3"):
        convert.report(found, model, tmp_path / "hf", exported=True)


def test_certificate_compares_logits_with_transformers(exported, params):
    found = convert.certificate(convert.Model(convert.BACKBONE, CONFIG, params, {}), exported)
    assert found["tensors"] == found["equal"] == 3 * 11 + 3 and found["dtypes"] == ["float32"]
    assert found["bytes"] == 4 * sum(int(np.prod(slot.shape)) for slot in hf.backbone_slots(CONFIG).values())
    assert found["logits"] < 1e-4 < found["scale"]


@pytest.mark.parametrize("tied", [False, True])
def test_logits_layer_by_layer_are_those_of_the_whole_model(tied, tmp_path):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied, rope_scaling=("linear", 2.0))
    params = random_tree(backbone.param_shapes(config))
    tokens = parity.prompt(config)
    hidden, _ = backbone.apply(config, params, tokens[None], np.arange(len(tokens), dtype=np.int32)[None])
    whole = np.asarray(backbone.logits(config, params, hidden))[0]
    np.testing.assert_allclose(parity.logits(config, params, tokens), whole, atol=1e-5)
    hf.export_backbone(config, params, tmp_path / "hf")
    np.testing.assert_allclose(parity.transformers_logits(config, tmp_path / "hf", tokens), whole, atol=1e-4)


def image_tokenizer_folder(folder):
    hf.export_image_tokenizer(IMAGES, random_tree(image_tokenizer.param_shapes(IMAGES)), folder)
    return folder


def test_image_tokenizer_there_and_back(tmp_path, capsys):
    folder = image_tokenizer_folder(tmp_path / "hf")
    convert_command("--from=hf", folder, "--to=orbax", tmp_path / "run")
    convert_command("--from=orbax", tmp_path / "run", "--to=hf", tmp_path / "again")
    assert "image_tokenizer" in capsys.readouterr().out
    assert contents(folder) == contents(tmp_path / "again")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match=str(tmp_path / "run")):
        convert_command("--from=orbax", tmp_path / "run", "--to=hf", tmp_path / "third")
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("config", ["config.yaml", "config.json"])
def test_image_tokenizer_as_a_bfloat16_pickle(tmp_path, config, capsys):
    torch = pytest.importorskip("torch", reason="pickled checkpoints need PyTorch, a test extra")
    folder = image_tokenizer_folder(tmp_path / "hf")
    state = safetensors.numpy.load_file(folder / "model.safetensors")
    narrow = {name: torch.tensor(tensor).to(torch.bfloat16) for name, tensor in state.items()}
    torch.save(narrow, folder / "model.ckpt")
    (folder / "model.safetensors").unlink()
    if config == "config.json":
        (folder / config).write_text(json.dumps(yaml.safe_load((folder / "config.yaml").read_text())))
        (folder / "config.yaml").unlink()
    convert_command("--from=hf", folder, "--to=orbax", tmp_path / "run", "--param_dtype=float32")
    said = capsys.readouterr().out
    assert f"{len(state)} of {len(state)}" in said and "float32 master parameters from bfloat16 files" in said
    params, _ = store.read_params(tmp_path / "run", "image_tokenizer", image_tokenizer.param_shapes(IMAGES))
    expected = narrow["encoder.conv_in.weight"].float().numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["encoder"]["conv_in"]["kernel"], expected)


def test_which_way_to_convert_must_be_said():
    for words in (["--from=hf", "a"], ["--from=hf", "a", "--to=hf", "b"], ["--from=orbax", "--to=hf", "b"]):
        with pytest.raises(UserError, match="--to=hf DIR"):
            convert_command(*words)
