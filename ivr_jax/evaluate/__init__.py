"""Measures of a model.

    micro_world.py   answers to held-out prompts of the micro-world, judged exactly
    benchmarks/      public benchmarks of image generation and editing
    probes.py        single skills after a true beginning of the answer
    verdicts.py      the probability that a model passes a given image
    paired.py        the paired verdict test: does the verdict depend on the image?
    swap.py          the same on any dataset (python -m ivr_jax.evaluate.swap)
    sight.py         the paired test as a metric of training
    typed.py         a file of prompts that a person typed, with exact targets
"""
