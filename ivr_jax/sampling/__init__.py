"""From a prompt to an answer: the sampled distribution (`chain.py`) and the plain batched sampler (`sampler.py`)."""
