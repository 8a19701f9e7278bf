"""QuantConvBn2d: a convolution and its batch norm, folded as for inference, with statistics still trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantrain._C import Recipe

from .fake_quantize import in_backward
from .layers import QuantConv2d

__all__ = ["FoldedBatchNorm2d", "QuantConvBn2d"]


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

    - training: y = bn(conv2d(fq_in(x), fq_w(w)) / sf + bias), bn with the statistics of the batch;
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

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_variance"}

    def _set_bn(self, bn: nn.BatchNorm2d) -> None:
        fake_quants = {name: self._modules.pop(name) for name in list(self._modules)}
        self.bn = bn
        self._modules.update(fake_quants)

    def scale_factor(self) -> Tensor:
        """sf = bn.weight / sqrt(bn.running_var + eps), shape ``[O, 1, 1, 1]``; in training 0 is replaced by 1."""
        variance = self.bn.running_var
        if self.training and torch.compiler.is_compiling():
            variance = _snapshot(variance)
        elif in_backward() and self._variance is not None:
            variance = self._variance  # checkpointing computes anew, after the forward pass has moved the statistics
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
        # Where gamma is 0 and counts as 1, the weight that will be folded is still 0.
        zero = self.bn.weight.detach() == 0
        return fake_quant(weight, zero=zero.reshape(-1, 1, 1, 1) if fake_quant.scale.numel() > 1 else zero.all())

    def bias_to_store(self) -> Tensor:
        shift = self.bn.running_mean if self.bias is None else self.bn.running_mean - self.bias
        return self.bn.bias - shift * self.scale_factor().flatten()

    def to_float_pair(self) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        """The convolution and the batch norm again, with the same Parameter objects."""
        conv = self.to_float()
        return conv, conv._modules.pop("bn")

    def forward(self, input: Tensor) -> Tensor:
        if self.training and not torch.compiler.is_compiling() and not in_backward():
            self._variance = self.bn.running_var.clone()
        x = self.quantized_input(input)
        weight = self.quantized_weight()
        if not self.training:
            return self.quantized_output(self._conv_forward(x, weight, self.bias_to_store()))
        y = self._conv_forward(x, weight, None) / self.scale_factor().reshape(-1, 1, 1)
        if self.bias is not None:
            y = y + self.bias.reshape(-1, 1, 1)
        return self.quantized_output(self.bn(y))


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
