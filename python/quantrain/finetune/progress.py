"""Progress of a stage: a tqdm bar on a terminal, a line now and then where output goes to a file."""

from __future__ import annotations

import sys
import time

from quantrain.finetune.table import format_bytes

LINE_SECONDS = 20.0


class Progress:
    """Shows steps ``first`` to ``last`` of ``stage``, as a context manager."""

    def __init__(self, stage: str, first: int, last: int) -> None:
        self.stage, self.done, self.last = stage, first, last
        self.bar = None
        self.printed_at = time.monotonic()
        self.tokens, self.seconds = 0, 0.0  # since the last line
        if first:
            print(f"{stage}: resuming at step {first} of {last}", flush=True)

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                desc=f"{self.stage:<12}", total=self.last, initial=self.done, unit="step", dynamic_ncols=True
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(
        self, loss: float, lr: float, tokens: int | None = None, seconds: float = 0.0, memory_bytes: int = 0
    ) -> None:
        """Count one more step. Where it has ``tokens``, the line has their number per second and the peak of memory."""
        self.done += 1
        self.tokens += tokens or 0
        self.seconds += seconds
        speed = ""
        if tokens is not None:
            speed = f"  {self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s  {format_bytes(memory_bytes)}"
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f} lr {lr:.2g}{speed}", refresh=False)
            self.bar.update()
        elif time.monotonic() - self.printed_at > LINE_SECONDS or self.done == self.last:
            self.printed_at = time.monotonic()
            print(f"{self.stage:<12} step {self.done}/{self.last}  loss {loss:.3f}  lr {lr:.2g}{speed}", flush=True)
            self.tokens, self.seconds = 0, 0.0


class Count:
    """Shows how many of a stage's parts are done, as a context manager; called as ``count(done, total, name)``.

    Args:
        stage: What the bar or the line begins with.
        unit: What is counted.
    """

    def __init__(self, stage: str, unit: str) -> None:
        self.stage, self.unit = stage, unit
        self.bar = None
        self.printed_at = time.monotonic()

    def __enter__(self) -> Count:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, done: int, total: int, name: str = "") -> None:
        """``done`` of ``total`` parts are done, and ``name`` is at work."""
        if sys.stderr.isatty():
            self._draw(done, total, name)
        elif time.monotonic() - self.printed_at > LINE_SECONDS:
            self.printed_at = time.monotonic()
            print(f"{self.stage:<12} {self.unit} {done}/{total}  {name}".rstrip(), file=sys.stderr, flush=True)

    def _draw(self, done: int, total: int, name: str) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(desc=f"{self.stage:<12}", total=total, unit=self.unit, dynamic_ncols=True)
        self.bar.set_postfix_str(name, refresh=False)
        self.bar.update(done - self.bar.n)
