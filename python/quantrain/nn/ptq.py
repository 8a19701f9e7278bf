"""Linear layers under a recipe of scheme ``ptq``: calibrated, then converted, without training between.

Both languages convert by one C++ function, ``ptq_weight`` (nn/ptq.cpp), and multiply by one composition of operators,
``ptq_linear`` (ops/ptq_linear.cpp); names of buffers and children are C++'s.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantrain import _C
from quantrain._C import Recipe

from .calibrates import Calibrates
from .layers import QuantLayer, QuantLinear, QuantTransposedLinear
from .observers import Float32State
from .quantized import QuantizedLinear, check_convertible
from .weight_hooks import run_weight_hooks

__all__ = ["ColumnObserver", "PtqLinear", "PtqTransposedLinear", "QuantizedPtqLinear"]

_BUFFERS = ("input_factor", "input_scale", "outlier_columns", "outlier_codes", "outlier_scale")


class ColumnObserver(Calibrates, Float32State):
    """Counts the columns of what it is shown during calibration: :func:`quantrain.column_statistics_`.

    Buffers: ``absmax`` and ``mean_abs``, float32 ``[K]``; ``hessian``, float32 ``[K, K]``, where asked for; ``rows``,
    int64 ``[1]``. A checkpoint carries them, so that another program converts.

    >>> observer = ColumnObserver(4, with_hessian=False)
    >>> observer.begin_calibration()
    >>> observer(torch.tensor([[1.0, -2.0, 0.0, 3.0]]))
    >>> observer.absmax.tolist()
    [1.0, 2.0, 0.0, 3.0]
    """

    def __init__(self, columns: int, *, with_hessian: bool, device: torch.device | str | None = None):
        super().__init__()
        self.register_buffer("absmax", torch.zeros(columns, device=device))
        self.register_buffer("mean_abs", torch.zeros(columns, device=device))
        self.register_buffer("hessian", torch.zeros(columns, columns, device=device) if with_hessian else None)
        self.register_buffer("rows", torch.zeros(1, dtype=torch.int64, device=device))
        self.observing = False
        self._before: list[Tensor] = []

    def forward(self, input: Tensor) -> None:
        if self.observing:
            torch.ops.quantrain.column_statistics_(self.absmax, self.mean_abs, self.hessian, self.rows, input.detach())

    @property
    def seen(self) -> bool:
        """Whether there were rows, counted here or loaded."""
        return not self.rows.is_meta and int(self.rows) > 0

    def begin_calibration(self) -> None:
        self.observing = True
        # Of a Hessian that is zeros no second one is held.
        self._before = [tensor.clone() for tensor in self.buffers()] if self.seen else []
        for tensor in self.buffers():
            tensor.zero_()

    def end_calibration(self, keep: bool) -> None:
        self.observing = False
        if not keep:
            for index, tensor in enumerate(self.buffers()):
                tensor.copy_(self._before[index]) if self._before else tensor.zero_()
        self._before = []

    def agree(self) -> None:
        """Merges what the ranks saw: the largest magnitudes, and means over all rows."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        total = self.rows.clone()
        torch.distributed.all_reduce(total)
        share = self.rows.float() / total.clamp_min(1)
        torch.distributed.all_reduce(self.absmax, torch.distributed.ReduceOp.MAX)
        for mean in filter(lambda tensor: tensor is not None, (self.mean_abs, self.hessian)):
            mean.mul_(share)
            torch.distributed.all_reduce(mean)
        self.rows.copy_(total)

    def reached_by_calibration(self) -> str:
        if not self.seen:
            return "nothing"
        return "something" if bool((self.absmax != 0).any()) else "zeros"


class _PtqLayer(QuantLayer):
    """What both forms of the layer share."""

    input_observer: ColumnObserver | None

    def _add_fake_quants(self, recipe: Recipe | str, name: str = "") -> None:
        super()._add_fake_quants(recipe, name)
        needed, hessian = _C.ptq_statistics(self.recipe)
        observer = ColumnObserver(self.in_features, with_hessian=hessian, device=self.weight.device) if needed else None
        self.add_module("input_observer", observer)

    def to_float(self) -> nn.Module:
        layer = super().to_float()
        layer._modules.pop("input_observer", None)
        return layer

    def missing_range(self) -> str | None:
        if self.input_observer is not None and not self.input_observer.seen:
            return "input_observer"
        return super().missing_range()

    @property
    def needs_range(self) -> bool:
        return self.input_observer is not None or super().needs_range

    def forward(self, input: Tensor) -> Tensor:
        if self.input_observer is not None:
            self.input_observer(input)
        return super().forward(input)


class PtqLinear(_PtqLayer, QuantLinear):
    """y = x W^T + bias, to be calibrated and converted.

    Before conversion x and W are fake-quantized as the recipe's specs say (with gradients, as :class:`QuantLinear`);
    factors per column, outlier columns and searches come with conversion, from what ``input_observer`` saw in
    calibration (None where the recipe needs nothing).

    Shapes: x ``[..., in_features]`` -> ``[..., out_features]``.

    Raises:
        ValueError: a recipe of another scheme.

    >>> layer = PtqLinear(64, 32, recipe="llm-int8")
    >>> layer.input_observer.absmax.shape
    torch.Size([64])
    """


class PtqTransposedLinear(_PtqLayer, QuantTransposedLinear):
    """:class:`PtqLinear` with a weight ``[in_features, out_features]``: the twin of
    ``transformers.pytorch_utils.Conv1D``."""


class QuantizedPtqLinear(QuantizedLinear):
    """The converted layer: :math:`y = q(x') Q^T + x'[outlier\\_columns] Q_o^T + bias`, x' = x * input_factor.

    Buffers, those that the recipe has no use for None: ``weight_codes`` int8 ``[O, K]`` (8 bits) or uint8 ``[O, Kp /
    2]`` (4 bits, packed as :func:`quantrain.quantize_4bit` does for int4; Kp: the columns of whole groups),
    ``weight_scale`` float32 ``[O, 1]`` or ``[O, Kp / group_size]``, ``input_factor`` float32 ``[K]``, ``input_scale``
    float32 ``[1]``, ``outlier_columns`` int32 ``[Ko]``, ``outlier_codes`` int8 ``[O, Ko]``, ``outlier_scale`` float32
    ``[O, 1]`` (4 bits).

    Attributes:
        error: of GPTQ and AWQ, tr((W - Q) H (W - Q)^T) / tr(W H W^T) with H the mean of 2 x x^T in calibration; 0 where
            nothing was searched or the layer was loaded.
        group_size: columns that share a scale; 0: one scale per row.
        input_absmax: what calibration saw, for reports; None where the layer was loaded.

    Shapes: x ``[..., in_features]`` -> ``[..., out_features]``. Dtype: x's, under autocast the autocast type.
    Gradient: to x where it is not rounded.

    >>> layer = QuantizedPtqLinear.from_quant(PtqLinear(64, 32, recipe="zeroquant-w8a8"))
    >>> layer(torch.randn(3, 64)).shape
    torch.Size([3, 32])
    """

    rounds_input_itself = True
    input_factor: Tensor | None
    input_scale: Tensor | None
    outlier_columns: Tensor | None
    outlier_codes: Tensor | None
    outlier_scale: Tensor | None
    error = 0.0
    input_absmax: Tensor | None = None

    def __init__(self, layer: _PtqLayer, *, check_observed: bool = True):
        super().__init__(layer, check_observed=check_observed)
        self.add_module("input_fake_quant", None)
        self.product = _C.ptq_product(self.recipe)

    @torch.no_grad()
    def _store_weight(self, layer: _PtqLayer, check_observed: bool) -> None:
        run_weight_hooks(layer)
        spec = check_convertible(layer).spec
        weight = layer.weight_to_quantize()
        self.bits, self.signed, self.weight_shape = spec.bits, True, tuple(weight.shape)
        self.group_size = spec.group_size if spec.granularity == "per_group" else 0
        observer = layer.input_observer
        seen = observer is not None and observer.seen
        statistics = (observer.absmax, observer.mean_abs, observer.hessian) if seen else (None, None, None)
        parts, self.error = _C.ptq_weight(weight, layer.recipe, *statistics, form_only=not check_observed and not seen)
        for name, tensor in parts.items():
            self.register_buffer(name, tensor)
        if seen:
            self.input_absmax = observer.absmax.cpu().clone()
        self.register_buffer("weight_zero_point", None)
        bias = layer.bias_to_store()
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    def codes(self) -> Tensor:
        """int8 ``[O, K]``; of 4 bits without the outlier columns, which are 0 there."""
        if self.bits == 8:
            return self.weight_codes
        columns = self.weight_codes.shape[1] * 2
        return torch.ops.quantrain.unpack_int4(self.weight_codes, size=columns, signed=True)[:, : self.in_features]

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight ``[O, K]`` that the codes stand for, in the coordinates of the input as it comes."""
        return _C.ptq_dequantize(
            self.weight_codes,
            self.weight_scale,
            self.input_factor,
            self.outlier_columns,
            self.outlier_codes,
            self.outlier_scale,
            in_features=self.weight_shape[1],
            dtype=dtype,
        )

    def forward(self, input: Tensor) -> Tensor:
        parts = {name: getattr(self, name) for name in _BUFFERS}
        y = torch.ops.quantrain._ptq_linear(
            input, self.weight_codes, self.weight_scale, self.bias, **parts, **self.product
        )
        return self._quantized_output(y)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name!r}"
