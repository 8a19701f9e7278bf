"""metrics.jsonl: one JSON object per line, written as a run goes. The C++ trainer writes the same file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from quantrain._C import replace_file


class Metrics:
    """The file ``path``, appended to; ``tensorboard`` names a folder for TensorBoard events of the same numbers.

    ``{"stage": "qat-w8a8", "event": "step", "step": 0, "epoch": 0, "loss": 0.31, "lr": 0.0004, "seconds": 0.2}`` for
    each training step, counted from 0, with the loss before the update; and ``{"stage": "qat-w8a8", "event": "eval",
    "step": 469, "epoch": 1, "accuracy": 0.912, "loss": 0.25}`` for an evaluation after that many steps. Of a language
    model a step also has ``tokens_per_second``, and an evaluation ``perplexity`` in place of the accuracy.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None) -> None:
        self.path = path
        self.writer = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(tensorboard))

    def _write(self, entry: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def step(self, stage: str, step: int, epoch: int, loss: float, lr: float, seconds: float, **more: float) -> None:
        """Add a line for a training step; ``more`` is what else its task measures."""
        entry = {"stage": stage, "event": "step", "step": step, "epoch": epoch, "loss": loss, "lr": lr}
        self._write({**entry, "seconds": round(seconds, 4), **more})
        if self.writer is not None:
            self.writer.add_scalar(f"{stage}/loss", loss, step)
            self.writer.add_scalar(f"{stage}/lr", lr, step)

    def evaluation(self, stage: str, step: int, epoch: float, **values: float) -> None:
        """Add a line for an evaluation on the test set: ``values`` are its accuracy or perplexity, and its loss."""
        self._write({"stage": stage, "event": "eval", "step": step, "epoch": epoch, **values})
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{stage}/test {name}", value, step)
            self.writer.flush()

    def read(self) -> list[dict]:
        """All entries; a last line cut short by a crash is left out."""
        if not self.path.is_file():
            return []
        entries = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return entries

    def forget_after(self, stage: str, steps: int) -> None:
        """Drop the lines of ``stage`` past its first ``steps`` steps: a resumed stage will write them again."""
        entries = self.read()
        kept = [entry for entry in entries if entry["stage"] != stage or _steps_done(entry) <= steps]
        if len(kept) != len(entries):
            replace_file(os.fspath(self.path), "".join(json.dumps(entry) + "\n" for entry in kept).encode())


def _steps_done(entry: dict) -> int:
    return entry["step"] + 1 if entry["event"] == "step" else entry["step"]
