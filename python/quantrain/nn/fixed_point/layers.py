"""Layers that train a network of 8-bit fixed-point arithmetic: F8Net (Jin et al. 2022, arXiv:2202.05239).

A tensor is integer codes times a power of two times eta, a real factor that no operation ever multiplies by: it is
folded into the weights of the layers on either side. In training the layers compute in real values; in evaluation in
UNITS (real value / eta), whose multiples of ``2^-fraction_length`` are the integers that the converted network
computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantrain import _C
from quantrain._C import Recipe
from quantrain.fixed_point import fixed_point_fraction_length, fixed_point_quantize

from ..calibrates import Calibrates
from ..layers import twin_of
from ..recipes import as_recipe
from .activation import FixedPointActivation, FixedPointPoolActivation, kWordLength

__all__ = ["FixedPointActivation", "FixedPointAvgPool2d", "FixedPointConv2d", "FixedPointLinear"]

kExactFloat32 = 2**24  # integers below it are exact in float32


@contextmanager
def exact_arithmetic(device: torch.device):
    """Products and sums of small integers held in floating point stay exact: no autocast, no cuDNN (Winograd, TF32)."""
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = False
            stack.callback(setattr, torch.backends.cuda.matmul, "allow_tf32", before)
        yield


class FixedPointLayer(Calibrates, nn.Module):
    """What the convolution and the linear layer share: folding, rounding and the two forms of the forward pass."""

    weight: Tensor
    bias: Tensor | None
    bn: nn.Module | None
    activation: FixedPointActivation | None
    input_activation: FixedPointActivation
    output_activation: FixedPointActivation | None
    weight_fraction_length: Tensor

    @classmethod
    def from_float(
        cls,
        module: nn.Conv2d | nn.Linear,
        recipe: Recipe | str,
        *,
        bn: nn.BatchNorm2d | None = None,
        input_activation: FixedPointActivation,
        output_activation: FixedPointActivation | None = None,
        owner: bool = True,
        quantizes: bool | None = None,
        name: str = "",
    ) -> FixedPointLayer:
        """The fixed-point twin of ``module`` and ``bn``: the same Parameter objects; takes over ``bn``.

        Args:
            owner: ``output_activation`` becomes the child ``activation``.
        """
        layer = twin_of(cls, module).train(module.training)
        layer._set_up(recipe, bn, input_activation, output_activation, owner, quantizes, name)
        return layer

    def _set_up(
        self,
        recipe: Recipe | str,
        bn: nn.Module | None,
        input_activation: FixedPointActivation,
        output_activation: FixedPointActivation | None,
        owner: bool,
        quantizes: bool | None,
        name: str,
    ) -> None:
        self.recipe = as_recipe(recipe)
        spec = self.recipe.scheme
        if spec is None or spec.kind != "fixed_point":
            raise ValueError(f"{type(self).__name__}: expected a recipe with fixed_point, got {self.recipe.name!r}")
        if bn is not None and not (bn.track_running_stats and bn.affine):
            raise ValueError(
                f"{type(self).__name__} '{name}': expected a batch norm with running statistics and affine parameters, "
                f"got track_running_stats={bn.track_running_stats}, affine={bn.affine}"
            )
        self.name = name
        self.bn = bn
        self.activation = output_activation if owner else None
        # References, not children: the state belongs to the layer that makes the tensor.
        object.__setattr__(self, "input_activation", input_activation)
        object.__setattr__(self, "output_activation", output_activation)
        self.quantizes = output_activation is not None if quantizes is None else quantizes
        self.method, self.hysteresis, self.double_forward = spec.fraction_length, spec.hysteresis, spec.double_forward
        per_channel = self.recipe.weight.granularity == "per_channel" and output_activation is not None
        self.axis = 0 if per_channel else None
        self.calibrating, self.fake_quant_enabled = False, True
        shape = self._rows(self.weight.shape[0]) if per_channel else (1,)
        self.register_buffer("weight_fraction_length", torch.zeros(shape, dtype=torch.int32, device=self.weight.device))
        self.reset_fraction_length()

    def _rows(self, channels: int = -1) -> tuple[int, ...]:
        return (channels, *[1] * (self.weight.dim() - 1))

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} defines no product")

    def scale_factor(self) -> Tensor | None:
        """sf = bn.weight / sqrt(bn.running_var + eps), ``[O]``; None without batch norm."""
        if self.bn is None:
            return None
        return self.bn.weight * torch.rsqrt(self.bn.running_var + self.bn.eps)

    def factor(self, sf: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W_eff / W, ``[1]`` or ``[O, 1, ...]``, and the exponent j of an output without activation."""
        factor = self.input_activation.eta()
        if self.output_activation is not None:
            factor = factor / self.output_activation.eta()
        if sf is not None:
            factor = factor * sf
        factor = factor.reshape(self._rows()) if factor.numel() > 1 else factor
        if self.output_activation is not None:
            return factor, None
        exponent = self._exponent(self.weight.detach() * factor.detach())
        return factor * torch.exp2(exponent), exponent

    @staticmethod
    def _exponent(weight: Tensor) -> Tensor:
        """j such that weight * 2^j has a standard deviation that fraction length 7 is for."""
        deviation = weight.float().square().mean().sqrt().reshape(1)
        exponent = torch.floor(torch.log2(40.0 / deviation)) - (kWordLength - 1)
        return torch.where(torch.isfinite(exponent), exponent, torch.zeros_like(exponent)).clamp(-31, 31)

    def choose_fraction_length(self, weight: Tensor, *, fresh: bool = False) -> Tensor:
        """FL_w of an effective weight: int32 ``[1]`` or ``[O, 1, ...]``."""
        keep = {} if fresh or self.hysteresis == 0 else {"previous": self.weight_fraction_length}
        return fixed_point_fraction_length(
            weight.detach(), axis=self.axis, method=self.method, hysteresis=self.hysteresis if keep else 0.0, **keep
        )

    @torch.no_grad()
    def reset_fraction_length(self) -> None:
        """Chooses FL_w anew, without hysteresis."""
        factor, _ = self.factor(self.scale_factor())
        self.weight_fraction_length.copy_(self.choose_fraction_length(self.weight * factor, fresh=True))

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.calibrating or not self.fake_quant_enabled:
            y = self._float_forward(input)
        elif self.training:
            y = self._double_forward(input) if self.double_forward and self.bn is not None else self._one_forward(input)
        else:
            return self._unit_forward(input, residual)
        if residual is not None:
            y = y + residual
        return self._activated(y)

    def begin_calibration(self) -> None:
        self.calibrating = True

    end_order = 2  # after the activations

    def end_calibration(self, keep: bool) -> None:
        self.calibrating = False
        if keep:
            self.reset_fraction_length()

    def _activated(self, y: Tensor) -> Tensor:
        return self.output_activation(y, self.activation is not None) if self.quantizes else y

    def _float_forward(self, x: Tensor) -> Tensor:
        y = self.product(x, self.weight, self.bias)
        return y if self.bn is None else self.bn(y)

    def _one_forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            factor, _ = self.factor(self.scale_factor())
            factor = torch.where(factor == 0, torch.ones_like(factor), factor)
        weight = self._rounded(self.weight * factor) / factor
        y = self.product(x, weight, self.bias)
        return y if self.bn is None else self.bn(y)

    def _double_forward(self, x: Tensor) -> Tensor:
        y = self.product(x, self.weight, self.bias)
        self.bn(y)  # moves the running statistics
        dims = [0, *range(2, y.dim())]
        variance, mean = torch.var_mean(y.float(), dims, correction=0)
        sf = self.bn.weight * torch.rsqrt(variance + self.bn.eps)
        factor, _ = self.factor(sf)
        ratio = factor / sf.reshape(self._rows())  # eta_in / eta_out
        weight = self._rounded(self.weight * factor) / ratio
        shift = mean if self.bias is None else mean - self.bias
        return self.product(x, weight, self.bn.bias - shift * sf)

    def _rounded(self, weight: Tensor) -> Tensor:
        fraction_length = self.choose_fraction_length(weight)
        self.weight_fraction_length.copy_(fraction_length)
        return fixed_point_quantize(weight, fraction_length)

    @torch.no_grad()
    def folded(self) -> _C._FixedPointFolded:
        """Weight and bias as evaluation and the converted network have them."""
        bn, output = self.bn, self.output_activation
        return _C._fold_fixed_point(
            weight=self.weight,
            bias=self.bias,
            bn=None if bn is None else (bn.weight, bn.bias, bn.running_mean, bn.running_var),
            bn_eps=0.0 if bn is None else bn.eps,
            eta_in=self.input_activation.eta(),
            eta_out=None if output is None else output.eta(),
            input_fraction_length=self.input_activation.rounded_fraction_length(),
            input_quant_max=self.input_activation.quant_max,
            weight_fraction_length=self.weight_fraction_length,
            method=self.method,
            hysteresis=self.hysteresis,
        )

    def _unit_forward(self, units: Tensor, residual: Tensor | None) -> Tensor:
        with exact_arithmetic(units.device):
            folded = self.folded()
            dtype = torch.float32 if float(folded.bound.max()) < kExactFloat32 else torch.float64
            bias = folded.bias_codes
            if bias is not None:
                bias = (bias * torch.exp2(-folded.accumulator_fraction_length.double())).to(dtype)
            y = self.product(units.to(dtype), folded.weight.to(dtype), bias)
            if residual is not None:
                y = y.double() + residual.double()
            if folded.exponent is not None:
                return (y * torch.exp2(-folded.exponent)).to(torch.float32)
            return self.output_activation.rounded_units(y) if self.quantizes else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name!r}"


class FixedPointConv2d(FixedPointLayer, nn.Conv2d):
    """A convolution, the batch norm behind it and the addition and activation behind that, in 8-bit fixed point.

    With sf = gamma / sqrt(running_var + eps) (1 without batch norm), eta of the tensors it reads and makes, Q(.; FL) =
    fix_quant of 8 signed bits and W_eff = weight * sf * eta_in / eta_out, FL_w chosen from W_eff at every call:

    - training, in real values: y = bn(conv2d(x, Q(W_eff; FL_w) * eta_out / (eta_in * sf)) + bias), the factors held
      constant for the gradient (0 counts as 1). With ``double_forward`` as published: sf takes mean and variance of
      conv2d(x, weight), with gradient, and so costs a second convolution.
    - evaluation, in units: y = conv2d(x, Q(W_eff)) + b_q, b_q = rint(b_eff * 2^(FL_x + FL_w)) * 2^-(FL_x + FL_w), b_eff
      = (beta - (running_mean - bias) * sf) / eta_out. Exact: in float32 where the accumulator stays below 2^24, else in
      float64.

    Then ``y + residual`` where a shortcut ends here, then ``output_activation``. Without one the output is in real
    values, eta_out = 2^-j with j such that FL_w can be 7.

    Args:
        in_channels, ..., padding_mode: as ``nn.Conv2d``; dilation 1, zeros, groups 1 or depthwise (in == out ==
            groups).
        recipe: a recipe with ``fixed_point``, or the name of one.
        input_activation: that of the tensor read; a reference, not a child.
        activation: that of the tensor made, owned by this layer; or
        output_activation: one that another layer owns.
        quantizes: False leaves the output in output_activation's units but not rounded, for a shortcut that is added
            later.
        bn: an nn.BatchNorm2d.

    Shapes: input ``[N, C, H, W]`` -> ``[N, O, OH, OW]``, residual of the output's shape. Buffer
    ``weight_fraction_length``: int32 ``[1]``, or ``[O, 1, 1, 1]`` where the recipe's weight is per_channel.

    Raises:
        ValueError: a recipe without ``fixed_point``, or a convolution without integer form.

    >>> layer = FixedPointConv2d(3, 8, 3, recipe="f8net", input_activation=FixedPointActivation(), activation=FixedPointActivation())
    >>> layer(torch.rand(1, 3, 5, 5)).shape
    torch.Size([1, 8, 3, 3])
    """

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
        input_activation: FixedPointActivation,
        activation: FixedPointActivation | None = None,
        output_activation: FixedPointActivation | None = None,
        quantizes: bool | None = None,
        bn: nn.BatchNorm2d | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        if reason := no_integer_convolution(self):
            raise ValueError(f"FixedPointConv2d: {reason}")
        output = activation if activation is not None else output_activation
        self._set_up(recipe, bn, input_activation, output, activation is not None, quantizes, "")

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, 1, self.groups)


class FixedPointLinear(FixedPointLayer, nn.Linear):
    """A linear layer in 8-bit fixed point, :class:`FixedPointConv2d` with a matrix product in place of the convolution.

    As the last layer of a network its output is not rounded: W_eff = weight * eta_in * 2^j, and the evaluation's logits
    are accumulators times 2^-(FL_x + FL_w + j), in real values, so that the evaluation's loss is that of training.

    Args:
        in_features, out_features, bias: as ``nn.Linear``; the others as :class:`FixedPointConv2d`.

    Shapes: ``[N, in_features]`` -> ``[N, out_features]``.

    Raises:
        ValueError: a recipe without ``fixed_point``.

    >>> layer = FixedPointLinear(4, 2, recipe="f8net", input_activation=FixedPointActivation())
    >>> layer(torch.rand(3, 4)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        recipe: Recipe | str,
        input_activation: FixedPointActivation,
        activation: FixedPointActivation | None = None,
        output_activation: FixedPointActivation | None = None,
        quantizes: bool | None = None,
        bn: nn.BatchNorm1d | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        output = activation if activation is not None else output_activation
        self._set_up(recipe, bn, input_activation, output, activation is not None, quantizes, "")

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)


class FixedPointAvgPool2d(Calibrates, nn.Module):
    """The mean over the whole image: a sum, a shift, and what is left of the division in the eta of its output.

    With 2^k the power of two nearest to the number of pixels: units = sum(units of input) * 2^-k, eta = eta_in * 2^k /
    pixels, rounded to 8 bits by the child ``activation`` (no clip). Training: eta * fix_quant(mean(x) / eta; FL), in
    real values.

    Args:
        input_activation: that of the tensor read; a reference, not a child.
        method: of the output's FL, as :class:`FixedPointActivation`.
        kernel: the size that a pooling layer asked for, or None: whatever the image has.
        keepdim: ``[N, C, 1, 1]``, else ``[N, C]``.

    State: ``size``, int64 ``[2]``, height and width last seen.

    Raises:
        ValueError: an image of another size than ``kernel``.

    >>> FixedPointAvgPool2d(FixedPointActivation(), keepdim=False)(torch.rand(1, 4, 8, 8)).shape
    torch.Size([1, 4])
    """

    size: Tensor

    def __init__(
        self,
        input_activation: FixedPointActivation,
        *,
        method: str = "std",
        kernel: tuple[int, int] | None = None,
        keepdim: bool = True,
        name: str = "",
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.kernel, self.keepdim, self.name = kernel, keepdim, name
        self.register_buffer("size", torch.zeros(2, dtype=torch.int64, device=device))
        self.activation = FixedPointPoolActivation(
            input_activation, method=method, name=f"{name}.activation", device=device
        )

    def begin_calibration(self) -> None:
        self._size_before = self.size.clone()

    def end_calibration(self, keep: bool) -> None:
        size = self.__dict__.pop("_size_before")
        if not keep:
            self.set_size(size)

    @property
    def pixels(self) -> tuple[int, int]:
        return self.activation.pixels

    def forward(self, x: Tensor) -> Tensor:
        pixels = (x.shape[-2], x.shape[-1])
        if self.kernel is not None and pixels != self.kernel:
            raise ValueError(
                f"FixedPointAvgPool2d '{self.name}': expected an image of the pool's size {self.kernel}, got {pixels}"
            )
        if pixels != self.activation.pixels:
            self.activation.pixels = pixels
            self.size.copy_(torch.tensor(pixels))
        if self.activation.computes_in_float or self.training:
            return self.activation(x.mean((2, 3), keepdim=self.keepdim))
        return self.activation(x.sum((2, 3), keepdim=self.keepdim) * 2.0**-self.activation.shift)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.set_size(self.size)

    def set_size(self, size: Tensor) -> None:
        """Makes ``size`` (int64 ``[2]``) what was last seen."""
        self.size.copy_(size)
        self.activation.pixels = (int(size[0]), int(size[1]))


def no_integer_convolution(conv: nn.Conv2d) -> str:
    """Why a convolution has no integer form here, or ""."""
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    if conv.groups != 1 and not depthwise:
        return (
            f"expected groups of 1 or a depthwise convolution, got groups={conv.groups} of {conv.in_channels} channels"
        )
    if any(d != 1 for d in conv.dilation):
        return f"expected dilation 1, got {conv.dilation}"
    if conv.padding_mode != "zeros":
        return f"expected padding_mode 'zeros', got {conv.padding_mode!r}"
    if isinstance(conv.padding, str):
        return f"expected padding in numbers, got {conv.padding!r}"
    return ""
