"""From a config's sections to services, analyzer and generator."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ivr_jax.config import as_dataclass
from ivr_jax.errors import UserError
from ivr_jax.services.analyzer import ServiceAnalyzer
from ivr_jax.services.config import ServiceConfig, secret
from ivr_jax.services.gateway_client import GatewayClient
from ivr_jax.services.generator import ServiceGenerator
from ivr_jax.services.http_client import HttpClient
from ivr_jax.services.limits import LimitsOf, ProcessLimits
from ivr_jax.services.openai_client import OpenAIClient
from ivr_jax.services.prompts import Prompts
from ivr_jax.services.service import Records, Service
from ivr_jax.thresholds import WHOLE_REQUEST, Thresholds

REMOTE = ("openai", "gateway")


def service_from_config(
    section: Mapping[str, Any] | ServiceConfig,
    records: Records | None,
    has_fallback: bool = False,
    environment: Mapping[str, str] | None = None,
    limits: LimitsOf = ProcessLimits,
) -> Service:
    """One service of the kind "openai" or "gateway".

    Args:
      section: a config section with the fields of `ServiceConfig`.
      records: where answers are kept; None keeps nothing.
      has_fallback: whether another service is asked when this one fails.
      environment: where keys are looked up; the process's own variables when None.
      limits: makes what grants its calls.

    Raises:
      UserError: a wrong setting, or a key that is not set.
    """
    config = section if isinstance(section, ServiceConfig) else as_dataclass(ServiceConfig, section)
    environment = os.environ if environment is None else environment
    key = secret(config.key_variable, environment)
    client: HttpClient
    if config.kind == "openai":
        client = OpenAIClient(config, key)
    elif config.kind == "gateway":
        client = GatewayClient(config, secret(config.app_variable, environment), key)
    else:
        raise UserError(f"unknown kind of service {config.kind!r}.", f"Use one of {REMOTE}.")
    return Service(config, client, records, has_fallback, limits(config))


def analyzer_from_configs(
    sections: Sequence[Mapping[str, Any] | ServiceConfig],
    records: Records | None,
    thresholds: Thresholds = WHOLE_REQUEST,
    environment: Mapping[str, str] | None = None,
    prompts: Prompts | None = None,
    limits: LimitsOf = ProcessLimits,
) -> ServiceAnalyzer:
    """An analyzer that asks `sections` in order: the service, then its fallbacks."""
    services = [
        service_from_config(section, records, i + 1 < len(sections), environment, limits)
        for i, section in enumerate(sections)
    ]
    return ServiceAnalyzer(services, thresholds, prompts)


def generator_from_config(
    section: Mapping[str, Any] | ServiceConfig,
    records: Records | None,
    environment: Mapping[str, str] | None = None,
    prompts: Prompts | None = None,
    limits: LimitsOf = ProcessLimits,
) -> ServiceGenerator:
    """A generator that asks the service `section`."""
    return ServiceGenerator(service_from_config(section, records, environment=environment, limits=limits), prompts)
