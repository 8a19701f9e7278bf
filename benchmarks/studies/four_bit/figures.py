"""Figures of the study: docs/figures/four_bit_qlora.png and four_bit_optimizer.png, from the newest result files alone."""

from __future__ import annotations

import json
from pathlib import Path

from common.drawing import BLUE, ORANGE, panels, source


def newest(results: Path, part: str) -> Path | None:
    files = sorted(results.glob(f"four-bit-{part}-*.json"), key=lambda path: (path.stem[-10:], path.name))
    return files[-1] if files else None


def curves(path: Path, figure_path: Path, kinds: dict[str, str], labels: tuple[str, str]) -> None:
    """Held-out loss over steps, a line per seed."""
    rows = json.loads(path.read_text())["rows"]
    figure, (axes,) = panels(1, 3.6)
    for kind, color in kinds.items():
        for row in (r for r in rows if r["kind"] == kind):
            first = row["seed"] == 0
            steps, _, losses = zip(*row["curve"], strict=True)
            axes.plot(steps, losses, color=color, linewidth=1.4, alpha=0.8, label=kind if first else None)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.legend()
    axes.set_title(source(path), fontsize=9)
    figure.savefig(figure_path)


def draw_all(results: Path, folder: Path) -> int:
    """Returns how many result files are missing."""
    missing = 0
    for part, kinds, loss in (
        ("qlora", {"lora bf16": BLUE, "qlora": ORANGE}, "held-out loss, nats per token"),
        ("optimizer", {"AdamW": BLUE, "AdamW8bit": ORANGE}, "held-out loss, nats per byte"),
    ):
        path = newest(results, part)
        if path is None:
            print(f"figures: no result of part {part} in {results}")
            missing += 1
        else:
            curves(path, folder / f"four_bit_{part}.png", kinds, ("step", loss))
    return missing
