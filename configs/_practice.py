"""The section for practice (`ivr_jax.world.practice`): endless lessons of the micro-world; not a config of its own."""

from ml_collections import ConfigDict


def lessons() -> ConfigDict:
    """What a base model practises: it judges requests of any length, and mostly draws those of one edit."""
    return ConfigDict(
        {
            "level": 0,
            "lessons": {"direct": 5.0, "judge": 5.0, "reflection": 0.0, "multi_step": 0.0},
            "drawn_edits": (8.0, 2.0, 1.0, 0.0),
            "read_edits": (1.0, 1.0, 1.0, 1.0),
            "right": 0.15,
            "dense": 0.4,
            "misread": 0.4,
            "later_wrong": 0.15,
            # Edits that look in one cell for what belongs in another are rare in requests, and the last to be learnt.
            "kinds": {
                "put": 0.5,
                "clear": 0.35,
                "recolour": 1.3,
                "replace": 0.35,
                "move": 0.9,
                "swap": 0.8,
                "line": 0.3,
                "duplicate": 0.5,
            },
        }
    )
