"""Properties of the formats and of the escalation's rules, on generated trajectories and generated histories."""

from __future__ import annotations

import asyncio
import json

from answer_tokens import token_content
from hypothesis import given
from hypothesis import strategies as st
from trajectory_strategies import Services, name, pixels, trajectories

from ivr_jax.construct.escalation import Rules, construct, prune
from ivr_jax.construct.exports import FORMS, ExportOptions, export_records
from ivr_jax.construct.released import result_from_trajectory, trajectory_from_result
from ivr_jax.protocol.codec import loss_parts
from ivr_jax.trajectory import Mode, Reflection, Sample, Step, trajectory_from_json, trajectory_to_json

# -- formats --


@given(trajectories())
def test_a_trajectory_is_its_json(trajectory):
    assert trajectory_from_json(json.loads(json.dumps(trajectory_to_json(trajectory)))) == trajectory


@given(trajectories())
def test_a_trajectory_is_its_result_json_with_images_by_path(trajectory):
    result, files = result_from_trajectory(trajectory, "out", by_name=True)
    back = trajectory_from_result(json.loads(json.dumps(result)), "here")
    names = {f"out/{image}.png": image for image in files.values()}
    rounds = trajectory_to_json(back)["rounds"]
    for r in rounds:
        r["image"] = names[r["image"]]
    assert rounds == trajectory_to_json(trajectory)["rounds"]
    assert tuple(names[path] for path in back.sample.sources) == trajectory.sample.sources
    assert (back.sample.prompt, back.sample.key) == (trajectory.sample.prompt, trajectory.sample.key)


@given(trajectories(), st.sampled_from([None, 0, 1, 2]))
def test_the_three_forms_tell_the_same_images_and_thoughts_in_order(trajectory, cap):
    result, _ = result_from_trajectory(trajectory, "o")
    options = ExportOptions(max_reflections=cap)
    told = {form: next(export_records([json.loads(json.dumps(result))], form, options)) for form in FORMS}
    asked, said = (message["content"] for message in told["messages"]["messages"])
    images = [part["image"] for part in (*asked, *said) if part["type"] == "image"]
    thoughts = [part["text"] for part in said if part["type"] == "text"]
    assert told["sharegpt"]["images"] == images
    assert told["sharegpt"]["conversations"][1]["value"] == "<image>".join(thoughts) + "<image>"
    assert told["chatml"]["text"] == (
        "<|im_start|>user\n" + "".join(f"<image>{{{path}}}" for path in images[: len(asked) - 1])
        + f"{trajectory.sample.prompt}<|im_end|><|im_start|>assistant\n"
        + "".join(f"{t}<image>{{{path}}}" for t, path in zip(thoughts, images[len(asked) - 1 :], strict=True))
        + "<|im_end|>"
    )
    assert [part["type"] for part in said] == ["text", "image"] * len(thoughts)
    assert all(t.startswith("<think>") and t.endswith("</think>") for t in thoughts)
    hidden = 0 if cap is None or trajectory.mode is not Mode.REFLECTION else max(0, len(trajectory.rounds) - 1 - cap)
    assert len(thoughts) == len(trajectory.rounds) - hidden + (hidden > 0), "capped rounds, then the final image"
    assert images[-1] == result["final_edited_image_path"]


@given(trajectories())
def test_what_an_export_says_depends_on_the_spoken_part_alone(trajectory):
    for form in FORMS:
        told = [result_from_trajectory(t, "o")[0] for t in (trajectory, token_content(trajectory))]
        assert list(export_records(told[:1], form)) == list(export_records(told[1:], form))


# -- rules, on whatever the services may answer --

histories = st.tuples(
    st.lists(st.booleans(), min_size=20, max_size=20), st.lists(st.booleans(), min_size=40, max_size=40)
)


@given(histories, st.integers(0, 3), st.integers(1, 3))
def test_the_mode_pruning_and_loss_follow_the_paper_s_rules(scripts, max_reflections, tries):
    services = Services(*map(list, scripts))
    rules = Rules(max_reflections=max_reflections, step_tries=tries)
    sample = Sample("k", "p", (name(0),))
    outcome = asyncio.run(construct(sample, {name(0): pixels(0)}, None, services, services, rules))
    history = outcome.history
    reflections = [d for d in history if isinstance(d.cause, Reflection)]
    steps = [d for d in history if isinstance(d.cause, Step)]

    assert history[0].cause is None and len(reflections) <= max_reflections
    assert [*history[1 : 1 + len(reflections)], *steps] == list(history[1:]), "reflections come before steps"
    whole = [d.evaluation.passed for d in history[: 1 + len(reflections)]]
    assert not any(whole[:-1]), "nothing is drawn after an image that passes"
    if steps:
        assert not whole[-1] and len(reflections) == max_reflections
    for text in ("one", "two"):
        of_step = [d for d in steps if d.cause.instruction == text]
        assert len(of_step) <= tries and not any(d.kept for d in of_step[:-1])

    if outcome.trajectory is None:
        assert not history[-1].kept or not history[-1].evaluation.passed
        return
    trajectory = outcome.trajectory
    last = len(trajectory.rounds)
    assert trajectory.rounds == prune(history)
    assert [r.evaluation.passed for r in trajectory.rounds] == [False] * (last - 1) + [True]
    assert trajectory.images == tuple(d.image for d in history if d.kept and not (steps and d in reflections))
    loss = loss_parts(trajectory)
    if trajectory.mode is Mode.DIRECT:
        assert last == len(history) == 1 and loss == {("G", 1), ("E", 1)}
    elif trajectory.mode is Mode.REFLECTION:
        assert last == len(history) == 1 + len(reflections)
        assert loss == {("E", last - 1), ("R", last), ("G", last), ("E", last)}
    else:
        assert steps and all(r.step_evaluation.passed for r in trajectory.rounds[1:])
        assert loss == {("E", 1)} | {(part, k) for part in "SGE" for k in range(2, last + 1)}
    failed = {k for k, r in enumerate(trajectory.rounds, 1) if not r.evaluation.passed and r.step_evaluation is None}
    assert not {("G", k) for k in failed} & loss, "a failed image is never a target"
