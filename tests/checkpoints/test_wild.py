"""Checkpoints as they are found: copies of tied matrices, tables that are computed, two rope settings, odd JSON."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from checkpoints_fixture import CONFIG, assert_trees_equal, decoder_params

from ivr_jax import files
from ivr_jax.checkpoints import hf
from ivr_jax.convert import __main__ as convert
from ivr_jax.errors import UserError
from ivr_jax.sampling.requests import read_requests


@pytest.fixture
def exported(tmp_path):
    """One file of weights, its tensors and its config, to be changed."""
    hf.export_backbone(CONFIG, decoder_params(), tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, tensors=(), config=(), without=()) -> None:
    file = folder / "model.safetensors"
    stored = {**safetensors.numpy.load_file(file), **dict(tensors)}
    safetensors.numpy.save_file({name: value for name, value in stored.items() if name not in without}, file)
    fields = {**json.loads((folder / "config.json").read_text()), **dict(config)}
    (folder / "config.json").write_text(json.dumps(fields))


def test_a_tied_repository_may_store_its_output_matrix_when_it_is_the_embedding(exported):
    embedding = safetensors.numpy.load_file(exported / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(exported, {"lm_head.weight": embedding}, {"tie_word_embeddings": True})
    config, tree = hf.open_backbone(exported)
    assert config.tie_word_embeddings and "lm_head" not in tree
    found = convert.certificate(convert.read_hf(exported, "float32"), exported)
    assert found["copies"] == ["lm_head.weight"] and found["equal"] == found["tensors"]
    other = embedding.copy()
    other[-1, -1] += 1
    rewrite(exported, {"lm_head.weight": other})
    with pytest.raises(UserError) as caught:
        hf.open_backbone(exported)
    assert "lm_head.weight" in caught.value.what and "tie_word_embeddings" in caught.value.what


def test_stored_rotary_tables_are_left_out_when_they_are_what_the_config_gives(exported):
    table = (CONFIG.rope_theta ** (-np.arange(0, CONFIG.head_dim, 2) / CONFIG.head_dim)).astype(np.float32)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    rewrite(exported, {name: table, "model.rotary_emb.inv_freq": table, "model.rotary_emb.original_inv_freq": table})
    assert_trees_equal(hf.import_backbone(exported, vocab_multiple=8)[1], decoder_params())
    rewrite(exported, {name: table**0.5})
    with pytest.raises(UserError) as caught:
        hf.open_backbone(exported)
    assert name in caught.value.what


@pytest.mark.parametrize("fields", [
    {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0},
     "rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 4.0}},
    {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}, "rope_parameters": None},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "rope_parameters": None},
])  # fmt: skip
def test_two_rope_settings_that_differ_are_an_error(exported, fields):
    rewrite(exported, config={"rope_theta": 1e6, **fields})
    with pytest.raises(UserError) as caught:
        hf.open_backbone(exported)
    assert "rope_parameters" in caught.value.what or "rope_scaling" in caught.value.what


@pytest.mark.parametrize("fields", [{"partial_rotary_factor": 0.5},
                                    {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}])
def test_heads_that_are_rotated_in_part_are_an_error(exported, fields):
    rewrite(exported, config=fields)
    with pytest.raises(UserError) as caught:
        hf.open_backbone(exported)
    assert "partial_rotary_factor" in str(caught.value)


def test_of_the_files_beside_weights_a_tokenizer_s_and_licences_travel(exported, tmp_path):
    kept = ["LICENSE", "NOTICE.txt", "merges.txt", "special_tokens_map.json", "tokenizer.json",
            "tokenizer_config.json",
            "vocab.json", "added_tokens.json", "emu3.tiktoken", "emu3_vision_tokens.txt",
            "chat_template.jinja"]  # fmt: skip
    left = ["adapter_config.json", "adapter_model.bin", "trainer_state.json", "training_args.bin", "optimizer.pt",
            "pytorch_model.bin.index.json", "model.safetensors.index.fp32.json", "all_results.json", "README.md",
            "events.out.tfevents.1", "rng_state.pth", "eval_results.json", "modeling_emu3.py"]  # fmt: skip
    for name in (*kept, *left):
        (exported / name).write_text("{}")
    assert sorted(file.name for file in convert.read_hf(exported, "float32").companions) == sorted(kept)
    rewrite(exported, config={"auto_map": {"AutoModelForCausalLM": "modeling_emu3.Emu3ForCausalLM"}})
    assert "modeling_emu3.py" in [file.name for file in convert.read_hf(exported, "float32").companions]
    shutil.rmtree(exported)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "adapter_config.json", ""])
def test_what_stands_there_instead_of_weights_is_named(tmp_path, name):
    if name:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / name).write_text("{}")
    with pytest.raises(UserError) as caught:
        convert.read_hf(tmp_path / "model")
    assert str(tmp_path / "model") in caught.value.what
    assert name.startswith("adapter") or name in caught.value.what


def test_a_config_of_quantised_weights_is_an_error(exported):
    rewrite(exported, config={"quantization_config": {"bits": 4}})
    with pytest.raises(UserError) as caught:
        hf.open_backbone(exported)
    assert "quantization_config" in caught.value.what


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors", "._model.safetensors"])
def test_weights_are_read_beside_those_of_adapters_and_optimizers(exported, name):
    safetensors.numpy.save_file({"lora_A.weight": np.zeros((2, 2), np.float32)}, exported / name)
    assert_trees_equal(hf.import_backbone(exported, vocab_multiple=8)[1], decoder_params())
    (exported / "model.safetensors").rename(exported / "model-00001-of-00002.safetensors")
    if not name.startswith("."):
        with pytest.raises(UserError) as caught:  # a shard without its index
            hf.open_backbone(exported)
        assert "index" in caught.value.what


def test_a_byte_order_mark_and_windows_line_ends_are_read_over(exported, tmp_path):
    config = exported / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes().replace(b"\n", b"\r\n"))
    assert hf.open_backbone(exported, vocab_multiple=8)[0] == CONFIG
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(b'\xef\xbb\xbf{"prompt": "A red cup."}\r\n{"prompt": "A blue cup.", "seed": 3}\r\n')
    assert [(r.prompt, r.seed) for r in read_requests(str(prompts))] == [("A red cup.", 0), ("A blue cup.", 3)]


ODD = ["", "[", "nul", "{'a': 1}", "[" * 100_000, '{"a":' * 100_000, "1" * 5000, '{"a": 1}{"a": 2}', "\x00", '"\\ud800']


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_odd_json_is_one_line_that_names_the_file(exported, tmp_path, text):
    for name in ("config.json", "model.safetensors.index.json"):
        folder = shutil.copytree(exported, tmp_path / name / "copy")
        (folder / name).write_text(text)
        with pytest.raises(UserError) as caught:
            hf.open_backbone(folder)
        assert str(folder) in caught.value.what and "\n" not in caught.value.what
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(UserError) as caught:
        read_requests(str(tmp_path / "prompts.jsonl"))
    assert "prompts.jsonl" in caught.value.what
    with pytest.raises(UserError) as caught:
        files.read_json(tmp_path / "prompts.jsonl")
    assert "prompts.jsonl" in caught.value.what
