"""The section for practice (`ivr_jax.world.practice`): endless lessons of the micro-world; not a config of its own."""

from ml_collections import ConfigDict


def lessons() -> ConfigDict:
    """What a base model practises: it judges requests of any length, and mostly draws those of one edit."""
    return ConfigDict(
        {
            "level": 0,
            "lessons": {"direct": 4.5, "judge": 5.5, "reflection": 0.0, "multi_step": 0.0},
            "drawn_edits": (10.0, 3.0, 0.0, 0.0),
            "read_edits": (1.0, 1.0, 1.0, 1.0),
            "right": 0.15,
            "dense": 0.4,
            "misread": 0.4,
            "later_wrong": 0.25,
            # Edits that look in one cell for what belongs in another are rare in requests, and the last to be learnt.
            "kinds": {
                "put": 0.6,
                "clear": 0.4,
                "recolour": 1.8,
                "replace": 0.4,
                "move": 0.5,
                "swap": 0.4,
                "line": 0.3,
                "duplicate": 0.3,
            },
        }
    )
