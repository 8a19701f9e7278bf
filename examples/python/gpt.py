"""A GPT-2-style language model (Radford et al. 2019), with the parameter names and arithmetic of examples/cpp/gpt.h."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02
FLOAT_LAYERS = ("wte", "wpe")  # under a recipe too: the output head shares the token embedding


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model; ``dropout`` acts on the embeddings, the attention weights and both residual branches."""

    layers: int
    heads: int
    width: int
    context: int
    vocab: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "width", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected --{name} of at least 1, got {getattr(self, name)}")
        if self.vocab < 256:
            raise ValueError(f"expected --vocab of at least 256 (tokens are bytes), got {self.vocab}")
        if self.width % self.heads:
            raise ValueError(f"expected --width to be a multiple of --heads, got {self.width} and {self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected --dropout in [0, 1), got {self.dropout:g}")

    def sizes(self) -> dict[str, int]:
        """What a checkpoint must agree in."""
        return {name: value for name, value in asdict(self).items() if name != "dropout"}


PRESETS = {
    "small": GPTConfig(layers=4, heads=4, width=128, context=128, vocab=256),
    "gpt2": GPTConfig(layers=12, heads=12, width=768, context=1024, vocab=50304),
}


class Attention(nn.Module):
    """Causal self-attention, x ``[B, T, width]`` -> the same shape."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.c_attn(x).split(width, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        y = self.c_proj(y.transpose(1, 2).reshape(batch, length, width))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with GELU (its tanh form) between, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.width, 4 * config.width)
        self.c_proj = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Tokens int64 ``[B, T]``, T at most ``config.context``, to logits ``[B, T, vocab]``; the head is wte's weight."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        # Positions are the first rows in order: a view of the table, where a look-up would make the gradient a scatter.
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


@torch.no_grad()
def init_weights(model: nn.Module, layers: int) -> None:
    """GPT-2's: normal(0, 0.02), residual projections smaller by sqrt(2 layers), biases 0, norms 1.

    Draws from the default generator, in the order of the parameters.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(".weight") and parameter.dim() >= 2:
            residual = name.endswith("c_proj.weight")
            parameter.normal_(0.0, INIT_STD / math.sqrt(2 * layers) if residual else INIT_STD)
        elif name.endswith(".bias"):
            parameter.zero_()


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token, computed in float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
