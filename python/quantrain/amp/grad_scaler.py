"""Dynamic loss scaling: torch.amp.GradScaler's interface over quantrain's C++ scaler."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantrain import _C
from quantrain.tables import Table

__all__ = ["GradScaler"]


class GradScaler:
    """Scales the loss so that float16 gradients do not underflow, and skips steps whose gradients overflowed.

    The same rules, arithmetic and state as ``torch.amp.GradScaler``: the scale's course, the skipped steps and the
    parameters are equal bit for bit, and a state saved by one loads in the other. In addition: ``clip_grad_norm_``
    unscales, checks and clips in one read and one write of the gradients, ``overflow_report`` names the parameters that
    overflow, ``capturable`` leaves every decision to the device, and errors say what to do.

    Args:
        device: The device type, as in torch.amp.GradScaler; the scale lives where the first loss is.
        init_scale: The first scale.
        growth_factor: Multiplies the scale after ``growth_interval`` steps in a row without Inf or NaN; > 1.
        backoff_factor: Multiplies the scale after a step with Inf or NaN; in (0, 1).
        growth_interval: > 0.
        enabled: False passes everything through.
        capturable: No host synchronization in any method but the getters, so that a step can be a CUDA graph. Only
            optimizers that take the scale (``fused=True``) may step.
        process_group: Where ranks hold different gradients (sharded training): the group over which they agree whether
            to skip. Under DistributedDataParallel the gradients are equal already.

    Raises:
        ValueError: A number outside its range.

    Source: Micikevicius et al., arXiv:1710.03740, section 3.2.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        >>> scaler = GradScaler(init_scale=1024.0)
        >>> scaler.scale(model(torch.ones(2, 4)).sum()).backward()
        >>> norm = scaler.clip_grad_norm_(optimizer, 1.0)
        >>> round(float(norm), 3)
        4.472
        >>> scaler.step(optimizer)
        >>> scaler.update()
        >>> scaler.get_scale()
        1024.0
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        capturable: bool = False,
        process_group: Any = None,
    ) -> None:
        if not isinstance(device, (str, torch.device)):
            raise TypeError(f"GradScaler: expected device to be a str, as in torch.amp.GradScaler, got {device!r}")
        self._arguments = {
            "init_scale": init_scale,
            "growth_factor": growth_factor,
            "backoff_factor": backoff_factor,
            "growth_interval": growth_interval,
            "enabled": enabled,
            "capturable": capturable,
        }
        self._device = device
        self._scaler = _C.GradScaler(**self._arguments)
        if process_group is not None:
            maximum = torch.distributed.ReduceOp.MAX
            self._scaler.set_found_inf_hook(partial(torch.distributed.all_reduce, op=maximum, group=process_group))

    def scale(self, outputs: Tensor | Iterable[Tensor]) -> Any:
        """``outputs`` times the scale: a tensor, or lists and tuples of tensors, nested at will.

        Raises:
            TypeError: Anything but tensors.
        """
        if isinstance(outputs, Tensor):
            return self._scaler.scale(outputs)
        if isinstance(outputs, (list, tuple)):
            return type(outputs)(self.scale(output) for output in outputs)
        if isinstance(outputs, Iterable):
            return map(self.scale, outputs)
        raise TypeError(f"GradScaler.scale: expected a tensor or an iterable of tensors, got {type(outputs).__name__}")

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients of ``optimizer``'s parameters by the scale, in place, and note any Inf or NaN.

        Raises:
            RuntimeError: Called twice before update(), after step(), or before any scale().
            ValueError: A float16 gradient.
            TypeError: A gradient that is not floating point, or on another device than the loss.
        """
        self._scaler.unscale_(optimizer)

    def clip_grad_norm_(self, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
        """Unscale, check, and clip by the 2-norm over all of ``optimizer``'s gradients; returns the norm before.

        Equal to ``unscale_`` and ``torch.nn.utils.clip_grad_norm_``, with 12 bytes moved per float32 element instead of
        20. An optimizer that takes the scale itself (``fused=True``) also clips itself: the gradients are read once and
        stay as they are.

        Returns:
            float32 tensor without dimensions, on the gradients' device; no synchronization.

        Raises:
            RuntimeError, ValueError, TypeError: As unscale_; ValueError also where ``max_norm`` is not positive.
        """
        return self._scaler.clip_grad_norm_(optimizer, max_norm)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """``optimizer.step(*args, **kwargs)``, unscaled before if need be, unless a gradient is Inf or NaN.

        Returns:
            What the optimizer's step returns; None where it was skipped.

        Raises:
            RuntimeError: Called twice before update(), before any scale(), without gradients, with a closure, or with
                a scale that has fallen to 0: every gradient overflows.
        """
        if self.is_enabled() and ("closure" in kwargs or any(callable(argument) for argument in args)):
            raise RuntimeError(
                "GradScaler.step: expected no closure while the scaler is enabled, got one: its loss and gradients would "
                "not be scaled"
            )
        returned: list[Any] = []
        self._scaler.step(optimizer, lambda: returned.append(optimizer.step(*args, **kwargs)))
        return returned[0] if returned else None

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Set the scale of the next step: times ``backoff_factor`` after Inf or NaN, times ``growth_factor`` after
        ``growth_interval`` good steps, or ``new_scale``.

        Raises:
            RuntimeError: No optimizer was checked since the last update.
            ValueError: ``new_scale`` is not positive and finite, or has more than one element.
            TypeError: ``new_scale`` is not a float32 tensor, or requires a gradient.
        """
        if new_scale is None:
            self._scaler.update()
        else:
            self._scaler.update(new_scale)

    def get_scale(self) -> float:
        """The scale; 1.0 where not enabled. Waits for the device."""
        return self._scaler.get_scale()

    def get_growth_factor(self) -> float:
        """The growth factor."""
        return self._scaler.growth_factor

    def set_growth_factor(self, new_factor: float) -> None:
        """Set the growth factor; ValueError unless > 1."""
        self._scaler.growth_factor = new_factor

    def get_backoff_factor(self) -> float:
        """The backoff factor."""
        return self._scaler.backoff_factor

    def set_backoff_factor(self, new_factor: float) -> None:
        """Set the backoff factor; ValueError unless in (0, 1)."""
        self._scaler.backoff_factor = new_factor

    def get_growth_interval(self) -> int:
        """The growth interval."""
        return self._scaler.growth_interval

    def set_growth_interval(self, new_interval: int) -> None:
        """Set the growth interval; ValueError unless > 0."""
        self._scaler.growth_interval = new_interval

    def is_enabled(self) -> bool:
        """Whether the scaler does anything."""
        return self._scaler.is_enabled()

    def state_dict(self) -> dict[str, Any]:
        """scale, growth_factor, backoff_factor, growth_interval and _growth_tracker, as torch.amp.GradScaler's; empty
        where not enabled. Call it after update(). Waits for the device."""
        return self._scaler.state_dict() if self.is_enabled() else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of this class or of torch.amp.GradScaler; nothing happens where not enabled.

        Raises:
            RuntimeError: The state is empty: it was saved by a scaler that was not enabled.
            ValueError: A key is missing or a number outside its range; nothing is changed.
        """
        if not self.is_enabled():
            return
        if not state_dict:
            raise RuntimeError(
                "GradScaler.load_state_dict: expected the state of an enabled scaler, got an empty one: it was saved with "
                "enabled=False"
            )
        self._scaler.load_state_dict(state_dict)

    def overflow_report(self, model: nn.Module) -> Table:
        """Which parameters' gradients were Inf or NaN: rows with name, count and first_step, the earliest first.

        Within a step the later parameter comes first, since the backward pass reaches it first. Counted on the device;
        steps are update() calls of this scaler, from 0. Waits for the device.
        """
        rows = self._scaler.overflow_report(list(model.named_parameters()))
        return Table({"name": "parameter", "count": "steps with Inf or NaN", "first_step": "first at step"}, rows)

    def __getstate__(self) -> dict[str, Any]:
        if self._scaler.is_mid_step():
            raise RuntimeError(
                "GradScaler: expected to be copied or pickled after update(), got a scaler within a step"
            )
        return {"device": self._device, "arguments": self._arguments, "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["device"], **state["arguments"])
        if state["state"]:
            self.load_state_dict(state["state"])
