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


_ARGUMENTS = ("past_key_values", "cache")  # of forward, in older and newer releases of transformers


class _Int8CacheHooks:
    """What :func:`use_int8_cache` hangs on a model: before a call its cache becomes one of int8, and after it a cache
    that nobody asked for is taken from the result.

    Attributes:
        argument: the cache's name among forward's arguments; position: its place, without self.
        off: > 0 where calls are left alone (while blocks are calibrated one by one).
    """

    gives_int8_cache = True

    def __init__(self, argument: str, position: int) -> None:
        self.argument, self.position, self.off = argument, position, 0
        self._hidden: list[bool] = []  # of the calls under way: whether their cache is theirs alone

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._hidden.append(False)
        if model.training or self.off:
            return args, kwargs
        if len(args) > self.position and args[self.position] is not None:
            _become_int8(model, args[self.position])
            return args, kwargs
        given = next((kwargs[name] for name in _ARGUMENTS if kwargs.get(name) is not None), None)
        if given is not None:
            _become_int8(model, given)
            return args, kwargs
        wanted = kwargs.get("use_cache")
        self._hidden[-1] = not (getattr(model.config, "use_cache", False) if wanted is None else wanted)
        kwargs = {name: value for name, value in kwargs.items() if name not in _ARGUMENTS}
        if len(args) > self.position:
            return (*args[: self.position], Int8Cache(), *args[self.position + 1 :]), kwargs
        return args, kwargs | {self.argument: Int8Cache()}

    def after(self, model: nn.Module, args: tuple, output: Any) -> Any:
        if not self._hidden.pop() or output is None:
            return None
        if isinstance(output, tuple):
            return tuple(part for part in output if not isinstance(part, Int8Cache))
        return type(output)(**{name: part for name, part in output.items() if not isinstance(part, Int8Cache)})


def _become_int8(model: nn.Module, cache: Any) -> None:
    """Lets an empty DynamicCache, which is the caller's, hold int8 from now on."""
    if isinstance(cache, Int8Cache):
        return
    layers = getattr(cache, "layers", ())
    mine = bool(layers) and all(isinstance(layer, Int8CacheLayer) for layer in layers)
    if mine or (type(cache) is DynamicCache and getattr(cache, "layer_class_to_replicate", None) is Int8CacheLayer):
        return
    if type(cache) is not DynamicCache or cache.get_seq_length() > 0:
        held = cache.get_seq_length() if isinstance(cache, Cache) else "unknown"
        raise ValueError(
            f"{type(model).__name__}: expected a cache of type Int8Cache, an empty DynamicCache or none under a recipe "
            f"whose kv_cache is int8, got {type(cache).__name__} of {held} tokens"
        )
    cache.layers = [Int8CacheLayer() for _ in layers]
    cache.layer_class_to_replicate = Int8CacheLayer


def check_int8_cache(model: nn.Module) -> tuple[str, int]:
    """The name and the place of the cache among the arguments of ``model.forward``.

    Raises:
        ValueError: a model without keys and values to hold, or with a cache of another kind (encoder and decoder).
    """
    names, config = list(inspect.signature(model.forward).parameters), getattr(model, "config", None)
    argument = next((name for name in _ARGUMENTS if name in names), None)
    if argument is None or getattr(config, "num_attention_heads", None) is None or config.is_encoder_decoder:
        raise ValueError(
            "use_int8_cache: expected a decoder of transformers whose forward takes a cache of keys and values, got "
            f"{type(model).__name__}"
        )
    return argument, names.index(argument)


def use_int8_cache(model: nn.Module) -> None:
    """Lets a transformers decoder hold its keys and values as int8 codes, in ``generate`` and in every call.

    In evaluation mode a call without a cache gets an :class:`Int8Cache`, also where it asks for none (``use_cache=False``),
    which then is not given back: a pass over a prompt reads rounded keys and values, as the tokens after it will. An
    empty ``DynamicCache`` of the caller's holds int8 from then on. In training nothing changes. There are no gradients
    through the codes. Recipes whose scheme has ``kv_cache="int8"`` (``kv-int8``) do this in
    :func:`quantrain.nn.prepare`.

    Raises:
        ValueError: a model whose ``forward`` takes no cache of keys and values, or that has an encoder beside a decoder;
            in a call, a cache of another kind, or one that holds tokens already.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model = LlamaForCausalLM(config).eval()
    >>> use_int8_cache(model)
    >>> type(model(torch.tensor([[1, 2, 3]])).past_key_values).__name__
    'Int8Cache'
    """
    argument, position = check_int8_cache(model)
    if any(getattr(hook, "__self__", None).__class__ is _Int8CacheHooks for hook in model._forward_pre_hooks.values()):
        return
    hooks = _Int8CacheHooks(argument, position)
    model.register_forward_pre_hook(hooks.before, with_kwargs=True)
    model.register_forward_hook(hooks.after, always_call=True)
