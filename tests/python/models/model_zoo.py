"""Public models in tiny random configurations, nothing downloaded: what tests and a fresh process build alike.

Each entry of ``ZOO`` is a function that returns a float model and a batch of keyword arguments (or one tensor).
Called as a program with a folder of files from ``test_models.py``, it loads every one of them in this process and compares outputs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Entry = Callable[[], tuple[nn.Module, Any]]
ZOO: dict[str, Entry] = {}
NEEDS: dict[str, str] = {}  # model -> the package that it comes from


def entry(package: str = "torch") -> Callable[[Entry], Entry]:
    def add(build: Entry) -> Entry:
        name = build.__name__.replace("_", "-")
        ZOO[name], NEEDS[name] = build, package
        return build

    return add


def images(size: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size)


def tokens(length: int = 8, batch: int = 2, vocabulary: int = 64) -> Tensor:
    return torch.randint(3, vocabulary, (batch, length))


def built(name: str) -> tuple[nn.Module, Any]:
    """The model and its batch, the same in every process."""
    torch.manual_seed(0)
    return ZOO[name]()


def output_of(model: nn.Module, batch: Any) -> Tensor:
    """The model's output as one tensor: all that are differentiable, flattened."""
    result = model(batch) if isinstance(batch, Tensor) else model(**batch)
    return torch.cat([t.flatten() for t in tensors_in(result)])


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = value.values()
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (list, tuple, type({}.values()))) else []


# torchvision


@entry("torchvision")
def resnet():
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5), images(64)


@entry("torchvision")
def resnet_zero_init():
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, zero_init_residual=True), images(64)


@entry("torchvision")
def mobilenet_v3():
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    rows = [(16, 3, 16, 16, True, "RE", 2, 1), (16, 5, 48, 24, True, "HS", 2, 1), (24, 5, 72, 24, False, "HS", 1, 1)]
    return MobileNetV3([InvertedResidualConfig(*row, 1.0) for row in rows], 64, num_classes=5), images()


@entry("torchvision")
def efficientnet():
    from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

    rows = [FusedMBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 3, 2, 8, 16, 2), MBConvConfig(4, 5, 2, 16, 24, 1)]
    return EfficientNet(rows, dropout=0.1, num_classes=5, last_channel=64), images()


@entry("torchvision")
def convnext():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=5), images()


@entry("torchvision")
def vision_transformer():
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5), images()


@entry("torchvision")
def swin():
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 16, [2, 1], [2, 2], [4, 4], num_classes=5), images()


@entry("torchvision")
def googlenet():
    from torchvision.models import GoogLeNet

    return GoogLeNet(num_classes=5, aux_logits=True, init_weights=False), images(64)


# torch


class Encoder(nn.Module):
    """nn.TransformerEncoder as a classifier of padded sequences."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 32, padding_idx=0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 5)

    def forward(self, input: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(input), src_key_padding_mask=padding)[:, 0])


@entry()
def transformer_encoder():
    lengths = torch.tensor([8, 5])
    padding = torch.arange(8) >= lengths[:, None]
    return Encoder(), {"input": tokens().masked_fill(padding, 0), "padding": padding}


class Audio(nn.Module):
    """Convolutions in one dimension, and a decoder of transposed ones."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(4, 8, 5, stride=2, padding=2), nn.BatchNorm1d(8), nn.ReLU())
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(8, 6, (1, 4), stride=(1, 2), padding=(0, 1), groups=2), nn.ReLU()
        )
        self.head = nn.Conv1d(6, 4, 1)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.decoder(self.encoder(input).unsqueeze(2)).squeeze(2))


@entry()
def conv1d_and_transposed():
    return Audio(), torch.randn(2, 4, 16)


# transformers

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TEXT = SMALL | {"vocab_size": 64, "max_position_embeddings": 32}
IMAGE = SMALL | {"image_size": 32, "patch_size": 8}


@entry("transformers")
def hf_vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**IMAGE, num_labels=5)), {"pixel_values": images()}


@entry("transformers")
def hf_dinov2():
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(**IMAGE, mlp_ratio=2, num_labels=5)
    return Dinov2ForImageClassification(config), {"pixel_values": images()}


@entry("transformers")
def hf_clip():
    from transformers import CLIPConfig, CLIPModel

    text = TEXT | {"eos_token_id": 2, "projection_dim": 16}
    config = CLIPConfig(text_config=text, vision_config=IMAGE | {"projection_dim": 16}, projection_dim=16)
    return CLIPModel(config), {"input_ids": tokens(), "pixel_values": images()}


@entry("transformers")
def hf_siglip():
    from transformers import SiglipConfig, SiglipModel

    return SiglipModel(SiglipConfig(text_config=TEXT, vision_config=IMAGE)), {
        "input_ids": tokens(32),
        "pixel_values": images(),
    }


@entry("transformers")
def hf_bert():
    from transformers import BertConfig, BertForSequenceClassification

    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    return BertForSequenceClassification(BertConfig(**TEXT, num_labels=5)), {
        "input_ids": tokens(),
        "attention_mask": mask,
    }


@entry("transformers")
def hf_distilbert():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=32)
    return DistilBertForSequenceClassification(config), {"input_ids": tokens()}


@entry("transformers")
def hf_deberta_v2():
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    attention = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    config = DebertaV2Config(**TEXT, **attention, share_att_key=True, num_labels=5)
    return DebertaV2ForSequenceClassification(config), {"input_ids": tokens()}


@entry("transformers")
def hf_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config), {
        "input_ids": tokens(),
        "decoder_input_ids": tokens(6),
        "use_cache": False,
    }


@entry("transformers")
def hf_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config), {"input_ids": tokens(), "use_cache": False}


@entry("transformers")
def hf_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=True)
    return LlamaForCausalLM(config), {"input_ids": tokens(), "use_cache": False}


@entry("transformers")
def hf_mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    return MixtralForCausalLM(config), {"input_ids": tokens(), "use_cache": False}


@entry("transformers")
def hf_whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_model": 32, "num_mel_bins": 8, "vocab_size": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(**layers, **sizes, **ids, max_source_positions=16, max_target_positions=16)
    batch = {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": tokens(6), "use_cache": False}
    return WhisperForConditionalGeneration(config), batch


@entry("transformers")
def hf_swin():
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4)
    return SwinForImageClassification(config), {"pixel_values": images()}


@entry("transformers")
def hf_mamba():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4)
    return MambaForCausalLM(config), {"input_ids": tokens(), "use_cache": False}


def loaded(folder: Path, name: str, recipe: str) -> tuple[Tensor, Tensor]:
    """What the file gives in this process, and what it gave where it was written."""
    import quantrain.nn as qnn

    about = json.loads((folder / f"{name}.json").read_text())
    model, batch = built(name)
    model = qnn.convert(qnn.prepare(model, recipe), skip=about["skip"], check_observed=False)
    qnn.load_checkpoint(folder / f"{name}.safetensors", model)
    other = qnn.from_checkpoint(folder / f"{name}.safetensors", built(name)[0])
    if not torch.equal(output_of(other, batch), output_of(model.eval(), batch)):
        raise ValueError(f"{name}: from_checkpoint gives another model")
    return output_of(model.eval(), batch), torch.load(folder / f"{name}.pt")


def main(folder: Path) -> int:
    wrong = []
    with torch.no_grad():
        for path in sorted(folder.glob("*.json")):
            found, expected = loaded(folder, path.stem, json.loads(path.read_text())["recipe"])
            if not torch.equal(found, expected):
                wrong.append(path.stem)
    print(json.dumps(wrong))
    return bool(wrong)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(Path(sys.argv[1])))
