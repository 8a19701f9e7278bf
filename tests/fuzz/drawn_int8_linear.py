"""Drawn test of int8_linear: its codes, draws and products are the family's own, as its header states."""

import torch
import torch.nn.functional as F
from draw import Draw, drawn, same
from drawn_fqt import backward, compare, leaves_of

ops = torch.ops.quantrain


@drawn("int8_linear")
def int8_linear(d: Draw):
    k, outputs, dtype = d.size(), d.size(), d.dtype()
    x = d.tensor([*d.shape(high=3, cap=60), k], dtype, d.choice(("normal", "heavy", "zero")))
    weight = d.tensor(
        [outputs, k], d.choice((dtype, torch.float32)) if d.chance(0.2) else dtype, d.choice(("normal", "heavy"))
    )
    bias = d.tensor([outputs], dtype, "normal") if d.chance(0.5) else None
    scheme = d.choice(("fold", "columns"))
    modes = {name: d.choice(("int8", "int8", "none")) for name in ("output", "grad_input", "grad_weight")}
    if weight.dtype != dtype:
        modes = dict.fromkeys(modes, "int8")  # a product in floating point wants one type
    g = d.tensor([*x.shape[:-1], outputs], dtype, "normal")
    given = d.chance(0.2)
    seed = d.getrandbits(31)
    if scheme == "columns" and modes["grad_input"] == "int8" and (given or modes["output"] == "none"):
        d.tags.add("columns of codes")  # the weight is rounded twice
    d.notes |= {"input": x, "weight": weight, "bias": bias, "grad": g, "scheme": scheme, "given codes": given, **modes}
    for device in d.devices:
        leaves = leaves_of(d, device, (x, weight, bias))
        cx, cw, cb = (None if leaf is None else leaf.detach() for leaf in leaves)
        cg = d.on(device, g)
        xq, sx = ops.int8_quantize_rows(cx)
        wq, sw = ops.int8_quantize_rows(cw)
        codes = {"weight_codes": wq, "weight_scale": sw} if given and modes["output"] == "int8" else {}
        y = ops.int8_linear(*leaves, **modes, weight_scheme=scheme, **codes)
        if modes["output"] == "int8":
            same(y.detach().cpu(), ops.int8_mm(xq, wq, sx, sw, cb, out_dtype=dtype).cpu(), f"int8_linear on {device}")
        else:
            exact = F.linear(cx.double(), cw.double(), None if cb is None else cb.double())
            size = F.linear(cx.double().abs(), cw.double().abs(), None if cb is None else cb.double().abs())
            compare(y, exact, size, dtype, k, f"int8_linear's floating-point output on {device}")
        found = backward(d, y, leaves, cg, seed)
        torch.manual_seed(seed)
        gradients(d, found, cx, cw, cg, (xq, sx, sw), modes, scheme, device)
        if bias is not None:
            whole = cg.double().reshape(-1, outputs)
            compare(
                found[2],
                whole.sum(0),
                whole.abs().sum(0),
                bias.dtype,
                len(whole),
                f"int8_linear's gradient of the bias on {device}",
            )


def gradients(d, found, x, weight, g, rounded, modes, scheme, device):
    xq, sx, sw = rounded
    k, outputs = x.shape[-1], weight.shape[0]
    what = f"int8_linear's gradient of the {{}} on {device}"
    by_input, by_weight = modes["grad_input"] == "int8", modes["grad_weight"] == "int8"
    transposed, factor, scale = ops.int8_weight_transpose(weight, sw, scheme=scheme)
    rows = columns = None
    if by_input and by_weight:
        rows, row_scale, columns, column_scale = ops.int8_quantize_rows_and_columns(
            g, column_factor=factor, row_factor=sx, stochastic=True
        )
    elif by_input:
        rows, row_scale = ops.int8_quantize_rows(g, column_factor=factor, stochastic=True)
    elif by_weight:
        columns, column_scale = ops.int8_quantize_columns(g, row_factor=sx, stochastic=True)
    flat, inputs = g.reshape(-1, outputs), x.reshape(-1, k)
    if rows is not None:
        wanted = ops.int8_mm(rows, transposed, row_scale, scale, out_dtype=x.dtype)
        same(found[0].cpu(), wanted.cpu(), what.format("input"))
    else:
        exact = g.double() @ weight.double()
        compare(found[0], exact, g.double().abs() @ weight.double().abs(), x.dtype, outputs, what.format("input"))
    if columns is not None:
        wanted = ops.int8_mm(columns, ops.int8_transpose(xq.reshape(-1, k)), column_scale, None, out_dtype=weight.dtype)
        same(found[1].cpu(), wanted.cpu(), what.format("weight"))
    else:
        exact = flat.double().t() @ inputs.double()
        compare(
            found[1],
            exact,
            flat.double().abs().t() @ inputs.double().abs(),
            weight.dtype,
            len(flat),
            what.format("weight"),
        )
