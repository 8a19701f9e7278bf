"""Converted models as files that other programs run: safetensors and a ``quantization_config`` in config.json.

Target ``"vllm"`` is compressed-tensors, which vLLM and transformers read:

========  ==================  ======================================================================================
layer     format              tensors of a layer X
========  ==================  ======================================================================================
W8A8      ``int-quantized``   ``X.weight`` int8 [O, K], ``X.weight_scale`` [O, 1], with a stored input scale
                              ``X.input_scale`` [1]
W4A16     ``pack-quantized``  ``X.weight_packed`` int32 [O, ceil(K / 8)], ``X.weight_scale`` [O, K / g] or [O, 1],
                              ``X.weight_shape`` int64 [2], affine ``X.weight_zero_point`` int32 [ceil(O / 8), K / g]
W8A16     ``pack-quantized``  the same with four codes in a word
========  ==================  ======================================================================================

Target ``"bitsandbytes"`` is LLM.int8: ``X.weight`` int8 [O, K], ``X.SCB`` float32 [O] = 127 scale, ``X.weight_format``
uint8 0; a recipe's ``outlier_threshold`` becomes ``llm_int8_threshold``, which has no limit of columns. Scales are
float32 in both, whatever the model's type: readers cast them. Sources: compressed-tensors 0.20, bitsandbytes 0.50.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantrain._C import FourBitWeight, QuantSpec, Recipe
from quantrain.nn.four_bit_formats import to_compressed_tensors
from quantrain.nn.layers import QuantLayer
from quantrain.nn.prepare import check_model, some
from quantrain.nn.recipes import as_recipe
from quantrain.nn.schemes import handler_of

__all__ = ["TARGETS", "check_target", "export_model"]

TARGETS = ("vllm", "bitsandbytes")
kKernelColumns = 128  # vLLM's 4-bit kernels take K and groups in multiples of it, or one group per row
_REBLOCKED = {"ptq", "four_bit"}  # schemes whose groups stay as they are where they do not divide K


def check_target(layers: Mapping[str, tuple[int, int]], recipe: Recipe | str, target: str) -> None:
    """Whether ``target`` can hold linear layers of these sizes under a recipe: what :func:`export_model` would say at
    the end, before any work.

    Args:
        layers: (out_features, in_features) of the layers that will be quantized, by name.
        recipe: a Recipe or the name of one.
        target: "vllm" or "bitsandbytes".

    Raises:
        ValueError: another target; what it cannot hold: factors per input column, outlier columns, groups that do not
            divide K, other bits, affine static inputs, ...; five layers are named.

    Warns:
        UserWarning: "vllm", 4 bits: sizes that the format holds and vLLM's kernels do not take.

    >>> check_target({"up": (1536, 512)}, "int4-g128", "vllm")
    >>> check_target({"up": (1536, 576)}, "int4-g128", "vllm")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: export: expected layers that ..., got 1 that it cannot: 'up' (576 columns are not whole groups of 128)
    """
    _check_known(target)
    recipe = as_recipe(recipe)
    _check_cache(recipe)
    edges = {name for name in (*list(layers)[:1], *list(layers)[-1:]) if recipe.edge_bits}
    forms = {}
    for name, size in layers.items():
        own = handler_of(recipe).layer_recipe(name, recipe.edge() if name in edges else recipe)
        forms[name] = _form_under(own, tuple(size))
    _check_forms(forms, target)


def export_model(model: nn.Module, folder: str | os.PathLike, target: str) -> None:
    """Writes ``model.safetensors`` and ``config.json`` of a converted model, for another program to load.

    What is not converted is written as the state dict has it; of tensors that share memory, as a tied head and its
    embedding, one is. Linear layers left in floating point are listed, so that they stay so. config.json has what
    ``model.config`` holds, where it is one of transformers.

    Args:
        model: what ``convert`` gave, or ``prepare`` under a recipe of packed weights; it is not changed.
        folder: made where it is missing; the two files in it are replaced.
        target: "vllm" (compressed-tensors) or "bitsandbytes" (LLM.int8).

    Raises:
        ValueError: another target; no converted layer; prepared layers that are not converted; layers that the target
            cannot hold, five of them named with the reason. Nothing is written then.

    Warns:
        UserWarning: as :func:`check_target`.

    >>> import tempfile
    >>> import quantrain.nn as qnn
    >>> model = qnn.convert(qnn.prepare(nn.Sequential(nn.Linear(64, 8)), "qat-w8a8-token"))
    >>> folder = tempfile.mkdtemp()
    >>> export_model(model, folder, "vllm")
    >>> sorted(os.listdir(folder))
    ['config.json', 'model.safetensors']
    """
    check_model("export", model)
    _check_known(target)
    recipe = getattr(getattr(model, "quantization_summary", None), "recipe", None)
    if recipe is not None:
        _check_cache(recipe)
    layers = _converted(model)
    forms = {name: _form_of(layer) for name, layer in layers.items()}
    _check_forms(forms, target)

    from safetensors.torch import save_file

    tensors = _float_tensors(model, layers)
    for name, layer in layers.items():
        write = _bitsandbytes_tensors if target == "bitsandbytes" else _compressed_tensors
        found = write(layer, forms[name], name)
        if layer.bias is not None:
            found[f"{name}.bias"] = layer.bias.to(getattr(layer, "weight_dtype", torch.float32))
        tensors |= found
    kept = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = _config(model, tensors, layers)
    config["quantization_config"] = (
        _bitsandbytes_config(forms, kept) if target == "bitsandbytes" else _compressed_config(forms, kept)
    )
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    umask = os.umask(0)
    os.umask(umask)
    (path / "model.safetensors").chmod(0o666 & ~umask)  # safetensors writes for the owner alone
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_cache(recipe: Recipe) -> None:
    if getattr(recipe.scheme, "kv_cache", "float") != "float":
        raise ValueError(
            f"export: expected a recipe whose keys and values stay in floating point, got kv_cache "
            f"{recipe.scheme.kv_cache!r} of {recipe.name!r}, which the files do not hold"
        )


# ---- what a file has to say of a layer -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """A layer as a file describes it.

    Attributes:
        columns: K.
        bits: of the weight.
        group_size: columns that share a scale; 0: one scale per row.
        symmetric: whether the weight has no zero points.
        input: "" (as it comes), "token" (8 bits, a scale per row and call) or "tensor" (8 bits, one stored scale).
        input_symmetric: whether the input has no zero points.
        threshold: input columns with an element of this magnitude are left out of the rounding; 0: none is.
        beyond: what no target can hold.
    """

    columns: int
    bits: int
    group_size: int = 0
    symmetric: bool = True
    input: str = ""
    input_symmetric: bool = True
    threshold: float = 0.0
    beyond: tuple[str, ...] = ()


def _form_under(recipe: Recipe, size: tuple[int, int]) -> _Form:
    """Of a layer ``[out_features, in_features]`` that the recipe converts."""
    weight, beyond = recipe.weight, list(_beyond(recipe))
    if weight is None:
        return _Form(size[1], 16, beyond=("no rounded weight",))
    if weight.format not in ("int", "int4", "uint4"):
        beyond.append(f"weights of format {weight.format}")
    input, symmetric = _input_form(recipe.input, beyond)
    group_size, threshold = _group_size(recipe, size), getattr(recipe.scheme, "outlier_threshold", 0.0)
    return _Form(size[1], weight.bits, group_size, weight.symmetric, input, symmetric, threshold, tuple(beyond))


def _form_of(layer: nn.Module) -> _Form:
    """Of a converted layer: what its recipe says, and what its buffers do."""
    beyond = list(_beyond(layer.recipe))
    if not hasattr(layer, "in_features"):
        return _Form(0, layer.bits, beyond=(f"a {type(layer).__name__}, which is no linear layer",))
    scale, columns = layer.weight_scale, layer.in_features
    format = getattr(layer, "format", "int4")
    if format not in ("int4", "uint4"):
        beyond.append(f"weights of format {format}")
    if getattr(layer, "transposed", False):
        beyond.append("a Conv1D of transformers, whose weight is the other way round")
    for name, what in _BEYOND_BUFFERS.items():
        if getattr(layer, name, None) is not None:
            beyond.append(what)
    zero_point = getattr(layer, "weight_zero_point", None)
    if zero_point is not None and zero_point.is_floating_point():
        beyond.append("zero points in floats")
    if hasattr(layer, "block_size"):
        group = layer.block_size
    elif hasattr(layer, "group_size"):
        group = layer.group_size
    else:
        group = columns // scale.shape[1] if scale.dim() > 1 and scale.shape[1] > 1 else 0
    input, symmetric = _input_form(layer.recipe.input, beyond)
    threshold = getattr(layer.recipe.scheme, "outlier_threshold", 0.0)
    return _Form(columns, layer.bits, group, zero_point is None, input, symmetric, threshold, tuple(beyond))


_FACTOR = "a factor per input column"
_COLUMNS = "outlier columns"
_BEYOND_BUFFERS = {
    "input_factor": _FACTOR,
    "outlier_columns": _COLUMNS,
    "lora_a": "LoRA matrices beside the weight (merge adds them)",
    "weight_scale_scale": "scales that are compressed themselves",
    "weight_permutation": "columns in another order",
}


def _beyond(recipe: Recipe) -> Iterable[str]:
    """What of a recipe no target can hold."""
    scheme = recipe.scheme
    if recipe.output is not None:
        yield "rounded outputs"
    if getattr(scheme, "smooth_alpha", 0) > 0 or getattr(scheme, "scale_search", "absmax") != "absmax":
        yield _FACTOR
    if getattr(scheme, "outlier_columns", 0) > 0 and not getattr(scheme, "outlier_threshold", 0):
        yield _COLUMNS
    if getattr(scheme, "lora_rank", 0) > 0:
        yield _BEYOND_BUFFERS["lora_a"]
    if getattr(scheme, "compress_scale", False):
        yield _BEYOND_BUFFERS["weight_scale_scale"]


def _input_form(spec: QuantSpec | None, beyond: list[str]) -> tuple[str, bool]:
    """``input`` and ``input_symmetric`` of a form; adds to ``beyond`` what is neither."""
    if spec is None:
        return "", True
    if spec.bits != 8:
        beyond.append(f"inputs of {spec.bits} bits")
    dynamic = spec.observer == "dynamic"
    if spec.granularity == "per_token" and dynamic:
        return "token", spec.symmetric
    if spec.granularity != "per_tensor" or dynamic:
        beyond.append(f"inputs {spec.granularity}, {'dynamic' if dynamic else 'stored'}")
    return "tensor", spec.symmetric


def _group_size(recipe: Recipe, size: tuple[int, int]) -> int:
    """0: one scale per row. Layers of some schemes have that where groups do not divide K."""
    weight = recipe.weight
    if weight.granularity != "per_group":
        return 0
    if recipe.scheme is not None and recipe.scheme.kind in _REBLOCKED:
        return weight.group_size
    groups = weight.weight_scale_shape(size)[1]
    return size[1] // groups if groups > 1 else 0


# ---- what a target can hold ------------------------------------------------------------------------------------------


def _check_known(target: str) -> None:
    if target not in TARGETS:
        raise ValueError(f"export: expected target to be one of {', '.join(TARGETS)}, got {target!r}")


def _check_forms(forms: Mapping[str, _Form], target: str) -> None:
    rule = _bitsandbytes_refuses if target == "bitsandbytes" else _vllm_refuses
    refused = {name: reason for name, form in forms.items() if (reason := _refuses(form) or rule(form))}
    first = next(iter(forms.values()), None)
    other = {name: "another outlier threshold" for name, form in forms.items() if form.threshold != first.threshold}
    refused = other | refused
    if refused:
        named = some(f"{name!r} ({reason})" for name, reason in refused.items())
        raise ValueError(
            f"export: expected layers that target {target!r} can hold, got {len(refused)} that it cannot: {named}"
        )
    slow = [name for name, form in forms.items() if target == "vllm" and form.bits == 4 and not _has_kernel(form)]
    if slow:
        warnings.warn(
            f"export: vLLM's 4-bit kernels want K in multiples of {kKernelColumns} and groups of {kKernelColumns} or "
            f"one per row, which {len(slow)} layers have not: {some(map(repr, slow))}",
            stacklevel=3,
        )


def _refuses(form: _Form) -> str:
    """Why no target holds the layer, or ""."""
    if form.beyond:
        return form.beyond[0]
    if form.group_size and form.columns % form.group_size:
        return f"{form.columns} columns are not whole groups of {form.group_size}"
    return ""


def _vllm_refuses(form: _Form) -> str:
    if form.threshold:
        return _COLUMNS
    if form.bits not in (4, 8):
        return f"weights of {form.bits} bits"
    if form.bits == 4 and form.columns % 2:
        return f"weights of 4 bits and {form.columns} columns, which is odd"
    if not form.input:
        return "affine weights of 8 bits" if form.bits == 8 and not form.symmetric else ""
    if form.bits != 8 or form.group_size or not form.symmetric:
        kind = "affine weights" if not form.symmetric else f"weights of {form.bits} bits"
        return f"inputs of 8 bits with {kind}{' in groups' if form.group_size else ''}"
    return "affine inputs with a stored scale" if form.input == "tensor" and not form.input_symmetric else ""


def _bitsandbytes_refuses(form: _Form) -> str:
    if form.bits != 8 or form.group_size or not form.symmetric:
        kind = "affine weights" if not form.symmetric else f"weights of {form.bits} bits"
        return f"{kind}{' in groups' if form.group_size else ''}"
    if form.input == "token" and form.input_symmetric:
        return ""
    got = {"": "as they come", "token": "affine", "tensor": "with a stored scale"}[form.input]
    return f"inputs {got}: LLM.int8 rounds them to 8 bits, symmetric, per row and call"


def _has_kernel(form: _Form) -> bool:
    return form.columns % kKernelColumns == 0 and form.group_size in (0, kKernelColumns)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _converted(model: nn.Module) -> dict[str, nn.Module]:
    """The converted layers, also one that is registered twice, by every name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if prepared := [name for name, module in modules.items() if isinstance(module, QuantLayer)]:
        raise ValueError(
            f"export: expected a converted model, got {len(prepared)} prepared layers: {some(map(repr, prepared))}"
        )
    layers = {name: module for name, module in modules.items() if hasattr(module, "weight_codes")}
    if not layers:
        raise ValueError("export: expected a converted model, got one without layers of integer codes")
    if "" in layers:
        raise ValueError(f"export: expected a model of named layers, got a single {type(model).__name__}")
    return layers


def _float_tensors(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The state dict without the converted layers, and without second names of a tensor."""
    prefixes = tuple(f"{name}." for name in layers)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefixes)}
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    kept: dict[tuple, str] = {}
    for name in sorted(state, key=lambda name: name in tied):  # the name that is no alias comes first
        tensor = state[name]
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel():
            kept.setdefault(place, name)
    own = set(kept.values())
    return {name: tensor for name, tensor in state.items() if name in own or not tensor.numel()}


def _row_scale(layer: nn.Module) -> Tensor:
    """float32 ``[O, 1]``, where one scale may serve all rows."""
    return layer.weight_scale.float().reshape(-1, 1).expand(layer.out_features, 1)


def _compressed_tensors(layer: nn.Module, form: _Form, name: str) -> dict[str, Tensor]:
    if form.bits == 4:
        return to_compressed_tensors(_four_bit_weight(layer, form), name)
    codes = layer.weight_codes
    scale = layer.weight_scale.float() if form.group_size else _row_scale(layer)
    if not form.input:
        shape = torch.tensor(codes.shape, dtype=torch.int64)
        return {
            f"{name}.weight_packed": _packed_bytes(codes),
            f"{name}.weight_scale": scale,
            f"{name}.weight_shape": shape,
        }
    tensors = {f"{name}.weight": codes, f"{name}.weight_scale": scale}
    if form.input == "tensor":
        tensors[f"{name}.input_scale"] = _input_scale(layer).float().reshape(1)
    return tensors


def _four_bit_weight(layer: nn.Module, form: _Form) -> FourBitWeight:
    """The packed weight; of type float32, which is what its scales are written in."""
    size = [layer.out_features, layer.in_features]
    format = "int4" if form.symmetric else "uint4"
    if hasattr(layer, "packed_weight"):
        packed = layer.packed_weight()
        codes, scale, zero_point = packed.codes, packed.scale, packed.zero_point
    else:
        codes, scale, zero_point = layer.weight_codes, layer.weight_scale, layer.weight_zero_point
        if not form.group_size:
            scale = _row_scale(layer)
            zero_point = None if zero_point is None else zero_point.reshape(-1, 1).expand_as(scale).contiguous()
    block = form.group_size or form.columns
    return FourBitWeight(codes, scale.contiguous(), format, size, block, torch.float32, zero_point=zero_point)


def _packed_bytes(codes: Tensor) -> Tensor:
    """int8 ``[O, K]`` as int32 ``[O, ceil(K / 4)]``: code i + 128 in bits 8 (i mod 4)."""
    unsigned = codes.contiguous().view(torch.uint8).bitwise_xor(0x80)
    return F.pad(unsigned, (0, -codes.shape[1] % 4)).view(torch.int32)


def _input_scale(layer: nn.Module) -> Tensor:
    own = getattr(layer, "input_scale", None)
    return layer.input_fake_quant.scale if own is None else own


def _bitsandbytes_tensors(layer: nn.Module, form: _Form, name: str) -> dict[str, Tensor]:
    return {
        f"{name}.weight": layer.weight_codes,
        f"{name}.SCB": _row_scale(layer).flatten() * 127,
        f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


# ---- config.json -----------------------------------------------------------------------------------------------------


def _config(model: nn.Module, tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What transformers would write of the model; of another model nothing."""
    own = getattr(model, "config", None)
    if not hasattr(own, "to_json_string"):
        return {}
    config = json.loads(own.to_json_string(use_diff=True))
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    float_types = [tensor.dtype for name, tensor in tensors.items() if _is_parameter_of_float(name, tensor)]
    if float_types:
        config["dtype"] = str(float_types[0]).removeprefix("torch.")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if any(layer is head for layer in layers.values()):
        config["tie_word_embeddings"] = False  # a tied one would be read from the embedding
    return config


def _is_parameter_of_float(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not name.endswith((".weight_scale", ".input_scale", ".SCB"))


def _compressed_config(forms: Mapping[str, _Form], kept: list[str]) -> dict[str, Any]:
    groups: dict[tuple[str, str], list[str]] = {}  # the arguments as JSON and the format -> names
    for name, form in forms.items():
        key = json.dumps(_arguments(form)), "int-quantized" if form.input else "pack-quantized"
        groups.setdefault(key, []).append(name)
    formats = {format for _, format in groups}
    several = len(groups) > 1
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": kept,
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{number}": {
                "targets": names if several else ["Linear"],
                **json.loads(arguments),
                **({"format": format} if several else {}),
            }
            for number, ((arguments, format), names) in enumerate(groups.items())
        },
    }


def _arguments(form: _Form) -> dict[str, Any]:
    """A group of the config: its weights and input_activations."""
    weights = {
        "num_bits": form.bits,
        "type": "int",
        "symmetric": form.symmetric,
        "strategy": "group" if form.group_size else "channel",
        "dynamic": False,
    }
    if form.group_size:
        weights["group_size"] = form.group_size
    inputs = {
        "num_bits": 8,
        "type": "int",
        "symmetric": form.input_symmetric,
        "strategy": form.input,
        "dynamic": form.input == "token",
    }
    return {"weights": weights, "input_activations": inputs if form.input else None}


def _bitsandbytes_config(forms: Mapping[str, _Form], kept: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": float(next(iter(forms.values())).threshold),  # one for all; 0: no outlier columns
        "llm_int8_skip_modules": kept,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
