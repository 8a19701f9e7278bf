"""report.html: the table and the plots of a run in one file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantrain.finetune.results import StageResult

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fff; --ink: #222; --soft: #595959; --line: #e2e2e2; --rule: #b5b5b5; --base: #f5f5f5; --bad: #b00020;
}
@media (prefers-color-scheme: dark) {
  :root { --page: #16181c; --ink: #e4e4e4; --soft: #a8adb5; --line: #30343b; --rule: #565c66; --base: #1f2228; --bad: #ff8a80; }
}
* { box-sizing: border-box; }
body {
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: var(--ink); background: var(--page);
  max-width: 1080px; margin: 2.5rem auto; padding: 0 1.2rem;
}
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
p.lead { color: var(--soft); margin: 0 0 1.4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: .4rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--rule); }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
table.words th, table.words td { text-align: left; vertical-align: top; white-space: normal; min-width: 6.5rem; }
table.words td:first-child { white-space: nowrap; }
td.failed { text-align: left; white-space: normal; color: var(--bad); }
tr.base td { background: var(--base); }
img { max-width: 100%; height: auto; display: block; margin: .6rem 0 1.1rem; background: #fff; border-radius: 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
dl.columns { font-size: .92em; }
.note { color: var(--soft); font-size: .92em; }
@media (max-width: 640px) {
  body { margin: 1.2rem auto; padding: 0 .8rem; }
  th, td { padding: .35rem .5rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; }
}
"""

COLUMNS = (
    ("accuracy", "share of the test samples that the model gets right; of a quantized model, as it is stored"),
    ("change", "difference to float32 in percentage points"),
    ("size on disk", "size of the model's file"),
    ("latency", "time of the model for one sample on this machine, run by PyTorch"),
    ("peak memory", "most memory that the process held while this model was made (on a GPU: allocated there)"),
    ("training step", "time of one training step (median)"),
    ("total time", "time for making and testing this model"),
)


@dataclass(frozen=True)
class ReportTable:
    """A table of the report.

    Attributes:
        header: The columns' names.
        lines: The cells; a line of two cells in a wider table is a failed stage and why.
        heading: The heading that it stands under; the report's first table has none.
        note: What stands above it.
        columns: (name, explanation) pairs that stand below it.
    """

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    heading: str = ""
    note: str = ""
    columns: Sequence[tuple[str, str]] = ()


def data_uri(path: Path) -> str:
    """A PNG file as a ``data:`` address."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def html_table(
    header: Sequence[str], lines: Sequence[Sequence[str]], *, first_is_base: bool = False, words: bool = False
) -> str:
    """A table; ``words``: its cells are texts rather than numbers."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = []
    for number, line in enumerate(lines):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in line)
        if len(line) == 2 < len(header):  # a failed stage and why
            reason = html.escape(line[1])
            cells = f'<td>{html.escape(line[0])}</td><td class="failed" colspan="{len(header) - 1}">{reason}</td>'
        body.append(f'<tr class="base">{cells}</tr>' if number == 0 and first_is_base else f"<tr>{cells}</tr>")
    kind = ' class="words"' if words else ""
    return f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def convert_note(results: Sequence[StageResult]) -> str:
    """How far the models as stored are from the models as trained; "" where nothing was converted."""
    measured = [result for result in results if result.convert_difference is not None]
    if not measured:
        return ""
    parts = ", ".join(f"{result.stage} {result.convert_difference:.2g}" for result in measured)
    return f"Largest difference of an output between the model as trained and as stored, on one batch: {parts}."


_AUDIT_HEADER = ("layer", "kind", "operations", "operands", "sums", "result", "largest sum")


def _integer(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def audit_tables(results: Sequence[StageResult]) -> list[ReportTable]:
    """Accuracy and operations of every integer-only network."""
    tables = []
    for result in results:
        if not result.audit:
            continue
        lines = [
            (row.name, row.op, row.operations, row.operands, row.accumulator or "-", row.result, _integer(row.bound))
            for row in result.audit
        ]
        note = (
            f"Accuracy {100 * result.accuracy:.2f} %, computed by 8-bit multiplies, adds, shifts and compares alone "
            f"({len(result.audit)} layers, each checked; no sum passes 2^31); floating point stands only before the input's codes and after "
            "the last sums."
        )
        tables.append(ReportTable(_AUDIT_HEADER, lines, f"{result.stage}: the integer-only network", note))
    return tables


def html_title(title: str, lead: str) -> list[str]:
    """A page's heading and the sentence under it."""
    return [f"<h1>{html.escape(title)}</h1>", f'<p class="lead">{html.escape(lead)}</p>']


def html_image(path: Path, text: str) -> str:
    """A PNG file, within the page; ``text`` says what it shows."""
    return f'<img src="{data_uri(path)}" alt="{html.escape(text)}">'


def html_section(table: ReportTable) -> str:
    """A table with its heading, note and explanations."""
    heading = f"<h2>{html.escape(table.heading)}</h2>" if table.heading else ""
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    columns = html_definitions(table.columns, "columns") if table.columns else ""
    return heading + note + html_table(table.header, table.lines) + columns


def html_definitions(entries: Sequence[tuple[str, str]], kind: str = "facts") -> str:
    """A list of names and what they mean."""
    items = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in entries)
    return f'<dl class="{kind}">{items}</dl>'


def write_report(
    path: Path,
    title: str,
    lead: str,
    table: ReportTable,
    recipes: tuple[Sequence[str], Sequence[Sequence[str]]],
    figures: Sequence[tuple[str, str, Path]],
    facts: Sequence[tuple[str, str]],
    *,
    note: str = "",
    more: Sequence[ReportTable] = (),
) -> None:
    """Write the report.

    Args:
        path: The file to write.
        title: Its heading.
        lead: One sentence under the heading.
        table: The stages, the baseline first.
        recipes: What each recipe does: a header and rows.
        figures: (heading, explanation, PNG file); figures with one heading stand under it together.
        facts: (name, value) pairs of how the run was made.
        note: What stands under the recipes.
        more: Tables after the figures.
    """
    parts = html_title(title, lead)
    parts.append(html_table(table.header, table.lines, first_is_base=True))
    parts.append(html_definitions(table.columns, "columns"))
    parts.append(f"<h2>The recipes</h2>{html_table(*recipes, words=True)}")
    parts.append(f'<p class="note">All settings are in config.json beside this file. {html.escape(note)}</p>')
    last_heading = None
    for heading, text, figure in figures:
        if heading != last_heading:
            parts.append(f"<h2>{html.escape(heading)}</h2>")
            parts.append(f'<p class="note">{html.escape(text)}</p>' if text else "")
            last_heading = heading
        parts.append(html_image(figure, f"{heading} ({figure.stem})"))
    parts += [html_section(section) for section in more]
    parts.append(f"<h2>How it was made</h2>{html_definitions(facts)}")
    write_page(path, title, parts)


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write a page of a report: ``parts`` are HTML."""
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")
