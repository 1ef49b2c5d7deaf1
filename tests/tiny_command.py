"""A command and its config in miniature: what every command shares is tested with them."""

from __future__ import annotations

from pathlib import Path

from ivr_jax import cli

TINY_CONFIG = '''
"""A tiny experiment.

Cost: nothing.
"""
from ml_collections import ConfigDict, config_dict


def get_config(word="plain"):
    return ConfigDict({
        "steps": 100, "name": word, "remat": True, "shape": (1, 2), "start": config_dict.placeholder(str),
        "untyped": None, "optimizer": {"lr": 1e-3, "betas": (0.9, 0.95)}, "data": {"seed": 0},
    })
'''

TINY_MAIN = '''
"""Adds up.

    python tiny.py --config=tiny_config.py --workdir=runs/tiny
"""
from absl import flags, logging
from ivr_jax import cli
from ivr_jax.errors import UserError


def add_flags(values):
    flags.DEFINE_string("end", "well", "well, badly, full, large, lost, bug, or interrupted", flag_values=values)


def main(call):
    logging.info("for information only")
    logging.warning("worth a warning")
    ends = {"badly": UserError("the well is\\ndry.", "Dig."), "bug": RuntimeError("ours"),
            "large": RuntimeError("INTERNAL: Out of memory allocating 40 bytes.\\nA table of buffers"),
            "full": ValueError("RESOURCE_EXHAUSTED: writing a/b: No space left on device")}
    if call.flags.end == "interrupted":
        raise KeyboardInterrupt
    if call.flags.end in ends:
        raise ends[call.flags.end]
    if call.flags.end == "lost":
        print(call.config.optimizer.decay)
    (call.workdir / "out.txt").write_text(str(call.config.steps + 1))


if __name__ == "__main__":
    cli.run(main, config=True, add_flags=add_flags)
'''


def write(folder: Path) -> None:
    """Writes the config `tiny_config.py` and the command `tiny.py`."""
    (folder / "tiny_config.py").write_text(TINY_CONFIG)
    (folder / "tiny.py").write_text(TINY_MAIN)


def parsed(*argv: str) -> cli.Call:
    """The command line of `tiny.py`, in the folder of its config."""
    return cli.parse(["tiny", "--config=tiny_config.py", *argv], config=True, workdir=False)
