"""Analyzer and generator, as a config's section `services` names them."""

from __future__ import annotations

import dataclasses
from typing import Any

from ivr_jax.checkpoints.system import System
from ivr_jax.config import as_dataclass
from ivr_jax.construct.escalation import Rules
from ivr_jax.errors import UserError
from ivr_jax.interfaces import Analyzer, Generator
from ivr_jax.sampling.layout import load_sampler
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.services.build import REMOTE, analyzer_from_configs, generator_from_config
from ivr_jax.services.checkpoint import CheckpointGenerator
from ivr_jax.services.config import ServiceConfig
from ivr_jax.services.generator import ServiceGenerator
from ivr_jax.services.journal import Journal
from ivr_jax.services.limits import LimitsOf, ProcessLimits
from ivr_jax.services.prompts import Prompts
from ivr_jax.services.service import Service
from ivr_jax.thresholds import WHOLE_REQUEST, Thresholds
from ivr_jax.world.analyzer import WorldAnalyzer
from ivr_jax.world.generator import WorldGenerator

ROLES = ("analyzer", "fallback", "generator", "baseline")


@dataclasses.dataclass(frozen=True)
class Services:
    """The services, as configured.

    Attributes:
      analyzer, generator: the interfaces; baseline: what draws first images in the generator's place, or None.
      remote: those behind them that are called over a network.
      made_by: what is stored with every sample; empty for the micro-world.
    """

    analyzer: Analyzer
    generator: Generator
    baseline: Generator | None
    remote: tuple[Service, ...]
    made_by: dict[str, Any]

    async def close(self) -> None:
        """Ends all connections."""
        for service in self.remote:
            await service.client.close()


def load_system(config: Any, path: str) -> System:
    """The model at `path`; `text_tokenizer` and `image_tokenizer` of the config name what an import does not record."""
    return load_sampler(
        path, config.mesh, config.rollout, config.image_tokenizer or None, config.text_tokenizer or None
    )


def rules_from_config(section: Any) -> Rules:
    """The section `rules`, whose thresholds are sections themselves, or None."""
    values = dict(section.items())
    for name in ("thresholds", "step_thresholds"):
        if values.get(name) is not None:
            values[name] = as_dataclass(Thresholds, values[name])
    return as_dataclass(Rules, values)


def service_sections(config: Any) -> dict[str, ServiceConfig]:
    """The config's services by role; raises UserError for invalid settings."""
    return {role: as_dataclass(ServiceConfig, config.services[role]) for role in ROLES}


def build_services(config: Any, journal: Journal, limits: LimitsOf = ProcessLimits) -> Services:
    """Analyzer and generator of the config, their calls granted by `limits`.

    Raises UserError for wrong settings and missing keys.
    """
    sections = service_sections(config)
    rules, prompts = rules_from_config(config.rules), Prompts(config.prompts)
    remote: list[Service] = []
    if sections["analyzer"].kind == "world":
        analyzer: Analyzer = WorldAnalyzer(config.analyzer.threshold, observe=config.analyzer.observe)
    elif sections["analyzer"].kind in REMOTE:
        asked = [sections[role] for role in ("analyzer", "fallback") if sections[role].kind]
        analyzer = analyzer_from_configs(asked, journal, rules.thresholds or WHOLE_REQUEST, None, prompts, limits)
        remote += analyzer.services
    else:
        raise UserError(f"the analyzer's kind is {sections['analyzer'].kind!r}.", "Use world, openai or gateway.")
    kind = sections["generator"].kind
    if kind == "world":
        generator: Generator = WorldGenerator(**config.generator)
    elif kind == "checkpoint":
        options = as_dataclass(SamplingOptions, config.sampling)
        path = sections["generator"].checkpoint
        area = config.image_area if config.samples else None
        size = sections["generator"].size
        generator = CheckpointGenerator(load_system(config, path), path, options, config.seed, journal, area, size)
    elif kind in REMOTE:
        generator = generator_from_config(sections["generator"], journal, prompts=prompts, limits=limits)
        remote.append(generator.service)
    else:
        raise UserError(f"the generator's kind is {kind!r}.", "Use world, checkpoint, openai or gateway.")
    baseline = _remote_baseline(config, sections["baseline"], journal, prompts)
    if baseline is not None:
        remote.append(baseline.service)
    made_by = {role: section.name for role, section in sections.items() if section.kind not in ("", "world")}
    if made_by:
        made_by["prompts"] = prompts.versions()
    return Services(analyzer, generator, baseline, tuple(remote), made_by)


def _remote_baseline(
    config: Any, section: ServiceConfig, journal: Journal, prompts: Prompts
) -> ServiceGenerator | None:
    if not section.kind:
        return None
    if section.kind not in REMOTE:
        raise UserError(f"the kind of the service `baseline` is {section.kind!r}.",
                        "Use openai or gateway; a checkpoint is named by --config.baseline=WORKDIR.")  # fmt: skip
    if config.baseline:
        raise UserError("both a checkpoint and a service are named as baseline.", "Leave one of them empty.")
    return generator_from_config(section, journal, prompts=prompts)
