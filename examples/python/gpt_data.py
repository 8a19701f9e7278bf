"""Text as bytes: training and evaluation parts, and the batch of each step, drawn as examples/cpp/gpt_data.h draws it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

SEED_STRIDE = 1_000_003  # between the seeds of two runs, more than the steps of a run


def default_text() -> Path:
    """$QUANTRAIN_DATA/tinyshakespeare/input.txt.

    Raises:
        ValueError: there is no such file.
    """
    root = os.environ.get("QUANTRAIN_DATA", "")
    path = Path(root) / "tinyshakespeare" / "input.txt"
    if not root or not path.is_file():
        raise ValueError("expected --data FILE or $QUANTRAIN_DATA/tinyshakespeare/input.txt, got neither")
    return path


class Text:
    """The bytes of a file as tokens; the last tenth is for evaluation.

    The batch of a step depends on the seed and the step alone, so a resumed run needs no position in the data.

    Args:
        path: any file.
        context: tokens a sequence.
        device: where the bytes and the batches are.

    Raises:
        ValueError: no file, or one too short for one sequence in each part.
    """

    def __init__(self, path: Path, context: int, device: torch.device) -> None:
        if not path.is_file():
            raise ValueError(f"{path}: expected a text file, got none")
        content = path.read_bytes()
        least = 10 * (context + 1)
        if len(content) < least:
            raise ValueError(
                f"{path}: expected at least {least} bytes (10 times --context + 1), got {len(content)} bytes"
            )
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
        held_out = len(content) // 10
        self.size, self.context, self.device = len(content), context, device
        self.train, self.held_out = data[:-held_out], data[-held_out:]
        self.window = torch.arange(context + 1, device=device)

    def batch(self, seed: int, step: int, accumulate: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, int64 ``[accumulate, batch_size, context]``."""
        generator = torch.Generator().manual_seed(seed * SEED_STRIDE + step)
        high = self.train.numel() - self.context
        return self._rows(self.train, torch.randint(high, (accumulate, batch_size), generator=generator))

    def held_out_batches(self, batch_size: int, most: int) -> Iterator[tuple[Tensor, Tensor]]:
        """At most ``most`` batches of windows that do not overlap, spread evenly over the evaluation part."""
        windows = (self.held_out.numel() - 1) // self.context
        used = min(windows, most * batch_size)
        starts = torch.arange(used) * windows // used * self.context
        for part in starts.split(batch_size):
            yield self._rows(self.held_out, part)

    def _rows(self, data: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        # non_blocking: otherwise this copy of a few bytes would wait for all work queued on the device.
        index = starts.to(self.device, non_blocking=True).unsqueeze(-1) + self.window
        tokens = data[index].long()
        return tokens[..., :-1], tokens[..., 1:]
