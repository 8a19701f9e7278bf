"""One list of layers and inputs that every test of the quantized layers draws from."""

import torch
from torch import nn

import quantrain.nn as qnn
from quantrain import QuantSpec, Recipe

# Those whose forward passes differ, and two of the many that differ from qat-w8a8 in their gradients only (test_fqt_layers.py). Recipes of
# integer products are for Linear layers (test_int8_layers.py), those in fixed point have layers of their own (test_fixed_point_layers.py).
RECIPES = [
    *(
        name
        for name in Recipe.names()
        if not (name.startswith(("fqt-", "f8net")) or Recipe.from_name(name).linear_only)
        and not Recipe.from_name(name).scheme_is("four_bit")  # test_four_bit_layers.py
        and name != "w8a16"  # not bit for bit: test_int8_weight_mm.py
        and Recipe.from_name(name).prune is None  # rounds nothing
    ),
    "fqt-bhq5",
    "fqt-psq4-paper",
]


def make_recipe(bits=8, granularity="per_channel", symmetric=True, observer="dynamic", learnable=False, **fields):
    weight = QuantSpec(
        bits=bits, granularity=granularity, symmetric=symmetric, observer=observer, learnable=learnable, group_size=4
    )
    fields.setdefault("input", QuantSpec(bits=bits, symmetric=False, observer="moving_average"))
    return Recipe(weight=weight, **fields)


def linear(recipe):
    return qnn.QuantLinear(8, 5, recipe=recipe), torch.randn(6, 8)


def odd_linear(recipe):
    return qnn.QuantLinear(7, 3, bias=False, recipe=recipe), torch.randn(2, 3, 7)


def conv(recipe):
    return qnn.QuantConv2d(4, 6, 3, stride=2, padding=1, recipe=recipe), torch.randn(2, 4, 9, 9)


def grouped_conv(recipe):
    layer = qnn.QuantConv2d(4, 8, (3, 1), padding="same", dilation=2, groups=2, padding_mode="reflect", recipe=recipe)
    return layer, torch.randn(2, 4, 8, 8)


def depthwise_conv(recipe):
    return qnn.QuantConv2d(4, 4, 3, groups=4, bias=False, recipe=recipe), torch.randn(3, 4, 6, 6)


def conv_bn(recipe, bias=False):
    layer = qnn.QuantConvBn2d(4, 6, 3, padding=1, bias=bias, recipe=recipe)
    with torch.no_grad():
        layer.bn.weight.uniform_(-1.5, 1.5)
        layer.bn.bias.normal_()
        layer.bn.running_mean.normal_()
        layer.bn.running_var.uniform_(0.5, 2)
    return layer, torch.randn(4, 4, 6, 6)


def conv_bn_with_bias(recipe):
    return conv_bn(recipe, bias=True)


def embedding(recipe):
    return qnn.QuantEmbedding(11, 8, padding_idx=2, recipe=recipe), torch.randint(0, 11, (3, 5))


def odd_embedding(recipe):
    return qnn.QuantEmbedding(6, 5, recipe=recipe), torch.tensor([0, 5, 5], dtype=torch.int32)


class Conv1D(nn.Module):
    """As transformers.pytorch_utils.Conv1D: a linear layer that holds its weight as [in, out]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / 4), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        y = torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight)
        return y.reshape(*x.shape[:-1], self.nf)


def transposed_linear(recipe):
    return qnn.QuantTransposedLinear.from_float(Conv1D(5, 8), recipe), torch.randn(2, 3, 8)


def conv1d(recipe):
    return qnn.QuantConv1d(4, 6, 5, stride=2, padding=1, dilation=2, groups=2, recipe=recipe), torch.randn(3, 4, 19)


def reflecting_conv1d(recipe):
    layer = qnn.QuantConv1d(4, 6, 3, padding="same", padding_mode="reflect", bias=False, recipe=recipe)
    return layer, torch.randn(3, 4, 7)


def without_gradients(recipe):
    return qnn.changed_recipe(qnn.as_recipe(recipe), {"scheme": None})


def conv_transpose(recipe):
    recipe = without_gradients(recipe)
    return qnn.QuantConvTranspose2d(4, 3, 3, stride=2, padding=1, bias=False, recipe=recipe), torch.randn(2, 4, 5, 6)


def grouped_conv_transpose(recipe):
    layer = qnn.QuantConvTranspose2d(
        4, 6, (3, 2), stride=2, output_padding=1, groups=2, dilation=(2, 1), recipe=without_gradients(recipe)
    )
    return layer, torch.randn(2, 4, 5, 6)


BUILDERS = [
    linear,
    odd_linear,
    transposed_linear,
    conv1d,
    reflecting_conv1d,
    conv_transpose,
    grouped_conv_transpose,
    conv,
    grouped_conv,
    depthwise_conv,
    conv_bn,
    conv_bn_with_bias,
    embedding,
    odd_embedding,
]


def calibrated(build, recipe, seed=0, device="cpu"):
    """A calibrated layer and its input; the values are the same on every device."""
    torch.manual_seed(seed)
    layer, x = build(recipe)
    layer, x = layer.to(device), x.to(device)
    qnn.calibrate(layer, [x])
    return layer, x
