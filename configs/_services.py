"""Sections for services: one for each analyzer, fallback, generator and baseline of a config; not a config by itself.

Prices are for the summary alone and change often: set them from the provider's list.
"""

from ml_collections import ConfigDict


def service(kind: str, **settings: object) -> ConfigDict:
    """The settings of one service (see `ivr_jax.services.config.ServiceConfig`)."""
    section = ConfigDict(
        {
            "kind": kind,
            "base_url": "https://api.openai.com/v1",
            "model": "",
            "key_variable": "OPENAI_API_KEY",
            "app_variable": "",
            "source": "python-client",
            "checkpoint": "",
            "temperature": -1.0,
            "max_tokens": 0,
            "structured": "auto",
            "image_side": 1024,
            "size": "auto",
            "image_reply": "",
            "in_flight": 64,
            "requests_per_minute": 0.0,
            "tokens_per_minute": 0.0,
            "image_tokens": 1000,
            "timeout": 180.0,
            "tries": 8,
            "first_wait": 1.0,
            "longest_wait": 120.0,
            "breaker_failures": 30,
            "breaker_rest": 15.0,
            "patience": 3600.0,
            "price_in": 0.0,
            "price_out": 0.0,
            "price_image": 0.0,
        }
    )
    section.update(settings)
    return section


# -- providers --
#
# What each needs beside a key.  Models and prices change: see the provider's list.


def openai(model: str = "gpt-4o", **settings: object) -> ConfigDict:
    """A judge at OpenAI.  Reasoning models (o-series, gpt-5) take no temperature: `temperature=-1.0`.

    They spend `max_tokens` on thoughts as well, so give them several thousand; `max_completion_tokens` is sent by
    itself where `max_tokens` is refused.
    """
    return service("openai", **{"model": model, "temperature": 0.0, "max_tokens": 1500, "in_flight": 32} | settings)


def openai_images(model: str = "gpt-image-1", **settings: object) -> ConfigDict:
    """Images drawn and edited at OpenAI.  `gpt-image-1` refuses `image_reply` and always sends base64."""
    return service("openai", **{"model": model, "in_flight": 16, "timeout": 300.0} | settings)


def vllm(
    model: str = "Qwen/Qwen3-VL-32B-Instruct", base_url: str = "http://127.0.0.1:8000/v1", **settings: object
) -> ConfigDict:
    """A judge behind a vLLM server of your own: no key, no limits but the server's own queue.

    Start it with `vllm serve MODEL --limit-mm-per-prompt '{"image": 8}'`: a judgement shows up to 8 images.  A thinking
    model needs `--reasoning-parser` there, and room for its thoughts in `max_tokens`.
    """
    given = {"model": model, "base_url": base_url, "key_variable": "", "temperature": 0.0, "max_tokens": 2000}
    return service("openai", **given | {"structured": "json_schema", "in_flight": 128, "timeout": 600.0} | settings)


_GEMINI = {
    "base_url": "https://generativelanguage.googleapis.com/v1beta/openai/",
    "key_variable": "GEMINI_API_KEY",
}


def gemini(model: str = "gemini-2.5-flash", **settings: object) -> ConfigDict:
    """A judge at Google, through its compatible endpoint.  It thinks within `max_tokens`, hence the large limit."""
    given = {"model": model, "temperature": 0.0, "max_tokens": 8000, "in_flight": 16, "image_tokens": 258}
    return service("openai", **_GEMINI | given | settings)


def gemini_images(model: str = "imagen-4.0-generate-001", **settings: object) -> ConfigDict:
    """Images drawn at Google.  The compatible endpoint has no `images/edits`: only requests without sources work."""
    given = {"model": model, "image_reply": "b64_json", "size": "", "in_flight": 8, "timeout": 300.0}
    return service("openai", **_GEMINI | given | settings)


def world() -> ConfigDict:
    """The micro-world's own analyzer and generator, which need no service."""
    return ConfigDict(
        {
            "analyzer": service("world"),
            "fallback": service(""),
            "generator": service("world"),
            "baseline": service(""),
        }
    )
