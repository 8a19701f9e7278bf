"""A transformer layer for inference in one call: attention and feed-forward network with int8 products.

    pre_norm    x1 = x + out(attention(qkv(norm_1(x))))        y = x1 + down(f(up(norm_2(x1))))
    otherwise   x1 = norm_1(x + out(attention(qkv(x))))        y = norm_2(x1 + down(f(up(x1))))

What a product reads is rounded by the kernel that makes it: token-wise fusion, Yao et al., "ZeroQuant" (NeurIPS 2022), section 4.3. Rows
are int8 with one scale per token, so a token's result does not depend on the batch. :mod:`quantrain.nn.int8_blocks` puts it in place of
a model's blocks.

``weights`` is a list of :data:`WEIGHT_NAMES`: of each norm weight and bias, of each product what
:class:`quantrain.nn.QuantizedPtqLinear` stores. ``qkv`` has the rows of queries, keys and values one after the other,
``[(heads + 2 kv_heads) D, C]``, ``up`` with ``silu_mul`` those of gate and up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["WEIGHT_NAMES", "int8_transformer_layer", "int8_transformer_output", "int8_transformer_qkv", "rotate_heads_"]

_ops = torch.ops.quantrain

PRODUCT_TENSORS = (
    "codes",
    "scale",
    "bias",
    "input_factor",
    "input_scale",
    "outlier_columns",
    "outlier_codes",
    "outlier_scale",
)
#: The order of ``weights``.
WEIGHT_NAMES = (
    "norm_1_weight",
    "norm_1_bias",
    "norm_2_weight",
    "norm_2_bias",
    *(f"{product}_{tensor}" for product in ("qkv", "out", "up", "down") for tensor in PRODUCT_TENSORS),
)


def _listed(op: str, weights: Mapping[str, Tensor | None] | Sequence[Tensor | None]) -> list[Tensor | None]:
    if not isinstance(weights, Mapping):
        return list(weights)
    if unknown := sorted(set(weights) - set(WEIGHT_NAMES)):
        raise ValueError(f"{op}: expected weights of {', '.join(WEIGHT_NAMES)}, got {', '.join(unknown)}")
    return [weights.get(name) for name in WEIGHT_NAMES]


def int8_transformer_layer(
    input: Tensor,
    weights: Mapping[str, Tensor | None] | Sequence[Tensor | None],
    *,
    heads: int,
    mask: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    codes: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """A transformer layer in one call: ``(output, codes)``, ``input`` and ``output`` ``[B, T, C]`` of a floating type.

    Args:
        weights: by name or in the order of :data:`WEIGHT_NAMES`; missing ones are None.
        heads: of the queries.
        mask: bool (True: attend) or floating (added to q k^T), broadcast to ``[B, heads, T, T]``.
        cos, sin: ``[B or 1, T, D]``: queries and keys are rotated by them (:func:`rotate_heads_`).
        codes: int8 codes of ``input`` and their scales, where the layer before gave them.
        options: ``kv_heads`` (0: heads), ``norm`` (``"layer_norm"`` or ``"rms_norm"``), ``pre_norm`` (False), ``activation``
            (``"gelu"``, ``"gelu_tanh"``, ``"relu"``, ``"silu_mul"``), ``causal`` (False; only where there is no mask), ``eps``
            (1e-5), ``softmax_scale`` (0: D^-0.5), ``quantize_input`` (True), ``few_rows_float`` (True: at most 32 tokens, on
            the CPU 8, are multiplied unrounded), ``outlier_threshold`` and ``capacity`` as in a recipe's ``PtqSpec``.

    Returns:
        The output, and its codes for the next layer's ``codes`` (None of layers whose next one has no use for them).

    For inference: a backward pass raises ``NotImplementedError``. Results repeat. Raises ``ValueError`` (shapes and values)
    and ``TypeError`` (element types and devices).

    >>> def product(rows, columns):
    ...     return int8_quantize_rows(torch.randn(rows, columns))
    >>> from quantrain import int8_quantize_rows
    >>> weights = {}
    >>> for name, shape in {"qkv": (24, 8), "out": (8, 8), "up": (32, 8), "down": (8, 32)}.items():
    ...     weights[f"{name}_codes"], weights[f"{name}_scale"] = product(*shape)
    >>> output, codes = int8_transformer_layer(torch.randn(1, 16, 8), weights, heads=2)
    >>> output.shape, codes[0].dtype
    (torch.Size([1, 16, 8]), torch.int8)
    """
    given = (None, None) if codes is None else codes
    output, *result = _ops.int8_transformer_layer(
        input,
        _listed("int8_transformer_layer", weights),
        heads=heads,
        mask=mask,
        cos=cos,
        sin=sin,
        codes=given[0],
        scale=given[1],
        **options,
    )
    return output, None if result[0].dim() == 1 else tuple(result)


def int8_transformer_qkv(
    input: Tensor,
    weights: Mapping[str, Tensor | None] | Sequence[Tensor | None],
    *,
    heads: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The layer up to its attention: queries, keys and values, rotated, ``[B, T, heads + 2 kv_heads, D]``.

    For keys and values that are kept elsewhere. Arguments as :func:`int8_transformer_layer`.

    >>> weights = {"qkv_codes": torch.ones(12, 4, dtype=torch.int8), "qkv_scale": torch.ones(12, 1)}
    >>> for name in ("out", "up", "down"):
    ...     weights[f"{name}_codes"], weights[f"{name}_scale"] = torch.ones(4, 4, dtype=torch.int8), torch.ones(4, 1)
    >>> int8_transformer_qkv(torch.randn(1, 2, 4), weights, heads=1).shape
    torch.Size([1, 2, 3, 4])
    """
    listed = _listed("int8_transformer_qkv", weights)
    return _ops.int8_transformer_qkv(input, listed, heads=heads, cos=cos, sin=sin, **options)


def int8_transformer_output(
    input: Tensor,
    attended: Tensor,
    weights: Mapping[str, Tensor | None] | Sequence[Tensor | None],
    *,
    heads: int,
    **options: Any,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The layer from its attention's result ``attended`` ``[B, T, heads D]`` on; ``input`` is the layer's. Arguments and
    result as :func:`int8_transformer_layer`.

    >>> weights = {"qkv_codes": torch.ones(12, 4, dtype=torch.int8), "qkv_scale": torch.ones(12, 1)}
    >>> for name in ("out", "up", "down"):
    ...     weights[f"{name}_codes"], weights[f"{name}_scale"] = torch.ones(4, 4, dtype=torch.int8), torch.ones(4, 1)
    >>> int8_transformer_output(torch.randn(1, 2, 4), torch.randn(1, 2, 4), weights, heads=1)[0].shape
    torch.Size([1, 2, 4])
    """
    listed = _listed("int8_transformer_output", weights)
    output, *result = _ops.int8_transformer_output(input, attended, listed, heads=heads, **options)
    return output, None if result[0].dim() == 1 else tuple(result)


def rotate_heads_(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotary position embedding of the first ``heads`` heads of ``x`` ``[B, T, H, D]``, in place.

    y = x cos + (-second half of x, first half of x) sin, in float32, rounded once (Su et al., "RoFormer",
    arXiv:2104.09864). cos and sin: ``[B or 1, T, D]``, of one floating type.

    >>> rotate_heads_(torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 2), torch.ones(1, 1, 2), 1)
    tensor([[[[-1.,  1.]]]])
    """
    _ops.rotate_heads_(x, cos, sin, heads)
    return x
