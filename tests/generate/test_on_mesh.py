"""Answers of a model that is sharded over devices, or cast as it is read, and of one image alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import bucket_servers
import commands
import jax
import numpy as np
import pytest
from emu_tokenizer import write_folder
from PIL import Image

from ivr_jax.checkpoints import store
from ivr_jax.checkpoints import system as systems
from ivr_jax.cloud import inputs
from ivr_jax.cloud.objects import Objects
from ivr_jax.errors import UserError
from ivr_jax.generate.answering import make_answering
from ivr_jax.models import backbone, image_tokenizer
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.models.image_tokenizer import ImageTokenizerConfig
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.requests import Request

CODES = 8
IMAGES = ImageTokenizerConfig(
    ch=4, out_ch=3, ch_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(), in_channels=3, resolution=64,
    z_channels=4, n_embed=CODES, embed_dim=4, norm_groups=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("emu")
    text = write_folder(root / "text", CODES)
    vocab = systems.text_tokenizer(str(text), CODES).vocab
    config = BackboneConfig(
        vocab_size=vocab.size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rope_theta=1e4, max_position_embeddings=640,
    )  # fmt: skip
    trees = {"backbone": (config, backbone.init_params(config, jax.random.key(1))),
             "image_tokenizer": (IMAGES, image_tokenizer.init_params(IMAGES, jax.random.key(2)))}  # fmt: skip
    for kind, (settings, params) in trees.items():
        checkpointer = store.Checkpointer(root / kind)
        checkpointer.save(0, {"params": params}, None, {"kind": kind, "model": vars(settings)})
        checkpointer.close()
    return {"root": root, "text": text, "backbone": root / "backbone", "images": root / "image_tokenizer"}


def load(paths, **options) -> systems.System:
    return systems.load(paths["backbone"], paths["images"], text_tokenizer_path=paths["text"], **options)


def test_eight_devices_answer_as_one_does(paths, tmp_path):
    """The same tokens and pixels; every device holds a part of the weights, of a vocabulary that 8 does not divide."""
    flags = ["--checkpoint=" + str(paths["backbone"]), "--image_tokenizer=" + str(paths["images"]),
             "--text_tokenizer=" + str(paths["text"]), "--prompt=A cat.", "--image_area=256", "--text_cap=4",
             "--answer_length=300", "--mode=direct"]  # fmt: skip
    commands.succeed("generate", *flags, f"--out={tmp_path / '1'}")
    command = [sys.executable, "-m", "ivr_jax.generate", *flags, "--mesh=fsdp:4,tensor:2", f"--out={tmp_path / '8'}"]
    done = subprocess.run(command, env=commands.environment(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads((tmp_path / devices / "answer.json").read_text()) for devices in ("1", "8")]
    assert answers[0] == answers[1] and len(answers[0]["rounds"]) == 1
    names = sorted(path.name for path in (tmp_path / "1").glob("*.png"))
    assert names and all((tmp_path / "1" / n).read_bytes() == (tmp_path / "8" / n).read_bytes() for n in names)


def test_checkpoints_images_and_answers_may_be_in_a_bucket(paths, tmp_path, monkeypatch):
    monkeypatch.setenv(inputs.CACHE_VARIABLE, str(tmp_path / "cache"))
    Image.new("RGB", (20, 12), "red").save(tmp_path / "red.png")
    with bucket_servers.server("s3"):
        bucket = f"s3://{bucket_servers.BUCKET}"
        for name in ("text", "backbone", "images"):
            found = [file for file in paths[name].rglob("*") if file.is_file()]
            Objects(f"{bucket}/{name}").upload({file.relative_to(paths[name]).as_posix(): file for file in found})
        Objects(f"{bucket}/in").upload({"red.png": tmp_path / "red.png"})
        Objects(f"{bucket}/in").write("prompts.jsonl", b'{"prompt": "A cat.", "image": "red.png", "key": "cat"}')
        tokenizers = [f"--image_tokenizer={bucket}/images", f"--text_tokenizer={bucket}/text"]
        command = ["generate", f"--checkpoint={bucket}/backbone", *tokenizers, f"--prompts={bucket}/in/prompts.jsonl",
                   "--image_area=256", "--mode=image", f"--out={bucket}/out"]
        assert "1 made" in commands.succeed(*command)
        assert {"cat/answer.json", "cat/G1.png", "cat/source1.png"} <= set(inputs.listed(f"{bucket}/out"))
        shutil.rmtree(tmp_path / "cache")
        assert "1 answers were there" in commands.succeed(*command)
        asked = commands.succeed("evaluate", f"--prompts={bucket}/in/prompts.jsonl", "--checkpoint=micro", "--dry_run")
        assert asked.split()[:2] == ["prompts", "1"]
        refused = commands.run("serve", "--checkpoint=micro", f"--out={bucket}/answers")
        assert f"{bucket}/answers" in refused.complaint


SAMPLERS = """
import asyncio
import dataclasses
import sys
import jax
import numpy as np
from ml_collections import ConfigDict
from ivr_jax.construct.baseline import Baseline
from ivr_jax.construct.escalation import Request
from ivr_jax.sampling.layout import LayoutOptions, load_sampler
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.services.checkpoint import CheckpointGenerator
from ivr_jax.trajectory import Sample

path, images, text = sys.argv[1:]
samples = [Sample(str(i), prompt) for i, prompt in enumerate(("A cat.", "Two dogs."))]

def drawn(**sizes):
    mesh = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1} | sizes
    system = load_sampler(path, mesh, ConfigDict(dataclasses.asdict(LayoutOptions())), images, text)
    baseline = Baseline(system, SamplingOptions(), seed=0, batch=2, area=256)
    generator = CheckpointGenerator(system, "tiny", SamplingOptions(), 5, None, area=256)
    first = baseline._draw([Request(sample, {}, None) for sample in samples], jax.random.key(0), lambda usage: None)
    return system, [*first, asyncio.run(generator.generate(samples[0], "A cat.", []))]

_, one = drawn()
system, eight = drawn(fsdp=4, tensor=2)
kernel = system.params["layers"]["attention"]["q"]
print(len(kernel.sharding.device_set), kernel.addressable_shards[0].data.size * 2 == kernel.size, len(one))
print([np.array_equal(a, b) for a, b in zip(one, eight, strict=True)])
"""


def test_construction_draws_on_eight_devices_what_it_draws_on_one(paths):
    """The baseline and a checkpoint as a service; weights are read straight into the layout of rollouts: split in two
    along the heads, and four copies."""
    lines = commands.on_devices(8, SAMPLERS, paths["backbone"], paths["images"], paths["text"])
    assert lines[-2:] == ["8 True 3", "[True, True, True]"]


def test_a_mesh_that_is_not_there_is_one_line():
    done = commands.run("generate", "--checkpoint=x", "--prompt=a", "--out=y", "--mesh=tensor:3")
    assert done.returncode == 2 and "3 devices" in done.complaint
    done = commands.run("generate", "--checkpoint=x", "--prompt=a", "--out=y", "--mesh=depth:2")
    assert done.returncode == 2 and "--mesh=depth:2" in done.complaint


def test_weights_are_cast_as_they_are_read(paths):
    system = load(paths, dtype="bfloat16", param_dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(system.params)} == {"bfloat16"}
    whole = load(paths)
    jax.tree.map(
        lambda narrow, wide: np.testing.assert_array_equal(
            np.asarray(narrow, np.float32), np.asarray(wide.astype("bfloat16"), np.float32)
        ),
        system.params,
        whole.params,
    )


def answering(paths, mode: str, **options):
    return make_answering(load(paths), SamplingOptions(), [mode], text_cap=4, **options)


def test_one_image_alone(paths):
    answer, tokens = answering(paths, "image", image_area=256).answer(Request("r", "A cat.", aspect_ratio="2:1"))
    assert [part.kind for part in answer.parts] == ["image"] and answer.finished and len(answer.drawn) == 1
    rows, columns = answer.parts[0].codes.shape
    assert answer.drawn[0].shape == (4 * rows, 4 * columns, 3) and columns > rows
    assert tokens < rows * (columns + 1) + 8
    with pytest.raises(UserError):
        answering(paths, "image", image_area=256).answer(Request("r", "A cat.", aspect_ratio="free"))
    with pytest.raises(UserError):
        make_answering(load(paths), SamplingOptions(), ["image", "direct"])


def test_an_answer_that_is_cut_before_its_first_image_is_said(paths):
    with pytest.raises(UserError) as caught:  # a free text of 512 tokens at most comes first
        make_answering(load(paths), SamplingOptions(), ["interleaved"], answer_length=3, image_area=64).answer(
            Request("r", "A cat.", seed=1)
        )
    assert "3 tokens" in caught.value.what


def test_an_image_of_free_size_that_does_not_fit_is_named_with_its_size(paths):
    model = answering(paths, "direct", image_area=256, answer_length=60)
    found = set()
    for seed in range(3):
        with pytest.raises(UserError) as caught:
            model.answer(Request("r", "A cat.", aspect_ratio="free", seed=seed))
        found.add(caught.value.what)
        assert "cells" in caught.value.what and "are left" in caught.value.what
    assert found
