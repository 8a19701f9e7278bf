"""QuantConvBn2d: a convolution and its batch norm, folded as for inference, with statistics still trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantrain._C import ConvBatchNorm, Recipe, conv_batch_norm

from .fake_quantize import FakeQuantize, Quantized, has_hooks, in_backward
from .layers import QuantConv2d, set_gradient_quantizers
from .observers import Observer

__all__ = ["FoldedBatchNorm2d", "QuantConvBn2d"]

kFused = (torch.float32, torch.float16, torch.bfloat16)  # what batch_norm_act takes
kPiecewise = ("identity", "relu", "relu6")
kActivations = {"identity": lambda y: y, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu}


@torch.library.custom_op("quantrain::_snapshot", mutates_args=())
def _snapshot(buffer: Tensor) -> Tensor:
    """A copy, where torch.compile may recompute a clone() in the backward pass, from the buffer as updated since."""
    return buffer.clone()


@_snapshot.register_fake
def _(buffer: Tensor) -> Tensor:
    return torch.empty_like(buffer)


class QuantConvBn2d(QuantConv2d):
    """Convolution + batch norm whose folded weight is fake-quantized, so that training sees what inference will run.

    With sf = bn.weight / sqrt(bn.running_var + eps) (one per channel; 0 counts as 1 in training) and w = weight * sf:

    - training: y = bn(conv2d(fq_in(x), fq_w(w)) / sf + bias), bn with the statistics of the batch. Nothing is divided:
      :func:`quantrain.batch_norm_act` takes sf into its own factor, exactly but for rounding, and keeps the convolution's
      type (a bias, an ``nn.SyncBatchNorm`` or a cumulative average in ``bn``, and float64, go the long way);
    - evaluation: y = conv2d(fq_in(x), fq_w(w)) + (bias - running_mean) * sf + bn.bias.

    Source: Jacob et al. 2018 (arXiv:1712.05877), section 3.2; Krishnamoorthi 2018 (arXiv:1806.08342), section 3.2.2.

    Args:
        the arguments of :class:`QuantConv2d` (``bias`` False by default, as the batch norm has one), and
        eps, momentum: of the child ``bn``, an ``nn.BatchNorm2d``.

    Shapes, dtypes, gradient: as :class:`QuantConv2d`, and as ``nn.BatchNorm2d`` for ``bn.weight`` and ``bn.bias``.

    Raises:
        ValueError: as :class:`QuantConv2d`.

    >>> layer = QuantConvBn2d(3, 8, 3, recipe="qat-w8a8")
    >>> layer(torch.randn(2, 3, 5, 5)).shape
    torch.Size([2, 8, 3, 3])
    """

    bn: nn.BatchNorm2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        *,
        recipe: Recipe | str,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            recipe=recipe,
            device=device,
            dtype=dtype,
        )
        self._set_bn(nn.BatchNorm2d(out_channels, eps, momentum, device=device, dtype=dtype))

    @classmethod
    def from_float_pair(
        cls, conv: nn.Conv2d, bn: nn.BatchNorm2d, recipe: Recipe | str, *, name: str = ""
    ) -> QuantConvBn2d:
        """The quantized twin of ``bn(conv(x))``; takes over both modules' Parameter objects and buffers.

        Raises:
            ValueError: a batch norm without running statistics or affine parameters.
        """
        if not bn.track_running_stats or not bn.affine:
            raise ValueError(
                "QuantConvBn2d: expected a batch norm with running statistics and affine parameters, "
                f"got track_running_stats={bn.track_running_stats}, affine={bn.affine}"
            )
        layer = cls.from_float(conv, recipe, name=name)
        layer._set_bn(bn)
        return layer

    _variance: Tensor | None = None  # what the latest forward pass of training folded with
    _settings: tuple[Any, ConvBatchNorm] | None = None  # of conv_batch_norm, and what they were made from

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_variance", "_settings")}

    def _set_bn(self, bn: nn.BatchNorm2d) -> None:
        fake_quants = {name: self._modules.pop(name) for name in list(self._modules)}
        self.bn = bn
        self._modules.update(fake_quants)

    def _folding_variance(self) -> Tensor:
        """The running variance as it was before the batch."""
        if self.training and torch.compiler.is_compiling():
            return _snapshot(self.bn.running_var)
        # Checkpointing computes anew in the backward pass, after the forward pass has moved the statistics.
        return self._variance if in_backward() and self._variance is not None else self.bn.running_var

    def scale_factor(self) -> Tensor:
        """sf = bn.weight / sqrt(bn.running_var + eps), shape ``[O, 1, 1, 1]``; in training 0 is replaced by 1."""
        variance = self._folding_variance()
        sf = self.bn.weight / torch.sqrt(variance + self.bn.eps)
        if self.training:
            sf = torch.where(sf == 0, torch.ones_like(sf), sf)
        return sf.reshape(-1, 1, 1, 1)

    def weight_to_quantize(self) -> Tensor:
        return self.weight * self.scale_factor()

    def quantized_weight(self) -> Tensor:
        fake_quant, weight = self.weight_fake_quant, self.weight_to_quantize()
        if fake_quant is None or not (fake_quant.learnable and self.training):
            return weight if fake_quant is None else fake_quant(weight)
        return fake_quant(weight, zero=self._zeros())

    def _zeros(self) -> Tensor:
        """Where gamma is 0 and counts as 1: there the weight that will be folded is still 0."""
        zero = self.bn.weight.detach() == 0
        return zero.reshape(-1, 1, 1, 1) if self.weight_fake_quant.scale.numel() > 1 else zero.all()

    def bias_to_store(self) -> Tensor:
        shift = self.bn.running_mean if self.bias is None else self.bn.running_mean - self.bias
        return self.bn.bias - shift * self.scale_factor().flatten()

    def to_float_pair(self) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        """The convolution and the batch norm again, with the same Parameter objects."""
        conv = self.to_float()
        return conv, conv._modules.pop("bn")

    readers: tuple[FakeQuantize, ...] = ()  # of the layers that read the output and nothing else does: one

    def forward(
        self,
        input: Tensor | Quantized,
        residual: Tensor | None = None,
        activation: str = "identity",
        quantized: bool = False,
        quantize: bool = False,
    ) -> Tensor | Quantized:
        """
        Args:
            residual, activation: activation(y + residual) is returned.
            quantized: the input was fake-quantized already; then it may come with its codes.
            quantize: the result is fake-quantized as ``readers`` say, and comes with its codes where there are some.
        """
        reader = self.readers[0] if quantize else None
        if residual is not None and not isinstance(residual, Tensor):
            y = kActivations[activation](self.forward(input, quantized=quantized) + residual)
            return y if reader is None else reader.with_codes(y)
        if self.training and not torch.compiler.is_compiling() and self._in_one_step(input, residual, activation):
            return self._step(input if quantized else self.quantized_input(input), residual, activation, reader)
        if self.training and not torch.compiler.is_compiling() and not in_backward():
            self._variance = self.bn.running_var.clone()
        x = input if quantized else self.quantized_input(input)
        if not self.training:
            y = self._conv_forward(x, self.quantized_weight(), self.bias_to_store())
            return self._finished(y, residual, activation, reader)
        if self._folds():
            weight, scale = self._folded_weight()
        else:
            weight, scale = self.quantized_weight(), self.scale_factor().flatten()
        y = self._conv_forward(x, weight, None)
        if not self._fuses(y):
            z = y / scale.reshape(-1, 1, 1)
            z = self.bn(z if self.bias is None else z + self.bias.reshape(-1, 1, 1))
            return self._finished(z, residual, activation, reader)
        return self._normalized(y, scale, residual, activation, reader)

    def _finished(self, y: Tensor, residual: Tensor | None, activation: str, reader: FakeQuantize | None) -> Tensor:
        """What follows the batch norm, one after the other."""
        y = self.quantized_output(y)
        if residual is not None:
            y = y + residual
        y = kActivations[activation](y)
        return y if reader is None else reader.with_codes(y)

    def _in_one_step(self, x: Tensor | Quantized, residual: Tensor | None, activation: str) -> bool:
        """Whether the layer's training step is that of conv_batch_norm, one node for what the lines below do in several."""
        values = x.values if isinstance(x, Quantized) else x
        if (
            not (self.bn.training and (self._folds() or self._learns_rows()) and self._fuses(values))
            or values.dim() != 4
        ):
            return False
        if self.output_hook is not None or self.output_fake_quant is not None or not self.keeps_codes():
            return False
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return False
        if values.dtype != self.weight.dtype and not torch.is_autocast_enabled(values.device.type):
            return False  # the convolution refuses it
        if residual is None:
            return True
        same = residual.shape == self._output_sizes(values) and residual.dtype == self._dtype(values)
        return same and activation in kPiecewise

    def _output_sizes(self, values: Tensor) -> tuple[int, ...]:
        return (values.shape[0], self.out_channels, *map(self._size, values.shape[2:], (0, 1)))

    def _size(self, size: int, d: int) -> int:
        reach = self.dilation[d] * (self.kernel_size[d] - 1) + 1
        return (size + 2 * self.padding[d] - reach) // self.stride[d] + 1

    def _dtype(self, x: Tensor) -> torch.dtype:
        """What the convolution takes ``x``, its input or its weight, in."""
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

    def _step(
        self, x: Tensor | Quantized, residual: Tensor | None, activation: str, reader: FakeQuantize | None
    ) -> Tensor | Quantized:
        bn, again = self.bn, in_backward()
        self._note_call()
        values, codes = (x.values, x[1:]) if isinstance(x, Quantized) else (x, (None, None, None))
        dtype = self._dtype(values)
        if values.dtype != dtype:
            values = values.to(dtype)
        weight_scale = self._learned_scale() if self.weight_fake_quant.learnable else None
        joins = reader is not None and residual is None and activation in kPiecewise
        learns = joins and reader.learns_codes()
        at_once = learns or (joins and reader.takes_range())
        variance = self._variance if again else None
        if learns and reader.observing:  # a first value, of the output without rounding: the pass is one node at once
            with torch.no_grad():
                fixed = (self.weight, weight_scale, bn.weight, bn.bias, bn.running_mean, bn.running_var)
                settings = self._settings_of(activation, None, None, values)
                nothing = (None, None, None, None, False, False, "")
                y, *_ = conv_batch_norm(
                    settings, values, *codes, *fixed, bn.num_batches_tracked, variance, False, residual, *nothing
                )
            reader.observe(y)
        observer, ends, observes, marks, label = None, (None, None, None, None), False, False, ""
        if at_once:
            observes, observer = reader.observing, None if learns else reader.observer
            if observes:
                ends = (observer.min_val, observer.max_val, reader.scale, reader.zero_point)
                raises = observer.nan_policy == "raise"
                waits = not values.is_cuda or not reader.ready
                marks, label = raises and not waits, observer.label if raises and waits else ""
            else:
                ends = (None, None, *reader.calculate_qparams())
        output, out_codes, scale, zero_point, variance = conv_batch_norm(
            self._settings_of(activation, reader if at_once else None, observer, values),
            values,
            *codes,
            self.weight,
            weight_scale,
            bn.weight,
            bn.bias,
            bn.running_mean,
            bn.running_var,
            bn.num_batches_tracked,
            variance,
            not again,
            residual,
            *ends,
            observes,
            marks,
            label,
        )
        if not again:
            self._variance = variance
        if at_once:
            reader.note_range()
            return Quantized(output, out_codes, scale.detach(), zero_point)
        return output if reader is None else reader.with_codes(output)

    def _learned_scale(self) -> Tensor:
        """The folded weight's, which sees it first where it has no first value everywhere."""
        fake_quant = self.weight_fake_quant
        if not fake_quant.observing:
            return fake_quant.calculate_qparams()[0]
        with torch.no_grad():
            fake_quant.observe(self.weight_to_quantize(), zero=self._zeros())
        return fake_quant.calculate_qparams()[0].clone()  # another call before the backward pass may move it

    def _settings_of(
        self, activation: str, reader: FakeQuantize | None, observer: Observer | None, values: Tensor
    ) -> ConvBatchNorm:
        """What of a step does not change, made anew where it did."""
        bn, weights = self.bn, self.weight_fake_quant
        range_ = (-128, 127, True, 0.0)
        if reader is not None:
            averaging = 0.0 if observer is None else observer.averaging_constant
            range_ = (reader.quant_min, reader.quant_max, reader.symmetric, averaging)
        quantizes = self.product if self.quantizes_gradients else None
        window = (self.stride, self.padding, self.dilation, self.groups)
        limits = (weights.quant_min, weights.quant_max, weights.symmetric)
        learned = reader is not None and reader.learnable
        factor = reader.grad_factor(math.prod(self._output_sizes(values))) if learned else 1.0
        packs = self.packs_codes and self.input_fake_quant is not None and self.input_fake_quant.fits_half_byte
        key = (activation, range_, window, limits, bn.momentum, bn.eps, quantizes, factor, packs)
        if self._settings is not None and self._settings[0] == key:
            return self._settings[1]
        settings = ConvBatchNorm()
        settings.activation, settings.momentum, settings.eps = activation, bn.momentum, bn.eps
        settings.stride, settings.padding, settings.dilation, settings.groups = (*map(list, window[:3]), self.groups)
        settings.weight_min, settings.weight_max, settings.weight_symmetric = limits
        settings.quant_min, settings.quant_max, settings.symmetric, settings.averaging_constant = range_
        settings.grad_factor = factor
        settings.packs_codes = packs
        settings.weight_grad_factor = weights.grad_factor(self.weight.numel()) if weights.learnable else 1.0
        set_gradient_quantizers(settings, quantizes)
        self._settings = (key, settings)
        return settings

    def _folds(self) -> bool:
        """Whether the weight is folded and rounded by one operator: with a scale per channel, of the weight itself."""
        fake_quant, weight = self.weight_fake_quant, self.weight
        if fake_quant is None or self._own_weight_rule or not fake_quant.fake_quant_enabled or has_hooks(fake_quant):
            return False
        rows = (weight.shape[0], *[1] * (weight.dim() - 1))
        return fake_quant.dynamic and fake_quant.scale_shape == rows and weight.dtype in kFused and weight.numel() > 0

    def _learns_rows(self) -> bool:
        """Whether the folded weight has a learned scale per channel."""
        fake_quant, weight = self.weight_fake_quant, self.weight
        if fake_quant is None or not fake_quant.learnable or self._own_weight_rule or has_hooks(fake_quant):
            return False
        rows = (weight.shape[0], *[1] * (weight.dim() - 1))
        fits = fake_quant.symmetric and fake_quant.scale_shape == rows and fake_quant.fake_quant_enabled
        fits = fits and fake_quant.scale.dtype == torch.float32 and weight.dtype in kFused and weight.numel() > 0
        return fits and not fake_quant.calibrating

    def _folded_weight(self) -> tuple[Tensor, Tensor]:
        """The fake-quantized folded weight, in the type that the convolution takes it in, and sf, ``[O]``."""
        weight, fake_quant = self.weight, self.weight_fake_quant
        return torch.ops.quantrain.fold_fake_quantize(
            weight,
            self.bn.weight,
            self._folding_variance(),
            eps=self.bn.eps,
            quant_min=fake_quant.quant_min,
            quant_max=fake_quant.quant_max,
            symmetric=fake_quant.symmetric,
            dtype=str(self._dtype(weight)).removeprefix("torch."),
        )

    def _normalized(
        self, y: Tensor, scale: Tensor, residual: Tensor | None, activation: str, reader: FakeQuantize | None
    ) -> Tensor:
        """The batch norm of y / sf, ``y`` the convolution's output in training, ``scale`` sf, ``[O]``, and what follows."""
        if y.dim() == 3:
            residual = None if residual is None else residual.unsqueeze(0)
            z = self._normalized(y.unsqueeze(0), scale, residual, activation, None).squeeze(0)
            return z if reader is None else reader(z)
        apart = self.output_fake_quant is not None
        if residual is not None:  # what promotes or broadcasts is PyTorch's to add
            apart = apart or residual.shape != y.shape or residual.dtype != y.dtype or activation not in kPiecewise
        inner = "identity" if apart else activation
        bn, low, high = self.bn, None, None
        # In the same pass, where the range follows from the channels' extremes.
        at_once = reader is not None and not apart and residual is None and inner in kPiecewise and bn.training
        at_once = at_once and reader.takes_range()
        if bn.training:
            statistics = torch.ops.quantrain._batch_norm_statistics(y.detach())
            if at_once or not in_backward():
                low, high = self._update(statistics, y, scale, inner, at_once)
            norm = (statistics[0], statistics[1], bn.weight, bn.bias, scale)
            eps = bn.eps
        else:  # with running statistics the division's factor is known beforehand: 1, or 0 where weight is
            factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
            zeros, ones = torch.zeros_like(bn.running_mean), torch.ones_like(bn.running_var)
            norm, eps = (zeros, ones, factor / scale, bn.bias - bn.running_mean * factor, None), 0.0
        options = {"activation": inner, "eps": eps, "batch_statistics": bn.training}
        if at_once:
            scale, zero_point = reader.observe_range(low, high)
            limits = {"quant_min": reader.quant_min, "quant_max": reader.quant_max}
            values, codes = torch.ops.quantrain.batch_norm_act_fake_quantize(
                y, *norm, residual, scale, zero_point, **options, **limits
            )
            return Quantized(values, codes, scale, zero_point)
        z = torch.ops.quantrain.batch_norm_act(y, *norm, None if apart else residual, **options)
        if apart:
            return self._finished(z, residual, activation, reader)
        return z if reader is None else reader.with_codes(z)

    def _fuses(self, y: Tensor) -> bool:
        bn = self.bn
        plain = type(bn) is nn.BatchNorm2d and bn.momentum is not None and not has_hooks(bn)
        return plain and self.bias is None and y.dtype in kFused and y.numel() > 0

    @torch.no_grad()
    def _update(
        self, statistics: Tensor, y: Tensor, scale: Tensor, activation: str, with_range: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Moves the running statistics, but for a pass that is computed anew; the range of the output where asked for."""
        bn, moves = self.bn, not in_backward()
        if moves:
            bn.num_batches_tracked.add_(1)
        ends = torch.ops.quantrain._batch_norm_update_(
            statistics,
            bn.weight.detach(),
            bn.bias.detach(),
            scale.detach(),
            bn.running_mean if moves else None,
            bn.running_var if moves else None,
            count=y.numel() // y.shape[1],
            momentum=bn.momentum,
            eps=bn.eps,
            activation=activation,
            range=with_range,
        )
        return (ends[:1], ends[1:]) if with_range else (None, None)


class FoldedBatchNorm2d(nn.Identity):
    """The placeholder for a batch norm that :func:`prepare` folded: it passes its input on and stands for it.

    ``train()``, ``eval()`` and ``requires_grad_()`` reach the batch norm, and so do reading and setting its attributes
    (``weight``, ``momentum``, ...): ``model.bn1.eval()`` freezes its statistics as before. It holds no parameters or
    buffers of its own.

    >>> import quantrain
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    >>> _ = quantrain.nn.prepare(model, "qat-w8a8")
    >>> _ = model[1].eval()
    >>> model[0].bn.training
    False
    """

    def __init__(self, layer: QuantConvBn2d):
        super().__init__()
        self.__dict__["_layer"] = layer  # no child: it has its own place in the model
        self.training = layer.bn.training

    @property
    def folded(self) -> nn.Module:
        """The batch norm, which may have been replaced since (``SyncBatchNorm.convert_sync_batchnorm``)."""
        return self.__dict__["_layer"].bn

    def train(self, mode: bool = True) -> FoldedBatchNorm2d:
        self.folded.train(mode)
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> FoldedBatchNorm2d:
        self.folded.requires_grad_(requires_grad)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_layer" not in self.__dict__:
                raise
            return getattr(self.folded, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_layer" in self.__dict__ and name not in self.__dict__ and hasattr(self.folded, name):
            setattr(self.folded, name, value)
        else:
            super().__setattr__(name, value)
