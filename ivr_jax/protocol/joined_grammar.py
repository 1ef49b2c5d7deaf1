"""Several grammars over one tokenizer as one automaton, so that answers of different modes share one batch.

Grammars of one tokenizer agree on the classes of token ids, and the nodes of one never lead into another.  Their tables
are therefore laid one below the other; an answer's first node says which grammar it follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ivr_jax.protocol.grammar import ACCEPT, Grammar, GrammarState, Tables


class JoinedGrammar:
    """`tables`, `fields`, `field_of` and `tokenizer` are used as those of a `Grammar`; `initial` takes the name of one.

    Args:
      grammars: by name, all made for one tokenizer and with one `text_cap`.
    """

    def __init__(self, grammars: Mapping[str, Grammar]):
        if not grammars or len({int(g.tables.text_cap) for g in grammars.values()}) != 1:
            raise ValueError("joined grammars need one text_cap")
        self.grammars = dict(grammars)
        first = next(iter(grammars.values()))
        self.tokenizer = first.tokenizer
        self._offsets: dict[str, int] = {}
        self.fields = list(first.fields[:1])  # field 0 is the end in every grammar
        tables: list[Tables] = []
        field_of: list[np.ndarray] = []
        nodes = 0
        for name, grammar in grammars.items():
            if grammar.tokenizer is not self.tokenizer:
                raise ValueError("joined grammars need one tokenizer")
            offset = nodes if not tables else nodes - (ACCEPT + 1)
            self._offsets[name] = offset
            tables.append(_shifted(grammar.tables, offset, keep_final=not field_of))
            own_fields = np.where(grammar.field_of == 0, 0, grammar.field_of + len(self.fields) - 1)
            field_of.append(own_fields if not field_of else own_fields[ACCEPT + 1 :])
            self.fields += grammar.fields[1:]
            nodes += len(field_of[-1])
        self.field_of = np.concatenate(field_of).astype(np.int32)
        self.tables = _stacked(tables)

    def initial(self, name: str, height: Any, width: Any) -> GrammarState:
        """State before the first token of answers that follow the grammar `name`; see `Grammar.initial`."""
        state = self.grammars[name].initial(height, width)
        return state._replace(node=(state.node + self._offsets[name]).astype(np.int32))


def _shifted(tables: Tables, offset: int, keep_final: bool) -> Tables:
    """Node numbers moved up by `offset`; ERROR and ACCEPT keep theirs, with their rows in the first grammar only."""

    def moved(numbers: np.ndarray) -> np.ndarray:
        return np.where(numbers > ACCEPT, numbers + offset, numbers).astype(np.int32)

    rows = slice(0 if keep_final else ACCEPT + 1, None)
    return Tables(
        moved(tables.next_node)[rows],
        tables.legal[rows],
        tables.kind[rows],
        moved(tables.capped)[rows],
        tables.class_of,
        tables.text_cap,
    )


def _stacked(tables: list[Tables]) -> Tables:
    """One table; the rows of `legal` that belong to no node (image sizes) are the same in all and come last."""
    legal = [t.legal[: len(t.kind)] for t in tables]
    sizes = tables[0].legal[len(tables[0].kind) :]
    return Tables(
        np.concatenate([t.next_node for t in tables]),
        np.concatenate([*legal, sizes]),
        np.concatenate([t.kind for t in tables]),
        np.concatenate([t.capped for t in tables]),
        tables[0].class_of,
        tables[0].text_cap,
    )
