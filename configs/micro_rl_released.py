r"""RL of the micro-world's fine-tuned model with the reward of the authors' public code instead of the paper's.

No complexity bonus; scores count (s - 1) / 4, axes are weighted, steps are judged by their images and reflections are
a component of their own (`ivr_jax.rewards.functions.RELEASED`).  Everything else as in micro_rl.  Untested at length.
Command: python -m ivr_jax.train --config=configs/micro_rl_released.py --workdir=runs/demo/rl_released \
    --config.init=runs/demo/sft
"""

from ml_collections import ConfigDict

from . import micro_rl


def get_config() -> ConfigDict:
    config = micro_rl.get_config()
    config.reward.update(
        {
            "outcome_weight": 0.4,
            "format_weight": 0.1,
            "step_weight": 0.3,
            "reflection_weight": 0.2,
            "axis_weights": (0.40, 0.25, 0.20, 0.15),
            "score_map": "unit",
            "intermediate": "images",
            "missing_value": 0.0,
            "bonus_weight": 0.0,
        }
    )
    return config
