"""Where the time of a training step goes: loader, compilation, and the operations of the compiled programs by part.

    python benchmarks/training_profile.py                                    the four stages of the demo
    python benchmarks/training_profile.py --only=micro_base,micro_sft --cores=1
    python benchmarks/training_profile.py --json=FILE                        the rows of the tables as JSON

Each stage is built from its config as `ivr_jax.train` builds it, with the model that the package carries in place of
earlier stages and lessons in place of a dataset.  After some steps that compile, `--steps` steps are timed without a
profiler (CPU and wall time), then some more are traced.  Operations are named after the innermost function on their
stack that is in `PARTS`; forward, backward and what is computed again for the backward pass apart.  Shares are of the
time inside of operations, which is wall time: beside other programs look at the shares, and at CPU time.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STAGES = ("micro_image_tokenizer", "micro_base", "micro_sft", "micro_rl")
OVERRIDES: dict[str, dict[str, Any]] = {
    "micro_image_tokenizer": {"continuous_steps": 0},  # with quantisation, as its last 200 steps are
    "micro_base": {"image_tokenizer": "micro"},
    "micro_sft": {"image_tokenizer": "micro", "init": "micro", "data.practice_share": 1.0},
    "micro_rl": {"init": "micro"},
}
TRACED = {"micro_rl": 1}  # steps that are traced; others: 10
WARM_UP = {"micro_rl": 1}  # steps before any is timed; others: 4
# The first that matches a function on the operation's stack, innermost first, names its part.
PARTS = (
    ("RMSNorm", r"rms_norm"),
    ("rotary positions", r"rotate|rotary_tables"),
    ("attention", r"_attend|_attend_once|attention|causal_mask"),
    ("projections", r"_?project(_\w+)?$|_kernel_gradient"),  # of attention and MLP
    ("MLP", r"Mlp\."),
    ("attention", r"Attention\."),
    ("embedding", r"embed_lookup|_rows.*"),
    ("vocabulary", r"token_statistics.*|logits_of|Backbone\.logits|log_probabilities|legal_ids"),
    ("sampling", r"sample_ids|decode_loop.*|GrammarMask.*"),
    ("group norm", r"GroupNorm.*"),
    ("convolution", r"Conv\.__call__|ResBlock.*|Downsample.*|Upsample.*"),
    ("code book", r"quantise.*|shuffle_cells|spherical_k_means"),
    ("Muon", r".*muon.*|.*newton_schulz.*|orthogonalize.*"),
    ("optimiser", r"apply_gradients|update_fn|apply_updates|.*clip.*|global_norm"),
)


class Operation(NamedTuple):
    """One instruction of a compiled program: the part it belongs to, and the direction."""

    part: str
    direction: str
    is_product: bool


def operations(text: str) -> dict[str, Operation]:
    """Instruction name -> operation, of a program's optimised HLO text."""
    tables = _tables(text)
    found = {}
    for line in text.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
        if match is None:
            continue
        name = re.search(r'op_name="([^"]*)"', line)
        frame = re.search(r"stack_frame_id=(\d+)", line)
        path = name[1] if name else ""
        direction = "backward" if "transpose(jvp" in path else "forward" if "jvp" in path else ""
        if "rematted_computation" in path:
            direction = "recomputed"
        part = _part(list(_functions(tables, int(frame[1]))) if frame else [])
        is_product = bool(re.search(r"dot_general|conv_general", path.rsplit("/", 1)[-1]))
        found[match[1]] = Operation(part, direction, is_product)
    return found


def _tables(text: str) -> dict[str, dict[int, str]]:
    """The tables of source locations at the head of an HLO text: name -> number -> entry."""
    names = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
    tables: dict[str, dict[int, str]] = {name: {} for name in names}
    current = None
    for line in text.splitlines():
        if line in names:
            current = line
        elif current and (match := re.match(r"(\d+) (.*)", line)):
            tables[current][int(match[1])] = match[2]
        elif line.strip():
            current = None
    return tables


def _functions(tables: dict[str, dict[int, str]], frame: int) -> Iterator[tuple[str, str]]:
    """(file, function) of a stack frame and its callers, innermost first."""
    while frame in tables["StackFrames"]:
        entry = dict(re.findall(r"(\w+)=(\d+)", tables["StackFrames"][frame]))
        location = dict(re.findall(r"(\w+)=(\d+)", tables["FileLocations"][int(entry["file_location_id"])]))
        file = tables["FileNames"][int(location["file_name_id"])].strip('"')
        yield pathlib.Path(file).name, tables["FunctionNames"][int(location["function_name_id"])].strip('"')
        parent = int(entry.get("parent_frame_id", 0))
        frame = parent if parent != frame else 0


def _part(functions: list[tuple[str, str]]) -> str:
    for file, function in functions:
        for part, pattern in PARTS:
            if re.match(pattern, function) or (part == "Muon" and "muon" in file):
                return part
    return "other"


class Span(NamedTuple):
    """Microseconds inside of one instruction, without those nested in it."""

    program: str
    instruction: str
    time: float


def spans(folder: pathlib.Path) -> list[Span]:
    """All instructions of a trace that `jax.profiler.trace` wrote."""
    with gzip.open(next(folder.rglob("*.trace.json.gz"))) as file:
        events = json.load(file)["traceEvents"]
    events = [e for e in events if e.get("ph") == "X" and "hlo_op" in e.get("args", {})]
    by_thread: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
    for event in events:
        if not event["name"].startswith("end: "):
            by_thread[event["tid"]].append(event)
    found: list[Span] = []
    for thread in by_thread.values():
        inside = [0.0] * len(thread)
        thread.sort(key=lambda e: (e["ts"], -e["dur"]))
        opened: list[int] = []
        for number, event in enumerate(thread):
            while opened and thread[opened[-1]]["ts"] + thread[opened[-1]]["dur"] <= event["ts"]:
                opened.pop()
            if opened:
                inside[opened[-1]] += event["dur"]
            opened.append(number)
        found += [
            Span(e["args"]["hlo_module"], e["args"]["hlo_op"], max(e["dur"] - within, 0.0))
            for e, within in zip(thread, inside, strict=True)
        ]
    return found


def shares(found: list[Span], dumps: pathlib.Path) -> list[dict[str, Any]]:
    """Rows of the table: program, part, direction, kind, milliseconds in all, largest first."""
    texts = {path: re.match(r"module_\d+\.(.+?)\.cpu_after", path.name) for path in sorted(dumps.iterdir())}
    programs: dict[str, dict[str, Operation]] = collections.defaultdict(dict)
    for path, match in texts.items():
        if match and path.name.endswith("after_optimizations.txt"):
            programs[match[1]] |= operations(path.read_text())  # one name, several shapes: the same parts
    total: collections.Counter[tuple[str, str, str, str]] = collections.Counter()
    for span in found:
        operation = programs[span.program].get(span.instruction, Operation("other", "", False))
        kind = "products" if operation.is_product else "other operations"
        total[span.program, operation.part, operation.direction, kind] += span.time / 1e3
    names = ("program", "part", "direction", "kind")
    return [dict(zip(names, key, strict=True)) | {"ms": value} for key, value in total.most_common()]


class Clock:
    """Seconds of CPU and of wall time since it was made."""

    def __init__(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def read(self) -> tuple[float, float]:
        return time.process_time() - self._cpu, time.perf_counter() - self._wall


def measure(name: str, steps: int, dumps: pathlib.Path) -> dict[str, Any]:
    """Builds a stage, times and traces its steps; see the rows that `show` prints."""
    import importlib

    import jax
    import numpy as np

    from ivr_jax import sharding
    from ivr_jax.config import load_config
    from ivr_jax.train import STAGES as MODULES

    config = load_config(name)
    for key, value in OVERRIDES[name].items():
        with config.unlocked():
            config.update_from_flattened_dict({key: value})
    mesh = sharding.mesh_of(config.mesh)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        clock = Clock()
        stage = importlib.import_module(MODULES[config.stage]).build(config, pathlib.Path(folder), mesh)
        state, built, number = stage.state, clock.read(), 0
        loader, step_times, filled = [], [], []

        def one(state: Any) -> Any:
            nonlocal number
            clock = Clock()
            batch = next(stage.data)
            loader.append(clock.read())
            if isinstance(batch, dict) and "segment_ids" in batch:
                filled.append(float((batch["segment_ids"] > 0).mean()))
            clock = Clock()
            state, _ = jax.block_until_ready(stage.step(state, batch, number))
            step_times.append(clock.read())
            number += 1
            return state

        for _ in range(WARM_UP.get(name, 4)):
            state = one(state)
        first = step_times[0]
        loader, step_times = [], []
        for _ in range(steps):
            state = one(state)
        timed = np.array(step_times), np.array(loader)
        trace = pathlib.Path(folder) / "trace"
        with jax.profiler.trace(str(trace)):
            for _ in range(TRACED.get(name, 10)):
                state = one(state)
        stage.close()
        rows = shares(spans(trace), dumps)
    return {
        "stage": name, "build_seconds": built, "first_step_seconds": first, "filled": float(np.mean(filled or [0])),
        "step_ms": 1e3 * np.median(timed[0], 0), "loader_ms": 1e3 * np.mean(timed[1], 0),
        "rows": [row | {"ms": row["ms"] / TRACED.get(name, 10)} for row in rows],
    }  # fmt: skip


def show(found: dict[str, Any], least: float) -> None:
    """Prints one stage; parts of less than `least` of the time are added up."""
    print(f"\n{found['stage']}: (CPU, wall) to build {_pair(found['build_seconds'])} s, first step with compilation "
          f"{_pair(found['first_step_seconds'])} s,\n  a step {_pair(found['step_ms'])} ms, loader "
          f"{_pair(found['loader_ms'])} ms" + (f", rows {found['filled']:.1%} filled" if found["filled"] else ""))
    total = sum(row["ms"] for row in found["rows"])
    rest = 0.0
    for row in found["rows"]:
        if row["ms"] < least * total:
            rest += row["ms"]
            continue
        print(f"  {row['ms'] / total:6.1%} {row['ms']:9.2f} ms  {row['program']:<24} {row['part']:<17}"
              f"{row['direction']:<11}{row['kind']}")
    print(f"  {rest / total:6.1%} {rest:9.2f} ms  the others", flush=True)


def _pair(values: Any) -> str:
    return "({:.1f}, {:.1f})".format(*values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(STAGES))
    parser.add_argument("--steps", type=int, default=20, help="timed steps; of micro_rl a tenth of them")
    parser.add_argument("--cores", type=int, default=0, help="use only this many cores; 0: all")
    parser.add_argument("--least", type=float, default=0.01, help="share below which parts are added up")
    parser.add_argument("--json", help="file for the rows")
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.cores :])
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_.*"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump}"  # before JAX is imported
        results = []
        for name in options.only.split(","):
            steps = max(1, options.steps // 10) if name == "micro_rl" else options.steps
            results.append(measure(name, steps, pathlib.Path(folder)))
            show(results[-1], options.least)
    if options.json:
        kept = [{key: list(v) if hasattr(v, "tolist") else v for key, v in one.items()} for one in results]
        pathlib.Path(options.json).write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
