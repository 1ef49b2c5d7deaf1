"""Everything that a judged run leaves behind: official result files, summary, tables, page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ivr_jax import files
from ivr_jax.cloud.mirror import with_urls
from ivr_jax.evaluate.benchmarks import gallery, run_folder, tables
from ivr_jax.evaluate.benchmarks.interface import NOT_JUDGED, Benchmark, Item, Judged
from ivr_jax.evaluate.benchmarks.run_folder import Found
from ivr_jax.report.benchmark_page import Bar, Mix, PageTable, write_page

PAGE, MARKDOWN, LATEX = "report.html", "table.md", "table.tex"


def write_all(
    benchmark: Benchmark, items: Sequence[Item], judged: Judged, found: Found, made: Mapping[str, Any],
    workdir: Path, data: Path, form: str,
) -> None:  # fmt: skip
    """Writes result files, `summary.json`, both tables and the page."""
    run = made["run"]
    model, judge = (file_name(text) for text in (run["model"], run["judge"]["name"]))
    for name, text in benchmark.result_files(items, judged, model, judge).items():
        files.write_file(workdir / run_folder.RESULTS / name, text)
    files.write_json(workdir / run_folder.SUMMARY, made)
    files.write_file(workdir / MARKDOWN, tables.markdown(made, benchmark.decimals))
    files.write_file(workdir / LATEX, tables.latex(made, benchmark.decimals))
    shown = gallery.Run(run["model"], benchmark, workdir, data, judged, found.paths, form)
    write_page(
        workdir / PAGE,
        f"{benchmark.title}: {run['model']}",
        judged_by(run["judge"]),
        notes(made, benchmark),
        page_tables(made, benchmark),
        bars(made, benchmark),
        mixes(made),
        gallery.sections(shown, items),
    )


def judged_by(judge: Mapping[str, Any]) -> str:
    """The line under the title: who judged, and when."""
    if judge["name"] == NOT_JUDGED:
        return "Not judged: no judge was named (--config.judge.model)."
    return f"Judged by {judge['name']} ({judge['version']}), {judge['date']}."


def notes(made: Mapping[str, Any], benchmark: Benchmark) -> list[str]:
    """What a reader must bear in mind."""
    found = [f"No headline figure: {reason}." for reason in made["reasons"] if made["headline"] is None]
    found += [f"Not a full result: {reason}." for reason in made["reasons"] if made["headline"] is not None]
    if benchmark.official_judge:
        found.append(f"The authors judge with {benchmark.official_judge}; the judge's prompts here are not theirs.")
    if made["run"].get("rewriter"):
        found.append(f"The prompts were rewritten ({made['run']['rewriter']}).")
    missing = {state: count for state, count in made["states"].items() if state != "ok" and count}
    if missing:
        found.append("Judgements that are missing: " + ", ".join(f"{n} {state}" for state, n in missing.items()) + ".")
    return [*found, *made["notes"]]


def page_tables(made: Mapping[str, Any], benchmark: Benchmark) -> list[PageTable]:
    """The tables of a run's page."""
    result = tuple(map(tuple, tables.rows(made, benchmark.decimals)))
    figures = tuple((tables.readable(name), *row) for name, *row in tables.figure_rows(made, benchmark.decimals))
    return [
        PageTable("Result", f"{benchmark.headline}, beside published figures.", tables.COLUMNS, result),
        PageTable("Figures", "As the official scripts compute them (strict) and as they were evidently meant (fixed), "
                  "with 95% intervals over prompts.", tables.FIGURE_COLUMNS, figures),
    ]  # fmt: skip


def bars(made: Mapping[str, Any], benchmark: Benchmark) -> list[Bar]:
    """A bar for each category's figure, as shares of the benchmark's highest score."""
    found = []
    for figure in made["figures"].values():
        value = figure.get("fixed") or figure.get("strict")
        if not figure["category"] or value["value"] is None:
            continue
        text = f"{value['value']:.{benchmark.decimals}f}"
        ends: list[float | None] = [None, None]
        if value["low"] is not None:
            text += f" [{value['low']:.{benchmark.decimals}f}, {value['high']:.{benchmark.decimals}f}]"
            ends = [value["low"] / benchmark.top, value["high"] / benchmark.top]
        found.append(Bar(tables.readable(figure["category"]), value["value"] / benchmark.top, ends[0], ends[1], text))
    return found


def mixes(made: Mapping[str, Any]) -> list[Mix]:
    """Images per answer and shares of modes, overall and by category; none where images came from elsewhere."""
    answers = made["answers"]
    if not answers:
        return []
    groups = {"all": answers["overall"], **answers["by_category"]}
    found = []
    for name, group in groups.items():
        images = group["images"]
        text = "\u2013" if images["value"] is None else f"{images['value']:.2f}"
        if images["low"] is not None:
            text += f" [{images['low']:.2f}, {images['high']:.2f}]"
        found.append(Mix(tables.readable(name), text, group["modes"]))
    return found


def show(benchmark: Benchmark, made: Mapping[str, Any], workdir: Path, console: Console | None = None) -> None:
    """Prints the result to the terminal."""
    console = console or Console()
    output = Table(pad_edge=False, caption_justify="left")
    for column in tables.FIGURE_COLUMNS:
        output.add_column(column, justify="left" if column == tables.FIGURE_COLUMNS[0] else "right")
    for row in tables.figure_rows(made, benchmark.decimals):
        output.add_row(*map(Text, row))
    console.print(output)
    console.print(Text(f"{benchmark.title}, {benchmark.headline}: {tables.headline_text(made, benchmark.decimals)}"))
    for reason in made["reasons"]:
        console.print(Text(f"not a full result: {reason}"))
    console.print(Text(with_urls(str(workdir / PAGE))))


def file_name(text: str) -> str:
    """A text as part of a file name."""
    return re.sub(r"[^\w.+-]+", "_", text) or "_"
