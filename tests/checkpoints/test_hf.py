"""Checkpoints in and out: round trips, what bad ones say, and that nothing half-written stays."""

from __future__ import annotations

import json

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import yaml
from checkpoints_fixture import CONFIG, IMAGES, assert_trees_equal, decoder_params, export_decoder, random_tree

from ivr_jax.checkpoints import hf, safetensors_io
from ivr_jax.checkpoints.safetensors_io import INDEX, PlannedTensor, write_file
from ivr_jax.errors import UserError
from ivr_jax.models import image_tokenizer


@pytest.fixture
def params():
    return decoder_params()


@pytest.fixture
def exported(tmp_path, params):
    return export_decoder(tmp_path / "model", params)


def test_backbone_round_trip_through_shards(exported, params):
    files = sorted(exported.glob("model-*.safetensors"))
    assert len(files) > 3 and (exported / INDEX).exists()
    config, back = hf.import_backbone(exported, vocab_multiple=8)
    assert config == CONFIG
    assert_trees_equal(back, params)


def test_exports_hold_no_padding_and_are_read_by_the_reference_reader(exported, params):
    weight_map = json.loads((exported / INDEX).read_text())["weight_map"]
    with safetensors.safe_open(exported / weight_map["lm_head.weight"], "numpy") as reader:
        np.testing.assert_array_equal(reader.get_tensor("lm_head.weight"), params["lm_head"].T[:21])
        assert reader.metadata() == {"format": "pt"}
    name = "model.layers.2.mlp.down_proj.weight"
    with safetensors.safe_open(exported / weight_map[name], "numpy") as reader:
        np.testing.assert_array_equal(reader.get_tensor(name), params["layers"]["mlp"]["down"][2].T)


@pytest.mark.parametrize(("model_type", "architecture"), [("qwen3", "Qwen3ForCausalLM"), ("Emu3", "Emu3ForCausalLM")])
def test_config_json_says_what_was_asked(tmp_path, params, model_type, architecture):
    hf.export_backbone(CONFIG, params, tmp_path / "out", model_type=model_type)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["model_type"], fields["architectures"]) == (model_type, [architecture])
    assert fields["vocab_size"] == 21 and (tmp_path / "out" / "model.safetensors").exists()


def test_bfloat16_round_trip_is_bit_equal(tmp_path, params):
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    hf.export_backbone(CONFIG, narrow, tmp_path / "out", dtype="bfloat16")
    _, wide = hf.import_backbone(tmp_path / "out", vocab_multiple=8)
    assert wide["embed"].dtype == jnp.float32
    assert_trees_equal(jax.tree.map(lambda a: a.astype(jnp.bfloat16), wide), narrow)
    hf.export_backbone(CONFIG, wide, tmp_path / "again", dtype="bfloat16")
    first, second = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("out", "again"))
    assert first == second


def test_any_part_of_an_array_can_be_read_alone(exported, params, monkeypatch):
    monkeypatch.setattr(safetensors_io, "PART_BYTES", 64)  # many runs of rows
    _, tree = hf.open_backbone(exported, vocab_multiple=8)
    part = (slice(1, 3), slice(2, 7), slice(5, None))
    np.testing.assert_array_equal(tree["layers"]["mlp"]["up"][part], params["layers"]["mlp"]["up"][part])
    for name, part in (("embed", (slice(19, 24), slice(1, 3))), ("lm_head", (slice(0, 5), slice(18, 23)))):
        np.testing.assert_array_equal(tree[name][part], params[name][part])  # across the end of the vocabulary
    np.testing.assert_array_equal(tree["embed"][22:24], 0)


SHARDED_IMPORT = """
import json, sys
import jax, numpy as np
from ivr_jax import sharding
from ivr_jax.checkpoints import hf, safetensors_io
from ivr_jax.models import backbone
largest, read = [0], safetensors_io.StoredTensor.read
def counted(tensor, index=()):
    part = read(tensor, index)
    largest[0] = max(largest[0], part.size)
    return part
safetensors_io.StoredTensor.read = counted
mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
config, params = hf.import_backbone(sys.argv[1], mesh=mesh, vocab_multiple=8)
_, lazy = hf.open_backbone(sys.argv[1], vocab_multiple=8)
most = largest[0]
equal = jax.tree.map(lambda a, b: bool((np.asarray(a) == b[()]).all()), params, lazy)
up = params["layers"]["mlp"]["up"]
print(json.dumps({"equal": all(jax.tree.leaves(equal)), "up": list(up.sharding.spec), "largest": most,
                  "shard": up.addressable_shards[0].data.shape}))
"""


def test_import_onto_a_mesh_reads_each_device_its_part(exported):
    (line,) = commands.on_devices(8, SHARDED_IMPORT, exported)
    found = json.loads(line)
    assert found["equal"] and found["up"] == [None, "fsdp", "tensor"] and found["shard"] == [3, 2, 6]
    assert found["largest"] <= 24 * 4  # a part of one tensor: 24 rows of the embedding, or 6 × 2 of a layer's matrix


def rewrite(folder, change):
    """Applies `change` to the tensors of the shard that holds the first layer's q_proj; returns that file."""
    name = "model.layers.0.self_attn.q_proj.weight"
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = safetensors.numpy.load_file(file)
    change(tensors, name)
    safetensors.numpy.save_file(tensors, file)
    return file


def test_missing_shard(exported):
    gone = sorted(exported.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=gone.name):
        hf.import_backbone(exported)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_shard(exported, keep):
    file = sorted(exported.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=file.name):
        hf.import_backbone(exported)


def test_a_file_that_lacks_its_last_byte_is_named(exported):
    file = sorted(exported.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=file.name):
        hf.import_backbone(exported)


def test_wrong_shape_names_tensor_and_file(exported):
    file = rewrite(exported, lambda tensors, name: tensors.update({name: np.zeros((3, 3), np.float32)}))
    with pytest.raises(UserError, match=rf"q_proj.*{file.name}.*\[3, 3\].*\[16, 8\]"):
        hf.import_backbone(exported)


def test_absent_and_unexpected_tensors(exported):
    file = rewrite(exported, lambda tensors, name: tensors.pop(name))
    with pytest.raises(UserError, match=f"layers.0.self_attn.q_proj.weight.*{file.name}"):
        hf.import_backbone(exported)
    rewrite_index = json.loads((exported / INDEX).read_text())
    del rewrite_index["weight_map"]["model.layers.0.self_attn.q_proj.weight"]
    (exported / INDEX).write_text(json.dumps(rewrite_index))
    with pytest.raises(UserError, match="model.layers.0.self_attn.q_proj.weight"):
        hf.import_backbone(exported)


def test_tensor_beyond_the_config(exported):
    fields = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 2}))
    with pytest.raises(UserError, match="model.layers.2.*10"):
        hf.import_backbone(exported)


def test_tensor_that_the_index_does_not_know(exported):
    rewrite(exported, lambda tensors, name: tensors.update(extra=np.zeros(1, np.float32)))
    with pytest.raises(UserError, match="extra"):
        hf.import_backbone(exported)


def test_integer_tensor(exported):
    rewrite(exported, lambda tensors, name: tensors.update({name: np.zeros((16, 8), np.int32)}))
    with pytest.raises(UserError, match="I32"):
        hf.import_backbone(exported)


def test_index_must_not_point_elsewhere(exported):
    (exported / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "../../secret.safetensors"}}))
    with pytest.raises(UserError, match="index.json"):
        hf.import_backbone(exported)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "gpt2"}'])
def test_unusable_config_json(exported, content):
    (exported / "config.json").write_text(content)
    with pytest.raises(UserError):
        hf.import_backbone(exported)


def test_a_key_twice_in_config_json_is_an_error(exported):
    text = (exported / "config.json").read_text().rstrip().removesuffix("}")
    (exported / "config.json").write_text(text + ', "rope_theta": 7.0}')
    with pytest.raises(UserError) as raised:
        hf.import_backbone(exported)
    assert "rope_theta" in raised.value.what


def test_folder_without_checkpoint(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        hf.import_backbone(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    with pytest.raises(UserError, match="0"):
        hf.import_backbone(tmp_path)


def test_failed_export_leaves_nothing_and_keeps_what_was_there(tmp_path, params):
    hf.export_backbone(CONFIG, params, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="out"):
        hf.export_backbone(CONFIG, params, tmp_path / "out")
    broken = {**params, "final_norm": np.zeros(3, np.float32)}
    for target in ("out", "new"):
        with pytest.raises(ValueError, match="model.norm.weight"):
            hf.export_backbone(CONFIG, broken, tmp_path / target, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    hf.export_backbone(CONFIG, {**params, "embed": 2 * params["embed"]}, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        hf.export_backbone(CONFIG, params, tmp_path / "file")


def test_writer_refuses_what_was_not_planned(tmp_path):
    planned = PlannedTensor("a", np.dtype(np.float32), (2,), lambda start, stop: np.zeros(2, np.float64))
    with pytest.raises(ValueError, match="a: .*float64"):
        write_file(tmp_path / "x.safetensors", [planned])


def test_image_tokenizer_round_trip(tmp_path):
    params = random_tree(image_tokenizer.param_shapes(IMAGES))
    hf.export_image_tokenizer(IMAGES, params, tmp_path / "out")
    config, back = hf.import_image_tokenizer(tmp_path / "out")
    assert config == IMAGES
    assert_trees_equal(back, params)
    names = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert names["decoder.up.1.upsample.conv.weight"].shape == (8, 8, 3, 3)
    assert names["encoder.down.1.block.0.nin_shortcut.weight"].shape == (8, 4, 1, 1)


def test_image_tokenizer_from_config_json_and_a_training_checkpoint(tmp_path):
    params = random_tree(image_tokenizer.param_shapes(IMAGES))
    hf.export_image_tokenizer(IMAGES, params, tmp_path / "out")
    (tmp_path / "out" / "config.yaml").rename(tmp_path / "old.yaml")
    (tmp_path / "out" / "config.json").write_text(json.dumps(yaml.safe_load((tmp_path / "old.yaml").read_text())))
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    tensors["loss.discriminator.weight"] = np.zeros(1, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "out" / "model.safetensors")
    assert_trees_equal(hf.import_image_tokenizer(tmp_path / "out")[1], params)


def test_model_ckpt_is_read_without_running_code(tmp_path):
    torch = pytest.importorskip("torch", reason="pickled checkpoints need PyTorch, a test extra")
    params = random_tree(image_tokenizer.param_shapes(IMAGES))
    hf.export_image_tokenizer(IMAGES, params, tmp_path / "out")
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "model.safetensors").unlink()
    state = {name: torch.tensor(tensor) for name, tensor in stored.items()}
    pickled = tmp_path / "out" / "model.ckpt"
    torch.save({"state_dict": state, "epoch": 3}, pickled)
    assert_trees_equal(hf.import_image_tokenizer(tmp_path / "out")[1], params)

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))

    torch.save({"state_dict": {**state, "x": Bomb()}}, pickled)
    with pytest.raises(UserError, match="model.ckpt"):
        hf.import_image_tokenizer(tmp_path / "out")
    assert not (tmp_path / "boom").exists()
    torch.save({**state, "x": Bomb()}, pickled, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="model.ckpt"):
        hf.import_image_tokenizer(tmp_path / "out")
    assert not (tmp_path / "boom").exists()
    pickled.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="model.ckpt"):
        hf.import_image_tokenizer(tmp_path / "out")


def test_a_key_twice_in_config_yaml_is_an_error(tmp_path):
    (tmp_path / "config.yaml").write_text("n_embed: 8\nddconfig: {ch: 4, ch: 8}\n")
    with pytest.raises(UserError) as raised:
        hf.read_mapping(tmp_path, ("config.yaml",))
    assert "'ch'" in raised.value.what
    (tmp_path / "config.yaml").write_text("n_embed: 8\nddconfig: {ch: 4}\n")
    assert hf.read_mapping(tmp_path, ("config.yaml",)) == {"n_embed": 8, "ddconfig": {"ch": 4}}
