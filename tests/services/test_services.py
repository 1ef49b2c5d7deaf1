"""Clients of services: what is asked over the wire, what comes back, and every way in which it can go wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import json
import re
import shutil
import time
from email.utils import formatdate

import numpy as np
import openai_service
import pytest
from asked_service import ENVIRONMENT, IMAGES, KEY, PIXELS, SAMPLE
from openai_service import Behaviour, OpenAIService, serving
from openai_service import service_config as config

from ivr_jax.errors import UserError
from ivr_jax.interfaces import Attempt, RootCause, ServiceDown, ServiceFailed
from ivr_jax.services import http_client
from ivr_jax.services.build import analyzer_from_configs, generator_from_config
from ivr_jax.services.caller import Breaker, Caller, Fault, Reply
from ivr_jax.services.http_client import Picture, PictureEncoder, retry_after
from ivr_jax.services.journal import Journal
from ivr_jax.services.prompts import FOLDER, Prompts
from ivr_jax.trajectory import AXES


@pytest.fixture
def service():
    """A service of good behaviour, running."""
    made = OpenAIService(Behaviour(key=KEY))
    made.log.keep = True
    with serving(made):
        yield made


def ask(service: OpenAIService, action, journal: Journal | None = None, **settings: object):
    """Runs `action(analyzer)` against the service."""

    async def run():
        analyzer = analyzer_from_configs([config(f"{service.url}/v1", **settings)], journal, environment=ENVIRONMENT)
        try:
            return await action(analyzer), analyzer.services[0].caller.counts
        finally:
            await analyzer.close()

    return asyncio.run(run())


# -- what is asked, and what comes back --


def test_an_evaluation_asks_one_question_an_axis_with_labelled_images(service):
    evaluation, counts = ask(service, lambda analyzer: analyzer.evaluate(SAMPLE, IMAGES, PIXELS))
    assert evaluation.passed and evaluation.scores == (5, 5, 5, 5)
    assert counts.calls == counts.answered == 4
    texts = []
    for body in service.log.bodies:
        parts = body["messages"][0]["content"]
        kinds = [part["type"] for part in parts]
        assert kinds == ["text", "text", "image_url", "text", "image_url"]
        assert [parts[1]["text"], parts[3]["text"]] == ["Source:", "Result:"]
        assert body["response_format"]["json_schema"]["strict"] is True
        assert "temperature" not in body and "max_tokens" not in body
        texts.append(parts[0]["text"])
    assert len(set(texts)) == 4 and all("Make it grey [direct]." in text for text in texts)


def test_every_judgement_goes_over_the_wire(service):
    sample = dataclasses.replace(SAMPLE, prompt="Do a lot [multi 2].", explanation="Cats purr.")

    async def everything(analyzer):
        failed = await analyzer.evaluate(sample, IMAGES, PIXELS)
        reflection = await analyzer.reflect(sample, IMAGES, PIXELS, failed)
        cause = await analyzer.root_cause(sample, IMAGES, [Attempt(PIXELS, failed, None)] * 2)
        steps = await analyzer.decompose(sample, IMAGES)
        step = await analyzer.evaluate_step(sample, IMAGES, steps[0], [PIXELS], PIXELS)
        validity = await analyzer.judge_reasoning(sample, IMAGES, "step", steps[0], [PIXELS])
        return failed, reflection, cause, steps, step, validity

    (failed, reflection, cause, steps, step, validity), _ = ask(service, everything)
    assert not failed.passed and failed.instruction.score == 2 and failed.quality.passed
    assert "try 1" in reflection.improvement_plan
    assert cause is RootCause.PROMPT_TOO_COMPLEX
    assert len(steps) == 3
    assert step.passed and step.scores == (5, 4, 4, 4)
    assert validity == 0.75
    knowing = [b["messages"][0]["content"][0]["text"] for b in service.log.bodies]
    assert sum("Cats purr." in text for text in knowing) == 4  # knowledge, reflection, decomposition, reasoning


def test_images_are_generated_edited_and_combined(service):
    async def draw(sources):
        generator = generator_from_config(config(f"{service.url}/v1"), None, ENVIRONMENT)
        try:
            return await generator.generate(SAMPLE, "Make it grey [direct].", sources)
        finally:
            await generator.close()

    for sources in ([], [PIXELS], [PIXELS, PIXELS // 2]):
        drawn = asyncio.run(draw(sources))
        assert np.array_equal(drawn, openai_service.draw("Make it grey [direct].", sources))
    assert [files for _, files in service.log.bodies] == [0, 1, 2]


def test_a_picture_is_encoded_once_and_few_are_remembered(monkeypatch):
    made = []
    monkeypatch.setattr(http_client, "encode", lambda pixels, side: made.append(int(pixels[0, 0, 0])) or bytes(300))

    async def run():
        encoder = PictureEncoder(512, room=1000, most=2)
        pictures = [Picture("Source", np.full((size, size, 3), i, np.uint8)) for i, size in enumerate((8, 300, 8, 8))]
        for i in (0, 1):
            await asyncio.gather(*(encoder.uri(Picture("Result", pictures[i].pixels)) for _ in range(4)))
        assert made == [0, 1]
        assert await encoder.png(pictures[0]) == bytes(300) and made == [0, 1]
        for i in (2, 0, 3):  # the second was used longest ago, then the third
            await encoder.uri(pictures[i])
        await encoder.uri(pictures[0])
        assert made == [0, 1, 2, 3]
        await encoder.uri(pictures[1])
        assert made == [0, 1, 2, 3, 1]
        wide = PictureEncoder(512, room=500)  # 400 characters each: one has room
        for i in (0, 0, 2, 0):
            await wide.uri(pictures[i])
        assert made[5:] == [0, 2, 0]

    asyncio.run(run())


def test_the_gateway_signs_every_call(service):
    service.behaviour.key = ""
    gateway = {"kind": "gateway", "app_variable": "TEST_APP"}

    async def run():
        section = config(f"{service.url}/gateway", **gateway)
        analyzer = analyzer_from_configs([section], None, environment=ENVIRONMENT)
        generator = generator_from_config(section, None, ENVIRONMENT)
        try:
            return (
                await analyzer.evaluate(SAMPLE, IMAGES, PIXELS),
                await generator.generate(SAMPLE, "Make it grey [direct].", [PIXELS]),
            )
        finally:
            await analyzer.close()
            await generator.close()

    evaluation, drawn = asyncio.run(run())
    assert evaluation.passed
    assert np.array_equal(drawn, openai_service.draw("Make it grey [direct].", [PIXELS]))
    for headers in service.log.headers:
        text = f"x-timestamp: {headers['x-timestamp']}\nx-source: tests"
        assert headers["x-authorization"] == hmac.new(KEY.encode(), text.encode(), hashlib.sha256).hexdigest()
        assert headers["x-appid"] == "app-77" and KEY not in json.dumps(headers)


def test_a_server_without_structured_outputs_is_asked_without(service):
    service.behaviour.schema = False
    evaluation, counts = ask(service, lambda analyzer: analyzer.evaluate(SAMPLE, IMAGES, PIXELS))
    assert evaluation.passed and counts.calls == 4
    service.log.bodies.clear()
    ask(service, lambda analyzer: analyzer.decompose(SAMPLE, IMAGES), structured="none")
    assert "response_format" not in service.log.bodies[0]


def test_prompts_have_versions_that_follow_their_text():
    assert {
        path.stem: (Prompts().versions()[path.stem], hashlib.sha256(path.read_bytes()).hexdigest()[:8])
        for path in sorted(FOLDER.glob("*.txt"))
    } == PROMPTS, "a prompt's text changed: raise its version, and put both here"


PROMPTS = {
    "decompose": (1, "338b7913"),
    "draw": (1, "632c50f5"),
    "evaluate_consistency": (1, "d7c1d32e"),
    "evaluate_instruction": (1, "cb277195"),
    "evaluate_knowledge": (1, "294c7034"),
    "evaluate_quality": (1, "513ba2d5"),
    "evaluate_step": (1, "92ee76b0"),
    "judge_reasoning": (1, "d3807c7c"),
    "reflect": (1, "119a10b4"),
    "root_cause": (1, "8a6bcd5b"),
}


def test_prompts_may_be_the_users_own(service, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(FOLDER, own)
    (own / "evaluate_quality.txt").write_text("{# version: 7 #}\nIs {{ prompt }} pretty? Request: x\n")
    assert Prompts(own).versions()["evaluate_quality"] == 7 and Prompts().versions()["evaluate_quality"] == 1

    async def run():
        section = config(f"{service.url}/v1")
        analyzer = analyzer_from_configs([section], None, environment=ENVIRONMENT, prompts=Prompts(own))
        try:
            await analyzer.evaluate(SAMPLE, IMAGES, PIXELS)
        finally:
            await analyzer.close()

    asyncio.run(run())
    asked = [body["messages"][0]["content"][0]["text"] for body in service.log.bodies]
    assert "Is Make it grey [direct]. pretty? Request: x" in asked
    for text, complaint in (("{# version: 1 #}\n{{ colour }}", "cannot be filled in"), ("no version", "no version"),
                            ("{# version: 1 #}\n{% if %}", "no template"), (None, "cannot be read")):
        (own / "draw.txt").unlink() if text is None else (own / "draw.txt").write_text(text)
        with pytest.raises(UserError, match=complaint):
            Prompts(own).render("draw", instruction="x", analysis="", plan="")


# -- faults --


@pytest.mark.parametrize("fault", openai_service.MIXED_FAULTS)
def test_every_fault_is_survived(service, fault):
    service.behaviour = Behaviour(key=KEY, fault_rate=0.5, faults=(fault,), hang=0.4)
    timeout = 0.2 if fault == "hang" else 5.0
    evaluation, counts = ask(
        service, lambda analyzer: analyzer.evaluate(SAMPLE, IMAGES, PIXELS), tries=30, timeout=timeout
    )
    assert evaluation.passed and evaluation.scores == (5, 5, 5, 5)
    assert counts.calls == 4 + sum(counts.faults.values()) and service.log.faults[fault] >= 1


@pytest.mark.parametrize(
    "answer",
    ["Lovely!", "", "   ", '{"score": 7, "reason": "x"}', '{"score": NaN, "reason": "x"}', '{"score": 4, "rea',
     "<html><body>4</body></html>", '{"score": true, "reason": "x"}', '{"score": 4, "reason": ""}', "[4]",
     '{"score": null, "reason": "x"}', '{"score": 1e999, "reason": "x"}', "null", "Score: 7. Good.",
     "Score: 2, or score: 4.", '{"score": {"x": 4}, "reason": "x"}', '{"score": "many", "reason": "x"}'],
)
def test_an_unusable_judge_fails_the_call_and_never_the_sample(service, answer):
    service.behaviour.answer = answer
    with pytest.raises(ServiceFailed):
        ask(service, lambda analyzer: analyzer.evaluate(SAMPLE, IMAGES, PIXELS), tries=2)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('```json\n{"score": 4, "reason": "fine"}\n```', 4),
        ('<think>{"score": 1}</think>{"reason": "fine", "score": "five"}', 5),
        ('Here you go: {"reason": "a {brace} in it", "score": "4/5"} Anything else?', 4),
        ('{"score": 3.5, "reasoning": "fine"}', 3.5),
        ("Score: 4. The hat is there.", 4),
        ("I would say 3/5: the tail is missing.", 3),
        ('{"note": 1} {"score": 2, "reason": "fine", "extra": [1]}', 2),
    ],
)
def test_answers_are_read_however_they_are_written(service, answer, score):
    service.behaviour.answer = answer
    evaluation, counts = ask(service, lambda analyzer: analyzer.evaluate(SAMPLE, IMAGES, PIXELS))
    assert evaluation.scores == (score,) * len(AXES) and counts.calls == 4


def test_retry_after_is_honoured():
    assert retry_after({"retry-after": "3"}) == 3
    assert retry_after({"retry-after-ms": "250"}) == 0.25
    assert 5 < retry_after({"retry-after": formatdate(time.time() + 10, usegmt=True)}) <= 10
    assert retry_after({"retry-after": "soon"}) is None and retry_after({"retry-after": "nan"}) is None

    async def run(after):
        seen = []

        async def once(complaint):
            seen.append(time.monotonic())
            if len(seen) == 1:
                raise Fault("429", retry_after=after)
            return Reply("4")

        caller = Caller(config("http://127.0.0.1:1/v1"))
        await caller.call(once, lambda reply: reply.text)
        return seen[1] - seen[0]

    assert asyncio.run(run(0.3)) >= 0.3
    with pytest.raises(ServiceFailed, match="429"):  # longer than `longest_wait`
        asyncio.run(run(100))


def test_rates_and_calls_at_a_time_are_limited(service):
    service.behaviour.latency = 0.02

    async def many(analyzer):
        samples = [dataclasses.replace(SAMPLE, prompt=f"Make it grey {i} [direct].") for i in range(6)]
        await asyncio.gather(*(analyzer.evaluate(sample, IMAGES, PIXELS) for sample in samples))

    ask(service, many, in_flight=3)
    assert service.log.most_in_flight == 3

    async def timed(analyzer):
        start = time.monotonic()
        samples = [dataclasses.replace(SAMPLE, prompt=f"{i}.") for i in range(7)]
        await asyncio.gather(*(analyzer.decompose(sample, IMAGES) for sample in samples))
        return time.monotonic() - start

    taken, _ = ask(service, timed, requests_per_minute=240)  # four a second: three have to wait
    assert taken >= 0.55
    taken, _ = ask(service, timed, tokens_per_minute=60 * 2000)  # some 450 tokens each: three have to wait
    assert taken >= 0.25


def test_a_question_is_asked_once(service, tmp_path):
    with Journal(tmp_path / "journal") as journal:

        async def twice(analyzer):
            return await asyncio.gather(*(analyzer.evaluate(SAMPLE, IMAGES, PIXELS) for _ in range(3)))

        answers, counts = ask(service, twice, journal)
        assert counts.calls == 4 and answers[0] == answers[1] == answers[2]
        again, counts = ask(service, twice, journal)
        assert counts.calls == 0 and counts.recorded == 12 and again == answers
        used = journal.usage()["openai:test-model"]
        assert used["answers"] == 4 and used["cost"] == pytest.approx(4 * (1000 * 2 + 100 * 10) / 1e6)
    assert max(service.log.answered.values()) == 1


def test_the_breaker_opens_probes_and_closes():
    now = [0.0]
    breaker = Breaker(failures=3, rest=10, patience=100, waits=False, clock=lambda: now[0])

    async def enter():
        await asyncio.wait_for(breaker.enter(), 1)

    for _ in range(3):
        asyncio.run(enter())
        breaker.failed()
    assert breaker.open
    with pytest.raises(ServiceDown):
        asyncio.run(enter())
    now[0] = 11
    asyncio.run(enter())  # the probe
    with pytest.raises(ServiceDown):
        asyncio.run(enter())  # only one at a time
    breaker.failed()
    now[0] = 22
    asyncio.run(enter())
    breaker.succeeded()
    asyncio.run(enter())
    assert not breaker.open


def test_a_service_that_stays_down_ends_in_service_down(service):
    service.behaviour.status = 503
    with pytest.raises(ServiceDown, match="test-model"):
        ask(service, lambda analyzer: analyzer.evaluate(SAMPLE, IMAGES, PIXELS), breaker_failures=2, tries=1000)


def test_the_fallback_answers_while_the_first_is_sick_and_stays_the_record(service, tmp_path):
    sick = OpenAIService(Behaviour(status=500))

    def both(url):
        return [
            config(url, model="first", breaker_failures=2, tries=2),
            config(f"{service.url}/v1", model="second"),
        ]

    async def run(url, journal):
        analyzer = analyzer_from_configs(both(url), journal, environment=ENVIRONMENT)
        try:
            return await analyzer.evaluate(SAMPLE, IMAGES, PIXELS), [s.caller.counts.calls for s in analyzer.services]
        finally:
            await analyzer.close()

    with serving(sick) as url, Journal(tmp_path) as journal:
        evaluation, calls = asyncio.run(run(url, journal))
        assert evaluation.passed and calls[1] == 4
        sick.behaviour.status = 200
        again, calls = asyncio.run(run(url, journal))  # the first is well again, and the record goes before
        assert again == evaluation and calls == [0, 0]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_ends_the_run(service, status):
    service.behaviour.status = status
    with pytest.raises(UserError, match=str(status)) as error:
        ask(service, lambda analyzer: analyzer.evaluate(SAMPLE, IMAGES, PIXELS))
    assert not isinstance(error.value, ServiceFailed)


def test_a_rejected_question_is_not_repeated(service):
    service.behaviour.status = 400
    with pytest.raises(ServiceFailed):
        ask(service, lambda analyzer: analyzer.decompose(SAMPLE, IMAGES), structured="none")
    assert len(service.log.headers) == 1


def test_the_key_appears_nowhere(service, tmp_path, capfd, caplog):
    caplog.set_level("DEBUG")
    service.behaviour.echo_key = True
    with Journal(tmp_path / "journal") as journal:
        evaluation, _ = ask(service, lambda analyzer: analyzer.evaluate(SAMPLE, IMAGES, PIXELS), journal)
        assert "[secret]" in evaluation.instruction.reason  # the service did repeat it
        for status in (401, 400, 500):
            service.behaviour.status = status
            with pytest.raises(UserError) as error:
                ask(service, lambda analyzer: analyzer.decompose(SAMPLE, IMAGES), journal, tries=1)
            chain, seen = error.value, []
            while chain is not None:
                seen.append(repr(chain))
                chain = chain.__cause__
            assert KEY not in "".join(seen)
        assert KEY not in repr(evaluation) and KEY not in repr(config("http://127.0.0.1/v1"))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    said = "".join(capfd.readouterr()) + caplog.text
    assert KEY.encode() not in written and KEY not in said


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"key_variable": "sk-live-secret!"}, "no name of an environment variable"),
        ({"key_variable": "NOT_SET_AT_ALL"}, "NOT_SET_AT_ALL is not set"),
        ({"base_url": "https://me:secret@host/v1"}, "holds credentials"),
        ({"base_url": "https://host/v1?key=secret"}, "holds credentials"),
        ({"base_url": "ftp://host"}, "base_url is"),
        ({"base_url": "http://[::1"}, "cannot be read"),
        ({"kind": "smoke"}, "`service.kind`"),
        ({"model": ""}, "names no model"),
        ({"tries": 0}, "`service.tries`"),
        ({"timeout": float("nan")}, "`service.timeout`"),
    ],
)
def test_wrong_settings_are_said_and_secrets_in_them_are_not(settings, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)) as error:
        analyzer_from_configs([config("http://127.0.0.1:1/v1", **settings)] if "base_url" not in settings
                              else [config(**{"url": settings["base_url"]})], None, environment=ENVIRONMENT)
    assert "secret" not in str(error.value)
