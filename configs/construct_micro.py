"""The micro-world's full fine-tuning set: the paper's 50,000 samples in its mix, 10,000 / 20,000 / 20,000.

First images come from the generator, so nothing has to be trained before; `--config.baseline=WORKDIR` lets a model draw
them. Its rates of faults are set so that few requests answer a quota that is already full: of 53,711 requests 50,000
were kept (measured).

Cost: 8 min 40 s of one core (measured; 21 min on a machine that was busy with other work), 0.4 GB of memory, 129 MB.
Command: python -m ivr_jax.construct --config=configs/construct_micro.py --workdir=runs/construct_micro
"""

from ml_collections import ConfigDict

from . import micro_construct


def get_config() -> ConfigDict:
    config = micro_construct.get_config()
    config.seed = 3
    config.tasks.seed = 3
    config.tasks.limit = 200_000
    config.generator.seed = 3
    config.quotas = ConfigDict({"direct": 10_000, "reflection": 20_000, "multi_step": 20_000, "evaluation": 0})
    return config
