r"""`emu35_sft` as planned for 128 chips of v5p: a row of the batch on each, and hardly anything computed twice.

Paper: as emu35_sft; mesh and memory alone differ, so a run may change between the two at any checkpoint.
Cost: 0.23 EFLOP a step; memory and estimated time stand in docs/results/pods-compile.md.
Untested: it has been compiled for TPUs, and has run on none.
Command: python -m ivr_jax.train --config=configs/emu35_sft_v5p128.py --workdir=runs/emu35/sft \
    --config.init=runs/emu35/imported --config.data.path=runs/emu35/construct/dataset \
    --config.image_tokenizer=runs/emu35/image_tokenizer
Plan:    python -m ivr_jax.compile --config=configs/emu35_sft_v5p128.py --topology=v5p:4x4x8
"""

from ml_collections import ConfigDict

from . import emu35_sft


def get_config() -> ConfigDict:
    config = emu35_sft.get_config()
    config.loss_chunk_tokens = 131_072
    config.model.fsdp_over_tensor = True
    config.model.remat = "attention+output+qkv+gate+up"
    return config
