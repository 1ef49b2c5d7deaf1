"""Inspected sequences in the terminal (rich) and as one self-contained HTML page."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ivr_jax.images import data_uri
from ivr_jax.inspect.tokens import Inspected, ShownImage, Token
from ivr_jax.report.pages import render_page

COLOURS = {"G": "cyan", "E": "green", "R": "yellow", "S": "magenta"}
WIDEST = 32  # characters of an image in the terminal; two rows of pixels share a line


def print_item(console: Console, item: Inspected, all_tokens: bool = False) -> None:
    """Facts, images as coloured blocks, and a table of tokens; an image is one line of it unless `all_tokens`."""
    console.rule(Text(item.title))
    for name, value in item.facts.items():
        console.print(Text.assemble((f"{name:>12}  ", "dim"), visible(value)))
    for image in item.images:
        console.print(Text.assemble((f"{image.name:>12}  ", "dim"), f"tokens {image.start} to {image.end - 1}"))
        console.print(blocks(image.pixels))
    table = Table(box=None, pad_edge=False, header_style="dim")
    figures = [name for name in ("log_prob", "entropy", "advantage") if _known(item.tokens, name)]
    for name in ("position", "id", "segment", "loss", *figures, "text"):
        table.add_column(name, justify="left" if name == "text" else "right")
    for rows in _lines(item, all_tokens):
        first, last = rows[0], rows[-1]
        many = len(rows) > 1
        text = f"{len(rows)} image tokens" if many else visible(first.text)
        cells = [
            f"{first.position}-{last.position}" if many else str(first.position),
            "" if many else str(first.id),
            first.segment,
            "*" if first.loss else "",
            *(_mean(rows, name) for name in figures),
        ]
        style = COLOURS.get(first.segment[:1], "") if first.segment != "prompt" else "dim"
        table.add_row(*map(Text, cells), Text(text), style=style)
    console.print(table)
    trained = sum(token.loss for token in item.tokens)
    console.print(Text(f"{len(item.tokens)} tokens, {trained} of them with loss (*)", style="dim"))


def html_page(title: str, items: Sequence[Inspected]) -> str:
    """One page; every token is a row."""
    shown = [
        {
            "title": item.title,
            "facts": dict(item.facts),
            "images": [{"name": i.name, "where": f"{i.start}-{i.end - 1}", "uri": data_uri(i.pixels)}
                       for i in item.images],
            "figures": [name for name in ("log_prob", "entropy", "advantage") if _known(item.tokens, name)],
            "tokens": [_row(token) for token in item.tokens],
        }
        for item in items
    ]  # fmt: skip
    return render_page("inspect.html", title, items=shown)


def _row(token: Token) -> dict[str, Any]:
    figures = {n: _number(getattr(token, n)) for n in ("log_prob", "entropy", "advantage")}
    letter = token.segment[:1] if token.segment != "prompt" else ""
    return {"position": token.position, "id": token.id, "segment": token.segment, "loss": token.loss,
            "text": visible(token.text), "letter": letter, **figures}  # fmt: skip


def visible(text: str) -> str:
    """A text with its control characters written out, so that it can do nothing to a terminal and hides nothing."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def blocks(pixels: np.ndarray) -> Text:
    """An image as half blocks, two rows of pixels a line."""
    image = Image.fromarray(pixels)
    width = min(WIDEST, image.width)
    height = max(2, round(width * image.height / image.width / 2) * 2)
    small = np.asarray(image.resize((width, height), Image.Resampling.BOX))
    text = Text()
    for y in range(0, height, 2):
        text.append(" " * 14)
        for above, below in zip(small[y], small[y + 1], strict=True):
            text.append("▀", style=f"rgb({','.join(map(str, above))}) on rgb({','.join(map(str, below))})")
        text.append("\n")
    return text


def _lines(item: Inspected, all_tokens: bool) -> Iterator[list[Token]]:
    """Tokens one by one, but the tokens of an image together."""
    if all_tokens:
        yield from ([token] for token in item.tokens)
        return

    def image_of(token: Token) -> ShownImage | int:
        inside = (i for i in item.images if i.start <= token.position < i.end)
        image = next(inside, None)
        return token.position if image is None else -1 - image.start

    for _, rows in itertools.groupby(item.tokens, image_of):
        yield list(rows)


def _known(tokens: Sequence[Token], name: str) -> bool:
    return any(getattr(token, name) is not None for token in tokens)


def _mean(rows: Sequence[Token], name: str) -> str:
    values = [value for token in rows if (value := getattr(token, name)) is not None]
    return _number(sum(values) / len(values)) if values else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
