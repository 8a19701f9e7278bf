"""Linear layers: what lies before them in one pass, inputs kept as codes, one node a step, shared inputs, norms."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantrain
import quantrain.nn as qnn
from quantrain.nn.fake_quantize import Before, Quantized

transformers = pytest.importorskip("transformers")
RECIPES = ["qat-w8a8", "qat-w8a8-token", "qat-w4a8", "fqt-psq8", "qat-w4a4"]


def llama():
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128, use_cache=False
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), lambda m, x: m(x, labels=x).loss, torch.randint(128, (2, 16))


def bert():
    config = transformers.BertConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    return model, lambda m, x: m(x, labels=x[:, 0] % 2).loss, torch.randint(128, (2, 16))


def gpt2():
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=32, use_cache=False, attn_pdrop=0.0, embd_pdrop=0.0,
        resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), lambda m, x: m(x, labels=x).loss, torch.randint(128, (2, 16))


def vit():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 96)
    return model, lambda m, x: (m(x) - 1).square().mean(), torch.randn(2, 3, 32, 32)


class Feed(nn.Module):
    """A gated feed-forward behind an RMS norm, and a plain one behind a layer norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.RMSNorm(32, 1e-5), nn.LayerNorm(32)
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48, bias=False), nn.Linear(48, 32)
        self.wide, self.act, self.out = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 10)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.out(self.act(self.wide(self.last(x))))


def feed():
    return Feed(), lambda m, x: m(x).square().mean(), torch.randn(6, 5, 32)


MODELS = [llama, bert, gpt2, vit, feed]
JOINED = {
    llama: ["one fake-quantized input of gate_proj, up_proj", "silu mul + input of down_proj",
            "one fake-quantized input of q_proj, k_proj, v_proj", "input_layernorm: rms norm as one operator"],
    bert: ["one fake-quantized input of query, key, value"],
    gpt2: ["gelu tanh + input of c_proj"],
    vit: ["layer norm + input of mlp.0", "gelu + input of mlp.3"],
    feed: ["rms norm + input of gate, up", "silu mul + input of down", "layer norm + input of wide", "gelu + input of out"],
}  # fmt: skip


def prepared(make, recipe, *, fuse):
    torch.manual_seed(0)
    model, loss, x = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what stays float
        qnn.prepare(model, recipe, fuse=fuse)
    if not fuse:
        for layer in model.modules():
            if isinstance(layer, qnn.QuantLayer):
                layer.second_derivatives = True  # the operators one by one
    return model.train(), loss, x


def trained(model, loss, x, steps=4, rate=0.05):
    optimizer = torch.optim.SGD(model.parameters(), rate)
    torch.manual_seed(7)
    found = []
    for _ in range(steps):
        value = loss(model, x)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_it_trains_as_call_by_call(make, recipe):
    joined, loss, x = prepared(make, recipe, fuse=True)
    plain, _, _ = prepared(make, recipe, fuse=False)
    assert list(joined.state_dict()) == list(plain.state_dict())
    rows = "\n".join(joined.quantization_summary.fused)
    if recipe != "qat-w4a4":
        for text in JOINED[make]:
            assert text in rows, f"expected {text} in\n{rows}"
    ours, theirs = trained(joined, loss, x), trained(plain, loss, x)
    # A code on the other side of a midpoint, of a sum in another order, and what follows from it.
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)
    assert ours[-1] < ours[0]
    joined.eval()
    with torch.no_grad():
        before = loss(joined, x)
        assert torch.equal(loss(qnn.convert(joined), x), before)


def layer_of(recipe, **options):
    torch.manual_seed(0)
    return qnn.QuantLinear(32, 16, recipe=recipe, **options).train()


@pytest.mark.parametrize("recipe", RECIPES[:4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_s_step_is_that_of_its_operators(recipe, dtype):
    """Output and gradients to the bit; so are ranges, and the draws of quantized gradients."""
    node, plain = layer_of(recipe, dtype=dtype), layer_of(recipe, dtype=dtype)
    plain.second_derivatives = True
    for seed in range(3):
        x = [
            torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
            for _ in "ab"
        ]
        results = []
        for layer, given in zip((node, plain), x, strict=True):
            torch.manual_seed(seed)
            y = layer(given)
            y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype))
            results.append((y, given.grad, layer.weight.grad.clone(), layer.bias.grad.clone()))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(node.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w8a8-token"])
def test_what_a_step_keeps(recipe):
    """The input's codes, bits where one may clip, and the weight itself: neither of the two rounded."""
    layer, kept = layer_of(recipe), []
    x = torch.randn(40, 32, requires_grad=True)
    layer(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    wide = [t for t in kept if t is not None and t.is_floating_point() and t.numel() >= 32 * 16]
    assert [t.data_ptr() for t in wide] == [layer.weight.data_ptr()]
    assert [t.numel() for t in kept if t is not None and t.dtype in (torch.int8, torch.uint8) and t.numel() > 160] == [
        40 * 32
    ]


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_of_4_bits_are_kept_two_to_a_byte(symmetric):
    """And decode to what they were: signed and not, an odd number of them, channels last."""
    recipe = quantrain.Recipe.from_name("qat-w8a8")
    recipe.input.bits, recipe.input.symmetric = 4, symmetric
    x = torch.randn(3, 3, 5, 7).contiguous(memory_format=torch.channels_last)
    found, sizes = [], []
    for packs in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.Flatten(2), nn.Linear(15, 3))
        qnn.prepare(model, recipe, fuse=True).train()
        model[0].packs_codes = model[3].packs_codes = packs
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = model(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in model.parameters())])
        codes = (torch.int8, torch.uint8)
        sizes.append(sorted(t.numel() for t in kept if t is not None and t.dtype in codes and t.numel() > 100))
    assert sizes == [[(3 * 5 * 15 + 1) // 2, (3 * 3 * 5 * 7 + 1) // 2], [3 * 5 * 15, 3 * 3 * 5 * 7]]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_autocast_with_float32_weights():
    layer, plain = layer_of("qat-w8a8-token"), layer_of("qat-w8a8-token")
    plain.second_derivatives = True
    x = torch.randn(8, 32)
    for given in (layer, plain):
        with torch.autocast("cpu", torch.bfloat16):
            y = given(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=2e-2, atol=2e-2)
    assert layer.weight.grad.dtype == torch.float32


def test_second_derivatives_where_they_are_asked_for():
    layer = layer_of("qat-w8a8")
    x = torch.randn(8, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="expected one derivative"):
        grad.square().sum().backward()
    layer.second_derivatives = True
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_torch_func_and_forward_mode_take_the_operators():
    layer = layer_of("qat-w8a8")
    x = torch.randn(4, 32)
    layer(x)
    layer.input_fake_quant.enable_observer(False)
    gradient = torch.func.grad(lambda t: layer(t).sum())(x)
    y = x.clone().requires_grad_()
    layer(y).sum().backward()
    torch.testing.assert_close(gradient, y.grad)


# ---- layers that read one tensor ------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x, memory=None):  # a default argument: no graph shows it
        memory = x if memory is None else memory
        return self.q(x) + self.k(memory) * self.v(memory)


class Alike(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.seen = 0

    def forward(self, x):
        self.seen += 1  # nor this
        return self.q(x).sigmoid() * self.k(x) + self.v(x)


def test_a_shared_input_is_rounded_and_observed_once():
    torch.manual_seed(0)
    model = qnn.prepare(Alike(), "qat-w8a8", fuse=True).train()
    assert model.quantization_summary.fused == ("one fake-quantized input of q, k, v",)
    assert model.q.input_fake_quant is model.k.input_fake_quant is model.v.input_fake_quant
    plain = qnn.prepare(Alike(), "qat-w8a8").train()
    plain.load_state_dict(model.state_dict())
    for step in range(3):  # the same tensor again is another call
        x = torch.linspace(-2 - step, 3, 64).view(4, 16)
        a, b = model(x), plain(x)
        assert torch.equal(a, b)
        a.sum().backward()
        b.sum().backward()
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert model.q.input_fake_quant._latest is None  # nothing is kept once all have it


def test_what_a_call_left_is_not_taken_by_the_next():
    """One reader stays away, or the tensor changes in between."""
    model = qnn.prepare(Alike(), "qat-w8a8-token", fuse=True).train()
    x = torch.randn(4, 16)
    first = model.q(x)
    again = model.q(x)
    assert torch.equal(first, again)
    first.sum().backward()
    again.sum().backward()  # of a graph of its own
    model.q(x)
    x.mul_(2.0)
    plain = copy.deepcopy(model.k)
    plain.reader = None
    assert torch.equal(model.k(x), plain(x))


def test_layers_that_read_two_tensors_share_nothing():
    model = qnn.prepare(Attention(), "qat-w8a8", fuse=True)
    assert model.quantization_summary.fused == ("one fake-quantized input of k, v",)
    assert model.q.input_fake_quant is not model.k.input_fake_quant


def test_copies_files_and_the_way_back():
    torch.manual_seed(0)
    model, loss, x = prepared(llama, "qat-w8a8", fuse=True)
    loss(model, x).backward()
    again = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (again, loaded):
        layer = other.model.layers[0].self_attn
        assert layer.q_proj.input_fake_quant is layer.k_proj.input_fake_quant
        assert layer.q_proj.input_fake_quant.readers == 3
        assert other.model.norm.forward.norm is other.model.norm
        assert torch.equal(loss(other, x), loss(model, x))
    qnn.convert(model.eval())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_recomputed_layers_share_too():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model = qnn.prepare(Alike(), "qat-w8a8", fuse=True).train()
    plain = copy.deepcopy(model)
    x = torch.randn(4, 16, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    for _ in range(2):
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
        plain(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w8a8-token"])
def test_compiled(recipe):
    """Shared inputs too: the first of the layers observes for all."""
    torch.manual_seed(0)
    model = qnn.prepare(Feed(), recipe, fuse=True).train()
    x = torch.randn(6, 5, 32)
    model(x)
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(seed))
        a, b = compiled(x), eager(x)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        a.sum().backward()
        b.sum().backward()
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-2, atol=1e-2)


# ---- what goes before -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w8a8-token", "qat-w4a4"])
def test_before_is_what_pytorch_computes(recipe):
    """Also in evaluation, and where it cannot be joined: the modules' own calls."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(32)
    x = torch.randn(3, 4, 32, requires_grad=True)
    for before, want in (
        (Before("gelu"), F.gelu(x)),
        (Before("silu_mul", x.flip(0)), F.silu(x) * x.flip(0)),
        (Before("layer_norm", norm=norm), norm(x)),
    ):
        fake_quant = layer_of(recipe).input_fake_quant.train()
        plain = copy.deepcopy(fake_quant)
        for training in (True, False):
            found = fake_quant.train(training)(x, before=before)
            assert isinstance(found, Quantized) == training
            values = found.values if isinstance(found, Quantized) else found
            torch.testing.assert_close(values, plain.train(training)(want), rtol=1e-5, atol=1e-5)


def test_dropout_between_keeps_them_apart():
    class Block(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.first, self.drop, self.second = nn.Linear(8, 8), nn.Dropout(p), nn.Linear(8, 8)

        def forward(self, x):
            return self.second(self.drop(F.gelu(self.first(x))))

    assert qnn.prepare(Block(0.1), "qat-w8a8", fuse=True).quantization_summary.fused == ()
    model = qnn.prepare(Block(0.0), "qat-w8a8", fuse=True).train()
    assert model.quantization_summary.fused == ("gelu + input of second",)
    model(torch.randn(4, 8))
    model.drop.p = 1.0  # the written pass comes back
    assert torch.equal(model(torch.randn(4, 8)), model.second(torch.zeros(4, 8)))


class GemmaLikeRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(8)), 1e-6

    def forward(self, hidden_states):
        x = hidden_states.float()
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)).type_as(hidden_states)


def test_only_what_is_an_rms_norm_becomes_one():
    model = nn.Sequential(GemmaLikeRMSNorm(), nn.Linear(8, 8))
    qnn.prepare(model, "qat-w8a8", fuse=True)
    assert "forward" not in model[0].__dict__
    llama_norm = transformers.models.llama.modeling_llama.LlamaRMSNorm(8)
    model = qnn.prepare(nn.Sequential(llama_norm, nn.Linear(8, 8)), "qat-w8a8", fuse=True)
    x = torch.randn(3, 8)
    assert "forward" in model[0].__dict__
    torch.testing.assert_close(model[0](x), type(llama_norm).forward(llama_norm, x))
    assert model[0](x.bfloat16()).dtype == type(llama_norm).forward(llama_norm, x.bfloat16()).dtype
    model[0].variance_epsilon = 0.5
    torch.testing.assert_close(model[0](x), type(llama_norm).forward(llama_norm, x))


# ---- a kept weight --------------------------------------------------------------------------------------------------


def test_the_weight_cache_rounds_once_per_step():
    model = nn.Sequential(layer_of("qat-w8a8"))
    plain = copy.deepcopy(model)
    qnn.enable_weight_cache(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, plain)]
    kept = []
    for _ in range(3):
        for micro in range(2):
            x = torch.randn(4, 32, generator=torch.Generator().manual_seed(micro))
            assert torch.equal(model(x), plain(x))
            for m in (model, plain):
                m(x).square().sum().backward()
            kept.append(model[0]._kept[2])
        assert kept[-1] is kept[-2]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert len({id(t) for t in kept}) == 3
    assert torch.equal(model[0].weight, plain[0].weight)
    model.load_state_dict({k: v * 2 if k.endswith("weight") else v for k, v in model.state_dict().items()})
    x = torch.randn(4, 32)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))
    qnn.enable_weight_cache(model, False)
    assert model[0]._kept is None


# ---- CUDA -----------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("make", [llama, vit, feed], ids=lambda make: make.__name__)
def test_a_captured_step_is_the_eager_one(make, recipe):
    """Forward, backward and update as one CUDA graph, ranges included."""
    model, loss, x = prepared(make, recipe, fuse=True)
    model, x = model.cuda(), x.cuda()
    first = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):  # first ranges, and scales of weights that began as zeros
        loss(model, x).backward()
        first.step()
        first.zero_grad()
    eager = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (model, eager)]

    def step(m, optimizer):
        value = loss(m, x)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, optimizers[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step(model, optimizers[0])
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(start[name])
    torch.manual_seed(3)
    captured = []
    for _ in range(3):
        graph.replay()
        captured.append(value.item())
    torch.manual_seed(3)
    plain = [step(eager, optimizers[1]).item() for _ in range(3)]
    torch.testing.assert_close(captured, plain, rtol=5e-3 if recipe.startswith("fqt") else 1e-4, atol=1e-5)
