"""Int8Linear: a Linear layer that trains on int8 matrix products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantrain._C import Recipe

from .layers import OptimizerSteps, QuantLayer, QuantLinear, QuantTransposedLinear, Transposed

__all__ = ["Int8Layer", "Int8Linear", "Int8TransposedLinear", "enable_weight_cache"]


class Int8Layer(QuantLayer):
    """The forward pass of :class:`Int8Linear`, whichever way round the weight is held."""

    rounds_input_itself = True
    cache_weight: bool = False
    _kept: tuple[Tensor, tuple[int, int, int], Tensor, Tensor] | None = None  # weight, its state, codes, scale

    def _add_fake_quants(self, recipe: Recipe | str, name: str = "") -> None:
        super()._add_fake_quants(recipe, name)
        spec = self.recipe.scheme
        if spec is None or spec.kind != "int8":
            raise ValueError(f"{type(self).__name__}: expected a recipe with int8, got {self.recipe.name!r}")
        self.int8_arguments = {
            "output": spec.output,
            "grad_input": spec.grad_input,
            "grad_weight": spec.grad_weight,
            "weight_scheme": spec.weight_scheme,
            "simulate": spec.simulate,
        }

    @property
    def quantizes_gradients(self) -> bool:
        return self.gradient_quant_enabled

    def forward(self, input: Tensor) -> Tensor:
        if not (self.input_fake_quant.fake_quant_enabled and self.weight_fake_quant.fake_quant_enabled):
            return self.quantized_output(self.watched(F.linear(input, self.weight_to_quantize(), self.bias)))
        arguments = self.int8_arguments
        if not self.gradient_quant_enabled:
            arguments = {**arguments, "grad_input": "none", "grad_weight": "none"}
        if self.cache_weight and not torch.compiler.is_compiling():
            arguments = {**arguments, **self._weight_codes()}
        y = torch.ops.quantrain.int8_linear(input, self.weight_to_quantize(), self.bias, **arguments)
        return self.quantized_output(self.watched(y))

    def _weight_codes(self) -> dict[str, Tensor]:
        """The weight's codes and scale, kept or made now; none where they could be stale later."""
        weight = self.weight
        if not torch.is_grad_enabled() or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            return {}
        state = (weight._version, weight.data_ptr(), OptimizerSteps.counted())
        if self._kept is None or self._kept[0] is not weight or self._kept[1] != state:
            with torch.no_grad():
                self._kept = (weight, state, *torch.ops.quantrain.int8_quantize_rows.nearest(self.weight_to_quantize()))
        return {"weight_codes": self._kept[2], "weight_scale": self._kept[3]}

    def _apply(self, fn, recurse=True):
        self._kept = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


class Int8Linear(Int8Layer, nn.Linear):
    """y = x W^T + bias by :func:`quantrain.int8_linear`: output, grad_input and grad_weight each in int8 or float.

    Input and weight are rounded to int8, each with one scale per row; for the gradients dY is rounded stochastically,
    so that their mean is the gradient at the rounded input and weight. ``weight`` and ``bias`` stay floating point
    parameters, trained as any other.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``.
        recipe: a :class:`quantrain.Recipe` with ``int8``, or the name of one. Its :class:`quantrain.Int8Spec` says
            which of the three are ``"int8"``, ``"none"`` or ``"auto"``; where it says ``simulate`` the same codes are
            multiplied in float32.

    Attributes:
        cache_weight: True keeps the weight's codes from one forward pass to the next and makes them anew where the
            weight has changed, which saves a pass over the weight in all but the first micro-batch of a step with
            gradient accumulation. Off by default, because it costs 1 byte per parameter between the passes. A change is
            noticed by the weight's version, which in-place operators raise, and by the step of any
            ``torch.optim.Optimizer``; writing through ``weight.data`` or replaying a CUDA graph goes unnoticed. Not
            used in a compiled program, while gradients are off, or while a CUDA graph is captured.

    Shapes: x ``[..., in_features]`` -> ``[..., out_features]``. Dtypes: float32, float16, bfloat16; under autocast x is
    cast and the weight is rounded as it is. ``enable_gradient_quant(layer, False)`` computes gradients in floating
    point, ``enable_fake_quant(layer, False)`` everything.

    Raises:
        ValueError: a recipe without ``int8``; see :func:`quantrain.int8_linear`.

    >>> layer = Int8Linear(64, 32)
    >>> layer(torch.randn(16, 64)).sum().backward()
    >>> layer.weight.grad.shape
    torch.Size([32, 64])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        recipe: Recipe | str = "int8-training",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_fake_quants(recipe)


class Int8TransposedLinear(Transposed, Int8Layer):
    """:class:`Int8Linear` with a weight ``[in_features, out_features]``: the twin of
    ``transformers.pytorch_utils.Conv1D``.

    Made by ``from_float``; it is no ``nn.Linear``, whose weight is the other way round.
    """


def enable_weight_cache(model: nn.Module, enabled: bool = True) -> None:
    """Lets linear layers keep their rounded weight from one micro-batch to the next and for what is computed anew in the
    backward pass; off, what was kept is dropped.

    :class:`Int8Linear` and :class:`Int8TransposedLinear` keep codes (1 byte per parameter), :class:`QuantLinear` and
    :class:`QuantTransposedLinear` with a dynamic weight range the values (2 bytes in 16 bits, 4 in float32). ``cache_weight``
    of :class:`Int8Linear` says how a change is noticed. A convolution before a batch norm folds anew at each batch.

    >>> enable_weight_cache(nn.Sequential(Int8Linear(4, 2)))
    """
    for module in model.modules():
        if isinstance(module, (Int8Layer, QuantLinear, QuantTransposedLinear)):
            module.cache_weight, module._kept = enabled, None
