"""Evaluation on held-out prompts of the micro-world: the training mixture by number of edits, and twelve splits in the
manner of GenEval, KRIS-Bench and OmniContext.

Command: python -m ivr_jax.evaluate --config=configs/micro_evaluate.py --workdir=runs/demo/eval_sft \
    --config.checkpoint=runs/demo/sft
"""

from ml_collections import ConfigDict

from . import micro_rl


def get_config() -> ConfigDict:
    rl = micro_rl.get_config()
    config = ConfigDict()
    config.checkpoint = ""
    config.image_tokenizer = ""  # where the image tokenizer is, if it was moved
    config.seed = 7
    config.level = 0
    config.prompts = 512
    config.most_edits = 4
    config.each_split = 24
    config.batch = 128
    config.answer_length = rl.answer_length
    config.sampling = rl.sampling
    config.grammar = rl.grammar
    config.reward = rl.reward
    return config
