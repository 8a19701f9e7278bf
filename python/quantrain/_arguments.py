"""Arguments as people write them, as operators take them. Everything else raises, in the operator's name."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# The types that operators take by name: a program packed by AOTInductor gets a ScalarType wrong in torch 2.11.
_TYPE_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.int16: "int16",
    torch.int32: "int32",
}


_LARGEST = torch.finfo(torch.float32).max


def is_number(value: Any) -> bool:
    """Whether it is an integer or a real number, NumPy's too; tensors and bools are not."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return not isinstance(value, bool)
    return isinstance(value, numbers.Real)


def integer(op: str, name: str, value: Any) -> int:
    """``value`` where it is an integer of any kind, NumPy's too."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: expected {name} to be an integer, got {value!r}") from None


FLOATS = ("float32", "float16", "bfloat16")
REALS = (*FLOATS, "float64")
CODES = ("int8", "uint8", "int16", "int32")


def type_name(op: str, name: str, dtype: Any, allowed: tuple[str, ...]) -> str:
    """The name of an element type, one of those allowed."""
    found = _TYPE_NAMES.get(dtype) if isinstance(dtype, torch.dtype) else None
    if found not in allowed:
        raise TypeError(f"{op}: expected {name} to be one of {', '.join(allowed)}, got {dtype!r}")
    return found


def float_name(op: str, dtype: torch.dtype) -> str:
    """The name of a type that results may have."""
    return type_name(op, "dtype", dtype, REALS)


def tensor(op: str, name: str, value: Any) -> Tensor:
    """``value`` where it is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: expected a dense {name}, got layout {value.layout}")
    return value


def parameter(
    op: str,
    name: str,
    value: Any,
    input: Tensor,
    axis: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    shape: torch.Size | tuple[int, ...] = (1,),
) -> Tensor:
    """A scale, zero point, shift or fraction length: a number as a tensor of ``dtype`` and ``shape`` made
    on the input's device without a copy from the host; a 1-D tensor with ``axis`` in the rank of ``input``; any other
    tensor as it is."""
    if is_number(value):
        if not dtype.is_floating_point:
            value = integer(op, name, value)
            if abs(value) >= 2**31:
                raise ValueError(f"{op}: expected {name} to fit int32, got {value}")
        elif not isinstance(value, (torch.SymInt, torch.SymFloat)):
            if abs(value) > _LARGEST and value not in (math.inf, -math.inf):
                raise ValueError(f"{op}: expected {name} to fit float32, got {value}")
            value = float(value)
        return torch.full(shape, value, dtype=dtype, device=input.device)
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor or a number, got {type(value).__name__}")
    if axis is None:
        return value
    axis = integer(op, "axis", axis)
    if not -input.dim() <= axis < input.dim():
        raise ValueError(f"{op}: expected axis in [{-input.dim()}, {input.dim() - 1}], got {axis}")
    if value.dim() != 1:
        raise ValueError(f"{op}: expected a 1-D {name} with axis, got shape {list(value.shape)}")
    sizes = [1] * input.dim()
    sizes[axis] = value.shape[0]
    return value.reshape(sizes)


def qparams(
    op: str, input: Tensor, scale: Tensor | float, zero_point: Tensor | int | None, axis: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """input, scale and zero_point as tensors, 1-D ones of dimension ``axis`` in the rank of ``input``."""
    tensor(op, "input", input)
    scale = parameter(op, "scale", scale, input, axis)
    if zero_point is not None:
        along = axis if isinstance(zero_point, Tensor) and zero_point.dim() > 0 else None
        zero_point = parameter(op, "zero_point", zero_point, input, along, dtype=torch.int32, shape=scale.shape)
    return input, scale, zero_point


def code_range(op: str, quant_min: int, quant_max: int) -> dict[str, int]:
    """quant_min and quant_max as keyword arguments of an operator."""
    return {
        "quant_min": integer(op, "quant_min", quant_min),
        "quant_max": integer(op, "quant_max", quant_max),
    }


def pair(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size
