r"""Fine-tuning data of the micro-world: the paper's escalation, first images by the base model itself.

The paper's mix is 10,000 direct : 20,000 reflection : 20,000 multi-step.  At this size critiques are rarely right and
so many failures teach the model to fail its good images, so the mix here is 2:1:2 (`configs/construct_micro.py` builds
the paper's).

Command: python -m ivr_jax.construct --config=configs/micro_construct.py --workdir=runs/demo/construct \
    --config.baseline=runs/demo/base
"""

from ml_collections import ConfigDict

from . import _services


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 2
    config.released = ""  # a folder in the released layout to import instead
    config.samples = ""  # a JSON list of samples to construct instead of the micro-world's tasks; all that succeed stay
    config.image_root = ""  # where relative image paths of either start; the folder that they stand in when empty
    config.image_area = 4096  # imported and listed images are resized to about this many pixels ...
    config.image_multiple = 16  # ... with sides that are multiples of the image tokenizer's factor
    config.baseline = ""  # workdir of the model that draws G1; the generator draws it when empty
    config.image_tokenizer = ""  # of `baseline` and of a generator's checkpoint, where an import does not record them:
    config.text_tokenizer = ""  # the workdir of an image tokenizer; a folder with an Emu3.5 tokenizer, or "micro"
    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1})  # of both; -1: all others
    config.rollout = ConfigDict(  # how their weights and caches are held: dtypes "" as in the checkpoint; tensor shards
        {"dtype": "", "tensor": 0, "weight_dtype": "", "cache_dtype": "", "decode_kernel": "plain"}
    )
    config.batch = 256  # first images by `baseline` drawn at a time, at most
    config.concurrency = 64  # samples in progress at a time
    config.passes = 1  # readings of the input: a second one takes up what the first left pending
    config.shard = ""  # "i/n": only the samples whose key falls into part i of n (also --shard=i/n); "" takes all
    config.leave_pending = False  # write the dataset although samples are pending
    config.folders = False  # also write WORKDIR/folders in the released layout
    config.gallery = False  # also write WORKDIR/gallery.html
    config.services = _services.world()
    config.prompts = ""  # a folder of prompts for the services; ivr_jax/services/prompts when empty
    config.tasks = ConfigDict({"level": 0, "seed": 2, "edits": (1, 1, 3, 6), "limit": 100_000})
    config.quotas = ConfigDict({"direct": 1200, "reflection": 800, "multi_step": 1200, "evaluation": 0})
    config.rules = ConfigDict(
        {
            "thresholds": None,
            "step_thresholds": None,
            "max_reflections": 3,
            "min_steps": 2,
            "max_steps": 4,
            "step_tries": 3,
            "max_step_chars": 500,
        }
    )
    config.analyzer = ConfigDict({"threshold": 5, "observe": True})  # see world.analyzer
    config.generator = ConfigDict({"fault_rate": 0.8, "step_fault_rate": 0.1, "seed": 2, "level": 0})
    config.sampling = ConfigDict(
        {"temperature": 1.0, "text_top_k": 0, "text_top_p": 1.0, "image_top_k": 0, "image_top_p": 1.0, "guidance": 1.0}
    )
    return config
