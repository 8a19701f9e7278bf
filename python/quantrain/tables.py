"""A small text table: rows as dicts, printed in aligned columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Table"]


class Table:
    """Rows with named columns, printed aligned.

    Args:
        columns: key of a row -> header, in printing order.
        rows: one mapping per row; a missing or None value prints as "-".
        title: a line above the table, or "".
        notes: lines below the table.

    >>> print(Table({"layer": "layer", "db": "SQNR dB"}, [{"layer": "fc", "db": 31.24}]))
    layer  SQNR dB
    fc       31.24
    """

    def __init__(
        self,
        columns: Mapping[str, str],
        rows: Sequence[Mapping[str, Any]],
        *,
        title: str = "",
        notes: Sequence[str] = (),
    ):
        self.columns, self.rows = dict(columns), [dict(row) for row in rows]
        self.title, self.notes = title, list(notes)

    def __str__(self) -> str:
        cells = [list(self.columns.values())]
        cells += [[_text(row.get(key)) for key in self.columns] for row in self.rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(self.columns))]
        number = [all(_is_number(row.get(key)) for row in self.rows) for key in self.columns]
        lines = [
            "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, number, strict=True)).rstrip()
            for line in cells
        ]
        return "\n".join([*([self.title] if self.title else []), *lines, *self.notes])

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self.rows)} rows>\n{self}"


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}" if math.isfinite(value) else str(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
