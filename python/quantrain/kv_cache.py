"""Keys and values of attention kept as int8 codes of fixed capacity, for decoding token by token.

One scale per token and key head, without calibration: absmax / 127 of the head's vector, as :func:`quantrain.int8_quantize_rows` gives it.
Codes are ``[B, Hk, capacity, D]``, scales ``[B, Hk, capacity]``. Where new tokens go is read on the device, so that a step is captured as
a CUDA graph. No gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Int8KvCache", "kv_cache_append_", "kv_cache_attention"]

_ops = torch.ops.quantrain


@dataclass
class Int8KvCache:
    """The codes and scales of a layer.

    >>> Int8KvCache.zeros(1, 2, 16, 64).nbytes
    4352
    """

    key_codes: Tensor
    key_scale: Tensor
    value_codes: Tensor
    value_scale: Tensor

    @classmethod
    def zeros(
        cls, batches: int, key_heads: int, capacity: int, size: int, device: torch.device | str | None = None
    ) -> Int8KvCache:
        """An empty cache: codes of 0 and scales of 1."""
        codes = [torch.zeros(batches, key_heads, capacity, size, dtype=torch.int8, device=device) for _ in range(2)]
        scales = [torch.ones(batches, key_heads, capacity, device=device) for _ in range(2)]
        return cls(codes[0], scales[0], codes[1], scales[1])

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.key_codes, self.key_scale, self.value_codes, self.value_scale

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def kv_cache_append_(
    qkv: Tensor, cache: Int8KvCache, position: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
) -> None:
    """Rotates queries and keys in place and keeps the new tokens' keys and values.

    Args:
        qkv: ``[B, T, heads + 2 Hk, D]``, float32, float16 or bfloat16: queries, keys, values.
        position: int64, one element or B, on qkv's device: where the first new token goes. What lies past the capacity is
            not kept.
        cos, sin: ``[B or 1, T, D]``, as :func:`quantrain.rotate_heads_` takes them; None: nothing is rotated.

    >>> cache = Int8KvCache.zeros(1, 1, 4, 2)
    >>> kv_cache_append_(torch.tensor([[[[1.0, 0.0], [2.0, -1.0], [0.5, 0.5]]]]), cache, torch.tensor([1]))
    >>> cache.key_codes[0, 0].tolist()
    [[0, 0], [127, -64], [0, 0], [0, 0]]
    """
    _ops.kv_cache_append_(qkv, *cache.tensors, position, cos, sin)


def kv_cache_attention(
    q: Tensor, cache: Int8KvCache, position: Tensor, *, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Attention to int8 keys and values, softmax(scale q k^T) v: token t sees what is kept up to ``position + t``.

    Args:
        q: ``[B, T, H, D]``; head h reads key head h / (H / Hk).
        mask: bool ``[B, capacity]``, False where nothing attends to a token (left padding).

    >>> cache = Int8KvCache.zeros(1, 1, 4, 2)
    >>> kv_cache_append_(torch.tensor([[[[1.0, 0.0], [2.0, -1.0], [0.5, 0.5]]]]), cache, torch.tensor([0]))
    >>> kv_cache_attention(torch.ones(1, 1, 1, 2), cache, torch.tensor([0]), scale=1.0)
    tensor([[[[0.5000, 0.5000]]]])
    """
    return _ops.kv_cache_attention(q, *cache.tensors, position, scale=scale, mask=mask)
