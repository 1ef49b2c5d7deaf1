r"""Scores of rollouts, judged by a vision-language model (see `python -m ivr_jax.score --help`).

Command: OPENAI_API_KEY=... python -m ivr_jax.score --config=configs/score.py --workdir=runs/score \
    --config.rollouts=rollouts.jsonl

A direct answer takes 4 calls of the judge; each step or reflection one more.  `configs/_services.py` has presets for a
vLLM server and Gemini.
"""

from ml_collections import ConfigDict

from . import _services


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.rollouts = ""  # a JSONL file, one rollout a line
    config.preset = "paper"  # or "released"
    config.worst_for_failures = False  # the released rule: an unreadable reply counts 1, not as a missing judgement
    config.image_root = ""  # where relative image paths start: the file's folder when empty (--serve: this one)
    config.concurrency = 16  # rollouts in progress at a time
    config.services = ConfigDict({"judge": _services.openai(), "fallback": _services.service("")})
    config.host = "127.0.0.1"  # of --serve; others need a token
    config.port = 8330
    config.token_variable = ""  # the environment variable with the token that callers send
    config.limits = ConfigDict({"batch": 64, "body_mb": 64, "pending": 256})
    return config
