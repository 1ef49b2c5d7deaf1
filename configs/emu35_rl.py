r"""RL of the fine-tuned Emu3.5 (34.1 B) as in the paper: GRPO, groups of 8, temperature 1, one epoch of 50,000 prompts.

Paper: learning rate 1e-6 cosine after 10% warm-up, KL coefficient 0.01 to the SFT model, the paper's reward and
complexity bonus.  The paper does not say how many prompts make a step; 64 here, so 512 answers and 782 steps.
Cost: an answer is 1 to 6 images of 1,055 tokens and their texts; memory, estimated times: docs/results/pods-compile.md.
The prompts are a trajectory dataset's samples; set `judge.outcome` and `judge.reasoning` to a vision-language service.
Each host draws and judges the answers to its part of the prompts, with the weights cut over its own chips.  Untested.
Command: python -m ivr_jax.train --config=configs/emu35_rl.py --workdir=runs/emu35/rl --config.init=runs/emu35/sft \
    --config.prompts.source=runs/emu35/prompts/dataset
Plan:    python -m ivr_jax.compile --config=configs/emu35_rl.py --model=emu35_sft --topology=v5p:4x4x8
"""

from ml_collections import ConfigDict

from . import micro_rl


def get_config() -> ConfigDict:
    config = micro_rl.get_config()
    config.steps = 782
    config.prompts_per_step = 64
    config.group_size = 8
    config.answer_length = 7168
    config.micro_batch = 64
    config.buckets = (2048, 4096, 9216)  # the longest answer, and a prompt with one source image
    config.packed_rows = 0  # rows of a pass that answers are packed into; 0: `micro_batch` answers, one a row
    config.loss_chunk_tokens = 65_536
    config.checkpoint_every = 20
    config.max_checkpoints = 2
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 4, "sequence": 1})
    config.rollout.update({"dtype": "bfloat16", "tensor": 4})  # the chips of one v5p host
    config.prompts = ConfigDict({"source": "", "level": 0, "seed": 3, "size": 0, "image_area": 512 * 512})
    config.judge.every_image = False  # a call each
    config.grammar.max_steps = 5
    config.grammar.text_cap = 512
    config.optimizer.learning_rate = 1e-6
    config.optimizer.final_learning_rate = 1e-7
    return config
