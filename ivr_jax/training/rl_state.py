"""What an RL run consists of, beside its functions: where it happens, and what it carries from step to step."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ivr_jax import sharding
from ivr_jax.checkpoints import system as systems
from ivr_jax.models import backbone, lora
from ivr_jax.rewards.judge_service import JudgeResult
from ivr_jax.sampling.layout import RolloutLayout
from ivr_jax.sampling.rollout import Rollout
from ivr_jax.training.prompts import Prompt
from ivr_jax.training.state import TrainState, apply_gradients


class OverlapState(NamedTuple):
    """A `TrainState` with the parameters (of `lora.split`) that sampled the next rollouts: `overlap` trees.

    The first are those before the last `overlap` updates.
    """

    params: Any
    opt_state: Any
    previous: tuple[Any, ...]

    @classmethod
    def begin(cls, state: TrainState, ahead: int) -> OverlapState:
        """Before the first step: all rollouts that are sampled ahead come from the parameters of now."""
        previous = tuple(jax.tree.map(jnp.copy, lora.split(state.params)[0]) for _ in range(ahead))
        return cls(state.params, state.opt_state, previous)


def update_function(optimizer: optax.GradientTransformation, keep: bool, out_shardings: Any = None) -> Any:
    """`state.apply_gradients` jitted; `keep`: the old parameters stay, since they sampled a rollout to come."""
    apply = functools.partial(apply_gradients, optimizer=optimizer)
    return jax.jit(apply, donate_argnums=() if keep else (0,), out_shardings=out_shardings)


class PendingRollout(NamedTuple):
    """This process's part of a rollout, the prompts of its groups, and the judgement that is on its way."""

    rollout: Rollout
    prompts: tuple[Prompt, ...]
    judge_result: concurrent.futures.Future[JudgeResult]


class Placement(NamedTuple):
    """Where a run happens.

    mesh: of training; state: shardings of the `TrainState`, None on one device; layout: where answers are sampled.
    """

    mesh: jax.sharding.Mesh
    state: TrainState | None
    layout: RolloutLayout

    @classmethod
    def on_one_device(cls, config: backbone.BackboneConfig) -> Placement:
        """Everything on the first device."""
        mesh = sharding.make_mesh({}, jax.devices()[:1])
        return cls(mesh, None, RolloutLayout(config, mesh))


@dataclasses.dataclass(frozen=True)
class Probe:
    """A measurement of the policy: every `every` steps `measure(system, step)` gives metrics by name.

    It reads the policy and changes nothing.
    """

    every: int
    measure: Callable[[systems.System, int], Mapping[str, float]]


def sampler_of(system: systems.System, layout: RolloutLayout, params: Any) -> systems.System:
    """The policy `params` with the weights that answers are sampled with; called by all processes together."""
    return dataclasses.replace(system, config=layout.config, params=layout(params), mesh=layout.mesh)


def run_probes(
    probes: Sequence[Probe], system: systems.System, layout: RolloutLayout, params: Any, step: int
) -> dict[str, float]:
    """What `probes` measure of the policy `params`, with the weights that answers are sampled with."""
    sampler = sampler_of(system, layout, params)
    with jax.set_mesh(layout.mesh):
        return {name: value for probe in probes for name, value in probe.measure(sampler, step).items()}
