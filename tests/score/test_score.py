"""Scores of rollouts: both presets, what is missing, the command over a real service, and the HTTP service."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
from pathlib import Path

import commands
import httpx2
import numpy as np
import pytest
import uvicorn
from openai_service import Behaviour, OpenAIService, serving

from ivr_jax.errors import UserError
from ivr_jax.images import encode_png, save_png
from ivr_jax.interfaces import ServiceFailed
from ivr_jax.score.app import Limits, ScoreApp, make_app
from ivr_jax.score.scoring import Scorer

CASES = json.loads((Path(__file__).parents[1] / "vectors" / "rewards.json").read_text())
NAMES = ("final", "step", "format", "reflection")


class Judge:
    """Stands in for a service: answers in the order of the questions; None is a failed call."""

    def __init__(self, replies):
        self.replies, self.questions = iter(replies), []

    async def text(self, question, read):
        self.questions.append(question)
        reply = next(self.replies)
        if reply is None:
            raise ServiceFailed("the judge is away.")
        try:
            return read(reply)
        except Exception as error:
            raise ServiceFailed(f"no usable answer ({error}).") from error


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    names = {name for case in CASES for call in case["judge_calls"] for name in call["images"]}
    for i, name in enumerate(sorted(names | {"a.png", "f.png", "s.png"})):
        save_png(folder / name, np.full((4, 4, 3), i, np.uint8))
    return folder


def scored(judge, rollouts, images, preset="released", **options):
    return asyncio.run(Scorer([judge], preset, images, **options).score_all(rollouts))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_released_preset_gives_the_released_totals(images, number):
    case = CASES[number]
    judge = Judge(call["reply"] for call in case["judge_calls"])
    (result,) = scored(judge, [case["rollout"]], images, worst_for_failures=True)
    assert result.scored.total == pytest.approx(case["total"], abs=1e-9) and not result.missing
    for name in NAMES:
        assert result.scored.components[name] == pytest.approx(case["components"][name], abs=1e-9)
    assert [len(question.pictures) for question in judge.questions] == [len(c["images"]) for c in case["judge_calls"]]


def rollout(**changes) -> dict:
    plain = {
        "instruction": "make it red", "source_images": ["a.png"], "explanation": "",
        "assistant_text": "<think>t</think><image>f</image>", "intermediate_steps": [], "final_image": "f.png",
        "reflections": [],
    }  # fmt: skip
    return plain | changes


def axes(*scores) -> list[str]:
    keys = ("consistency", "instruction", "quality", "knowledge")
    return [json.dumps({f"{key}_score": score, "reasoning": "so"}) for key, score in zip(keys, scores, strict=True)]


def test_the_paper_s_reward_by_hand(images):
    """0.7 R_o + 0.2 R_s + 0.1 R_f; without intermediate texts the weights of the others are rescaled."""
    (direct,) = scored(Judge(axes(5, 4, 3, 2)), [rollout()], images, "paper")
    assert direct.scored.components == {"final": pytest.approx(0.7), "step": 0, "format": 1, "reflection": 0}
    assert direct.scored.total == pytest.approx((0.7 * 0.7 + 0.1) / 0.8) and direct.bonus is None
    reasoned = rollout(
        intermediate_steps=[{"instruction": "one", "image": "s.png"}],
        reflections=[{"prev_image": "s.png", "text": "why", "next_image": "f.png"}],
        assistant_text="no form",
    )
    judge = Judge([*axes(5, 5, 5, 5), '{"reasoning_score": 5}', '{"reasoning_score": 3}'])
    (result,) = scored(judge, [reasoned], images, "paper")
    assert result.scored.components == {"final": 1, "step": pytest.approx(0.75), "format": 0, "reflection": 0}
    assert result.scored.total == pytest.approx(0.7 + 0.2 * 0.75)
    (nothing,) = scored(Judge([]), [rollout(final_image=None, assistant_text="")], images, "paper")
    assert nothing.scored.components["final"] == pytest.approx(0.2) and nothing.scored.total is not None


def test_the_bonus_goes_to_the_best_of_a_group_with_the_fewest_images(images):
    one, two = "<think>t</think><image>f</image>", "<think>t</think><image>s</image><think>t</think><image>f</image>"
    group = [rollout(group="g", assistant_text=one), rollout(group="g", assistant_text=two), rollout()]
    judge = Judge([*axes(5, 5, 5, 5), *axes(5, 5, 5, 5), *axes(5, 5, 5, 5)])
    assert [result.bonus for result in scored(judge, group, images, "paper")] == [1.0, 0.5, None]


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("reply", [None, "prose", "4/10", '{"quality_score": 9}', '{"quality_score": 3}<think>'])
def test_a_judgement_that_failed_is_missing_and_never_a_bad_score(images, preset, reply):
    replies = axes(5, 5, 5, 5)
    replies[2] = reply
    (result,) = scored(Judge(replies), [rollout(group="g")], images, preset)
    told = result.to_json()
    assert told["total"] is None and told["components"]["final"] is None and told["components"]["format"] == 1
    assert [missing["judgement"] for missing in told["missing"]] == ["quality_score"] and told["missing"][0]["reason"]
    assert told["bonus"] is None and told["error"] is None


@pytest.mark.parametrize(
    "bad",
    [
        None, [], "x", {}, rollout(final_image="absent.png"), rollout(source_images="a.png"),
        rollout(intermediate_steps=[{"image": "s.png"}]), rollout(intermediate_steps=[3]), rollout(final_image=7),
        rollout(final_image=[]),
        rollout(assistant_text=None), rollout(reflections=["x"]), rollout(final_image="data:image/png;base64,AAAA"),
        rollout(intermediate_steps=[{"instruction": "go", "image": "s.png"}] * 200), rollout(instruction="\ud800"),
        rollout(id="\ud800"), rollout(explanation=float("nan")), rollout(intermediate_steps=[None]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_a_faulty_record_costs_itself_alone(images, preset, bad):
    first, good = scored(Judge(axes(5, 5, 5, 5)), [bad, rollout()], images, preset)
    assert first.error and first.to_json()["total"] is None
    assert good.scored.total == pytest.approx(1)


def test_paths_do_not_leave_the_folder_that_is_served(images, tmp_path):
    save_png(tmp_path / "secret.png", np.zeros((4, 4, 3), np.uint8))
    for name in (str(tmp_path / "secret.png"), f"../{tmp_path.name}/secret.png"):
        (result,) = scored(Judge([]), [rollout(final_image=name)], images, confined=True)
        assert result.error
    inline = "data:image/png;base64," + base64.b64encode(encode_png(np.zeros((4, 4, 3), np.uint8))).decode()
    (result,) = scored(Judge(axes(5, 5, 5, 5)), [rollout(final_image=inline)], images, confined=True)
    assert result.scored.total == pytest.approx(1)


def test_an_unknown_preset_is_refused(images):
    with pytest.raises(UserError):
        Scorer([], "best", images)


def test_the_command_scores_a_file_and_asks_again_only_for_what_is_missing(images, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "k" * 20)
    file = tmp_path / "rollouts.jsonl"
    lines = [rollout(id="one"), rollout(id="two", final_image="s.png"), {"id": "bad"}, {"id": "\ud800"}]
    file.write_text("\ufeff" + "\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    service = OpenAIService(Behaviour(answer='{"quality_score": 4}'))
    with serving(service) as url:
        settings = {"base_url": url, "key_variable": "TEST_KEY", "first_wait": 0.01, "longest_wait": 0.1, "tries": 1}
        command = [
            "--config=score", f"--workdir={tmp_path / 'run'}", f"--config.rollouts={file}",
            f"--config.image_root={images}", "--config.preset=released",
            *(f"--config.services.judge.{name}={value}" for name, value in settings.items()),
        ]  # fmt: skip
        first = commands.run("score", *command)
        assert first.returncode == 3
        told = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
        assert [line["id"] for line in told] == ["one", "two", "bad", 3]
        assert [len(line["missing"]) for line in told] == [3, 3, 0, 0] and told[2]["error"] and told[3]["error"]
        keys = ("consistency", "instruction", "quality", "knowledge")
        service.behaviour.answer = json.dumps({f"{key}_score": 5 for key in keys})
        asked = service.log.answered.total()
        commands.succeed("score", *command)
        assert service.log.answered.total() - asked == 6
    told = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert [line["total"] for line in told] == [pytest.approx((0.4 * 0.95 + 0.1) / 0.5)] * 2 + [None] * 2


def test_a_port_in_use_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "k" * 20)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1], 99_999):
            done = commands.run("score", "--config=score", f"--workdir={tmp_path}", "--serve", f"--config.port={port}",
                                "--config.services.judge.key_variable=TEST_KEY")  # fmt: skip
            assert done.returncode == 2 and str(port) in done.complaint


class Stuck:
    """A scorer that is never done."""

    async def score_all(self, rollouts):
        await asyncio.sleep(60)


@pytest.fixture
def served(images):
    """The HTTP service on a free port, and a client for it."""
    judge = Judge([*axes(5, 5, 5, 5), *axes(5, 5, 3, 5), None, None, None, None])
    scorers = {"released": Scorer([judge], "released", images, confined=True), "paper": Stuck()}
    app = make_app(ScoreApp(scorers, Limits(batch=3, body_mb=1, pending=4), "a-token", None))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        threading.Event().wait(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    headers = {"Authorization": "Bearer a-token"}
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=20) as client:
        yield client
    server.force_exit = server.should_exit = True
    thread.join(10)


def test_a_batch_goes_in_and_components_and_missing_states_come_out(served):
    reply = served.post("/v1/score", json={"preset": "released", "rollouts": [rollout()]})
    assert reply.status_code == 200 and reply.json()["scores"][0]["total"] == pytest.approx(1)
    batch = [rollout(id="first"), {}, rollout()]
    reply = served.post("/v1/score", json={"preset": "released", "rollouts": batch}).json()
    totals = [score["total"] for score in reply["scores"]]
    assert totals[0] == pytest.approx((0.4 * 0.9 + 0.1) / 0.5) and totals[1:] == [None, None]
    assert reply["scores"][1]["error"] and len(reply["scores"][2]["missing"]) == 4
    assert [score["id"] for score in reply["scores"]] == ["first", 1, 2]
    assert served.get("/healthz").json()["limits"] == {"batch": 3, "body_mb": 1, "pending": 4}


def test_requests_beyond_the_limits_and_strangers_are_refused(served):
    def status(body=None, **changes):
        given = {"json": body} if body is not None else {}
        return served.post("/v1/score", **(given | changes)).status_code

    one = {"preset": "released", "rollouts": [{}]}
    assert status(one) == 200
    assert status({"preset": "best", "rollouts": [{}]}) == 400
    assert status({"preset": "released", "rollouts": []}) == 400
    assert status([]) == 400
    assert status(content=b"{", headers={"Content-Type": "application/json"}) == 400
    assert status(content=b'{"preset": NaN}', headers={"Content-Type": "application/json"}) == 400
    twice = b'{"preset": "paper", "preset": "released", "rollouts": [{}]}'
    assert status(content=twice, headers={"Content-Type": "application/json"}) == 400
    assert status(content=b"{}", headers={"Content-Type": "text/plain"}) == 415
    assert status({"preset": "released", "rollouts": [{}] * 4}) == 413
    assert status({"preset": "released", "rollouts": ["x" * (2 << 20)]}) == 413
    assert status(one, headers={"Authorization": "Bearer another"}) == 401
    assert status(one, headers={"Origin": "http://evil.example"}) == 403
    waiting = threading.Thread(target=lambda: status({"preset": "paper", "rollouts": [{}] * 3}, timeout=1), daemon=True)
    with pytest.MonkeyPatch.context():
        threading.excepthook, before = (lambda args: None), threading.excepthook
        waiting.start()
        threading.Event().wait(0.3)
        reply = served.post("/v1/score", json={"preset": "paper", "rollouts": [{}] * 3})
        assert reply.status_code == 429 and reply.headers["Retry-After"]
        waiting.join(5)
        threading.excepthook = before
