"""Observers: modules that watch batches and keep the range a scale is computed from.

An observer holds two float32 buffers, ``min_val`` and ``max_val``, of the shape of the scale (the rank of the observed
tensor, each size dividing the tensor's; or one element). They start at +inf and -inf: nothing seen yet. Both 0: only
zeros seen, which says nothing about the range to come. A third buffer, ``frozen`` (bool ``[1]``), is where the switch
of the :class:`FakeQuantize` around it travels in a state dict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantrain._C import QuantSpec

__all__ = [
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MSEObserver",
    "Observer",
    "PercentileObserver",
    "make_observer",
]


class Float32State(nn.Module):
    """A module whose own floating-point state stays float32 under ``.half()``, ``.bfloat16()`` and ``.to(dtype)``.

    Only the device follows. A scale rounded to bfloat16 would move every code of its block.
    """

    def _apply(self, fn, recurse=True):
        before = {name: tensor.detach() for name, tensor in self._own_state() if tensor.is_floating_point()}
        super()._apply(fn, recurse)
        for name, tensor in self._own_state():
            if name in before and tensor.dtype != torch.float32:
                kept = before[name].to(device=tensor.device, dtype=torch.float32)
                if name in self._parameters:
                    tensor.data = kept  # the same Parameter object, which an optimizer may hold
                else:
                    self._buffers[name] = kept
        return self

    def _own_state(self) -> list[tuple[str, Tensor]]:
        return [(n, t) for group in (self._parameters, self._buffers) for n, t in group.items() if t is not None]


class Observer(Float32State):
    """Base of the observers: checks a batch, updates the range, computes the scale.

    A block of zeros sets the range of a block that saw nothing to [0, 0], and changes no other; the first block that is
    not zero sets the range anew.

    Args:
        scale_shape: shape of the range and of the scale, e.g. ``(1,)`` per tensor, ``(O, 1, 1, 1)`` per output channel.
        quant_min, quant_max: smallest and largest code.
        symmetric: zero_point 0; else affine.
        nan_policy: ``"raise"``: a batch with NaN or Inf raises ValueError and leaves the range as it was; in eager mode
            on CUDA this costs one host synchronization per batch. ``"skip"``: blocks with NaN or Inf leave their range
            as it was; no synchronization.
        name: what error messages call this observer; ``prepare`` sets it to the module's path.

    Called with a tensor of any floating dtype, returns None. No gradient. Under ``torch.compile`` ``"raise"`` becomes
    an asynchronous assertion (RuntimeError).

    Raises:
        ValueError: a NaN or Inf in the batch under ``"raise"``; a ``nan_policy`` that is neither.
    """

    averaging_constant = 0.0  # weight of the new batch; 0: the extremes of all batches
    min_val: Tensor
    max_val: Tensor
    frozen: Tensor

    def __init__(
        self,
        scale_shape: Sequence[int] = (1,),
        *,
        quant_min: int = -128,
        quant_max: int = 127,
        symmetric: bool = True,
        nan_policy: str = "raise",
        name: str = "",
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if nan_policy not in ("raise", "skip"):
            raise ValueError(f"{type(self).__name__}: expected nan_policy 'raise' or 'skip', got {nan_policy!r}")
        self.scale_shape = tuple(scale_shape)
        self.quant_min, self.quant_max, self.symmetric = quant_min, quant_max, symmetric
        self.nan_policy = nan_policy
        self.name = name
        self.register_buffer("min_val", torch.full(self.scale_shape, math.inf, device=device))
        self.register_buffer("max_val", torch.full(self.scale_shape, -math.inf, device=device))
        self.register_buffer("frozen", torch.zeros(1, dtype=torch.bool, device=device))

    def forward(self, x: Tensor) -> None:
        if x.numel() > 0:
            self.update(*self.measure(x))

    @torch.no_grad()
    def measure(self, x: Tensor, *, check: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """The range of one batch, ``(low, high)``, and which blocks are finite; changes nothing.

        Args:
            check: raise on a non-finite batch, where ``nan_policy`` says so.
        """
        x = x.detach()
        extremes = torch.ops.quantrain._min_max(x, self.scale_shape)
        finite = torch.isfinite(extremes[0]) & torch.isfinite(extremes[1])
        if check and self.nan_policy == "raise":
            self._check(finite, x)
        return *self.batch_range(x, *extremes), finite

    @torch.no_grad()
    def observe_qparams(
        self, x: Tensor, scale: Tensor, zero_point: Tensor | None, *, check: bool, marks_nonfinite: bool
    ) -> tuple[Tensor, Tensor]:
        """Takes the batch ``x`` into account and writes the range's ``scale`` and ``zero_point``.

        Args:
            check: as in :meth:`measure`.
            marks_nonfinite: NaN, in what is returned, for blocks that are not finite.

        Returns:
            The scale and the zero point to use with this batch, copies of ``scale_shape``.
        """
        if check or not self.of_extremes:
            low, high, finite = self.measure(x, check=check)
        else:
            low, high = torch.ops.quantrain._min_max(x.detach(), self.scale_shape)
            finite = None
        return self.take(low, high, finite, scale, zero_point, marks_nonfinite=marks_nonfinite)

    @torch.no_grad()
    def take(
        self,
        low: Tensor,
        high: Tensor,
        finite: Tensor | None,
        scale: Tensor,
        zero_point: Tensor | None,
        *,
        marks_nonfinite: bool,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`observe_qparams` of a range that was measured elsewhere; ``finite`` None: where it is finite itself."""
        return torch.ops.quantrain._observe_qparams_(
            self.min_val,
            self.max_val,
            scale,
            zero_point,
            low,
            high,
            finite,
            averaging_constant=self.averaging_constant,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            symmetric=self.symmetric,
            marks_nonfinite=marks_nonfinite,
        )

    @torch.no_grad()
    def update(self, low: Tensor, high: Tensor, finite: Tensor) -> None:
        """Takes a batch's range into account, block by block."""
        torch.ops.quantrain._observe_(
            self.min_val, self.max_val, low, high, finite, averaging_constant=self.averaging_constant
        )

    @property
    def of_extremes(self) -> bool:
        """Whether a batch's range is its extremes."""
        return type(self).batch_range is Observer.batch_range

    def check_range(self, low: Tensor, high: Tensor) -> None:
        """Raises where a batch's extremes are not finite, as :meth:`measure` does."""
        finite = torch.isfinite(low) & torch.isfinite(high)
        if torch.compiler.is_compiling():
            torch._assert_async(finite.all(), f"{self.label}: expected a finite batch, got NaN or Inf")
        elif not bool(finite.all()):
            raise ValueError(
                f"{self.label}: expected a finite batch, got one from {low.min().item()} to {high.max().item()} "
                "(nan_policy='skip' would leave it out)"
            )

    def only_zeros(self) -> Tensor:
        """Blocks that were seen, but only as zeros: bool of ``scale_shape``."""
        return (self.min_val == 0) & (self.max_val == 0)

    def unseen(self) -> Tensor:
        """Blocks that saw nothing yet: bool of ``scale_shape``."""
        return ~(torch.isfinite(self.min_val) & torch.isfinite(self.max_val))

    def qparams_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """``(scale, zero_point)`` of a range."""
        return torch.ops.quantrain._qparams_from_range(
            low, high, quant_min=self.quant_min, quant_max=self.quant_max, symmetric=self.symmetric
        )

    def batch_range(self, x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The range of one batch, given the extremes of each block (``low``, ``high``, shape ``scale_shape``)."""
        return low, high

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """``(scale, zero_point)``, float32 and int32 of ``scale_shape``, of the range seen so far.

        Symmetric: scale = max(|min|, |max|) / d with d = min(-quant_min, quant_max) (the larger magnitude where the
        codes have one sign only). Affine: the range is widened to hold 0, scale = (max - min) / (quant_max - quant_min)
        and zero_point = clamp(quant_min - rint(min / scale)). An all-zero block has scale 1; one that saw no batch,
        scale NaN.
        """
        scale, zero_point = self.qparams_of(self.min_val, self.max_val)
        unseen = self.unseen()
        return torch.where(unseen, math.nan, scale), torch.where(unseen, 0, zero_point)

    def reset(self) -> None:
        """Forget everything seen."""
        self.min_val.fill_(math.inf)
        self.max_val.fill_(-math.inf)

    def _check(self, finite: Tensor, x: Tensor) -> None:
        label = self.label
        if torch.compiler.is_compiling():
            torch._assert_async(finite.all(), f"{label}: expected a finite batch, got NaN or Inf")
        elif not bool(finite.all()):
            raise ValueError(
                f"{label}: expected a finite batch, got {int(x.isnan().sum())} NaN and {int(x.isinf().sum())} Inf "
                f"in a tensor of shape {list(x.shape)} (nan_policy='skip' would leave them out)"
            )

    @property
    def label(self) -> str:
        """What error messages call it."""
        return f"{type(self).__name__} '{self.name}'" if self.name else type(self).__name__

    def extra_repr(self) -> str:
        return f"scale_shape={self.scale_shape}, nan_policy={self.nan_policy!r}"


class MinMaxObserver(Observer):
    """The smallest and largest value ever seen in each block: min_val = min(min_val, min(x)), max_val alike.

    >>> observer = MinMaxObserver()
    >>> observer(torch.tensor([-1.0, 3.0]))
    >>> observer.max_val
    tensor([3.])
    """


class MovingAverageMinMaxObserver(Observer):
    """Exponential averages of the batches' extremes: m = m + averaging_constant * (batch - m); the first batch sets m.

    Args:
        averaging_constant: weight of the new batch, in (0, 1]. The other arguments are :class:`Observer`'s.

    Source: Jacob et al. 2018 (arXiv:1712.05877), section 3.1.

    >>> observer = MovingAverageMinMaxObserver(averaging_constant=0.5)
    >>> observer(torch.tensor([0.0, 2.0])); observer(torch.tensor([0.0, 4.0]))
    >>> observer.max_val
    tensor([3.])
    """

    def __init__(self, scale_shape: Sequence[int] = (1,), *, averaging_constant: float = 0.1, **kwargs):
        super().__init__(scale_shape, **kwargs)
        if not 0 < averaging_constant <= 1:
            raise ValueError(f"{type(self).__name__}: expected averaging_constant in (0, 1], got {averaging_constant}")
        self.averaging_constant = averaging_constant


class PercentileObserver(MovingAverageMinMaxObserver):
    """Averages, over batches, of two percentiles of each block: outliers beyond them saturate.

    With n elements per block and k = clamp(ceil(percentile / 100 * n), 1, n) (nearest rank, no interpolation) the
    batch's range is [(n + 1 - k)-th smallest, k-th smallest]; batches are averaged as in
    :class:`MovingAverageMinMaxObserver`. Exact for tensors of any size (``torch.quantile`` stops at 16 million
    elements).

    Args:
        percentile: in (50, 100]. The other arguments are :class:`MovingAverageMinMaxObserver`'s.

    >>> observer = PercentileObserver(percentile=90.0)
    >>> observer(torch.arange(1.0, 11.0))
    >>> observer.min_val, observer.max_val
    (tensor([2.]), tensor([9.]))
    """

    def __init__(self, scale_shape: Sequence[int] = (1,), *, percentile: float = 99.99, **kwargs):
        super().__init__(scale_shape, **kwargs)
        if not 50 < percentile <= 100:
            raise ValueError(f"{type(self).__name__}: expected percentile in (50, 100], got {percentile}")
        self.percentile = percentile

    def batch_range(self, x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.quantrain._percentile_range(x, self.scale_shape, percentile=self.percentile)


class MSEObserver(MovingAverageMinMaxObserver):
    """Averages, over batches, of the range that quantizes each block with the least squared error.

    The batch's range is r * [min, max], r of {1/80, ..., 80/80} minimizing sum((fake_quantize(x) - x)^2), searched in
    one kernel; batches are averaged as in :class:`MovingAverageMinMaxObserver`.

    >>> observer = MSEObserver(quant_min=-8, quant_max=7)
    >>> observer(torch.cat([torch.linspace(-1, 1, 1000), torch.tensor([10.0])]))
    >>> bool(observer.max_val < 10)
    True
    """

    def batch_range(self, x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.quantrain._mse_range(
            x, self.scale_shape, quant_min=self.quant_min, quant_max=self.quant_max, symmetric=self.symmetric
        )


def make_observer(
    spec: QuantSpec, scale_shape: Sequence[int], *, name: str = "", device: torch.device | str | None = None
) -> Observer | None:
    """The observer that ``spec.observer`` names, or None for ``"dynamic"``.

    Raises:
        ValueError: an unknown name (from ``spec.validate()``).

    >>> import quantrain
    >>> type(make_observer(quantrain.QuantSpec(observer="mse"), (1,))).__name__
    'MSEObserver'
    """
    spec.validate()
    common = {
        "quant_min": spec.quant_min(),
        "quant_max": spec.quant_max(),
        "symmetric": spec.symmetric,
        "nan_policy": spec.nan_policy,
        "name": name,
        "device": device,
    }
    if spec.observer == "dynamic":
        return None
    if spec.observer == "min_max":
        return MinMaxObserver(scale_shape, **common)
    common["averaging_constant"] = spec.averaging_constant
    if spec.observer == "moving_average":
        return MovingAverageMinMaxObserver(scale_shape, **common)
    if spec.observer == "percentile":
        return PercentileObserver(scale_shape, percentile=spec.percentile, **common)
    return MSEObserver(scale_shape, **common)
