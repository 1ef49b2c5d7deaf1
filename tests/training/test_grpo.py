"""RL steps of a tiny model: a judge over a real socket that fails in three calls of ten, rollouts ahead, gallery."""

from __future__ import annotations

import asyncio
import collections
import copy
import dataclasses
import functools
import pathlib
import re
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from openai_service import Behaviour, OpenAIService, serving
from tiny_model import CONFIG, noisy_params, requests, system

from ivr_jax.config import load_config
from ivr_jax.data.pipeline import Indexed
from ivr_jax.errors import UserError
from ivr_jax.evaluate import sight
from ivr_jax.evaluate.benchmarks import held_out
from ivr_jax.interfaces import ServiceFailed
from ivr_jax.protocol.grammar import GrammarOptions
from ivr_jax.rewards.functions import RewardOptions
from ivr_jax.rewards.judge_service import Check, JudgeOptions, JudgeService, same
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.sampling.layout import LayoutOptions, RolloutLayout
from ivr_jax.training import grpo, stored_rollouts
from ivr_jax.training.judge_config import JudgeRecords, make_analyzer, make_judge
from ivr_jax.training.monitor import Monitor, MonitorOptions
from ivr_jax.training.prompts import Prompt, Tasks
from ivr_jax.training.rl_options import RLOptions
from ivr_jax.training.scoring import score_rollout
from ivr_jax.training.state import TrainState
from ivr_jax.training.throughput import Throughput
from ivr_jax.trajectory import AxisVerdict, Evaluation, Sample

PARAMS, GROUP = noisy_params(), 4
PROMPTS = [Prompt(*pair) for pair in zip(*requests(12), strict=True)]
ONE = Indexed(lambda i: PROMPTS[0], 1)


class LocalJudge:
    """Likes images of code 3."""

    async def evaluate(self, sample, images, image):
        score = 1 + 4 * float((image[::16, ::16, 0] == 30).mean())
        return Evaluation(*(AxisVerdict(score > 2, "seen", score) for _ in range(4)))

    async def judge_reasoning(self, sample, images, kind, text, previous):
        return 0.5


@functools.cache
def trainer() -> grpo.Trainer:
    grammar = GrammarOptions(modes=("direct", "reflection"), max_reflections=1, text_cap=2)
    options = RLOptions(grammar, GROUP, 72, 8, (128,), 64, seed=2, overlap=1)
    return grpo.Trainer(system(PARAMS), JudgeService(same(LocalJudge())), options, optax.sgd(0.05))


def like(overlap: int = 0, steps: int = 1, **attributes) -> grpo.Trainer:
    """The same trainer, its compiled functions included, with something changed."""
    other = copy.copy(trainer())
    other.options = dataclasses.replace(other.options, overlap=overlap, steps=steps)
    other.monitor = Monitor(MonitorOptions(), other.options.grammar.modes)
    other._pending = collections.deque()
    for name, value in attributes.items():
        setattr(other, name, value)
    return other


def fresh_state() -> TrainState:
    params = jax.tree.map(jnp.copy, PARAMS)
    return TrainState(params, trainer().optimizer.init(params))


def tasks(step: int) -> Tasks:
    batch = lambda k: tuple(PROMPTS[2 * k % 12 : 2 * k % 12 + 2])  # noqa: E731
    return Tasks(batch(step), tuple(batch(step + later) for later in (1, 2)))


def same_bits(a, b) -> bool:
    return all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


# -- a judge that fails -----------------------------------------------------------------------------------------------


def section(url: str, **changes):
    config = load_config("micro_rl").judge
    config.outcome.update(
        {"kind": "openai", "base_url": url, "model": "judge", "key_variable": "", "timeout": 0.4, "tries": 2,
         "first_wait": 0.01, "longest_wait": 0.1, "breaker_failures": 10_000} | changes
    )  # fmt: skip
    return config


class Counted:
    """An analyzer that notes, for itself, which questions failed."""

    def __init__(self, analyzer):
        self.analyzer, self.failed, self.asked = analyzer, 0, 0

    async def _note(self, call):
        self.asked += 1
        try:
            return await call
        except ServiceFailed:
            self.failed += 1
            raise

    async def evaluate(self, *args):
        return await self._note(self.analyzer.evaluate(*args))

    async def judge_reasoning(self, *args):
        return await self._note(self.analyzer.judge_reasoning(*args))


@pytest.fixture(scope="module")
def rollout():
    return trainer().collect_rollout(PARAMS, PROMPTS[:4], 0)


def verdicts_over(url: str, rollout, fault_rate: float, service: OpenAIService, **settings):
    service.behaviour.fault_rate = fault_rate
    analyzer = Counted(make_analyzer(section(url, **settings), "outcome", ONE, JudgeRecords()))
    return JudgeService(same(analyzer)).submit(rollout.judgeable()).result(), analyzer


def test_faults_over_http_differ_from_none_only_in_the_members_that_are_missing(rollout):
    """Time-outs, 500, 429, prose, NaN, 7 of 5, cut connections and silence, in three calls of ten, with one retry."""
    service = OpenAIService(Behaviour(seed=4, hang=0.6))
    with serving(service) as url:
        clean, _ = verdicts_over(url, rollout, 0.0, service, timeout=60.0)  # however busy the machine is
        assert not service.log.faults and all(j.present for j in clean.judged)
        faulty, counted = verdicts_over(url, rollout, 0.3, service)
    assert len(service.log.faults) > 5
    usage = faulty.usage
    assert usage.missing.total() == counted.failed > 0 and usage.calls.total() == counted.asked
    assert usage.reasons.total() == counted.failed
    present = np.array([j.present for j in faulty.judged])
    assert 0 < present.sum() < len(present)
    for with_faults, without in zip(faulty.judged, clean.judged, strict=True):
        if with_faults.present:
            assert with_faults == without
    options = RewardOptions()
    a, b = score_rollout(rollout, clean.judged, options), score_rollout(rollout, faulty.judged, options)
    np.testing.assert_array_equal(b.present.reshape(-1), present)
    np.testing.assert_array_equal(np.where(b.present, a.components["total"], 0), b.components["total"])
    assert not b.used[~b.present].any() and not b.advantages[~b.present].any() and not b.bonus[~b.present].any()
    for group in range(len(b.present)):
        here = b.present[group]
        if here.all():
            np.testing.assert_array_equal(a.advantages[group], b.advantages[group])
        elif here.sum() < options.min_valid:
            assert not b.used[group].any()
        else:  # statistics of those that are there, and of nobody else
            rewards = (b.components["total"] + b.bonus)[group][here]
            spread = rewards.std(ddof=1)
            expected = (rewards - rewards.mean()) / (spread + 1e-6) if spread > 1e-6 else np.zeros_like(rewards)
            np.testing.assert_allclose(b.advantages[group][here], expected, atol=1e-3)


def test_training_finishes_with_faults_and_stops_when_there_is_nothing_else(tmp_path):
    service = OpenAIService(Behaviour(fault_rate=0.3, hang=0.6))
    with serving(service) as url:
        learner = like(judge=make_judge(section(url), RewardOptions(), ONE, tmp_path))
        state = fresh_state()
        for step in range(3):
            state, metrics = learner.step(state, tasks(step), step)
            assert metrics["missing"] == 8 - metrics["reward"][1] and metrics["judge_tokens"] > 0
        assert all(np.isfinite(leaf).all() for leaf in map(np.asarray, jax.tree.leaves(state)))
        service.behaviour.status = 500
        learner.monitor = Monitor(MonitorOptions(missing_window=16), learner.options.grammar.modes)
        with pytest.raises(UserError, match="monitor.max_missing"):
            for step in range(3, 6):
                state, metrics = learner.step(state, tasks(step), step)


def test_prompts_that_are_not_of_the_world_need_another_judge():
    photographs = Indexed(lambda i: Prompt(Sample("cat", "Make it dusk.", ("cat.png",)), {}), 1)
    config = load_config("micro_rl").judge
    with pytest.raises(UserError, match="cat"):
        make_judge(config, RewardOptions(), photographs, pathlib.Path())
    config.outcome.update({"kind": "openai", "model": "judge", "key_variable": "", "base_url": "http://127.0.0.1:9/v1"})
    assert isinstance(make_judge(config, RewardOptions(), photographs, pathlib.Path()), JudgeService)
    config.reasoning.kind = "oracle"
    with pytest.raises(UserError, match="judge.reasoning.kind"):
        make_judge(config, RewardOptions(), photographs, pathlib.Path())


# -- rollouts drawn ahead ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [1, 2])
def test_overlapped_runs_are_so_many_updates_behind_and_resume_bit_for_bit(ahead):
    steps = ahead + 2
    state = grpo.OverlapState.begin(fresh_state(), ahead)
    learner, states, rows, sampled = like(overlap=ahead, steps=steps), [state], [], []

    def collect_rollout(params, prompts, step):
        sampled.append((step, params))
        return grpo.Trainer.collect_rollout(learner, params, prompts, step)

    learner.collect_rollout = collect_rollout
    for step in range(steps):
        state, metrics = learner.step(jax.tree.map(jnp.copy, state), tasks(step), step)
        states.append(state)
        rows.append(metrics)
    assert not learner._pending  # nothing is drawn for a step that will not come
    assert [step for step, _ in sampled] == list(range(steps))
    for step, params in sampled:
        assert same_bits(params, states[max(0, step - ahead)].params)
    assert len(states[1].previous) == ahead and same_bits(states[steps].previous[-1], states[steps - 1].params)
    assert float(rows[0]["max_ratio_deviation"]) < 1e-3 < float(rows[steps - 1]["max_ratio_deviation"])

    plain = like()
    first, _ = plain.step(fresh_state(), tasks(0), 0)
    assert same_bits(first.params, states[1].params)  # the first step is on-policy either way

    again = like(overlap=ahead, steps=steps)  # another process, after the first checkpoint
    state = jax.tree.map(jnp.copy, states[1])
    for step in range(1, steps):
        state, metrics = again.step(state, tasks(step), step)
        assert float(metrics["loss"][0]) == float(rows[step]["loss"][0])
    assert same_bits(state, states[steps])


def test_answers_that_the_judge_failed_at_are_replaced_by_new_ones_of_the_same_policy():
    class Failing(LocalJudge):
        """Fails at every third question of the first rollout's, and then no more."""

        asked = 0

        async def evaluate(self, *args):
            self.asked += 1
            if self.asked <= 8 and self.asked % 3 == 0:
                raise ServiceFailed("busy.", "")
            return await super().evaluate(*args)

    rows = {}
    for refill in (0, 2):
        learner = like(judge=JudgeService(same(Failing())))
        learner.options = dataclasses.replace(
            learner.options, grpo=dataclasses.replace(learner.options.grpo, refill=refill)
        )
        _, rows[refill] = learner.step(fresh_state(), tasks(0), 0)
    assert rows[0]["missing"] > 0 == rows[2]["missing"] and "refilled" not in rows[0]
    assert rows[2]["refilled"] == rows[0]["missing"]
    assert rows[2]["judge_calls"] > rows[0]["judge_calls"]
    assert float(rows[2]["max_ratio_deviation"]) < 1e-3  # what was learnt from is what this policy sampled
    assert rows[2]["reward"][1] == 2 * GROUP


@pytest.mark.parametrize("others, moved", [(0, 1), (3, 2)])
def test_weights_for_new_answers_are_moved_by_all_processes_also_by_one_that_misses_nothing(
    monkeypatch, others, moved
):
    """Moving them is a program of all processes: one that left it out would leave the others waiting."""
    learner, calls = like(), []
    learner.options = dataclasses.replace(learner.options, grpo=dataclasses.replace(learner.options.grpo, refill=2))

    class Counted(RolloutLayout):
        def __call__(self, params):
            calls.append(1)
            return super().__call__(params)

    learner.placement = learner.placement._replace(layout=Counted(CONFIG, learner.placement.mesh))
    monkeypatch.setattr(grpo.distributed, "gather", lambda value: [value, others])  # what another process says
    _, metrics = learner.step(fresh_state(), tasks(0), 0)
    assert metrics["missing"] == 0 and len(calls) == moved


class Patient(LocalJudge):
    """Says nothing before the next rollout has begun, and notes whether it had not ended by then."""

    def __init__(self):
        self.begun, self.ended, self.early = threading.Event(), threading.Event(), 0

    async def evaluate(self, *args):
        if not await asyncio.to_thread(self.begun.wait, 20):
            raise ServiceFailed("nothing was drawn meanwhile.", "")
        self.early += not self.ended.is_set()
        return await super().evaluate(*args)


def test_the_next_rollout_is_drawn_while_the_last_one_is_judged():
    judge = Patient()
    learner = like(overlap=1, steps=2, judge=JudgeService(same(judge)))

    def collect_rollout(params, prompts, step):
        if step:
            judge.begun.set()
            deadline = time.monotonic() + 20
            while not judge.early and time.monotonic() < deadline:  # a judgement arrives while this draws
                time.sleep(0.01)
        rollout = grpo.Trainer.collect_rollout(learner, params, prompts, step)
        if step:
            judge.ended.set()
        return rollout

    learner.collect_rollout = collect_rollout
    state = grpo.OverlapState.begin(fresh_state(), 1)
    _, metrics = learner.step(state, tasks(0), 0)
    assert metrics["missing"] == 0 and judge.early > 0


def test_log_probabilities_that_do_not_fit_stop_a_resumed_run(rollout):
    learner = like()
    learner.check_logprobs(PARAMS, rollout)
    with pytest.raises(RuntimeError):
        learner.check_logprobs(noisy_params(seed=1), rollout)


def test_the_ratio_is_checked_before_the_first_update_even_where_the_first_minibatch_is_empty(monkeypatch):
    learner, checked = like(), []
    learner.options = dataclasses.replace(learner.options, num_iterations=2, num_minibatches=3)
    monkeypatch.setattr(grpo, "split_groups", lambda *_: [[], [1], [2]])
    monkeypatch.setattr(grpo, "left_out", lambda *_: 0.0)
    learner.prepare = lambda rollout, scored, answers, behaviour: list(answers)

    def update(state, batches, check_ratio, skipped):
        checked.append((batches, check_ratio))
        return state, {"skipped_updates": float(not batches)}

    learner.update = update
    for on_policy in (True, False):
        _, metrics = learner.learn(fresh_state(), None, None, 0, on_policy)
        assert metrics["skipped_updates"] == 2
    expected = [([], False), ([1], True), ([2], False), *([(part, False) for part in ([], [1], [2])])]
    assert checked == [*expected, *([(part, False) for part in ([], [1], [2])] * 2)]


# -- what a run says of itself ----------------------------------------------------------------------------------------


class Indifferent(LocalJudge):
    async def evaluate(self, sample, images, image):
        return Evaluation(*(AxisVerdict(True, "seen", 4.0) for _ in range(4)))


def test_a_judge_that_sees_no_difference_raises_the_alarms():
    monitor = Monitor(MonitorOptions(window=2), ("direct", "reflection"))
    judge = JudgeService(same(Indifferent()), JudgeOptions(RewardOptions(bonus_weight=0.0)))
    learner = like(judge=judge, monitor=monitor)
    learner.options = dataclasses.replace(
        learner.options, reward=RewardOptions(step_weight=0.0, format_weight=0.0, bonus_weight=0.0)
    )
    state, rows = fresh_state(), []
    for step in range(2):
        state, metrics = learner.step(state, tasks(step), step)
        rows.append(metrics)
    assert not rows[0]["alarm_zero_variance"] and rows[1]["alarm_zero_variance"] and rows[1]["alarm_zero_gradient"]
    assert rows[1]["frac_groups_nonzero_std"] == (0.0, 2.0) and not rows[1]["alarm_calibration_drift"]
    for after, before in zip(jax.tree.leaves(state.params), jax.tree.leaves(PARAMS), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-6)  # nothing to learn, nothing learnt


def documented_scalars() -> set[str]:
    """Names in the table "What is logged" of docs/how-to/rl.md."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "how-to" / "rl.md").read_text()
    table = text[text.index("## What is logged") :].split("\n\n")[2]
    return {name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[2])}


def test_every_scalar_that_the_docs_list_is_written_and_no_other():
    rewards = RewardOptions(intermediate="images", reflection_weight=0.2, step_weight=0.0)
    again = Check(LocalJudge(), repeats=2, held_out=Indifferent(), answers=2)
    judge = JudgeService(same(LocalJudge()), JudgeOptions(rewards, check=again), (JudgeRecords().totals,))
    placement = trainer().placement
    layout = RolloutLayout(CONFIG, placement.mesh, LayoutOptions(dtype="bfloat16"))
    measured = []

    def probe(policy, step):
        assert step == 1
        measured.append((policy.config, {str(leaf.dtype) for leaf in jax.tree.leaves(policy.params)}))
        return dict.fromkeys((*sight.METRICS, *held_out.METRICS), 0.5)

    learner = like(judge=judge, placement=placement._replace(layout=layout))
    learner.probes = (grpo.Probe(1, probe),)
    engine = EngineOptions(slots=2, window=3, speculate=True)
    learner.options = dataclasses.replace(
        learner.options, num_iterations=2, check_every=1, reward=rewards, engine=engine
    )
    _, written = learner.step(fresh_state(), tasks(0), 0)
    exact = like(judge=JudgeService(same(LocalJudge())))
    exact.options = dataclasses.replace(exact.options, engine=EngineOptions(window=4, speculate=True))
    _, more = exact.step(fresh_state(), tasks(1), 0)
    assert float(more["max_ratio_deviation"]) < 1e-3  # speculation samples from the policy that learns
    names = {name for row in (written, more) for name in row if not name.startswith("work_")}
    speed = Throughput(peak=1.0).row(dict.fromkeys(written, 1.0), 1.0)  # what the loop makes of the rest
    assert names | set(speed) == documented_scalars()
    assert measured == [(layout.config, {"bfloat16"})]  # once, with the weights that answers are sampled with


# -- for people -------------------------------------------------------------------------------------------------------


def test_a_gallery_shows_whole_groups_with_their_rewards(tmp_path):
    learner = like(gallery=tmp_path / "gallery")
    learner.options = dataclasses.replace(learner.options, gallery_every=2, gallery_answers=5)
    state = fresh_state()
    for step in range(2):
        state, _ = learner.step(state, tasks(step), step)
    [page] = (tmp_path / "gallery").glob("*.html")
    assert page.name == "step_000002.html"
    text = page.read_text()
    assert all(f"member {m}" in text for m in range(1, GROUP + 1)) and "advantage" in text and "data:image/png" in text
    answers = stored_rollouts.read_answers(tmp_path / "gallery/step_000002.npz")
    assert [(a.group, a.member) for a in answers] == [(0, member) for member in range(GROUP)]
    assert {a.prompt for a in answers} == {tasks(1).now[0].sample.prompt}
    for answer in answers:
        assert len(answer.tokens) - answer.answer_start == len(answer.log_probs) == len(answer.advantages)
        assert (answer.log_probs <= 0).all() and (answer.log_probs < 0).any()
        np.testing.assert_allclose(answer.advantages, answer.rewards["advantage"], rtol=1e-6)
        assert answer.mode != stored_rollouts.INVALID and answer.segments[-1].end <= len(answer.log_probs)
        assert answer.images == sum(segment.part == "G" for segment in answer.segments) > 0
