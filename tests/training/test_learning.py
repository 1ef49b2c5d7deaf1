"""Every stage learns: on one batch that it sees again and again the loss falls by a stated factor."""

from __future__ import annotations

import dataclasses
import functools
import logging as std_logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from answer_tokens import trajectory
from ml_collections import ConfigDict
from tiny_model import CONFIG, TOKENIZER, noisy_params, requests, system
from tiny_runs import IMAGES, ROOT

from ivr_jax import sharding
from ivr_jax.checkpoints.store import Checkpointer
from ivr_jax.config import load_config
from ivr_jax.data.store import TrajectoryDataset, TrajectoryWriter
from ivr_jax.errors import UserError
from ivr_jax.images import image_name
from ivr_jax.models import image_tokenizer as model_lib
from ivr_jax.protocol import codec
from ivr_jax.protocol.grammar import GrammarOptions
from ivr_jax.training import grpo, image_tokenizer, loop
from ivr_jax.training.losses import GrpoOptions
from ivr_jax.training.prompts import Prompt
from ivr_jax.training.rl_options import RLOptions
from ivr_jax.training.scoring import Scored
from ivr_jax.training.sft import held_out_loss, make_step, selective_loss
from ivr_jax.training.state import TrainState

START = TOKENIZER.vocab.visual_start
LOSS = load_config(str(ROOT / "configs/micro_image_tokenizer.py")).loss


def state_of(params, optimizer) -> TrainState:
    params = jax.tree.map(jnp.copy, params)
    return TrainState(params, optimizer.init(params))


# -- supervised fine-tuning -------------------------------------------------------------------------------------------


def sft_batch(rows: int = 2, length: int = 64) -> dict[str, np.ndarray]:
    """Rows of one direct answer each."""
    batch = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["loss"] = np.zeros((rows, length), np.uint8)
    for row in range(rows):
        answer = trajectory([], [True])
        codes = {name: np.array([[row, 3]]) for name in answer.images}
        encoded = codec.encode_trajectory(TOKENIZER, answer, codes)
        end = len(encoded.tokens)
        batch["tokens"][row, :end], batch["loss"][row, :end] = encoded.tokens, encoded.loss_mask()
        batch["segment_ids"][row, :end], batch["positions"][row, :end] = 1, np.arange(end)
    return batch


def test_sft_learns_a_batch_and_its_held_out_loss_is_the_loss_of_what_it_is_given():
    """From random weights the mean loss a token falls to less than a fifth in 40 steps."""
    optimizer, batch = optax.adam(1e-2), sft_batch()
    step = make_step(CONFIG, optimizer, 64, 1, START)
    state, losses = state_of(noisy_params(), optimizer), []
    for number in range(40):
        state, metrics = step(state, batch, number)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < losses[0] / 5
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    measured = held_out_loss(CONFIG, 64, START, mesh, [batch, batch])(state, 40)
    total, sums = selective_loss(CONFIG, state.params, batch, 64, START)
    assert measured["held_out_loss"] == pytest.approx(float(total / sums["loss"][1]), rel=1e-5)
    assert measured["held_out_image_loss"] < 1.0


# -- RL ---------------------------------------------------------------------------------------------------------------


def test_rl_makes_answers_with_an_advantage_likelier_and_the_others_less_likely():
    """Ten updates on one rollout: the log-probability of half of the answers rises, that of the other half falls."""
    grammar = GrammarOptions(modes=("direct", "reflection"), max_reflections=1, text_cap=2)
    options = RLOptions(grammar, 4, 72, 8, (128,), 64, num_iterations=10, grpo=GrpoOptions(clip_low=9, clip_high=9))
    params = noisy_params()
    learner = grpo.Trainer(system(params), None, options, optax.adam(3e-3))
    prompts = [Prompt(*pair) for pair in zip(*requests(2), strict=True)]
    rollout = learner.collect_rollout(params, prompts, 0)
    used, gains = np.ones((2, 4), bool), np.array([[1, -1, 1, -1]] * 2, np.float32)
    scored = Scored([], {}, used, used, np.zeros((2, 4)), gains, used)
    state, metrics = learner.learn(state_of(params, learner.optimizer), rollout, scored, 0, on_policy=True)
    [batch] = learner.prepare(rollout, scored)
    moved = ((learner._logprobs(state.params, batch).log_probs - batch["old"]) * batch["mask"]).sum(1)
    liked = np.asarray(batch["advantages"]).max(1) > 0
    assert np.asarray(moved)[liked].mean() > 1 > -1 > np.asarray(moved)[~liked].mean()
    assert float(metrics["max_ratio_deviation"]) < 1e-4 and float(metrics["grad_norm"][1]) == 10


# -- image tokenizer --------------------------------------------------------------------------------------------------


@functools.cache
def boards(count: int = 8) -> np.ndarray:
    """uint8 [count, 64, 64, 3]: cells of 16 pixels in one of four colours."""
    colours = np.array([[230, 40, 40], [40, 60, 220], [250, 250, 250], [20, 160, 60]], np.uint8)
    cells = np.random.default_rng(0).integers(0, 4, (count, 4, 4))
    return np.repeat(np.repeat(colours[cells], 16, 1), 16, 2)


def test_the_image_tokenizer_learns_in_both_phases():
    """The squared error falls by half without quantisation, and again with it from the placed codebook."""
    optimizer = optax.adam(1e-2)
    steps = image_tokenizer.make_steps(IMAGES, optimizer, ConfigDict(LOSS.to_dict() | {"noise": 0.1, "shuffle": 0.0}))
    params = model_lib.init_params(IMAGES, jax.random.key(0))
    state, losses = TrainState(params, optimizer.init(params)), {"continuous": [], "quantised": []}
    for number in range(30):
        state, metrics = steps.continuous(state, boards(), jax.random.key(number))
        losses["continuous"].append(float(metrics["loss"]))
    state = steps.place_codebook(state, boards())
    for number in range(30):
        state, metrics = steps.quantised(state, boards(), jax.random.key(number))
        losses["quantised"].append(float(metrics["loss"]))
    assert losses["continuous"][-1] < losses["continuous"][0] / 2
    assert losses["quantised"][-1] < losses["quantised"][0] and np.isfinite(losses["quantised"]).all()
    assert metrics["codes_in_batch"] >= 4


def test_spherical_k_means_finds_directions_of_any_length():
    """Three bundles of directions: a code in the middle of each, all as long as the cells are on average."""
    rng = np.random.default_rng(0)
    centres = np.eye(3, 5)
    cells = np.concatenate([c + 0.05 * rng.normal(size=(20, 5)) for c in centres]) * rng.uniform(0.5, 2, (60, 1))
    codes = np.asarray(image_tokenizer.spherical_k_means(jnp.asarray(cells, jnp.float32), 3))
    lengths = np.linalg.norm(codes, axis=1)
    np.testing.assert_allclose(lengths, np.linalg.norm(cells, axis=1).mean(), rtol=1e-4)
    likeness = (codes / lengths[:, None]) @ centres.T
    assert sorted(likeness.argmax(1)) == [0, 1, 2] and likeness.max(1).min() > 0.99


def dataset_of(folder, images) -> str:
    answer = trajectory([], [True])
    with TrajectoryWriter(folder) as writer:
        for number, pixels in enumerate(images):
            [round_] = answer.rounds
            name = image_name(pixels)
            sample = dataclasses.replace(answer.sample, key=f"sample {number}")
            rounds = (dataclasses.replace(round_, image=name),)
            writer.add(dataclasses.replace(answer, sample=sample, rounds=rounds), {name: pixels})
    return str(folder)


def test_held_out_images_are_no_training_images(tmp_path):
    path = dataset_of(tmp_path / "dataset", boards(8))
    source, held_out = image_tokenizer.image_sources(ConfigDict({"source": path}), 0, 64, 4)
    assert len(source) + len(held_out) == len(TrajectoryDataset(path).image_names) == 8 and len(held_out) == 1
    trained = {source[i].tobytes() for i in range(len(source))}
    assert len(trained) == 7 and all(image.tobytes() not in trained for image in held_out)
    world = ConfigDict({"source": "world", "level": 0, "size": 20})
    source, held_out = image_tokenizer.image_sources(world, 0, 64, 4)
    trained = {source[i].tobytes() for i in range(20)}
    assert len(held_out) == 4 and all(image.tobytes() not in trained for image in held_out)
    with pytest.raises(UserError):
        image_tokenizer.image_sources(ConfigDict({"source": dataset_of(tmp_path / "one", boards(1))}), 0, 64, 4)


def tokenizer_config() -> ConfigDict:
    config = load_config(str(ROOT / "configs/micro_image_tokenizer.py"))
    config.update({"steps": 4, "continuous_steps": 2, "codebook_images": 8, "batch": 4, "eval_images": 4})
    config.model.update({"ch": 4, "ch_mult": (1, 1), "z_channels": 4, "n_embed": 8, "embed_dim": 4})
    config.optimizer.kind = "adamw"  # Muon compiles for long
    config.data.size = 20
    return config


def test_the_image_tokenizer_resumes_exactly_across_its_phases(tmp_path):
    """Stopped after two of four steps, where the codebook is about to be placed."""
    mesh = sharding.make_mesh({}, jax.devices()[:1])

    def run(name: str, steps: int) -> TrainState:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        with jax.set_mesh(mesh):
            stage = image_tokenizer.build(tokenizer_config(), folder, mesh)
            return loop.run(stage, folder, loop.Plan(steps, 2, 2, 1), name)

    straight = run("straight", 4)
    run("stopped", 2)
    resumed = run("stopped", 4)
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


# -- the loop ---------------------------------------------------------------------------------------------------------


class Numbers:
    """A data iterator that counts."""

    def __init__(self):
        self.at = 0

    def __next__(self):
        self.at += 1
        return self.at

    def get_state(self):
        return self.at

    def set_state(self, state):
        self.at = state


def test_a_checkpointer_leaves_the_verbosity_of_the_log_alone(tmp_path):
    absl_logger, before = std_logging.getLogger("absl"), logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    try:
        Checkpointer(tmp_path).close()
        assert logging.get_verbosity() == logging.INFO and absl_logger.isEnabledFor(20)
    finally:
        logging.set_verbosity(before)


def test_an_alarm_closes_log_checkpointer_and_stage(tmp_path):
    """After NaN in step 2: the stage is closed once, and the saved step can be read by the next run at once."""
    closed = []

    def step(state, batch, number):
        return state, {"loss": np.float32("nan") if number == 2 else np.float32(1)}

    def stage(fails: bool) -> loop.Stage:
        chosen = step if fails else lambda state, batch, number: (state, {"loss": np.float32(1)})
        return loop.Stage({"x": jnp.zeros(3)}, Numbers(), chosen, {"kind": "none"}, close=lambda: closed.append(1))

    plan = loop.Plan(4, 1, 2, 1)
    with pytest.raises(UserError):
        loop.run(stage(True), tmp_path, plan, "run")
    assert closed == [1]
    loop.run(stage(False), tmp_path, plan, "run")
    assert closed == [1, 1] and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
