"""Keys and values in int8: exactly one scale per token and KV head, and generation as with transformers' own cache."""

import copy
import importlib
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

import quantrain  # noqa: E402
from quantrain import nn as qnn  # noqa: E402
from quantrain.nn.kv_cache import Int8Cache  # noqa: E402


def llama(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    special = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
    config = transformers.LlamaConfig(vocab_size=97, initializer_range=0.2, **sizes, **special, **changes)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def rounded(x):
    """The definition, in float64: rows of D, absmax / 127, half to even."""
    x = x.double()
    scale = (x.abs().amax(-1, keepdim=True) / 127).float()
    scale[scale == 0] = 1
    codes = torch.round(x.float() * (1 / scale)).clamp(-127, 127)
    return codes.to(torch.int8), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_holds_codes_and_a_scale_per_token_and_head(dtype):
    torch.manual_seed(0)
    keys, values = torch.randn(2, 3, 7, 16).to(dtype), torch.randn(2, 3, 7, 24).to(dtype)
    keys[0, 1, 2] *= 1000  # one token of one head leaves all others as they are
    values[1, 0, 4] = 0
    cache = Int8Cache()
    got = cache.update(keys[:, :, :5], values[:, :, :5], 0)
    assert [t.shape[-2] for t in got] == [5, 5]
    got = cache.update(keys[:, :, 5:], values[:, :, 5:], 0)
    for read, whole in zip(got, (keys, values), strict=True):
        codes, scale = rounded(whole)
        assert read.dtype == dtype and torch.equal(read, (codes * scale).to(dtype))
    layer = cache.layers[0]
    assert torch.equal(layer.keys, got[0]) and torch.equal(layer.values, got[1])
    assert cache.get_seq_length() == 7
    assert cache.nbytes == 2 * 3 * 7 * (16 + 24 + 4 + 4)


def test_nan_is_read_back():
    keys = torch.randn(1, 2, 3, 8)
    keys[0, 1, 2, 3] = float("nan")
    got, _ = Int8Cache().update(keys, torch.randn(1, 2, 3, 8), 0)
    assert got[0, 1, 2].isnan().all() and got.isnan().sum() == 8


def filled():
    torch.manual_seed(1)
    cache = Int8Cache()
    for layer in range(2):
        cache.update(torch.randn(3, 2, 6, 8), torch.randn(3, 2, 6, 8), layer)
    return cache, [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda cache: cache.crop(-2), lambda t: t[:, :, :4]),
        (lambda cache: cache.crop(0), lambda t: t),
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), lambda t: t[[2, 0, 0]]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), lambda t: t[[1]]),
        (lambda cache: cache.batch_repeat_interleave(2), lambda t: t.repeat_interleave(2, 0)),
    ],
)
def test_moves_rows_without_rounding_again(change, expected):
    cache, before = filled()
    change(cache)
    for layer, tensors in zip(cache.layers, before, strict=True):
        for got, whole in zip((layer.keys, layer.values), tensors, strict=True):
            assert torch.equal(got, expected(whole))
    assert cache.get_seq_length() == expected(before[0][0]).shape[2]


def test_crop_takes_negative_numbers_alone():
    with pytest.raises(ValueError, match="Int8Cache: expected crop of a negative number of tokens, got 3"):
        filled()[0].crop(3)


def test_reset_begins_anew():
    cache, _ = filled()
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    keys = torch.randn(1, 2, 3, 8)
    assert torch.equal(cache.update(keys, keys, 0)[0], Int8Cache().update(keys, keys, 0)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_at_once_and_token_by_token(dtype):
    model, ids = llama(dtype), torch.randint(0, 97, (2, 9))
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
        whole = model(ids, cache=Int8Cache()).logits
        cache, parts = Int8Cache(), []
        for index in range(ids.shape[1]):
            parts.append(model(ids[:, index : index + 1], cache=cache).logits)
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-2 if dtype == torch.float32 else 0.3)
    assert 0 < (whole - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generates_what_the_models_own_cache_does(options):
    model, ids = llama(), torch.randint(1, 97, (2, 6))
    settings = dict(max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids), **options)
    cache = Int8Cache()
    got, expected = model.generate(ids, cache=cache, **settings), model.generate(ids, **settings)
    assert got.shape == expected.shape
    assert (got == expected).double().mean() > 0.7  # a random model's near ties may turn
    assert cache.get_seq_length() == 6 + 8 - 1


def test_padding_on_the_left():
    model = llama()
    ids = torch.randint(1, 97, (1, 6))
    padded, mask = torch.nn.functional.pad(ids, (3, 0)), torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    both = model.generate(padded, attention_mask=mask, cache=Int8Cache(), max_new_tokens=5, do_sample=False)
    alone = model.generate(
        ids, attention_mask=torch.ones_like(ids), cache=Int8Cache(), max_new_tokens=5, do_sample=False
    )
    assert torch.equal(both[:, 9:], alone[:, 6:])


def test_assisted_generation_crops():
    model, ids = llama(), torch.randint(1, 97, (1, 6)).repeat(1, 3)
    settings = dict(max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
    got = model.generate(ids, cache=Int8Cache(), prompt_lookup_num_tokens=3, **settings)
    assert got.shape == model.generate(ids, cache=Int8Cache(), **settings).shape


def test_a_model_with_sliding_windows():
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, initializer_range=0.2,
    )  # fmt: skip
    model, ids = transformers.MistralForCausalLM(config).eval(), torch.randint(0, 97, (1, 12))
    with torch.no_grad():
        exact, cache, parts = model(ids, use_cache=False).logits, Int8Cache(), []
        for piece in ids.split([7, 1, 1, 3], dim=1):
            parts.append(model(piece, cache=cache).logits)
    assert (torch.cat(parts, 1) - exact).norm() < 0.1 * exact.norm()


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    import quantrain.nn.kv_cache as module

    monkeypatch.setitem(sys.modules, "transformers.cache_utils", None)
    monkeypatch.delitem(sys.modules, module.__name__)
    with pytest.raises(ModuleNotFoundError, match="Int8Cache: expected the package transformers"):
        importlib.import_module(module.__name__)


# ---- as a recipe ----------------------------------------------------------------------------------------------------

IDS = torch.arange(12)[None] * 7 % 97


def test_the_recipe_leaves_layers_and_rounds_keys_and_values():
    model, plain = llama(), llama()
    with torch.no_grad():
        exact = plain(IDS, cache=Int8Cache(), use_cache=True).logits
        quantized = quantrain.ptq.quantize(model, "kv-int8", [IDS])
        assert quantized is model and type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
        for options in ({}, {"use_cache": False}, {"cache": transformers.DynamicCache()}):
            assert torch.equal(model(IDS, **options).logits, exact)
    assert 0 < model.ptq_report.kl < 0.01
    tokens = model.generate(IDS, max_new_tokens=6, do_sample=False)
    cached = plain.generate(IDS, max_new_tokens=6, do_sample=False, cache=Int8Cache())
    assert torch.equal(tokens, cached)


def test_in_training_nothing_is_rounded():
    model = llama()
    quantrain.ptq.use_int8_cache(model)
    quantrain.ptq.use_int8_cache(model)  # once is enough
    assert len(model._forward_pre_hooks) == 1 and len(model._forward_hooks) == 1
    model.train()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0


def test_a_cache_that_nobody_asked_for_is_not_given_back():
    model, plain = llama(), llama()
    quantrain.ptq.use_int8_cache(model)
    with torch.no_grad():
        exact = plain(IDS, cache=Int8Cache(), use_cache=True).logits
        found = model(IDS, use_cache=False)
        assert torch.equal(found.logits, exact) and found.past_key_values is None
        assert "past_key_values" not in found
        assert len(model(IDS, use_cache=False, return_dict=False)) == 1
        model.config.use_cache = False
        assert torch.equal(model(IDS).logits, exact) and model(IDS).past_key_values is None
        with pytest.raises(IndexError):
            model(IDS + 1000)  # leaves no call behind
        assert model(IDS, use_cache=True).past_key_values.get_seq_length() == 12
    model.config.use_cache = True
    with_cache = model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False), with_cache)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_callers_cache_is_filled(name):
    model, plain = llama(), llama()
    quantrain.ptq.use_int8_cache(model)
    with torch.no_grad():
        exact = plain(IDS, cache=Int8Cache(), use_cache=True).logits[:, -1]
        for cache in (Int8Cache(), transformers.DynamicCache(), transformers.DynamicCache(config=model.config)):
            for token in IDS.split(1, dim=1):
                logits = model(token, **{name: cache}).logits[:, -1]
            assert cache.get_seq_length() == 12
            assert isinstance(cache.layers[0].keys, torch.Tensor) and type(cache.layers[0]).__name__ == "Int8CacheLayer"
            torch.testing.assert_close(logits, exact, rtol=1e-4, atol=1e-5)


def test_a_copy_has_hooks_of_its_own():
    model = llama()
    quantrain.ptq.use_int8_cache(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, model(IDS).logits)
    (mine,), (its,) = model._forward_pre_hooks.values(), other._forward_pre_hooks.values()
    assert mine.__self__ is not its.__self__ and its.__self__._hidden == []
    (after,) = other._forward_hooks.values()
    assert after.__self__ is its.__self__


@pytest.mark.parametrize("recipe", ["kv-int8", "llm-int8"])
def test_a_checkpoint_carries_it(tmp_path, recipe):
    recipe = qnn.changed_recipe(qnn.as_recipe(recipe), {"scheme": {"kv_cache": "int8"}})
    model = quantrain.ptq.quantize(llama(), recipe, [IDS])
    qnn.save_checkpoint(tmp_path / "model.safetensors", model)
    again = qnn.from_checkpoint(tmp_path / "model.safetensors", llama())
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        other = llama()(IDS).logits
    assert not torch.equal(other, again(IDS).logits)
    assert again.quantization_summary.recipe.scheme.kv_cache == "int8"


def test_other_caches_are_refused():
    model = llama()
    quantrain.ptq.use_int8_cache(model)
    used = transformers.DynamicCache()
    llama()(IDS, cache=used, use_cache=True)
    for name in ("cache", "past_key_values"):
        with pytest.raises(ValueError, match="an empty DynamicCache or none .* got DynamicCache of 12 tokens"):
            model(IDS, **{name: used})
    with pytest.raises(ValueError, match="forward takes a cache of keys and values, got Linear"):
        quantrain.ptq.use_int8_cache(torch.nn.Linear(2, 2))
    bert = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForSequenceClassification(bert)
    for recipe in ("kv-int8", qnn.changed_recipe(qnn.as_recipe("zeroquant-w8a8"), {"scheme": {"kv_cache": "int8"}})):
        with pytest.raises(ValueError, match="forward takes a cache of keys and values, got Bert"):
            qnn.prepare(model, recipe)
        assert not any(isinstance(module, qnn.QuantLayer) for module in model.modules())  # as it was
    t5 = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="expected a decoder .* got T5"):
        qnn.prepare(transformers.T5ForConditionalGeneration(t5), "kv-int8")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scheme": {"kv_cache": "int4"}}, "kv_cache to be one of"),
        ({"scheme": {"kv_cache": "float"}}, "a spec for weight or a kv_cache of int8"),
        ({"scheme": {"outlier_columns": 16}}, "no field of the scheme but kv_cache"),
    ],
)
def test_recipes_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        qnn.changed_recipe(qnn.as_recipe("kv-int8"), change).validate()
