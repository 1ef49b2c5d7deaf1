"""What `python -m ivr_jax.inspect` shows of stored samples, token examples, answers and rollouts."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_runs

from ivr_jax import cli
from ivr_jax.checkpoints import system as systems
from ivr_jax.data.examples import make_examples
from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.errors import UserError
from ivr_jax.generate.answer_folder import write_answer
from ivr_jax.inspect import __main__ as command
from ivr_jax.inspect import sources
from ivr_jax.inspect.render import blocks, html_page, visible
from ivr_jax.inspect.tokens import Figures, Inspected, Token, token_text
from ivr_jax.protocol import codec
from ivr_jax.sampling.rollout import Answer
from ivr_jax.training import stored_rollouts


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tiny_runs.prepare(tmp_path_factory.mktemp("inspect"))


@pytest.fixture(scope="module")
def system(runs) -> systems.System:
    """Tokenizers alone: what is stored needs no decoder."""
    images = systems.load_image_codec(runs / "image_tokenizer")
    return systems.System(None, None, systems.text_tokenizer("micro", images.config.n_embed), images, {})


def test_a_sample_is_shown_as_the_trainer_reads_it(runs, system):
    dataset = TrajectoryDataset(runs / "dataset")
    items = list(sources.items(runs / "dataset", system))
    assert len(items) == len(dataset)
    for item, trajectory in zip(items, dataset, strict=True):
        shown = item.inspected(system)
        images = dataset.images(trajectory)
        codes = dict(zip(images, system.image_codec.encode(list(images.values())), strict=True))
        made = codec.encode_trajectory(system.tokenizer, trajectory, codes)
        assert [token.id for token in shown.tokens] == made.tokens.tolist()
        assert [token.loss for token in shown.tokens] == made.loss_mask().tolist()
        assert [token.position for token in shown.tokens] == list(range(len(made.tokens)))
        assert [t.segment for t in shown.tokens[: made.answer_start]] == ["prompt"] * made.answer_start
        for segment in made.segments:
            tokens = shown.tokens[made.answer_start + segment.start : made.answer_start + segment.end]
            assert {token.segment for token in tokens} == {segment.name}
        assert [image.name for image in shown.images] == [f"G{n}" for n in range(1, len(trajectory.rounds) + 1)]
        for image, name in zip(shown.images, trajectory.images, strict=True):
            np.testing.assert_array_equal(image.pixels, system.image_codec.decode([codes[name]])[0])


def test_token_examples_and_answers_show_the_same(runs, system, tmp_path):
    dataset = TrajectoryDataset(runs / "dataset")
    make_examples(dataset, system.tokenizer, system.image_codec.encode, tmp_path / "examples", 512, "test")
    stored = list(sources.items(runs / "dataset", system))
    examples = list(sources.items(tmp_path / "examples", system))
    assert len(examples) == len(stored)
    by_tokens = {item.tokens.tobytes(): item for item in stored}
    for example in examples:
        item = by_tokens[example.tokens.tobytes()]
        assert example.segments == item.segments and (example.loss == item.loss).all()
        assert example.values["mode"] == item.values["mode"]
    trajectory = dataset[1]
    images = dataset.images(trajectory)
    codes = dict(zip(images, system.image_codec.encode(list(images.values())), strict=True))
    made = codec.encode_trajectory(system.tokenizer, trajectory, codes)
    write_answer(tmp_path / "answer", Answer(trajectory, images, made.segments), {})
    (answer,) = sources.items(tmp_path / "answer", system)
    np.testing.assert_array_equal(answer.tokens, made.tokens)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["mode=reflection"], [1, 4]),
        (["mode!=direct", "rounds>=2"], [1, 2, 4, 5]),
        (["key~SAMPLE 3"], [3]),
        (["loss=0"], []),
        (["loss>0", "position<2"], [0, 1]),
        (["passed=no"], []),
    ],
)
def test_filters_choose(runs, system, filters, expected):
    conditions = [sources.parse_filter(text) for text in filters]
    found = [item.values["position"] for item in sources.items(runs / "dataset", system)
             if all(holds(item) for holds in conditions)]  # fmt: skip
    assert found == expected


@pytest.mark.parametrize("text", ["", "mode", "colour=red", "rounds=many", "prompt>5", "= 3"])
def test_a_filter_that_is_not_understood(text):
    with pytest.raises(UserError):
        sources.parse_filter(text)


def test_what_is_not_there(runs, system, tmp_path):
    for path, options in ((tmp_path, {}), (runs / "dataset", {"first": 99}), (runs / "dataset", {"key": "nobody"})):
        with pytest.raises(UserError):
            list(sources.items(path, system, **options))


def store_rollouts(run: Path, system, items) -> list[stored_rollouts.StoredAnswer]:
    """One RL step's answers, made of stored samples: a reward of 1, 0, 1, ... and as advantage 1 or -1."""
    answers = []
    for number, item in enumerate(items):
        reward, count = float(number % 2 == 0), len(item.tokens) - item.answer_start
        answers.append(
            stored_rollouts.StoredAnswer(
                item.values["prompt"], item.values["key"], number // 3, number % 3, item.tokens, item.answer_start,
                -np.arange(count, dtype=np.float32), np.full(count, 2 * reward - 1, np.float32),
                {"total": reward, "advantage": 2 * reward - 1}, item.values["mode"], tuple(item.segments), True,
                item.values["rounds"],
            )  # fmt: skip
        )
    answers[-1] = dataclasses.replace(answers[-1], mode=stored_rollouts.INVALID, segments=(), error="cut.", rewards={})
    stored_rollouts.write_answers(run / "gallery/step_000020.npz", answers)
    return answers


def test_rollouts_of_a_finished_run_are_shown_with_what_the_update_computed(runs, system, tmp_path):
    written = store_rollouts(tmp_path, system, list(sources.items(runs / "dataset", system)))
    (tmp_path / "gallery/step_000010.npz").write_bytes(b"an older step")
    items = list(sources.items(tmp_path, system))
    assert len(items) == len(written) == 6
    for item, answer in zip(items, written, strict=True):
        shown = item.inspected(system)
        assert [token.id for token in shown.tokens] == answer.tokens.tolist()
        rest = shown.tokens[answer.answer_start :]
        assert [token.log_prob for token in rest] == answer.log_probs.tolist() and rest[-1].entropy is None
        assert {token.advantage for token in rest} == set(answer.advantages.tolist())
        assert all(token.log_prob is None and not token.loss for token in shown.tokens[: answer.answer_start])
        assert [s.name for s in item.segments] == [s.name for s in answer.segments]
        assert item.values["mode"] == answer.mode
    assert items[-1].inspected(system).facts["error"] == "cut."
    more = items[0].inspected(system, Figures(log_prob=np.ones(9999), entropy=np.full(9999, 0.25)))
    assert {t.entropy for t in more.tokens[items[0].answer_start :]} == {0.25}
    assert more.tokens[items[0].answer_start].log_prob == 0  # as it was sampled, not as a model says now


@pytest.mark.parametrize(("condition", "expected"), [("total>0.5", [0, 2, 4]), ("advantage<0", [1, 3]),
                                                     ("mode=invalid", [5])])  # fmt: skip
def test_rollouts_are_chosen_by_their_rewards(runs, system, tmp_path, condition, expected):
    store_rollouts(tmp_path, system, list(sources.items(runs / "dataset", system)))
    holds = sources.parse_filter(condition)
    path = tmp_path / "gallery/step_000020.npz"
    assert [item.values["position"] for item in sources.items(path, system) if holds(item)] == expected


@pytest.mark.parametrize("damage", ["empty", "cut", "other", "lengths", "missing", "no rollouts"])
def test_rollouts_that_cannot_be_read(runs, system, tmp_path, damage):
    store_rollouts(tmp_path, system, list(sources.items(runs / "dataset", system)))
    path = tmp_path / "gallery/step_000020.npz"
    content, source = path.read_bytes(), path
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "other":
        np.savez(path, tokens=np.array([{"a": 1}], object))  # would need unpickling
    elif damage == "lengths":
        with np.load(path) as stored:
            arrays = dict(stored)
        np.savez(path, **(arrays | {"log_probs": arrays["log_probs"][:-1]}))
    else:
        path.unlink()
        source = path if damage == "missing" else tmp_path
    with pytest.raises(UserError):
        list(sources.items(source, system))


def test_tokens_say_what_they_are(system):
    vocab = system.tokenizer.vocab
    assert token_text(system.tokenizer, vocab.visual_start + 3) == "v3"
    assert token_text(system.tokenizer, vocab.boi) == "<BOI>"
    assert token_text(system.tokenizer, ord("a")) == "a"
    assert visible("a\x1b[2J\n\u202e") == "a\\x1b[2J\\n\\u202e"


def test_the_page_shows_texts_as_texts_and_every_token(system):
    tokens = tuple(Token(i, 65 + i, text, "E1", i > 0, -0.5, 1.25) for i, text in enumerate(["<b>", "&", "\x07"]))
    page = html_page("<i>", [Inspected("a <b> title", {"mode": "x"}, tokens, ())])
    assert "<b>" not in page.split("<main>")[1] and "&lt;b&gt;" in page and "\\x07" in page
    assert len(re.findall(r"<tr class=\"E", page)) == 3 and page.count("1.250") == 3
    assert "http://" not in page and "https://" not in page


def test_an_image_in_the_terminal_has_its_colours():
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2] = (255, 0, 0)
    shown = blocks(pixels)
    assert shown.plain.count("▀") == 8
    assert str(shown.spans[0].style) == "rgb(255,0,0) on rgb(255,0,0)"


def run(*words: str) -> None:
    call = cli.parse(["inspect", *words], config=False, workdir=False, add_flags=command.add_flags)
    command.main(call)


def test_the_command_with_the_model_of_the_package(tmp_path, capsys):
    run("--rollout", "--task=3", "--group_size=2")
    shown = capsys.readouterr().out
    assert "member 1" in shown and "member 2" in shown and "member 3" not in shown
    assert all(word in shown for word in ("log_prob", "entropy", "advantage", "outcome", "bonus"))
    page = tmp_path / "rollout.html"
    run("--rollout", "--task=3", "--group_size=2", f"--html={page}")
    assert page.read_text().count("member ") == 2
    with pytest.raises(UserError):
        run("--rollout", "--source=x")
    with pytest.raises(UserError):
        run()


def test_figures_are_those_of_the_sampler(monkeypatch):
    """The log-probabilities that teacher forcing gives are those that the tokens were sampled with."""
    from ivr_jax.inspect import rollouts

    seen = []
    compute = rollouts.model_figures

    def kept(*arguments):
        figures = compute(*arguments)
        seen.append(figures.log_prob.copy())
        return figures

    monkeypatch.setattr(rollouts, "model_figures", kept)
    members = rollouts.inspect_group(systems.load("micro"), task=3, group_size=2, seed=0)
    for member, forced in zip(members, seen, strict=True):
        answer = [token for token in member.tokens if token.log_prob is not None]
        sampled = np.array([token.log_prob for token in answer])
        chosen = sampled != 0  # forced tokens have no probability of their own
        assert chosen.sum() > 20
        np.testing.assert_allclose(sampled[chosen], forced[chosen], atol=2e-3)
        entropies = np.array([token.entropy for token in answer])
        assert (entropies >= -1e-6).all() and entropies.max() > 0.1
        assert len({token.advantage for token in answer}) == 1
    advantages = [member.tokens[-1].advantage for member in members]
    assert abs(sum(advantages)) < 1e-4
