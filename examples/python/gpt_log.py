"""What a run shows and writes: metrics.jsonl, TensorBoard events, a progress bar. examples/cpp/gpt_log.h writes the same."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

LINE_SECONDS = 20.0  # between progress lines where the output is no terminal


class Metrics:
    """metrics.jsonl in ``folder``, a JSON object a line, and TensorBoard events of the same numbers.

    A resumed run drops the lines past its first step, which it will write again.
    """

    def __init__(self, folder: Path, first_step: int, *, tensorboard: bool) -> None:
        self.path = folder / "metrics.jsonl"
        self._forget_from(first_step)
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)

    def _forget_from(self, step: int) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines() if step and self.path.is_file() else []
        self.path.write_text("".join(line + "\n" for line in lines if _kept(line, step)), encoding="utf-8")

    def write(self, event: str, step: int, values: dict[str, float]) -> None:
        """Add a line; a number that is not finite becomes null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "step": step, **finite}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{event}/{name}", value, step)
            if event == "eval":
                self.writer.flush()

    def close(self) -> None:
        """Write out what TensorBoard holds back."""
        if self.writer is not None:
            self.writer.close()


def _kept(line: str, step: int) -> bool:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:  # a last line cut short by a crash
        return False
    return entry["step"] <= step if entry["event"] == "eval" else entry["step"] < step


class Progress:
    """A tqdm bar on a terminal, else a line now and then; silent where not ``shown`` (ranks but the first)."""

    def __init__(self, first: int, last: int, *, shown: bool) -> None:
        self.done, self.last, self.shown = first, last, shown
        self.bar = None
        self.printed_at = time.monotonic()
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=last, initial=first, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, loss: float, tokens_per_second: float, scale: float, skipped: int) -> None:
        """Count one more step."""
        self.done += 1
        text = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  scale {scale:g}  skipped {skipped}"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif self.shown and (time.monotonic() - self.printed_at > LINE_SECONDS or self.done == self.last):
            self.printed_at = time.monotonic()
            print(f"step {self.done}/{self.last}  {text}", file=sys.stderr, flush=True)
