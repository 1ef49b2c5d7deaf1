"""Training data of the micro-world's base model: exact direct drawings, and failed ones for evaluation alone.

Command: python -m ivr_jax.construct --config=configs/micro_construct_base.py --workdir=runs/demo/construct_base
"""

from ml_collections import ConfigDict

from . import micro_construct


def get_config() -> ConfigDict:
    config = micro_construct.get_config()
    config.seed = 1
    config.tasks.seed = 1
    config.tasks.edits = (3, 2, 1, 1)
    config.quotas = ConfigDict({"direct": 12_000, "reflection": 0, "multi_step": 0, "evaluation": 1000})
    config.rules.max_reflections = 0
    config.generator.fault_rate = 0.1
    return config
