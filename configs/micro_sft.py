r"""Supervised fine-tuning of the micro-world's base model on direct, reflection and multi-step trajectories (2:1:2).

Paper: 1:2:2, next-token loss on the selected tokens, one epoch, cosine schedule with 10% warm-up.  Here: several
epochs over a few thousand trajectories; half of the examples are made up as the base model's were, now of all modes.
Command: python -m ivr_jax.train --config=configs/micro_sft.py --workdir=runs/demo/sft --config.init=runs/demo/base \
    --config.data.path=runs/demo/construct/dataset --config.data.practice_share=0.5 \
    --config.image_tokenizer=runs/demo/image_tokenizer
"""

from ml_collections import ConfigDict

from . import micro_base


def get_config() -> ConfigDict:
    config = micro_base.get_config()
    config.steps = 800
    config.data.length = 704
    config.data.practice_share = 0.0
    config.data.practice.lessons = ConfigDict({"direct": 2.0, "judge": 1.0, "reflection": 2.0, "multi_step": 2.0})
    config.batch = 4
    config.data.mix = ConfigDict({"direct": 2.0, "reflection": 1.0, "multi_step": 2.0})
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_ratio = 0.1
    return config
