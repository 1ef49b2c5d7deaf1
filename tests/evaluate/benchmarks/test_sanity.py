"""A judge is asked about all plain images at once, and one wrong answer is told."""

from __future__ import annotations

import asyncio
import types

import pytest

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import sanity
from ivr_jax.evaluate.benchmarks.interface import State
from ivr_jax.evaluate.benchmarks.judges import Outcome

BENCHMARK = types.SimpleNamespace(name="own")


class Judge:
    """Sees red and blue; waits until all checks have been asked."""

    form = "chat"

    def __init__(self, checks: int, always: float | None = None):
        self._barrier, self._always = asyncio.Barrier(checks), always

    async def ask(self, item, question, pictures) -> Outcome:
        await asyncio.wait_for(self._barrier.wait(), 5)
        red, _, blue = pictures[0].pixels[128, 128]
        said = question.fields["statement"]
        holds = float((red == 255 and "red" in said) or (blue == 255 and "blue" in said))
        return Outcome(State.OK, {"scores": {"score": holds if self._always is None else self._always}}, "")


@pytest.mark.parametrize(("always", "passed"), [(None, True), (1.0, False), (0.0, False)])
def test_all_questions_are_asked_at_once_and_counted(always, passed):
    checks = sanity.checks_for(BENCHMARK, Judge(1), None)
    answered = []
    outcome = asyncio.run(sanity.run(checks, Judge(len(checks), always), lambda: answered.append(1)))
    assert (outcome == sanity.PASSED) is passed and len(answered) == len(checks) == 4


def test_a_judge_that_cannot_be_asked_ends_the_check():
    async def ask(item, question, pictures):
        raise UserError("status 401.", "Give the key.")

    judge = types.SimpleNamespace(form="chat", ask=ask)
    with pytest.raises(UserError) as raised:
        asyncio.run(sanity.run(sanity.checks_for(BENCHMARK, judge, None), judge))
    assert raised.value.what == "status 401."
