"""Compile a run for TPU chips without having them: does it fit, what takes the memory, how long may a step take?

    python -m ivr_jax.compile --config=configs/emu35_sft.py --topology=v5p:4x4x8
    python -m ivr_jax.compile --config=configs/emu35_sft.py --topology=v6e:4x8 --search --out=emu35_v6e32.py
    python -m ivr_jax.compile --config=configs/emu35_rl.py --model=emu35_sft --topology=v5p:4x4x8,v6e:8x16
    python -m ivr_jax.compile --config=configs/emu35_rl.py --model=emu35_sft --topology=v5p:2x2x1 --program=generate
    python -m ivr_jax.compile --config=configs/micro_sft.py --topology=v5e:2x2 --config.mesh.fsdp=-1 --json=plan.json
    python -m ivr_jax.compile --config=configs/emu35_sft.py --topology=v5p:4x4x8 --against=loss_chunk_tokens=1048576

The programs are those that training and sampling run: an sft config has `sft`; an rl config `grpo` (the gradient of
one micro-batch), `prefill` and `decode` (one call of the model for every slot of the engine), and `generate` when it is
named: `decode` with nothing but bfloat16 weights and caches on the chips.  The compiler is the real one (`pip install
libtpu`), so memory is its own buffer assignment.  Times are a model's prediction from its schedule, unconfirmed by any
TPU.  Each program compiles in a process of its own, some minutes on two cores.  Status 1: something does not fit; the
last lines say what to change.

--search predicts every mesh, accumulation, rematerialisation and loss chunk by arithmetic, compiles the most promising
--compilations of them, prints those that fit by predicted time, and writes the fastest as a config to --out.
"""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from ivr_jax import cli, files
from ivr_jax.compile import jobs, report
from ivr_jax.compile.advice import advice
from ivr_jax.compile.programs import NAMED_PROGRAMS, PROGRAMS
from ivr_jax.compile.search import search
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
    if call.flags.search:
        return _search(call, topologies, console)
    keep = None if call.flags.keep is None else cli.prepare_workdir(call.flags.keep, "keep")
    plan = None if call.flags.json is None else _writable(call.flags.json, "json")
    compiler_library()
    outcomes: list[tuple[Topology, jobs.Outcome]] = []
    for topology in topologies:
        for name in names:
            made = []
            for number, changed in enumerate(configs.values()):
                folder = keep and (keep / str(number) if number else keep)
                made.append(_compile(console, changed, topology, name, folder))
                report.show(console, topology, made[-1])
            if len(made) > 1:
                report.side_by_side(console, list(configs), made)
            outcomes += [(topology, outcome) for outcome in made]
    if plan is not None:
        _write(plan, json.dumps([report.to_json(t, o) for t, o in outcomes], indent=2) + "\n")
    report.summarise(console, outcomes)
    return 0 if all(outcome.ok for _, outcome in outcomes) else 1


def _compile(
    console: Console, config: ConfigDict, topology: Topology, name: str, folder: Path | None = None
) -> jobs.Outcome:
    with console.status(f"compiling {name} for {topology} ({topology.count} chips) …"):
        outcome = jobs.compile_program(config.to_dict(), topology, name, folder)
    if not outcome.needed:
        return outcome
    measured = outcome.plan.kinds if outcome.plan else {"all": outcome.needed}
    return dataclasses.replace(outcome, advice=advice(name, config, topology, measured))


def _search(call: cli.Call, topologies: list[Topology], console: Console) -> int:
    config = call.config
    if len(topologies) > 1 or config.stage != "sft":
        raise UserError("--search tries the sft step of one topology.", "Name an sft config and one --topology.")
    out = None if call.flags.out is None else _writable(call.flags.out, "out")
    topology = topologies[0]
    compiler_library()

    def compile_one(changed: ConfigDict) -> jobs.Outcome:
        outcome = _compile(console, changed, topology, "sft")
        report.show(console, topology, outcome)
        return outcome

    found = search(config, topology, compile_one, call.flags.compilations)
    report.show_search(console, topology, found)
    if not found:
        return 1
    best, outcome = found[0]
    console.print(f"flags of the first row: {best.flags() or 'none'}", soft_wrap=True, highlight=False)
    if out is not None:
        _write(out, report.config_file(best.apply(config), topology, outcome))
        console.print(f"config of the first row: {out}")
    return 0


def _write(file: Path, text: str) -> None:
    with files.new_file(file) as stream:
        stream.write(text.encode())


def _writable(name: str, flag: str) -> Path:
    """The file that a flag names, when it can be written: checked before minutes of compiling, not after."""
    file = Path(name).expanduser()
    if file.is_dir():
        raise UserError(f"{file} is a folder.", f"Name a file with --{flag}.")
    cli.prepare_workdir(file.parent, flag)
    return file


def _programs(config: ConfigDict, wanted: list[str]) -> list[str]:
    known = PROGRAMS.get(config.stage)
    if known is None:
        raise UserError(f"a config of stage {config.stage!r} has no programs for a pod.",
                        f"Name a config of stage {' or '.join(PROGRAMS)}.")
    possible = (*known, *NAMED_PROGRAMS.get(config.stage, ()))
    if unknown := sorted(set(wanted) - set(possible)):
        raise UserError(f"a config of stage {config.stage!r} has no program {unknown[0]!r}.",
                        f"Name some of {', '.join(possible)}.")
    if "mesh" not in config:
        raise UserError("this config has no `mesh` section.", "Name a config with one.")
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
    """An rl config names no sizes, because a run takes them from its checkpoint; here another config gives them."""
    if name is None:
        return
    source = load_config(name)
    if "model" not in source:
        raise UserError(f"{name} has no `model` section.", "Name an sft config.")
    with config.unlocked():
        config.model = source.model
        config.text_tokenizer = source.text_tokenizer


def add_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_list("topology", [], "KIND:SIZES of TPU slices, with commas between", flag_values=values)
    flags.DEFINE_list("program", [], "only these programs of the config", flag_values=values)
    flags.DEFINE_multi_string("against", [], "KEY=VALUE of the config: that as well, side by side", flag_values=values)
    flags.DEFINE_string("model", None, "an sft config whose model section is used", flag_values=values)
    flags.DEFINE_string("json", None, "also write everything to this file", flag_values=values)
    flags.DEFINE_string("keep", None, "folder for what the compiler writes (text of its programs)", flag_values=values)
    flags.DEFINE_boolean("search", False, "find a mesh, accumulation, remat and chunk that fit", flag_values=values)
    flags.DEFINE_integer("compilations", 3, "how many programs --search compiles", lower_bound=1, flag_values=values)
    flags.DEFINE_string("out", None, "config file that --search writes", flag_values=values)


def entry() -> None:
    cli.run(main, config=True, workdir=False, add_flags=add_flags)


if __name__ == "__main__":
    entry()
