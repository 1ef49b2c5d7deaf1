"""One sample and the secrets with which the tests ask a service about it."""

from __future__ import annotations

import numpy as np

from ivr_jax.images import image_name
from ivr_jax.trajectory import Sample

KEY = "sk-test-0123456789abcdef"
ENVIRONMENT = {"TEST_KEY": KEY, "TEST_APP": "app-77"}
PIXELS = np.full((24, 32, 3), 200, np.uint8)
SAMPLE = Sample("one", "Make it grey [direct].", (image_name(PIXELS),))
IMAGES = {image_name(PIXELS): PIXELS}
