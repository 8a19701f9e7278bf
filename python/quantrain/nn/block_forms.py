"""Kinds of transformer blocks by where they keep their parts, and what a block's parts say of how it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .ptq import QuantizedPtqLinear
from .quantized import QuantizedInt8Linear, QuantizedLayer, QuantizedLinear


@dataclass(frozen=True)
class BlockForm:
    """Where a kind of block keeps its parts: paths below it.

    ``qkv``: queries, keys and values, or one layer for all three; ``up``: the gate first where there is one; ``attention``:
    the module that knows the heads; ``activation``: the module, or the function's attribute.
    """

    name: str
    qkv: tuple[str, ...]
    out: str
    up: tuple[str, ...]
    down: str
    norms: tuple[str, str]
    attention: str
    activation: str
    pre_norm: bool

    @property
    def products(self) -> dict[str, tuple[str, ...]]:
        return {"qkv": self.qkv, "out": (self.out,), "up": self.up, "down": (self.down,)}


def _below(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names)


FORMS = (
    BlockForm(
        "BERT",
        _below("attention.self", "query", "key", "value"),
        "attention.output.dense",
        ("intermediate.dense",),
        "output.dense",
        ("attention.output.LayerNorm", "output.LayerNorm"),
        "attention.self",
        "intermediate.intermediate_act_fn",
        pre_norm=False,
    ),
    BlockForm(
        "DistilBERT",
        _below("attention", "q_lin", "k_lin", "v_lin"),
        "attention.out_lin",
        ("ffn.lin1",),
        "ffn.lin2",
        ("sa_layer_norm", "output_layer_norm"),
        "attention",
        "ffn.activation",
        pre_norm=False,
    ),
    BlockForm(
        "GPT-2",
        ("attn.c_attn",),
        "attn.c_proj",
        ("mlp.c_fc",),
        "mlp.c_proj",
        ("ln_1", "ln_2"),
        "attn",
        "mlp.act",
        pre_norm=True,
    ),
    BlockForm(
        "Llama",
        _below("self_attn", "q_proj", "k_proj", "v_proj"),
        "self_attn.o_proj",
        _below("mlp", "gate_proj", "up_proj"),
        "mlp.down_proj",
        ("input_layernorm", "post_attention_layernorm"),
        "self_attn",
        "mlp.act_fn",
        pre_norm=True,
    ),
    BlockForm(
        "ViT",
        _below("attention", "q_proj", "k_proj", "v_proj"),
        "attention.o_proj",
        ("mlp.fc1",),
        "mlp.fc2",
        ("layernorm_before", "layernorm_after"),
        "attention",
        "mlp.activation_fn",
        pre_norm=True,
    ),
    BlockForm(  # before transformers 5.20
        "ViT",
        _below("attention.attention", "query", "key", "value"),
        "attention.output.dense",
        ("intermediate.dense",),
        "output.dense",
        ("layernorm_before", "layernorm_after"),
        "attention.attention",
        "intermediate.intermediate_act_fn",
        pre_norm=True,
    ),
)
# torch.nn.TransformerEncoderLayer, whose queries, keys and values are one parameter, left in floating point.
TORCH_FORM = BlockForm(
    "torch.nn.TransformerEncoderLayer",
    ("self_attn",),
    "self_attn.out_proj",
    ("linear1",),
    "linear2",
    ("norm1", "norm2"),
    "self_attn",
    "activation",
    pre_norm=False,
)

_ACTIVATIONS = {
    "gelu": lambda x: F.gelu(x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class NotFused(ValueError):
    """Why a block keeps its separate layers."""


def inside(module: nn.Module, path: str) -> Any:
    """The module or attribute at the path, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def form_of(block: nn.Module) -> BlockForm | None:
    """The first form whose parts the block has."""
    if isinstance(block, nn.TransformerEncoderLayer):
        return replace(TORCH_FORM, pre_norm=block.norm_first)
    for form in FORMS:
        paths = (*(path for paths in form.products.values() for path in paths), *form.norms)
        if all(isinstance(inside(block, path), nn.Module) for path in paths):
            return form
    return None


# ---- what the parts say ----------------------------------------------------------------------------------------------


def layers_of(block: nn.Module, form: BlockForm) -> dict[str, list[QuantizedLayer]]:
    layers = {name: [inside(block, path) for path in paths] for name, paths in form.products.items()}
    for name, found in layers.items():
        for layer, path in zip(found, form.products[name], strict=True):
            if form.name == TORCH_FORM.name and name in ("qkv", "out"):
                continue
            if not multiplies_codes(layer):
                raise NotFused(f"{path} is a {type(layer).__name__} without an int8 product")
            if layer.output_fake_quant is not None:
                raise NotFused(f"the output of {path} is rounded")
    return layers


def multiplies_codes(layer: nn.Module) -> bool:
    """Whether the layer's product takes codes: rounded inputs by integers, or inputs as they come (w8a16)."""
    if isinstance(layer, (QuantizedInt8Linear, QuantizedPtqLinear)):
        return True
    return isinstance(layer, QuantizedLinear) and layer._multiplies_codes


def check_nothing_else(block: nn.Module, form: BlockForm) -> None:
    """Raises where the block holds more than the form's parts."""
    known = (*(path for paths in form.products.values() for path in paths), *form.norms)
    for name, module in block.named_modules():
        if any(name == path or name.startswith(f"{path}.") for path in known):
            continue
        if any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)):
            raise NotFused(f"it holds '{name}' besides" if name else "it holds parameters of its own")
        dropout = isinstance(module, nn.Dropout)
        if (
            not dropout
            and isinstance(module, nn.Module)
            and type(module).__module__.startswith("torch.nn.modules.norm")
        ):
            raise NotFused(f"it holds the norm '{name}' besides")


def norm_options(block: nn.Module, form: BlockForm) -> dict[str, Any]:
    norms = [inside(block, path) for path in form.norms]
    kinds = {"layer_norm" if isinstance(norm, nn.LayerNorm) else "rms_norm" for norm in norms}
    if any(getattr(norm, "weight", None) is None for norm in norms):
        raise NotFused("a norm has no weight")
    found = {getattr(norm, "eps", getattr(norm, "variance_epsilon", None)) for norm in norms}
    if None in found:
        raise NotFused("a norm does not say its eps")
    if len(kinds) > 1 or len(found) != 1:
        raise NotFused("its two norms differ")
    return {"norm": kinds.pop(), "eps": float(found.pop()), "pre_norm": form.pre_norm}


def activation_name(block: nn.Module, form: BlockForm) -> str:
    function = inside(block, form.activation)
    x = torch.linspace(-20, 20, 1025)  # beyond where some are clipped
    try:
        found = function(x)
        matching = [name for name, known in _ACTIVATIONS.items() if torch.allclose(found, known(x), atol=2e-6)]
    except Exception as error:
        raise NotFused(f"{form.activation} is no activation of one tensor") from error
    gated = len(form.up) == 2
    if not matching or (matching[0] == "silu") != gated:
        raise NotFused(f"the activation {type(function).__name__} has no kernel there")
    return "silu_mul" if gated else matching[0]


def _first(module: nn.Module, *names: str) -> Any:
    found = (getattr(module, name, None) for name in names)
    return next((value for value in found if value is not None), None)


def attention_options(
    block: nn.Module, form: BlockForm, layers: Mapping[str, Sequence[QuantizedLayer]]
) -> dict[str, Any]:
    attention = inside(block, form.attention)
    if isinstance(attention, nn.MultiheadAttention):
        if not attention._qkv_same_embed_dim or attention.bias_k is not None or attention.add_zero_attn:
            raise NotFused("its attention has keys and values of other sizes, or added ones")
        return {
            "heads": attention.num_heads,
            "kv_heads": attention.num_heads,
            "softmax_scale": attention.head_dim**-0.5,
        }
    config = getattr(attention, "config", None)
    heads = _first(attention, "num_attention_heads", "num_heads", "n_heads") or getattr(
        config, "num_attention_heads", None
    )
    rows = [layer.out_features for layer in layers["qkv"]]
    if not isinstance(heads, int) or heads < 1 or rows[0] % heads:
        raise NotFused(f"{form.attention} does not say how many heads it has")
    if getattr(attention, "sliding_window", None) is not None or getattr(
        config, "position_embedding_type", "absolute"
    ) not in (
        "absolute",
        None,
    ):
        raise NotFused("its attention is limited to a window or adds positions of its own")
    size = rows[0] // heads if len(rows) == 3 else rows[0] // (3 * heads)
    kv_heads = rows[1] // size if len(rows) == 3 else heads
    if len(rows) == 1 and rows[0] != 3 * layers["out"][0].in_features:
        raise NotFused("queries, keys and values are of different sizes")
    if len(rows) == 3 and (rows[1] != rows[2] or rows[1] % size or heads % kv_heads):
        raise NotFused("keys and values are of different sizes")
    scale = _first(attention, "scaling")
    return {"heads": heads, "kv_heads": kv_heads, "softmax_scale": float(size**-0.5 if scale is None else scale)}


def product_options(layers: Mapping[str, Sequence[QuantizedLayer]]) -> dict[str, Any]:
    """What ptq_linear is told, the same for all products of a block."""
    everyday = {"quantize_input": True, "outlier_threshold": 0.0, "capacity": 0, "few_rows_float": False}
    found = []
    for layer in (layer for of in layers.values() for layer in of if isinstance(layer, QuantizedLayer)):
        if isinstance(layer, QuantizedPtqLinear):
            found.append(layer.product)
        else:
            found.append(everyday | {"quantize_input": isinstance(layer, QuantizedInt8Linear)})
    if any(product != found[0] for product in found):
        raise NotFused("its layers have different recipes")
    return dict(found[0])
