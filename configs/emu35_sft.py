r"""Supervised fine-tuning of Emu3.5 (34.1 B) as in the paper: 512×512 images, batch 128, one epoch of 50,000 samples.

Paper: AdamW in bfloat16, cosine 1e-5 → 1e-6 after 10% warm-up. 50,000 samples packed into rows of 8,192 tokens
(a 512×512 image takes 1,055) are 390 steps if a row holds one sample; set `steps` to one epoch of the data at hand.
Cost: 0.23 EFLOP a step; memory and estimated time on TPU slices stand in docs/results/pods-compile.md.
Untested: it has been compiled for TPUs, and has run on none.
Command: python -m ivr_jax.train --config=configs/emu35_sft.py --workdir=runs/emu35/sft \
    --config.init=runs/emu35/imported --config.data.path=runs/emu35/construct/dataset \
    --config.image_tokenizer=runs/emu35/image_tokenizer
Plan:    python -m ivr_jax.compile --config=configs/emu35_sft.py --topology=v5p:4x4x8
"""

from ml_collections import ConfigDict

from . import micro_base


def get_config() -> ConfigDict:
    config = micro_base.get_config()
    config.steps = 390
    config.batch = 128
    config.loss_chunk_tokens = 65_536
    config.log_every = 1
    config.checkpoint_every = 50
    config.max_checkpoints = 2
    config.text_tokenizer = "runs/emu35/text_tokenizer"  # the folder with the released ranks file
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 4, "sequence": 1})
    config.model = ConfigDict(
        {
            "hidden_size": 5120,
            "intermediate_size": 25600,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "max_position_embeddings": 32768,
            "dtype": "bfloat16",
            "param_dtype": "float32",
            "remat": "full",
            "fsdp_over_tensor": False,
            "attention": "auto",
            "vocab_multiple": 2048,  # a shard of the vocabulary is whole tiles on 128 chips
        }
    )
    config.data.length = 8192
    config.data.practice_share = 0.0
    config.data.mix = ConfigDict({"direct": 1.0, "reflection": 2.0, "multi_step": 2.0})
    config.data.streams = 128
    config.optimizer.update(
        {
            "kind": "adamw",
            "learning_rate": 1e-5,
            "final_learning_rate": 1e-6,
            "warmup_ratio": 0.1,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
        }
    )
    return config
