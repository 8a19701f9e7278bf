"""More layers for quantization-aware training: nn.Conv1d and nn.ConvTranspose2d."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantrain._C import Recipe

from .layers import QuantLayer
from .schemes import handler_of

__all__ = ["QuantConv1d", "QuantConvTranspose2d", "transposed_from_rows", "transposed_rows"]


class QuantConv1d(QuantLayer, nn.Conv1d):
    """y = fq_out(conv1d(fq_in(x), fq_w(weight)) + bias), each fq a :class:`FakeQuantize` of the recipe or the identity.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            ``nn.Conv1d``.
        recipe: a :class:`quantrain.Recipe` or the name of one.

    Shapes: x ``[B, C, L]`` or ``[C, L]``; weight ``[O, C / groups, k]``, its scale ``[O, 1, 1]`` per channel (also
    where the recipe says per_group); a per_token input scale is one per sample, ``[B, 1, 1]``. Otherwise as
    :class:`QuantConv2d` on an image of one row, gradients included.

    Raises:
        ValueError: as :class:`QuantLinear`.

    >>> QuantConv1d(3, 8, 3, padding=1, recipe="qat-w8a8")(torch.ones(1, 3, 5)).shape
    torch.Size([1, 8, 5])
    """

    token_dims = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        recipe: Recipe | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._add_fake_quants(recipe)

    def _add_fake_quants(self, recipe: Recipe | str, name: str = "") -> None:
        super()._add_fake_quants(recipe, name)
        self.product = handler_of(self.recipe).conv2d(self.recipe)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.quantizes_gradients:
            return self._watched_image(super()._conv_forward(input, weight, bias).unsqueeze(-2))
        padding = self.padding if isinstance(self.padding, str) else (0, *self.padding)
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        image, kernel = input.unsqueeze(-2), weight.unsqueeze(-2)
        stride, dilation = (1, *self.stride), (1, *self.dilation)
        return self._watched_image(self.product(image, kernel, bias, stride, padding, dilation, self.groups))

    def _watched_image(self, y: Tensor) -> Tensor:
        """Shaped as an image, so that a hook sees which rows are samples."""
        return self.watched(y).squeeze(-2)

    def forward(self, input: Tensor) -> Tensor:
        return self.quantized_output(
            self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)
        )


class QuantConvTranspose2d(QuantLayer, nn.ConvTranspose2d):
    """y = fq_out(conv_transpose2d(fq_in(x), fq_w(weight)) + bias), each fq a :class:`FakeQuantize` of the recipe or the
    identity.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode,
            device, dtype: as ``nn.ConvTranspose2d``.
        recipe: a :class:`quantrain.Recipe` or the name of one, without ``grad_input`` and ``grad_weight``.

    Shapes: x ``[B, C, H, W]`` or ``[C, H, W]``; weight ``[C, O / groups, kh, kw]``. Its scale is ``[O, 1, 1, 1]`` per
    channel, that of the weight seen as ``[O, C / groups, kh, kw]`` (:func:`transposed_rows`), as its codes are stored.
    Dtypes as :class:`QuantLinear`; gradient: straight through.

    Raises:
        ValueError: as :class:`QuantLinear`; a recipe that quantizes gradients.

    >>> QuantConvTranspose2d(3, 8, 2, stride=2, recipe="qat-w8a8")(torch.ones(1, 3, 4, 4)).shape
    torch.Size([1, 8, 8, 8])
    """

    token_dims = 3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        *,
        recipe: Recipe | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        self._add_fake_quants(recipe)

    def rows(self, weight: Tensor) -> Tensor:
        return transposed_rows(weight, self.groups)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        x, weight = self.quantized_input(input), transposed_from_rows(self.quantized_weight(), self.groups)
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        y = F.conv_transpose2d(
            x, weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )
        return self.quantized_output(self.watched(y))


def transposed_rows(weight: Tensor, groups: int) -> Tensor:
    """The weight of a transposed convolution, ``[C, O / groups, kh, kw]``, as ``[O, C / groups, kh, kw]``.

    >>> transposed_rows(torch.empty(6, 4, 3, 3), groups=2).shape
    torch.Size([8, 3, 3, 3])
    """
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).contiguous()


def transposed_from_rows(rows: Tensor, groups: int) -> Tensor:
    """The inverse of :func:`transposed_rows`.

    >>> transposed_from_rows(torch.empty(8, 3, 3, 3), groups=2).shape
    torch.Size([6, 4, 3, 3])
    """
    return transposed_rows(rows, groups)
