"""Small arguments that each operator takes, by name: what hostile.py spoils. The schema's defaults fill in the rest."""

import torch
from draw import Draw

FLOAT_KINDS = ("normal", "normal", "special", "zero")


def floats(d: Draw, shape, dtype=None):
    return d.tensor(shape, dtype or d.dtype(), d.choice(FLOAT_KINDS))


def parameters(d: Draw, shape):
    """(scale, zero_point or None) of some granularity."""
    scale_shape = d.scale_shape(shape)
    point = d.integers(scale_shape, -8, 7, torch.int32) if d.chance(0.5) else None
    return d.scale(scale_shape, -8, 7), point


def small(d: Draw, low=0):
    return d.shape(low=low, high=4, cap=200)


def fake(d: Draw):
    shape = small(d)
    scale, zero_point = parameters(d, shape)
    return {"input": floats(d, shape), "scale": scale, "zero_point": zero_point, "quant_min": -8, "quant_max": 7}


def fake_mask(d):
    return fake(d) | {"check_values": d.chance(0.7)}


def fake_backward(d):
    x = floats(d, small(d))
    x = torch.empty_like(x).copy_(x)
    mask = torch.randint(
        0, 256, ((x.numel() + 7) // 8,), dtype=torch.uint8, generator=torch.Generator().manual_seed(d.randrange(99))
    )
    return {"grad_output": floats(d, list(x.shape), x.dtype), "mask": mask, "stride": list(x.stride())}


def learnable_backward(d):
    arguments = fake(d)
    return arguments | {
        "grad_output": floats(d, list(arguments["input"].shape), arguments["input"].dtype),
        "grad_factor": 0.5,
    }


def ranged(d):
    shape = small(d)
    return {
        "input": floats(d, shape),
        "scale_shape": d.scale_shape(shape),
        "quant_min": -8,
        "quant_max": 7,
        "symmetric": d.chance(0.5),
    }


def mse(d):
    return ranged(d) | {"steps": d.choice((1, 3, 10))}


def percentile(d):
    shape = small(d)
    return {"input": floats(d, shape), "scale_shape": d.scale_shape(shape), "percentile": d.choice((60.0, 99.9, 100.0))}


def observed(d):
    shape = small(d)
    ends = {name: floats(d, shape, torch.float32) for name in ("min_val", "max_val", "low", "high")}
    ends |= {name: torch.empty_like(ends[name]).copy_(ends[name]) for name in ("min_val", "max_val")}
    return ends | {"finite": torch.ones(shape, dtype=torch.bool), "averaging_constant": d.choice((0.0, 0.1, 1.0))}


def observed_qparams(d):
    arguments = observed(d)
    shape = list(arguments["min_val"].shape)
    return arguments | {
        "scale": torch.ones(shape),
        "zero_point": torch.zeros(shape, dtype=torch.int32) if d.chance(0.5) else None,
        "finite": arguments["finite"] if d.chance(0.5) else None,
        "quant_min": -8,
        "quant_max": 7,
        "symmetric": d.chance(0.5),
        "marks_nonfinite": d.chance(0.5),
    }


def range_ends(d):
    shape = small(d)
    return {
        "min": floats(d, shape, torch.float32),
        "max": floats(d, shape, torch.float32),
        "quant_min": -8,
        "quant_max": 7,
        "symmetric": d.chance(0.5),
    }


def batch_norm(d):
    x = floats(d, small(d, 2))
    channels = x.shape[1]
    weight, bias, conv_scale = (floats(d, [channels]) if d.chance(0.5) else None for _ in range(3))
    bits = torch.randint(0, 256, ((x.numel() + 7) // 8,), generator=torch.Generator().manual_seed(d.randrange(99)))
    return {
        "input": x,
        "mean": floats(d, [channels], torch.float32),
        "variance": d.scale([channels], -8, 7),
        "weight": weight,
        "bias": bias,
        "conv_scale": conv_scale,
        "residual": floats(d, list(x.shape), x.dtype) if d.chance(0.5) else None,
        "scale": d.scale([1], -8, 7),
        "zero_point": d.integers([1], -8, 7, torch.int32) if d.chance(0.5) else None,
        "activation": d.choice(("identity", "relu", "relu6")),
        "eps": 1e-5,
        "batch_statistics": d.chance(0.5),
        "quant_min": -8,
        "quant_max": 7,
        "with_mask": d.chance(0.5),
        "grad_output": floats(d, list(x.shape), x.dtype),
        "mask": bits.byte()[: 0 if d.chance(0.3) else None],
        "with_residual": d.chance(0.5),
    }


def batch_norm_backward(d):
    """Half of them with a learned scale, which goes without a residual."""
    arguments = batch_norm(d)
    return arguments | ({"scale": None, "zero_point": None} if d.chance(0.5) else {"with_residual": False})


def batch_norm_update(d):
    channels = d.randint(1, 9)
    moves = d.chance(0.7)
    return {
        "statistics": floats(d, [4, channels], torch.float32),
        "conv_scale": floats(d, [channels]) if d.chance(0.5) else None,
        "running_mean": torch.zeros(channels) if moves else None,
        "running_var": torch.ones(channels) if moves else None,
        "count": 8,
        "momentum": 0.1,
        "eps": 1e-5,
        "activation": "relu",
        "range": d.chance(0.5),
    }


def folded(d):
    weight = floats(d, d.shape(low=2, high=4, cap=200, empty=0))
    rows, columns = weight.shape[0], weight[0].numel()
    return {
        "weight": weight,
        "bn_weight": floats(d, [rows]),
        "running_var": d.scale([rows], -8, 7),
        "eps": 1e-5,
        "quant_min": -8,
        "quant_max": 7,
        "symmetric": d.chance(0.5),
        "dtype": d.choice(("", "float32", "bfloat16")),
        "grad_output": floats(d, list(weight.shape)),
        "grad_scale": floats(d, [rows], torch.float32) if d.chance(0.5) else None,
        "mask": d.integers([rows, (columns + 7) // 8], 0, 255, torch.uint8),
        "scale": d.scale([rows], -8, 7) if d.chance(0.5) else None,
    }


def quantize(d):
    return fake(d) | {
        "dtype": d.choice((torch.int8, torch.int16, torch.int32)),
        "seed": 1,
        "offset": 2,
        "stochastic": d.chance(0.3),
    }


def dequantize(d):
    shape = small(d)
    scale, zero_point = parameters(d, shape)
    codes = d.integers(shape, 0, 100, d.choice((torch.int8, torch.uint8, torch.int16, torch.int32)))
    return {"input": codes, "scale": scale, "zero_point": zero_point, "dtype": d.dtype()}


def pack(d):
    return {"input": d.integers(small(d, 1), 0, 7, d.choice((torch.int8, torch.uint8)))}


def unpack(d):
    packed = d.integers(small(d, 1), 0, 255, torch.uint8)
    return {"input": packed, "size": 2 * packed.shape[-1], "signed": d.chance(0.5)}


def fixed(d):
    shape = small(d)
    return {
        "input": floats(d, shape),
        "fraction_length": d.integers(d.scale_shape(shape), 0, 7, torch.int32),
        "word_length": 8,
        "signed": True,
    }


def fraction_length(d):
    return {"input": floats(d, small(d, 1)), "axis": d.choice((None, 0, -1)), "method": d.choice(("std", "rms", "mse"))}


def requantize(d):
    shape = small(d)
    lengths = d.integers(d.scale_shape(shape), 0, 31, torch.int32)
    return {
        "accumulator": d.integers(shape, -(2**30), 2**30, torch.int32),
        "accumulator_fraction_length": lengths,
        "fraction_length": 4,
    }


def image(d, channels):
    dtype = d.choice((torch.uint8, torch.int8))
    return d.integers([d.randint(1, 2), channels, d.randint(3, 9), d.randint(3, 9)], 0, 100, dtype)


def convolution(d):
    groups = d.choice((1, 1, 1, 2, 4))
    channels, kernel = groups * d.randint(1, 5), [d.randint(1, 3), d.randint(1, 3)]
    weight = d.integers([groups * d.randint(1, 4), channels // groups, *kernel], -127, 127, torch.int8)
    bias = d.integers([weight.shape[0]], -99, 99, torch.int32) if d.chance(0.5) else None
    return {
        **{"input": image(d, channels), "weight": weight, "bias": bias, "groups": groups},
        **{"stride": [d.randint(1, 3), d.randint(1, 3)], "padding": [d.randint(0, 2), d.randint(0, 2)]},
        **{"shift": d.integers([1], 0, 12, torch.int32), "signed": d.chance(0.5)},
    }


def linear_codes(d):
    k, o = d.randint(1, 40), d.randint(1, 20)
    x = d.integers([*small(d)[:2], k], 0, 100, d.choice((torch.uint8, torch.int8)))
    return {"input": x, "weight": d.integers([o, k], -127, 127, torch.int8)}


def add(d):
    shape = small(d)
    types = [d.choice((torch.uint8, torch.int8, torch.int32)) for _ in range(2)]
    lengths = {f"{n}_fraction_length": d.integers([1], 0, 12, torch.int32) for n in "ab"}
    return {"a": d.integers(shape, 0, 99, types[0]), "b": d.integers(shape, 0, 99, types[1]), **lengths}


def pool(d):
    return {"input": image(d, d.randint(1, 9)), "kernel_size": [2, 3], "stride": [2, 1], "padding": [1, 1]}


def gradient(d):
    return {
        **{"grad": floats(d, d.shape(low=1, high=4, cap=200)), "bits": d.randint(2, 8), "seed": 3, "offset": 4},
        **{
            "quantizer": d.choice(("per_tensor", "per_sample", "per_channel", "householder")),
            "rows": d.choice(("sample", "token")),
        },
        **{"max_group": d.choice((3, 7, 128, 256)), "preserve_zero": d.chance(0.2), "stochastic": d.chance(0.3)},
    }


def gradient_both(d):
    arguments = gradient(d)
    given = {name: arguments[name] for name in ("grad", "bits", "rows", "preserve_zero")}
    return given | {"column_bits": d.randint(2, 8), "column_preserve_zero": d.chance(0.2)}


def plan(d):
    """(codes, scale, offset, order, reflector) of a real reflection."""
    arguments = gradient(d)
    grad = d.tensor(d.shape(low=2, high=2, cap=300, empty=0), torch.float32, "normal")
    codes = torch.ops.quantrain.quantize_gradient_codes.seeded
    return codes(grad, arguments["bits"], arguments["quantizer"], max_group=arguments["max_group"], seed=1, offset=2)


def dequantize_gradient(d):
    return dict(zip(("codes", "scale", "offset", "order", "reflector"), plan(d), strict=True)) | {"dtype": d.dtype()}


def reflect(d):
    codes, _, _, order, reflector = plan(d)
    return {
        "input": floats(d, list(codes.shape), torch.float32),
        "order": order,
        "reflector": reflector,
        "inverse": d.chance(0.5),
    }


def fqt(d):
    names = ("none", "per_tensor", "per_sample", "per_channel", "householder")
    return {
        f"grad_{side}{field}": value
        for side in ("input", "weight")
        for field, value in (("", d.choice(names)), ("_bits", d.randint(2, 8)))
    }


def fqt_linear(d):
    dtype, k, o = d.dtype(), d.randint(1, 20), d.randint(1, 20)
    x = floats(d, [*small(d)[:2], k], dtype)
    return fqt(d) | {
        "input": x,
        "weight": floats(d, [o, k], dtype),
        "bias": floats(d, [o], dtype) if d.chance(0.5) else None,
    }


def fqt_conv2d(d):
    dtype, groups = d.dtype(), d.choice((1, 1, 2))
    channels, o = groups * d.randint(1, 4), groups * d.randint(1, 4)
    x = floats(d, [d.randint(1, 2), channels, d.randint(3, 7), d.randint(3, 7)], dtype)
    weight = floats(d, [o, channels // groups, d.randint(1, 3), d.randint(1, 3)], dtype)
    geometry = {"stride": [d.randint(1, 2)] * 2, "padding": [d.randint(0, 2)] * 2, "dilation": [1, 1], "groups": groups}
    return fqt(d) | {"input": x, "weight": weight, **geometry}


def fqt_conv2d_padding(d):
    return fqt_conv2d(d) | {"padding": d.choice(("same", "valid")), "stride": [1, 1]}


def quant_conv2d(d):
    arguments = fqt_conv2d(d)
    shape = list(arguments["input"].shape)
    return arguments | {
        "codes": d.integers(shape, 0, 127, d.choice((torch.int8, torch.uint8))),
        "scale": d.scale([1], 0, 127),
        "zero_point": d.integers([1], 0, 127, torch.int32) if d.chance(0.5) else None,
    }


def one_scale(d):
    x = floats(d, small(d, 2))
    point = d.integers([1], -8, 7, torch.int32) if d.chance(0.5) else None
    arguments = {"input": x, "scale": d.scale([1], -8, 7), "zero_point": point, "quant_min": -8, "quant_max": 7}
    return arguments | {"grad_factor": d.choice((1.0, 0.01))}


def norm_act(d):
    function = d.choice(("identity", "relu", "silu", "gelu", "gelu_tanh", "silu_mul", "layer_norm", "rms_norm"))
    x = floats(d, small(d, 1))
    parameter, norm = d.choice((x.dtype, torch.float32)), function.endswith("norm")
    weight = floats(d, [x.shape[-1]], parameter) if norm and d.chance(0.7) else None
    bias = floats(d, [x.shape[-1]], parameter) if function == "layer_norm" and d.chance(0.7) else None
    rows = x.numel() // x.shape[-1] if x.numel() else 0
    mask = d.integers([(x.numel() + 7) // 8], 0, 255, torch.uint8)
    return {
        "input": x,
        "other": floats(d, list(x.shape), x.dtype) if function == "silu_mul" else None,
        "weight": weight,
        "bias": bias,
        "scale": d.scale([1], -8, 7),
        "zero_point": d.integers([1], -8, 7, torch.int32) if d.chance(0.5) else None,
        "function": function,
        "eps": 1e-5,
        "quant_min": -8,
        "quant_max": 7,
        "symmetric": d.chance(0.5),
        "dtype": d.choice(("", x.dtype)),
        "with_codes": d.chance(0.5),
        "with_mask": d.chance(0.5),
        "grad_output": floats(d, list(x.shape), x.dtype),
        "moments": d.scale([rows, 2], -8, 7),
        "mask": mask if d.chance(0.7) else mask[:0],
    }


def norm_act_forward(d):
    arguments = norm_act(d)
    return arguments | ({"scale": None, "zero_point": None} if d.chance(0.5) else {})


def quant_linear(d):
    arguments = fqt_linear(d)
    shape = list(arguments["input"].shape)
    rows = d.choice(([1], [*shape[:-1], 1]))
    return {name: arguments[name] for name in ("input", "weight", "bias")} | {
        "codes": d.integers(shape, 0, 127, d.choice((torch.int8, torch.uint8))),
        "scale": d.scale(rows, 0, 127),
        "zero_point": d.integers(rows, 0, 127, torch.int32) if d.chance(0.5) else None,
    }


def matrix(d):
    x = floats(d, d.shape(low=1, high=4, cap=300))
    columns = x.shape[-1]
    rows = x.numel() // columns if columns else 1
    factors = {
        name: d.scale([n], -8, 7) for name, n in (("column_factor", columns), ("row_factor", rows)) if d.chance(0.5)
    }
    return {"input": x, "seed": 1, "offset": 2, "stochastic": d.chance(0.3), **factors}


def codes(d):
    return {"codes": d.integers(d.shape(low=2, high=2, cap=300), -127, 127, torch.int8)}


def weight_transpose(d):
    weight = d.integers([d.randint(1, 20), d.randint(1, 20)], -127, 127, torch.int8)
    if d.chance(0.5):
        weight = floats(d, list(weight.shape))
    return {
        "weight": weight,
        "scale": d.scale([weight.shape[0], 1], -8, 7),
        "scheme": d.choice(("auto", "fold", "columns")),
    }


def product(d):
    m, n, k = d.randint(1, 20), d.randint(1, 20), d.randint(1, 40)
    a, b = d.integers([m, k], -127, 127, torch.int8), d.integers([n, k], -127, 127, torch.int8)
    bias = floats(d, [n]) if d.chance(0.5) else None
    result = {
        "a": a,
        "b": b,
        "a_scale": d.scale([m, 1], -8, 7),
        "b_scale": d.scale([n], -8, 7),
        "bias": bias,
        "out_dtype": d.dtype(),
    }
    return result | {"accumulator": torch.zeros(m, n, dtype=d.dtype())}


def int8_linear(d):
    arguments = fqt_linear(d)
    modes = {name: d.choice(("int8", "none", "auto")) for name in ("output", "grad_input", "grad_weight")}
    return (
        {name: arguments[name] for name in ("input", "weight", "bias")}
        | modes
        | {"simulate": d.chance(0.2), "weight_scheme": "auto"}
    )


def norm(d):
    x = floats(d, d.shape(low=1, high=3, cap=300, empty=0))
    dtype = d.choice((x.dtype, torch.float32))
    weight, bias = (floats(d, [x.shape[-1]], dtype) if d.chance(0.5) else None for _ in range(2))
    return {
        "input": x,
        "residual": floats(d, list(x.shape), x.dtype),
        "weight": weight,
        "bias": bias,
        "eps": 1e-5,
        "post_norm": d.chance(0.5),
        "column_factor": d.scale([x.shape[-1]], -4, 4) if d.chance(0.4) else None,
    }


def activation(d):
    x = floats(d, d.shape(low=1, high=3, cap=300, empty=0))
    return {
        "input": x,
        "gate": x,
        "up": floats(d, list(x.shape), x.dtype),
        "approximate": d.choice(("none", "tanh")),
        "column_factor": d.scale([x.shape[-1]], -4, 4) if d.chance(0.4) else None,
    }


def attention(d):
    b, kv_heads, size, dtype = d.randint(1, 2), d.randint(1, 2), d.choice((2, 8, 16, 33)), d.dtype()
    heads, queries, keys = kv_heads * d.randint(1, 3), d.randint(1, 6), d.randint(1, 6)
    allowed = floats(d, [d.choice((1, b)), 1, d.choice((1, queries)), keys], dtype)
    return {
        "q": floats(d, [b, queries, heads, size], dtype),
        "k": floats(d, [b, keys, kv_heads, size], dtype),
        "v": floats(d, [b, keys, kv_heads, size], dtype),
        "mask": d.choice((None, allowed, allowed > 0)),
        "causal": False,
        "scale": d.choice((0.3, 1.0)),
    }


def rotation(d):
    b, t, heads, size = d.randint(1, 3), d.randint(1, 5), d.randint(1, 4), 2 * d.randint(1, 5)
    x = floats(d, [b, t, heads, size])
    cos, sin = (d.tensor([d.choice((1, b)), t, size], kind="normal") for _ in range(2))
    return {"x": torch.empty_like(x).copy_(x), "cos": cos, "sin": sin, "heads": d.randint(0, heads)}


def kept(d, b, key_heads, size):
    shape = [b, key_heads, d.randint(1, 6)]
    names = ("key_codes", "key_scale", "value_codes", "value_scale")
    tensors = [
        f() for f in (lambda: d.integers([*shape, size], -127, 127, torch.int8), lambda: d.scale(shape, -8, 7))
    ] * 2
    return {name: torch.empty_like(t).copy_(t) for name, t in zip(names, tensors, strict=True)}, shape[2]


def cache_append(d):
    b, t, key_heads, size = d.randint(1, 3), d.randint(1, 4), d.randint(1, 2), 2 * d.randint(1, 5)
    cache, capacity = kept(d, b, key_heads, size)
    qkv = floats(d, [b, t, d.randint(1, 3) + 2 * key_heads, size])
    cos, sin = (d.tensor([1, t, size], kind="normal") for _ in range(2)) if d.chance(0.5) else (None, None)
    position = d.integers([d.choice((1, b))], 0, capacity, torch.int64)
    position = torch.empty_like(position).copy_(position)
    return cache | {"qkv": torch.empty_like(qkv).copy_(qkv), "position": position, "cos": cos, "sin": sin}


def cache_attention(d):
    b, key_heads, size = d.randint(1, 3), d.randint(1, 2), d.randint(1, 9)
    cache, capacity = kept(d, b, key_heads, size)
    q = floats(d, [b, d.randint(1, 4), key_heads * d.randint(1, 3), size])
    mask = torch.ones(b, capacity, dtype=torch.bool) if d.chance(0.5) else None
    position = d.integers([d.choice((1, b))], 0, capacity, torch.int64)
    return cache | {"q": q, "position": position, "mask": mask, "scale": 0.5}


def transformer_weights(d, shapes, width, layer_norm):
    """In the operator's order; now and then one of them spoilt, which the list as a whole would hide."""
    weights = []
    for _ in range(2):
        weights += [floats(d, [width], torch.float32), floats(d, [width], torch.float32) if layer_norm else None]
    for rows, columns in shapes:
        codes = d.integers([rows, columns], -127, 127, torch.int8)
        factor = d.scale([columns], -4, 4) if d.chance(0.2) else None
        bias = d.tensor([rows], kind="normal") if d.chance(0.5) else None
        weights += [codes, d.scale([rows, 1], -8, 7), bias, factor, None, None, None, None]
    if d.chance(0.3):
        from hostile import spoil_tensor

        for _ in range(d.choice((1, 1, 2))):
            at = d.randrange(len(weights))
            given = torch.ones(d.choice((1, 3))) if weights[at] is None else weights[at]
            weights[at] = None if d.chance(0.15) else spoil_tensor(d, given)
    return weights


def transformer(d):
    b, t, kv_heads, size = d.randint(1, 2), d.choice((1, 4, 9)), d.randint(1, 2), d.choice((2, 4, 6))
    heads, width, inner = kv_heads * d.randint(1, 2), d.randint(2, 12), d.randint(2, 12)
    activation, norm = d.choice(("gelu", "gelu_tanh", "relu", "silu_mul")), d.choice(("layer_norm", "rms_norm"))
    up = inner * (2 if activation == "silu_mul" else 1)
    shapes = [((heads + 2 * kv_heads) * size, width), (width, heads * size), (up, width), (width, inner)]
    x = floats(d, [b, t, width])
    angles = {n: d.tensor([1, t, size], kind="normal") for n in ("cos", "sin")} if d.chance(0.3) else {}
    codes = {}
    if d.chance(0.3):
        codes = {"codes": d.integers([b, t, width], -127, 127, torch.int8), "scale": d.scale([b, t, 1], -8, 7)}
    return {
        "input": x,
        "attended": floats(d, [b, t, heads * size], x.dtype),
        "weights": transformer_weights(d, shapes, width, norm == "layer_norm"),
        "heads": heads,
        "kv_heads": kv_heads,
        "norm": norm,
        "pre_norm": d.chance(0.5),
        "activation": activation,
        "causal": d.chance(0.3),
        "eps": 1e-5,
        "few_rows_float": d.chance(0.3),
        "mask": torch.ones(t, t, dtype=torch.bool).tril() if d.chance(0.3) else None,
        **angles,
        **codes,
    }


def grads(d):
    tensors = [floats(d, small(d)) for _ in range(d.randint(1, 4))]
    tensors = [torch.empty_like(t).copy_(t) for t in tensors]
    return {
        "grads": tensors,
        "scale": torch.tensor(8.0),
        "norm": torch.tensor(3.0) if d.chance(0.5) else None,
        "max_norm": d.choice((None, 1.0)),
    }


def rounding(d):
    masters = [floats(d, small(d), torch.float32) for _ in range(d.randint(1, 4))]
    masters = [torch.empty_like(t).copy_(t) for t in masters]
    parameters = [torch.zeros_like(t, dtype=d.choice((torch.float16, torch.bfloat16))) for t in masters]
    return {"parameters": parameters, "masters": masters, "seed": 1, "offset": 2}


def blockwise(d):
    return {"input": floats(d, small(d)), "signed": d.chance(0.5)}


def blockwise_codes(d):
    codes = d.integers(small(d), 0, 255, torch.uint8)
    return {"codes": codes, "scale": d.scale([-(-codes.numel() // 256)], -8, 7), "signed": d.chance(0.5)}


def adamw(d):
    params = [floats(d, small(d), d.choice((torch.float32, torch.bfloat16))) for _ in range(d.randint(1, 3))]
    params = [torch.empty_like(p).copy_(p) for p in params]
    bits = [d.choice((8, 32)) for _ in params]
    moments = {
        name: [
            torch.zeros_like(p, dtype=torch.uint8 if b == 8 else torch.float32)
            for p, b in zip(params, bits, strict=True)
        ]
        for name in ("exp_avg", "exp_avg_sq")
    }
    scales = {
        f"{name}_scale": [torch.ones(-(-p.numel() // 256) if b == 8 else 0) for p, b in zip(params, bits, strict=True)]
        for name in moments
    }
    numbers = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "seed": 1, "offset": 2}
    return {
        "params": params,
        "grads": [torch.empty_like(p).copy_(floats(d, list(p.shape), p.dtype)) for p in params],
        "steps": [torch.zeros(()) for _ in params],
        "lr": torch.tensor(1e-3),
        "grad_scale": torch.tensor(8.0) if d.chance(0.5) else None,
        "found_inf": torch.tensor(0.0) if d.chance(0.5) else None,
        **moments,
        **scales,
        **numbers,
    }


def four_bit(d):
    return {"input": floats(d, small(d, 1)), "block_size": 64, "format": "nf4", "scale_rule": "absmax"}


def four_bit_weight(d):
    n, k = d.randint(1, 8), d.choice((64, 128))
    return {
        "codes": d.integers([n, k // 2], 0, 255, torch.uint8),
        "scale": d.scale([n, k // 64], -8, 7),
        "size": [n, k],
        "input": floats(d, [d.randint(1, 5), k]),
        "grad_output": floats(d, [d.randint(1, 5), n]),
        "in_features": k,
        "lora_a": floats(d, [2, k]),
        "lora_b": floats(d, [n, 2]),
        "scaling": 0.5,
        "dropout": d.choice((0.0, 0.5)),
        "format": "nf4",
        "method": "auto",
        "dtype": d.choice(("float32", "bfloat16")),
        "seed": 1,
        "offset": 2,
    }


def scales(d):
    return {"scale": d.scale(small(d, 1), -8, 7)}


def compressed_scales(d):
    codes = d.integers(small(d, 1), 0, 255, torch.uint8)
    return {"codes": codes, "scale_scale": torch.ones(-(-codes.numel() // 256)), "scale_offset": torch.tensor(1.0)}


def dropout(d):
    x = floats(d, small(d))
    return {"input": x, "like": x, "state": torch.tensor([1, 2]), "p": 0.5, "seed": 1, "offset": 2}


def float_with_codes(d):
    k, n = d.choice((16, 33)), d.randint(1, 9)
    return {
        "input": floats(d, [d.randint(1, 5), k]),
        "codes": d.integers([n, k], -128, 127, torch.int8),
        "scale": d.scale([n], -8, 7),
        "bias": None,
    }


def outlier_rows(d):
    k = d.choice((8, 33))
    return {"input": floats(d, [d.randint(1, 5), k]), "outlier_columns": torch.tensor([1, 5]), "column_factor": None}


def outlier_product(d):
    m, n, k = d.randint(1, 4), d.randint(1, 5), d.choice((8, 33))
    return {
        "a": d.integers([m, k], -127, 127, torch.int8),
        "a_planes": d.integers([m, 4], -64, 63, torch.int8),
        "a_scale": d.scale([m, 2], -8, 7),
        "b": d.integers([n, k], -127, 127, torch.int8),
        "b_outlier": d.integers([n, 2], -127, 127, torch.int8),
        "b_scale": d.scale([n, 1], -8, 7),
        "bias": None,
    }


def threshold_columns(d):
    return {"input": floats(d, small(d, low=1)), "threshold": 6.0, "capacity": d.randint(1, 8)}


def statistics(d):
    k = d.choice((4, 17))
    return {
        "absmax": torch.zeros(k),
        "mean_abs": torch.zeros(k),
        "hessian": torch.zeros(k, k),
        "rows": torch.zeros(1, dtype=torch.int64),
        "input": floats(d, [d.randint(1, 5), k]),
    }


def column_maxima(d):
    k = d.choice((4, 17))
    return {"input_absmax": d.scale([k], -8, 7), "weight_absmax": d.scale([k], -8, 7), "alpha": 0.5}


def weight_and_hessian(d):
    k, n = d.choice((4, 16)), d.randint(1, 4)
    weight = d.tensor([n, k], kind="normal")
    return {"weight": weight, "hessian": torch.eye(k), "group_size": k}


def gptq(d):
    arguments = weight_and_hessian(d)
    return arguments | {"scale": torch.ones(arguments["weight"].shape[0], 1)}


def awq(d):
    arguments = weight_and_hessian(d)
    return arguments | {"mean_abs": torch.ones(arguments["hessian"].shape[0]), "bits": 4, "steps": 2}


def ptq_product(d):
    arguments = float_with_codes(d)
    return arguments | {"scale": arguments["scale"][:, None]}


def distilled(d):
    shape = small(d, low=1)
    return {"student": floats(d, shape), "teacher": floats(d, shape), "mask": torch.ones(shape[:-1])}


def distilled_topk(d):
    shape = small(d, low=1)
    k = d.randint(1, max(shape[-1], 1))
    values = torch.log_softmax(torch.randn(*shape[:-1], k), -1)
    indices = torch.arange(k).expand(*shape[:-1], k).contiguous()
    return {"student": floats(d, shape), "teacher_values": values, "teacher_indices": indices, "mask": None}


def distilled_rows(d):
    return distilled(d) | {"indices": None, "kind": d.choice(("kl", "mse", "cosine")), "temperature": 1.5}


def distilled_gradient(d):
    arguments = distilled_rows(d)
    rows = list(arguments["student"].shape[:-1])
    return arguments | {"grad": torch.ones(rows), "moments": torch.ones(*rows, 4)}


def pruned(d):
    return {"weight": floats(d, small(d, low=1)), "input_norm": None, "sparsity": 0.5, "pattern": "layer"}


def pruned_together(d):
    return {"weights": [floats(d, small(d, low=1)) for _ in range(2)], "sparsity": 0.5}


def bits(d):
    return {"mask": d.integers(small(d), 0, 1, torch.bool)}


def packed_bits(d):
    shape = small(d)
    return {"mask": torch.zeros((torch.Size(shape).numel() + 7) // 8, dtype=torch.uint8), "shape": shape}


def masked(d):
    tensors = [torch.ones(small(d)) for _ in range(2)]
    return {"tensors": tensors, "masks": [torch.zeros((t.numel() + 7) // 8, dtype=torch.uint8) for t in tensors]}


def sparsegpt(d):
    arguments = weight_and_hessian(d)
    return {"weight": arguments["weight"], "hessian": arguments["hessian"], "sparsity": 0.5, "pattern": "row"}


ARGUMENTS = {
    **dict.fromkeys(("distillation_kl", "hidden_mse", "hidden_cosine", "attention_kl"), distilled),
    "distillation_kl_topk": distilled_topk,
    "_distillation_rows": distilled_rows,
    "_distillation_rows_backward": distilled_gradient,
    "prune_mask": pruned,
    "prune_masks": pruned_together,
    "pack_mask": bits,
    "unpack_mask": packed_bits,
    "apply_masks_": masked,
    "sparsegpt_prune": sparsegpt,
    "int8_quantize_rows_outliers": outlier_rows,
    "int8_mm_outliers": outlier_product,
    "int8_outlier_columns": threshold_columns,
    "column_statistics_": statistics,
    "smooth_factor": column_maxima,
    "gptq_round": gptq,
    "awq_scale": awq,
    "_ptq_linear": ptq_product,
    **dict.fromkeys(("quantize_4bit", "quantize_4bit_affine"), four_bit),
    **dict.fromkeys(("dequantize_4bit", "linear_4bit", "_linear_4bit_grad_input", "linear_4bit_lora"), four_bit_weight),
    "compress_scale": scales,
    "decompress_scale": compressed_scales,
    **dict.fromkeys(("_dropout", "_dropout_state"), dropout),
    "adamw_8bit_": adamw,
    "quantize_8bit_blockwise": blockwise,
    "dequantize_8bit_blockwise": blockwise_codes,
    **dict.fromkeys(("fake_quantize", "fake_quantize_learnable"), fake),
    "_fake_quantize_mask": fake_mask,
    "_fake_quantize_backward": fake_backward,
    "_fake_quantize_learnable_backward": learnable_backward,
    **dict.fromkeys(("fake_quantize_dynamic", "choose_qparams", "_min_max"), ranged),
    "_mse_range": mse,
    "_qparams_from_range": range_ends,
    "_percentile_range": percentile,
    "_observe_": observed,
    "_observe_qparams_": observed_qparams,
    **dict.fromkeys(("batch_norm_act", "batch_norm_act_fake_quantize", "_batch_norm_statistics"), batch_norm),
    "_batch_norm_forward": batch_norm,
    "_batch_norm_backward": batch_norm_backward,
    "_batch_norm_update_": batch_norm_update,
    **dict.fromkeys(("fold_fake_quantize", "_fold_fake_quantize", "_fold_fake_quantize_backward"), folded),
    "quantize": quantize,
    "dequantize": dequantize,
    "pack_int4": pack,
    "unpack_int4": unpack,
    **dict.fromkeys(("fixed_point_quantize", "_fixed_point_quantize_mask"), fixed),
    "fixed_point_fraction_length": fraction_length,
    "fixed_point_requantize": requantize,
    **dict.fromkeys(("fixed_point_conv2d", "fixed_point_conv2d_requantize"), convolution),
    "fixed_point_linear": linear_codes,
    "fixed_point_add": add,
    **dict.fromkeys(("fixed_point_max_pool2d", "fixed_point_sum_pool2d"), pool),
    **dict.fromkeys(("quantize_gradient", "quantize_gradient_codes"), gradient),
    "_quantize_gradient_both": gradient_both,
    "dequantize_gradient": dequantize_gradient,
    "_reflect_rows": reflect,
    "fqt_linear": fqt_linear,
    "fqt_conv2d": fqt_conv2d,
    "fqt_conv2d.padding": fqt_conv2d_padding,
    "quant_conv2d": quant_conv2d,
    "fake_quantize_codes": one_scale,
    **dict.fromkeys(
        ("norm_act_fake_quantize", "norm_act_fake_quantize_dynamic", "_norm_act_range", "_norm_act_backward"), norm_act
    ),
    "_norm_act_forward": norm_act_forward,
    "quant_linear": quant_linear,
    **dict.fromkeys(("int8_quantize_rows", "int8_quantize_columns", "int8_quantize_rows_and_columns"), matrix),
    "int8_transpose": codes,
    "int8_weight_transpose": weight_transpose,
    **dict.fromkeys(("int8_mm", "int8_mm_accumulate_"), product),
    "int8_weight_mm": float_with_codes,
    "int8_linear": int8_linear,
    **dict.fromkeys(("int8_layer_norm", "int8_rms_norm", "int8_add_layer_norm", "int8_add_rms_norm"), norm),
    **dict.fromkeys(("int8_gelu", "int8_relu", "int8_silu_mul"), activation),
    "_attention": attention,
    "rotate_heads_": rotation,
    "kv_cache_append_": cache_append,
    "kv_cache_attention": cache_attention,
    **dict.fromkeys(("int8_transformer_layer", "int8_transformer_qkv", "int8_transformer_output"), transformer),
    **dict.fromkeys(("_amp_check_norm", "_amp_scale_"), grads),
    "_amp_round_stochastic_": rounding,
}
