"""The path of someone who owns weights in the released layouts, from `convert` to `export`, with a model made small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import commands
import construct_worker
import jax
import numpy as np
import photographs
import pytest
from benchmark_runs import judge_flags, judging, summary_of
from checkpoints_fixture import random_tree
from emu_tokenizer import write_folder
from openai_service import Behaviour, OpenAIService, serving
from PIL import Image

from ivr_jax.checkpoints import hf, store
from ivr_jax.checkpoints import system as systems
from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.models import backbone, image_tokenizer
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.models.image_tokenizer import ImageTokenizerConfig
from ivr_jax.review.decisions import Decisions

CODES = 8
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024,
}  # fmt: skip
IMAGES = ImageTokenizerConfig(
    ch=4, out_ch=3, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, attn_resolutions=(), in_channels=3, resolution=64,
    z_channels=4, n_embed=CODES, embed_dim=4, norm_groups=2,
)  # fmt: skip


def stand_in(root: Path) -> Path:
    """Three folders as they are downloaded: decoder (bfloat16, Emu3, tokenizer files beside), text and image tokenizer.
    """
    text = write_folder(root / "text", CODES)
    vocabulary = systems.text_tokenizer(str(text), CODES).vocab.size
    config = BackboneConfig(vocab_size=vocabulary, rope_theta=1e4, **SIZES)
    params = backbone.init_params(config, jax.random.key(1))
    hf.export_backbone(config, params, root / "decoder", model_type="Emu3", dtype="bfloat16", shard_bytes=30_000)
    for file in text.iterdir():
        shutil.copy(file, root / "decoder")
    (root / "decoder" / "trainer_state.json").write_text("{}")
    hf.export_image_tokenizer(IMAGES, random_tree(image_tokenizer.param_shapes(IMAGES), 2), root / "images")
    return root


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> Path:
    """A folder with the downloads, both imports, and a dataset of five samples."""
    root = stand_in(tmp_path_factory.mktemp("walk"))
    for name in ("decoder", "images"):
        commands.succeed("convert", "--from=hf", root / name, "--to=orbax", root / f"{name}_import")
    success = photographs.write_success(root)
    commands.succeed("export", success, "--format=dataset", f"--out={root / 'dataset'}")
    return root


def generate(walk: Path, out: str, *arguments: object) -> dict:
    commands.succeed(
        "generate", f"--checkpoint={walk / 'decoder_import'}", f"--image_tokenizer={walk / 'images_import'}",
        f"--out={walk / out}", "--text_cap=4", "--prompt=A cat.", *arguments,
    )  # fmt: skip
    return json.loads((walk / out / "answer.json").read_text())


def test_an_import_knows_its_dtype_and_its_text_tokenizer(walk):
    meta = store.read_meta(walk / "decoder_import")
    assert (meta["model"]["dtype"], meta["model"]["param_dtype"]) == ("bfloat16", "bfloat16")
    assert meta["text_tokenizer"] == str(walk / "decoder_import" / "tokenizer")
    assert sorted(p.name for p in (walk / "decoder_import" / "tokenizer").iterdir()) == ["emu3.tiktoken",
                                                                                          "emu3_vision_tokens.txt"]


def test_it_answers_with_one_image_from_text_and_from_references(walk):
    for name in ("a", "b"):
        Image.fromarray(photographs.photograph("coffee", 64)).save(walk / f"{name}.png")
    references = [f"--image={walk / 'a.png'}", f"--image={walk / 'b.png'}"]
    for count, size in ((0, (64, 64)), (1, (64, 64)), (2, (32, 128))):
        ratio = ["--aspect_ratio=4:1"] if count == 2 else []
        record = generate(walk, f"answer{count}", "--mode=image", *references[:count], *ratio)
        assert [part["kind"] for part in record["parts"]] == ["image"]
        assert record["sample"].get("task_word", "") == "" and len(record["sample"]["sources"]) == count
        with Image.open(walk / f"answer{count}" / "final.png") as image:
            assert image.size[::-1] == size
    texts = generate(walk, "interleaved", "--answer_length=200", "--seed=3")
    assert "image" in [part["kind"] for part in texts["parts"]]


def train(walk: Path, workdir: str, *arguments: object) -> str:
    return commands.succeed(
        "train", "--config=micro_sft", f"--workdir={walk / workdir}", f"--config.data.path={walk / 'dataset'}",
        f"--config.image_tokenizer={walk / 'images_import'}", f"--config.text_tokenizer={walk / 'text'}",
        "--config.steps=2", "--config.batch=2", "--config.log_every=1", "--config.data.length=1024",
        "--config.data.practice_share=0.0", "--config.checkpoint_every=1", "--config.max_checkpoints=0",
        *(f"--config.model.{name}={value}" for name, value in SIZES.items()), *arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def adapted(walk) -> Path:
    """Tokenised, fine-tuned from the import, then with adapters; the last of the two steps of these taken twice."""
    commands.succeed(
        "tokenise", walk / "dataset", f"--image_tokenizer={walk / 'images_import'}",
        f"--text_tokenizer={walk / 'text'}", f"--out={walk / 'sft' / 'examples'}",
    )  # fmt: skip
    before = (walk / "sft" / "examples" / "examples.json").stat().st_mtime_ns
    train(walk, "sft", f"--config.init={walk / 'decoder_import'}")
    assert (walk / "sft" / "examples" / "examples.json").stat().st_mtime_ns == before, "what was tokenised is read"
    adapters = (f"--config.init={walk / 'sft'}", "--config.lora.rank=2")
    train(walk, "lora", *adapters)
    first = jax.tree.map(np.asarray, systems.load(walk / "lora").params)
    shutil.rmtree(walk / "lora" / "checkpoints" / "2")
    assert "resumed at step 1 of 2" in train(walk, "lora", *adapters)
    again = jax.tree.map(np.asarray, systems.load(walk / "lora").params)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    return walk / "lora"


def test_another_model_s_sizes_beside_init_are_an_error(walk):
    done = commands.run(
        "train", "--config=micro_sft", f"--workdir={walk / 'wrong'}", f"--config.data.path={walk / 'dataset'}",
        f"--config.image_tokenizer={walk / 'images_import'}", f"--config.text_tokenizer={walk / 'text'}",
        f"--config.init={walk / 'decoder_import'}", "--config.data.practice_share=0.0", "--config.model.head_dim=16",
    )  # fmt: skip
    assert done.returncode == 2 and "model.h" in done.complaint


def test_what_was_trained_goes_back_to_transformers_with_equal_logits(walk, adapted):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    commands.succeed("convert", "--from=orbax", adapted, "--to=hf", walk / "exported", "--model_type=qwen3")
    names = {path.name for path in (walk / "exported").iterdir()}
    assert "trainer_state.json" not in names and "config.json" in names
    system = systems.load(adapted)
    assert (system.config.dtype, system.config.param_dtype) == ("float32", "float32"), "not the import's bfloat16"
    tokens = np.arange(7, 27, dtype=np.int32)[None] % system.config.vocab_size
    positions = np.arange(20, dtype=np.int32)[None]
    hidden, _ = backbone.apply(system.config, system.params, tokens, positions)
    ours = np.asarray(backbone.logits(system.config, system.params, hidden), np.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(walk / "exported", dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(ours[..., : theirs.shape[-1]], theirs, atol=2e-4 * np.abs(theirs).max())


@pytest.fixture(scope="module")
def reviewed(walk) -> Path:
    """Constructed over HTTP with faults, the import drawing the first images; then reviewed by two people."""
    samples = construct_worker.write_samples(walk / "mine", 4, side=64, ends=("direct", "reflection 1", "multi 1"))
    service = OpenAIService(Behaviour(key=construct_worker.KEY, fault_rate=0.2, hang=0.3, seed=2))
    own = {"image_area": 4096, "image_multiple": 16, "batch": 4, "baseline": walk / "decoder_import",
           "image_tokenizer": walk / "images_import", "text_tokenizer": walk / "text"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, serving(service) as url:
        patch.setenv("TEST_KEY", construct_worker.KEY)
        commands.succeed("construct", *construct_worker.arguments(url, samples, walk / "construct", **own))
    assert service.log.faults
    constructed = TrajectoryDataset(walk / "construct" / "dataset")
    decisions = Decisions(walk / "construct" / "dataset.review.sqlite3", constructed.fingerprint, ("Ana", "Ben"))
    for position, trajectory in enumerate(constructed):
        for name in ("Ana", "Ben"):
            decisions.decide(name, position, trajectory.sample.key, "accept", "", f"{name}{position}")
    decisions.close()
    commands.succeed("review", walk / "construct" / "dataset", f"--write={walk / 'reviewed'}")
    return walk / "reviewed"


def test_construction_starts_from_its_drawings_and_two_people_review_the_result(walk, reviewed):
    dataset = TrajectoryDataset(reviewed)
    assert [trajectory.mode.value for trajectory in dataset] == ["direct", "reflection", "multi_step", "direct"]
    image_codec = systems.load_image_codec(walk / "images_import")
    for trajectory in dataset:
        first = dataset.image(trajectory.images[0])
        again = image_codec.decode(image_codec.encode([first]))[0]
        assert first.shape == again.shape == (64, 64, 3)


@pytest.fixture(scope="module")
def reinforced(walk, reviewed) -> Path:
    """One step of RL from the bfloat16 import, its answers judged over HTTP with faults."""
    service = OpenAIService(Behaviour(fault_rate=0.2, hang=0.3, seed=1))
    with serving(service) as url:
        commands.succeed(
            "train", "--config=micro_rl", f"--workdir={walk / 'rl'}", f"--config.init={walk / 'decoder_import'}",
            f"--config.image_tokenizer={walk / 'images_import'}", f"--config.prompts.source={reviewed}",
            "--config.steps=1", "--config.prompts_per_step=1", "--config.group_size=4", "--config.micro_batch=2",
            "--config.answer_length=700", "--config.buckets=(1024,)", "--config.loss_chunk_tokens=256",
            "--config.grammar.text_cap=3", "--config.grammar.max_reflections=1", "--config.grammar.max_steps=1",
            "--config.grammar.modes=('reflection', 'multi_step')", "--config.log_every=1",
            "--config.judge.outcome.kind=openai", "--config.judge.outcome.model=scripted",
            f"--config.judge.outcome.base_url={url}", "--config.judge.outcome.key_variable=",
            "--config.judge.outcome.first_wait=0.01", "--config.judge.outcome.longest_wait=0.1",
        )  # fmt: skip
    assert sum(service.log.answered.values()) >= 16
    return walk / "rl"


def test_rl_over_http_draws_whole_answers_and_learns_in_float32(walk, reinforced):
    row = json.loads((reinforced / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["mode_reflection"] + row["mode_multi_step"] == 1 and row["truncated"] == 0
    assert 0 < row["reward"] <= 1
    meta = store.read_meta(reinforced)
    assert (meta["model"]["dtype"], meta["model"]["param_dtype"]) == ("bfloat16", "float32")
    system = systems.load(reinforced)  # it records its tokenizers, which the import did not
    assert {leaf.dtype.name for leaf in jax.tree.leaves(system.params)} == {"float32"}


def test_its_answers_to_own_prompts_are_judged(walk, reinforced):
    Image.fromarray(photographs.photograph("chelsea", 64)).save(walk / "cat.png")
    lines = [{"prompt": "Mirror the cat.", "image": "cat.png"}, {"prompt": "Turn the cat.", "image": "cat.png"}]
    (walk / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with judging() as (_, url):
        commands.succeed(
            "evaluate", f"--prompts={walk / 'mine.jsonl'}", f"--checkpoint={reinforced}",
            f"--workdir={walk / 'evaluation'}", "--config.modes=('direct',)", "--config.text_cap=3",
            "--config.answer_length=300", "--config.engine.slots=2", *judge_flags(url),
        )  # fmt: skip
    made = summary_of(walk / "evaluation")
    assert made["states"]["ok"] == 2 and 0 <= made["headline"]["fixed"] <= 100
    assert (walk / "evaluation" / "report.html").read_text().count("Looked at") >= 2


@pytest.mark.parametrize("form", ["sharegpt", "messages", "chatml"])
def test_its_dataset_goes_out_in_every_format(walk, form):
    commands.succeed("export", walk / "dataset", f"--format={form}", f"--out={walk / f'{form}.jsonl'}")
    records = [json.loads(line) for line in (walk / f"{form}.jsonl").read_text().splitlines()]
    assert len(records) == 5 and all("id" in record for record in records)
