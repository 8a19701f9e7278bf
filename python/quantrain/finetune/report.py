"""report.html: the table and the plots of a run in one file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from quantrain.finetune.results import FailedStage, StageResult
from quantrain.finetune.table import HEADER, rows

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #222; max-width: 1080px; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid #ddd; padding-bottom: .25rem; }
p.lead { color: #555; margin: 0 0 1.4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: .4rem .7rem; border-bottom: 1px solid #e6e6e6; white-space: nowrap; }
th { font-weight: 600; color: #555; border-bottom: 2px solid #bbb; }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
td.failed { text-align: left; white-space: normal; color: #b00; }
tr.base td { background: #f6f6f6; }
img { max-width: 100%; height: auto; display: block; margin: .6rem 0 1.1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; }
dt { color: #666; } dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font-family: "DejaVu Sans Mono", ui-monospace, monospace; font-size: .9em; }
.wide { overflow-x: auto; }
.note { color: #555; font-size: .92em; }
"""


def data_uri(path: Path) -> str:
    """A PNG file as a ``data:`` address."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _html_table(header: Sequence[str], lines: Sequence[Sequence[str]], *, first_is_base: bool = False) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = []
    for number, line in enumerate(lines):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in line)
        if len(line) == 2 < len(header):  # a failed stage and why
            reason = html.escape(line[1])
            cells = f'<td>{html.escape(line[0])}</td><td class="failed" colspan="{len(header) - 1}">{reason}</td>'
        body.append(f'<tr class="base">{cells}</tr>' if number == 0 and first_is_base else f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _convert_note(results: Sequence[StageResult]) -> str:
    measured = [result for result in results if result.convert_difference is not None]
    if not measured:
        return ""
    parts = ", ".join(f"{result.stage} {result.convert_difference:.2g}" for result in measured)
    return f"Largest difference of a logit between the fake-quantised and the converted model on one batch: {parts}."


_AUDIT_HEADER = ("layer", "kind", "operations", "operands", "sums", "result", "largest sum")


def _integer(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _audits(results: Sequence[StageResult]) -> str:
    """Accuracy and operations of every integer-only network."""
    parts = []
    for result in results:
        if not result.audit:
            continue
        lines = [
            (row.name, row.op, row.operations, row.operands, row.accumulator or "-", row.result, _integer(row.bound))
            for row in result.audit
        ]
        parts.append(
            f"<h2>{html.escape(result.stage)}: the integer-only network</h2>"
            f'<p class="note">Accuracy {100 * result.accuracy:.2f} %, computed by 8-bit multiplies, adds, shifts and compares alone '
            f"({len(result.audit)} layers, each checked; no sum passes 2^31); floating point stands only before the input's codes and after "
            f"the last sums.</p>{_html_table(_AUDIT_HEADER, lines)}"
        )
    return "".join(parts)


def write_report(
    path: Path,
    title: str,
    lead: str,
    stages: Sequence[StageResult | FailedStage],
    figures: Sequence[tuple[str, Path]],
    facts: Sequence[tuple[str, str]],
) -> None:
    """Write the report.

    Args:
        path: The file to write.
        title: Its heading.
        lead: One sentence under the heading.
        stages: The table's rows, the float32 baseline first.
        figures: (heading, PNG file); figures with one heading stand under it together.
        facts: (name, value) pairs of how the run was made.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="lead">{html.escape(lead)}</p>']
    parts.append(_html_table(HEADER, rows(stages), first_is_base=True))
    results = [stage for stage in stages if isinstance(stage, StageResult)]
    parts.append(
        '<p class="note">Accuracy is that of the converted model, whose weights are stored as integers; "change" is in '
        "percentage points against float32. Weights on disk is the size of its safetensors file. Peak memory is that of the "
        f"whole process during the stage. {html.escape(_convert_note(results))}</p>"
    )
    last_heading = None
    for heading, figure in figures:
        if heading != last_heading:
            parts.append(f"<h2>{html.escape(heading)}</h2>")
            last_heading = heading
        parts.append(f'<img src="{data_uri(figure)}" alt="{html.escape(figure.stem)}">')
    parts.append(_audits(results))
    entries = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts)
    parts.append(f"<h2>How it was made</h2><dl>{entries}</dl>")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")
