"""Joined linear layers in models of transformers and torchvision, and what users do to a model between two steps."""

import copy
import gc
import pickle
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import quantrain
import quantrain.nn as qnn
from quantrain.nn.fake_quantize import Quantized

# ---- models as they are ---------------------------------------------------------------------------------------------

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 128,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def causal(name, **options):
    def make():
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, f"{name}Config")(**SMALL | options)
        model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
        return model, lambda m, x: m(input_ids=x, labels=x).loss, torch.randint(3, 128, (2, 12))

    return make


def t5():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, vocab_size=128, dropout_rate=0.0,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    return model, lambda m, x: m(input_ids=x, labels=x).loss, torch.randint(3, 128, (2, 12))


def whisper():
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=128, num_mel_bins=16, max_source_positions=20,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, dropout=0.0,
    )  # fmt: skip
    x = (torch.randn(2, 16, 40), torch.randint(3, 128, (2, 6)))
    model = transformers.WhisperForConditionalGeneration(config)
    return model, lambda m, x: m(input_features=x[0], labels=x[1]).loss, x


def swin():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.SwinTransformer([4, 4], 32, [2], [2], [4, 4], stochastic_depth_prob=0.0, num_classes=10)
    return model, lambda m, x: (m(x) - 1).square().mean(), torch.randn(2, 3, 16, 16)


MODELS = {
    "qwen3": causal("Qwen3", head_dim=16),
    "gemma2": causal("Gemma2", head_dim=16),
    "phi3": causal("Phi3"),
    "mixtral": causal("Mixtral", num_local_experts=2),
    "t5": t5,
    "whisper": whisper,
    "swin": swin,
}


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w4a8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_evaluates_and_converts_as_without(name, recipe):
    found = []
    for fuse in (True, False):
        torch.manual_seed(0)
        model, loss, x = MODELS[name]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what stays float
            qnn.prepare(model, recipe, fuse=fuse)
        if fuse:
            assert model.quantization_summary.fused
        else:
            by_operators(model)
        optimizer = torch.optim.SGD(model.train().parameters(), 0.02)
        losses = []
        for _ in range(3):
            value = loss(model, x)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        found.append((model, losses))
    (joined, ours), (plain, theirs) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert list(joined.state_dict()) == list(plain.state_dict())
    whole = sum(p.grad.square().sum() for p in plain.parameters() if p.grad is not None).sqrt()
    for (path, a), b in zip(joined.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), path
        if b.grad is not None:
            assert (a.grad - b.grad).norm() < 1e-2 * whole, path
    assert not any(module._latest for module in joined.modules() if isinstance(module, qnn.FakeQuantize))
    plain.load_state_dict(joined.state_dict())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experts without a token
        want = loss(joined.eval(), x)
        assert torch.equal(loss(plain.eval(), x), want)
        assert torch.equal(loss(qnn.convert(joined), x), want)


# ---- which layers read one tensor -----------------------------------------------------------------------------------


class Alike(nn.Module):
    """Its source is read; no graph shows it, as it writes an attribute."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.seen = 0

    def forward(self, x):
        self.seen += 1
        return self.q(x).sigmoid() * self.k(x) + self.v(x)


class Chain(Alike):
    def forward(self, x):
        self.seen += 1
        x = F.relu(self.q(x))  # the call comes before the assignment
        return self.k(x)


class Arms(Alike):
    def forward(self, x, which="q"):
        if which == "q":
            return self.q(x)
        return self.k(x) if which == "k" else self.v(x)


class InPlace(Alike):
    def forward(self, x):
        self.seen += 1
        y = self.q(x)
        x.mul_(2.0)
        y = y + self.k(x)
        x[0] = 1.0
        return y + self.v(x)


class Memory(Alike):
    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        return self.q(x) + self.k(memory) * self.v(memory)


class Later(Alike):
    def forward(self, x):
        self.seen += 1
        y = self.q(x)
        if (x := y * 1.0).sum() > 1e9:
            return x
        return self.k(x) + self.v(x)


@pytest.mark.parametrize(
    "block, tied",
    [(Alike, "q, k, v"), (Chain, ""), (Arms, ""), (InPlace, ""), (Memory, "k, v"), (Later, "k, v")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_layers_are_tied_that_one_call_gives_one_tensor(block, tied):
    model = qnn.prepare(block(), "qat-w8a8", fuse=True)
    assert model.quantization_summary.fused == ((f"one fake-quantized input of {tied}",) if tied else ())
    assert (model.q.input_fake_quant is model.k.input_fake_quant) == tied.startswith("q")


def test_a_layer_with_two_places_is_tied_in_neither():
    model = nn.Sequential(Alike(), Alike())
    model[1].q = model[0].q
    qnn.prepare(model, "qat-w8a8", fuse=True)
    assert model.quantization_summary.fused == tuple(f"{n}: one fake-quantized input of k, v" for n in (0, 1))


def by_operators(model):
    for layer in model.modules():
        if isinstance(layer, qnn.QuantLayer):
            layer.second_derivatives = True
    return model


def pair(block=Alike, recipe="qat-w8a8"):
    torch.manual_seed(0)
    model = block()
    plain = copy.deepcopy(model)
    return qnn.prepare(model, recipe, fuse=True).train(), qnn.prepare(plain, recipe).train()


def batch(seed=0, rows=4):
    return (seed + 1) * torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


def train(model, change=lambda x: x, call=lambda model, x: model(x)):
    for seed in range(3):
        y = call(model, change(batch(seed)))
        if y.requires_grad:
            y.sum().backward()


def without_gradients(model):
    with torch.no_grad():
        train(model)


def one_frozen(model):
    model.k.requires_grad_(False)
    train(model)


def with_hooks(model):
    model.q.input_fake_quant.register_forward_hook(lambda *_: None)
    train(model)


def reentrant(model):
    call = lambda model, x: checkpoint(model, x.requires_grad_(), use_reentrant=True)
    train(model, call=call)


WAYS = {
    "calibrated": lambda model: qnn.calibrate(model, [batch(seed) for seed in range(3)]),
    "calibrated in eval": lambda model: qnn.calibrate(model.eval(), [batch(seed) for seed in range(3)]),
    "without gradients": without_gradients,
    "all frozen": lambda model: train(model.requires_grad_(False)),
    "one frozen": one_frozen,
    "float64": lambda model: train(model.double(), torch.Tensor.double),
    "vectors": lambda model: train(model, lambda x: x[0]),
    "empty first": lambda model: model(torch.empty(0, 16)) is train(model),
    "second derivatives": lambda model: train(by_operators(model)),
    "hooks": with_hooks,
    "checkpointed, reentrant": reentrant,
    "twice": lambda model: train(model, call=lambda model, x: model(x) + model(x)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_range_moves_once_per_tensor_however_it_is_trained(way):
    joined, plain = pair()
    for model in (joined, plain):
        WAYS[way](model)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(joined.state_dict()[name], value, msg=name)
    for (name, a), b in zip(joined.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


# ---- how long what is shared lives ----------------------------------------------------------------------------------


def test_a_freed_graph_is_not_taken_over():
    """One layer alone, its backward pass, then another with the same leaf."""
    joined, plain = pair()
    grads = []
    for model in (joined, plain):
        x = batch().requires_grad_()
        model.q(x).sum().backward()
        model.k(x).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w8a8-token"])
def test_nothing_outlives_a_step(recipe):
    model, _ = pair(recipe=recipe)
    x = batch() * 1
    kept = [weakref.ref(x)]
    model.q.register_forward_hook(lambda module, given, y: kept.append(weakref.ref(y)))
    model.q(x).sum().backward()  # the other two never come
    assert model.q.input_fake_quant._latest is not None
    del x
    gc.collect()
    assert [ref() for ref in kept] == [None, None]
    assert model.q.input_fake_quant._latest.result is None


def test_two_threads_with_one_tensor():
    model, _ = pair(recipe="qat-w8a8-token")
    x, errors = batch(rows=32).requires_grad_(), []

    def run():
        try:
            for _ in range(30):
                model(x).sum().backward()
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_tensor_made_in_inference_mode():
    model, plain = pair()
    with torch.inference_mode():
        x = batch()
    assert torch.equal(model(x), plain(x))


def test_a_converted_layer_holds_no_other():
    joined, plain = pair()
    sizes = []
    for model in (joined, plain):
        train(model)
        sizes.append(len(pickle.dumps(qnn.convert(model.eval()))))
    assert sizes[0] < sizes[1] + 500


# ---- ranges that differ ---------------------------------------------------------------------------------------------


def test_a_second_prepare_ties_no_layers_whose_ranges_differ():
    model = nn.Sequential(Alike(), nn.Linear(16, 16))
    qnn.prepare(model, "qat-w8a8", skip=["1"]).train()
    for seed, layer in enumerate((model[0].q, model[0].k, model[0].v)):
        layer(batch(seed))
    before = copy.deepcopy(model[0].state_dict())
    with pytest.warns(UserWarning, match="3 layers are quantized already") as warned:
        qnn.prepare(model, "qat-w8a8", fuse=True)
    assert all(torch.equal(value, before[name]) for name, value in model[0].state_dict().items())
    assert model.quantization_summary.fused == () and len(warned) == 1 and not model.quantization_summary.left_float


def test_a_file_with_two_ranges_for_one_is_refused():
    joined, plain = pair()
    train(plain)
    joined.load_state_dict(plain.state_dict())
    plain.k(9 * batch())
    with pytest.raises(RuntimeError, match=r"k.input_fake_quant: expected the values of q.input_fake_quant"):
        joined.load_state_dict(plain.state_dict())


# ---- blocks that a graph shows --------------------------------------------------------------------------------------


class Feed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.wide, self.out = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.out(F.gelu(self.wide(self.norm(x))))


def test_second_derivatives_of_a_joined_block():
    joined, plain = pair(Feed)
    assert len(joined.quantization_summary.fused) == 2
    for model in (by_operators(joined), by_operators(plain)):
        x = batch().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
    for a, b in zip(joined.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_torch_func_of_a_joined_block():
    joined, plain = pair(Feed)
    found = []
    for model in (joined, plain):
        model(batch())
        qnn.enable_observer(model, False)
        gradient = torch.func.grad(lambda x, model=model: model(x).square().sum())(batch(1))
        _, tangent = torch.func.jvp(model, (batch(1),), (batch(2),))
        found.append((gradient, tangent))
    torch.testing.assert_close(*found)


def test_hooks_on_a_fake_quantizer_of_a_joined_block_see_tensors():
    joined, _ = pair(Feed)
    seen = []
    joined.out.input_fake_quant.register_forward_hook(lambda module, given, y: seen.append(y))
    joined(batch())
    assert len(seen) == 1 and not isinstance(seen[0], Quantized)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.bn(self.a(x)) + self.b(x)


@pytest.mark.parametrize("recipe", ["qat-w8a8", "fqt-psq8"])
def test_a_range_that_convolutions_share_moves_once_in_the_written_forward_pass(recipe):
    joined, plain = pair(Branches, recipe)
    assert joined.a.input_fake_quant is joined.b.input_fake_quant
    joined.b.register_forward_hook(lambda *_: None)
    for seed in range(3):
        x = (seed + 1) * torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(joined(x), plain(x))
    for name, value in plain.state_dict().items():
        assert torch.equal(joined.state_dict()[name], value), name


# ---- computed anew --------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


def checkpointed(model, x, reentrant):
    return checkpoint(model, x, use_reentrant=reentrant)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("zeros", ["nothing", "bn2", "conv2"])
def test_a_block_called_twice_learns_scales_under_checkpointing(zeros, fuse):
    """From the first step on, in which the first call sets the scales and the second finds them."""
    torch.manual_seed(0)
    model = Residual()
    if zeros != "nothing":
        nn.init.zeros_(getattr(model, zeros).weight)
    qnn.prepare(model, "qat-w4a4", fuse=fuse).train()
    ways = [(copy.deepcopy(model), reentrant) for reentrant in (False, True)]
    ways.append((by_operators(copy.deepcopy(model)), True))
    x, found = torch.randn(2, 4, 6, 6), []
    for way, reentrant in ways:
        optimizer = torch.optim.SGD(way.parameters(), 0.05)
        for _ in range(3):
            optimizer.zero_grad()
            y = checkpointed(way, checkpointed(way, x.clone().requires_grad_(), reentrant), reentrant)
            y.square().mean().backward()
            optimizer.step()
        found.append(way.state_dict())
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, msg=name)


@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_observers_that_need_the_whole_tensor_under_checkpointing(observer):
    recipe = quantrain.Recipe.from_name("qat-w8a8")
    recipe.input.observer = observer
    conv = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    for model, x in ((Feed(), batch()), (conv, torch.randn(2, 3, 8, 8))):
        qnn.prepare(model, recipe, fuse=True).train()
        assert model.quantization_summary.fused
        plain = copy.deepcopy(model)
        for _ in range(2):
            checkpointed(model, x.clone().requires_grad_(), False).sum().backward()
            plain(x.clone().requires_grad_()).sum().backward()
        for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
            assert torch.equal(a, b)
