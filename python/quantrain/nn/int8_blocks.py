"""Transformer blocks of a converted model as one call each: :func:`quantrain.int8_transformer_layer`.

``convert`` calls :func:`fuse_int8_blocks`. A block is recognised by its structure (which modules it holds, and where), whatever its class is
called, and taken only if a trial gives what its separate layers give. It keeps its class, modules, hooks and state dict; a call that the
fused layer does not serve (weights of attention asked for, an encoder's states, training, autocast) runs the separate layers as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.dropout import _DropoutNd

from quantrain import _C

from .block_forms import (
    FORMS,
    TORCH_FORM,
    BlockForm,
    NotFused,
    activation_name,
    attention_options,
    check_nothing_else,
    form_of,
    inside,
    layers_of,
    multiplies_codes,
    norm_options,
    product_options,
)
from .block_weights import joined_weights
from .graph import copied
from .quantized import QuantizedLayer

__all__ = ["FusedBlocks", "Int8Block", "fuse_int8_blocks", "unfuse_int8_blocks"]

_LARGEST_ERROR = 0.05  # of what a block adds to its input, between fused and separate: both round to 8 bits
_LARGEST_TRIAL_INPUT = 8.0  # of normal values, and of products of two
_ops = torch.ops.quantrain


_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
# Arguments that change nothing here: positions have become cos and sin, and the cache knows whether it is used.
_IGNORED = frozenset(
    {"output_hidden_states", "use_cache", "position_ids", "cache_position", "return_dict", "encoder_attention_mask"}
)


@dataclass
class _Plan:
    """How a block runs as one call.

    Attributes:
        names: of forward's arguments, in order.
        is_causal: under PyTorch's attention without a mask.
        config: transformers', whose attention implementation may change.
        returns_tuple: as older blocks do.
        layer_idx: of the cache.
        kinds: of the modules that a fused call passes over, by path.
    """

    form: BlockForm
    options: dict[str, Any]
    names: tuple[str, ...]
    is_causal: bool
    config: Any
    returns_tuple: bool
    layer_idx: int | None
    kinds: dict[str, str]


def _kinds(block: nn.Module) -> dict[str, str]:
    kinds = {path: type(module) for path, module in block.named_modules() if path}
    return {path: f"{kind.__module__}.{kind.__qualname__}" for path, kind in kinds.items()}


class Int8Block:
    """Mixed into the class of a block that runs as one call; made by :func:`fuse_int8_blocks`."""

    _int8_plan: _Plan
    _int8_state: _State | None
    _block_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self._int8_call(args, kwargs)
        if call is None:
            return super().forward(*args, **kwargs)
        output = self._run_int8(*call)
        return (output,) if self._int8_plan.returns_tuple else output

    def _int8_call(self, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """(hidden states, mask, (cos, sin) or None, cache or None, causal), or None where the separate layers serve."""
        plan = self._int8_plan
        given = dict(zip(plan.names, args, strict=False))
        given.update(kwargs)
        hidden, mask = given.pop(plan.names[0], None), given.pop("attention_mask", None)
        angles = given.pop("position_embeddings", None)
        cache = None
        for name in _CACHES:
            if (found := given.pop(name, None)) is not None:
                cache = found
        if any(value is not None and value is not False and name not in _IGNORED for name, value in given.items()):
            return None
        if not self._serves(hidden) or (mask is not None and mask.dim() != 4):
            return None
        implementation = _attention_implementation(plan.config)
        if implementation not in ("sdpa", "eager", None) or (cache is not None and plan.layer_idx is None):
            return None
        if cache is not None and hasattr(cache, "self_attention_cache"):
            return None
        if not self._is_usable():
            return None
        return hidden, mask, angles, cache, plan.is_causal and implementation != "eager"

    def _serves(self, hidden: Any) -> bool:
        """Whether one call may take these states, whatever else the block is given."""
        if self.training or not isinstance(hidden, Tensor) or hidden.is_nested or hidden.dim() != 3:
            return False
        if torch.is_grad_enabled() and (hidden.requires_grad or self._trains()):
            return False
        return not torch.is_autocast_enabled(hidden.device.type)

    def _trains(self) -> bool:
        """Whether a parameter that the fused call reads asks for a gradient, which only the separate layers refuse."""
        return any(weight.requires_grad for weight in self.parameters())

    def _is_usable(self) -> bool:
        if torch.compiler.is_compiling():
            return self._usable_compiled()
        return self._current_state().usable

    def _usable_compiled(self) -> bool:
        """As ``_State.usable``, asked once when a graph is traced, and without the storage that layers then share."""
        if self._int8_state is not None and not self._int8_state.current():
            self._int8_state = None
        state = _State(self, share=False) if self._int8_state is None else self._int8_state
        return state.usable

    # What torch.compiler.assume_constant_result sets, without its import of the compiler: dynamo runs the method as it is.
    _usable_compiled._dynamo_marked_constant = True

    def _run_int8(self, hidden: Tensor, mask: Tensor | None, angles: Any, cache: Any, causal: bool) -> Tensor:
        cos, sin = (None, None) if angles is None else angles
        layer = self._compiled_layer(causal) if torch.compiler.is_compiling() else self._int8_state.layer(causal)
        if cache is not None:
            attended = self._attend(layer.qkv(hidden, cos, sin), mask, cache, causal)
            return layer.output(hidden, attended)
        kept = (None, None) if _listened(self._forward_pre_hooks) else _handed_over(hidden)
        output, codes, scale = layer.layer(hidden, mask, cos, sin, *kept)
        if not _listened(self._forward_hooks):  # a hook may write into what it is given, past the version that counts
            _hand_over(output, codes, scale)
        return output

    def _kept_layer(self, causal: bool) -> _C.Int8TransformerCall | None:
        """None where a module inside is another now, or is listened to."""
        state = self._current_state()
        return state.layer(causal) if state.usable else None

    def _current_state(self) -> _State:
        if self._int8_state is None or not self._int8_state.current():
            self._int8_state = _State(self)
        return self._int8_state

    def _compiled_layer(self, causal: bool) -> _Operators:
        state = self._int8_state
        weights = joined_weights(self, self._int8_plan.form, share=False) if state is None else state.weights
        return _Operators(weights, self._int8_plan.options | {"causal": causal})

    def _attend(self, qkv: Tensor, mask: Tensor | None, cache: Any, causal: bool) -> Tensor:
        """Attention over what the cache holds, ``[B, T, heads D]``."""
        options = self._int8_plan.options
        heads, kv_heads = options["heads"], options["kv_heads"]
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
        k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), self._int8_plan.layer_idx)
        causal = causal and mask is None and q.shape[1] > 1
        y = _ops._attention(q, k.transpose(1, 2), v.transpose(1, 2), mask, causal, scale=options["softmax_scale"])
        return y.flatten(2)

    def _apply(self, fn, recurse=True):
        self._int8_state = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self._int8_state = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_int8_state": None}

    def __reduce_ex__(self, protocol):
        return _new_block, (self._block_class,), self.__getstate__()


def _attention_implementation(config: Any) -> str | None:
    """transformers' own name, past the attribute lookup of its configs, which takes as long as a kernel's launch."""
    if config is None:
        return "sdpa"
    own = object.__getattribute__(config, "__dict__")
    if "_attn_implementation_internal" in own:
        return own["_attn_implementation_internal"]
    return getattr(config, "_attn_implementation", "sdpa")


class Int8TorchBlock(Int8Block):
    """The same for ``torch.nn.TransformerEncoderLayer``, whose masks say what is left out."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self._int8_call(args, kwargs)
        if call is None:
            return super(Int8Block, self).forward(*args, **kwargs)
        first = self.self_attn.batch_first
        hidden, *others = call
        output = self._run_int8(hidden if first else hidden.transpose(0, 1).contiguous(), *others)
        return output if first else output.transpose(0, 1)

    def _int8_call(self, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        given = dict(zip(self._int8_plan.names, args, strict=False)) | kwargs
        hidden, mask, padding = (given.get(name) for name in self._int8_plan.names[:3])
        if not self._serves(hidden) or not self._is_usable():
            return None
        if mask is None and given.get("is_causal"):
            return None
        first = self.self_attn.batch_first
        batch, tokens = hidden.shape[:2] if first else (hidden.shape[1], hidden.shape[0])
        heads = self.self_attn.num_heads
        if mask is not None and mask.shape not in ((tokens, tokens), (batch * heads, tokens, tokens)):
            return None
        if padding is not None and padding.shape != (batch, tokens):
            return None
        if mask is not None and mask.dim() == 3:  # [B heads, T, T]
            mask = mask.unflatten(0, (-1, self.self_attn.num_heads))
        added = [part for part in (mask, None if padding is None else padding[:, None, None, :]) if part is not None]
        if all(part.dtype == torch.bool for part in added):
            left_out = added[0] | added[1] if len(added) == 2 else added[0] if added else None
            return hidden, None if left_out is None else ~left_out, None, None, False
        floats = [_added(part, hidden.dtype) for part in added]
        return hidden, floats[0] + floats[1] if len(floats) == 2 else floats[0], None, None, False


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _held_by(block: nn.Module, form: BlockForm) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """What would make the state stale: (holder, name, object) of each module inside, of the tensors that layers and norms
    compute with, and of the numbers that say how."""
    for module in block.modules():
        yield from ((module._modules, name, child) for name, child in module._modules.items())
    for path in (*(path for paths in form.products.values() for path in paths), *form.norms):
        module = inside(block, path)
        for part in (module, getattr(module, "input_fake_quant", None)):
            for of in (getattr(part, "_parameters", {}), getattr(part, "_buffers", {})):
                yield from ((of, name, of[name]) for name in _TENSORS if of.get(name) is not None)
    *above, last = form.activation.split(".")
    holders = (block, inside(block, ".".join(above)) if above else block, inside(block, form.attention))
    for holder in (*holders, *(inside(block, path) for path in form.norms)):
        own = getattr(holder, "__dict__", {})
        yield from ((own, name, own[name]) for name in (*_NUMBERS, last) if name in own)


_TENSORS = ("weight", "bias", "in_proj_weight", "in_proj_bias", "weight_codes", "weight_scale", "scale", "input_factor")
_TENSORS += ("outlier_columns", "outlier_codes", "outlier_scale")
_NUMBERS = ("eps", "variance_epsilon", "scaling", "num_attention_heads", "num_heads", "n_heads", "head_dim")


class _State:
    """What calls of a block keep from one to the next, while its modules and tensors are what they were.

    Attributes:
        weights: in the order of WEIGHT_NAMES; None where the layers no longer make one call.
    """

    def __init__(self, block: Int8Block, *, share: bool = True) -> None:
        form = block._int8_plan.form
        self._options = block._int8_plan.options
        self._layers: dict[bool, _C.Int8TransformerCall] = {}
        inner = [module for module in block.modules() if module is not block]
        self._hooks = tuple(of for module in inner for of in (module._forward_hooks, module._forward_pre_hooks))
        self._own = tuple(module.__dict__ for module in inner)  # where accelerate puts another forward
        self._dropouts = tuple(module for module in inner if isinstance(module, _DropoutNd))
        self.weights: list[Tensor | None] | None = None
        try:
            if _kinds(block) == block._int8_plan.kinds and _options(block, form) == self._options:
                self.weights = joined_weights(block, form, share=share)
        except (NotFused, AttributeError):
            pass  # another module in a layer's place, an adapter's perhaps
        self._held = tuple(_held_by(block, form))
        # Where the values lie: an assignment to a tensor's .data moves them and leaves the object.
        self._places = tuple((value.data_ptr, value.data_ptr()) for *_, value in self._held if _has_memory(value))

    def current(self) -> bool:
        for of, key, value in self._held:  # noqa: SIM110, a generator takes twice as long
            if of.get(key) is not value:
                return False
        for place, was in self._places:  # noqa: SIM110
            if place() != was:
                return False
        return True

    @property
    def usable(self) -> bool:
        """Whether nobody listens to a module inside, or calls it by a function of his own: a fused call passes over it."""
        if self.weights is None or any(map(dict.__contains__, self._own, repeat("forward"))):
            return False
        if any(dropout.training and dropout.p > 0 for dropout in self._dropouts):  # as Monte Carlo dropout has them
            return False
        return not any(self._hooks) or all(_sleeping(hook) for of in self._hooks for hook in of.values())

    def layer(self, causal: bool) -> _C.Int8TransformerCall:
        if causal not in self._layers:
            self._layers[causal] = _C.Int8TransformerCall(self.weights, causal=causal, **self._options)
        return self._layers[causal]


@dataclass
class _Operators:
    """As ``_C.Int8TransformerCall``, of operators that torch.compile sees."""

    weights: list[Tensor | None]
    options: dict[str, Any]

    def qkv(self, input: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        return _ops.int8_transformer_qkv(input, self.weights, cos=cos, sin=sin, **self.options)

    def output(self, input: Tensor, attended: Tensor) -> Tensor:
        return _ops.int8_transformer_output(input, attended, self.weights, **self.options)[0]

    def layer(self, input: Tensor, mask, cos, sin, codes, scale) -> tuple[Tensor, Tensor | None, Tensor | None]:
        inputs = {"mask": mask, "cos": cos, "sin": sin, "codes": codes, "scale": scale}
        return _ops.int8_transformer_layer(input, self.weights, **inputs, **self.options)


_CLASSES: dict[type[nn.Module], type] = {}


def _fused_class(block_class: type[nn.Module]) -> type:
    if block_class not in _CLASSES:
        members = {"_block_class": block_class, "__module__": block_class.__module__}
        mixin = Int8TorchBlock if issubclass(block_class, nn.TransformerEncoderLayer) else Int8Block
        _CLASSES[block_class] = type(f"Int8{block_class.__name__}", (mixin, block_class), members)
    return _CLASSES[block_class]


def _new_block(block_class: type[nn.Module]) -> nn.Module:
    return object.__new__(_fused_class(block_class))


def _has_memory(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta and not isinstance(value, FakeTensor)


def _listened(hooks: dict[int, Any]) -> bool:
    return bool(hooks) and not all(map(_sleeping, hooks.values()))


def _sleeping(hook: Any) -> bool:
    """Whether it is one of transformers' that collect attention's weights, while none are asked for."""
    if getattr(hook, "__module__", "") != "transformers.utils.output_capturing":
        return False
    from transformers.utils.output_capturing import _active_collector

    collected = _active_collector.get()
    return collected is None or not (set(collected) - {"hidden_states", "_hidden_states_layers"})


# ---- codes from block to block ---------------------------------------------------------------------------------------


def _hand_over(output: Tensor, codes: Tensor | None, scale: Tensor | None) -> None:
    """Lets the next block find the codes of ``output`` on the tensor itself."""
    if codes is None or torch.compiler.is_compiling() or output.is_inference():
        return
    output._int8_codes = (codes, scale, output._version)


def _handed_over(hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Codes of the very tensor, unless it was written into since; nothing counts writes in inference mode."""
    if torch.compiler.is_compiling():
        return None, None
    kept = getattr(hidden, "_int8_codes", None)
    if kept is None or hidden.is_inference() or kept[2] != hidden._version:
        return None, None
    return kept[0], kept[1]


# ---- fusing ----------------------------------------------------------------------------------------------------------


def _plan(block: nn.Module, form: BlockForm) -> _Plan:
    layers_of(block, form)
    for path, module in block.named_modules():
        if path and (_listened(module._forward_hooks) or _listened(module._forward_pre_hooks)):
            raise NotFused(f"{path} has hooks")
    check_nothing_else(block, form)
    attention = inside(block, form.attention)
    if isinstance(block, nn.TransformerEncoderLayer):
        names: tuple[str, ...] = ("src", "src_mask", "src_key_padding_mask", "is_causal")
    else:
        names = tuple(inspect.signature(type(block).forward).parameters)[1:]
    options = _options(block, form)
    is_causal = bool(getattr(attention, "is_causal", False))
    config, index = getattr(attention, "config", None), getattr(attention, "layer_idx", None)
    return _Plan(form, options, names, is_causal, config, False, index, _kinds(block))


def _options(block: nn.Module, form: BlockForm) -> dict[str, Any]:
    """What the operator is told, of how the block's parts are now."""
    layers = layers_of(block, form)
    options = norm_options(block, form) | attention_options(block, form, layers) | product_options(layers)
    return options | {"activation": activation_name(block, form)}


def _trial_arguments(block: nn.Module, plan: _Plan) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Inputs and other arguments, with a mask and without."""
    norm = inside(block, plan.form.norms[0])
    device, dtype, width = norm.weight.device, norm.weight.dtype, norm.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, width, generator=generator).to(device, dtype)  # beyond the few rows of the float products
    allowed = torch.ones(40, 40, dtype=torch.bool).tril() & (torch.rand(40, 40, generator=generator) < 0.8)
    allowed |= torch.eye(40, dtype=torch.bool)
    if isinstance(block, nn.TransformerEncoderLayer):
        x = x if block.self_attn.batch_first else x.transpose(0, 1)
        yield x, {"src_mask": ~allowed.to(device)}
        yield x, {}
        return
    arguments: dict[str, Any] = {}
    size = inside(block, plan.form.out).in_features // plan.options["heads"]
    if "position_embeddings" in plan.names:
        angle = torch.rand(1, 40, size // 2, generator=generator).repeat(1, 1, 2) * 6
        arguments["position_embeddings"] = tuple(part.to(device, dtype) for part in (angle.cos(), angle.sin()))
    eager = _attention_implementation(plan.config) == "eager"
    mask = torch.zeros(40, 40).masked_fill_(~allowed, torch.finfo(dtype).min).to(dtype) if eager else allowed
    masked = arguments | {"attention_mask": mask.to(device)[None, None].expand(2, 1, 40, 40)}
    yield x, masked
    if not eager:
        yield x, arguments | {"attention_mask": None}


@torch.no_grad()
def _check(block: nn.Module, plan: _Plan) -> None:
    """Raises where the block as one call gives other results than its layers, as it is or with products that count."""
    trial = copied(block).eval()  # a model that trains may be converted first and told to evaluate afterwards
    for module in trial.modules():
        module._forward_hooks.clear()  # nobody wants to hear of the trial
        module._forward_pre_hooks.clear()
    joined_weights(trial, plan.form, share=False)  # says what cannot be joined
    for layer in trial.modules():
        if isinstance(layer, QuantizedLayer) and bool(layer.weight_scale.isnan().any()):
            layer.weight_scale.fill_(1 / (64 * layer.in_features**0.5))  # a skeleton, whose values are to be loaded
    _compare(trial, plan)
    _let_products_count(trial, plan)
    _compare(trial, plan)


def _let_products_count(trial: nn.Module, plan: _Plan) -> None:
    """Scales the products so that queries meet keys sharply and every branch adds as much as the input has: what a block
    computes shows even where its own weights, as a new model's, hide it."""
    layers = [layer for path in plan.form.products.values() for p in path if (layer := inside(trial, p)) is not None]
    scaled = [
        layer for layer in layers if isinstance(layer, QuantizedLayer) and torch.is_floating_point(layer.weight_scale)
    ]
    sharp = {id(inside(trial, path)) for path in plan.form.qkv[:2]}
    for norm in (inside(trial, path) for path in plan.form.norms):
        norm.weight.copy_(torch.linspace(0.5, 1.5, norm.weight.numel(), device=norm.weight.device))
    for layer in scaled:
        scale = getattr(layer, "input_scale", None)
        if isinstance(scale, Tensor):
            scale.fill_(_LARGEST_TRIAL_INPUT / 127)
    results: dict[int, Tensor] = {}
    handles = [layer.register_forward_hook(lambda of, _, y: results.__setitem__(id(of), y)) for layer in scaled]
    for _ in range(2):  # what a product reads has changed by the first
        x, arguments = next(iter(_trial_arguments(trial, plan)))
        trial(x, **arguments)
        for layer in scaled:
            if id(layer) in results and (std := float(results[id(layer)].float().std())) > 0:
                layer.weight_scale.mul_((2 if id(layer) in sharp else 1) / std)
    for handle in handles:
        handle.remove()


def _compare(trial: nn.Module, plan: _Plan) -> None:
    fused = copied(trial)
    _become_fused(fused, plan)
    for x, arguments in _trial_arguments(trial, plan):
        try:
            expected = trial(x, **arguments)
        except Exception as error:
            raise NotFused(f"it cannot be tried: {type(error).__name__}: {error}") from error
        plan.returns_tuple = isinstance(expected, tuple)
        expected = (expected[0] if plan.returns_tuple else expected).float()
        if fused._int8_call((x,), arguments) is None:
            raise NotFused("its arguments are not those of a block")
        try:
            found = fused(x, **arguments)
        except Exception as error:
            raise NotFused(f"as one call it cannot be tried: {error}") from error
        found = (found[0] if plan.returns_tuple else found).float()
        added = (expected - x.float()).norm()
        error = float((found - expected).norm() / added)
        if not error < _LARGEST_ERROR:
            raise NotFused(f"as one call it is {error:.2g} off what its layers give")


def _become_fused(block: nn.Module, plan: _Plan) -> None:
    block.__class__ = _fused_class(type(block))
    block._int8_plan, block._int8_state = plan, None


@dataclass(frozen=True)
class FusedBlocks:
    """What :func:`fuse_int8_blocks` did: path -> the form's name, and path -> why a block keeps its separate layers."""

    fused: dict[str, str]
    separate: dict[str, str]

    def lines(self) -> list[str]:
        """The fused blocks in words, a line for each form."""
        forms: dict[str, list[str]] = {}
        for path, form in self.fused.items():
            forms.setdefault(form, []).append(path or "the model")
        ends = {form: paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]}" for form, paths in forms.items()}
        count = {form: f"{len(of)} block{'s' * (len(of) > 1)}" for form, of in forms.items()}
        return [f"{count[form]} like {form}'s, one call each: {ends[form]}" for form in forms]


def fuse_int8_blocks(model: nn.Module) -> FusedBlocks:
    """Lets every transformer block of a converted model that is known run as one call.

    BERT's and its relatives', DistilBERT's, GPT-2's, Llama's (Mistral's, Qwen2's) and ViT's, with int8 products in all
    linear layers (schemes ``int8`` and ``ptq``), and ``torch.nn.TransformerEncoderLayer`` with its attention's products
    in floating point, as ``prepare`` leaves them.

    >>> fuse_int8_blocks(nn.Sequential(nn.Linear(2, 2))).fused
    {}
    """
    fused, separate = {}, {}
    for name, block in list(model.named_modules()):
        if isinstance(block, Int8Block) or (form := form_of(block)) is None:
            continue
        if not any(multiplies_codes(module) for module in block.modules()):
            continue
        try:
            if any(tensor.is_meta for tensor in (*block.parameters(), *block.buffers())):
                raise NotFused("it is on the meta device")
            plan = _plan(block, form)
            _check(block, plan)
        except NotFused as reason:
            separate[name] = f"a block like {form.name}'s: {reason}"
            continue
        _become_fused(block, plan)
        fused[name] = form.name
    for encoder in model.modules():
        # Its own fast path would hand nested tensors, which a block's separate layers alone take.
        if isinstance(encoder, nn.TransformerEncoder) and any(isinstance(of, Int8Block) for of in encoder.layers):
            encoder._takes_nested_tensor, encoder.use_nested_tensor = encoder.use_nested_tensor, False
    if not fused and not separate and _attends_in_codes(model):
        known = ", ".join(dict.fromkeys(form.name for form in (*FORMS, TORCH_FORM)))
        separate[""] = f"no block has the structure of a known one: {known}"
    _note(model, separate)
    return FusedBlocks(fused, separate)


def _attends_in_codes(model: nn.Module) -> bool:
    """Whether it is a transformer with products of codes, and none of its blocks is one call already."""
    modules = list(model.modules())
    if any(isinstance(module, Int8Block) for module in modules):
        return False
    attends = any("attention" in type(module).__name__.lower() for module in modules)
    return attends and any(multiplies_codes(module) for module in modules)


def _note(model: nn.Module, separate: dict[str, str]) -> None:
    """Lets the model's summary say how its blocks run from now on."""
    summary = getattr(model, "quantization_summary", None)
    if summary is None:
        return
    blocks = {name: of._int8_plan.form.name for name, of in model.named_modules() if isinstance(of, Int8Block)}
    model.quantization_summary = summary.with_blocks(FusedBlocks(blocks, {}).lines(), separate)


def fuse_again(model: nn.Module) -> None:
    """Tries fused blocks once more, whose values are others now: what they compute may be too."""
    if any(isinstance(module, Int8Block) for module in model.modules()):
        fuse_int8_blocks(unfuse_int8_blocks(model))


def unfuse_int8_blocks(model: nn.Module) -> nn.Module:
    """Back to separate layers, and to the blocks' own classes; ``quantization_summary`` no longer names them.

    >>> unfuse_int8_blocks(nn.Sequential())
    Sequential()
    """
    for block in model.modules():
        if isinstance(block, Int8Block):
            block.__class__ = block._block_class
            del block._int8_plan, block._int8_state
        elif isinstance(block, nn.TransformerEncoder) and hasattr(block, "_takes_nested_tensor"):
            block.use_nested_tensor = block.__dict__.pop("_takes_nested_tensor")
    _note(model, {})
    return model
