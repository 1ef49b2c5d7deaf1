"""Compile a run for a TPU pod that is not there: does it fit, what takes the memory, how long may a step take?

    python -m ivr_jax.compile --config=configs/emu35_sft.py --topology=v5p:4x4x8
    python -m ivr_jax.compile --config=configs/emu35_rl.py --model=emu35_sft --topology=v5p:4x4x8,v6e:8x16
    python -m ivr_jax.compile --config=configs/micro_sft.py --topology=v5e:2x2 --config.mesh.fsdp=-1 --json=plan.json
    python -m ivr_jax.compile --config=configs/emu35_sft.py --topology=v5p:4x4x8 --against=loss_chunk_tokens=1048576

The programs are those that training and sampling run: an sft config has `sft`, an rl config `grpo` (the gradient of
one micro_batch), `prefill` and `decode` (one call of the model for every slot of the engine).  The compiler is the real
one (`pip install libtpu`), so memory is its own buffer assignment.  Times are a model's prediction from its schedule;
no TPU was asked.  Each program compiles in a process of its own, some minutes on two cores.  Status 1: something does
not fit, and the last lines say what to change.
"""

from __future__ import annotations

import ast
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from ivr_jax import cli, files
from ivr_jax.compile import jobs, report
from ivr_jax.compile.programs import PROGRAMS
from ivr_jax.compile.topologies import Topology, compiler_library, parse_topology
from ivr_jax.config import load_config
from ivr_jax.errors import UserError


def main(call: cli.Call) -> int:
    config, console = call.config, Console()
    topologies = [parse_topology(name) for name in call.flags.topology]
    if not topologies:
        raise UserError("no topology was named.", "Add --topology=v5p:4x4x8, or several with commas between.")
    names = _programs(config, call.flags.program)
    _add_model(config, call.flags.model)
    configs = _against(config, call.flags.against)
    keep = None if call.flags.keep is None else cli.prepare_workdir(call.flags.keep, "keep")
    plan = None if call.flags.json is None else _writable(Path(call.flags.json).expanduser())
    compiler_library()
    outcomes: list[tuple[Topology, jobs.Outcome]] = []
    for topology in topologies:
        for name in names:
            made = []
            for number, changed in enumerate(configs.values()):
                with console.status(f"compiling {name} for {topology} ({topology.count} chips) …"):
                    folder = keep and (keep / str(number) if number else keep)
                    outcome = jobs.compile_program(changed.to_dict(), topology, name, folder)
                report.show(console, topology, outcome)
                made.append((topology, outcome))
            if len(made) > 1:
                report.side_by_side(console, list(configs), [outcome for _, outcome in made])
            outcomes += made
    if plan is not None:
        files.write_json(plan, [report.to_json(t, o) for t, o in outcomes])
    report.summarise(console, outcomes)
    return 0 if all(outcome.ok for _, outcome in outcomes) else 1


def _writable(file: Path) -> Path:
    """`file`, when it can be written: said before minutes of compiling, not after."""
    if file.is_dir():
        raise UserError(f"{file} is a folder.", "Name a file, as --json=plan.json.")
    cli.prepare_workdir(file.parent, "json")
    return file


def _programs(config: ConfigDict, wanted: list[str]) -> list[str]:
    known = PROGRAMS.get(config.stage)
    if known is None:
        raise UserError(f"a config of stage {config.stage!r} has no programs for a pod.",
                        f"Name a config of stage {' or '.join(PROGRAMS)}.")
    if unknown := sorted(set(wanted) - set(known)):
        raise UserError(f"a config of stage {config.stage!r} has no program {unknown[0]!r}.",
                        f"Name some of {', '.join(known)}.")
    if "mesh" not in config:
        raise UserError("this config has no `mesh` section.", "Name a config that says how a mesh is cut.")
    return wanted or list(known)


def _against(config: ConfigDict, changes: list[str]) -> dict[str, ConfigDict]:
    """The config, and a copy with each of the changes "key=value", by what they are called in a table."""
    made = {"as configured": config}
    for change in changes:
        key, _, text = change.partition("=")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        copy = ConfigDict(config.to_dict()).lock()
        try:
            copy.update_from_flattened_dict({key: value})
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(f"--against={change} changes nothing of this config.",
                            "Write KEY=VALUE, as --against=loss_chunk_tokens=1048576.") from error
        made[change] = copy
    return made


def _add_model(config: ConfigDict, name: str | None) -> None:
    """An rl config names no sizes, because a run takes them from its checkpoint; here another config lends them."""
    if name is None:
        return
    lender = load_config(name)
    if "model" not in lender:
        raise UserError(f"{name} has no `model` section.", "Name an sft config.")
    with config.unlocked():
        config.model = lender.model
        config.text_tokenizer = lender.text_tokenizer


def add_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_list("topology", [], "KIND:SIZES of TPU slices, with commas between", flag_values=values)
    flags.DEFINE_list("program", [], "only these programs of the config", flag_values=values)
    flags.DEFINE_multi_string("against", [], "KEY=VALUE of the config: that as well, side by side", flag_values=values)
    flags.DEFINE_string("model", None, "an sft config that lends its model section", flag_values=values)
    flags.DEFINE_string("json", None, "also write everything to this file", flag_values=values)
    flags.DEFINE_string("keep", None, "folder for what the compiler writes (text of its programs)", flag_values=values)


def entry() -> None:
    cli.run(main, config=True, workdir=False, add_flags=add_flags)


if __name__ == "__main__":
    entry()
