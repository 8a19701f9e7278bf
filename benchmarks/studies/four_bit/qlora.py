"""Part `qlora`: SmolLM2 on tinyshakespeare by QLoRA, and by LoRA beside bfloat16 weights: the same seeds, matrices, batches and schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from common.lora import add_lora
from common.smollm2 import ids_of, model_name, moved_model
from torch import Tensor, nn

import quantrain.nn as qnn

KINDS = ("lora bf16", "qlora")


@dataclass(frozen=True)
class Settings:
    steps: int = 300
    seeds: int = 3
    batch_size: int = 8
    length: int = 512
    rank: int = 16
    alpha: float = 32.0
    lr: float = 5e-4
    points: int = 15
    held_out: int = 32  # windows

    def facts(self) -> dict:
        return asdict(self)


SETTINGS, QUICK = Settings(), Settings(steps=6, seeds=1, batch_size=2, length=32, points=2, held_out=2)


def built(kind: str, name: str, seed: int, settings: Settings, device: str) -> tuple[nn.Module, list[nn.Parameter]]:
    """The model and what is trained: float32 matrices, the same in both kinds, below bfloat16 activations."""
    model = moved_model(name).to(device, torch.bfloat16)
    torch.manual_seed(seed)
    if kind == "qlora":
        change = {"lora_rank": settings.rank, "lora_alpha": settings.alpha}
        qnn.prepare(model, qnn.changed_recipe(qnn.as_recipe("qlora"), {"scheme": change}))
        return model, qnn.lora_parameters(model)
    return model, add_lora(model, settings.rank, settings.alpha, torch.float32)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor) -> float:
    model.eval()
    losses = [float(loss_of(model, part)) * len(part) for part in windows.split(8)]
    model.train()
    return sum(losses) / len(windows)


def train(
    kind: str, name: str, seed: int, settings: Settings, device: str, train_ids: Tensor, held_out: Tensor
) -> dict:
    model, parameters = built(kind, name, seed, settings, device)
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0, fused=device == "cuda")
    generator = torch.Generator().manual_seed(seed)
    every = max(1, settings.steps // settings.points)
    curve, total = [[0, None, evaluate(model, held_out)]], torch.zeros((), device=device)
    for step in range(1, settings.steps + 1):
        starts = torch.randint(len(train_ids) - settings.length, (settings.batch_size,), generator=generator)
        ids = train_ids[(starts[:, None] + torch.arange(settings.length)).to(device)]
        warm, left = min(1.0, step / 20), 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * warm * (0.1 + 0.9 * left)
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
        if step % every == 0 or step == settings.steps:
            curve.append([step, float(total) / (step - curve[-1][0]), evaluate(model, held_out)])
            total.zero_()
    return {"kind": kind, "seed": seed, "held_out_loss": curve[-1][2], "before": curve[0][2], "curve": curve}


def run(settings: Settings, options, save: Callable[[dict], None]) -> int:
    name, device = model_name(options), options.device
    ids = ids_of(name, "tinyshakespeare", "input.txt").to(device)
    cut = len(ids) * 9 // 10
    held_out = ids[cut:][: settings.held_out * settings.length].view(-1, settings.length)
    for seed in range(settings.seeds):
        pair = [train(kind, name, seed, settings, device, ids[:cut], held_out) for kind in KINDS]
        for row in pair:
            save(row)
        lora, qlora = (row["held_out_loss"] for row in pair)
        print(
            f"qlora: seed {seed}  held-out loss before {pair[0]['before']:.4f} {pair[1]['before']:.4f}  after, LoRA beside bf16 {lora:.4f}  "
            f"QLoRA {qlora:.4f}  {100 * (qlora / lora - 1):+.2f} %",
            flush=True,
        )
    return 0
