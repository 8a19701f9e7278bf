"""rotate: a decoder of Llama's kind in rotated coordinates, the same function with its outliers spread over all columns.

Rows are vectors here: a weight ``[O, K]`` takes x to x W^T. The residual stream x becomes x R1 everywhere, so that

* a layer that reads it has W R1, after the gain of the norm before it is multiplied into W's columns: an RMSNorm whose
  gain is 1 gives for x R1 what it gives for x, rotated;
* a layer that writes to it has R1^T W and the bias b R1, the embedding's rows are multiplied by R1;
* between v_proj and o_proj each head's values are multiplied by R2, as the weights of attention only mix tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantrain.nn import QuantizedLayer, QuantLayer
from quantrain.nn.calibrate import evaluating
from quantrain.nn.prepare import check_model

__all__ = ["check_rotation", "rotate"]

_READERS = {  # of what each norm of a block gives
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_INSIDE_HEADS = ("self_attn.q_norm", "self_attn.k_norm")  # after q_proj and k_proj, where nothing is rotated
# of the logits' norm: SmolLM2 differs by 4e-7 (transformers' norms are float32 in every model), 3e-6, 6e-3 and 0.05
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
_ROWS = 2048  # of a vocabulary at a time in float64
_NORM_EPS = 0.05  # an RMSNorm's eps moves rows of mean square 2 by far less


def rotate(model: nn.Module, *, seed: int = 0, heads: bool = True) -> nn.Module:
    """Merges rotations into the weights of a float decoder, in place: the function stays, its activations lose their
    outlier columns, so that one scale per token suits them (QuaRot, Ashkboos et al., arXiv:2404.00456, section 4.1).

    R1, for the residual stream of width d = 2^a m with m odd, is D (Q (x) H) / 2^(a/2): D random signs, Q a random
    orthogonal matrix m x m, H Sylvester's Hadamard matrix; each layer's R2 is the same for its heads' width. Gains of
    norms go into the linear layers that read them and become 1. Arithmetic in float64, results in each parameter's type:
    weights of 16 bits are rounded once more, so rotate before casting. Nothing runs that did not run before; a saved
    model is one of its class.

    What goes into ``down_proj`` is not rotated, as no weight before it could take the rotation, and keeps its outliers.
    For ``zeroquant-w8a8``; under ``llm-int8`` it gains nothing (docs/transformers.md has figures), and weights of 4 bits in
    groups lose by it.

    A head that is tied to the embedding gets a weight of its own, since it takes the last norm's gain and the embedding
    does not, and ``config.tie_word_embeddings`` becomes False: V x d numbers more. Recipes of scheme ``ptq`` leave it
    float.

    Args:
        model: a causal language model of transformers with the names and shapes of Llama's (Llama, Mistral, Qwen2, Qwen3,
            SmolLM2): RMSNorm before attention and feed-forward, gated feed-forward, biases or none, grouped queries or
            not, norms of queries and keys within the head or none. While it changes, its weights are held twice.
        seed: of a generator on the CPU; the same rotations on every device.
        heads: also R2 in each head of attention; False: R1 alone.

    Returns:
        The model.

    Raises:
        TypeError: not a module.
        ValueError: a model of another kind, naming the first part that does not fit (LayerNorm, norms that multiply by
            1 + weight, scaled embeddings, experts, further parameters, layers that share weights); prepared or quantized
            layers; logits of random tokens that are not finite, or that differ after the change by more than 1e-3 of
            their norm (1e-5 in float64, 0.05 in float16, 0.2 in bfloat16). The model is as it was then.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    >>> model, ids = LlamaForCausalLM(LlamaConfig(**sizes)).eval(), torch.arange(8)[None]
    >>> before = model(ids).logits
    >>> bool((rotate(model)(ids).logits - before).abs().max() < 1e-4)
    True
    """
    check_model("rotate", model)
    decoder = check_rotation(model)
    generator = torch.Generator().manual_seed(seed)
    before = _logits(model, decoder)
    if not bool(torch.isfinite(before).all()):
        raise ValueError("rotate: expected finite logits of the float model, got NaN or Inf")
    with torch.no_grad(), _unchanged_after_errors(model, decoder):
        _untie(model, decoder)
        _rotate(decoder, generator, heads)
        _check_logits(_logits(model, decoder), before, decoder)
    return model


# ---- what the model is -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """parts: by the names of _READERS and _WRITERS."""

    parts: dict[str, nn.Module]
    head_dim: int


@dataclass(frozen=True)
class _Decoder:
    embedding: nn.Embedding
    blocks: list[_Block]
    norm: nn.Module
    head: nn.Linear
    width: int


def check_rotation(model: nn.Module) -> _Decoder:
    """The parts of a model that :func:`rotate` takes; raises for the first that does not fit. Changes nothing."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer | QuantizedLayer):
            raise ValueError(f"rotate: expected a float model, got '{name}' as {type(module).__name__}")
    embedding = _part(model, "model.embed_tokens", nn.Embedding)
    width = embedding.embedding_dim
    known = {"model.embed_tokens", "model.norm", "lm_head"}
    blocks = []
    for index, module in enumerate(_part(model, "model.layers", nn.ModuleList)):
        path = f"model.layers.{index}"
        blocks.append(_block_of(model, path, module, width))
        known |= {f"{path}.{name}" for name in (*blocks[-1].parts, *_INSIDE_HEADS)}
    if not blocks:
        raise ValueError("rotate: expected 'model.layers' to hold blocks, got none")
    norm = _norm(model, "model.norm", width)
    head = _linear(model, "lm_head", inputs=width)
    decoder = _Decoder(embedding, blocks, norm, head, width)
    _check_parameters(model, decoder, known)
    return decoder


def _part(model: nn.Module, path: str, kind: type[nn.Module] = nn.Module) -> Any:
    """The submodule of that path. Of a class and none derived from it: what derives computes something else."""
    module: Any = model
    for name in path.split("."):
        module = getattr(module, name, None)
    if not isinstance(module, nn.Module):
        raise ValueError(f"rotate: expected a part '{path}', as Llama has, got none in {type(model).__name__}")
    if kind is not nn.Module and type(module) is not kind:
        raise ValueError(f"rotate: expected '{path}' to be an nn.{kind.__name__}, got {type(module).__name__}")
    return module


def _linear(model: nn.Module, path: str, *, inputs: int | None = None, outputs: int | None = None) -> nn.Linear:
    layer = _part(model, path, nn.Linear)
    for what, size, wanted in (("columns", layer.in_features, inputs), ("rows", layer.out_features, outputs)):
        if wanted is not None and size != wanted:
            raise ValueError(f"rotate: expected '{path}' to have {wanted} {what}, got {size}")
    return layer


def _norm(model: nn.Module, path: str, width: int) -> nn.Module:
    """A module that gives x / sqrt(mean(x^2) + eps) * weight, by what it computes: names of classes say too little."""
    norm = _part(model, path)
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != (width,) or len(list(norm.parameters())) != 1:
        raise ValueError(f"rotate: expected '{path}' to be an RMSNorm of {width} weights alone, got {norm!r}")
    if weight.is_meta:
        return norm
    x = (1 + torch.randn(4, width, generator=torch.Generator().manual_seed(0))).to(weight)  # of mean 1, for LayerNorm
    with torch.no_grad():
        found = norm(x).double()
        expected = weight.double() * x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    if not float((found - expected).norm()) <= _NORM_EPS * float(expected.norm()):
        raise ValueError(
            f"rotate: expected '{path}' to give x / rms(x) * weight, got something else of {type(norm).__name__}"
        )
    return norm


def _block_of(model: nn.Module, path: str, block: nn.Module, width: int) -> _Block:
    parts: dict[str, nn.Module] = {}
    for norm, readers in _READERS.items():
        parts[norm] = _norm(model, f"{path}.{norm}", width)
        for name in readers:
            parts[name] = _linear(model, f"{path}.{name}", inputs=width)
    for name in _WRITERS:
        parts[name] = _linear(model, f"{path}.{name}", outputs=width)
    q, k, v, o = (parts[f"self_attn.{name}_proj"] for name in "qkvo")
    head_dim = getattr(block.self_attn, "head_dim", None)
    if not isinstance(head_dim, int) or head_dim < 1:
        raise ValueError(f"rotate: expected '{path}.self_attn' to have a head_dim, got {head_dim!r}")
    sizes = (q.out_features, k.out_features, v.out_features, o.in_features)
    if sizes[1] != sizes[2] or sizes[0] != sizes[3] or sizes[0] % sizes[1] or sizes[1] % head_dim:
        raise ValueError(
            f"rotate: expected '{path}.self_attn' to have rows of q_proj as columns of o_proj, those of k_proj as of v_proj, "
            f"and whole heads of {head_dim} in both, got {sizes[0]} and {sizes[3]}, {sizes[1]} and {sizes[2]}"
        )
    return _Block(parts, head_dim)


def _check_parameters(model: nn.Module, decoder: _Decoder, known: set[str]) -> None:
    """Parameters are those of the known parts, floating point, and each one's own, but for a tied head."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        if owner not in known:
            raise ValueError(f"rotate: expected no parameters but those of Llama's parts, got '{name}'")
        if parameter.is_meta or parameter.dtype not in _TOLERANCE:
            got = "a tensor without data" if parameter.is_meta else str(parameter.dtype).removeprefix("torch.")
            raise ValueError(f"rotate: expected '{name}' to hold float numbers of 16 to 64 bits, got {got}")
        first = owners.setdefault(id(parameter), name)
        if first != name and parameter is not decoder.embedding.weight:
            raise ValueError(f"rotate: expected layers with weights of their own, got '{name}', which is '{first}'")


# ---- the change ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rotation:
    """R = D (Q (x) H_n) / sqrt(n), orthogonal: signs float64 ``[m * n]`` on D's diagonal, mixer Q float64 ``[m, m]``."""

    signs: Tensor
    mixer: Tensor

    @staticmethod
    def drawn(size: int, generator: torch.Generator) -> _Rotation:
        odd = size // (size & -size)
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        q, r = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))
        return _Rotation(signs, q * r.diagonal().sign())  # the signs make Q uniform, whatever LAPACK's convention

    def __call__(self, rows: Tensor) -> Tensor:
        """``rows`` R for float64 ``[..., h * size]``, for each of the h parts of a row."""
        size, odd = len(self.signs), len(self.mixer)
        signs, mixer = self.signs.to(rows.device), self.mixer.to(rows.device)
        parts = (rows.unflatten(-1, (-1, size)) * signs).unflatten(-1, (odd, -1))
        return (_hadamard(mixer.mT @ parts) / math.sqrt(size // odd)).flatten(-3)


def _hadamard(x: Tensor) -> Tensor:
    """x H for ``[..., n]``, n a power of 2: as H of n1 n2 is H of n1 (x) H of n2, by products with 64 columns at most."""
    part = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    while len(part) < min(x.shape[-1], 64):
        part = torch.cat((torch.cat((part, part), 1), torch.cat((part, -part), 1)))
    x = x.unflatten(-1, (-1, len(part))) @ part
    if x.shape[-2] > 1:
        x = _hadamard(x.mT).mT
    return x.flatten(-2)


def _rotate(decoder: _Decoder, generator: torch.Generator, heads: bool) -> None:
    stream = _Rotation.drawn(decoder.width, generator)
    for rows in decoder.embedding.weight.split(_ROWS):
        rows.copy_(stream(rows.double()))
    for block in decoder.blocks:
        values = _Rotation.drawn(block.head_dim, generator) if heads else None
        for norm, readers in _READERS.items():
            gain = block.parts[norm].weight
            for name in readers:
                writes = values if name == "self_attn.v_proj" else None
                _rotate_linear(block.parts[name], gain=gain, reads=stream, writes=writes)
            gain.fill_(1)
        for name in _WRITERS:
            reads = values if name == "self_attn.o_proj" else None
            _rotate_linear(block.parts[name], reads=reads, writes=stream)
    gain = decoder.norm.weight
    for rows in decoder.head.weight.split(_ROWS):
        rows.copy_(stream(rows.double() * gain.double()))
    gain.fill_(1)


def _rotate_linear(
    layer: nn.Linear, *, gain: Tensor | None = None, reads: _Rotation | None = None, writes: _Rotation | None = None
) -> None:
    """W to writes^T W diag(gain) reads, b to b writes."""
    weight = layer.weight.double()
    if gain is not None:
        weight = weight * gain.double()
    if reads is not None:
        weight = reads(weight)
    if writes is not None:
        weight = writes(weight.T).T
        if layer.bias is not None:
            layer.bias.copy_(writes(layer.bias.double()))
    layer.weight.copy_(weight)


def _untie(model: nn.Module, decoder: _Decoder) -> None:
    """The head's own weight, and what transformers keeps of the tie."""
    weight = decoder.head.weight
    if weight.data_ptr() == decoder.embedding.weight.data_ptr():
        decoder.head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    for config in _configs(model):
        config.tie_word_embeddings = False
    if tied := getattr(model, "all_tied_weights_keys", None):  # of transformers 5, made once from the configuration
        model.all_tied_weights_keys = {key: source for key, source in tied.items() if key != "lm_head.weight"}


def _configs(model: nn.Module) -> list[Any]:
    """Those of the model's configurations that say whether the head is tied."""
    found = {id(config): config for config in (getattr(model, "config", None), getattr(model.model, "config", None))}
    return [config for config in found.values() if hasattr(config, "tie_word_embeddings")]


@contextmanager
def _unchanged_after_errors(model: nn.Module, decoder: _Decoder) -> Iterator[None]:
    """Where the body raises, the model is what it was before."""
    before = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    weight, keys = decoder.head.weight, getattr(model, "all_tied_weights_keys", None)
    ties = [(config, config.tie_word_embeddings) for config in _configs(model)]
    try:
        yield
    except BaseException:
        decoder.head.weight = weight
        for parameter, value in before:
            parameter.copy_(value)
        for config, tied in ties:
            config.tie_word_embeddings = tied
        if keys is not None:
            model.all_tied_weights_keys = keys
        raise


# ---- the check -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _logits(model: nn.Module, decoder: _Decoder) -> Tensor:
    """float64 ``[2, 16, V]`` of random tokens. A row's mean is left out: no prediction depends on it."""
    ids = torch.randint(0, decoder.embedding.num_embeddings, (2, 16), generator=torch.Generator().manual_seed(0))
    with evaluating(model):
        logits = model(ids.to(decoder.embedding.weight.device), use_cache=False).logits.double()
    return logits - logits.mean(-1, keepdim=True)


def _check_logits(found: Tensor, before: Tensor, decoder: _Decoder) -> None:
    dtypes = {parameter.dtype for parameter in (decoder.embedding.weight, decoder.head.weight)}
    dtypes |= {part.weight.dtype for block in decoder.blocks for part in block.parts.values()}
    tolerance = max(_TOLERANCE[dtype] for dtype in dtypes)
    error = float((found - before).norm()) / max(float(before.norm()), 1e-30)
    if not error <= tolerance:
        raise ValueError(
            f"rotate: expected the float model's logits to within {tolerance:g} of their norm, got {error:.3g}: not a model "
            "of Llama's kind (it is as it was before)"
        )
