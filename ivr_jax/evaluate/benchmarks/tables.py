"""The result as a table in Markdown and LaTeX, with the published rows beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PAPER = "the paper (arXiv 2605.14709)"
TORCHUMM = "TorchUMM (independent)"
# benchmark -> (row, value in the unit of the headline figure, images an answer or None, source)
REFERENCES: Mapping[str, Sequence[tuple[str, float, float | None, str]]] = {
    "geneval": (
        ("Emu3.5", 0.86, 1, PAPER),
        ("Emu3.5", 0.8183, None, TORCHUMM),
        ("SFT only", 0.86, 2.45, PAPER),
        ("RL without step reward", 0.88, 1.62, PAPER),
        ("RL without complexity bonus", 0.89, 2.73, PAPER),
        ("SFT + RL", 0.89, 1.56, PAPER),
    ),
    "kris": (
        ("Emu3.5", 73.75, 1, PAPER),
        ("GPT-4o", 80.09, None, PAPER),
        ("BAGEL", 56.21, None, "BAGEL"),
        ("BAGEL with chain of thought", 60.18, None, "BAGEL"),
        ("SFT only", 79.16, 2.45, PAPER),
        ("RL without step reward", 79.65, 1.62, PAPER),
        ("RL without complexity bonus", 80.25, 2.73, PAPER),
        ("SFT + RL", 80.18, 1.56, PAPER),
    ),
    "omnicontext": (
        ("Emu3.5", 8.82, 1, PAPER),
        ("GPT-4o", 8.80, None, PAPER),
        ("SFT only", 9.12, 2.45, PAPER),
        ("RL without step reward", 9.25, 1.62, PAPER),
        ("RL without complexity bonus", 9.38, 2.73, PAPER),
        ("SFT + RL", 9.35, 1.56, PAPER),
    ),
    "wise": (("Emu3.5", 0.633, None, TORCHUMM),),
    "gedit": (("Emu3.5", 7.56, None, TORCHUMM),),
    "imgedit": (("Emu3.5", 4.24, None, TORCHUMM),),
}
COLUMNS = ("Model", "Headline", "Images an answer", "Judge", "Source")


def rows(summary: Mapping[str, Any], decimals: int) -> list[list[str]]:
    """The rows of the main table: published ones, then this run, in the columns of `COLUMNS`."""
    published = [
        [name, _number(value, decimals), _number(images, 2), "as published", source]
        for name, value, images, source in REFERENCES.get(summary["benchmark"], ())
    ]
    run = summary["run"]
    images = (summary["answers"].get("overall") or {}).get("images") or {}
    own = [
        run.get("model", "this run"),
        headline_text(summary, decimals),
        _number(images.get("value"), 2),
        (run.get("judge") or {}).get("name", ""),
        "this run",
    ]
    return [*published, own]


def readable(name: str) -> str:
    """A category or figure as the page shows it."""
    return name.replace("_", " ")


def headline_text(summary: Mapping[str, Any], decimals: int) -> str:
    """The headline figure, both modes where they differ; "withheld" when there is none."""
    headline = summary["headline"]
    if not headline:
        return "withheld"
    written = {mode: _number(value, decimals) for mode, value in headline.items()}
    if len(set(written.values())) == 1:
        return next(iter(written.values()))
    return ", ".join(f"{value} ({mode})" for mode, value in written.items())


def figure_rows(summary: Mapping[str, Any], decimals: int) -> list[list[str]]:
    """Figure, value and interval of each mode, coverage: one row a figure."""
    table = []
    for name, figure in summary["figures"].items():
        row = [name]
        for mode in ("strict", "fixed"):
            row.append(_estimate(figure.get(mode), decimals))
        found = figure.get("fixed") or figure.get("strict")
        covered = [f"{got}/{wanted}" for got, wanted in found["coverage"].values()]
        table.append([*row, *covered])
    return table


FIGURE_COLUMNS = ("Figure", "strict", "fixed", "Prompts with image", "Judgements")


def markdown(summary: Mapping[str, Any], decimals: int) -> str:
    """Both tables and the notes."""
    parts = [f"# {summary['title']}", "", _markdown(COLUMNS, rows(summary, decimals)), ""]
    if summary["reasons"]:
        parts += [f"Not a full result: {'; '.join(summary['reasons'])}.", ""]
    parts += [_markdown(FIGURE_COLUMNS, figure_rows(summary, decimals)), ""]
    parts += [f"* {note}" for note in summary["notes"]]
    return "\n".join(parts).rstrip() + "\n"


def latex(summary: Mapping[str, Any], decimals: int) -> str:
    """The main table as a `tabular`."""
    lines = [r"\begin{tabular}{lrrll}", r"\toprule", " & ".join(map(_escape, COLUMNS)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(_escape, row)) + r" \\" for row in rows(summary, decimals)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _markdown(columns: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *table]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _estimate(found: Mapping[str, Any] | None, decimals: int) -> str:
    if found is None or found["value"] is None:
        return "\u2013"
    interval = ""
    if found["low"] is not None:
        interval = f" [{_number(found['low'], decimals)}, {_number(found['high'], decimals)}]"
    return _number(found["value"], decimals) + interval


def _number(value: float | None, decimals: int) -> str:
    return "\u2013" if value is None else f"{value:.{decimals}f}"


_SPECIAL = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
            "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
            "\u2013": "--"}  # fmt: skip


def _escape(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)
