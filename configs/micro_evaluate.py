r"""Evaluation on held-out prompts of the micro-world: the training mixture by number of edits, and twelve splits in the
manner of GenEval, KRIS-Bench and OmniContext.

The word after the colon holds the answers to one mode: `:base` and `:direct` to direct answers, `:multi_step` to steps
whatever the first verdict says (the last two on fewer prompts, for the entry gates); `:kinds` asks for single edits,
some of each kind, answered directly at temperature 0; `:typed` asks the twenty requests of ivr_jax/demo/prompts.jsonl
at temperature 0.
Command: python -m ivr_jax.evaluate --config=configs/micro_evaluate.py --workdir=runs/demo/eval_sft \
    --config.checkpoint=runs/demo/sft
"""

import pathlib

from ml_collections import ConfigDict

import ivr_jax
from ivr_jax.errors import UserError

from . import micro_rl


def get_config(kind: str = "") -> ConfigDict:
    rl = micro_rl.get_config()
    config = ConfigDict()
    config.checkpoint = ""
    config.image_tokenizer = ""  # where the image tokenizer is, if it was moved, or the checkpoint imported
    config.text_tokenizer = ""  # likewise
    config.seed = 7
    config.level = 0
    config.prompts = 320
    config.most_edits = 4
    config.each_split = 8
    config.each_kind = 0  # requests of one edit of each kind
    config.typed = ""  # a file of requests (ivr_jax.evaluate.typed)
    config.probe_prompts = 96  # held-out requests for the probes of single skills (steps, critiques)
    config.paired_prompts = 96  # of the training mixture, for the paired verdict test
    config.observe = True  # evaluations of the probes' true prefixes begin with an observation
    config.batch = 128  # probes and scored images at a time
    config.answer_length = rl.answer_length
    config.sampling = rl.sampling
    config.engine = rl.engine
    config.engine.slots = 128
    config.mesh = rl.mesh  # devices; the weights are read straight into the layout of rollouts on them ...
    config.rollout = rl.rollout  # ... and cast, where this names a dtype
    config.grammar = rl.grammar
    config.reward = rl.reward
    if kind:
        config.probe_prompts = 0
        config.paired_prompts = 0
    if kind in ("base", "direct", "kinds"):
        config.grammar.modes = ("direct",)
    elif kind == "multi_step":
        config.grammar.modes = ("multi_step",)
        config.grammar.force = True
    elif kind == "typed":
        config.typed = str(pathlib.Path(ivr_jax.__file__).parent / "demo" / "prompts.jsonl")
        config.prompts, config.each_split = 0, 0
        config.sampling.temperature = 0.0
    elif kind:
        raise UserError(
            f"micro_evaluate takes base, direct, multi_step, kinds or typed, not {kind!r}.",
            "Write --config=micro_evaluate:base.",
        )
    if kind in ("direct", "multi_step"):
        config.prompts, config.each_split = 88, 0
    if kind == "kinds":
        config.prompts, config.each_split, config.each_kind, config.most_edits = 88, 0, 16, 1
        config.sampling.temperature = 0.0
    return config
