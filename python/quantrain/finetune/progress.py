"""Progress of a training stage: a tqdm bar on a terminal, a line now and then where output goes to a file."""

from __future__ import annotations

import sys
import time

LINE_SECONDS = 20.0


class Progress:
    """Shows steps ``first`` to ``last`` of ``stage``, as a context manager."""

    def __init__(self, stage: str, first: int, last: int) -> None:
        self.stage, self.done, self.last = stage, first, last
        self.bar = None
        self.printed_at = time.monotonic()
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

    def update(self, loss: float, lr: float) -> None:
        """Count one more step."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f} lr {lr:.2g}", refresh=False)
            self.bar.update()
        elif time.monotonic() - self.printed_at > LINE_SECONDS or self.done == self.last:
            self.printed_at = time.monotonic()
            print(f"{self.stage:<12} step {self.done}/{self.last}  loss {loss:.3f}  lr {lr:.2g}", flush=True)
