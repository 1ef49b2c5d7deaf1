"""Image tokenizer of the micro-world: IBQ, factor 16, 64 codes, trained on rendered boards.

The architecture is Emu3.5's, small: 64x64 pixels become 4x4 codes.
Command: python -m ivr_jax.train --config=configs/micro_image_tokenizer.py --workdir=runs/demo/image_tokenizer
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "image_tokenizer"
    config.seed = 0
    config.steps = 640
    config.continuous_steps = 440  # then the codebook is placed by k-means on `codebook_images` images
    config.codebook_images = 256
    config.batch = 16
    config.eval_images = 64
    config.log_every = 20
    config.checkpoint_every = 100
    config.max_checkpoints = 1
    config.staging_gib = 0  # most host memory for arrays on their way to a checkpoint; 0: no bound
    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1})  # devices; -1: all that are left
    config.model = ConfigDict(
        {
            "ch": 8,
            "out_ch": 3,
            "ch_mult": (1, 2, 2, 4, 8),
            "num_res_blocks": 1,
            "attn_resolutions": (),
            "in_channels": 3,
            "resolution": 64,
            "z_channels": 32,
            "double_z": False,
            "dropout": 0.0,
            "n_embed": 64,
            "embed_dim": 32,
            "beta": 0.25,
            "norm_groups": 1,
            "entropy_temperature": 0.01,
            "dtype": "float32",
            "param_dtype": "float32",
        }
    )
    config.data = ConfigDict({"source": "world", "level": 0, "size": 1_000_000})
    config.loss = ConfigDict(
        {
            "l1": 0.0,
            "l2": 2.0,
            "latents": 1e-2,
            "noise": 1.0,
            "shuffle": 0.75,
            "quantisation": 0.1,
            "entropy": 0.0,
            "diversity": 1.0,
        }
    )
    config.optimizer = ConfigDict(
        {
            "kind": "muon",
            "learning_rate": 5e-3,
            "final_learning_rate": 2.5e-4,
            "warmup_ratio": 0.04,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "moment_dtype": "float32",
        }
    )
    return config
