"""A packed model is the model it was made of, and the package's own one answers."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_runs
from checkpoints_fixture import random_tree

from ivr_jax import cli
from ivr_jax.checkpoints import packed, store
from ivr_jax.checkpoints import system as systems
from ivr_jax.convert import __main__ as convert
from ivr_jax.errors import UserError
from ivr_jax.models import backbone
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.protocol.grammar import Grammar, GrammarOptions
from ivr_jax.sampling.rollout import RolloutOptions, roll_out
from ivr_jax.trajectory import Mode, Sample


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A workdir with a backbone of random weights, and the image tokenizer it names."""
    root = tiny_runs.prepare(tmp_path_factory.mktemp("packed"))
    image_codec = systems.load_image_codec(root / "image_tokenizer")
    tokenizer = systems.text_tokenizer(systems.MICRO, image_codec.config.n_embed)
    config = BackboneConfig(vocab_size=tokenizer.vocab.size, max_position_embeddings=128, **tiny_runs.MODEL)
    meta = systems.backbone_meta(
        config, systems.MICRO, tokenizer, root / "image_tokenizer", image_codec,
        {"seed": 7, "data": {"path": "/far/away/d"}},
    )
    checkpointer = store.Checkpointer(root / "model")
    checkpointer.save(12, {"params": random_tree(backbone.param_shapes(config))}, None, meta)
    checkpointer.wait()
    checkpointer.close()
    return root / "model"


def pack(*words: str) -> None:
    convert.main(cli.parse(["convert", *words], config=False, workdir=False, add_flags=convert.add_flags))


@pytest.fixture(scope="module")
def folder(run) -> Path:
    made = run.parent / "small"
    pack(f"--pack={run}", f"--pack_to={made}", "--made_by=make that")
    return made


def test_a_packed_model_is_the_one_it_was_made_of(run, folder):
    before, after = systems.load(run), systems.load(folder)
    assert after.config == before.config and after.image_codec.config == before.image_codec.config
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
    for pair in ((before.params, after.params), (before.image_codec.params, after.image_codec.params)):
        assert jax.tree.structure(pair[0]) == jax.tree.structure(pair[1])
        for old, new in zip(*map(jax.tree.leaves, pair), strict=True):
            assert new.dtype == old.dtype
            np.testing.assert_array_equal(new, old)


def test_the_record_says_where_it_comes_from_and_names_no_place(run, folder):
    record = json.loads((folder / packed.RECORD).read_text())
    origin = record["origin"]
    assert (origin["command"], origin["step"], origin["seed"]) == ("make that", 12, 7)
    assert origin["figures"] is None and set(record) == {"origin", *packed.NETWORKS}
    assert origin["data"] == {"path": "d"} and str(run.parent) not in json.dumps(record)


def test_packing_again_replaces_the_folder(run, folder, tmp_path):
    target = tmp_path / "again"
    for made_by in ("first", "second"):
        pack(f"--pack={run}", f"--pack_to={target}", f"--made_by={made_by}")
    assert packed.read_record(target)["origin"]["command"] == "second"
    assert {file.name for file in target.iterdir()} == {packed.RECORD, *(f"{n}.safetensors" for n in packed.NETWORKS)}


@pytest.mark.parametrize("damage", ["record", "cut", "missing", "shape"])
def test_a_damaged_folder_is_one_clear_error(folder, tmp_path, damage):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "backbone.safetensors"
    if damage == "record":
        (broken / packed.RECORD).write_text('{"origin": {}}')
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes((broken / "image_tokenizer.safetensors").read_bytes())
    with pytest.raises(UserError):
        systems.load(broken)


def test_the_package_carries_a_small_model_that_answers():
    assert sum(file.stat().st_size for file in packed.FOLDER.iterdir()) <= packed.MAX_BYTES
    origin = packed.read_record(packed.FOLDER)["origin"]
    assert origin["command"] and len(origin["commit"]) == 40 and origin["step"] > 0
    system = systems.load("micro")
    system.image_codec.decode([np.zeros((4, 4), np.int32)])
    found = roll_out(system, Grammar(system.tokenizer, GrammarOptions(modes=("direct",), text_cap=64)),
                     [Sample("one", "Put a red circle at b2.")], [{}], jax.random.key(0),
                     RolloutOptions(answer_length=250))  # fmt: skip
    assert found.answers[0].trajectory.mode is Mode.DIRECT, found.errors


def test_every_command_knows_the_package_s_model_and_a_checkpoint_by_the_same_names(run):
    assert systems.folder_of("micro") == packed.FOLDER and systems.name_of("micro") == str(packed.FOLDER)
    assert systems.folder_of(run) == store.resolve(run) and systems.name_of(run) == str(store.resolve(run))


def test_both_flags_belong_together(run):
    with pytest.raises(UserError):
        pack(f"--pack={run}")
