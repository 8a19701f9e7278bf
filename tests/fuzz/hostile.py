"""Hostile arguments: an operator gives an error in its own words, or a right result; it never crashes.

A case starts from arguments that are fine (hostile_arguments.py), spoils some of them, and calls the operator plainly,
in inference mode, under vmap, with gradients, or on meta tensors. A result must be what the same arguments give on Meta
(shape, type, strides) and contiguous (values).
"""

import warnings

import torch
from draw import INF, NAN, Draw, Mismatch, check, named, same
from hostile_arguments import ARGUMENTS
from modules import LEFT_OUT, schemas

warnings.filterwarnings("ignore")
torch._C._functorch._set_vmap_fallback_warning_enabled(False)
ops = torch.ops.quantrain

INTEGERS = (
    -(2**63),
    -(2**62),
    -(2**31) - 1,
    -(2**31),
    -129,
    -2,
    -1,
    0,
    1,
    2,
    3,
    7,
    9,
    16,
    17,
    255,
    256,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32,
    2**62,
    2**63 - 1,
)
SIZES = [n for n in INTEGERS if not 9 < n < 2**20]  # of those between, the work would be real
# PyTorch 2.11's own convolution dies of a stride of 2^31 - 1.
SIZES_OF_CONV2D = [n for n in SIZES if not 2**20 < abs(n) < 2**40]
REALS = (NAN, INF, -INF, -1.0, 0.0, -0.0, 1e-320, 1e-45, 1e308, -1e308, 3.5e38)
WORDS = (
    "",
    "none",
    "nearest",
    "int8",
    "auto",
    "fold",
    "same",
    "valid",
    "token",
    "sample",
    "householder",
    "per_tensor",
    "mse",
    "tanh",
    "x" * 300,
    "\0",
    "é",
    "{}",
)
DTYPES = [
    *(
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ),
    *(
        torch.complex64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.uint16,
        torch.uint32,
        torch.complex32,
    ),
]
MODES = ("plain", "plain", "plain", "plain", "inference", "vmap", "gradient", "gradient", "meta")

# Operators whose values depend on the order of memory: random numbers and masks go by it, and so do the orders of sums.
BY_MEMORY = {
    "_fake_quantize_backward": "the mask is in the order of memory",
    "_fake_quantize_mask": "so is the one that it gives",
    "_fixed_point_quantize_mask": "likewise",
    "_fake_quantize_learnable_backward": "sums",
    "quantize.seeded": "random numbers by position in memory",
    "quantize_gradient": "random numbers by position in memory",
    "quantize_gradient.seeded": "likewise",
    "_quantize_gradient_both": "likewise",
    "quantize_gradient_codes.seeded": "likewise",
    "_amp_round_stochastic_.seeded": "likewise",
    "_batch_norm_forward": "a mask in the order of memory",
    "_batch_norm_backward": "the same, and sums",
    "_batch_norm_statistics": "sums",
    "_fold_fake_quantize": "a mask in the order of memory",
    "_fold_fake_quantize_backward": "the same, and sums",
    "_amp_check_norm": "sums",
    "_mse_range": "sums",
    "fixed_point_fraction_length": "sums, at a threshold",
    "linear_4bit": "products of floating point",
    "_linear_4bit_grad_input": "likewise",
    "int8_weight_mm": "likewise",
    "linear_4bit_lora": "likewise",
    "linear_4bit_lora.seeded": "likewise",
    "_dropout_state": "a draw",
    "fqt_linear": "likewise",
    "fqt_conv2d": "likewise",
    "fqt_conv2d.padding": "likewise",
    "quant_conv2d": "likewise",
    "quant_linear": "likewise",
    "int8_linear": 'likewise where it is told "none"',
    "int8_weight_transpose": '"auto" goes by a sum',
    "_attention": "products of floating point",
    "int8_transformer_layer": "likewise, within it",
    "int8_transformer_qkv": "likewise, of few rows",
    "int8_transformer_output": "likewise",
    "kv_cache_attention": "likewise",
}
# On a GPU: another kernel takes a tensor that does not begin on 16 bytes, and adds in another order.
BY_ADDRESS = (
    "norm_act_fake_quantize",
    "norm_act_fake_quantize_dynamic",
    "_norm_act_range",
    "_norm_act_forward",
    "_norm_act_backward",
)
# What an operator without kernels of its own calls, and which may lack a derivative.
PARTS = {"_ptq_linear": ("int8_mm", "int8_mm_outliers", "int8_quantize_rows", "quantize")}
# A private operator may speak in the name of the public one that it serves.
LOSSES = ("distillation_kl", "distillation_kl_topk", "hidden_mse", "hidden_cosine", "attention_kl")
ALIASES = {
    **dict.fromkeys(("_distillation_rows", "_distillation_rows_backward"), (*LOSSES, "_distillation_rows")),
    **dict.fromkeys(LOSSES, ("_distillation_rows",)),
    "_fake_quantize_mask": ("fake_quantize", "fake_quantize_dynamic"),
    "_fake_quantize_backward": ("fake_quantize", "fixed_point_quantize"),
    "_fake_quantize_learnable_backward": ("fake_quantize_learnable",),
    "_fixed_point_quantize_mask": ("fixed_point_quantize",),
    "_batch_norm_forward": ("batch_norm_act", "batch_norm_act_fake_quantize"),
    "_fold_fake_quantize": ("fold_fake_quantize",),
    "_norm_act_forward": ("norm_act_fake_quantize", "norm_act_fake_quantize_dynamic"),
    "int8_linear": (
        "int8_mm",
        "int8_quantize_rows",
        "int8_quantize_columns",
        "int8_quantize_rows_and_columns",
        "int8_weight_transpose",
    ),
    "_linear_4bit_grad_input": ("linear_4bit",),
    "linear_4bit_lora": ("linear_4bit", "_linear_4bit_grad_input"),
    "fqt_linear": ("quantize_gradient",),
    "_ptq_linear": ("quantize",),  # of a stored input scale, whose value only the kernel looks at
    **dict.fromkeys(
        ("int8_transformer_layer", "int8_transformer_qkv", "int8_transformer_output"),
        (
            "int8_transformer_layer",
            "_attention",
            "_ptq_linear",
            "int8_mm",
            "int8_layer_norm",
            "int8_rms_norm",
            "int8_add_layer_norm",
            "int8_add_rms_norm",
            "int8_gelu",
            "int8_relu",
            "int8_silu_mul",
            "int8_quantize_rows",
            "int8_weight_mm",
            "quantize",
            "linear_4bit",
        ),
    ),  # fmt: skip
    "fqt_conv2d": ("quantize_gradient",),
    "quant_conv2d": ("fqt_conv2d",),  # of what both check
    "fake_quantize_codes": ("batch_norm_act_fake_quantize",),  # whose pass it is, without a norm
    "fake_quantize_dynamic": ("choose_qparams", "fake_quantize"),
    "dequantize_gradient": ("_reflect_rows",),
}
# Not ours: the dispatcher's own errors, and those of memory that is not there.
DISPATCHER = (
    "quantrain::",
    "Could not run 'quantrain::",
    "There were no tensor arguments to this function",
    "Overflow when unpacking long",
    "Storage size calculation overflowed",
    "[enforce fail at alloc_cpu.cpp",
    "CUDA out of memory",
    "Inference tensors cannot be saved for backward",
    "Cannot set version_counter for inference tensor",
    "Inplace update to inference tensor outside InferenceMode",
    "a leaf Variable that requires grad is being used in an in-place operation",
    "a view of a leaf Variable that requires grad is being used in an in-place operation",
    "a leaf Variable that requires grad",
    "ZeroTensors are immutable",
    "unsupported operation: more than one element of the written-to tensor refers to a single memory location",
    "fallback doesn't currently support mutable TensorLists",
    "IntArrayRef contains an int that cannot be represented as a SymInt",
)
VMAP = ("vmap", "Batching rule not implemented", "in_dims", "batched", "functorch")


def operators():
    return [name for name in schemas() if name not in LEFT_OUT]


def run(op, d: Draw):
    schema = schemas_of()[op]
    mode, d.sizes = d.choice(MODES), SIZES_OF_CONV2D if _convolves(op) else SIZES
    arguments = ARGUMENTS[op.split(".")[0] if op not in ARGUMENTS else op](d)
    arguments = {a.name: arguments.get(a.name, a.default_value) for a in schema.arguments}
    for argument in schema.arguments:
        if str(argument.type) == "str" and isinstance(arguments[argument.name], torch.dtype):
            arguments[argument.name] = named(arguments[argument.name])
    if d.device != "cpu":
        arguments = {k: _on(d, v) for k, v in arguments.items()}
    for _ in range(d.choice((0, 1, 1, 1, 2, 2, 3))):
        argument = d.choice(schema.arguments)
        arguments[argument.name] = spoil(d, str(argument.type), arguments[argument.name])
    if schema.is_mutable:  # PyTorch 2.11 writes past its stack for a negated view and an operator that returns nothing
        arguments = {k: _each(v, lambda t: t.resolve_neg() if t.is_neg() else t) for k, v in arguments.items()}
    if mode == "meta":
        arguments = {k: _meta(v) for k, v in arguments.items()}
    if mode == "gradient":
        arguments = {k: _with_grad(v) for k, v in arguments.items()}
    d.notes |= {"mode": mode, **arguments}
    function = getattr(getattr(ops, op.split(".")[0]), schema.overload_name or "default")
    call(op, d, schema, function, mode, arguments)


def _convolves(op):
    """By PyTorch's own convolution."""
    return op.startswith(("fqt_conv2d", "quant_conv2d"))


_SCHEMAS = {}


def schemas_of():
    if not _SCHEMAS:
        _SCHEMAS.update(schemas())
    return _SCHEMAS


# ---- spoiling ----


def spoil(d: Draw, kind, value):
    if kind in ("Tensor", "Optional[Tensor]"):
        if kind != "Tensor" and d.chance(0.15):
            return None
        return spoil_tensor(d, value if value is not None else torch.ones(d.choice((1, 3))))
    if kind == "List[Tensor]":
        return d.choice(
            ([], value[:1], value * 2, [spoil_tensor(d, t) for t in value], [*value, spoil_tensor(d, torch.ones(3))])
        )
    if kind.startswith("List"):
        many = d.choice((0, 1, 2, 3, len(value or []), 6))
        if d.chance(0.5) and value:
            value = list(value)
            value[d.randrange(len(value))] = d.choice(d.sizes)
            return value
        return [d.choice(d.sizes) for _ in range(many)]
    if kind in ("float", "Optional[float]"):
        return d.choice(REALS)
    if kind == "bool":
        return not value
    if kind == "str":
        return d.choice(WORDS)
    if kind in ("int", "SymInt", "Optional[int]"):
        return d.choice(INTEGERS)
    if kind == "ScalarType":
        return d.choice(DTYPES)
    if kind == "Optional[Generator]":
        return d.choice((None, torch.Generator()))
    return value


def spoil_tensor(d: Draw, t):
    if t.layout != torch.strided or t._is_zerotensor() or t.is_quantized:
        return t  # spoiled before
    try:
        return spoil_dense(d, t)
    except (RuntimeError, NotImplementedError, TypeError, IndexError):
        return t.to(torch.complex64)  # PyTorch has no such tensor: another wrong one


def spoil_dense(d: Draw, t):
    device = t.device
    shape = list(t.shape)
    way = d.choice(
        (
            "dtype",
            "dtype",
            "shape",
            "shape",
            "shape",
            "strides",
            "strides",
            "values",
            "values",
            "device",
            "grad",
            "layout",
            "lazy",
        )
    )
    if way == "dtype":
        return t.to(d.choice(DTYPES))
    if way == "shape":
        more = [
            t.unsqueeze(0),
            t.unsqueeze(-1),
            t.reshape(-1),
            t[..., None, None],
            torch.ones((), dtype=t.dtype, device=device),
        ]
        more += [torch.empty([0], dtype=t.dtype, device=device), torch.empty([*shape, 0], dtype=t.dtype, device=device)]
        if shape:
            at = d.randrange(len(shape))
            more += [t.narrow(at, 0, 0), t.select(at, 0) if shape[at] else t, torch.cat([t, t], at)]
            more += [t.narrow(at, 0, d.randint(0, shape[at])), t.transpose(at, -1), t.expand(d.randint(1, 3), *shape)]
        more += [torch.ones([d.choice((1, 2, 3))] * d.randint(0, 7), dtype=t.dtype, device=device)]
        return d.choice(more)
    if way == "strides":
        n = max(t.numel(), 1)
        base = torch.zeros(3 * n + 64, dtype=t.dtype, device=device)
        strides = [d.choice((0, 0, 1, 1, 2, 3)) for _ in shape]  # overlapping, too
        reach = 8 + sum((s - 1) * k for s, k in zip(shape, strides, strict=True) if s)
        if reach < len(base) and base.element_size():
            view = base.as_strided(shape, strides, d.choice((0, 1, 3)))
            return view
        return t.flip(0) if shape else t
    if way == "values" and t.numel() and device.type != "meta" and t.layout == torch.strided:
        t = t.detach().clone()
        if t.is_floating_point():
            fill = d.choice(REALS)
        elif t.dtype == torch.bool or t.dtype.is_complex:
            fill = 1
        else:
            fill = d.choice(
                (torch.iinfo(t.dtype).min, torch.iinfo(t.dtype).max, 0, 1, max(-1, torch.iinfo(t.dtype).min))
            )
        if t.dtype.is_floating_point and t.dtype.itemsize == 1:
            return t
        if d.chance(0.5):
            return t.fill_(fill)
        t.reshape(-1)[d.randrange(t.numel())] = fill
        return t
    if way == "device":
        return t.to("meta") if device.type != "cuda" or d.chance(0.5) else t.cpu()
    if way == "grad":
        return _with_grad(t)
    if way == "layout" and t.layout == torch.strided and device.type != "meta":
        return d.choice((lambda: t.to_sparse(), lambda: t.to_sparse_csr()))()
    if way == "lazy" and t.is_floating_point() and t.dtype.itemsize > 1:
        return d.choice((torch._neg_view(t), torch._efficientzerotensor(t.shape, dtype=t.dtype, device=device)))
    return t


def _each(value, change):
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)) and any(isinstance(t, torch.Tensor) for t in value):
        return [_each(t, change) for t in value]
    return value


def _on(d, value):
    return _each(value, lambda t: d.on(d.device, t))


def _meta(value):
    def change(t):
        if t.layout != torch.strided:
            return t
        t = t.resolve_neg()  # kernels get a copy of a negated view, whose strides may be others
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta").requires_grad_(t.requires_grad)

    return _each(value, change)


def _with_grad(value):
    def change(t):
        if t.is_floating_point() and t.dtype.itemsize > 1 and t.layout == torch.strided:
            return t.detach().requires_grad_()
        return t

    return _each(value, change)


# ---- calling ----


def attempt(function, arguments):
    """(results or None, error or None). In-place operators give what they changed."""
    schema = function._schema
    positional = [arguments[a.name] for a in schema.arguments if not a.kwarg_only]
    named = {a.name: arguments[a.name] for a in schema.arguments if a.kwarg_only}
    try:
        results = function(*positional, **named)
    except Exception as error:
        return None, error
    if results is None:
        first = positional[0]
        results = tuple(first) if isinstance(first, (list, tuple)) else (first,)
    return (results,) if isinstance(results, torch.Tensor) else tuple(results), None


def call(op, d, schema, function, mode, arguments):
    pristine = {k: _each(v, _clone) for k, v in arguments.items()}
    if mode == "inference":
        with torch.inference_mode():
            results, error = attempt(function, arguments)
    elif mode == "vmap":
        return _vmap(op, d, function, arguments)
    else:
        results, error = attempt(function, arguments)
    if d.device != "cpu":
        torch.cuda.synchronize()
    if error is not None:
        judge(op, error)
        return
    if mode == "gradient":
        _backward(op, results)
    with torch.inference_mode(mode == "inference"):
        _meta_agrees(op, function, pristine, results)
    stochastic = arguments.get("stochastic") or "_amp_round_stochastic_" in op
    by_order = op in BY_MEMORY or d.device != "cpu" and op in BY_ADDRESS
    if not by_order and not stochastic and mode != "meta" and not schema.is_mutable:
        _contiguous_agrees(op, function, pristine, results)


def _clone(t):
    if t.layout != torch.strided or t.device.type == "meta" or t._is_zerotensor() or t.is_quantized:
        return t
    flat = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.detach().untyped_storage())
    copy = flat.clone().as_strided(t.shape, t.stride(), t.storage_offset())
    return torch._neg_view(copy) if t.is_neg() else copy.requires_grad_(t.requires_grad)


def judge(op, error):
    """An error must be one of Python's ordinary ones and speak in the operator's name."""
    name, text = op.split(".")[0], str(error).strip()
    line = text.splitlines()[0] if text else ""
    check("INTERNAL ASSERT" not in text, f"an internal assertion instead of an error: {line}")
    check(
        isinstance(error, (ValueError, TypeError, RuntimeError, NotImplementedError)),
        lambda: f"an error of type {type(error).__name__}: {line}",
    )
    names = (name, *ALIASES.get(name, ()))
    if any(line.startswith(f"{one}: expected ") and ", got " in text for one in names):
        return
    if any(line.startswith(f"{one}: ") for one in names) and isinstance(error, NotImplementedError):
        return
    if (
        any(line == f"derivative for quantrain::{one} is not implemented" for one in (name, *PARTS.get(name, ())))
        or line.startswith(DISPATCHER)
        or "SymIntArrayRef expected to contain only concrete integers" in line
    ):
        return
    raise Mismatch(f"an error in others' words: {type(error).__name__}: {line}")


def _vmap(op, d, function, arguments):
    """Each tensor doubled along a new dimension: an error that names vmap, or what a loop gives."""
    if function._schema.is_mutable:
        return
    names = [k for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.layout == torch.strided]
    if not names:
        return
    chosen = [n for n in names if d.chance(0.7)] or names[:1]
    stacked = [arguments[n].detach().unsqueeze(0).repeat_interleave(2, 0) for n in chosen]

    def one(*tensors):
        results, error = attempt(function, arguments | dict(zip(chosen, tensors, strict=True)))
        if error is not None:
            raise error
        return results

    try:
        results = torch.func.vmap(one, randomness="different")(*stacked)
    except Exception as error:
        if any(word in str(error) for word in VMAP) and "INTERNAL ASSERT" not in str(error):
            return
        judge(op, error)
        return
    expected, error = attempt(function, {k: _each(v, lambda t: t.detach()) for k, v in arguments.items()})
    check(error is None, lambda: f"vmap takes what a plain call refuses: {error}")
    if op in BY_MEMORY or arguments.get("stochastic"):
        return
    for found, wanted in zip(results, expected, strict=True):
        if wanted.device.type != "meta":
            same(found[1].detach().cpu(), wanted.detach().cpu(), "under vmap")


def _backward(op, results):
    live = [r for r in results if r is not None and r.requires_grad]
    if not live or live[0].device.type == "meta":
        return
    try:
        live[0].float().sum().backward()
    except Exception as error:
        judge(op, error)


def _meta_agrees(op, function, arguments, results):
    """Eager and compiled programs cannot disagree."""
    if any(r is not None and (r.layout != torch.strided or r.device.type == "meta") for r in results):
        return
    devices = {
        t.device.type
        for v in arguments.values()
        for t in (v if isinstance(v, list) else [v])
        if isinstance(t, torch.Tensor)
    }
    dense = all(
        t.layout == torch.strided
        for v in arguments.values()
        for t in (v if isinstance(v, list) else [v])
        if isinstance(t, torch.Tensor)
    )
    if "meta" in devices or len(devices) != 1 or not dense:
        return
    shapes = {k: None if isinstance(v, torch.Generator) else _meta(v) for k, v in arguments.items()}
    expected, error = attempt(function, shapes)
    check(
        error is None,
        lambda: f"Meta refuses what {devices} takes: {type(error).__name__}: {str(error).splitlines()[0]}",
    )
    for found, wanted in zip(results, expected, strict=True):
        check(
            (found is None) == (wanted is None)
            and (found is None or (found.shape, found.dtype) == (wanted.shape, wanted.dtype))
            and (found is None or _convolves(op) or _strides(found) == _strides(wanted)),
            lambda found=found, wanted=wanted: (
                f"Meta gives {wanted.dtype} {tuple(wanted.shape)} strides {wanted.stride()}, the kernel "
                f"{found.dtype} {tuple(found.shape)} strides {found.stride()}"
            ),
        )


def _strides(t):
    """Those that mean something."""
    return [s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1] if t.numel() else []


def _contiguous_agrees(op, function, arguments, results):
    def change(t):
        return t.detach().contiguous().clone() if t.layout == torch.strided and t.device.type != "meta" else t

    expected, error = attempt(function, {k: _each(v, change) for k, v in arguments.items()})
    if error is not None and "CUDA out of memory" in str(error):  # beside other processes; the results may be large
        return
    check(error is None, lambda: f"contiguous arguments are refused: {str(error).splitlines()[0]}")
    for found, wanted in zip(results, expected, strict=True):
        if wanted is not None and wanted.device.type != "meta":
            same(found.detach().cpu(), wanted.detach().cpu(), "against contiguous arguments")
