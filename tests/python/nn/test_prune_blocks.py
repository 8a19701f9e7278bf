"""Heads, feed-forward rows and whole layers removed from transformers: the same function where they did nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantrain.prune as prune
from quantrain.finetune.minilm import BertConfig, SentenceClassifier
from quantrain.ptq.blocks import block_names


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].shape == tensor.shape and torch.equal(after[name], tensor), name


def close(found, expected):
    found, expected = found.detach(), expected.detach()
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


# ---- blocks ----------------------------------------------------------------------------------------------------------


def sentence_classifier():
    torch.manual_seed(0)
    model = SentenceClassifier(BertConfig(50, 32, 3, 4, 64, 16), 2).eval()
    return model, (torch.randint(0, 50, (2, 12)), torch.ones(2, 12, dtype=torch.bool))


def transformers_model(name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = small | {"vocab_size": 64, "max_position_embeddings": 32}
    ids = torch.randint(3, 64, (2, 8))
    if name == "bert":
        config = transformers.BertConfig(**text, num_labels=3)
        return transformers.BertForSequenceClassification(config).eval(), {"input_ids": ids}
    if name == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=32
        )
        return transformers.DistilBertForSequenceClassification(config).eval(), {"input_ids": ids}
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config).eval(), {"input_ids": ids}
    if name in ("llama", "qwen3"):
        more = {"num_key_value_heads": 2, "tie_word_embeddings": True}
        if name == "qwen3":
            config = transformers.Qwen3Config(**text, **more, head_dim=16)
            return transformers.Qwen3ForCausalLM(config).eval(), {"input_ids": ids}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**text, **more)).eval(), {"input_ids": ids}
    if name == "opt":
        config = transformers.OPTConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            ffn_dim=64,
            num_attention_heads=4,
            max_position_embeddings=32,
            word_embed_proj_dim=32,
        )
        return transformers.OPTForCausalLM(config).eval(), {"input_ids": ids}
    config = transformers.ViTConfig(**small, image_size=32, patch_size=8, num_labels=3)
    return transformers.ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(2, 3, 32, 32)}


NAMES = ["minilm", "bert", "distilbert", "gpt2", "llama", "qwen3", "opt", "vit"]
BLOCKS = {
    "minilm": "bert.encoder.layer",
    "bert": "bert.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "gpt2": "transformer.h",
    "llama": "model.layers",
    "qwen3": "model.layers",
    "opt": "model.decoder.layers",
    "vit": "vit.layers",
}


def block_model(name):
    return sentence_classifier() if name == "minilm" else transformers_model(name)


def output(model, batch):
    with torch.no_grad():
        result = model(**batch) if isinstance(batch, dict) else model(*batch)
    return result if isinstance(result, torch.Tensor) else result.logits


def projection_back(block):
    for path in (
        "attention.output.dense",
        "attention.out_lin",
        "attn.c_proj",
        "self_attn.o_proj",
        "self_attn.out_proj",
        "attention.o_proj",
    ):
        try:
            return block.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError(type(block))


def columns_of(layer):
    """The weight as ``[O, K]``, a view."""
    return layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight


@pytest.mark.parametrize("name", NAMES)
def test_heads_whose_columns_are_zero_change_nothing(name):
    model, batch = block_model(name)
    first, second = block_names(model)[:2]
    size = columns_of(projection_back(model.get_submodule(first))).shape[1] // 4
    gone = {first: [2, 3], second: [0, 1]}  # whole groups where two share keys and values
    with torch.no_grad():
        for block, heads in gone.items():
            columns = columns_of(projection_back(model.get_submodule(block)))
            for head in heads:
                columns[:, head * size : (head + 1) * size] = 0
    expected = output(model, batch)
    removal = prune.remove_heads(model, gone, batch=batch)
    close(output(model, batch), expected)
    for block in gone:
        assert columns_of(projection_back(model.get_submodule(block))).shape[1] == 2 * size
    assert [row["what"] for row in removal.rows] == ["heads"] * 2
    model.train()
    (model(**batch).logits if isinstance(batch, dict) else model(*batch)).sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_a_share_of_heads_and_what_config_says(name):
    model, batch = block_model(name)
    parameters = sum(p.numel() for p in model.parameters())
    removal = prune.remove_heads(model, 0.5, batch=batch)
    assert {row["layer"] for row in removal.rows} == set(block_names(model))
    assert sum(p.numel() for p in model.parameters()) < parameters
    if name == "minilm":
        assert model.bert.encoder.layer[0].attention.self.num_heads == 2
        return
    assert model.config.num_attention_heads == 2
    if name in ("llama", "qwen3"):
        assert model.config.num_key_value_heads == 1
    assert any("cannot say what is left" in note for note in removal.notes) == (name not in ("llama", "qwen3"))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_pruned_decoder_is_saved_and_generates_with_its_cache(name, tmp_path):
    model, batch = block_model(name)
    prune.remove_heads(model, 0.5, batch=batch)
    prune.remove_ffn_rows(model, 0.25, batch=batch)
    prune.remove_layers(model, [0], [batch])
    assert model.config.intermediate_size == 48 and model.config.num_hidden_layers == 1
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    close(output(loaded, batch), output(model, batch))
    tokens = [
        each.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=cached, pad_token_id=0)
        for each in (model, loaded)
        for cached in (True, False)
    ]
    assert all(torch.equal(tokens[0], other) for other in tokens[1:])


@pytest.mark.parametrize("name", NAMES)
def test_feed_forward_rows(name):
    model, batch = block_model(name)
    removal = prune.remove_ffn_rows(copy.deepcopy(model), 0.25, batch=batch)
    assert {(row["before"], row["after"]) for row in removal.rows} == {
        (64 if name != "gpt2" else 128, 48 if name != "gpt2" else 96)
    }
    blocks = block_names(model)
    gone = {blocks[0]: [0, 5, 9], blocks[1]: list(range(10, 20))}
    with torch.no_grad():
        for block, rows in gone.items():
            module = model.get_submodule(block)
            down = next(
                layer
                for path, layer in module.named_modules()
                if path in ("output.dense", "ffn.lin2", "mlp.c_proj", "mlp.down_proj", "fc2", "mlp.fc2")
            )
            columns_of(down)[:, rows] = 0
    expected = output(model, batch)
    removal = prune.remove_ffn_rows(model, gone, batch=batch)
    close(output(model, batch), expected)
    assert [row["before"] - row["after"] for row in removal.rows] == [3, 10]
    assert set(removal.kept[blocks[0]].tolist()).isdisjoint(gone[blocks[0]])


@pytest.mark.parametrize("name", NAMES[1:])
def test_what_config_says_of_feed_forward_rows(name):
    model, batch = block_model(name)
    prune.remove_ffn_rows(model, 0.5, batch=batch, multiple=16)
    attribute = {"distilbert": "hidden_dim", "gpt2": "n_inner", "opt": "ffn_dim"}.get(name, "intermediate_size")
    assert getattr(model.config, attribute) == (64 if name == "gpt2" else 32)


def test_parts_of_a_model_of_two_have_a_config_each():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")
    torch.manual_seed(0)
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_model": 32, "num_mel_bins": 8, "vocab_size": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**layers, **sizes, **ids, max_source_positions=16, max_target_positions=16)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    batch = {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": torch.randint(3, 64, (2, 6))}
    decoder = ["model.decoder.layers.0", "model.decoder.layers.1"]
    assert prune.remove_ffn_rows(model, 0.5, batch=batch, blocks=decoder).notes == []
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (64, 32)
    assert prune.remove_layers(model, [1], [batch], blocks=decoder).notes == []
    assert (config.encoder_layers, config.decoder_layers) == (2, 1)
    prune.remove_heads(model, 0.5, batch=batch)
    assert (config.encoder_attention_heads, config.decoder_attention_heads) == (2, 4)


def test_scores_of_heads_by_what_is_read():
    model, batch = sentence_classifier()
    block = model.bert.encoder.layer[1]
    read = []
    handle = block.attention.output.dense.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    output(model, batch)
    handle.remove()
    columns = block.attention.output.dense.weight.norm(dim=0) * read[0].flatten(0, 1).norm(dim=0)
    scores = columns.square().view(4, 8).sum(1)
    removal = prune.remove_heads(model, 0.5, batches=[batch])
    assert removal.kept["bert.encoder.layer.1"].tolist() == sorted(scores.argsort(descending=True)[:2].tolist())


def test_pytorchs_encoder():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), 3).eval()
    x = torch.randn(2, 5, 16)
    removal = prune.remove_ffn_rows(model, 0.5, batches=[x])
    assert [row["after"] for row in removal.rows] == [32] * 3
    with pytest.raises(ValueError, match="nn.MultiheadAttention in 'layers.0', which divides embed_dim by num_heads"):
        prune.remove_heads(model, 0.5, batch=x)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (
            {"model.layers.0": [1]},
            r"all 2 heads of 'model.layers.0' that share keys and values, 0 to 1, got \[1\] of them",
        ),
        ({"model.layers.0": [4]}, r"some of 0 to 3 of 'model.layers.0', not all, got \[4\]"),
        ({"model.layers.0": range(4)}, ".*not all"),
        (
            {"model.layers.7": [0]},
            r"names of blocks, got 'model.layers.7' \(there are 'model.layers.0', 'model.layers.1'\)",
        ),
        (
            {"model.layers.0.mlp": [0]},
            "attention of the kind of BERT's, GPT-2's or Llama's in block 'model.layers.0.mlp'",
        ),
    ],
)
def test_heads_that_cannot_go(heads, message):
    model, batch = transformers_model("llama")
    before = state_of(model)
    with pytest.raises(ValueError, match=f"remove_heads: expected {message}"):
        prune.remove_heads(model, heads, batch=batch)
    assert_same(model, before)


def test_blocks_that_end_up_different_leave_the_config():
    model, batch = transformers_model("bert")
    removal = prune.remove_heads(model, {"bert.encoder.layer.0": [1]}, batch=batch)
    assert model.config.num_attention_heads == 4
    assert any("BertConfig cannot say what is left" in note for note in removal.notes)
    assert model.bert.encoder.layer[0].attention.self.num_attention_heads == 3
    assert model.bert.encoder.layer[0].attention.self.all_head_size == 24


def test_a_wrong_cut_of_heads_is_taken_back():
    model, batch = transformers_model("llama")

    def spoiled(module, args, output):  # reads the projection's width
        return output + module.weight.shape[0]

    model.model.layers[1].self_attn.v_proj.register_forward_hook(spoiled)
    before, config = state_of(model), model.config.to_dict()
    with pytest.raises(ValueError, match="without some heads of 'model.layers.1' to give what it gives"):
        prune.remove_heads(model, 0.5, batch=batch)
    assert_same(model, before)
    assert model.config.to_dict() == config


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_whole_layers(name):
    model, batch = block_model(name)
    names = block_names(model)
    holder = model.get_submodule(BLOCKS[name])
    stays = holder[1]
    handle = holder[0].register_forward_hook(
        lambda m, args, kwargs, out: (
            ((args[0] if args else kwargs["hidden_states"]), *out[1:])
            if isinstance(out, tuple)
            else (args[0] if args else kwargs["hidden_states"])
        ),
        with_kwargs=True,
    )
    expected = output(model, batch)
    handle.remove()
    gone = list(holder[0].parameters())
    removal = prune.remove_layers(model, [0], [batch])
    close(output(model, batch), expected)
    assert len(holder) == len(names) - 1 and holder[0] is stays
    assert {id(p) for p in removal.dropped} == {id(p) for p in gone}
    if name != "minilm":
        assert model.config.num_hidden_layers == 1
    assert all(getattr(m, "layer_idx", 0) in (0, None) for m in stays.modules())


@pytest.mark.parametrize("masked", [False, True])
def test_layers_that_change_least_go_first(masked):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for index, factor in enumerate((2.0, 0.1, 1.0, 0.3)):
            for parameter in (model.layers[index].linear2.weight, model.layers[index].self_attn.out_proj.weight):
                parameter.mul_(factor)
    x = torch.randn(3, 5, 16)
    mask = torch.rand(3, 5) > 0.3 if masked else None
    states, influences = x, []
    for layer in model.layers:
        after = layer(states).detach()
        cosine = 1 - F.cosine_similarity(states, after, dim=-1)
        influences.append(float(cosine[mask].mean() if masked else cosine.mean()))
        states = after
    removal = prune.remove_layers(model, 2, [x], mask=(lambda batch: mask) if masked else None)
    assert removal.scores == pytest.approx(influences, abs=1e-5)
    assert removal.kept["layers"].tolist() == [0, 2] and model.num_layers == 2


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (3, ValueError, "to remove at least one of 3 layers and not all, got 3"),
        (0, ValueError, "to remove at least one of 3 layers and not all, got 0"),
        ([3], ValueError, r"some of 0 to 2 of 'layers', not all, got \[3\]"),
        ([0, 1, 2], ValueError, ".*not all"),
        ([], ValueError, ".*not all"),
        (0.5, TypeError, "indices of 'layers', got 0.5"),
    ],
)
def test_layers_that_cannot_go(layers, error, message):
    model, batch = sentence_classifier()
    before = state_of(model)
    with pytest.raises(error, match=f"remove_layers: expected {message}"):
        prune.remove_layers(model, layers, [batch])
    assert_same(model, before)


def test_layers_that_are_no_list():
    with pytest.raises(
        ValueError, match=r"expected an nn.ModuleList of blocks of one class .* \(blocks=\[...\] names them\)"
    ):
        prune.remove_layers(nn.Linear(4, 4), 1, [torch.randn(2, 4)])
    model, batch = sentence_classifier()
    with pytest.raises(ValueError, match="blocks to be all members of one nn.ModuleList, got 'bert.encoder.layer.0'"):
        prune.remove_layers(model, [0], [batch], blocks=["bert.encoder.layer.0"])


def test_blocks_of_another_width_are_refused():
    class Widening(nn.Module):
        def __init__(self, inputs):
            super().__init__()
            self.fc = nn.Linear(inputs, 2 * inputs)

        def forward(self, x):
            return self.fc(x)

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Widening(4), Widening(8)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = Chain()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"got \[2, 8\] for \[2, 4\] at layer 0"):
        prune.remove_layers(model, 1, [torch.randn(2, 4)])
    with pytest.raises(
        ValueError, match=r"layers that give what they get in shape, got an error where \[0\] of 'layers'"
    ):
        prune.remove_layers(model, [0], [torch.randn(2, 4)])
    assert_same(model, before)


def test_parameters_that_are_gone_leave_the_optimizer():
    model, batch = sentence_classifier()
    optimizer = torch.optim.AdamW(
        [{"params": list(model.bert.parameters())}, {"params": list(model.classifier.parameters())}]
    )
    model(*batch).sum().backward()
    optimizer.step()
    prune.cut_optimizer(optimizer, prune.remove_layers(model, [1], [batch]))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} and {id(p) for p in optimizer.state} <= held
    optimizer.zero_grad()
    model(*batch).sum().backward()
    optimizer.step()
