"""The page of a benchmark run, or of a comparison: tables, bars by category, modes, answers round by round."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from ivr_jax.errors import UserError
from ivr_jax.report.answers import replace_file
from ivr_jax.report.gallery import GallerySection, section_view
from ivr_jax.report.pages import render_page


@dataclasses.dataclass(frozen=True)
class PageTable:
    """A table under a heading: `rows` hold texts, the first of each names the row."""

    title: str
    lead: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar: where it ends, its interval (None without one), on a scale from 0 to 1; `text` says the value."""

    label: str
    value: float
    low: float | None
    high: float | None
    text: str


@dataclasses.dataclass(frozen=True)
class Mix:
    """Images an answer of one group, as text, and the shares of its modes, which add up to 1."""

    label: str
    images: str
    modes: Mapping[str, float]


def write_page(
    path: Path,
    title: str,
    subtitle: str,
    notes: Sequence[str],
    tables: Sequence[PageTable],
    bars: Sequence[Bar],
    mixes: Sequence[Mix],
    gallery: Sequence[GallerySection],
) -> None:
    """Writes the page.  Raises UserError when it cannot be written."""
    page = render_page(
        "benchmark.html",
        title,
        subtitle=subtitle,
        notes=list(notes),
        tables=list(tables),
        bars=[_bar_view(bar) for bar in bars],
        mixes=list(mixes),
        mode_names=list(dict.fromkeys(mode for mix in mixes for mode in mix.modes)),
        sections=[section_view(section) for section in gallery if section.items],
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, page.encode("utf-8", "xmlcharrefreplace"))
    except OSError as error:
        raise UserError(f"Cannot write the page {path}: {error}.", "Choose a place you can write to.") from None


def _bar_view(bar: Bar) -> dict[str, object]:
    """Lengths in per cent of the scale."""

    def percent(value: float) -> float:
        return round(100 * min(1.0, max(0.0, value)), 2)

    interval = None
    if bar.low is not None and bar.high is not None:
        interval = (percent(bar.low), round(percent(bar.high) - percent(bar.low), 2))
    return {"label": bar.label, "text": bar.text, "width": percent(bar.value), "interval": interval}
