r"""The swap test of a model on a trajectory dataset: does its verdict depend on the image that it judges?

Command: python -m ivr_jax.evaluate.swap --config=configs/swap_test.py --workdir=runs/demo/swap_sft \
    --config.checkpoint=runs/demo/sft --config.data=runs/demo/construct/dataset
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.checkpoint = ""
    config.image_tokenizer = ""  # where the image tokenizer is, if it was moved or never recorded
    config.text_tokenizer = ""  # likewise
    config.data = ""  # a dataset of trajectories, best one that the model was not trained on
    config.seed = 0  # of the bootstrap intervals
    config.prompts = 256  # at most
    config.batch = 64  # images scored at a time
    config.evaluation_length = 512  # most tokens of one evaluation
    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1})  # devices; -1: all that are left
    config.grammar = ConfigDict(
        {
            "modes": ("direct", "reflection", "multi_step"),
            "force": False,
            "max_reflections": 3,
            "max_steps": 5,
            "follow_verdict": True,
            "text_cap": 128,
        }
    )
    return config
