"""State of an optimizer in pinned host memory, which visits the device page by page during a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["HostState", "pinned"]

PAGE_BYTES = 64 << 20  # of state that is on the device at a time; two pages are, one of them on its way

State = dict[str, Tensor]


def pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned host memory, of the same strides."""
    host = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor)


class HostState:
    """Brings pages of states to a device and back, beside what the device computes.

    While a page is updated the next one is copied in and the one before is copied out, each on a stream of its own; the
    caller's stream waits for its page alone. The host tensors always hold the last complete step: their values are those
    of the step that was queued last once :meth:`synchronize` returns.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._incoming, self._outgoing = (torch.cuda.Stream(device) for _ in range(2))

    def update(self, states: Sequence[State], update: Callable[[slice, list[State]], None]) -> None:
        """Calls ``update(which, on_device)`` page by page; what it changes there in place goes back to ``states``.

        Args:
            states: of pinned host tensors; tensors on the device stay as they are.
            update: queues its work on the current stream; ``which`` are the places in ``states``.
        """
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("AdamW8bit: expected no capture of a CUDA graph with state_on_host, got one")
        current = torch.cuda.current_stream(self.device)
        self._incoming.wait_stream(self._outgoing)  # of the last step
        pages = list(_pages(states))
        fetched = self._fetch(states[pages[0]]) if pages else None
        left: torch.cuda.Event | None = None  # when the page before is back
        for number, page in enumerate(pages):
            on_device, arrived = fetched
            if number + 1 < len(pages):
                if left is not None:  # its memory is free for the next
                    self._incoming.wait_event(left)
                fetched = self._fetch(states[pages[number + 1]])
            current.wait_event(arrived)
            update(page, on_device)
            self._outgoing.wait_stream(current)
            with torch.cuda.stream(self._outgoing):
                for host, visiting in zip(states[page], on_device, strict=True):
                    for name, tensor in visiting.items():
                        if host[name] is not tensor:
                            host[name].copy_(tensor, non_blocking=True)
                            tensor.record_stream(current)
                            tensor.record_stream(self._outgoing)
                left = self._outgoing.record_event()

    def _fetch(self, states: Iterable[State]) -> tuple[list[State], torch.cuda.Event]:
        with torch.cuda.stream(self._incoming):
            on_device = [
                {
                    name: tensor if tensor.is_cuda else tensor.to(self.device, non_blocking=True)
                    for name, tensor in state.items()
                }
                for state in states
            ]
            return on_device, self._incoming.record_event()

    def synchronize(self) -> None:
        """Waits until the host tensors hold what the last step wrote."""
        self._outgoing.synchronize()


def _pages(states: Sequence[State]) -> Iterable[slice]:
    """Runs of states that are at most a page together, or one that is more."""
    start, held = 0, 0
    for index, state in enumerate(states):
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        if index > start and held + size > PAGE_BYTES:
            yield slice(start, index)
            start, held = index, 0
        held += size
    if start < len(states):
        yield slice(start, len(states))
