"""The engine with answers that come, are looked at and leave one by one: each says what it says in a batch."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny_model import CONFIG, TOKENIZER, noisy_params, prompts_of, requests

from ivr_jax.errors import UserError
from ivr_jax.protocol.codec import parse_answer
from ivr_jax.protocol.grammar import ACCEPT, Grammar, GrammarOptions, advance
from ivr_jax.protocol.joined_grammar import JoinedGrammar
from ivr_jax.sampling.batch import PromptBatch, RolloutOptions, sample
from ivr_jax.sampling.engine import Engine, EngineOptions, pad_prompts
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.trajectory import Mode, Sample

PARAMS = noisy_params()
MODES = {
    "auto": GrammarOptions(max_reflections=1, max_steps=1, text_cap=2),
    "direct": GrammarOptions(modes=("direct",), text_cap=2),
    "reflection": GrammarOptions(modes=("reflection",), force=True, max_reflections=1, text_cap=2),
    "multi_step": GrammarOptions(modes=("multi_step",), force=True, max_steps=1, text_cap=2),
}
JOINED = JoinedGrammar({name: Grammar(TOKENIZER, options) for name, options in MODES.items()})
LENGTH = 120
KEYS = jax.random.split(jax.random.key(3), 8)
PROMPTS = prompts_of(*requests(8))
OPTIONS = EngineOptions(slots=4, window=2, growth=1.5, shrink=False)
SAMPLING = SamplingOptions()


def alone(number: int, mode: str = "auto", length: int = LENGTH, size=(2, 2)) -> np.ndarray:
    """The answer to one prompt, drawn by itself."""
    rows = pad_prompts([PROMPTS[number]], TOKENIZER.vocab.pad)
    options = RolloutOptions(length, size=size)
    drawn, _ = sample(CONFIG, PARAMS, JOINED.grammars[mode], PromptBatch(*rows), KEYS[number][None], options)
    return drawn.tokens[0, : drawn.lengths[0]]


def engine(sampling: SamplingOptions = SAMPLING) -> Engine:
    return Engine(CONFIG, PARAMS, JOINED, sampling, OPTIONS, length=LENGTH)


def add(slots: Engine, number: int, mode: str = "auto", limit: int = LENGTH, given=(), size=(2, 2)) -> None:
    initial = JOINED.initial(mode, np.full(1, size[0]), np.full(1, size[1]))
    slots.add(number, [PROMPTS[number]], initial, KEYS[number], limit, given)


def finish(slots: Engine, arrivals: dict[int, list[tuple]]) -> dict[int, np.ndarray]:
    """Steps until all have ended; `arrivals` says who comes before which step."""
    found, step = {}, 0
    while slots.in_use or any(number >= step for number in arrivals):
        for arguments in arrivals.get(step, []):
            add(slots, *arguments)
        slots.step(calls=7)
        found |= {number: drawn.tokens for number, drawn in slots.take_finished().items()}
        step += 1
    return found


def test_answers_that_arrive_at_any_time_in_any_mode_are_those_drawn_alone():
    modes = ["auto", "direct", "multi_step", "reflection", "auto", "direct"]
    arrivals = {0: [(0, modes[0]), (1, modes[1])], 2: [(2, modes[2])], 3: [(3, modes[3])],
                9: [(4, modes[4], LENGTH, (), (1, 3))], 11: [(5, modes[5])]}  # fmt: skip
    found = finish(engine(), arrivals)
    assert set(found) == set(range(6))
    for number, mode in enumerate(modes):
        size = (1, 3) if number == 4 else (2, 2)
        np.testing.assert_array_equal(found[number], alone(number, mode, size=size))


def test_joined_grammars_force_their_modes_and_parse():
    found = finish(engine(), {0: [(0, "direct"), (1, "reflection"), (2, "multi_step")]})
    for number, mode in enumerate((Mode.DIRECT, Mode.REFLECTION, Mode.MULTI_STEP)):
        state = JOINED.initial(mode.value, np.full(1, 2), np.full(1, 2))
        nodes = [state.node[0]]
        for token in found[number]:
            state = advance(JOINED.tables, state, np.array([token]), np)
            nodes.append(state.node[0])
        assert nodes[-1] == ACCEPT
        answer = parse_answer(JOINED, Sample("request", "Put"), found[number], np.array(nodes))
        assert answer.trajectory.mode is mode


def test_tokens_so_far_grow_and_are_the_beginning_of_the_answer():
    slots, seen = engine(), []
    add(slots, 0, "multi_step")
    while slots.in_use:
        seen.append(slots.tokens()[0])
        slots.step(calls=5)
        finished = slots.take_finished()
    whole = finished[0].tokens
    assert len(seen) > 3 and sorted({len(tokens) for tokens in seen}) == [len(tokens) for tokens in seen]
    for tokens in seen:
        np.testing.assert_array_equal(tokens, whole[: len(tokens)])
    assert finished[0].log_probs.shape == whole.shape and (finished[0].log_probs <= 0).all()


def test_a_cancelled_answer_frees_its_slot_and_disturbs_nobody():
    slots = engine()
    for number in range(4):
        add(slots, number, "multi_step")
    assert slots.free == 0
    slots.step(calls=9)
    cut = slots.cancel([1, 3])
    assert set(cut) == {1, 3} and slots.free == 2
    np.testing.assert_array_equal(cut[1].tokens, alone(1, "multi_step")[: len(cut[1].tokens)])
    add(slots, 5, "direct")
    found = finish(slots, {})
    assert set(found) == {0, 2, 5}
    np.testing.assert_array_equal(found[0], alone(0, "multi_step"))
    np.testing.assert_array_equal(found[5], alone(5, "direct"))
    slots.reset()
    add(slots, 6, "direct")
    np.testing.assert_array_equal(finish(slots, {})[6], alone(6, "direct"))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_an_answer_that_is_continued_from_its_own_beginning_is_the_same(share):
    """From within an image, a text, or between parts: the given tokens are read, the rest is drawn as before."""
    whole = alone(2, "reflection")
    slots = engine()
    add(slots, 2, "reflection", given=whole[: int(share * len(whole))])
    np.testing.assert_array_equal(finish(slots, {})[2], whole)


def test_a_given_beginning_that_leaves_the_grammar_is_refused_and_takes_no_slot():
    slots, whole = engine(), alone(2, "direct")
    with pytest.raises(UserError):
        add(slots, 2, "direct", given=[*whole[:8], TOKENIZER.vocab.boi])
    assert slots.free == 4


def test_each_answer_has_its_own_limit():
    slots = engine()
    add(slots, 0, "multi_step", limit=30)
    add(slots, 1, "multi_step")
    found = finish(slots, {})
    assert len(found[0]) <= 30 < len(found[1])
    np.testing.assert_array_equal(found[0], alone(0, "multi_step")[: len(found[0])])
    np.testing.assert_array_equal(found[1], alone(1, "multi_step"))


def test_guidance_reads_the_unconditional_prompts_too():
    sampling = SamplingOptions(guidance=2.0)
    others = prompts_of(*requests(8), unconditional=True)
    rows = pad_prompts([PROMPTS[0]], TOKENIZER.vocab.pad), pad_prompts([others[0]], TOKENIZER.vocab.pad)
    batch = PromptBatch(*rows[0], rows[1:])
    options = RolloutOptions(LENGTH, sampling, size=(2, 2))
    drawn, _ = sample(CONFIG, PARAMS, JOINED.grammars["direct"], batch, KEYS[:1], options)
    slots = engine(sampling)
    initial = JOINED.initial("direct", np.full(1, 2), np.full(1, 2))
    with pytest.raises(ValueError):
        slots.add(0, [PROMPTS[0]], initial, KEYS[0], LENGTH)
    slots.add(0, [PROMPTS[0], others[0]], initial, KEYS[0], LENGTH)
    np.testing.assert_array_equal(finish(slots, {})[0], drawn.tokens[0, : drawn.lengths[0]])
