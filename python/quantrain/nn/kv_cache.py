"""Keys and values of attention as int8 codes, for transformers' models (the extra ``hf``).

One scale per (token, KV head), symmetric, without calibration: ``absmax / 127`` of the head's vector, as
:func:`quantrain.int8_quantize_rows` gives them. A token takes D + 4 bytes per head instead of 4 D (float32) or 2 D
(16 bits). What is read back is dequantized into the model's type, so every attention implementation works.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantrain._arguments import float_name

try:
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'Int8Cache: expected the package transformers, got none (pip install "quantrain[hf]")'
    ) from error

__all__ = ["Int8Cache", "Int8CacheLayer", "use_int8_cache"]


@dataclass
class _Rows:
    """codes int8 ``[B, H, T, D]`` and scale float32 ``[B, H, T, 1]``, which stand for values of type ``dtype``."""

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype

    @staticmethod
    def of(values: Tensor) -> _Rows:
        return _Rows(*torch.ops.quantrain.int8_quantize_rows.nearest(values), values.dtype)

    def values(self) -> Tensor:
        name = float_name("Int8Cache", self.dtype)
        return torch.ops.quantrain.dequantize.typed(self.codes, self.scale, None, dtype=name)

    def append(self, values: Tensor) -> None:
        new = _Rows.of(values)
        self.codes = torch.cat([self.codes, new.codes], dim=-2)
        self.scale = torch.cat([self.scale, new.scale], dim=-2)
        self.dtype = new.dtype

    def change(self, rule: Callable[[Tensor], Tensor]) -> None:
        """``rule`` moves rows, which are the same ones of codes and scale."""
        self.codes, self.scale = rule(self.codes), rule(self.scale)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


class Int8CacheLayer(DynamicLayer):
    """The keys and values of one layer of a model. ``keys`` and ``values`` read as floats ``[B, H, T, D]``."""

    _keys: _Rows | None = None
    _values: _Rows | None = None

    @property
    def keys(self) -> Tensor | None:
        return None if self._keys is None else self._keys.values()

    @keys.setter
    def keys(self, values: Tensor | None) -> None:
        self._keys = None if values is None else _Rows.of(values)

    @property
    def values(self) -> Tensor | None:
        return None if self._values is None else self._values.values()

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._values = None if values is None else _Rows.of(values)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends ``[B, H, T, D]`` and gives all that is held, rounded: the new tokens too, so that a prompt read at
        once and one read by tokens are the same.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._keys.append(key_states)
        self._values.append(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0 if self._keys is None else self._keys.codes.shape[-2]

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last tokens; the number is negative, as transformers has it."""
        if tokens_to_remove > 0:
            raise ValueError(f"Int8Cache: expected crop of a negative number of tokens, got {tokens_to_remove}")
        if tokens_to_remove < 0:
            self._change(lambda rows: rows[..., :tokens_to_remove, :])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda rows: rows[indices.to(rows.device), ...])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def offload(self) -> None:
        self._change(lambda rows: rows.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._change(lambda rows: rows.to(self.device, non_blocking=True))

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in (self._keys, self._values) if rows is not None)

    def _change(self, rule: Callable[[Tensor], Tensor]) -> None:
        for rows in (self._keys, self._values):
            if rows is not None:
                rows.change(rule)


class Int8Cache(Cache):
    """A cache of int8 keys and values for ``model.generate`` and forward passes, a layer at the first use of each.

    One per sequence of calls, as transformers' ``DynamicCache``; it grows without a limit, crops, and reorders for beam
    search. A layer with a sliding window keeps every token, and its mask hides the old ones. Layers without keys and
    values (linear attention) are refused by transformers. A scale is of one token and KV head, so what a token reads
    back does not depend on other tokens. A vector with NaN or Inf reads back as NaN.

    Source: vLLM's ``int8_per_token_head`` has the same scales. On SmolLM2-135M the logits of a float model change by a
    KL divergence of 6e-4.

    >>> cache = Int8Cache()
    >>> keys, values = cache.update(torch.randn(1, 2, 3, 64), torch.randn(1, 2, 3, 64), layer_idx=0)
    >>> keys.shape, cache.get_seq_length(), cache.nbytes
    (torch.Size([1, 2, 3, 64]), 3, 816)
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=Int8CacheLayer)

    @property
    def nbytes(self) -> int:
        """Bytes of all codes and scales."""
        return sum(layer.nbytes for layer in self.layers)


class _GiveInt8Cache:
    """A forward pre-hook: an Int8Cache where the caller gave no cache, or an empty one of transformers' own kind."""

    def __init__(self, argument: str, position: int) -> None:
        self.argument, self.position = argument, position  # of forward, without self

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if model.training or getattr(model.config, "use_cache", None) is False:
            return None
        positional = len(args) > self.position
        cache = args[self.position] if positional else kwargs.get(self.argument)
        if isinstance(cache, Int8Cache):
            return None
        if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length() > 0):
            raise ValueError(
                f"{type(model).__name__}: expected {self.argument} of type Int8Cache, an empty DynamicCache or none under "
                f"a recipe whose kv_cache is int8, got {type(cache).__name__} of {cache.get_seq_length()} tokens"
            )
        if positional:
            return (*args[: self.position], Int8Cache(), *args[self.position + 1 :]), kwargs
        return args, kwargs | {self.argument: Int8Cache()}


def use_int8_cache(model: nn.Module) -> None:
    """Lets a transformers model hold its keys and values in an :class:`Int8Cache`, in ``generate`` and in every call.

    In evaluation mode a call without a cache, or with an empty ``DynamicCache``, gets an Int8Cache: a pass over a prompt
    then reads rounded keys and values too, as the tokens after it will. In training, and where ``config.use_cache`` is
    False, nothing changes. Recipes whose scheme has ``kv_cache="int8"`` (``kv-int8``) do this in
    :func:`quantrain.nn.prepare`.

    Raises:
        ValueError: a model whose ``forward`` takes no cache.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model = LlamaForCausalLM(config).eval()
    >>> use_int8_cache(model)
    >>> type(model(torch.tensor([[1, 2, 3]])).past_key_values).__name__
    'Int8Cache'
    """
    if any(isinstance(hook, _GiveInt8Cache) for hook in model._forward_pre_hooks.values()):
        return
    names = list(inspect.signature(model.forward).parameters)
    argument = next((name for name in ("past_key_values", "cache") if name in names), None)
    if argument is None or not hasattr(model, "config"):
        raise ValueError(
            "use_int8_cache: expected a model of transformers whose forward takes a cache of keys and values, got "
            f"{type(model).__name__}"
        )
    model.register_forward_pre_hook(_GiveInt8Cache(argument, names.index(argument)), with_kwargs=True)
