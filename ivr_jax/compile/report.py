"""Tables of what compilations gave: memory and predicted time of each program, and one table of all."""

from __future__ import annotations

import pprint
import textwrap
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ivr_jax.compile.jobs import Outcome
from ivr_jax.compile.memory import gib
from ivr_jax.compile.search import Candidate
from ivr_jax.compile.topologies import Topology

MEANING = {
    "parameters": "parameters", "moments": "optimiser moments", "reference": "reference policy", "batch": "batch",
    "previous policy": "policy that sampled the next rollout", "gradient sum": "sum of gradients",
    "rollout": "further batches of a rollout",
    "cache": "KV cache", "gradients": "gradients", "activations": "activations kept for the backward pass",
    "temporaries": "temporaries", "results": "results beside the state", "code": "program",
}  # fmt: skip


def show(console: Console, topology: Topology, outcome: Outcome) -> None:
    """One program: its memory plan, then its roofline, or what is wrong and what to do."""
    mesh = " × ".join(f"{axis} {size}" for axis, size in outcome.mesh.items() if size != 1) or "one chip"
    console.print(f"\n[bold]{outcome.program}[/] on {topology}: {topology.count} chips, {mesh}", highlight=False)
    if outcome.plan is not None:
        console.print(_memory_table(outcome))
    if outcome.error:
        said = f"[bold red]does not work:[/] {escape(outcome.error)}. {escape(outcome.advice)}"
        console.print(said, highlight=False, soft_wrap=True)
    elif outcome.estimate is not None:
        console.print(_time_table(topology, outcome))


def _memory_table(outcome: Outcome) -> Table:
    table = Table(title="memory a chip, GiB (the compiler's buffer assignment)", title_justify="left")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for kind, size in outcome.plan.kinds.items():
        if size:
            table.add_row(MEANING.get(kind, kind), gib(size))
    table.add_row("all", gib(outcome.plan.total), style="bold")
    table.add_row("the chip has", gib(outcome.plan.capacity))
    return table


def side_by_side(console: Console, names: Sequence[str], outcomes: Sequence[Outcome]) -> None:
    """Memory and time of one program under several configs."""
    table = Table(title="side by side, GiB a chip", title_justify="left")
    table.add_column("what")
    for name in names:
        table.add_column(name, justify="right")
    plans = [outcome.plan.kinds if outcome.plan else {} for outcome in outcomes]
    for kind in dict.fromkeys(kind for plan in plans for kind in plan):
        table.add_row(MEANING.get(kind, kind), *(gib(plan[kind]) if kind in plan else "" for plan in plans))
    table.add_row("all", *(gib(o.plan.total) if o.plan else "?" for o in outcomes), style="bold")
    table.add_row("predicted time", *(_s(o.estimate.seconds) if o.estimate else "does not work" for o in outcomes))
    console.print(table)


def _time_table(topology: Topology, outcome: Outcome) -> Table:
    chip, found = topology.chip, outcome.estimate
    table = Table(title="time of one call (predicted from the schedule, unconfirmed by a TPU)", title_justify="left")
    for name in ("what", "amount", "at full speed"):
        table.add_column(name, justify="left" if name == "what" else "right")
    each = outcome.flops / topology.count
    table.add_row("operations a chip, recomputation included", f"{each / 1e12:,.1f} TFLOP", _s(each / chip.flops))
    table.add_row("… of them nothing recomputed", f"{outcome.model_flops / topology.count / 1e12:,.1f} TFLOP",
                  _s(outcome.model_flops / topology.count / chip.flops))  # fmt: skip
    table.add_row("HBM traffic a chip", f"{found.hbm_bytes / 1e9:,.1f} GB", _s(found.hbm_bytes / chip.bandwidth))
    if cache := outcome.plan.kinds.get("cache"):
        once = cache + outcome.plan.kinds["parameters"]
        table.add_row("parameters and cache read once", f"{once / 1e9:,.1f} GB", _s(once / chip.bandwidth))
    for kind, size in sorted(found.wire_bytes.items(), key=lambda pair: -pair[1]):
        if size > 1e6:
            table.add_row(f"{kind} a chip", f"{size / 1e9:,.2f} GB", "")
    calls = found.synchronous + found.asynchronous
    table.add_row("collectives that overlap with work", f"{found.asynchronous:,.0f} of {calls:,.0f}", "")
    table.add_row("waiting for collectives", "", _s(found.exposed))
    table.add_row("predicted time of a call", "", _s(found.seconds), style="bold")
    table.add_row("predicted tokens a second", f"{outcome.tokens / found.seconds:,.0f}", "")
    table.add_row("predicted MFU", f"{100 * (outcome.mfu(topology) or 0):.0f}%", "", style="bold")
    return table


def summarise(console: Console, outcomes: Sequence[tuple[Topology, Outcome]]) -> None:
    """One line a program, when there are several."""
    if len(outcomes) < 2:
        return
    table = Table(title="all", title_justify="left")
    for name in ("program", "topology", "chips", "GiB a chip", "of", "predicted time", "predicted MFU", ""):
        table.add_column(name, justify="left" if name in ("program", "topology", "") else "right")
    for topology, outcome in outcomes:
        plan, found = outcome.plan, outcome.estimate
        table.add_row(
            outcome.program, str(topology), str(topology.count), gib(plan.total) if plan else "?",
            gib(topology.chip.hbm), _s(found.seconds) if found else "", _percent(outcome.mfu(topology)),
            "" if outcome.ok else "does not work",
        )  # fmt: skip
    console.print()
    console.print(table)


def show_search(console: Console, topology: Topology, found: Sequence[tuple[Candidate, Outcome]]) -> None:
    """What a search found to fit, fastest first, with the flags that make it of the config."""
    if not found:
        console.print(f"\n[bold red]nothing that was compiled fits {topology}[/]; raise --compilations.")
        return
    table = Table(title=f"fits {topology}, by predicted time", title_justify="left")
    for name in ("predicted time", "predicted MFU", "GiB a chip", "of", "flags"):
        table.add_column(name, justify="left" if name == "flags" else "right", overflow="fold")
    for candidate, outcome in found:
        table.add_row(
            _s(outcome.estimate.seconds), _percent(outcome.mfu(topology)), gib(outcome.plan.total),
            gib(topology.chip.hbm), candidate.flags() or "as configured",
        )  # fmt: skip
    console.print()
    console.print(table)


def config_file(config: ConfigDict, topology: Topology, outcome: Outcome) -> str:
    """The text of a config file: all values of `config`, and in its docstring what was predicted of it."""
    values = pprint.pformat(config.to_dict(), sort_dicts=False, width=110)
    return f'''"""For {topology}, found by `python -m ivr_jax.compile --search`.

Memory by the compiler: {gib(outcome.plan.total)} of {gib(topology.chip.hbm)} GiB a chip.
Predicted, not measured: {_s(outcome.estimate.seconds)} a step, MFU {_percent(outcome.mfu(topology))}.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
{textwrap.indent(values, " " * 8)}
    )
'''


def to_json(topology: Topology, outcome: Outcome) -> dict[str, Any]:
    """Everything in `outcome` as plain values; bytes, seconds and operations, a chip's where the name says so."""
    found, plan = outcome.estimate, outcome.plan
    return {
        "program": outcome.program, "topology": str(topology), "chips": topology.count, "mesh": dict(outcome.mesh),
        "ok": outcome.ok, "error": outcome.error, "advice": outcome.advice, "compile_seconds": outcome.compile_seconds,
        "hbm_bytes_of_a_chip": topology.chip.hbm,
        "memory_bytes_a_chip": None if plan is None else {**plan.kinds, "all": plan.total},
        "flops": outcome.flops, "model_flops": outcome.model_flops, "tokens": outcome.tokens,
        "prediction": None if found is None else {
            "seconds": found.seconds, "mfu": outcome.mfu(topology), "seconds_waiting_for_collectives": found.exposed,
            "hbm_bytes_moved_a_chip": found.hbm_bytes, "wire_bytes_a_chip": dict(found.wire_bytes),
            "collectives": {"overlapping": found.asynchronous, "waiting": found.synchronous},
            "waiting_wire_bytes": dict(found.waiting.most_common(20)),
        },
    }  # fmt: skip


def _s(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1e3 * seconds:,.2f} ms"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"
