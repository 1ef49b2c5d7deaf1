"""What servers do on the wire beside the protocol: shapes of content, errors with status 200, limits, refusals."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import urllib.parse

import numpy as np
import pytest
from openai_service import Behaviour, OpenAIService, service_config, serving
from PIL import Image

from ivr_jax.config import as_dataclass, load_config
from ivr_jax.errors import UserError
from ivr_jax.interfaces import ServiceFailed
from ivr_jax.services.build import analyzer_from_configs
from ivr_jax.services.caller import Fault, Rejected
from ivr_jax.services.config import Secrets, ServiceConfig
from ivr_jax.services.gateway_client import GatewayClient
from ivr_jax.services.http_client import (
    check_no_error,
    decode_base64,
    message_text,
    outcome_of_status,
    refused_parameter,
)
from ivr_jax.services.journal import Journal
from ivr_jax.services.openai_client import OpenAIClient
from ivr_jax.services.replies import Unusable
from ivr_jax.trajectory import Sample

SAMPLE = Sample("one", "A cat.")
PIXELS = np.full((24, 32, 3), 200, np.uint8)
VERDICT = '{"reason": "seen", "score": 4}'


def completion(message, finish: str = "stop", **more) -> bytes:
    choice = {"index": 0, "finish_reason": finish, "message": message} | more
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}).encode()


@pytest.fixture
def service():
    made = OpenAIService(Behaviour())
    made.log.keep = True
    with serving(made):
        yield made


def ask(service: OpenAIService, journal: Journal | None = None, **settings):
    """The score (1-5) that one question gives, and the caller's counts."""

    async def run():
        section = service_config(f"{service.url}/v1", **{"key_variable": "", "tries": 3} | settings)
        analyzer = analyzer_from_configs([section], journal)
        try:
            return 1 + 4 * await analyzer.judge_reasoning(SAMPLE, {}, "step", "Draw a cat.", [PIXELS])
        finally:
            counts.append(analyzer.services[0].caller.counts)
            await analyzer.close()

    counts = []
    try:
        return asyncio.run(run()), counts[0]
    except UserError as error:
        error.counts = counts[0]
        raise


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "thinking", "thinking": [{"type": "text", "text": "5?"}]}, {"type": "text", "text": VERDICT}],
        [{"type": "reasoning", "text": '{"score": 5}'}, {"type": "output_text", "text": VERDICT}],
        [{"type": "text", "text": VERDICT[:10]}, {"type": "text", "text": VERDICT[10:]}],
        [{"text": '{"score": 5}', "thought": True}, {"text": VERDICT}],
        [{"type": "text", "text": {"value": VERDICT}}],
        {"type": "text", "text": VERDICT},
        [{"type": "text", "content": VERDICT}],
        [VERDICT],
        {"parts": [{"text": VERDICT}]},
        json.loads(VERDICT),
    ],
)
def test_text_parts_joined_are_the_answer(service, content):
    service.behaviour.raw = completion({"role": "assistant", "content": content})
    score, counts = ask(service)
    assert score == 4 and counts.calls == 1


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "reasoning_content": VERDICT},
        {"content": None, "tool_calls": [{"function": {"name": "answer", "arguments": VERDICT}}]},
        {"content": [{"type": "thinking", "thinking": VERDICT}]},
        {"content": ""},
        {"content": 4},
        None,
    ],
)
def test_what_is_no_text_is_no_answer(service, message):
    service.behaviour.raw = completion(message)
    with pytest.raises(ServiceFailed) as error:
        ask(service)
    assert error.value.kind == "unusable answer"


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ({"error": {"message": "Rate limit exceeded: free-models-per-min", "code": 429}}, "429"),
        ({"error": {"message": "Rate limit exceeded: free-models-per-min", "code": "rate_limit_exceeded"}}, "429"),
        ({"error": {"message": "try later, overloaded", "type": "overloaded_error"}}, "503"),
        ({"choices": [{"finish_reason": "error", "error": {"message": "image too large: 502", "code": 502},
                       "message": {"content": ""}}]}, "502"),
        ({"error": "the model is loading"}, "error in a reply"),
        ({"error": "Too many requests"}, "429"),
        ({"error": {"message": "busy", "code": "engine_overloaded_error"}}, "503"),
        ({"error": {"message": "busy", "http_status": 503}}, "503"),
        ({"object": "error", "message": "no room left", "code": 507}, "507"),
        ({"message": "slow down", "code": 429}, "429"),
        ({"message": "slow down", "status_code": "503"}, "503"),
    ],
)  # fmt: skip
def test_an_error_with_status_200_counts_by_its_code_and_is_quoted(service, reply, kind):
    service.behaviour.raw = json.dumps(reply).encode()
    with pytest.raises(ServiceFailed) as error:
        ask(service, tries=2)
    error_of = reply.get("error") or reply.get("choices", [{}])[0].get("error") or reply
    said = error_of if isinstance(error_of, str) else error_of["message"]
    assert error.value.kind == kind and said in error.value.what
    assert error.value.counts.faults[kind] == 2
    with pytest.raises(Fault) as fault:
        check_no_error(reply, {}, Secrets([]), "x")
    assert fault.value.sick  # the breaker hears of it


def test_an_error_with_status_200_that_no_other_call_avoids_ends_the_run(service):
    service.behaviour.raw = json.dumps({"error": {"message": "No endpoints support image input", "code": 404}}).encode()
    with pytest.raises(UserError) as error:
        ask(service)
    assert not isinstance(error.value, ServiceFailed) and "No endpoints support image input" in error.value.what


def test_an_answer_that_is_cut_off_is_paid_for_once_at_one_limit(service, tmp_path):
    service.behaviour.raw = completion({"content": "", "reasoning_content": "Let me think"}, "length")
    with Journal(tmp_path) as journal:
        for calls in (1, 0):
            with pytest.raises(ServiceFailed) as error:
                ask(service, journal, max_tokens=100)
            assert error.value.kind == "cut off" and "max_tokens=100" in error.value.what
            assert error.value.counts.calls == calls
        assert journal.usage()["openai:test-model"]["tokens_out"] == 5
        with pytest.raises(ServiceFailed) as error:
            ask(service, journal, max_tokens=50)
        assert error.value.counts.calls == 0
        service.behaviour.raw = completion({"content": VERDICT})
        score, counts = ask(service, journal, max_tokens=200)
        assert score == 4 and counts.calls == 1
        score, counts = ask(service, journal, max_tokens=100)  # recorded whatever the limit
        assert score == 4 and counts.calls == 0


def test_a_half_sentence_that_reads_well_is_cut_off_all_the_same(service):
    service.behaviour.raw = completion({"content": f"{VERDICT} But wait"}, "length")
    with pytest.raises(ServiceFailed) as error:
        ask(service)
    assert error.value.kind == "cut off" and error.value.counts.calls == 1


def test_a_journal_of_version_1_gains_the_column(tmp_path):
    import sqlite3

    tmp_path.joinpath("lock").touch()
    with sqlite3.connect(tmp_path / "journal.sqlite") as old:
        old.execute("create table calls (digest text primary key, service text, text text, image text, "
                    "tokens_in integer, tokens_out integer, cost real) without rowid")
        old.execute("insert into calls values ('a', 's', 'words', null, 1, 2, 0.5)")
        old.execute("pragma user_version=1")
    old.close()
    with Journal(tmp_path) as journal:
        found = journal.call("a")
        assert (found.text, found.cost, found.cut_off) == ("words", 0.5, None)
        journal.record_call("b", "s", found)
        assert journal.call("b") == found


def test_a_model_that_takes_no_max_tokens_is_asked_with_max_completion_tokens(service):
    service.behaviour.refuses = ("max_tokens",)
    score, counts = ask(service, max_tokens=100)
    assert score and counts.calls == 1
    assert "max_tokens" not in service.log.bodies[-1] and service.log.bodies[-1]["max_completion_tokens"] == 100
    service.behaviour.refuses = ("max_tokens", "max_completion_tokens")
    with pytest.raises(UserError) as error:
        ask(service, max_tokens=100)
    assert not isinstance(error.value, ServiceFailed) and "`max_tokens`" in error.value.what


def test_a_model_that_takes_no_temperature_ends_the_run_and_names_the_key(service):
    service.behaviour.refuses = ("temperature",)
    with pytest.raises(UserError) as error:
        ask(service, temperature=0.0)
    assert not isinstance(error.value, ServiceFailed) and "`temperature`" in error.value.what
    score, _ = ask(service, temperature=-1.0)
    assert score == 4


@pytest.mark.parametrize(
    ("message", "parameter", "found"),
    [
        ("Unsupported parameter: 'max_tokens' ... Use 'max_completion_tokens' instead.", "max_tokens", "max_tokens"),
        ("Unsupported parameter: 'max_tokens' ... Use 'max_completion_tokens' instead.", "", "max_tokens"),
        ("'temperature' does not support 0.0 with this model.", "", "temperature"),
        ("max_tokens: 100000 is too large; at most 8192", "", "max_tokens"),
        ("'max_tokens' is too large: this model's maximum context length is 8192 tokens", "max_tokens", ""),
        ("Invalid value for 'size'", "size", "size"),
        ("Value error, temperature must be > 0", "", "temperature"),
        ("the image's size is not supported", "", ""),
        ("Your image was rejected", "", ""),
    ],
)
def test_a_refused_parameter_is_told_from_a_refused_question(message, parameter, found):
    assert refused_parameter(message, parameter) == found


def test_base64_is_read_however_it_is_written():
    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 90).convert("RGB").save(buffer, "PNG")
    data = buffer.getvalue()
    plain = base64.b64encode(data).decode()
    forms = (
        plain, base64.encodebytes(data).decode(), base64.urlsafe_b64encode(data).decode(), plain.rstrip("="),
        f"data:image/png;base64,{plain}", plain.replace("A", "A\r\n"),
        f" data:image/png;base64,{base64.encodebytes(data).decode()}", f"DATA:image/png;BASE64,{plain}",
        f"data:image/png;base64,{urllib.parse.quote(plain, safe='')}", f'"{plain}"', plain.replace("/", "\\/"),
        f"![image](data:image/png;base64,{plain})", f"base64,{plain}", f"b'{plain}'", f"\ufeff{plain}\0",
        plain.replace("A", "A\\n"),
    )  # fmt: skip
    assert all(decode_base64(form) == data for form in forms)
    for bad in (None, 4, " ", "http://host/x.png", "a*b", "äöü"):
        with pytest.raises(Unusable):
            decode_base64(bad)


def test_the_helpers_take_anything():
    assert message_text({}) == "" and message_text({"content": [{}, 4, None]}) == ""
    check_no_error([], {}, Secrets([]), "x")
    check_no_error({"error": None, "choices": []}, {}, Secrets([]), "x")
    with pytest.raises(Rejected):
        check_no_error({"error": {"message": "the prompt is too long", "code": 400}}, {}, Secrets([]), "x")
    for listed in ([{"error": {"message": "quota", "code": 429}}], {"errors": [{"msg": "quota", "code": 429}]}):
        with pytest.raises(Fault) as fault:
            check_no_error(listed, {}, Secrets([]), "x")
        assert fault.value.kind == "429" and "quota" in str(fault.value)


@pytest.mark.parametrize(("choice", "kind"), [
    ({"finish_reason": "error", "message": {"content": VERDICT}}, "error in a reply"),  # it may be a half
    ({"finish_reason": "abort", "message": {"content": VERDICT}}, "error in a reply"),
    ({"finish_reason": "stop", "message": {"content": "", "error": "upstream fell over"}}, "error in a reply"),
    ({"finish_reason": "refusal", "message": {"content": ""}}, "rejected"),
    ({"finish_reason": "stop", "message": {"content": [{"type": "refusal", "refusal": "I will not."}]}}, "rejected"),
])  # fmt: skip
def test_an_answer_that_was_broken_off_or_refused_is_none(service, choice, kind):
    service.behaviour.raw = json.dumps({"choices": [choice]}).encode()
    with pytest.raises(ServiceFailed) as error:
        ask(service, tries=1)
    assert error.value.kind == kind


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405, 410])
def test_a_status_that_every_question_would_get_ends_the_run(status):
    outcome = outcome_of_status(status, {}, "said so", "judge")
    assert type(outcome) is UserError and "said so" in outcome.what


@pytest.mark.parametrize("ended", ["length", "FinishReason.MAX_TOKENS", "max_output_tokens", "model_length",
                                   "token_limit"])  # fmt: skip
def test_every_word_for_the_limit_is_a_cut_off(service, ended):
    service.behaviour.raw = json.dumps(
        {"choices": [{"finish_reason": ended, "message": {"content": VERDICT}}]}
    ).encode()
    with pytest.raises(ServiceFailed) as error:
        ask(service)
    assert error.value.kind == "cut off"


@pytest.mark.parametrize("judge", ["openai", "vllm", "gemini"])
def test_every_preset_of_a_provider_is_a_service(judge):
    config = load_config(f"photographs_construct:{judge}")
    section = as_dataclass(ServiceConfig, config.services.analyzer)
    assert section.kind == "openai" and section.max_tokens >= 1500
    assert bool(section.key_variable) == (judge != "vllm")
    with pytest.raises(UserError):
        load_config("photographs_construct:nobody")


class Proxy:
    """An HTTP proxy on loopback: answers forwarded requests itself, refuses tunnels, and notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, reader, writer) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.asked.append(head.split(b"\r\n")[0].decode().rpartition(" ")[0])
        body = completion({"content": VERDICT}) if b"/chat/" in head else b'{"code": 0, "response": "%s"}' % b"fine"
        status = b"502 Bad Gateway" if head.startswith(b"CONNECT") else b"200 OK"
        writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, len(body), body))
        await writer.drain()
        writer.close()


@pytest.fixture
def without_proxies(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch


@pytest.mark.parametrize("client", [lambda config: OpenAIClient(config, ""),
                                       lambda config: GatewayClient(config, "app", "secret")])  # fmt: skip
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "https_proxy", "ALL_PROXY", "NO_PROXY"])
def test_calls_go_through_the_proxy_of_the_environment(without_proxies, client, variable):
    proxy, scheme = Proxy(), "https" if variable == "https_proxy" else "http"

    async def call():
        async with await asyncio.start_server(proxy, "127.0.0.1", 0) as server:
            address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            if variable == "NO_PROXY":
                without_proxies.setenv("HTTP_PROXY", f"http://{address}")
                without_proxies.setenv("NO_PROXY", "judge.invalid")
            else:
                without_proxies.setenv(variable, f"http://user:password@{address}")
            made = client(service_config(f"{scheme}://judge.invalid/v1", key_variable="", timeout=5.0))
            try:
                return (await made.chat("A question.", [], {})).text, address
            except Fault as fault:
                return str(fault), address
            finally:
                await made.close()

    said, address = asyncio.run(call())
    assert "password" not in said
    if variable == "NO_PROXY":
        assert proxy.asked == [] and said.startswith("connection")
    elif scheme == "https":
        assert proxy.asked == ["CONNECT judge.invalid:443"] and address in said and "HTTPS_PROXY" in said
    else:
        assert proxy.asked[0].startswith("POST http://judge.invalid/v1/chat") and said in (VERDICT, "fine")


@pytest.mark.parametrize("value", ["socks5://user:password@127.0.0.1:1080", "http://127.0.0.1:port", "http://"])
def test_a_proxy_that_cannot_be_used_is_one_line(without_proxies, value):
    without_proxies.setenv("HTTPS_PROXY", value)
    for made in (lambda config: OpenAIClient(config, ""), lambda config: GatewayClient(config, "app", "secret")):
        with pytest.raises(UserError) as caught:
            made(service_config("https://judge.invalid/v1", key_variable=""))
        assert "HTTPS_PROXY" in caught.value.what and "password" not in str(caught.value)
