"""ivr_jax: one unified text-and-image model that reasons in interleaved text and images, in JAX.

    import ivr_jax

    model = ivr_jax.load_model("runs/demo/rl")
    answer = ivr_jax.generate_answer(model, "Put a red circle at b2.", seed=1)
    answer.trajectory.rounds[-1].evaluation.passed          # the model's own verdict on its last image
    pixels = answer.images[answer.trajectory.images[-1]]    # uint8 [height, width, 3]

Names below are imported when they are first used, so that `import ivr_jax` takes no time.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from ivr_jax.errors import explain_refused_variables

if TYPE_CHECKING:
    from ivr_jax.checkpoints.system import System as Model
    from ivr_jax.checkpoints.system import load as load_model
    from ivr_jax.construct.escalation import construct as construct_trajectory
    from ivr_jax.convert.__main__ import convert_checkpoint
    from ivr_jax.data.store import TrajectoryDataset, TrajectoryWriter
    from ivr_jax.errors import UserError
    from ivr_jax.generate.answering import generate_answer
    from ivr_jax.interfaces import Analyzer, Generator
    from ivr_jax.rewards.functions import RewardOptions, score_groups
    from ivr_jax.rewards.judge import score_answer
    from ivr_jax.sampling.logits_processors import SamplingOptions
    from ivr_jax.training.sft import make_step as make_sft_step
    from ivr_jax.trajectory import Evaluation, Mode, Sample, Trajectory

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # as a command, `python -m ivr_jax.NAME`; whoever imports the package keeps its own hook
    explain_refused_variables()

_EXPORTS = {  # name -> module, and its name there
    "Model": ("checkpoints.system", "System"),
    "load_model": ("checkpoints.system", "load"),
    "generate_answer": ("generate.answering", "generate_answer"),
    "SamplingOptions": ("sampling.logits_processors", "SamplingOptions"),
    "score_answer": ("rewards.judge", "score_answer"),
    "score_groups": ("rewards.functions", "score_groups"),
    "RewardOptions": ("rewards.functions", "RewardOptions"),
    "construct_trajectory": ("construct.escalation", "construct"),
    "Analyzer": ("interfaces", "Analyzer"),
    "Generator": ("interfaces", "Generator"),
    "make_sft_step": ("training.sft", "make_step"),
    "convert_checkpoint": ("convert.__main__", "convert_checkpoint"),
    "TrajectoryDataset": ("data.store", "TrajectoryDataset"),
    "TrajectoryWriter": ("data.store", "TrajectoryWriter"),
    "Trajectory": ("trajectory", "Trajectory"),
    "Sample": ("trajectory", "Sample"),
    "Evaluation": ("trajectory", "Evaluation"),
    "Mode": ("trajectory", "Mode"),
    "UserError": ("errors", "UserError"),
}

__all__ = [
    "Analyzer",
    "Evaluation",
    "Generator",
    "Mode",
    "Model",
    "RewardOptions",
    "Sample",
    "SamplingOptions",
    "Trajectory",
    "TrajectoryDataset",
    "TrajectoryWriter",
    "UserError",
    "construct_trajectory",
    "convert_checkpoint",
    "generate_answer",
    "load_model",
    "make_sft_step",
    "score_answer",
    "score_groups",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, inner = _EXPORTS[name]
    value = getattr(importlib.import_module(f"{__name__}.{module}"), inner)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
