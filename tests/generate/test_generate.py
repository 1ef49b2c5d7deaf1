"""`python -m ivr_jax.generate`: with a tiny imported model in Emu3.5's format and with one trained on trajectories.

The models know nothing; what is checked is what is asked of them, drawn, written, refused and resumed.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import commands
import jax
import numpy as np
import photographs
import pytest
from emu_tokenizer import write_folder
from PIL import Image

from ivr_jax.checkpoints import store
from ivr_jax.checkpoints import system as systems
from ivr_jax.generate import __main__ as generate
from ivr_jax.images import load_image
from ivr_jax.models import backbone, image_tokenizer
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.models.image_tokenizer import ImageTokenizerConfig
from ivr_jax.protocol import codec
from ivr_jax.sampling import batch

ROOT = Path(__file__).resolve().parents[2]
CODES = 8
IMAGES = ImageTokenizerConfig(
    ch=4, out_ch=3, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, attn_resolutions=(), in_channels=3, resolution=64,
    z_channels=4, n_embed=CODES, embed_dim=4, norm_groups=2,
)  # fmt: skip


def save(folder: Path, kind: str, config, params) -> Path:
    """A checkpoint as an import of released weights leaves it: no word of tokenizers."""
    checkpointer = store.Checkpointer(folder)
    checkpointer.save(0, {"params": params}, None, {"kind": kind, "model": vars(config)})
    checkpointer.wait()
    checkpointer.close()
    return folder


@pytest.fixture(scope="module")
def emu(tmp_path_factory) -> types.SimpleNamespace:
    """A tiny model in Emu3.5's format: paths of `backbone`, `images` and `text`."""
    root = tmp_path_factory.mktemp("emu")
    text = write_folder(root / "text", CODES)
    vocab = systems.text_tokenizer(str(text), CODES).vocab
    config = BackboneConfig(
        vocab_size=vocab.size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rope_theta=1e4, max_position_embeddings=1024,
    )  # fmt: skip
    params = backbone.init_params(config, jax.random.key(1))
    images = image_tokenizer.init_params(IMAGES, jax.random.key(2))
    return types.SimpleNamespace(
        text=text,
        backbone=save(root / "backbone", systems.BACKBONE, config, params),
        images=save(root / "images", systems.IMAGE_TOKENIZER, IMAGES, images),
    )


def ask(emu, out: Path, *arguments: object) -> commands.Done:
    return commands.run(
        "generate", f"--checkpoint={emu.backbone}", f"--text_tokenizer={emu.text}", f"--image_tokenizer={emu.images}",
        f"--out={out}", "--text_cap=4", "--answer_length=160", *arguments,
    )  # fmt: skip


def interleaved(done: commands.Done, out: Path) -> dict:
    """An interleaved answer that was written; every image it names is there."""
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "answer.json").read_text())
    drawn = [part["image"] for part in record["parts"] if part["kind"] == "image"]
    assert sorted(path.name for path in out.glob("G*.png")) == drawn
    assert (out / "final.png").exists() == bool(drawn)
    page = (out / "answer.html").read_text()
    assert page.count("data:image/png;base64,") == len(drawn) + len(record["sample"]["sources"])
    assert 'src="http' not in page and "<script" not in page
    return record


# -- one request ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(emu, tmp_path_factory) -> tuple[commands.Done, Path]:
    out = tmp_path_factory.mktemp("first") / "deep" / "out"
    return ask(emu, out, "--prompt=Tell <b>a</b> story of a cat.", "--task=story", "--seed=3"), out


def test_an_imported_model_answers_in_texts_and_images(first):
    done, out = first
    record = interleaved(done, out)
    assert {part["kind"] for part in record["parts"]} >= {"image"} and record["sample"]["task_word"] == "story"
    assert all(load_image(path).shape == (64, 64, 3) for path in out.glob("G*.png"))
    assert "tokens/s" in done.stdout and "interleaved" in done.stdout and str(out / "answer.html") in done.stdout
    page = (out / "answer.html").read_text()
    assert "Tell &lt;b&gt;a&lt;/b&gt; story" in page and "<b>a</b>" not in page


def test_the_same_seed_answers_the_same_and_another_does_not(emu, first, tmp_path):
    again, other = (
        interleaved(ask(emu, tmp_path / str(seed), "--prompt=Tell <b>a</b> story of a cat.", "--task=story",
                   f"--seed={seed}"), tmp_path / str(seed))
        for seed in (3, 4)
    )  # fmt: skip
    assert again == json.loads((first[1] / "answer.json").read_text()) and other["parts"] != again["parts"]


def test_a_task_and_every_sampling_option_reach_the_sampler(emu, tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(photographs.photograph("coffee")).save(photo)
    options = ("--cfg=3", "--image_cfg=1.5", "--temperature=0.9", "--image_temperature=1.2", "--text_top_k=50",
               "--text_top_p=0.9", "--image_top_k=6", "--image_top_p=0.95")  # fmt: skip
    done = ask(emu, tmp_path / "out", f"--image={photo}", "--prompt=Mirror the cup.", "--task=howto", *options)
    record = interleaved(done, tmp_path / "out")
    about = record["about"]
    assert about["cfg"] == 3 and about["image_cfg"] == 1.5 and about["task"] == "howto" and about["image_top_k"] == 6
    assert load_image(tmp_path / "out" / "source1.png").shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("ratio", "count", "size"),
    [("auto", 0, (64, 64)), ("16:9", 0, (48, 80)), ("1:2", 1, (96, 48)), ("auto", 1, (48, 80)), ("auto", 2, (48, 80))],
)
def test_output_size(emu, tmp_path, ratio, count, size):
    """An aspect ratio decides, else the first reference (these images are too small for two digits a side)."""
    from ivr_jax.sampling import requests

    photo = tmp_path / "wide.png"
    Image.fromarray(photographs.photograph("coffee", 160)[:100]).save(photo)
    system = systems.load(emu.backbone, emu.images, text_tokenizer_path=emu.text)
    prepared = requests.prepare(requests.Request("k", "x", (str(photo),) * count, "", ratio), system)
    assert tuple(16 * side for side in prepared.size) == size
    free = requests.prepare(requests.Request("k", "x", (str(photo),) * 2), system, area=160 * 160)
    assert free.size == (-1, -1)
    assert requests.prepare(requests.Request("k", "x", (), "", "free"), system).size == (-1, -1)


def test_a_bar_moves_with_the_tokens(emu, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "REPORTED", 8)
    monkeypatch.setattr(generate, "tqdm", functools.partial(generate.tqdm, mininterval=0))
    shown = ask(emu, tmp_path / "out", "--prompt=A cat.", "--seed=3").stderr
    counts = [int(n) for n in re.findall(r"draw: (\d+) tokens \[", shown)]
    assert len(counts) >= 3 and counts == sorted(counts) and counts[-1] >= 3 * 8, shown
    assert all(b - a <= 2 * 8 for a, b in itertools.pairwise(counts))  # a window holds two tokens
    file = write_lines(tmp_path, LINES[:1])
    assert re.search(r"\d+ tokens of the next, \d+ tokens/s", ask(emu, tmp_path / "all", f"--prompts={file}").stderr)


def test_weights_that_are_no_numbers_are_said(emu, tmp_path):
    meta = store.read_meta(emu.backbone)
    config = BackboneConfig(**meta["model"])
    params = backbone.init_params(config, jax.random.key(1))
    params["final_norm"] *= np.nan
    broken = save(tmp_path / "broken", systems.BACKBONE, config, params)
    done = ask(emu, tmp_path / "out", "--prompt=A cat.", f"--checkpoint={broken}")
    assert "its weights hold NaN or infinity" in done.complaint and not (tmp_path / "out").exists()


def test_a_trajectory_may_be_asked_of_it_too(emu, tmp_path):
    done = ask(emu, tmp_path / "out", "--prompt=A cat.", "--mode=direct", "--answer_length=400", "--text_cap=2")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "answer.json").read_text())
    assert len(record["rounds"]) == 1 and "own verdict" in done.stdout


# -- what is refused --------------------------------------------------------------------------------------------------


def test_an_imported_checkpoint_without_named_tokenizers_is_one_line(emu, tmp_path):
    def complaint(*arguments: str) -> str:
        return commands.run("generate", f"--checkpoint={emu.backbone}", "--prompt=x", f"--out={tmp_path}/out",
                            *arguments).complaint  # fmt: skip

    for named in ((), (f"--text_tokenizer={emu.text}",), (f"--image_tokenizer={emu.images}",)):
        assert "does not say which tokenizers it was trained with. It was imported: name both" in complaint(*named)
    images = f"--image_tokenizer={emu.images}"
    assert "token ids, its tokenizers" in complaint(images, "--text_tokenizer=micro")
    small = write_folder(tmp_path / "small", CODES, merges=20)
    assert "token ids, its tokenizers" in complaint(images, f"--text_tokenizer={small}")
    other = write_folder(tmp_path / "other", CODES + 1)
    assert "has 9 visual tokens, the image tokenizer 8" in complaint(images, f"--text_tokenizer={other}")
    (small / "emu3.tiktoken").write_text("no ranks")
    assert "line 1 is not a token in base64" in complaint(images, f"--text_tokenizer={small}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt= ",), "the prompt is empty"),
        (("--prompt=draw <|image start|>",), "the control token '<|image start|>'"),
        (("--prompt=x", "--aspect_ratio=wide"), "'wide' is no aspect ratio. Write WIDTH:HEIGHT"),
        (("--prompt=x", "--aspect_ratio=0:3"), "'0:3' is no aspect ratio"),
        (("--prompt=x", "--aspect_ratio=9999:1"), "would take"),
        (("--prompt=x", "--task=paint"), "t2i"),
        (("--prompt=x", "--image=THIN"), "is too long and narrow: 1x5000 pixels"),
        (("--prompt=x", "--image=TEXT"), "TEXT.png"),
        (("--prompt=x", "--cfg=-1"), "cfg"),
        (("--prompt=x", "--text_top_p=0"), "top_p"),
        (("--prompt=x", "--mode=direct", "--mode=interleaved"), "interleaved alone"),
        (("--prompt=x", "--prompts=FILE"), "both --prompt and --prompts"),
        ((), "--prompt is missing"),
        (("--prompts=FILE", "--image=THIN"), "--image does not go with --prompts"),
        (("--prompts=nowhere.jsonl",), "cannot be read"),
        (("--prompt=" + "word and word " * 300,), "tokens of the context"),
        (("--prompt=x", "--image_area=400000"), "an image of 40 x 40 cells needs 1647 tokens"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_a_request_that_cannot_be_answered_is_one_line_and_leaves_nothing(emu, tmp_path, arguments, words):
    Image.fromarray(np.zeros((5000, 1, 3), np.uint8)).save(tmp_path / "THIN.png")
    (tmp_path / "TEXT.png").write_text("no image")
    (tmp_path / "FILE.png").write_text('{"prompt": "x"}')
    given = [a if "=" not in a or a.split("=")[1] not in ("THIN", "TEXT", "FILE")
             else f"{a.split('=')[0]}={tmp_path / a.split('=')[1]}.png" for a in arguments]  # fmt: skip
    done = ask(emu, tmp_path / "deep" / "out", *given)
    assert done.returncode == 2 and words in done.complaint
    assert not (tmp_path / "deep").exists()


# -- a file of requests -----------------------------------------------------------------------------------------------

LINES = [
    {"prompt": "A cat."},
    {"prompt": "Mirror it.", "image": "photo.png", "key": "mirrored", "seed": 5},
    {"prompt": "A dog.", "task": "story", "aspect_ratio": "2:1"},
]


def write_lines(folder: Path, lines: list) -> Path:
    Image.fromarray(photographs.photograph("coffee")).save(folder / "photo.png")
    file = folder / "prompts.jsonl"
    file.write_text("\n\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return file


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_file_of_requests_is_answered_line_by_line_and_only_once(emu, tmp_path):
    file, out = write_lines(tmp_path, LINES), tmp_path / "out"
    done = ask(emu, out, f"--prompts={file}", "--seed=2")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["0001", "0005", "mirrored"]
    records = {path.name: json.loads((path / "answer.json").read_text()) for path in out.iterdir()}
    assert [records[key]["about"]["seed"] for key in ("0001", "mirrored", "0005")] == [2, 5, 2]
    assert (out / "mirrored" / "source1.png").exists() and "3 made" in done.stdout
    before = tree(out)
    shutil.rmtree(out / "mirrored")
    again = ask(emu, out, f"--prompts={file}", "--seed=2")
    assert "2 answers were there, 1 made" in again.stdout
    after = tree(out)
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
    assert all(after[name] == before[name] for name in before if not name.startswith("mirrored"))
    other = ask(emu, out, f"--prompts={file}", "--seed=2", "--cfg=2")
    assert "holds an answer to another request: cfg was 1.0, is 2.0" in other.complaint and tree(out) == after
    alone = interleaved(ask(emu, tmp_path / "alone", "--prompt=A cat.", "--seed=2"), tmp_path / "alone")
    assert alone["parts"] == records["0001"]["parts"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 3 is not JSON"),
        ("[1]", "line 3 must be an object with a prompt"),
        ({"text": "x"}, "line 3 must be an object with a prompt"),
        ({"prompt": "x", "images": []}, "and only the fields prompt, image, task"),
        ({"prompt": ""}, "line 3: the prompt is empty"),
        ({"prompt": "<|extra_204|>"}, "line 3: the prompt contains the control token"),
        ({"prompt": "x", "task": "paint"}, "line 3: there is no task 'paint'"),
        ({"prompt": "x", "seed": "1"}, "line 3: `seed` is '1'"),
        ({"prompt": "x", "seed": -1}, "line 3: the seed -1 is out of range"),
        ({"prompt": "x", "key": "../x"}, "cannot name a folder"),
        ({"prompt": "x", "key": "0001"}, "line 3 has the key '0001' of an earlier line"),
        ({"prompt": "x", "image": "gone.png"}, "there is no image file"),
        ({"prompt": "x", "image": [1]}, "line 3: `image` is [1]"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_drawn(emu, tmp_path, line, words):
    file = write_lines(tmp_path, [LINES[0], line])
    assert words in ask(emu, tmp_path / "out", f"--prompts={file}").complaint
    assert not (tmp_path / "out").exists()


def test_a_killed_run_goes_on_where_it_was(emu, tmp_path):
    file = write_lines(tmp_path, [{"prompt": f"A cat, {i}."} for i in range(80)])
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "ivr_jax.generate", f"--checkpoint={emu.backbone}", f"--text_tokenizer={emu.text}",
        f"--image_tokenizer={emu.images}", f"--prompts={file}", f"--out={out}", "--text_cap=4", "--answer_length=160",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, env=commands.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 300
    while not list(out.glob("[0-9]*/answer.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    printed = process.communicate()[0].decode()
    finished = {path.parent.name for path in out.glob("[0-9]*/answer.json")}
    assert 0 < len(finished) < 80, printed
    (out / ".answer-left").mkdir()  # as a kill in the middle of writing leaves it
    before = tree(out)
    done = ask(emu, out, f"--prompts={file}")
    assert f"{len(finished)} answers were there, {80 - len(finished)} made" in done.stdout, done.stderr
    after = tree(out)
    assert all(after[name] == before[name] for name in before if name.split("/")[0] in finished)
    assert sorted(path.name for path in out.iterdir()) == [f"{2 * i + 1:04d}" for i in range(80)]


# -- training ---------------------------------------------------------------------------------------------------------


def test_photographs_train_a_model_with_this_tokenizer_from_an_import_or_from_nothing(emu, tmp_path):
    success = photographs.write_success(tmp_path)
    released = f"--config.released={success}"
    commands.succeed("construct", "--config=micro_construct", f"--workdir={tmp_path / 'c'}", released)
    sizes = ("hidden_size=32", "intermediate_size=48", "num_hidden_layers=2", "num_attention_heads=4",
             "num_key_value_heads=2", "head_dim=8", "max_position_embeddings=1024")  # fmt: skip
    sft = ("train", "--config=micro_sft", f"--config.data.path={tmp_path / 'c' / 'dataset'}", "--config.steps=2",
           "--config.batch=2", "--config.log_every=1", "--config.data.length=1024",
           f"--config.image_tokenizer={emu.images}", *(f"--config.model.{size}" for size in sizes))  # fmt: skip
    text = shutil.copytree(emu.text, tmp_path / "text")
    printed = commands.succeed(*sft, f"--workdir={tmp_path / 'sft'}", f"--config.text_tokenizer={text}")
    assert "examples: {'direct': 3, 'multi_step': 1, 'reflection': 1}" in printed
    system = systems.load(tmp_path / "sft")
    assert system.meta["text_tokenizer"] == str(text) and system.meta["vocabulary"] == system.tokenizer.fingerprint
    assert codec.encode_image(system.tokenizer, np.zeros((1, 1), int))[0] == system.tokenizer.vocab.boi
    text.rename(tmp_path / "moved")
    ask_again = ("generate", f"--checkpoint={tmp_path / 'sft'}", "--prompt=A cat.", f"--out={tmp_path / 'out'}",
                 "--text_cap=2", "--answer_length=400", "--mode=direct")  # fmt: skip
    assert "the text tokenizer" in (lost := commands.run(*ask_again).complaint) and "--text_tokenizer=" in lost
    assert "own verdict" in commands.succeed(*ask_again, f"--text_tokenizer={tmp_path / 'moved'}")
    other = write_folder(tmp_path / "other", CODES, merges=61)
    assert "made with another vocabulary" in commands.run(*ask_again, f"--text_tokenizer={other}").complaint
    started = (*sft, f"--workdir={tmp_path / 'on'}", f"--config.init={emu.backbone}")
    commands.succeed(*started, f"--config.text_tokenizer={tmp_path / 'moved'}")
    assert systems.load(tmp_path / "on").meta["text_tokenizer"] == str(tmp_path / "moved")
