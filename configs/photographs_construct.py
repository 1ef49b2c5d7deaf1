r"""Trajectories from your own images and prompts: judged by a vision-language model, drawn by an image service.

Command: OPENAI_API_KEY=... python -m ivr_jax.construct --config=configs/photographs_construct.py \
    --workdir=runs/mine/construct --config.samples=samples.json

The judge is GPT; `--config=photographs_construct:vllm` asks a vLLM server at http://127.0.0.1:8000/v1 instead, and
`photographs_construct:gemini` asks Gemini (set GEMINI_API_KEY too).  `configs/_services.py` says what each needs.

Untested against any provider: measured against a server on loopback that speaks the protocol.  A sample takes 4 calls
of the analyzer and 1 of the generator when it succeeds at once, 9 more for each reflection.  The scores that pass are
those of the released scripts.  Set models, prices and rate limits to what your account has.
"""

from ml_collections import ConfigDict

from ivr_jax.errors import UserError

from . import _services, micro_construct

_JUDGES = {"openai": _services.openai, "vllm": _services.vllm, "gemini": _services.gemini}


def get_config(judge: str = "openai") -> ConfigDict:
    if judge not in _JUDGES:
        raise UserError(f"there is no preset for a judge {judge!r}.", f"Use one of: {', '.join(_JUDGES)}.")
    config = micro_construct.get_config()
    config.image_area = 512 * 512
    config.image_multiple = 16
    config.passes = 2
    config.folders = True
    config.gallery = True
    config.rules.max_steps = 5
    config.rules.thresholds = ConfigDict({"instruction": 5, "consistency": 3, "quality": 3, "knowledge": 3})
    config.rules.step_thresholds = ConfigDict({"instruction": 5, "consistency": 3, "quality": 4, "knowledge": 3})
    config.services.analyzer = _JUDGES[judge]()
    config.services.generator = _services.openai_images()
    return config
