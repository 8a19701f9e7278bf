"""Quantization-aware nn.Linear, nn.Conv2d and nn.Embedding, with fake-quantized tensors (convolutions.py has the rest).

Each is its float layer (same parameters, same names, same state dict plus scales) with up to three children:
``weight_fake_quant``, ``input_fake_quant`` and ``output_fake_quant``, those that the recipe has a spec for. Where the
recipe's scheme has a product of its own, one whose backward pass is not the float product's, linear layers and
convolutions take that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from quantrain._C import QuantLinear as LinearStep
from quantrain._C import Recipe, quant_linear, rounded_weight
from quantrain.fqt import fqt_linear

from .fake_quantize import FakeQuantize, Quantized, has_hooks, kFloats, transforms_active
from .recipes import as_recipe, weight_scale_shape
from .schemes import handler_of
from .weight_hooks import run_weight_hooks

__all__ = ["QuantConv2d", "QuantEmbedding", "QuantLayer", "QuantLinear", "QuantTransposedLinear"]


class OptimizerSteps:
    """Counts the steps of all optimizers: fused ones change parameters without raising their versions."""

    count = 0
    _hook = None

    @classmethod
    def counted(cls) -> int:
        """The count, from the first call on."""
        if cls._hook is None:
            cls._hook = register_optimizer_step_post_hook(cls._add)
        return cls.count

    @classmethod
    def _add(cls, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        cls.count += 1


class QuantLayer(nn.Module):
    """What the quantized layers share: building the fake-quants of a recipe, and taking over a float layer."""

    recipe: Recipe
    weight: Tensor
    weight_fake_quant: FakeQuantize | None
    input_fake_quant: FakeQuantize | None
    output_fake_quant: FakeQuantize | None

    rounds_input_itself = False  # the forward pass does not call input_fake_quant
    token_dims = 1  # trailing dimensions of an input that a per_token scale covers
    gradient_quant_enabled = True
    reader: int | None = None  # its place among the layers that share its input_fake_quant; set by fuse
    _own_weight_rule = False  # the scheme rounds the weight by a rule of its own
    called = False  # whether a forward pass, not counting compiled ones, came by
    # True: inputs are kept as they are, not as codes, so that gradients have gradients (a gradient penalty).
    second_derivatives = False
    packs_codes = False  # True: codes of at most 4 bits are kept two to a byte, for a pass over them more each way
    # Called with the layer and the result of its product, before batch norm and output_fake_quant; see GradientProbe.
    output_hook: Callable[[QuantLayer, Tensor], None] | None = None
    # The scheme's product, called as F.linear or F.conv2d; None where it has none or the layer is no product.
    product: Callable[..., Tensor] | None = None

    @classmethod
    def from_float(cls, module: nn.Module, recipe: Recipe | str, *, name: str = "") -> QuantLayer:
        """The quantized twin of ``module``: the same Parameter objects, hooks and attributes, and new fake-quants.

        Args:
            module: the float layer; it is not changed.
            recipe: a Recipe or the name of one.
            name: the path that error messages use.
        """
        run_weight_hooks(module)
        layer = twin_of(cls, module)
        layer._add_fake_quants(recipe, name)
        return layer.train(module.training)

    def to_float(self) -> nn.Module:
        """The float layer again, of the class that ``from_float`` took, with the same Parameter objects."""
        layer = twin_of(self.float_class(), self)
        for child in ("weight_fake_quant", "input_fake_quant", "output_fake_quant"):
            layer._modules.pop(child, None)
        for attribute in (
            "recipe",
            "called",
            "second_derivatives",
            "packs_codes",
            "gradient_quant_enabled",
            "product",
            "output_hook",
            "_own_weight_rule",
            "_variance",
            "_settings",
            "_kept",
            "cache_weight",
            "readers",
            "reader",
        ):
            layer.__dict__.pop(attribute, None)
        return layer

    @classmethod
    def float_class(cls) -> type[nn.Module]:
        return next(
            base for base in cls.__mro__ if base.__module__.startswith("torch.nn.modules") and base is not nn.Module
        )

    def _add_fake_quants(self, recipe: Recipe | str, name: str = "") -> None:
        self.recipe = as_recipe(recipe)
        handler_of(self.recipe).check_layer(self)
        self._own_weight_rule = self.recipe.scheme is not None and self.recipe.scheme.has_weight_rule
        device = self.weight.device
        for tensor in ("weight", "input", "output"):
            spec = getattr(self.recipe, tensor)
            scale_shape = (
                weight_scale_shape(spec, self.rows(self.weight).shape) if spec and tensor == "weight" else (1,)
            )
            child = f"{tensor}_fake_quant"
            path = f"{name}.{child}" if name else child
            fake_quant = spec and FakeQuantize(spec, scale_shape, token_dims=self.token_dims, name=path, device=device)
            if fake_quant and tensor == "weight":
                fake_quant.of_weight = True
            if fake_quant and not self.weight.requires_grad:  # a frozen layer's learned scales are frozen
                fake_quant.requires_grad_(False)
            self.add_module(child, fake_quant)

    def _fake_quants(self) -> list[FakeQuantize]:
        quants = (self.weight_fake_quant, self.input_fake_quant, self.output_fake_quant)
        return [fake_quant for fake_quant in quants if fake_quant is not None]

    def missing_range(self) -> str | None:
        """The name of what calibration or training had to show the layer and did not, or None."""
        return next((fq.name for fq in self._fake_quants() if not fq.ready), None)

    @property
    def needs_range(self) -> bool:
        """Whether it has to be shown tensors before it can convert."""
        return any(not fq.dynamic for fq in self._fake_quants())

    def enable_gradient_quant(self, enabled: bool = True) -> None:
        """Off: gradients are the float product's, whatever the recipe's ``grad_input`` and ``grad_weight`` say."""
        self.gradient_quant_enabled = enabled

    @property
    def quantizes_gradients(self) -> bool:
        return self.gradient_quant_enabled and self.product is not None

    def _note_call(self) -> None:
        if not torch.compiler.is_compiling() and not self.called:
            self.called = True

    def keeps_codes(self) -> bool:
        """Whether a node may stand in for the layer's operators: no second derivative, torch.func or forward mode to come."""
        return self.weight.requires_grad and not self.second_derivatives and not transforms_active()

    def watched(self, y: Tensor) -> Tensor:
        self._note_call()
        if self.output_hook is not None:
            self.output_hook(self, y)
        return y

    def rows(self, weight: Tensor) -> Tensor:
        """A weight of the layer as ``[O, ...]``, one row per output channel, where the layer holds it otherwise."""
        return weight

    def weight_to_quantize(self) -> Tensor:
        """The tensor that ``weight_fake_quant`` rounds, ``[O, ...]`` (for a folded convolution, the folded weight)."""
        return self.rows(self.weight)

    def bias_to_store(self) -> Tensor | None:
        """The bias that belongs to :meth:`weight_to_quantize`."""
        return getattr(self, "bias", None)

    def quantized_input(self, x: Tensor) -> Tensor:
        return x if self.input_fake_quant is None else self.input_fake_quant(x)

    def quantized_weight(self) -> Tensor:
        weight = self.weight_to_quantize()
        if self.weight_fake_quant is None:
            return weight
        if self._own_weight_rule and self.weight_fake_quant.fake_quant_enabled:
            scale, zero_point, low, high = self.recipe.scheme.weight_qparams(weight.detach())
            return torch.ops.quantrain.fake_quantize(weight, scale, zero_point, quant_min=low, quant_max=high)
        return self.weight_fake_quant(weight)

    def quantized_output(self, y: Tensor) -> Tensor:
        return y if self.output_fake_quant is None else self.output_fake_quant(y)


def set_gradient_quantizers(settings: Any, product: Callable[..., Tensor] | None) -> None:
    """The quantizers of a scheme's product, as the nodes of csrc take them; None: none."""
    arguments = {} if product is None else product.keywords
    for name, setter in (("grad_input", settings.set_grad_input), ("grad_weight", settings.set_grad_weight)):
        if name in arguments:
            fields = ("bits", "rows", "preserve_zero", "max_group")
            setter(arguments[name], *(arguments[f"{name}_{field}"] for field in fields))


def twin_of(cls: type[nn.Module], module: nn.Module) -> nn.Module:
    """An object of ``cls``, without its constructor, that has ``module``'s attributes and its Parameter objects."""
    layer = cls.__new__(cls)
    layer.__dict__.update({key: _own_copy(value) for key, value in module.__dict__.items()})
    return layer


def _own_copy(value: object) -> object:
    """A shallow copy of a container (parameters, hooks), anything else as it is."""
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value


class _Linear(QuantLayer):
    """The forward pass of linear layers."""

    def _add_fake_quants(self, recipe: Recipe | str, name: str = "") -> None:
        super()._add_fake_quants(recipe, name)
        self.product = handler_of(self.recipe).linear(self.recipe)

    _settings: tuple[Any, LinearStep] | None = None  # of one step, and what they were made from

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_settings", "_kept")}

    def _has_known_product(self) -> bool:
        """Whether the scheme's product, if it has one, is that of a node that takes codes."""
        product = self.product if self.quantizes_gradients else None
        return product is None or (isinstance(product, partial) and product.func is fqt_linear)

    def quantized_input(self, x: Tensor) -> Tensor | Quantized:
        fake_quant = self.input_fake_quant
        if fake_quant is None:
            return x
        if self._has_known_product() and self.keeps_codes() and not has_hooks(fake_quant):
            result = fake_quant.of_rows(x, reader=self.reader)
            if result is not None:
                return result
        return fake_quant(x) if self.reader is None else fake_quant(x, reader=self.reader)

    def forward(self, input: Tensor | Quantized, quantized: bool = False) -> Tensor:
        """
        Args:
            quantized: the input was fake-quantized already; then it may come with its codes.
        """
        x = input if quantized else self.quantized_input(input)
        if self._in_one_step(x):
            return self.quantized_output(self.watched(self._step(x)))
        if isinstance(x, Quantized):
            if not self.quantizes_gradients and self.weight.requires_grad:
                return self.quantized_output(self.watched(self._product_of_codes(x)))
            x = x.values
        product = self.product if self.quantizes_gradients else F.linear
        y = product(x, self.quantized_weight(), self.bias)
        return self.quantized_output(self.watched(y))

    def _product_of_codes(self, x: Quantized) -> Tensor:
        """The same as operators, as a compiled program takes it."""
        fake_quant, dtype = self.weight_fake_quant, x.values.dtype
        rounds = fake_quant is not None and fake_quant.rounds_rows() and not self._own_weight_rule
        rounds = rounds and not has_hooks(fake_quant) and self.weight.dim() == 2 and self.weight.numel() > 0
        if not rounds or self.weight.dtype not in (dtype, torch.float32) or not self.training:
            return torch.ops.quantrain.quant_linear(*x, self.quantized_weight(), self.bias)
        limits = {"weight_min": fake_quant.quant_min, "weight_max": fake_quant.quant_max}
        return torch.ops.quantrain.quant_linear(
            *x, self.rows(self.weight), self.bias, weight_groups=fake_quant.scale_shape[1], **limits
        )

    def _in_one_step(self, x: Tensor | Quantized) -> bool:
        """Whether the layer's training step is one node, which rounds the weight anew in its backward pass."""
        fake_quant, weight = self.weight_fake_quant, self.weight
        if fake_quant is None or not self.training or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return False
        if not (self._has_known_product() and self.keeps_codes()) or self._own_weight_rule or has_hooks(fake_quant):
            return False
        if not fake_quant.rounds_rows() or weight.dim() != 2 or fake_quant.scale_shape[0] != self.out_features:
            return False
        values = x.values if isinstance(x, Quantized) else x
        if values.dim() < 2 or values.numel() == 0 or weight.numel() == 0 or values.shape[-1] != self.in_features:
            return False
        dtype, autocast = self._product_type(values)
        return dtype in kFloats and (weight.dtype == dtype or (autocast and weight.dtype == torch.float32))

    def _product_type(self, values: Tensor) -> tuple[torch.dtype, bool]:
        """What the product is computed in, and whether autocast says so."""
        kind = values.device.type
        autocast = torch.is_autocast_enabled(kind)
        return torch.get_autocast_dtype(kind) if autocast else values.dtype, autocast

    def _step(self, x: Tensor | Quantized) -> Tensor:
        values, codes = (x.values, x[1:]) if isinstance(x, Quantized) else (x, (None, None, None))
        dtype, _ = self._product_type(values)
        if values.dtype != dtype:
            values = values.to(dtype)
        settings, weight = self._step_settings(), self.rows(self.weight)
        rounded = self._rounded_weight(settings, weight, values) if self.cache_weight else None
        return quant_linear(settings, values, *codes, weight, rounded, self.bias)

    cache_weight = False  # see enable_weight_cache
    _kept: tuple[Tensor, tuple[Any, ...], Tensor] | None = None  # the weight, its state, its rounded form

    def _rounded_weight(self, settings: LinearStep, rows: Tensor, like: Tensor) -> Tensor | None:
        """The rounded weight, kept or made now; None where it could be stale later."""
        weight = self.weight
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        state = (weight._version, weight.data_ptr(), like.dtype, OptimizerSteps.counted())
        if self._kept is None or self._kept[0] is not weight or self._kept[1] != state:
            self._kept = (weight, state, rounded_weight(settings, rows, like))
        return self._kept[2]

    def _apply(self, fn, recurse=True):
        self._kept = None
        return super()._apply(fn, recurse)

    def _step_settings(self) -> LinearStep:
        """What of a step does not change, made anew where it did."""
        weights = self.weight_fake_quant
        quantizes = self.product if self.quantizes_gradients else None
        packs = self.packs_codes and self.input_fake_quant is not None and self.input_fake_quant.fits_half_byte
        key = (weights.scale_shape, weights.quant_min, weights.quant_max, quantizes, packs)
        if self._settings is not None and self._settings[0] == key:
            return self._settings[1]
        settings = LinearStep()
        settings.weight_groups, settings.weight_min, settings.weight_max = (weights.scale_shape[1], *key[1:3])
        settings.packs_codes = packs
        set_gradient_quantizers(settings, quantizes)
        self._settings = (key, settings)
        return settings


class QuantLinear(_Linear, nn.Linear):
    """y = fq_out(fq_in(x) @ fq_w(weight)^T + bias), each fq a :class:`FakeQuantize` of the recipe or the identity.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``.
        recipe: a :class:`quantrain.Recipe` or the name of one.

    Shapes: x ``[..., in_features]`` -> ``[..., out_features]``; weight ``[out_features, in_features]``, its scale
    ``[out_features, 1]`` per channel, ``[out_features, in_features / group_size]`` per group; per_token input scale
    ``[..., 1]``. Dtypes: float32, float16, bfloat16 and autocast, as ``nn.Linear``; scales stay float32.
    Gradient: that of ``nn.Linear`` through the fake-quants' straight-through estimators; the bias is not quantized.
    Where the recipe has ``grad_input`` or ``grad_weight``: that of :func:`quantrain.fqt_linear`.

    Raises:
        ValueError: an invalid recipe; a range that was never observed; non-finite input while observing.

    >>> layer = QuantLinear(4, 2, recipe="qat-w8a8")
    >>> layer(torch.ones(3, 4)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        recipe: Recipe | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_fake_quants(recipe)


class Transposed(QuantLayer):
    """What linear layers with a weight ``[in_features, out_features]`` share, as GPT-2's ``Conv1D``."""

    kept_class: type[nn.Module] | None = None  # what from_float took

    @classmethod
    def from_float(cls, module: nn.Module, recipe: Recipe | str, *, name: str = "") -> QuantLayer:
        layer = super().from_float(module, recipe, name=name)
        layer.kept_class = type(module)
        return layer

    def to_float(self) -> nn.Module:
        layer = super().to_float()
        layer.__dict__.pop("kept_class")
        return layer

    def float_class(self) -> type[nn.Module]:
        return self.kept_class

    def rows(self, weight: Tensor) -> Tensor:
        return weight.t().contiguous()

    @property
    def in_features(self) -> int:
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight.shape[1]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantTransposedLinear(Transposed, _Linear):
    """:class:`QuantLinear` with a weight ``[in_features, out_features]``: the twin of
    ``transformers.pytorch_utils.Conv1D``.

    Made by ``from_float``; it is no ``nn.Linear``, whose weight is the other way round. The scale is
    ``[out_features, 1]`` per channel, and what it converts to stores codes ``[out_features, in_features]``, as every
    linear layer.
    """


class QuantConv2d(QuantLayer, nn.Conv2d):
    """y = fq_out(conv2d(fq_in(x), fq_w(weight)) + bias), each fq a :class:`FakeQuantize` of the recipe or the identity.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            ``nn.Conv2d`` (depthwise: ``groups == in_channels``).
        recipe: a :class:`quantrain.Recipe` or the name of one.

    Shapes: x ``[B, C, H, W]`` or ``[C, H, W]``; weight ``[O, C / groups, kh, kw]``, its scale ``[O, 1, 1, 1]`` per
    channel (also where the recipe says per_group); a per_token input scale is one per sample, ``[B, 1, 1, 1]``. Padding
    is added after quantization and is exactly 0. Dtypes and gradient as :class:`QuantLinear`
    (:func:`quantrain.fqt_conv2d`).

    Raises:
        ValueError: as :class:`QuantLinear`.

    >>> layer = QuantConv2d(3, 8, 3, padding=1, recipe="qat-w8a8")
    >>> layer(torch.ones(1, 3, 5, 5)).shape
    torch.Size([1, 8, 5, 5])
    """

    token_dims = 3

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

    def quantized_input(self, x: Tensor) -> Tensor | Quantized:
        fake_quant = self.input_fake_quant
        if fake_quant is None:
            return x
        plain = self.padding_mode == "zeros" and not isinstance(self.padding, str) and not self.quantizes_gradients
        if plain and x.dim() == 4 and self.keeps_codes() and not has_hooks(fake_quant):
            return fake_quant.with_codes(x, self.reader)
        return fake_quant(x) if self.reader is None else fake_quant(x, reader=self.reader)

    def _conv_forward(self, input: Tensor | Quantized, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(input, Quantized):
            plain = self.padding_mode == "zeros" and not isinstance(self.padding, str) and not self.quantizes_gradients
            if plain and input.values.dim() == 4:
                window = (self.stride, self.padding, self.dilation, self.groups)
                return self.watched(torch.ops.quantrain.quant_conv2d(*input, weight, bias, *window))
            input = input.values
        if not self.quantizes_gradients:
            return self.watched(super()._conv_forward(input, weight, bias))
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return self.watched(self.product(input, weight, bias, self.stride, padding, self.dilation, self.groups))

    def forward(self, input: Tensor | Quantized, quantized: bool = False) -> Tensor:
        """
        Args:
            quantized: the input was fake-quantized already; then it may come with its codes.
        """
        x = input if quantized else self.quantized_input(input)
        return self.quantized_output(self._conv_forward(x, self.quantized_weight(), self.bias))


class QuantEmbedding(QuantLayer, nn.Embedding):
    """Rows of a fake-quantized table: y = fq_out(fq_w(weight)[index]).

    The rows are gathered first and quantized afterwards, which gives the same values at the cost of the rows alone.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, device, dtype: as
            ``nn.Embedding``.
        recipe: a :class:`quantrain.Recipe` or the name of one; its input spec has no meaning here (indices) and is
            unused.

    Shapes: index, any shape, int32 or int64 -> ``[*index.shape, embedding_dim]``; scale ``[num_embeddings, 1]`` per
    channel, ``[num_embeddings, embedding_dim / group_size]`` per group. Gradient: as ``nn.Embedding``, straight through
    the rounding.

    Raises:
        ValueError: as :class:`QuantLinear`.

    >>> layer = QuantEmbedding(10, 4, recipe="qat-w8a8")
    >>> layer(torch.tensor([1, 2])).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        recipe: Recipe | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            device=device,
            dtype=dtype,
        )
        self._add_fake_quants(recipe)

    def _add_fake_quants(self, recipe: Recipe | str, name: str = "") -> None:
        super()._add_fake_quants(recipe, name)
        self.input_fake_quant = None

    def weight_to_quantize(self) -> Tensor:
        """The table; where ``max_norm`` is set, with every row's norm limited as a look-up would leave it."""
        if self.max_norm is None:
            return self.weight
        every = torch.arange(self.num_embeddings, device=self.weight.device)
        with torch.no_grad():
            return torch.embedding_renorm_(self.weight.detach().clone(), every, self.max_norm, self.norm_type)

    def forward(self, input: Tensor) -> Tensor:
        self._note_call()
        rows = super().forward(input)
        if self.weight_fake_quant is not None:
            rows = self._quantized_rows(self.weight_fake_quant, input, rows)
        return self.quantized_output(rows)

    def _quantized_rows(self, fake_quant: FakeQuantize, index: Tensor, rows: Tensor) -> Tensor:
        table = self.weight_to_quantize()
        observed = fake_quant.observe(table)
        if not fake_quant.fake_quant_enabled:
            return rows
        if fake_quant.dynamic and len(fake_quant.scale_shape) > 1:
            return fake_quant.quantize_dequantize_dynamic(rows, (*rows.shape[:-1], fake_quant.scale_shape[1]))
        scale, zero_point = observed if observed is not None else fake_quant.calculate_qparams(table)
        return fake_quant.quantize_dequantize(rows, *gathered_qparams(index, scale, zero_point))


def gathered_qparams(index: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The scale (and zero point) of the rows ``index`` of a table; one scale for the whole table stays as it is."""
    if scale.dim() < 2:
        return scale, zero_point
    return F.embedding(index, scale), None if zero_point is None else F.embedding(index, zero_point)
