"""Decoding with int8 blocks and int8 keys and values, a token a step, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantrain import _C
from quantrain.kv_cache import Int8KvCache

from .int8_blocks import Int8Block

__all__ = ["Int8Decoder"]

_TRIAL_TOKENS = 8
_LARGEST_ERROR = 0.1  # relative, of logits: keys and values are rounded, the model's own are not


class Int8Decoder:
    """A causal language model of transformers (Llama's relatives, GPT-2) whose blocks :func:`convert` has fused.

    Keys and values are int8 with one scale per token and head, of fixed capacity. A step of one token for each sequence is
    captured as a CUDA graph where it is first run; on the CPU it runs plainly. Few rows go through the weight-only
    products where the recipe says so (``w8a16``, ``gptq-w4a16``, ``zeroquant-w8a8`` with ``few_rows``), a prompt's many
    through the integer ones.

    Args:
        model: in evaluation mode, converted, with all of its blocks fused.
        batch: sequences that are decoded side by side, all as long.
        capacity: tokens that a sequence can have, the prompt's among them.
        captured: False runs every step plainly.

    Raises:
        ValueError: a model whose blocks are not all fused, that has no head, or that computes something besides its blocks,
            embeddings, last norm and head; a capacity beyond its positions or its window; a sequence beyond the capacity.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> import quantrain.nn as qnn
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    >>> model = qnn.convert(qnn.prepare(LlamaForCausalLM(config).eval(), "zeroquant-w8a8"))
    >>> Int8Decoder(model, capacity=16).generate(torch.tensor([[1, 2, 3]]), 4).shape
    torch.Size([1, 4])
    """

    def __init__(self, model: nn.Module, *, batch: int = 1, capacity: int = 2048, captured: bool = True) -> None:
        for name, value in (("batch", batch), ("capacity", capacity)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Int8Decoder: expected a {name} of 1 or more, got {value!r}")
        self.model, self.batch, self.capacity, self.captured = model, batch, capacity, captured
        self.blocks = [module for module in model.modules() if isinstance(module, Int8Block)]
        self.base = getattr(model, "base_model", model)
        norms = (norm for name in ("norm", "ln_f") if (norm := getattr(self.base, name, None)) is not None)
        self.norm = next(norms, None)
        _check_model(self)
        weight = self.norm.weight
        self.device, self.dtype = weight.device, weight.dtype
        options = [block._int8_plan.options for block in self.blocks]
        self.caches = [
            Int8KvCache.zeros(batch, of["kv_heads"], capacity, _head_size(block), self.device)
            for block, of in zip(self.blocks, options, strict=True)
        ]
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)  # of the next token
        self.length = 0  # the same, known to the host
        self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        _check_logits(self)

    def reset(self) -> None:
        """Forgets all tokens."""
        self.position.zero_()
        self.length = 0

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Reads the tokens ``ids`` ``[B, T]`` after those before; logits ``[B, V]`` of the one that follows."""
        self._check_ids(ids)
        self._take(ids.shape[1])
        logits = self._run(ids.to(self.device))
        self.position += ids.shape[1]
        return logits

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """One more token for each sequence, ids ``[B]``; logits ``[B, V]``, overwritten by the next step."""
        if not isinstance(ids, Tensor) or tuple(ids.shape) != (self.batch,):
            raise ValueError(f"Int8Decoder: expected ids [B] of {self.batch} sequences, got {_text(ids)}")
        self._take(1)
        self._ids.copy_(ids.view(-1, 1), non_blocking=True)
        if self.device.type != "cuda" or not self.captured:
            return self._step()
        if self._graph is None:
            self._capture()
        self._graph.replay()
        return self._logits

    def generate(self, ids: Tensor, new_tokens: int, choose: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """New tokens ``[B, new_tokens]`` after the prompt ``ids`` ``[B, T]``.

        choose: logits ``[B, V]`` to ids ``[B]``; None: the likeliest. Nothing waits for the device with it.
        """
        if isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or new_tokens < 1:
            raise ValueError(f"Int8Decoder: expected new_tokens of 1 or more, got {new_tokens!r}")
        self._check_ids(ids)
        if ids.shape[1] + new_tokens - 1 > self.capacity:
            raise ValueError(
                f"Int8Decoder: expected a prompt and {new_tokens} new tokens within the capacity of {self.capacity}, "
                f"got a prompt of {ids.shape[1]}"
            )
        choose = choose or (lambda logits: logits.argmax(-1))
        self.reset()
        found = [choose(self.prefill(ids))]
        while len(found) < new_tokens:
            found.append(choose(self.step(found[-1])))
        return torch.stack(found, dim=1)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(cache.nbytes for cache in self.caches)

    def _check_ids(self, ids: Tensor) -> None:
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != self.batch or ids.shape[1] < 1:
            raise ValueError(
                f"Int8Decoder: expected ids [B, T] of {self.batch} sequences (batch={self.batch}), got {_text(ids)}"
            )
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"Int8Decoder: expected ids of integers, got {ids.dtype}")
        vocabulary = self.model.get_input_embeddings().num_embeddings
        if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(
                f"Int8Decoder: expected ids from 0 to {vocabulary - 1}, got some from {int(ids.min())} to {int(ids.max())}"
            )

    def _take(self, tokens: int) -> None:
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"Int8Decoder: expected at most {self.capacity} tokens, got {self.length} and {tokens} more"
            )
        self.length += tokens

    def _step(self) -> Tensor:
        logits = self._run(self._ids)
        self.position += 1
        return logits

    def _run(self, ids: Tensor) -> Tensor:
        places = self.position + torch.arange(ids.shape[1], device=self.device)
        hidden = self.model.get_input_embeddings()(ids)
        if (table := getattr(self.base, "wpe", None)) is not None:
            hidden = hidden + table(places)
        cos = sin = None
        if (rotary := getattr(self.base, "rotary_emb", None)) is not None:
            cos, sin = rotary(hidden, places[None])
        for block, cache in zip(self.blocks, self.caches, strict=True):
            hidden = _layer_of(block).step(hidden, cos, sin, *cache.tensors, self.position, None)
        return self.model.get_output_embeddings()(self.norm(hidden[:, -1:]))[:, 0]

    def _capture(self) -> None:
        aside = torch.cuda.Stream(self.device)
        before = self.position.clone()
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for _ in range(2):  # lazy initialisation may not be captured; what is kept is written over
                self._step()
                self.position.copy_(before)
        torch.cuda.current_stream(self.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._step()
        self._graph = graph


def _layer_of(block: Int8Block) -> _C.Int8TransformerCall:
    if (layer := block._kept_layer(True)) is None:
        raise ValueError(
            f"Int8Decoder: expected blocks that run as one call, got a {type(block).__name__} of which a module was "
            "replaced, wrapped or given a hook"
        )
    return layer


def _head_size(block: Int8Block) -> int:
    _layer_of(block)
    options, form = block._int8_plan.options, block._int8_plan.form
    layers = [block.get_submodule(path) for path in form.qkv]
    return sum(layer.out_features for layer in layers) // (options["heads"] + 2 * options["kv_heads"])


def _text(ids: object) -> str:
    return f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"


def _check_model(decoder: Int8Decoder) -> None:
    """Raises where the parts of a causal language model are not there, or keep fewer positions than asked for."""
    model, name = decoder.model, type(decoder.model).__name__
    config = getattr(model, "config", None)
    layers = getattr(config, "num_hidden_layers", None)
    if layers is None or decoder.norm is None:
        raise ValueError(
            f"Int8Decoder: expected one of transformers' decoders (Llama's relatives, GPT-2), got a {name}"
        )
    if len(decoder.blocks) != layers:
        raise ValueError(
            f"Int8Decoder: expected a causal language model of {layers} fused blocks, got {len(decoder.blocks)} of them in "
            f"a {name} (model.quantization_summary says why a block is not)"
        )
    if not model.get_output_embeddings():
        raise ValueError(f"Int8Decoder: expected a model with a head over its vocabulary, got a {name}, which has none")
    if model.training:
        raise ValueError(f"Int8Decoder: expected a model in evaluation mode, got a {name} that trains (call eval())")
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window and decoder.capacity > window and (not kinds or "sliding_attention" in kinds):
        raise ValueError(
            f"Int8Decoder: expected a capacity within the model's sliding window of {window} tokens, got {decoder.capacity}"
        )
    table = getattr(decoder.base, "wpe", None)
    if table is not None and decoder.capacity > table.num_embeddings:
        raise ValueError(
            f"Int8Decoder: expected a capacity of at most the model's {table.num_embeddings} positions, got {decoder.capacity}"
        )


@torch.no_grad()
def _check_logits(decoder: Int8Decoder) -> None:
    """Raises where a short prompt's logits are not the model's own, which may scale or cap what the decoder does not know."""
    vocabulary = decoder.model.get_input_embeddings().num_embeddings
    tokens = min(_TRIAL_TOKENS, decoder.capacity)
    ids = torch.randint(vocabulary, (decoder.batch, tokens), generator=torch.Generator().manual_seed(0)).to(
        decoder.device
    )
    expected = decoder.model(ids, use_cache=False).logits[:, -1].float()
    error = float((decoder.prefill(ids).float() - expected).norm() / expected.norm())
    decoder.reset()
    if not error < _LARGEST_ERROR:
        raise ValueError(
            f"Int8Decoder: expected logits within {_LARGEST_ERROR} of the model's own, got {error:.2g}: a "
            f"{type(decoder.model).__name__} computes something besides embeddings, blocks, last norm and head"
        )
