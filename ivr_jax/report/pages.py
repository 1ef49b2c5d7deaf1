"""The report: one self-contained HTML page.

The page asks the network for nothing (its content security policy forbids it), works from a file, in light and dark,
and on a phone.  Everything that a model or a user wrote is escaped by the template engine; should that ever fail, the
policy still runs no script but the page's own, which it knows by hash.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import ivr_jax
from ivr_jax.errors import UserError
from ivr_jax.report import plots
from ivr_jax.report.answers import replace_file
from ivr_jax.report.gallery import GallerySection, section_view
from ivr_jax.report.gates import Gate
from ivr_jax.report.metrics import MODES
from ivr_jax.report.plots import Curve
from ivr_jax.report.tables import (
    BY_NAME,
    MAIN_ARMS,
    MEASURES,
    Evaluations,
    Measure,
    compare,
    format_interval,
    format_value,
    overall,
)

TEMPLATES = Path(__file__).parent / "templates"
_FIRST_CURVES = 6
# Metrics that are shown at once; the others are in a collapsed section.
_MAIN_METRICS = re.compile(
    r"(^|[/_.])(loss|reward|total|exact|images|psnr|kl|accuracy|entropy|usage|codes?|sight)($|[/_.])", re.I
)
_TILES = ("exact", "outcome", "images", "sight", "pass_given_wrong")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training stage: its title, when it last wrote, its configuration (nested JSON), its curves."""

    title: str
    when: str
    config: Mapping[str, Any]
    curves: tuple[Curve, ...]


def write_report(
    output_html: str | os.PathLike[str],
    title: str,
    runs: Sequence[Run],
    evaluations: Evaluations,
    gallery: Sequence[GallerySection],
    gates: Sequence[Gate],
    notes: Sequence[str],
    swaps: Evaluations | None = None,
    written: datetime.datetime | None = None,
) -> tuple[Path, ...]:
    """Writes the page and, in `<page>_plots/` beside it, the plots as PNG files.

    Args:
      output_html: the page; its folder is made when missing.
      title: of the page.
      runs: training stages, in order.
      evaluations: arm title -> result of `metrics.evaluate`, in the order of the columns.
      gallery: sections of answers.
      gates: entry gates; none means no such section.
      notes: sentences shown at the top (missing parts, caveats).
      swaps: title -> result of a swap test (`ivr_jax.evaluate.swap`).
      written: the time that the page names; now by default.

    Returns:
      The files written, the page first.

    Raises:
      UserError: when the page cannot be written, or an image cannot be read.
    """
    output = Path(output_html)
    page = render(title, runs, evaluations, gallery, gates, notes, swaps or {}, written)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # An unpaired surrogate (from a byte-level model) has no UTF-8 form; a reference does.
        replace_file(output, page.encode("utf-8", "xmlcharrefreplace"))
        return (output, *_write_plots(output.with_name(output.stem + "_plots"), runs, evaluations))
    except OSError as error:
        raise UserError(f"Cannot write the report {output}: {error}.", "Choose a place you can write to.") from None


def render(
    title: str,
    runs: Sequence[Run],
    evaluations: Evaluations,
    gallery: Sequence[GallerySection],
    gates: Sequence[Gate],
    notes: Sequence[str],
    swaps: Evaluations,
    written: datetime.datetime | None,
) -> str:
    """The page as text; see `write_report`."""
    return render_page(
        "report.html",
        title,
        written,
        script=(TEMPLATES / "report.js").read_text(),
        notes=list(notes),
        arms=list(evaluations),
        about=[(arm, _flat(result["about"])) for arm, result in evaluations.items() if result["about"]],
        tiles=_tiles(evaluations),
        answers=[result["overall"]["answers"] for result in evaluations.values()],
        rows=_rows(evaluations),
        groupings=_groupings(evaluations),
        mixes=_mixes(evaluations),
        calibration=[_calibration_row(arm, result) for arm, result in evaluations.items()],
        paired=paired_tables(evaluations, swaps),
        charts=[(plot.title, plots.interval_svg(plot)) for plot in plots.interval_plots(evaluations)],
        gates=list(gates),
        runs=[_run_view(run) for run in runs],
        sections=[section_view(section) for section in gallery if section.items],
    )


def render_page(
    template: str, title: str, written: datetime.datetime | None = None, script: str = "", **values: Any
) -> str:
    """A page made from one of `templates/`, each of which extends base.html.

    Args:
      template: its file name.
      written: the time that the page names; now by default.
      script: JavaScript of the page, the only one that its content security policy allows.
      values: what the template uses beside title, time, version and style sheet; texts are escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(
        title=title,
        written=(written or datetime.datetime.now()).strftime("%d %B %Y, %H:%M"),
        version=ivr_jax.__version__,
        style=Markup((TEMPLATES / "report.css").read_text()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )


def _write_plots(folder: Path, runs: Sequence[Run], evaluations: Evaluations) -> list[Path]:
    written = []
    for run in runs:
        if run.curves:
            folder.mkdir(exist_ok=True)
            written.append(folder / f"curves_{_slug(run.title)}.png")
            plots.curves_png(written[-1], run.title, run.curves)
    for plot in plots.interval_plots(evaluations):
        folder.mkdir(exist_ok=True)
        written.append(folder / f"{plot.stem}.png")
        plots.interval_png(written[-1], plot)
    return written


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "stage"


def _tiles(evaluations: Evaluations) -> list[dict[str, Any]]:
    """The headline figures that were measured."""
    measures = [BY_NAME[name] for name in _TILES]
    measured = [m for m in measures if any(m.of(overall(result))["n"] for result in evaluations.values())]
    return [_tile(measure, evaluations) for measure in measured]


def _tile(measure: Measure, evaluations: Evaluations) -> dict[str, Any]:
    """One headline figure: the value of the last main arm, and every other arm's below it."""
    values = {arm: format_value(measure, measure.of(overall(result))) for arm, result in evaluations.items()}
    headline = ([arm for arm in values if arm in MAIN_ARMS] or list(values))[-1]
    return {
        "title": measure.title,
        "value": values[headline],
        "arm": headline,
        "trail": [(arm, value) for arm, value in values.items() if arm != headline],
    }


def _rows(evaluations: Evaluations) -> list[dict[str, Any]]:
    """The before/after table: each arm's estimate, and a main arm's change against the arm to its left."""
    summaries = [overall(result) for result in evaluations.values()]
    rows = []
    for measure in MEASURES:
        estimates = [measure.of(summary) for summary in summaries]
        if any(estimate["n"] for estimate in estimates):
            rows.append({"title": measure.title, "cells": _cells(measure, estimates, list(evaluations))})
    return rows


def _cells(measure: Measure, estimates: Sequence[dict[str, Any]], arms: Sequence[str]) -> list[dict[str, Any]]:
    """An arm outside the main ones has no change: it does not follow from the arm to its left."""
    cells, in_line = [], set(arms) & set(MAIN_ARMS) or set(arms)
    for index, estimate in enumerate(estimates):
        change = compare(measure, estimate, estimates[index - 1]) if index and arms[index] in in_line else None
        shown = change is not None and change["clear"]
        cells.append(
            {
                "value": format_value(measure, estimate),
                "interval": format_interval(measure, estimate),
                "n": estimate["n"],
                "better": change["better"] if shown else None,
                "change": format_value(measure, change["difference"], signed=True) if shown else "",
                "change_interval": format_interval(measure, change["difference"], signed=True) if shown else "",
            }
        )
    return cells


def _groupings(evaluations: Evaluations) -> list[dict[str, Any]]:
    """Exact match (or the outcome, where no target is known) and images, by edits, suite, split and category."""
    views = []
    for key, title in (
        ("by_edits", "By number of edits"),
        ("by_suite", "By suite"),
        ("by_split", "By split"),
        ("by_category", "By category"),
    ):
        groups = list(dict.fromkeys(group for result in evaluations.values() for group in result[key]))
        if len(groups) < 2:
            continue
        known = any(BY_NAME["exact"].of(result["overall"])["n"] for result in evaluations.values())
        measures = [BY_NAME["exact" if known else "outcome"], BY_NAME["images"]]
        rows = []
        for group in groups:
            found = [result[key].get(group) for result in evaluations.values()]
            arms = list(evaluations)
            cells = [_cells(measure, [measure.of(summary) for summary in found], arms) for measure in measures]
            counts = [summary["answers"] for summary in found if summary]
            answers = "\u2013".join(str(count) for count in sorted({min(counts), max(counts)}))
            rows.append({"group": group.replace("_", " "), "answers": answers, "cells": cells})
        views.append({"title": title, "open": key == "by_edits", "measures": [m.title for m in measures], "rows": rows})
    return views


def _mixes(evaluations: Evaluations) -> list[dict[str, Any]]:
    """Which modes each arm chose, over all prompts and at each number of edits."""
    groups = sorted({group for result in evaluations.values() for group in result["by_edits"]}, key=int)
    rows = []
    for label, pick in (("All prompts", None), *((f"{g} edit{'' if g == '1' else 's'}", g) for g in groups)):
        summaries = [
            result["overall"] if pick is None else result["by_edits"].get(pick) for result in evaluations.values()
        ]
        rows.append({"label": label, "cells": [_mix(summary) for summary in summaries]})
    return rows


def _mix(summary: Mapping[str, Any] | None) -> list[tuple[str, float, str]]:
    if summary is None:
        return []
    shares = [(mode, summary["modes"][mode]["value"]) for mode in MODES]
    return [(mode, value, f"{mode.replace('_', '-')}: {value:.0%}") for mode, value in shares if value]


def _calibration_row(arm: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """One arm's own verdicts against the truth: over every drawn image, and over final images."""
    row: dict[str, Any] = {"arm": arm}
    for scope, calibration in result["overall"]["calibration"].items():
        pairs = [
            (BY_NAME["accuracy"], calibration[name])
            for name in ("pass_given_right", "pass_given_wrong", "right_given_pass", "accuracy")
        ]
        row[scope] = {
            "cells": [(format_value(m, e), format_interval(m, e), e["n"]) for m, e in pairs],
            "blind": {name: format_value(BY_NAME["accuracy"], e) for name, e in calibration.get("blind", {}).items()},
            "counts": calibration["counts"],
        }
    return row


PAIRED_COLUMNS: Mapping[str, str] = {
    "sight": "Sight, own wrong image",
    "sight_fault": "Sight, one wrong cell",
    "pass_exact": "P(pass | exact)",
    "pass_fault": "P(pass | one wrong cell)",
    "pass_own_right": "P(pass | own, right)",
    "pass_own_wrong": "P(pass | own, wrong)",
    "pass_exact_own_wrong": "P(pass | exact), same prompts",
    "accuracy": "Verdict right",
    "accuracy_constant": "Best constant verdict",
    "accuracy_masked": "Image masked",
    "read_right": "Request read right",
    "drawn_right": "Drawn right",
}
_PAIRED_GROUPS = {"by_edits": "edits", "by_kind": "kind", "by_round": "round", "by_mode": "after"}


def paired_tables(evaluations: Evaluations, swaps: Evaluations) -> list[dict[str, Any]]:
    """The paired verdict tests of the arms that have one, then the swap tests: one table each.

    A table is {"title", "columns", "rows": [{"label", "cases", "cells": [(value, interval, n)]}]}: all prompts first,
    then group by group.
    """
    found = {arm: result["paired"] for arm, result in evaluations.items() if result.get("paired")}
    found |= {f"{title} (swap test)": result for title, result in swaps.items()}
    return [_paired_table(title, result) for title, result in found.items()]


def _paired_table(title: str, result: Mapping[str, Any]) -> dict[str, Any]:
    share = BY_NAME["accuracy"]
    summaries = {"all prompts": result["overall"]}
    for grouping, word in _PAIRED_GROUPS.items():
        summaries |= {f"{word} {group}": summary for group, summary in result.get(grouping, {}).items()}
    columns = [name for name in PAIRED_COLUMNS if result["overall"][name]["n"]]
    rows = []
    for label, summary in summaries.items():
        estimates = [summary[name] for name in columns]
        cells = [(format_value(share, e), format_interval(share, e), e["n"]) for e in estimates]
        rows.append({"label": label, "cases": summary["cases"], "cells": cells})
    return {"title": title, "columns": [PAIRED_COLUMNS[name] for name in columns], "rows": rows}


def _run_view(run: Run) -> dict[str, Any]:
    main = [curve for curve in run.curves if _MAIN_METRICS.search(curve.name)]
    ordered = main + [curve for curve in run.curves if curve not in main]
    figures = [(curve.name, plots.short(curve.values[-1]), plots.curve_svg(curve)) for curve in ordered]
    return {
        "title": run.title,
        "when": run.when,
        "config": _flat(run.config),
        "first": figures[:_FIRST_CURVES],
        "more": figures[_FIRST_CURVES:],
        "steps": max((curve.steps[-1] for curve in run.curves), default=None),
    }


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as (dotted name, text) pairs, in order."""
    pairs: list[tuple[str, str]] = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", str(value)))
    return pairs
