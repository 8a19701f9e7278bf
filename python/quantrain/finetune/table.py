"""The one table of a run: model, accuracy, change against float32, size, latency, peak memory, times."""

from __future__ import annotations

from collections.abc import Sequence

from quantrain.finetune.results import FailedStage, StageResult

HEADER = ("model", "accuracy", "change", "size on disk", "latency", "peak memory", "training step", "total time")


def rows(results: Sequence[StageResult | FailedStage]) -> list[tuple[str, ...]]:
    """The table's cells, one row per stage in the order of ``results``; the first is the float32 baseline.

    The row of a failed stage has two cells, its name and the reason.
    """
    return [_row(result, results[0]) for result in results]


def _row(result: StageResult | FailedStage, baseline: StageResult) -> tuple[str, ...]:
    if isinstance(result, FailedStage):
        return (result.stage, f"failed: {result.failed}")
    change = 100 * (result.accuracy - baseline.accuracy)
    return (
        result.stage,
        f"{100 * result.accuracy:.2f} %",
        "" if result is baseline else f"{change:+.2f}",
        format_bytes(result.weight_bytes),
        format_seconds(result.latency_seconds) if result.latency_seconds is not None else "",
        format_bytes(result.peak_memory_bytes),
        format_seconds(result.step_seconds) if result.step_seconds is not None else "no training",
        format_seconds(result.seconds),
    )


def format_table(results: Sequence[StageResult | FailedStage]) -> str:
    """The table as text; a failed stage's reason follows its name."""
    return format_cells(HEADER, rows(results))


def format_cells(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Rows as text, in columns two spaces apart; all but the first column are aligned right. A row of two cells in a
    wider table is a name and what follows it."""
    cells = [tuple(header), *body]
    wide = [row for row in cells if len(row) == len(header)]
    widths = [max(len(row[0]) for row in cells)]
    widths += [max(len(row[column]) for row in wide) for column in range(1, len(header))]
    lines = [
        f"{row[0].ljust(widths[0])}  {row[1].splitlines()[0]}"
        if len(row) < len(header)
        else "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])


def format_bytes(count: int) -> str:
    """``count`` bytes in kB or MB, powers of 1000."""
    if count < 1e6:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.2f} MB" if count < 1e8 else f"{count / 1e6:.0f} MB"


def format_seconds(seconds: float) -> str:
    """``seconds`` in the unit that suits them.

    Example:
        >>> [format_seconds(value) for value in (0.00042, 0.131, 7.24, 58, 185.2, 7500)]
        ['0.42 ms', '131 ms', '7.2 s', '58 s', '3 min 05 s', '2 h 05 min']
    """
    if seconds < 0.9995:
        milliseconds = 1000 * seconds
        return f"{milliseconds:.0f} ms" if milliseconds >= 9.95 else f"{milliseconds:.2g} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{minutes // 60} h {minutes % 60:02d} min"
