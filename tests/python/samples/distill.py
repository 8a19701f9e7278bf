"""Small models of tokens for the tests of distillation."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self, width, recomputed=None):
        super().__init__()
        self.up, self.down, self.recomputed = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), recomputed

    def body(self, x):
        return x + self.down(F.gelu(self.up(x)))

    def forward(self, x):
        if self.recomputed is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.recomputed)


class Tokens(nn.Module):
    """Token ids [B, T] -> logits [B, T, V], through blocks."""

    def __init__(self, width=8, layers=2, vocabulary=11):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def models(layers=(2, 4), width=(8, 8), seed=0):
    torch.manual_seed(seed)
    return Tokens(width[0], layers[0]), Tokens(width[1], layers[1])


def ids(seed=1, shape=(3, 5)):
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(seed))


def hooks_of(*networks):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for model in networks for m in model.modules())


def hidden_of(model, x):
    """The embedding's result and that of each block."""
    states = [model.embedding(x)]
    for layer in model.layers:
        states.append(layer(states[-1]))
    return states


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def close(found, expected, **options):
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}", **options
        )
