r"""Base model of the micro-world: Emu3.5's decoder with 0.5 M parameters, trained to draw and to judge what is drawn.

Endless lessons, made when they are read (`ivr_jax.world.practice`): half are exact drawings, mostly of one edit; the
others are images, most of them wrong, to be judged after requests of one to four edits.  So the base understands more
than it can draw, as the paper's does, and its verdicts depend on the image.  Small batches learn faster at equal
tokens (docs/results/seeing.md).
Command: python -m ivr_jax.train --config=configs/micro_base.py --workdir=runs/demo/base \
    --config.image_tokenizer=runs/demo/image_tokenizer
"""

from ml_collections import ConfigDict

from . import _practice


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "sft"
    config.seed = 0
    config.steps = 2800
    config.batch = 5
    config.grad_accum_steps = 1
    config.gradient_dtype = "float32"  # of the sum over micro-batches
    config.loss_chunk_tokens = 4096
    config.log_every = 50
    config.checkpoint_every = 500
    config.max_checkpoints = 1
    config.staging_gib = 0  # most host memory for arrays on their way to a checkpoint; 0: no bound
    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1})  # devices; -1: all that are left
    config.init = ""
    config.image_tokenizer = ""
    config.text_tokenizer = "micro"
    config.model = ConfigDict(
        {
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e4,
            "max_position_embeddings": 768,
            "remat": "none",
            "unroll": 4,
            "fsdp_over_tensor": False,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        }
    )
    config.data = ConfigDict(
        {
            "path": "",
            "held_out": "",  # a dataset whose loss is logged as held_out_loss; "": none
            "length": 320,
            "too_long": "error",  # for trajectories of more than `length` tokens: "error", or "drop" leaves them out
            "mix": {"direct": 1.0, "reflection": 0.0, "multi_step": 0.0},
            "streams": 1,  # independent packings; on several hosts as many as rows, so that each reads its share
            "practice_share": 1.0,  # of the examples: made up when they are read, not read from `path`
            "practice": _practice.lessons(),
        }
    )
    config.lora = ConfigDict({"rank": 0, "alpha": 16.0, "targets": ("q", "k", "v", "o")})  # rank 0: train everything
    config.optimizer = ConfigDict(
        {
            "kind": "muon",
            "learning_rate": 5e-3,
            "final_learning_rate": 2e-4,
            "warmup_ratio": 0.05,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
            "moment_dtype": "float32",
        }
    )
    return config
