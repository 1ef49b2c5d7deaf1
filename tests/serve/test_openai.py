"""OpenAI's protocol, asked by the real client over a real socket."""

from __future__ import annotations

import base64
import concurrent.futures
import json

import jax
import numpy as np
import openai
import pytest
import serving
from serving import PROMPT, pixels_of, png

from ivr_jax.protocol import codec
from ivr_jax.sampling.batch import PromptBatch, RolloutOptions, sample
from ivr_jax.sampling.engine import pad_prompts
from ivr_jax.trajectory import Sample


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    models = serving.tiny(), serving.tiny("imported", imported=True)
    with serving.serving(tmp_path_factory.mktemp("answers"), *models) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def image_of(data) -> np.ndarray:
    return pixels_of(base64.b64decode(data.b64_json))


def from_data_url(url: str) -> np.ndarray:
    return pixels_of(base64.b64decode(url.removeprefix("data:image/png;base64,")))


def drawn_alone(model, prompt: str, seed: int, mode: str = "direct") -> list[np.ndarray]:
    """The images that the rollout engine draws for one prompt by itself."""
    system, grammar, request = model.system, model.grammar.grammars[mode], Sample("request", prompt)
    rows = pad_prompts([codec.encode_prompt(system.tokenizer, request, {})], system.tokenizer.vocab.pad, 32)
    keys = jax.random.fold_in(jax.random.key(seed), 0)[None]
    options = RolloutOptions(200, size=(2, 2))
    drawn, _ = sample(system.config, system.params, grammar, PromptBatch(*rows), keys, options)
    count = drawn.lengths[0]
    answer = codec.parse_answer(grammar, request, drawn.tokens[0, :count], drawn.nodes[0, : count + 1])
    return system.image_codec.decode(list(answer.codes.values()))


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny", "imported"]
    assert client.models.retrieve("tiny").owned_by == "ivr_jax"
    with pytest.raises(openai.BadRequestError):
        client.models.retrieve("gpt-1")


def test_an_image_is_that_of_the_engine_for_the_same_seed(server, client):
    reply = client.images.generate(model="tiny", prompt=PROMPT, extra_body={"seed": 5, "mode": "direct"})
    expected = drawn_alone(server.model, PROMPT, 5)
    np.testing.assert_array_equal(image_of(reply.data[0]), expected[-1])
    assert reply.usage.output_tokens > 20 and reply.usage.input_tokens > 3


def test_several_images_have_consecutive_seeds_and_a_size_is_an_aspect_ratio(client):
    body = {"seed": 9, "mode": "direct"}
    many = client.images.generate(model="tiny", prompt=PROMPT, n=2, extra_body=body)
    second = client.images.generate(model="tiny", prompt=PROMPT, extra_body={**body, "seed": 10})
    np.testing.assert_array_equal(image_of(many.data[1]), image_of(second.data[0]))
    wide = client.images.generate(model="tiny", prompt=PROMPT, size="1536x768", response_format="url", extra_body=body)
    height, width, _ = from_data_url(wide.data[0].url).shape
    assert width > height


def test_an_edit_takes_one_or_two_images(client):
    one = client.images.edit(model="tiny", prompt=PROMPT, image=("a.png", png(), "image/png"), extra_body={"seed": 1})
    assert image_of(one.data[0]).shape == (32, 32, 3)
    files = [("a.png", png(), "image/png"), ("b.png", png(grey=20), "image/png")]
    two = client.images.edit(model="tiny", prompt=PROMPT, image=files, extra_body={"seed": 1})
    assert image_of(two.data[0]).shape == (32, 32, 3)
    with pytest.raises(openai.BadRequestError):
        client.images.edit(model="tiny", prompt=PROMPT, image=("a.png", b"GIF8 no image", "image/png"))


def test_a_streamed_image_shows_rows_before_it_is_whole(client):
    stream = client.images.generate(model="tiny", prompt=PROMPT, stream=True, partial_images=3,
                                    extra_body={"seed": 5, "mode": "multi_step"})  # fmt: skip
    events = list(stream)
    assert events[-1].type == "image_generation.completed"
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    assert 1 <= len(partial) <= 3
    assert [event.partial_image_index for event in partial] == list(range(len(partial)))
    whole = client.images.generate(model="tiny", prompt=PROMPT, extra_body={"seed": 5, "mode": "multi_step"})
    np.testing.assert_array_equal(image_of(events[-1]), image_of(whole.data[0]))


def test_a_chat_answer_holds_texts_and_images(server, client):
    reply = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": PROMPT}], seed=3, extra_body={"mode": "reflection"}
    )
    message = reply.choices[0].message
    assert reply.choices[0].finish_reason == "stop" and "Instruction: " in message.content
    expected = drawn_alone(server.model, PROMPT, 3, "reflection")
    images = [from_data_url(image["image_url"]["url"]) for image in message.images]
    assert len(images) == len(expected) >= 2
    for found, wanted in zip(images, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_an_imported_model_answers_with_texts_and_images_in_any_order(client):
    asked = {"model": "imported", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 60}
    shapes = []
    for first in (0, 4):
        whole = client.chat.completions.create(**asked, seed=first, n=4).choices
        stream = client.chat.completions.create(**asked, seed=first, n=4, stream=True)
        pieces = [choice for chunk in stream for choice in chunk.choices]
        for choice in whole:
            assert choice.finish_reason in ("stop", "length")
            deltas = [piece.delta for piece in pieces if piece.index == choice.index]
            assert [i for d in deltas for i in getattr(d, "images", None) or []] == choice.message.images
            shapes += [from_data_url(image["image_url"]["url"]).shape for image in choice.message.images]
    assert shapes and set(shapes) == {(32, 32, 3)}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**asked, extra_body={"mode": "reflection"})


def test_a_chat_stream_says_the_same_piece_by_piece(client):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "seed": 3,
             "extra_body": {"mode": "reflection"}}  # fmt: skip
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    text = "".join(delta.content or "" for delta in deltas)
    assert text.strip() == whole.choices[0].message.content.strip()
    images = [image for delta in deltas for image in getattr(delta, "images", None) or []]
    assert images == whole.choices[0].message.images
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


def test_the_image_of_an_earlier_answer_is_the_reference_of_the_next_question(client):
    url = f"data:image/png;base64,{base64.b64encode(png(grey=20)).decode()}"
    picture = {"type": "image_url", "image_url": {"url": url}}
    asked = {"model": "tiny", "seed": 4, "extra_body": {"mode": "direct"}}
    direct = client.chat.completions.create(
        messages=[{"role": "user", "content": [{"type": "text", "text": PROMPT}, picture]}], **asked
    )
    later = client.chat.completions.create(
        messages=[
            {"role": "system", "content": "You draw."},
            {"role": "user", "content": "Draw"},
            {"role": "assistant", "content": "Here.", "images": [picture]},
            {"role": "user", "content": PROMPT},
        ],
        **asked,
    )
    assert later.choices[0].message.images == direct.choices[0].message.images
    assert later.usage.prompt_tokens == direct.usage.prompt_tokens


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ""},
        {"prompt": "Draw <|image start|> here"},
        {"prompt": "x" * 4001},
        {"prompt": "word " * 60},  # 300 bytes, and as many tokens: longer than the context
        {"prompt": PROMPT, "n": 0},
        {"prompt": PROMPT, "n": 99},
        {"prompt": PROMPT, "model": "another"},
        {"prompt": PROMPT, "mode": "musing"},
        {"prompt": PROMPT, "seed": -1},
        {"prompt": PROMPT, "temperature": 3},
        {"prompt": PROMPT, "size": "huge"},
        {"prompt": PROMPT, "size": "5000x16"},
        {"prompt": PROMPT, "colour": "red"},
        {"prompt": ["a", "b"]},
        {"prompt": PROMPT, "max_tokens": 5},
    ],
    ids=lambda body: "-".join(f"{k}" for k in body if k != "prompt") or str(len(body["prompt"])),
)
def test_a_bad_request_is_one_clear_error_and_disturbs_nobody(server, body):
    with server.client() as http:
        reply = http.post("/v1/images/generations", json=body)
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert error["type"] == "invalid_request_error" and 10 < len(error["message"]) < 500
        assert "Traceback" not in reply.text
        assert http.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "url",
    ["https://example.org/cat.png", "file:///etc/passwd", "data:text/html;base64,AAAA", "data:image/png;base64,!!!"],
)
def test_no_address_is_fetched(client, url):
    content = [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])


def test_bodies_that_are_no_json_objects(server):
    with server.client() as http:
        headers = {"Content-Type": "application/json"}
        for body in (b"", b"[]", b"{", b"\xff", b"[" * 100_000):
            assert http.post("/v1/chat/completions", content=body, headers=headers).status_code == 400
        assert http.post("/v1/chat/completions", content=b"{}").status_code == 415
        assert http.post("/v1/chat/completions", json={"messages": "hello"}).status_code == 400
        assert http.post("/v1/images/edits", json={"prompt": PROMPT}).status_code == 400


def test_sixteen_clients_at_once_get_what_one_after_the_other_gets(server):
    def ask(seed: int) -> list[str]:
        mode = ("auto", "direct", "reflection", "multi_step")[seed % 4]
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as own:
            reply = own.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": PROMPT + "!" * (seed % 3)}], seed=seed,
                extra_body={"mode": mode},
            )  # fmt: skip
        message = reply.choices[0].message
        return [message.content, *(image["image_url"]["url"] for image in message.images)]

    alone = [ask(seed) for seed in range(16)]
    assert len({json.dumps(answer) for answer in alone}) > 10
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(16)))
    assert together == alone


def test_a_client_that_goes_away_frees_its_slot(server):
    state = 'ivr_answers_total{state="stopped"}'
    before, body = server.metric(state), {"messages": [{"role": "user", "content": PROMPT}], "mode": "multi_step"}
    with server.client() as http:
        for seed in range(3):
            with http.stream("POST", "/v1/chat/completions", json={**body, "seed": seed, "stream": True}) as reply:
                assert b"assistant" in next(reply.iter_bytes())  # and away
    server.idle()
    assert before < server.metric(state) <= before + 3
    with server.client() as http:
        assert http.post("/v1/chat/completions", json={**body, "seed": 1}).status_code == 200
