r"""A public benchmark: how answers are drawn, and who judges them.

The judge is any service of the OpenAI protocol that takes images; its key stands in the environment variable that
`judge.key_variable` names.  A local vLLM or SGLang server: `--config.judge.base_url=http://localhost:8000/v1
--config.judge.key_variable=`.
Command: python -m ivr_jax.evaluate --benchmark=kris --data=DATA/KRIS_Bench --checkpoint=runs/rl --workdir=runs/kris \
    --config.judge.model=gpt-4o-2024-11-20
"""

from ml_collections import ConfigDict

from . import micro_rl
from ._services import service


def get_config() -> ConfigDict:
    rl = micro_rl.get_config()
    config = ConfigDict()
    config.seed = 0
    config.batch = 256  # answers that are drawn together, and written together
    config.image_area = 0  # pixels of an image; 0: the image tokenizer's resolution, squared
    config.answer_length = 0  # most tokens of an answer; 0: room for five images
    config.sampling = rl.sampling
    config.engine = rl.engine
    config.mesh = rl.mesh
    config.rollout = rl.rollout
    config.modes = ()  # modes the answers may use; empty: all of a model trained on trajectories, else interleaved
    config.text_cap = 0  # most tokens of one free text; 0: 96 with the micro tokenizer, else 512
    # Temperature 0 and room for reasoning; the reply's score is what counts.
    config.judge = service("openai", temperature=0.0, max_tokens=1000, image_side=2048)
    config.judge_version = ""  # the model's version as its provider names it; empty: the model's name
    return config
