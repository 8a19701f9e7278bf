"""FakeQuantize: an observer and a fake-quantize op behind one module, for weights and activations alike."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from quantrain._C import QuantSpec, RowRounding, round_rows

from .calibrates import Calibrates
from .observers import Float32State, make_observer
from .shared_pass import SharedPass

__all__ = ["FakeQuantize"]

kMinScale = 1e-8  # a learned scale is kept at or above it: the ops need scale > 0


def in_backward() -> bool:
    """Whether this is a forward pass inside a backward pass, as activation checkpointing runs in either mode."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def transforms_active() -> bool:
    """Whether torch.func or forward mode differentiates, which nodes that keep codes do not take."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def agreed_range(low: Tensor, high: Tensor, finite: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The range over all ranks of the default process group; what is not finite on a rank does not count there."""
    distributed = torch.distributed
    if torch.compiler.is_compiling() or not distributed.is_available() or not distributed.is_initialized():
        return low, high, finite
    if distributed.get_world_size() == 1:
        return low, high, finite
    ends = torch.where(finite, torch.stack([low, -high]), math.inf)
    distributed.all_reduce(ends, distributed.ReduceOp.MIN)
    return ends[0], -ends[1], torch.isfinite(ends).all(0)


class Quantized(NamedTuple):
    """A fake-quantized tensor, ``values = (codes - zero_point) * scale``, and its codes, which a layer may keep in its place."""

    values: Tensor
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


@dataclass(eq=False)
class Before:
    """What a tensor goes through before it is rounded for a linear layer: a function of :func:`quantrain.norm_act_fake_quantize`.

    Attributes:
        function: its name.
        other: the second factor of "silu_mul".
        norm: the module of "layer_norm" and "rms_norm", whose weight, bias and eps are read at each call.
    """

    function: str
    other: Tensor | None = None
    norm: nn.Module | None = None

    def arguments(self) -> tuple[str, Tensor | None, Tensor | None, Tensor | None, float]:
        """function, other, weight, bias, eps."""
        norm = self.norm
        if norm is None:
            return self.function, self.other, None, None, 0.0
        return self.function, None, norm.weight, getattr(norm, "bias", None), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        """The same by PyTorch's operators."""
        if self.norm is not None:
            return self.norm(x)
        y = kFunctions[self.function](x)
        return y if self.other is None else y * self.other


_TYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
kFloats = tuple(_TYPE_NAMES)
kFunctions: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "silu_mul": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def _product_type(x: Tensor) -> torch.dtype:
    """What a linear layer computes in."""
    kind = x.device.type
    autocast = x.dtype == torch.float32 and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    return dtype if dtype in kFloats else x.dtype


class FakeQuantize(Calibrates, Float32State):
    """Rounds to ``spec``'s codes and back: ``y = (clamp(rint(x / scale) + zero_point) - zero_point) * scale``.

    Where the scale comes from:

    - ``spec.observer == "dynamic"``: from the tensor at every call (``choose_qparams``); nothing is stored.
    - otherwise from the buffer ``scale`` (and ``zero_point`` where affine), which the child ``observer`` sets while it
      observes: in calibration, and in training until ``enable_observer(False)`` freezes the range. Evaluation never
      moves a range, nor does a forward pass inside a backward pass (activation checkpointing).
    - ``spec.learnable``: ``scale`` is a Parameter trained by LSQ (Esser et al. 2020, arXiv:1902.08153, eq. 3) with
      gradient factor 1 / sqrt(elements per scale * quant_max). The observer only sets its first value: calibration, or
      else the first training batch. From then on, and from a loaded scale, only the optimizer moves it.

    A block of zeros says nothing about its range. Its scale is 1 until the first block that is not zero sets it. Where
    it is learned and a weight's (``of_weight``: zero-initialized, so small at first and then growing), the scale
    follows that block's range from batch to batch until ``enable_observer(False)``, and is learned from there.

    Args:
        spec: bits, symmetric, granularity, observer, ... (:class:`quantrain.QuantSpec`); copied.
        scale_shape: shape of a stored scale; ``(1,)`` per tensor, else the rank of the tensor.
        token_dims: with granularity ``per_token``, how many trailing dimensions share a scale (1 for a Linear's input
            ``[..., K]``, 3 for a convolution's ``[B, C, H, W]``).
        name: what error messages call this module; ``prepare`` sets it to the module's path.

    Shapes and dtypes: any shape; float32, float16, bfloat16 in, the same out; scale float32 always, zero_point int32.
    Gradient: straight through where the unclamped code is in [quant_min, quant_max], else 0; LSQ's for a learnable
    scale. NaN in gives NaN out; what an observer does with it is ``spec.nan_policy``. Under ``"raise"`` a range that
    follows training on CUDA waits for no check: there a block with NaN or Inf leaves the range as it was and gives NaN,
    which a loss scaler sees. Under ``torch.distributed`` the ranks agree on the first range of a learned activation
    scale (one all-reduce).

    State: ``scale``, ``zero_point``, and of ``observer`` the range and ``frozen``, whether the range was frozen.

    Raises:
        ValueError: an invalid spec; a forward that needs a stored scale which was neither observed nor loaded; a
            non-finite batch while observing under ``nan_policy="raise"``.

    >>> import quantrain
    >>> fq = FakeQuantize(quantrain.QuantSpec(bits=4, observer="min_max"))
    >>> fq(torch.tensor([-0.7, 0.31, 0.7]))
    tensor([-0.7000,  0.3000,  0.7000])
    """

    zero_point: Tensor | None

    def __init__(
        self,
        spec: QuantSpec,
        scale_shape: Sequence[int] = (1,),
        *,
        token_dims: int = 1,
        name: str = "",
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.observer = make_observer(spec, scale_shape, name=f"{name}.observer" if name else "", device=device)
        self.spec = copy.copy(spec)
        self.scale_shape = tuple(scale_shape)
        self.token_dims = token_dims
        self.name = name
        self.quant_min, self.quant_max = spec.quant_min(), spec.quant_max()
        self.symmetric, self.granularity = spec.symmetric, spec.granularity
        self.dynamic, self.learnable = spec.observer == "dynamic", spec.learnable
        self.fake_quant_enabled, self._observing = True, True
        self.calibrating, self.of_weight = False, False
        self._ready = self.dynamic
        # A learned scale's: every block has a first value; some follow a weight that began as zeros. Both save looking.
        self._settled = self._follows_zeros = False
        if not self.dynamic:
            scale = torch.full(self.scale_shape, math.nan, device=device)
            if self.learnable:
                self.scale = nn.Parameter(scale)
            else:
                self.register_buffer("scale", scale)
            if not self.symmetric:
                self.register_buffer("zero_point", torch.zeros(self.scale_shape, dtype=torch.int32, device=device))
        if self.symmetric or self.dynamic:
            self.zero_point = None

    def forward(
        self,
        x: Tensor,
        *,
        zero: Tensor | None = None,
        codes: bool = False,
        before: Before | None = None,
        reader: int | None = None,
    ) -> Tensor | Quantized:
        """``x`` fake-quantized; ``zero`` as :meth:`observe` takes it. An empty ``x`` passes.

        Args:
            codes: as :meth:`with_codes`.
            before: what ``x`` goes through first, in the same pass where that can be: then codes come with it too.
            reader: as :meth:`of_rows`.
        """
        if before is not None:
            result = self.of_rows(x, before)
            return self.with_codes(before(x)) if result is None else result
        if codes:
            return self.with_codes(x)
        observed = self.observe(x, zero=zero) if reader is None else self._observed_for(x, reader)
        if not self._ready and x.numel() == 0:
            return x
        if not self.fake_quant_enabled:
            return x
        if self.dynamic:
            return self.quantize_dequantize_dynamic(x, self._dynamic_shape(x))
        scale, zero_point = observed if observed is not None else self.calculate_qparams()
        return self.quantize_dequantize(x, scale, zero_point)

    def observe(self, x: Tensor, *, zero: Tensor | None = None) -> tuple[Tensor, Tensor | None] | None:
        """Shows ``x`` to the observer if observing is on; returns the new (scale, zero_point) unless they are learned.

        Args:
            zero: bool, broadcast to the scale: blocks of a learned scale to take as zeros whatever ``x`` holds.
        """
        if x.numel() == 0 or not self.observing:
            return None
        if self.learnable and not self.calibrating:
            return self._observe_first(x, zero)
        waits = self.calibrating or not self._ready or not x.is_cuda
        scale, zero_point = self.observer.observe_qparams(
            x,
            self.scale.data if self.learnable else self.scale,
            self.zero_point,
            check=waits,
            marks_nonfinite=not waits and self.observer.nan_policy == "raise",
        )
        return None if not self.ready or self.learnable else (scale, None if self.symmetric else zero_point)

    def with_codes(self, x: Tensor, reader: int | None = None) -> Quantized | Tensor:
        """:meth:`forward`'s result with its codes, where there are some: one fixed scale, at most 8 bits, a gradient to come.

        Args:
            reader: as :meth:`of_rows`; the result is made for each of them, the range moves once.
        """
        fits = self.training and torch.is_grad_enabled() and (self.has_codes() or self.learns_codes())
        fits = fits and self.fake_quant_enabled and (self._ready or self.observing)
        if not fits or self.calibrating or x.dim() < 2 or x.dtype == torch.float64 or x.numel() == 0:
            return self(x, reader=reader)
        observed = self.observe(x) if reader is None else self._observed_for(x, reader)
        scale, zero_point = observed if observed is not None else self.calculate_qparams()
        options = {"grad_factor": self.grad_factor(x.numel())} if self.learnable else {}
        values, codes = torch.ops.quantrain.fake_quantize_codes(
            x, scale, zero_point, quant_min=self.quant_min, quant_max=self.quant_max, **options
        )
        return Quantized(values, codes, scale.detach(), zero_point)

    def of_rows(self, x: Tensor, before: Before | None = None, reader: int | None = None) -> Quantized | None:
        """:meth:`forward`'s result for a linear layer, with its codes and in the type of the layer's product; None where the
        plain call has to do: no gradient to come, more than 8 bits, another granularity, a learned scale, calibration.

        Args:
            before: what ``x`` goes through first.
            reader: which of several layers that read one tensor asks: they get the same result and observe it once.
        """
        if not (self.training and torch.is_grad_enabled() and self.fake_quant_enabled) or self.calibrating:
            return None
        if x.dtype not in kFloats or x.dim() < 2 or x.numel() == 0 or not (self.has_codes() or self._has_row_codes()):
            return None
        if not self.dynamic and not (self._ready or self.observing):
            return None
        if before is not None and not self._takes(before):
            return None
        latest, dtype = self._reading(x, reader), _product_type(x)
        if latest is None or latest.result is None or latest.dtype != dtype:
            observes, known = self._observes_for(latest, reader), None if latest is None else latest.observed
            result = self._round_rows(x, before, observes, known)
            if latest is None:
                return result
            latest.observed = (result.scale, result.zero_point) if observes else known
            if latest is not self._latest:  # it was the last of them
                return result
            latest.keep(result, dtype)
        return latest.result

    def _round_rows(
        self, x: Tensor, before: Before | None, observes: bool, known: tuple[Tensor, Tensor | None] | None
    ) -> Quantized:
        if torch.compiler.is_compiling() or not (self.dynamic or not observes or self.observer.of_extremes):
            return self._round_rows_by_operators(x, before, observes, known)
        function, other, weight, bias, eps = (
            ("identity", None, None, None, 0.0) if before is None else before.arguments()
        )
        dtype, settings = _TYPE_NAMES[_product_type(x)], self._row_settings()
        if self.dynamic:
            return Quantized(
                *round_rows(settings, x, function, other, weight, bias, eps, dtype, *[None] * 4, False, False, "")
            )
        if not observes:
            state, marks, label = (None, None, *(known or self.calculate_qparams())), False, ""
        else:
            observer = self.observer
            state = (observer.min_val, observer.max_val, self.scale, self.zero_point)
            raises, waits = observer.nan_policy == "raise", not self._ready or not x.is_cuda
            marks, label = raises and not waits, observer.label if raises and waits else ""
        result = round_rows(settings, x, function, other, weight, bias, eps, dtype, *state, observes, marks, label)
        self.note_range()
        return Quantized(*result)

    _rows: RowRounding | None = None  # what does not change from call to call

    def _row_settings(self) -> RowRounding:
        if self._rows is None:
            self._rows = RowRounding()
            self._rows.dynamic, self._rows.symmetric = self.dynamic, self.symmetric
            self._rows.quant_min, self._rows.quant_max = self.quant_min, self.quant_max
            self._rows.averaging_constant = 0.0 if self.dynamic else self.observer.averaging_constant
        return self._rows

    def _round_rows_by_operators(
        self, x: Tensor, before: Before | None, observes: bool, known: tuple[Tensor, Tensor | None] | None
    ) -> Quantized:
        function, other, weight, bias, eps = (
            ("identity", None, None, None, 0.0) if before is None else before.arguments()
        )
        dtype = _product_type(x)
        options = {
            "function": function,
            "eps": eps,
            "quant_min": self.quant_min,
            "quant_max": self.quant_max,
            "dtype": str(dtype).removeprefix("torch."),
        }
        if self.dynamic:
            values, codes, scale, zero_point = torch.ops.quantrain.norm_act_fake_quantize_dynamic(
                x, other, weight, bias, symmetric=self.symmetric, **options
            )
            return Quantized(values, codes, scale, None if self.symmetric else zero_point)
        if not observes:
            scale, zero_point = known or self.calculate_qparams()
        elif before is None:
            scale, zero_point = self.observe(x) or self.calculate_qparams()
        else:
            tensors = [None if t is None else t.detach() for t in (x, other, weight, bias)]
            low, high = torch.ops.quantrain._norm_act_range(*tensors, function=function, eps=eps).split(1)
            scale, zero_point = self.observe_range(low, high)
        values, codes = torch.ops.quantrain.norm_act_fake_quantize(x, other, weight, bias, scale, zero_point, **options)
        return Quantized(values, codes, scale, zero_point)

    readers: int = 0  # layers that share this, as they read one tensor; set by fuse
    _latest: SharedPass | None = None

    def _reading(self, x: Tensor, reader: int | None) -> SharedPass | None:
        """The pass in which ``reader`` reads ``x``, begun where it is the first; None where nothing is shared."""
        if reader is None or self.readers < 2 or not (self.training or self.calibrating):
            return None
        if torch.compiler.is_compiling() or x.is_inference():
            return None
        latest = self._latest
        if latest is None or not latest.is_of(x) or reader in latest.served:
            latest = self._latest = SharedPass(x)
        latest.served.add(reader)
        if len(latest.served) == self.readers:
            self._latest = None
        return latest

    def _observes_for(self, latest: SharedPass | None, reader: int | None) -> bool:
        """Whether ``reader`` observes: the first of them, which a compiled program cannot tell but by its place."""
        if reader and self.readers > 1 and torch.compiler.is_compiling():
            return False
        return self.observing and (latest is None or len(latest.served) == 1)

    def _observed_for(self, x: Tensor, reader: int) -> tuple[Tensor, Tensor | None] | None:
        """:meth:`observe`, once for all readers of ``x``."""
        latest = self._reading(x, reader)
        observed = self.observe(x) if self._observes_for(latest, reader) else None
        if latest is None:
            return observed
        latest.observed = observed or latest.observed
        return latest.observed

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_latest", "_rows")}

    def _has_row_codes(self) -> bool:
        """Whether each row of a linear layer's input has a scale of its own and codes of a byte."""
        return self.dynamic and self.granularity == "per_token" and self.token_dims == 1 and self._fits_byte()

    def rounds_rows(self) -> bool:
        """Whether it rounds equal parts of a matrix's rows, each with a symmetric scale of its own, to codes of a byte."""
        parts = self.dynamic and self.symmetric and len(self.scale_shape) == 2 and self._fits_byte()
        return parts and self.fake_quant_enabled and self.quant_min < 0 < self.quant_max  # nothing clips

    def _takes(self, before: Before) -> bool:
        """Whether what goes before can be joined: its extremes are all that has to be known of it."""
        return self.dynamic or self.takes_range() or not self._follows

    def has_codes(self) -> bool:
        """Whether a tensor becomes codes of a byte with one scale that no gradient reaches."""
        return not self.dynamic and not self.learnable and self.scale.numel() == 1 and self._fits_byte()

    def learns_codes(self) -> bool:
        """Whether it learns one scale, for codes of a byte."""
        learns = self.learnable and self.fake_quant_enabled and not self.calibrating
        return learns and self.scale.numel() == 1 and self._fits_byte()

    def grad_factor(self, numel: int, scales: int | None = None) -> float:
        """Of a learned scale's gradient, 1 / sqrt(elements per scale * quant_max) (LSQ, section 2.2); ``scales``: not all of them."""
        scales = self.scale.numel() if scales is None else scales
        return 1.0 / math.sqrt(max(numel / max(scales, 1) * max(self.quant_max, 1), 1.0))

    def _fits_byte(self) -> bool:
        return self.quant_max <= (255 if self.quant_min >= 0 else 127) and self.quant_min >= -128

    @property
    def fits_half_byte(self) -> bool:
        """Whether two of its codes fit a byte."""
        return (self.quant_min >= -8 and self.quant_max <= 7) or (self.quant_min >= 0 and self.quant_max <= 15)

    def takes_range(self) -> bool:
        """Whether the extremes of a tensor are all that it needs to know of it: :meth:`observe_range` will do."""
        if not self.has_codes() or self.calibrating or not self.fake_quant_enabled:
            return False
        return self.observer.of_extremes if self._follows else self.ready

    @property
    def _follows(self) -> bool:
        """Whether the range follows training, in a pass that is computed anew too, which takes the way of the first."""
        return self.observer is not None and self.training and self._observing

    def observe_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """The (scale, zero_point) for a tensor of these extremes, which are observed as :meth:`forward` observes a tensor."""
        if not self.observing:
            return self.calculate_qparams()
        raises = self.observer.nan_policy == "raise"
        if raises and not low.is_cuda:
            self.observer.check_range(low, high)
        low, high = low.view(self.scale_shape), high.view(self.scale_shape)
        scale, zero_point = self.observer.take(
            low, high, None, self.scale, self.zero_point, marks_nonfinite=raises and low.is_cuda
        )
        self.note_range()
        return scale, None if self.symmetric else zero_point

    def note_range(self) -> None:
        """After a first range: looks whether there is a scale now."""
        if not self._ready and not torch.compiler.is_compiling():
            self._ready = self._has_scale()

    @property
    def observing(self) -> bool:
        """Whether a tensor that it is called with now moves the range."""
        if self.observer is None or not (self.calibrating or (self.training and self._observing)):
            return False
        return (self.calibrating or not self._settled or not self.learnable) and not in_backward()

    @torch.no_grad()
    def _observe_first(self, x: Tensor, zero: Tensor | None) -> None:
        """Gives a first value to the blocks of a learned scale that have none."""
        observer, unset, decides = self.observer, self._unset(), not torch.compiler.is_compiling()
        if decides and self._ready and not self._follows_zeros and not bool(unset.any()):
            self._settled = True
            return
        waits = not (x.is_cuda and self._ready and self._follows_zeros)  # a captured step cannot
        low, high, finite = observer.measure(x, check=waits)
        if not self.of_weight:
            low, high, finite = agreed_range(low, high, finite)
        zeros = observer.only_zeros() if zero is None else observer.only_zeros() | (zero & unset)
        observer.update(low, high, finite & unset)
        if self.of_weight:  # what began as zeros stays marked as zeros: its scale follows
            observer.min_val.masked_fill_(zeros, 0.0)
            observer.max_val.masked_fill_(zeros, 0.0)
        scale, zero_point = observer.qparams_of(low, high)
        # Through .data: an earlier call of the layer in this graph saved the scale; its blocks in use stay as they are.
        self.scale.data.copy_(torch.where(finite & unset, scale, self.scale))
        if self.zero_point is not None:
            self.zero_point.data.copy_(torch.where(finite & unset, zero_point, self.zero_point))
        if decides and waits:
            self._ready = self._ready or self._has_scale()
            self._settled = not bool(self._unset().any())
            self._follows_zeros = self.of_weight and self._ready and not self._settled

    def sees_only_zeros(self) -> bool:
        """Whether an observer saw tensors, and all of them zeros."""
        return self.observer is not None and bool(self.observer.only_zeros().all())

    @torch.no_grad()
    def agree(self) -> None:
        """Under ``torch.distributed``: the range that calibration saw on all ranks together, and its scale."""
        if self.observer is None:
            return
        observer = self.observer
        low, high, seen = agreed_range(observer.min_val, observer.max_val, ~observer.unseen())
        if low is observer.min_val:
            return
        observer.min_val.copy_(torch.where(seen, low, observer.min_val))
        observer.max_val.copy_(torch.where(seen, high, observer.max_val))
        scale, zero_point = observer.calculate_qparams()
        self.scale.copy_(torch.where(seen, scale, self.scale))
        if self.zero_point is not None:
            self.zero_point.copy_(torch.where(seen, zero_point, self.zero_point))
        self._ready = self._has_scale()

    def _unset(self) -> Tensor:
        """Blocks of a learned scale without a first value: never observed nor loaded, or seen only as zeros."""
        return ~torch.isfinite(self.scale.detach()) | self.observer.only_zeros()

    def calculate_qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The ``(scale, zero_point)`` in force; zero_point is None where symmetric.

        Args:
            x: the tensor to be quantized; needed by a dynamic spec, else unused.

        Raises:
            ValueError: no scale was observed or loaded; a dynamic spec without ``x``.
        """
        if self.dynamic:
            if x is None:
                raise ValueError(f"{self._label()}: expected a tensor to compute a dynamic scale from, got None")
            scale, zero_point = torch.ops.quantrain.choose_qparams(
                x.detach(),
                self._dynamic_shape(x),
                quant_min=self.quant_min,
                quant_max=self.quant_max,
                symmetric=self.symmetric,
            )
            return scale, (None if self.symmetric else zero_point)
        self._require_scale()
        if not self.learnable:
            return self.scale, self.zero_point
        if self.training:
            self.scale.data.clamp_(min=kMinScale)  # a clamp in the graph would leave such a scale without gradient
            return self.scale, self.zero_point
        return self.scale.clamp(min=kMinScale), self.zero_point

    def quantize_dequantize(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """``x`` fake-quantized with a given scale, by LSQ's op where the scale is learned."""
        if not self.learnable:
            return torch.ops.quantrain.fake_quantize(
                x, scale, zero_point, quant_min=self.quant_min, quant_max=self.quant_max
            )
        return torch.ops.quantrain.fake_quantize_learnable(
            x,
            scale,
            zero_point,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            grad_factor=self.grad_factor(x.numel(), scale.numel()),
        )

    def quantize_dequantize_dynamic(self, x: Tensor, scale_shape: Sequence[int]) -> Tensor:
        """``x`` fake-quantized with its own scale; a NaN makes its block NaN."""
        return torch.ops.quantrain.fake_quantize_dynamic(
            x, scale_shape, quant_min=self.quant_min, quant_max=self.quant_max, symmetric=self.symmetric
        )

    @property
    def observer_enabled(self) -> bool:
        """Whether the range follows training; travels in the state dict as ``observer.frozen``."""
        return self._observing

    @observer_enabled.setter
    def observer_enabled(self, enabled: bool) -> None:
        self.enable_observer(enabled)

    def enable_observer(self, enabled: bool = True) -> None:
        """Lets the range follow training, or freezes it; a learned scale with a first value is not observed again."""
        self._observing = enabled
        if self.observer is not None:
            self.observer.frozen.fill_(not enabled)

    def begin_calibration(self) -> None:
        self.calibrating, self._before = True, {n: t.detach().clone() for n, t in self.state_dict().items()}

    def end_calibration(self, keep: bool) -> None:
        before, self.calibrating = self.__dict__.pop("_before"), False
        if not keep:
            self.load_state_dict(before)

    def reached_by_calibration(self) -> str | None:
        if self.of_weight:
            return None
        return "nothing" if not self.ready else "zeros" if self.sees_only_zeros() else "something"

    @property
    def ready(self) -> bool:
        """Whether a scale is known: dynamic, observed or loaded."""
        if not self._ready:
            self._ready = self._has_scale()
        return self._ready

    def frozen(self) -> FakeQuantize:
        """A copy for inference: no observer, a learned scale turned into a buffer of the same name. Same values."""
        result = copy.deepcopy(self)
        result.observer, result.learnable, result._observing, result.readers = None, False, False, 0
        if self.learnable:
            del result.scale
            result.register_buffer("scale", self.scale.detach().clamp(min=kMinScale))
        return result

    def extra_repr(self) -> str:
        text = f"bits={self.spec.bits}, symmetric={self.symmetric}, granularity={self.granularity!r}"
        text += f", observer={self.spec.observer!r}, learnable={self.learnable}"
        if self.dynamic:
            return text
        return f"{text}, scale_shape={self.scale_shape}" + ("" if self._observing else ", frozen")

    def _dynamic_shape(self, x: Tensor) -> Sequence[int]:
        if self.granularity != "per_token":
            return self.scale_shape
        return (*x.shape[: x.dim() - self.token_dims], *[1] * min(self.token_dims, x.dim()))

    def _has_scale(self) -> bool:
        scale = self.scale.detach()
        usable = torch.isfinite(scale) if self.learnable else torch.isfinite(scale) & (scale > 0)
        return bool(usable.all())

    def _require_scale(self) -> None:
        if not self._ready and not self.ready:
            raise ValueError(
                f"{self._label()}: expected a scale that was observed or loaded, got none "
                "(run calibrate(model, batches), train a batch, or load a checkpoint first)"
            )

    def _label(self) -> str:
        return f"FakeQuantize '{self.name}'" if self.name else "FakeQuantize"

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        if self.observer is not None:  # files written before the switch was part of the state keep the module's
            frozen = state_dict.setdefault(f"{prefix}observer.frozen", self.observer.frozen)
            self._observing = not bool(frozen)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._ready, self._settled, self._follows_zeros = self.dynamic or self._has_scale(), False, False
