"""Layers whose weight is packed in 4 bits, and LoRA beside it (QLoRA, Dettmers et al., arXiv:2305.14314).

``prepare(model, "nf4")`` swaps a model's linear layers for :class:`Linear4bit`, ``prepare(model, "qlora")`` for
:class:`LoraLinear`, whose two small matrices are all that is trained. The weight is packed at once; nothing needs
``convert``, which leaves such layers as they are.

Buffers, as :mod:`quantrain.four_bit` says: ``weight_codes`` (uint8), ``weight_scale`` (float32; uint8 where compressed),
``weight_zero_point`` (int32, affine), ``weight_scale_scale`` and ``weight_scale_offset`` (float32, compressed), ``bias``
(float32). Under ``storage="bfloat16"`` codes, scale and zero point are frozen bfloat16 parameters instead, views of
their bytes, which FSDP2 shards along dimension 0. An imported weight may have ``weight_table`` (16 values in place of
the format's) and ``weight_permutation`` (column j of the codes multiplies input column permutation[j]).

Reading ``weight`` decodes it. ``.to(dtype)`` says what type that is; codes and scales stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantrain import _C
from quantrain._C import FourBitWeight, Recipe

from .layers import QuantLayer
from .observers import Float32State
from .prepare import linear_layers, swapped
from .quantized import QuantizedLayer, with_hooks_of
from .recipes import as_recipe
from .schemes import handler_of
from .weight_hooks import run_weight_hooks

__all__ = ["Embedding4bit", "FourBitLayer", "Linear4bit", "LoraLinear", "load_packed_layers"]

# What storage "bfloat16" keeps as parameters, and the element type below the view where scales are not compressed.
_STORED = {"weight_codes": torch.uint8, "weight_scale": torch.float32, "weight_zero_point": torch.int32}


FORMS = ("weight_zero_point", "weight_table", "weight_permutation")  # what imported weights may have otherwise
_SKELETON: ContextVar[bool] = ContextVar("skeleton", default=False)


@contextmanager
def skeletons() -> Iterator[None]:
    """In it ``from_float`` packs zeros, whatever the float weight holds: a file's codes take their place."""
    token = _SKELETON.set(True)
    try:
        yield
    finally:
        _SKELETON.reset(token)


class FourBitLayer(QuantizedLayer):
    """What the layers share: the packed weight, and how to read it back.

    Attributes:
        format: "nf4", "fp4", "e2m1", "int4", "uint4" or "table".
        weight_shape: ``(N, K)``, a row per output.
        recipe: of scheme ``four_bit``.
    """

    input_fake_quant = output_fake_quant = None
    weight_scale_scale: Tensor | None
    weight_scale_offset: Tensor | None
    weight_table: Tensor | None
    weight_permutation: Tensor | None
    kept_class: type[nn.Module] | None = None  # of the float layer, where that is not the layer's own twin

    def __init__(self, packed: FourBitWeight, recipe: Recipe | str, *, training: bool = True):
        Float32State.__init__(self)  # not QuantizedLayer's, which converts a prepared layer
        self.recipe = as_recipe(recipe)
        handler_of(self.recipe).check_layer(self)
        self.bits, self.signed = 4, packed.format != "uint4"
        self.format, self.block_size = packed.format, packed.block_size
        self.weight_shape, self.weight_dtype = tuple(packed.size), packed.dtype
        sharded = self.recipe.scheme.storage == "bfloat16"
        for name in _STORED:
            tensor = getattr(packed, name.removeprefix("weight_"))
            if sharded and tensor is not None and (name == "weight_codes" or _shardable(tensor)):
                self.register_parameter(name, nn.Parameter(_as_bfloat16(tensor, name), requires_grad=False))
            else:
                self.register_buffer(name, tensor)
        for name in ("scale_scale", "scale_offset", "table", "permutation"):
            self.register_buffer(f"weight_{name}", getattr(packed, name))
        self.register_buffer("bias", None if packed.bias is None else packed.bias.detach().float().clone())
        self.train(training)

    @classmethod
    def from_float(cls, module: nn.Module, recipe: Recipe | str, *, name: str = "") -> FourBitLayer:
        """The layer with ``module``'s weight, packed, and its hooks; ``module`` is not changed.

        Args:
            module: nn.Linear, or transformers' Conv1D with its weight ``[in, out]`` (an embedding: nn.Embedding).
            recipe: of scheme ``four_bit``, or the name of one.
            name: the path that error messages use.

        Raises:
            ValueError: another recipe; a weight with NaN or Inf.
        """
        run_weight_hooks(module)
        recipe = cls._own_recipe(as_recipe(recipe))
        rows = module.weight.detach()
        transposed = isinstance(module, nn.Module) and not isinstance(module, (nn.Linear, nn.Embedding))
        if transposed:
            rows = rows.t()
        if _SKELETON.get():
            rows = torch.zeros_like(rows)
        elif not rows.is_meta and not bool(torch.isfinite(rows).all()):
            raise ValueError(f"prepare: layer {name!r}: expected finite weights to pack, got NaN or Inf")
        packed = _C.pack_four_bit(rows, recipe)
        bias = getattr(module, "bias", None)
        packed.bias = None if bias is None else bias.detach()
        try:
            layer = cls.from_packed(packed, recipe)
        except ValueError as error:
            raise ValueError(f"prepare: layer {name!r}: {error}" if name else str(error)) from error
        if transposed:
            layer.kept_class = type(module)
        layer.padding_idx = getattr(module, "padding_idx", None)
        return with_hooks_of(module, layer).train(module.training)

    @classmethod
    def from_packed(cls, packed: FourBitWeight, recipe: Recipe | str | None = None) -> FourBitLayer:
        """The layer with a packed weight, as a file of another library has it (:func:`quantrain.nn.load_four_bit_layers`).

        Args:
            packed: parts that fit each other; they are not copied.
            recipe: what it says of LoRA and of storage counts; format and block size are the weight's.

        Raises:
            ValueError: parts that do not fit; a format or block size that no recipe can say.
        """
        if not packed.codes.is_meta:  # what the parts must be to each other, decode checks
            _check_permutation(packed)
            _C.dequantized(packed, torch.float16)
        layer = cls.__new__(cls)
        FourBitLayer.__init__(layer, packed, _recipe_for(packed, recipe))
        layer._finish()
        return layer

    @classmethod
    def _own_recipe(cls, recipe: Recipe) -> Recipe:
        return recipe

    def _finish(self) -> None:
        """What a layer has beyond the packed weight."""

    def take_form(self, tensors: Mapping[str, Tensor]) -> None:
        """Registers, of a new layer, the buffers of FORMS that a file has and recipes do not say: a table, a permutation,
        zero points of another type."""
        for name, tensor in tensors.items():
            held = getattr(self, name, None)
            if held is None or (name in self._buffers and held.dtype != tensor.dtype):
                self.register_buffer(name, torch.empty_like(tensor, device=self.weight_codes.device))
        if self.weight_table is not None:
            self.format = "table"

    def packed_weight(self) -> FourBitWeight:
        """The packed weight; its tensors share memory with the layer's."""
        codes, scale, zero_point = self._packed()
        return FourBitWeight(
            codes,
            scale,
            self.format,
            list(self.weight_shape),
            self.block_size,
            self.weight_dtype,
            zero_point=zero_point,
            scale_scale=self.weight_scale_scale,
            scale_offset=self.weight_scale_offset,
            table=self.weight_table,
            permutation=self.weight_permutation,
            bias=self.bias,
        )

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``[N, K]`` that the codes stand for."""
        return _C.dequantized(self.packed_weight(), dtype)

    @property
    def transposed(self) -> bool:
        """Whether the float layer's weight is ``[in_features, out_features]``."""
        return self.kept_class is not None

    def _from_rows(self, rows: Tensor) -> Tensor:
        return rows.t() if self.transposed else rows

    def _packed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        scale_type = torch.float32 if self.weight_scale_scale is None else torch.uint8
        return (
            _from_bfloat16(self.weight_codes, torch.uint8),
            _from_bfloat16(self.weight_scale, scale_type),
            None if self.weight_zero_point is None else _from_bfloat16(self.weight_zero_point, torch.int32),
        )

    def _own_state(self) -> list[tuple[str, Tensor]]:
        return [(name, tensor) for name, tensor in self._buffers.items() if tensor is not None]

    def _apply(self, fn, recurse=True):
        # Views of bytes follow the device; a cast would change the bytes.
        probe = torch.empty(0, dtype=self.weight_dtype, device=self.weight_codes.device)
        views = {name: self._parameters.pop(name) for name in _STORED if self._parameters.get(name) is not None}
        Float32State._apply(self, fn, recurse)
        self.weight_dtype = fn(probe).dtype
        for name, parameter in views.items():
            moved = fn(parameter.data.view(torch.uint8))
            self._parameters[name] = nn.Parameter(moved.view(torch.bfloat16), requires_grad=False)
        return self

    def extra_repr(self) -> str:
        scales = ", compressed scales" if self.weight_scale_scale is not None else ""
        shape = f"weight_shape={self.weight_shape}, format={self.format}, block_size={self.block_size}{scales}"
        return f"{shape}, bias={self.bias is not None}"


def _recipe_for(packed: FourBitWeight, recipe: Recipe | str | None) -> Recipe:
    """The recipe where it says the weight's format, else one that does, with its LoRA and storage."""
    own = _C.recipe_of(packed)
    if recipe is None:
        return own
    recipe = as_recipe(recipe)
    if recipe.scheme is None or recipe.scheme.kind != own.scheme.kind:
        return recipe  # for the layer to refuse
    same = recipe.weight == own.weight and recipe.scheme.compress_scale == own.scheme.compress_scale
    if same:
        return recipe
    scheme = recipe.scheme
    scheme.compress_scale, scheme.scale_rule = own.scheme.compress_scale, "absmax"
    own.scheme, own.training = scheme, recipe.training
    return own


def _check_permutation(packed: FourBitWeight) -> None:
    order = packed.permutation
    if order is None:
        return
    k = packed.size[-1]
    whole = order.dtype == torch.int64 and order.shape == (k,)
    if not whole or not torch.equal(order.sort().values, torch.arange(k, device=order.device)):
        raise ValueError(f"Linear4bit: expected permutation int64 [{k}] with every column once, got another")


def _shardable(tensor: Tensor) -> bool:
    """Whether the bytes of a row are whole bfloat16 numbers: those of scales that are not stay a buffer."""
    return tensor.dim() == 2 and tensor.shape[1] * tensor.element_size() % 2 == 0


def _as_bfloat16(tensor: Tensor, name: str) -> Tensor:
    if not _shardable(tensor):
        raise ValueError(
            f"FourBitSpec: expected {name} of a matrix whose rows are whole blocks and an even number of bytes with "
            f"storage 'bfloat16', got {list(tensor.shape)}"
        )
    return tensor.contiguous().view(torch.bfloat16)


def _from_bfloat16(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.view(dtype) if tensor.dtype == torch.bfloat16 else tensor


class Linear4bit(FourBitLayer):
    """y = x W^T + bias with a packed W ``[out_features, in_features]`` (:func:`quantrain.linear_4bit`).

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``, whose initial weight is packed.
        recipe: of scheme ``four_bit``, or the name of one.

    Shapes: x ``[..., in_features]`` -> ``[..., out_features]``. Dtype: x's, under autocast the autocast type. Gradient:
    to x, any number of times.

    Raises:
        ValueError: a recipe of another scheme.

    >>> layer = Linear4bit(64, 8, recipe="nf4")
    >>> layer.weight_codes.shape, layer.weight_scale.shape, layer(torch.ones(3, 64)).shape
    (torch.Size([8, 32]), torch.Size([8, 1]), torch.Size([3, 8]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        recipe: Recipe | str = "nf4",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        packed = _C.pack_four_bit(linear.weight.detach(), as_recipe(recipe))
        packed.bias = None if linear.bias is None else linear.bias.detach()
        super().__init__(packed, recipe)
        self._finish()

    @property
    def in_features(self) -> int:
        return self.weight_shape[1]

    @property
    def out_features(self) -> int:
        return self.weight_shape[0]

    def _in_order(self, input: Tensor) -> Tensor:
        return input if self.weight_permutation is None else input.index_select(-1, self.weight_permutation)

    def _product(self, op: Callable[..., Tensor], input: Tensor, **adapter: Any) -> Tensor:
        codes, scale, zero_point = self._packed()
        return op(
            self._in_order(input),
            codes,
            scale,
            zero_point,
            self.bias,
            self.weight_scale_scale,
            self.weight_scale_offset,
            format=self.format,
            table=self.weight_table,
            method="auto",
            out_features=self.out_features,
            **adapter,
        )

    def forward(self, input: Tensor) -> Tensor:
        return self._product(torch.ops.quantrain.linear_4bit, input)


class LoraLinear(Linear4bit):
    """y = x W^T + scaling D(x) A^T B^T + bias with a packed W, one node (:func:`quantrain.linear_4bit_lora`).

    Parameters: ``lora_a`` ``[r, in_features]``, drawn as ``nn.Linear``'s weight, and ``lora_b`` ``[out_features, r]``, 0:
    a new layer gives what its base gives. Both are float32, whatever the base was; ``.to(dtype)`` casts them.
    ``scaling = lora_alpha / r``; D is dropout while the layer trains.

    Args:
        recipe: of scheme ``four_bit`` with ``lora_rank``.
        others: as :class:`Linear4bit`.

    Gradient: to x, lora_a and lora_b, once.

    >>> layer = LoraLinear(64, 8, recipe="qlora")
    >>> [name for name, _ in layer.named_parameters()], layer.scaling
    (['lora_a', 'lora_b'], 0.25)
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_enabled = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        recipe: Recipe | str = "qlora",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, recipe=recipe, device=device, dtype=dtype)

    def _finish(self) -> None:
        scheme = self.recipe.scheme
        self.lora_rank, self.lora_dropout = scheme.lora_rank, scheme.lora_dropout
        self.scaling = scheme.lora_alpha / scheme.lora_rank
        device = self.weight_codes.device
        self.lora_a = nn.Parameter(torch.empty(self.lora_rank, self.in_features, device=device, dtype=torch.float32))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, self.lora_rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_a, math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        if not self.lora_enabled:
            return super().forward(input)
        # The columns of A are in the order of the input's, those of the codes in that of the permutation.
        lora_a = self.lora_a if self.weight_permutation is None else self.lora_a[:, self.weight_permutation]
        return self._product(
            torch.ops.quantrain.linear_4bit_lora,
            input,
            lora_a=lora_a,
            lora_b=self.lora_b,
            scaling=self.scaling,
            dropout=self.lora_dropout if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lora_rank={self.lora_rank}, scaling={self.scaling:g}"


class Embedding4bit(FourBitLayer):
    """Rows of a packed table, decoded after the gather: only the rows asked for.

    Made by ``from_float``. Scales are never compressed. Shapes: index, any shape, int32 or int64 -> ``[*index.shape,
    embedding_dim]``. Dtype: that of the float table, or as ``.to(dtype)`` sets it since. No gradient.

    Raises:
        ValueError: rows that are no whole blocks.

    >>> layer = Embedding4bit.from_float(nn.Embedding(10, 64), "nf4")
    >>> layer(torch.tensor([1, 2])).shape
    torch.Size([2, 64])
    """

    @classmethod
    def _own_recipe(cls, recipe: Recipe) -> Recipe:
        if recipe.scheme is not None and getattr(recipe.scheme, "compress_scale", False):
            recipe = Recipe.from_json(recipe.to_json())
            scheme = recipe.scheme
            scheme.compress_scale = False
            recipe.scheme = scheme
        return recipe

    def _finish(self) -> None:
        if self.weight_shape[1] % self.block_size:
            raise ValueError(
                f"Embedding4bit: expected embedding_dim to be whole blocks of {self.block_size}, got {self.weight_shape[1]}"
            )

    @property
    def num_embeddings(self) -> int:
        return self.weight_shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.weight_shape[1]

    def forward(self, input: Tensor) -> Tensor:
        codes, scale, zero_point = (None if part is None else F.embedding(input, part) for part in self._packed())
        return torch.ops.quantrain.dequantize_4bit(
            codes,
            scale,
            zero_point,
            size=[*input.shape, self.embedding_dim],
            format=self.format,
            table=self.weight_table,
            dtype=str(self.weight_dtype).removeprefix("torch."),
        )


def load_packed_layers(
    model: nn.Module, weights: Mapping[str, FourBitWeight], recipe: Recipe | str | None = None
) -> nn.Module:
    """Swaps linear layers of a float model for packed layers with weights of another library's file.

    Args:
        model: its layers' own values do not matter; changed in place.
        weights: by path, as :func:`quantrain.nn.load_four_bit_layers` gives them.
        recipe: of scheme ``four_bit``: with ``lora_rank``, as "qlora", layers are :class:`LoraLinear`, and nothing else
            is trained; else, and by default, :class:`Linear4bit`. Format and block size are the weights'.

    Returns:
        The model (a new module where it is itself such a layer).

    Raises:
        ValueError: a path without a float linear layer, another shape, a bias that one of the two lacks. The model is
            then unchanged.

    >>> model = nn.Sequential(nn.Linear(64, 8))
    >>> load_packed_layers(model, {"0": Linear4bit.from_float(model[0], "fp4").packed_weight()})[0].format
    'fp4'
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    linear = {id(modules[name]) for name in linear_layers(model) if not isinstance(modules[name], QuantLayer)}
    lora = recipe is not None and getattr(as_recipe(recipe).scheme, "lora_rank", 0) > 0
    twins = {}
    for name, packed in weights.items():
        layer = modules.get(name)
        if layer is None or id(layer) not in linear:
            got = "nothing" if layer is None else type(layer).__name__
            raise ValueError(f"load_packed_layers: expected a float linear layer at {name!r}, got {got}")
        transposed = not isinstance(layer, nn.Linear)
        shape = list(layer.weight.shape)
        if (shape[::-1] if transposed else shape) != list(packed.size):
            raise ValueError(f"load_packed_layers: expected {name!r} of shape {shape}, got {list(packed.size)}")
        bias = getattr(layer, "bias", None)
        if (bias is not None) != (packed.bias is not None):
            rule = "without" if bias is None else "with"
            raise ValueError(f"load_packed_layers: expected {name!r} {rule} bias, got the other")
        if bias is not None and bias.shape != packed.bias.shape:
            raise ValueError(
                f"load_packed_layers: expected the bias of {name!r} of shape {list(bias.shape)}, got "
                f"{list(packed.bias.shape)}"
            )
        if id(layer) in twins:
            continue
        try:
            twin = (LoraLinear if lora else Linear4bit).from_packed(packed, recipe)
        except ValueError as error:
            raise ValueError(f"load_packed_layers: {name!r}: {error}") from error
        twin = twin if layer.weight.is_meta else twin.to(layer.weight.device)
        twin.kept_class = type(layer) if transposed else None
        twins[id(layer)] = with_hooks_of(layer, twin).train(layer.training)
    model = swapped(model, twins)
    if lora:
        own = {id(p) for twin in twins.values() for p in twin.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in own)
    return model
