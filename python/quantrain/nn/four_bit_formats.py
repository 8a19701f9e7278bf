"""Weights of 4 bits in the files of others: bitsandbytes, GPTQ, AWQ, compressed-tensors, HQQ; GGUF; PEFT's adapters.

The functions take the tensors of a safetensors file, a dict by name, and the path of a layer in it. They check all of a
layer before they return any of it. Codes and scales are exact; ``docs/four_bit_formats.md`` says what each format keeps.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from quantrain import _C
from quantrain._C import EightBitWeight, FourBitConfig, FourBitWeight, GgufFile, LoraAdapter, LoraWeight

__all__ = [
    "EightBitWeight",
    "FourBitConfig",
    "FourBitWeight",
    "GgufFile",
    "LoraAdapter",
    "LoraWeight",
    "four_bit_layers",
    "from_awq",
    "from_compressed_tensors",
    "from_gptq",
    "from_hqq",
    "load_bitsandbytes",
    "load_four_bit_layers",
    "load_lora_adapter",
    "read_four_bit_config",
    "read_gguf",
    "save_lora_adapter",
    "to_awq",
    "to_bitsandbytes",
    "to_compressed_tensors",
    "to_gptq",
]


def load_bitsandbytes(tensors: Mapping[str, Tensor], prefix: str) -> FourBitWeight:
    """Reads a 4-bit layer of bitsandbytes, its scales compressed ("nested") or not.

    The packed weight may be a view as any element type (``bnb_4bit_quant_storage``), and the names may be flattened
    (``weight_absmax`` for ``weight.absmax``). Layout: bitsandbytes 0.50.2, ``functional.QuantState``.

    Args:
        tensors: of the file, by name.
        prefix: the layer's path, such as ``"model.layers.0.mlp.up_proj"``; ``""`` for the root.

    Returns:
        Format "nf4" or "fp4"; "table" where ``quant_map`` has other values. Where block_size divides K (the last size),
        codes uint8 [..., K / 2] and scale [..., K / block_size]; else both flat. Compressed: scale uint8, scale_scale
        float32 [ceil(scales / 256)], scale_offset [].

    Raises:
        ValueError: naming the tensor or the field of the quant_state, the rule and the value.

    >>> weight = FourBitWeight(torch.full((2, 32), 0x7F, dtype=torch.uint8), torch.ones(2, 1), "nf4", [2, 64], 64)
    >>> load_bitsandbytes(to_bitsandbytes(weight, "up"), "up").size
    [2, 64]
    """
    return _C.load_bitsandbytes(dict(tensors), prefix)


def to_bitsandbytes(weight: FourBitWeight, prefix: str, quant_storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """The tensors that bitsandbytes writes and reads: byte for byte what :func:`load_bitsandbytes` read.

    Args:
        weight: of format "nf4" or "fp4": of another table bitsandbytes would read the name, not the values.
        prefix: the layer's path.
        quant_storage: the element type that the packed weight is a view as.

    Raises:
        ValueError: another format; parts that do not fit each other.

    >>> weight = FourBitWeight(torch.full((2, 32), 0x7F, dtype=torch.uint8), torch.ones(2, 1), "nf4", [2, 64], 64)
    >>> [name for name in to_bitsandbytes(weight, "up")]
    ['up.weight', 'up.weight.absmax', 'up.weight.quant_map', 'up.weight.quant_state.bitsandbytes__nf4']
    """
    return _C.to_bitsandbytes(weight, prefix, quant_storage)


def from_gptq(tensors: Mapping[str, Tensor], prefix: str, version: int, group_size: int = 0) -> FourBitWeight:
    """Reads a GPTQ layer: qweight int32 [K / 8, N], scales [G, N], qzeros int32 [G, N / 8], g_idx int32 [K].

    Args:
        tensors: of the file, by name.
        prefix: the layer's path.
        version: 1 where zero points are stored less one (``checkpoint_format`` "gptq"), 2 where they are not
            ("gptq_v2"). The tensors do not say; :func:`read_four_bit_config` does.
        group_size: needed where the last group is short and there is no g_idx.

    Returns:
        Format "int4" where every zero point is 8 (codes less 8: nothing to store and to subtract), else "uint4" with
        zero_point int32. With act-order the columns are sorted by group, and permutation int64 [K] says how: column j
        of the codes multiplies input column permutation[j].

    Raises:
        ValueError: naming the tensor, the rule and the value.

    >>> weight = FourBitWeight(torch.zeros(8, 16, dtype=torch.uint8), torch.ones(8, 1), "int4", [8, 32], 32, torch.half)
    >>> from_gptq(to_gptq(weight, "up", 1), "up", 1).format
    'int4'
    """
    return _C.from_gptq(dict(tensors), prefix, version, group_size)


def to_gptq(
    weight: FourBitWeight, prefix: str, version: int, group_size: int = 0, round_scale: bool = False
) -> dict[str, Tensor]:
    """The tensors of a GPTQ layer, g_idx among them.

    Args:
        weight: of format "int4" or "uint4" with integer zero points; N and K multiples of 8.
        prefix: the layer's path.
        version: 1 or 2, as in :func:`from_gptq`.
        group_size: the file's, a multiple of block_size whose blocks agree; 0 for block_size.
        round_scale: whether scales may change as they become ``weight.dtype``.

    Raises:
        ValueError: another format; sizes that GPTQ cannot hold; a scale that ``weight.dtype`` does not hold exactly.

    >>> weight = FourBitWeight(torch.zeros(8, 16, dtype=torch.uint8), torch.ones(8, 1), "int4", [8, 32], 32, torch.half)
    >>> to_gptq(weight, "up", 2)["up.qweight"].shape
    torch.Size([4, 8])
    """
    return _C.to_gptq(weight, prefix, version, group_size, round_scale)


def from_awq(tensors: Mapping[str, Tensor], prefix: str, group_size: int = 0) -> FourBitWeight:
    """Reads an AWQ layer of layout "gemm": qweight int32 [K, N / 8], scales [G, N], qzeros int32 [G, N / 8].

    Arguments, result and errors as in :func:`from_gptq`; no permutation. Layout: AutoAWQ 0.2.9,
    ``modules/linear/gemm.py``.

    >>> weight = FourBitWeight(torch.zeros(8, 16, dtype=torch.uint8), torch.ones(8, 1), "int4", [8, 32], 32, torch.half)
    >>> from_awq(to_awq(weight, "up"), "up").block_size
    32
    """
    return _C.from_awq(dict(tensors), prefix, group_size)


def to_awq(weight: FourBitWeight, prefix: str, group_size: int = 0, round_scale: bool = False) -> dict[str, Tensor]:
    """The tensors of an AWQ layer; N a multiple of 8, no permutation. Arguments and errors as in :func:`to_gptq`.

    >>> weight = FourBitWeight(torch.zeros(8, 16, dtype=torch.uint8), torch.ones(8, 1), "int4", [8, 32], 32, torch.half)
    >>> to_awq(weight, "up")["up.qweight"].shape
    torch.Size([32, 1])
    """
    return _C.to_awq(weight, prefix, group_size, round_scale)


def from_compressed_tensors(tensors: Mapping[str, Tensor], prefix: str) -> FourBitWeight:
    """Reads a layer of compressed-tensors, format "pack-quantized" of 4 bits.

    weight_packed int32 [N, ceil(K / 8)]; weight_scale [N, G], [N, 1] or of one element; weight_shape [2]; for
    asymmetric codes weight_zero_point int32 [ceil(N / 8), G]; with act-order weight_g_idx int32 [K].

    Returns:
        Format "int4" without zero points, "uint4" with them; permutation as in :func:`from_gptq`.

    Raises:
        ValueError: naming the tensor, the rule and the value.

    >>> weight = FourBitWeight(torch.zeros(3, 16, dtype=torch.uint8), torch.ones(3, 1), "int4", [3, 32], 32, torch.half)
    >>> from_compressed_tensors(to_compressed_tensors(weight, "up"), "up").size
    [3, 32]
    """
    return _C.from_compressed_tensors(dict(tensors), prefix)


def to_compressed_tensors(
    weight: FourBitWeight, prefix: str, group_size: int = 0, round_scale: bool = False
) -> dict[str, Tensor]:
    """The tensors of a layer in format "pack-quantized", for every N and K. Arguments and errors as in :func:`to_gptq`.

    >>> weight = FourBitWeight(torch.zeros(3, 16, dtype=torch.uint8), torch.ones(3, 1), "int4", [3, 32], 32, torch.half)
    >>> to_compressed_tensors(weight, "up")["up.weight_packed"].shape
    torch.Size([3, 4])
    """
    return _C.to_compressed_tensors(weight, prefix, group_size, round_scale)


def from_hqq(tensors: Mapping[str, Tensor], prefix: str) -> FourBitWeight:
    """Reads an HQQ layer of 4 bits, packing "4bit_u8", axis 1, scales and zero points in floats.

    Returns:
        Format "uint4" with zero_point float32, shaped as scale.

    Raises:
        ValueError: naming the tensor, the rule and the value; axis 0, whose groups lie along the output.

    >>> layer = {"W_q": torch.zeros(1, 64, dtype=torch.uint8), "scale": torch.ones(2, 1), "zero": torch.ones(2, 1)}
    >>> layer |= {"shape": torch.tensor([2, 64]), "group_size": torch.tensor(64)}
    >>> from_hqq(layer, "").zero_point.dtype
    torch.float32
    """
    return _C.from_hqq(dict(tensors), prefix)


def four_bit_layers(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The layers of a file that hold a packed weight, each with its format.

    Returns:
        path -> "bitsandbytes", "gptq", "awq", "compressed-tensors" or "hqq".

    Raises:
        ValueError: a qweight whose scales do not say whether it is GPTQ's or AWQ's.

    >>> weight = FourBitWeight(torch.zeros(8, 16, dtype=torch.uint8), torch.ones(8, 1), "int4", [8, 32], 32, torch.half)
    >>> four_bit_layers(to_awq(weight, "up") | to_gptq(weight, "down", 2))
    {'down': 'gptq', 'up': 'awq'}
    """
    return _C.four_bit_layers(dict(tensors))


def read_four_bit_config(json: str) -> FourBitConfig:
    """What the text of a model's config.json, or of AutoGPTQ's quantize_config.json, says of its format.

    Raises:
        ValueError: no quantization, another method, another number of bits, a layout that is not read here.

    >>> read_four_bit_config('{"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}')
    FourBitConfig(method='gptq', version=1, group_size=128)
    """
    return _C.read_four_bit_config(json)


def load_four_bit_layers(
    tensors: Mapping[str, Tensor], config: FourBitConfig | None = None
) -> dict[str, FourBitWeight]:
    """Every packed layer of a file, by its path.

    Args:
        tensors: of the file, by name.
        config: of :func:`read_four_bit_config`; needed for GPTQ.

    Raises:
        ValueError: a layer that cannot be read, or that is not of the config's format.

    >>> weight = FourBitWeight(torch.zeros(8, 16, dtype=torch.uint8), torch.ones(8, 1), "int4", [8, 32], 32, torch.half)
    >>> list(load_four_bit_layers(to_awq(weight, "up")))
    ['up']
    """
    return _C.load_four_bit_layers(dict(tensors), config)


def read_gguf(path: str | os.PathLike) -> GgufFile:
    """Reads a GGUF file (llama.cpp's) of the types F32, F16, BF16, Q4_0, Q4_1 and Q8_0.

    Every size is checked against the file before anything is read or allocated for it.

    Returns:
        ``metadata`` by key; ``tensors``, the float ones; ``four_bit``, Q4_0 as "int4" and Q4_1 as "uint4" with float32
        zero points; ``eight_bit``, Q8_0 as codes int8 [..., K] and scale [..., K / 32]. All by name, sizes in row-major
        order, which is the reverse of the file's.

    Raises:
        ValueError: naming the file, the tensor or key, the rule and the value.
        RuntimeError: the file cannot be opened.

    >>> read_gguf("/nowhere.gguf")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    RuntimeError: /nowhere.gguf: expected a file that can be read, got No such file or directory
    """
    return _C.read_gguf(os.fspath(path))


def load_lora_adapter(folder: str | os.PathLike) -> LoraAdapter:
    """Reads a LoRA adapter of PEFT: a folder with adapter_model.safetensors and adapter_config.json.

    Returns:
        ``layers``, by the layer's path in the base model: a [r, in] and b [out, r]; ``others``, trained biases and
        modules_to_save, by name; and the settings.

    Raises:
        ValueError: naming the file, the tensor or field, the rule and the value; settings that compute something else
            than ``scaling * b @ a @ x``, such as use_dora or an alpha_pattern.
        RuntimeError: a file cannot be opened.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> save_lora_adapter(folder, LoraAdapter({"up": LoraWeight(torch.ones(2, 8), torch.zeros(4, 2))}, r=2))
    >>> load_lora_adapter(folder).scaling("up")
    4.0
    """
    return _C.load_lora_adapter(os.fspath(folder))


def save_lora_adapter(folder: str | os.PathLike, adapter: LoraAdapter) -> None:
    """Writes an adapter as PEFT does; makes the folder where it is missing.

    Layers of another rank than ``adapter.r`` are named in rank_pattern.

    Raises:
        ValueError: no layers; matrices whose ranks differ; settings out of range.
        RuntimeError: a file cannot be written.

    >>> import tempfile
    >>> layer = LoraWeight(torch.ones(2, 8), torch.zeros(4, 2))
    >>> save_lora_adapter(tempfile.mkdtemp(), LoraAdapter({"up": layer}, r=2, target_modules=["up"]))
    """
    _C.save_lora_adapter(os.fspath(folder), adapter)
