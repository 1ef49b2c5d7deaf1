r"""Trajectories from your own images and prompts: judged by a vision-language model, drawn by an image service.

Command: OPENAI_API_KEY=... python -m ivr_jax.construct --config=configs/photographs_construct.py \
    --workdir=runs/mine/construct --config.samples=samples.json

Untested against any provider: measured against a server on loopback that speaks the protocol.  A sample takes 4 calls
of the analyzer and 1 of the generator when it succeeds at once, 9 more for each reflection.  The scores that pass are
those of the released scripts.  Set models, prices and rate limits to what your account has.
"""

from ml_collections import ConfigDict

from . import _services, micro_construct


def get_config() -> ConfigDict:
    config = micro_construct.get_config()
    config.image_area = 512 * 512
    config.image_multiple = 16
    config.passes = 2
    config.folders = True
    config.gallery = True
    config.rules.max_steps = 5
    config.rules.thresholds = ConfigDict({"instruction": 5, "consistency": 3, "quality": 3, "knowledge": 3})
    config.rules.step_thresholds = ConfigDict({"instruction": 5, "consistency": 3, "quality": 4, "knowledge": 3})
    config.services.analyzer = _services.service("openai", model="gpt-4o", temperature=0.0, max_tokens=1500)
    config.services.generator = _services.service("openai", model="gpt-image-1", in_flight=16)
    return config
