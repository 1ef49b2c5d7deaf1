"""The program as a new user meets it: the demo in miniature, a user's own photographs, questions and mistakes.

The miniature runs the demo's own plan, every command of it, with two training steps a stage; its models know nothing,
so what is checked is that everything is there and hangs together, never how good it is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import commands
import miniature_demo
import numpy as np
import photographs
import pytest
from miniature_demo import ASKED, EVALUATED, IMAGES, MODEL, OVERRIDES, TRAIN, TRAINED, files_of, settings
from PIL import Image

from ivr_jax.checkpoints import system as systems
from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.images import load_image
from ivr_jax.models import backbone
from ivr_jax.world.levels import level_of
from ivr_jax.world.splits import SPLITS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def miniature(tmp_path_factory) -> types.SimpleNamespace:
    """What `miniature_demo.run_twice` returns; made once a test session, and only read."""
    base = tmp_path_factory.getbasetemp()
    return miniature_demo.run_twice(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


def numbers_of(root: Path, name: str) -> dict:
    return json.loads((root / name / "evaluation.json").read_text())


# The demo


def test_every_stage_leaves_its_checkpoint_its_curves_and_its_config(miniature):
    for name in TRAINED:
        folder = miniature.root / name
        assert [step.name for step in (folder / "checkpoints").iterdir()] == ["2"]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2]
        assert all(np.isfinite(value) for line in lines for value in line.values())
        assert list((folder / "tensorboard").iterdir())
        assert json.loads((folder / "config.json").read_text())["steps"] == 2


def test_construction_fills_its_quotas_and_draws_with_the_base_model(miniature):
    own = TrajectoryDataset(miniature.root / "construct" / "dataset")
    modes = [own[i].mode.value for i in range(len(own))]
    assert sorted(modes) == ["direct"] * 4 + ["multi_step"] * 4 + ["reflection"] * 4
    assert not any(own[i].rounds[0].evaluation.passed for i in range(len(own)))

    def colours(dataset: TrajectoryDataset, round_: int) -> list[int]:
        trajectories = [dataset[i] for i in range(len(dataset))]
        images = [dataset.image(t.images[round_]) for t in trajectories if len(t.images) > round_]
        return [len(np.unique(image.reshape(-1, 3), axis=0)) for image in images]

    assert min(colours(own, 0)) > 100  # decoded by a network
    assert max(colours(own, 1)) < 20  # rendered by the generator


def test_rl_starts_with_importance_ratio_one_and_scores_every_answer(miniature):
    lines = [json.loads(line) for line in (miniature.root / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert all(line.get("max_ratio_deviation", 0) < 1e-3 and line["missing"] == 0 for line in lines)
    assert all(line["format"] == 1 and 0 <= line["outcome"] <= 1 for line in lines)


def test_evaluations_hold_every_figure(miniature):
    for name in EVALUATED:
        result = numbers_of(miniature.root, name)
        overall = result["overall"]
        whole = name in ("eval_base", "eval_sft", "eval_rl")
        assert overall["answers"] == (16 if whole else 4)
        assert set(result["by_split"]) == ({*SPLITS, "mixture"} if whole else {"mixture"})
        assert {"1", "2", "3", "4"} <= set(result["by_edits"])
        for key in ("exact", "right", "first_exact", "gain", "outcome", "images", "valid", "tokens"):
            assert overall[key]["low"] <= overall[key]["value"] <= overall[key]["high"], (name, key)
        assert overall["valid"]["value"] == 1  # the grammar leaves even an untrained model no choice
        assert all(1 <= overall["axes"][axis]["value"] <= 5 for axis in overall["axes"])
        judged = sum(overall["calibration"]["images"]["counts"].values())
        assert judged == overall["images"]["value"] * overall["answers"]


def test_single_edits_and_typed_requests_are_evaluated_too(miniature):
    kinds, typed = (numbers_of(miniature.root, name) for name in ASKED)
    assert kinds["overall"]["answers"] == 10 and set(kinds["by_edits"]) == {"1"}
    assert {split for split in kinds["by_split"] if split != "mixture"} == {f"kind/{k}" for k in level_of(0).all_kinds}
    assert typed["overall"]["answers"] == 20 and set(typed["by_split"]) == {"typed"}
    assert "of 20 typed requests" in miniature.first


def test_the_paired_test_is_part_of_the_evaluations_of_free_answers(miniature):
    for name in ("eval_sft", "eval_rl"):
        overall = numbers_of(miniature.root, name)["paired"]["overall"]
        assert overall["cases"] == 4 and overall["sight_fault"]["n"] == 4
        assert -1 <= overall["sight_fault"]["value"] <= 1 and 0 <= overall["pass_exact"]["value"] <= 1


def test_answers_held_to_a_mode_keep_to_it(miniature):
    for name, mode, images in (("eval_base", "direct", 1), ("eval_direct", "direct", 1), ("eval_multi_step", "", 2)):
        overall = numbers_of(miniature.root, name)["overall"]
        assert overall["modes"][mode or "multi_step"]["value"] == 1
        assert overall["images"]["low"] >= images


def test_the_report_is_one_page_that_shows_every_stage_and_every_model(miniature):
    page = (miniature.root / "report.html").read_text()
    titles = ("Image tokenizer", "Base", "SFT", "RL", "SFT + RL", "Training samples of SFT", "Base: one edit, exact")
    for title in titles:
        assert title in page, title
    assert "is not in this working directory" not in page and "has not been evaluated" not in page
    assert "data:image/png;base64," in page and 'src="http' not in page and 'href="http' not in page
    assert list(miniature.root.glob("**/*.png"))


def test_the_demo_ends_with_a_table_the_gates_and_the_next_command(miniature):
    end = miniature.first[miniature.first.index("Done") :]
    for text in ("Exact match", "Images per answer", "SFT + RL", "not met", "in all", "report.html", "export"):
        assert text in end, text
    command = end.strip().splitlines()[-1].split()
    assert (ROOT / command[0]).samefile(sys.executable) if "/" in command[0] else command[0] == "python"
    assert command[1:3] == ["-m", "ivr_jax.generate"]
    assert f"--checkpoint={miniature.root / 'rl'}" in command


def test_running_the_demo_again_resumes_and_redoes_nothing(miniature):
    assert miniature.touched == []
    for name in TRAINED:
        assert f"{name}: already trained 2 steps" in miniature.second
    for name in (*EVALUATED, *ASKED, "construct/dataset"):
        assert f"{miniature.root / name} is complete" in miniature.second


def test_the_export_answers_in_transformers_as_the_model_does_here(miniature):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    assert "difference to transformers" in miniature.first
    ours = systems.load(miniature.root / "rl")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        miniature.root / "export", dtype=torch.float32, attn_implementation="eager"
    )
    tokens = np.random.default_rng(0).integers(0, ours.config.vocab_size, (2, 48))
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens)).logits.numpy()
    positions = np.broadcast_to(np.arange(48), tokens.shape)
    hidden, _ = backbone.apply(ours.config, ours.params, tokens.astype(np.int32), positions.astype(np.int32))
    found = np.asarray(backbone.logits(ours.config, ours.params, hidden))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_an_export_is_not_replaced_unless_asked_for(miniature):
    before = files_of(miniature.root, "export/*")
    done = commands.run("convert", "--from=orbax", miniature.root / "rl", "--to=hf", miniature.root / "export")
    assert "exists and is not empty" in done.complaint
    assert files_of(miniature.root, "export/*") == before


# Questions to a trained model

SHORT = ("--text_cap=2", "--answer_length=352")  # an untrained model never ends a text by itself


def generate(miniature, out: Path, *arguments: object, prompt: str = "Put a red circle at b2.") -> commands.Done:
    return commands.run(
        "generate", f"--checkpoint={miniature.root / 'rl'}", f"--prompt={prompt}", f"--out={out}", *SHORT, *arguments
    )


def answered(done: commands.Done, out: Path) -> dict:
    """The written answer; every image that it names is there."""
    assert done.returncode == 0, done.stderr
    answer = json.loads((out / "answer.json").read_text())
    rounds = len(answer["rounds"])
    assert sorted(file.name for file in out.glob("G*.png")) == [f"G{i}.png" for i in range(1, rounds + 1)]
    assert np.array_equal(load_image(out / "final.png"), load_image(out / f"G{rounds}.png"))
    assert f"G{rounds}.png" in done.stdout and "answer.html" in done.stdout
    assert "<html" in (out / "answer.html").read_text()
    return answer


def test_text_to_image_is_the_same_with_the_same_seed_and_another_with_another(miniature, tmp_path):
    first = answered(generate(miniature, tmp_path / "a", "--seed=1"), tmp_path / "a")
    again = answered(generate(miniature, tmp_path / "b", "--seed=1"), tmp_path / "b")
    other = answered(generate(miniature, tmp_path / "c", "--seed=2"), tmp_path / "c")
    assert first == again
    assert first["rounds"] != other["rounds"]
    assert load_image(tmp_path / "a" / "G1.png").shape == (64, 64, 3)


def test_an_answer_replaces_an_earlier_one_in_the_same_folder(miniature, tmp_path):
    source = tmp_path / "photo.png"
    Image.fromarray(photographs.photograph("coffee")).save(source)
    answered(generate(miniature, tmp_path / "out", f"--image={source}"), tmp_path / "out")
    (tmp_path / "out" / "G7.png").write_bytes(b"as if it had been longer")
    (tmp_path / "out" / "mine.png").write_bytes(b"the user's own")
    done = generate(miniature, tmp_path / "out", "--mode=direct")
    answer = answered(done, tmp_path / "out")
    assert len(answer["rounds"]) == 1 and "direct, " in done.stdout
    assert not (tmp_path / "out" / "source1.png").exists() and (tmp_path / "out" / "mine.png").exists()


def test_several_images_of_unusual_kinds_are_references_in_their_order(miniature, tmp_path):
    pixels = photographs.photograph("astronaut")
    files = [tmp_path / name for name in ("cmyk.jpg", "alpha.png", "deep.png")]
    Image.fromarray(pixels).convert("CMYK").save(files[0], quality=95)
    see_through = np.dstack([pixels, np.full((64, 64), 0, np.uint8)])
    Image.fromarray(see_through).save(files[1])
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(files[2])
    done = generate(miniature, tmp_path / "out", *[f"--image={file}" for file in files], "--mode=direct")
    assert len(answered(done, tmp_path / "out")["sample"]["sources"]) == 3
    sources = [load_image(tmp_path / "out" / f"source{i}.png").astype(int) for i in (1, 2, 3)]
    assert np.abs(sources[0] - pixels).mean() < 12
    assert (sources[1] == 255).all()
    assert (sources[2] == pixels[..., :1]).all()


def test_what_does_not_fit_the_context_is_said_before_it_is_drawn(miniature, tmp_path):
    done = generate(miniature, tmp_path / "out", prompt="word and word " * 60)
    assert "tokens of the context. Shorten it" in done.complaint
    nearly = generate(miniature, tmp_path / "out", "--mode=direct", "--answer_length=4000")
    assert len(answered(nearly, tmp_path / "out")["rounds"]) == 1


def bad_files(folder: Path) -> dict[str, Path]:
    """Files that are no usable image, by what is wrong with them."""
    whole = folder / "whole.png"
    Image.fromarray(photographs.photograph("coffee")).save(whole)
    files = {name: folder / f"{name}.png" for name in ("missing", "cut", "text", "thin", "empty", "folder")}
    files["cut"].write_bytes(whole.read_bytes()[:2000])
    files["text"].write_text("not a picture at all")
    Image.fromarray(np.zeros((1, 5000, 3), np.uint8)).save(files["thin"])
    files["empty"].touch()
    files["folder"].mkdir()
    return files


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "there is no image file"),
        ("cut", "cannot be read as an image"),
        ("text", "no image"),
        ("thin", "is too long and narrow: 5000x1 pixels"),
        ("empty", "no image"),
        ("folder", "cannot be read as an image"),
    ],
)
def test_a_bad_image_is_one_line_and_nothing_is_written(miniature, tmp_path, kind, words):
    file = bad_files(tmp_path)[kind]
    complaint = generate(miniature, tmp_path / "out", f"--image={file}").complaint
    assert words in complaint and str(file) in complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "the prompt is empty"),
        ("  \n ", "the prompt is empty"),
        ("draw <|image start|> here", "the control token '<|image start|>'"),
        ("all is well </Evaluate>", "the control token '</Evaluate>'"),
        ("<Step 2>now this</Step 2>", "the control token '<Step 2>'"),
    ],
)
def test_a_bad_prompt_is_one_line_and_nothing_is_written(miniature, tmp_path, prompt, words):
    assert words in generate(miniature, tmp_path / "out", prompt=prompt).complaint
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_none_is_one_line(miniature, tmp_path):
    (tmp_path / "file").write_text("no checkpoint")

    def complaint(checkpoint: Path) -> str:
        return commands.run("generate", f"--checkpoint={checkpoint}", "--prompt=x", f"--out={tmp_path}/out").complaint

    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "file", miniature.root / "export"):
        assert complaint(path).startswith(f"no checkpoint in {str(path)!r}. Name a workdir of ivr_jax.train")
    assert "'image_tokenizer', not a backbone" in complaint(miniature.root / "image_tokenizer")
    assert "--checkpoint is missing" in commands.run("generate", "--prompt=x", f"--out={tmp_path}/out").complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["meta", "state"])
def test_a_damaged_checkpoint_is_one_line(miniature, tmp_path, part):
    copy = tmp_path / "rl"
    shutil.copytree(miniature.root / "rl" / "checkpoints", copy / "checkpoints")
    shutil.copytree(miniature.root / "image_tokenizer", tmp_path / "image_tokenizer")
    for file in (copy / "checkpoints" / "2" / part).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    done = commands.run("generate", f"--checkpoint={copy}", "--prompt=x", f"--out={tmp_path}/out", *SHORT)
    assert str(copy) in done.complaint
    assert not (tmp_path / "out").exists()


def test_an_answer_cannot_be_written_where_no_folder_can_be(miniature, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is a file" in generate(miniature, tmp_path / "file").complaint
    assert "cannot write to the folder of --out" in generate(miniature, tmp_path / "file" / "out").complaint
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_answer_cannot_be_written_without_permission(miniature, tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in generate(miniature, tmp_path / "out").complaint


def test_a_process_of_its_own_ends_with_the_line_alone_and_status_2(tmp_path):
    command = [sys.executable, "-m", "ivr_jax.generate", "--checkpoint=none", "--prompt=x", f"--out={tmp_path}/out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error: no checkpoint in 'none'. Name a workdir of ivr_jax.train, or one of its checkpoints/<step> folders.\n"
    )


# Runs that cannot start, or do not belong together

SFT = ("--config.image_tokenizer=ROOT/image_tokenizer", "--config.data.path=ROOT/construct/dataset")
CHECK = ("--config.checkpoint=ROOT/rl",)
UNMIXED = settings(data__length=704, data__mix__direct=0.0, data__practice_share=0.0)


def test_a_run_does_not_go_on_with_another_configuration(miniature):
    root = miniature.root
    before = files_of(root, "sft/*", "sft/checkpoints/*/*", "eval_sft/*")
    command = ("--config=micro_sft", f"--workdir={root / 'sft'}", f"--config.data.path={root}/construct/dataset",
               f"--config.image_tokenizer={root / 'image_tokenizer'}", *TRAIN, *MODEL, f"--config.init={root / 'base'}",
               "--config.data.practice_share=0.5", "--config.seed=5")  # fmt: skip
    assert "seed was 0, is 5" in commands.run("train", *command).complaint
    check = ("--config=micro_evaluate", f"--workdir={root / 'eval_sft'}", f"--config.checkpoint={root / 'rl'}")
    assert "another configuration" in commands.run("evaluate", *check, *OVERRIDES["eval_sft"]).complaint
    assert files_of(root, "sft/*", "sft/checkpoints/*/*", "eval_sft/*") == before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("train", "--config=micro_sft"), "no dataset was named"),
        (("train", "--config=micro_sft", "--config.data.path=/nowhere"), "no image tokenizer was named"),
        (("train", "--config=micro_sft", *SFT, "--config.data.path=/nowhere"), "/nowhere holds no dataset"),
        (("train", "--config=micro_sft", *SFT, "--config.batch=0"), "`batch` is 0"),
        (
            ("train", "--config=micro_sft", *SFT, "--config.batch=3", "--config.grad_accum_steps=2"),
            "a batch of 3 does not",
        ),
        (("train", "--config=micro_sft", *SFT, "--config.model.num_attention_heads=3"), "model.num_attention_heads"),
        (("train", "--config=micro_sft", *SFT, "--config.text_tokenizer=emu"), "unknown text tokenizer 'emu'"),
        (("train", "--config=micro_base", *SFT, *UNMIXED), "data.mix weights nothing"),
        (("train", "--config=micro_base", *SFT[:1], "--config.data.practice_share=2.0"), "data.practice_share is 2.0"),
        (("train", "--config=micro_base", *SFT[:1], "--config.data.practice.level=9"), "no level 9"),
        (("train", "--config=micro_base", *SFT), "a dataset was named"),
        (("train", "--config=micro_rl"), "rl starts from a trained model"),
        (("train", "--config=micro_rl", "--config.init=ROOT/image_tokenizer"), "not a backbone"),
        (("train", "--config=micro_image_tokenizer", "--config.data.source=/nowhere"), "/nowhere holds no dataset"),
        (("train", "--config=micro_image_tokenizer", "--config.data.level=99"), "no level 99"),
        (("train", "--config=micro_image_tokenizer", "--config.optimizer.kind=sgd"), "unknown optimizer.kind 'sgd'"),
        (("evaluate", "--config=micro_evaluate"), "no checkpoint was named"),
        (("evaluate", "--config=micro_evaluate:some"), "not 'some'"),
        (("evaluate", "--config=micro_evaluate", *CHECK, "--config.batch=0"), "`batch` is 0"),
        (("evaluate", "--config=micro_evaluate", *CHECK, *settings(prompts=0, each_split=0)), "config.prompts"),
        (("construct", "--config=micro_construct", "--config.released=/nowhere"), "/nowhere is not a directory"),
        (("construct", "--config=micro_construct", "--config.released=ROOT"), "holds a result.json"),
        (("construct", "--config=micro_construct", "--config.tasks.limit=8"), "8 requests gave"),
        (("construct", "--config=micro_construct", "--config.concurrency=0"), "`concurrency` is 0"),
        (("report",), "holds no stage and no evaluation"),
    ],
    ids=lambda value: value.replace("/", "") if isinstance(value, str) else value[0],
)
def test_what_a_run_cannot_start_from_is_one_line_and_leaves_nothing_to_resume(miniature, tmp_path, command, words):
    named = [word.replace("ROOT", str(miniature.root)) for word in command]
    assert words in commands.run(*named, f"--workdir={tmp_path / 'run'}").complaint
    left = {file.name for file in (tmp_path / "run").glob("*")}
    begun = {"journal", "summary.json"} if "requests gave" in words else set()  # raising the limit goes on from there
    assert left <= {"config.json", "examples", "training_samples"} | begun, left


# A user's own photographs


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder in the released layout; one source is a photograph that is not square."""
    root = tmp_path_factory.mktemp("photographs")
    success = photographs.write_success(root, size=80)
    wide = Image.fromarray(photographs.photograph("astronaut", 160)).crop((0, 20, 160, 120))
    wide.save(success / "portrait_grey" / "original_image.png")
    broken = success / "broken"
    shutil.copytree(success / "cup_alone", broken)
    (broken / "step1_direct_edit_result.png").write_bytes(b"\x89PNG and then nothing")
    return root


def test_a_folder_of_photographs_is_imported_tokenised_trained_on_and_asked_about(miniature, photos, tmp_path):
    imported = commands.succeed(
        "construct", "--config=micro_construct", f"--workdir={tmp_path / 'photos'}",
        f"--config.released={photos / 'success'}",
    )  # fmt: skip
    assert "imported 5; left out 1" in imported and "broken" in imported
    dataset = TrajectoryDataset(tmp_path / "photos" / "dataset")
    shapes = {dataset.image(name).shape for name in dataset.image_names}
    assert {(64, 64, 3), (48, 80, 3), (48, 96, 3)} == shapes

    data = f"--config.data.source={tmp_path / 'photos' / 'dataset'}"
    commands.succeed(
        "train", "--config=micro_image_tokenizer", f"--workdir={tmp_path / 'image_tokenizer'}", *IMAGES, data
    )
    sft = ("train", "--config=micro_sft", f"--workdir={tmp_path / 'sft'}", *TRAIN, *MODEL, "--config.steps=3",
           f"--config.data.path={tmp_path / 'photos' / 'dataset'}",
           f"--config.image_tokenizer={tmp_path / 'image_tokenizer'}")  # fmt: skip
    short = commands.run(*sft, "--config.data.length=192")
    named = ("2 of 5", "192", "'cat_dusk'", "456", "data.length", "too_long=drop")
    assert all(word in short.complaint for word in named)
    assert not (tmp_path / "sft" / "examples").exists()
    longer = settings(data__length=1024, model__max_position_embeddings=1024)
    assert "examples: {'direct': 3, 'multi_step': 1, 'reflection': 1}" in commands.succeed(*sft, *longer)

    photo = tmp_path / "chelsea.jpg"
    Image.fromarray(photographs.skimage.data.chelsea()).save(photo)
    done = commands.run("generate", f"--checkpoint={tmp_path / 'sft'}", f"--out={tmp_path / 'out'}", *SHORT,
                        f"--image={photo}", "--prompt=Mirror the cat.")  # fmt: skip
    answered(done, tmp_path / "out")
    assert load_image(tmp_path / "out" / "final.png").shape == load_image(tmp_path / "out" / "source1.png").shape
    assert load_image(tmp_path / "out" / "source1.png").shape == (48, 80, 3)

    mixed_up = generate(miniature, tmp_path / "other", f"--image_tokenizer={tmp_path / 'image_tokenizer'}")
    assert "was trained with another image tokenizer" in mixed_up.complaint
