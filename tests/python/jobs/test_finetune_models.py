"""The models of the fine-tuning job: ResNet-20 against its paper, MiniLM against PyTorch's own encoder layer."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")

from quantrain import nn as qnn  # noqa: E402
from quantrain.finetune import minilm, models, text, trainer  # noqa: E402

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(minilm.PACKAGE) is None or importlib.util.find_spec("tokenizers") is None,
    reason=f"needs {minilm.REQUIREMENT} and tokenizers",
)

# ResNet-20


def test_resnet20_is_the_published_one():
    model = models.resnet20(num_classes=10, in_channels=3)
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722  # He et al.: 0.27 M
    names = dict(model.named_modules())
    assert {"conv1", "bn1", "layer1.0.conv1", "layer2.0.bn2", "layer3.2.conv2", "linear"} <= names.keys()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_shortcut_is_option_a():
    block = models.BasicBlock(2, 4, stride=2)
    images = torch.randn(1, 2, 6, 6)
    shortcut = block.shortcut(images)
    assert shortcut.shape == (1, 4, 3, 3)
    assert torch.equal(shortcut[:, 1:3], images[:, :, ::2, ::2]) and not shortcut[:, [0, 3]].any()


def test_prepare_folds_every_batch_norm_of_resnet20():
    model = qnn.prepare(models.resnet20(), "qat-w8a8")
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("QuantConvBn2d") == 19 and kinds.count("QuantLinear") == 1
    assert isinstance(model.bn1, nn.Identity) and isinstance(model.layer3[2].bn2, nn.Identity)


def test_optimizer_decays_weights_only():
    model = qnn.prepare(models.resnet20(), "qat-w4a4")
    decayed, other = trainer.make_optimizer(model, trainer.TrainSettings(epochs=1, lr=0.1)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 5e-4 and other["weight_decay"] == 0
    assert {names[id(parameter)].rpartition(".")[2] for parameter in decayed["params"]} == {"weight"}
    assert any(names[id(parameter)].endswith("scale") for parameter in other["params"])
    assert len(decayed["params"]) + len(other["params"]) == len(names)
    with pytest.raises(ValueError, match="optimizer: expected one of sgd, adamw, adamw8bit, got 'adam'"):
        trainer.make_optimizer(model, trainer.TrainSettings(epochs=1, lr=0.1, optimizer="adam"))


# MiniLM


def small_config() -> minilm.BertConfig:
    return minilm.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
    )


def test_padding_changes_nothing():
    torch.manual_seed(0)
    model = minilm.SentenceClassifier(small_config(), 3).eval()
    sentence = torch.randint(1, 50, (1, 6))
    alone = model(sentence, torch.ones(1, 6, dtype=torch.bool))
    padded = torch.cat([sentence, torch.randint(1, 50, (1, 4))], dim=1)
    mask = torch.arange(10).unsqueeze(0) < 6
    assert torch.allclose(model(padded, mask), alone, atol=1e-5)


def test_encoder_sees_the_order_of_words():
    torch.manual_seed(0)
    encoder = minilm.BertEncoder(small_config()).eval()
    ids, mask = torch.tensor([[1, 2, 3, 4]]), torch.ones(1, 4, dtype=torch.bool)
    forwards = minilm.mean_pool(encoder(ids, mask), mask)
    backwards = minilm.mean_pool(encoder(ids.flip(1), mask), mask)
    assert not torch.allclose(forwards, backwards, atol=1e-3)


def test_encoder_equals_torch_transformer_layer():
    """Against nn.TransformerEncoderLayer with the same weights, an implementation that shares no code with this one."""
    torch.manual_seed(0)
    config = small_config()
    layer = minilm.Layer(config).eval()
    peer = nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, activation="gelu", batch_first=True, layer_norm_eps=1e-12
    ).eval()
    attention = layer.attention
    projections = (attention.self.query, attention.self.key, attention.self.value)
    peer.load_state_dict(
        {
            "self_attn.in_proj_weight": torch.cat([projection.weight for projection in projections]),
            "self_attn.in_proj_bias": torch.cat([projection.bias for projection in projections]),
            "self_attn.out_proj.weight": attention.output.dense.weight,
            "self_attn.out_proj.bias": attention.output.dense.bias,
            "norm1.weight": attention.output.LayerNorm.weight,
            "norm1.bias": attention.output.LayerNorm.bias,
            "linear1.weight": layer.intermediate.dense.weight,
            "linear1.bias": layer.intermediate.dense.bias,
            "linear2.weight": layer.output.dense.weight,
            "linear2.bias": layer.output.dense.bias,
            "norm2.weight": layer.output.LayerNorm.weight,
            "norm2.bias": layer.output.LayerNorm.bias,
        }
    )
    states = torch.randn(3, 5, 32)
    mask = torch.tensor([[True] * 5, [True] * 4 + [False], [True] * 2 + [False] * 3])
    ours, theirs = layer(states, mask[:, None, None, :]), peer(states, src_key_padding_mask=~mask)
    assert torch.allclose(ours[mask], theirs[mask], atol=1e-5)


def test_every_linear_and_embedding_of_minilm_is_quantized():
    model = qnn.prepare(minilm.SentenceClassifier(small_config(), 2), "qat-w4a8")
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("QuantEmbedding") == 3 and kinds.count("QuantLinear") == 2 * 6 + 1
    assert not any(type(module) in (nn.Linear, nn.Embedding) for module in model.modules())


@needs_minilm
def test_pretrained_encoder_knows_what_sentences_mean():
    sentences = [
        "A man is eating food.",
        "Someone is having a meal.",
        "The stock market fell sharply today.",
        "Shares dropped on Wall Street.",
    ]
    encoder, tokenizer = minilm.load_encoder().eval(), minilm.load_tokenizer()
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 22_565_376
    ids, mask = text.pad([encoding.ids for encoding in tokenizer.encode_batch(sentences)])
    with torch.inference_mode():
        vectors = nn.functional.normalize(minilm.mean_pool(encoder(ids, mask), mask), dim=-1)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > 0.6 and similarity[2, 3] > 0.5
    assert similarity[0, 2] < 0.2 and similarity[1, 3] < 0.2
    assert tokenizer.encode("unaffable").tokens == ["[CLS]", "una", "##ffa", "##ble", "[SEP]"]
