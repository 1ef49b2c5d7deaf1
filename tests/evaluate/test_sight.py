"""Sight while training: what is measured, and on which cases."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tiny_model import CONFIG, TOKENIZER, FlatCodec, noisy_params

from ivr_jax.checkpoints.system import System
from ivr_jax.errors import UserError
from ivr_jax.evaluate.sight import METRICS, SightOptions, SightProbe
from ivr_jax.protocol.grammar import GrammarOptions


class FourCodes(FlatCodec):
    """A 64-pixel image as 2 x 2 codes below 4, and back as some 64-pixel image."""

    def encode(self, images):
        return [(image[::32, ::32, 0] // 64).astype(np.int32) for image in images]

    def decode(self, codes):
        return [np.repeat(np.kron(grid, np.ones((32, 32)))[..., None], 3, 2).astype(np.uint8) * 64 for grid in codes]


def test_the_probe_measures_the_policy_it_is_given():
    probe = SightProbe(SightOptions(every=1, prompts=3), GrammarOptions(text_cap=2), answer_length=72, seed=0)
    config = dataclasses.replace(CONFIG, max_position_embeddings=512)
    system = System(config, noisy_params(config), TOKENIZER, FourCodes(), {})
    found = probe(system)
    assert set(found) <= set(METRICS) and {"sight_fault", "pass_exact"} <= set(found)
    assert all(-1 <= value <= 1 for value in found.values()) and found == probe(system)


def test_options_out_of_range_are_named():
    with pytest.raises(UserError) as caught:
        SightOptions(prompts=0)
    assert "sight.prompts" in caught.value.what
