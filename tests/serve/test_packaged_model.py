"""The model of the package behind the server: against the `generate` command, and as construction's baseline."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections import Counter

import commands
import numpy as np
import openai
import pytest
import serving
from serving import pixels_of

from ivr_jax.checkpoints import system as systems
from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.images import load_image
from ivr_jax.serve.models import ServedModel
from ivr_jax.trajectory import AXES, Round, trajectory_from_json

PROMPT = "Put a red circle at b2. Put a blue square at a1."


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = ServedModel("micro", systems.load("micro"))
    with serving.serving(tmp_path_factory.mktemp("answers"), model, slots=8) as running:
        yield running


def test_an_answer_is_that_of_the_command_for_the_same_seed_and_settings(server, tmp_path):
    commands.succeed("generate", "--checkpoint=micro", f"--prompt={PROMPT}", "--seed=3", f"--out={tmp_path / 'answer'}")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        reply = client.chat.completions.create(
            model="micro", messages=[{"role": "user", "content": PROMPT}], seed=3
        ).choices[0]
    record = json.loads((tmp_path / "answer/answer.json").read_text())
    shown = [pixels_of(base64.b64decode(i["image_url"]["url"].partition(",")[2])) for i in reply.message.images]
    answer = trajectory_from_json({"sample": record["sample"], "rounds": record["rounds"]})
    files = [load_image(tmp_path / f"answer/G{n}.png") for n in range(1, len(answer.rounds) + 1)]
    assert len(shown) == len(files) and reply.finish_reason == "stop"
    for found, wanted in zip(shown, files, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert reply.message.content == "\n\n".join(spoken(round_) for round_ in answer.rounds)


def spoken(round_: Round) -> str:
    """A round's texts as a chat answer holds them."""
    cause, evaluation = round_.cause, round_.evaluation
    led_to = [] if cause is None else [*dataclasses.asdict(cause).values()]
    lines = [evaluation.observation] if evaluation.observation else []
    for axis in AXES:
        verdict = getattr(evaluation, axis)
        lines.append(f"{axis.capitalize()}: {'pass' if verdict.passed else 'fail'}: {verdict.reason}".rstrip(": "))
    return "\n\n".join(filter(None, ["\n".join(led_to), "\n".join(lines)]))


MESHED = """
import json, sys
from pathlib import Path
import openai
import serving
from ivr_jax import sharding
from ivr_jax.checkpoints import system as systems
from ivr_jax.serve.models import ServedModel

mesh = sharding.parse_mesh("tensor:2")
system = systems.load("micro", mesh=mesh, **systems.answering_options(mesh, None))
assert all(len(system.params[name].sharding.device_set) == 2 for name in ("embed", "lm_head"))
with serving.serving(Path(sys.argv[1]), ServedModel("micro", system), mesh=mesh) as running:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        asked = [{"role": "user", "content": sys.argv[2]}]
        message = client.chat.completions.create(model="micro", messages=asked, seed=3).choices[0].message
print(json.dumps([message.content, message.images]))
"""


def test_a_model_over_two_devices_answers_as_over_one(server, tmp_path):
    lines = commands.on_devices(2, MESHED, tmp_path, PROMPT)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        asked = [{"role": "user", "content": PROMPT}]
        message = client.chat.completions.create(model="micro", messages=asked, seed=3).choices[0].message
    assert json.loads(lines[-1]) == [message.content, message.images]


def test_construction_takes_its_first_images_from_the_server(server, tmp_path):
    routes = ('route="/v1/images/generations",status="200"', 'route="/v1/images/edits",status="200"')
    before = sum(server.metric(f"ivr_http_requests_total{{{route}}}") for route in routes)
    arguments = [
        "--config=micro_construct", f"--workdir={tmp_path / 'run'}", "--config.services.baseline.kind=openai",
        f"--config.services.baseline.base_url={server.url}/v1", "--config.services.baseline.key_variable=",
        "--config.services.baseline.model=micro:direct", "--config.quotas.direct=2", "--config.quotas.reflection=1",
        "--config.quotas.multi_step=1",
    ]  # fmt: skip
    commands.succeed("construct", *arguments)
    dataset = TrajectoryDataset(tmp_path / "run/dataset")
    assert Counter(trajectory.mode.value for trajectory in dataset) == {"direct": 2, "reflection": 1, "multi_step": 1}
    drawn = sum(server.metric(f"ivr_http_requests_total{{{route}}}") for route in routes) - before
    assert drawn >= 4
    server.idle()
