"""Sections for services: one for each analyzer, fallback and generator of a config; not a config of its own.

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


def world() -> ConfigDict:
    """The micro-world's own analyzer and generator, which need no service."""
    return ConfigDict({"analyzer": service("world"), "fallback": service(""), "generator": service("world")})
