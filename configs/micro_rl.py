"""RL of the micro-world's fine-tuned model: GRPO with the paper's reward and complexity bonus.

Paper: groups of 8 at temperature 1, KL coefficient 0.01, warm-up 0.1, learning rate 1e-6 at 34 B; here 2e-4 at 0.5 M.
What a key means: the `Attributes:` of its section's class (CONTRIBUTING.md).
Command: python -m ivr_jax.train --config=configs/micro_rl.py --workdir=runs/demo/rl --config.init=runs/demo/sft
"""

from ml_collections import ConfigDict

from ._services import service


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "rl"
    config.seed = 0
    config.steps = 12
    config.prompts_per_step = 8
    config.group_size = 8
    config.answer_length = 624
    config.micro_batch = 8  # answers of similar length a pass: small passes pad less
    config.buckets = (192, 320, 480, 704)
    config.packed_rows = 2  # rows of a pass that answers are packed into; 0: `micro_batch` answers, one a row
    config.num_iterations = 1  # times that a rollout is learnt from
    config.num_minibatches = 1  # optimiser steps each time, on disjoint parts of its groups
    config.overlap = 0  # steps that rollouts are drawn ahead while others are judged; so many updates behind they are
    config.loss_chunk_tokens = 4096
    config.log_every = 1
    config.checkpoint_every = 10
    config.max_checkpoints = 1
    config.staging_gib = 0  # most host memory for arrays on their way to a checkpoint; 0: no bound
    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1})  # devices; -1: all that are left
    config.init = ""
    # where the tokenizers are, if they were moved since init was trained, or init was imported
    config.image_tokenizer = ""
    config.text_tokenizer = ""
    # image_area: pixels of the images that answer a prompt without a source; 0: as the image tokenizer was trained
    config.prompts = ConfigDict({"source": "world", "level": 0, "seed": 3, "size": 1_000_000, "image_area": 0})
    config.sampling = ConfigDict(
        {"temperature": 1.0, "text_top_k": 0, "text_top_p": 1.0, "image_top_k": 0, "image_top_p": 1.0, "guidance": 1.0}
    )
    config.engine = ConfigDict(  # how answers are drawn; changes none of them (docs/how-to/rollout.md)
        {"slots": 64, "refill": 0.125, "window": 2, "growth": 2.0, "shrink": True, "speculate": False}
    )
    # weights that answers are drawn with: dtype "" as in training, or bfloat16; tensor shards, 0: as in training;
    # weight_dtype of the layers' kernels and cache_dtype: "" the same dtype, or int8; decode_kernel: plain or pallas
    config.rollout = ConfigDict(
        {"dtype": "", "tensor": 0, "weight_dtype": "", "cache_dtype": "", "decode_kernel": "plain"}
    )
    config.lora = ConfigDict({"rank": 0, "alpha": 16.0, "targets": ("q", "k", "v", "o")})  # rank 0: learn everything
    config.grammar = ConfigDict(
        {
            "modes": ("direct", "reflection", "multi_step"),
            "force": False,
            "max_reflections": 3,
            "max_steps": 4,
            "follow_verdict": True,
            "text_cap": 96,
        }
    )
    config.reward = _reward()
    config.grpo = _grpo()
    config.judge = _judge()
    config.monitor = ConfigDict(  # alarms over the last `window` steps, and the limit of missing judgements
        {
            "window": 10,
            "min_frac_nonzero_std": 0.1,
            "min_grad_norm": 1e-7,
            "max_mode_share": 0.98,
            "max_drift": 0.25,
            "max_truncated": 0.2,
            "missing_window": 256,
            "max_missing": 0.5,
        }
    )
    config.gallery = ConfigDict({"every": 0, "answers": 16})  # pages of sampled answers with their rewards
    # steps between measurements of sight (the paired verdict test), 0: never; on held-out tasks of the micro-world, or
    # on the dataset `data` of images known to be right and wrong
    config.sight = ConfigDict({"every": 0, "prompts": 64, "data": "", "level": 0})
    # steps between measurements of a benchmark (docs/how-to/benchmarks.md), 0: never; its judge, none for "micro"
    config.held_out = ConfigDict(
        {"every": 0, "benchmark": "micro", "data": "", "prompts": 64, "batch": 64, "judge": service("")}
    )
    config.optimizer = ConfigDict(
        {
            "kind": "adamw",
            "learning_rate": 2e-4,
            "final_learning_rate": 2e-5,
            "warmup_ratio": 0.1,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "moment_dtype": "float32",
        }
    )
    return config


def _reward() -> ConfigDict:
    """The paper's reward and complexity bonus."""
    return ConfigDict(
        {
            "outcome_weight": 0.7,
            "format_weight": 0.1,
            "step_weight": 0.2,
            "reflection_weight": 0.0,
            "axis_weights": (0.25, 0.25, 0.25, 0.25),  # instruction, consistency, quality, knowledge
            "score_map": "div5",  # what a score s counts: "div5" s / 5, "unit" (s - 1) / 4
            "intermediate": "texts",  # the step reward is a mean over: "texts" or "images"
            "step_reward_evals": "none",  # of the answer's own, those that count in it: "none" none, "final" or "all"
            "renormalise": True,
            "missing_value": 1.0,
            "bonus_weight": 1.0,
            "epsilon": 0.05,
            "bonus_min_outcome": 0.0,  # least outcome reward that the bonus is paid for
            "divide_by_std": True,
            "std_floor": 1e-6,
            "min_valid": 2,
        }
    )


def _grpo() -> ConfigDict:
    """The objective, and which answers are compared."""
    return ConfigDict(
        {
            "clip_low": 0.2,
            "clip_high": 0.2,
            "beta": 0.01,
            "loss_type": "grpo",  # how the objective is averaged: "grpo", "bnpo" or "dr_grpo" (docs/how-to/rl.md)
            "dr_grpo_length": 256,
            "tis_cap": 2.0,  # only where rollouts are sampled in another precision
            "skip_equal_groups": True,  # groups whose answers earn the same are left out of the passes
            "refill": 0,  # how often answers without a judgement are replaced by new ones; 0: they leave their group
            "drop_truncated": False,  # leave answers that were cut at answer_length out of the update
            # what is compared: "prompt" the answers to a prompt, "draft" the continuations of one first image
            "group": "prompt",
            "drafts": 2,  # first images a prompt, each with `group_size` continuations
            "draft_source": "rollout",  # who samples them: "rollout" the policy, "buffer" the checkpoint of `init`
            "credit": "local",  # "local" or "broadcast": whether drafts and continuations share their advantages
            "modality_advantages": False,  # image tokens by the outcome alone, text tokens by the whole reward
        }
    )


def _judge() -> ConfigDict:
    """Who judges, how often, and how the judge itself is checked."""
    return ConfigDict(
        {
            # who judges: images; one step's image; texts; and who never decides a reward.  "": as outcome, none
            "outcome": service("world"),
            "step": service(""),
            "reasoning": service(""),
            "held_out": service(""),
            "every_image": True,  # also evaluate images that no reward needs: for P(passes | wrong)
            "concurrency": 64,
            "deadline": 0.0,  # seconds for one judgement, retries and all; 0 waits as long as it takes
            "check_every": 0,  # steps between checks of the judge by repeated calls and by the held-out judge
            "check_answers": 8,
            "check_repeats": 3,
        }
    )
