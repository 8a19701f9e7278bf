"""A training step of transformers' Llama by QLoRA, against LoRA beside bfloat16 weights and against bitsandbytes, all in one run.

    python benchmarks/bench_qlora.py [--device cuda] [--quick] [--json FILE]

Rank 64 on every linear layer of the blocks, bfloat16 throughout, PyTorch's fused AdamW, eager; whole steps on the host's clock, forward,
backward and update; with and without gradient checkpointing. The ratio of "step" is the time of LoRA as modules of their own beside
bfloat16 weights (PEFT's form) over ours; "bitsandbytes" is the same with its Linear4bit (nf4, compressed scales) as the base, where it can
be imported. "memory": ours over bfloat16's, of the peak while a step runs, less is better; gib columns are the peaks. "packed" is what
holds the base weights. Before anything is timed, the three models' losses are compared.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable

import torch
from common.cases import parser_of
from common.lora import add_lora
from common.sections import SectionReport
from common.timing import step_seconds
from torch import Tensor, nn

import quantrain.nn as qnn

RANK, ALPHA = 64, 16.0
# width, intermediate, layers, heads; batch, tokens; the time to reach over bfloat16's, inverted
MODELS = {"2048 wide, 8 layers": (2048, 5632, 8, 16, 4, 2048), "4096 wide, 4 layers": (4096, 11008, 4, 32, 2, 2048)}
TINY = {"128 wide, 2 layers": (128, 256, 2, 4, 2, 32)}
STEP_TARGET = 1 / 0.85
VOCABULARY = 32000


def llama(width: int, intermediate: int, layers: int, heads: int, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def bfloat16(model: nn.Module) -> list[nn.Parameter]:
    return add_lora(model, RANK, ALPHA, torch.bfloat16)


def ours(model: nn.Module) -> list[nn.Parameter]:
    qnn.prepare(model, "qlora")
    parameters = qnn.lora_parameters(model)
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
    return parameters


def bitsandbytes(model: nn.Module) -> list[nn.Parameter]:
    import bitsandbytes as bnb

    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
        packed = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
            compress_statistics=True, device="cpu",
        )  # fmt: skip
        packed.weight = bnb.nn.Params4bit(
            layer.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=packed
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed.to(layer.weight.device))
    return add_lora(model, RANK, ALPHA, torch.bfloat16)


def trainer(prepare: Callable, sizes: tuple, checkpointing: bool, device: str) -> Callable[[int], Tensor]:
    *shape, batch, tokens = sizes
    model = llama(*shape, device)
    parameters = prepare(model)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device == "cuda")
    generator = torch.Generator(device).manual_seed(1)
    ids = torch.randint(VOCABULARY, (batch, tokens), device=device, generator=generator)

    def step(_: int) -> Tensor:
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step.bytes = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    return step


def measure(kinds: dict[str, Callable], sizes: tuple, checkpointing: bool, device: str) -> dict[str, dict[str, float]]:
    """Kind -> ms, peak GiB of a step, GiB held between steps, loss of the third step; one model at a time."""
    found: dict[str, dict[str, float]] = {}
    for kind, prepare in kinds.items():
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        step = trainer(prepare, sizes, checkpointing, device)
        for number in range(3):
            loss = float(step(number))
        peak = 0.0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step(0)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 2**30
        found[kind] = {
            "ms": 1e3 * step_seconds([step], device)[0],
            "gib": peak,
            "held": step.bytes / 2**30,
            "loss": loss,
        }
        del step
    return found


def main() -> None:
    options = parser_of(__doc__).parse_args()
    torch.manual_seed(0)
    report = SectionReport("bench_qlora", options.device, options.json)
    device = report.device
    kinds = {"bf16": bfloat16, "ours": ours}
    if device == "cuda" and importlib.util.find_spec("bitsandbytes") is not None:
        kinds["bitsandbytes"] = bitsandbytes
    for title, sizes in (TINY if options.quick or device == "cpu" else MODELS).items():
        for checkpointing in (False, True):
            found = measure(kinds, sizes, checkpointing, device)
            case = f"{title}, {sizes[-2]} x {sizes[-1]}{', checkpointing' if checkpointing else ''}"
            losses = [values["loss"] for values in found.values()]
            assert max(losses) - min(losses) < 0.05 * min(losses), f"expected losses that agree, got {losses}"
            base, mine = found["bf16"], found["ours"]
            peers = {f"{kind}_ms": values["ms"] for kind, values in found.items()}
            report.row("step", case, base["ms"] / mine["ms"], STEP_TARGET if device == "cuda" else None, **peers)
            if device == "cuda":
                peaks = {f"{kind}_gib": values["gib"] for kind, values in found.items()}
                held = {f"{kind}_held_gib": values["held"] for kind, values in found.items()}
                report.row("memory", case, mine["gib"] / base["gib"], None, **peaks, **held)
    report.summary()


if __name__ == "__main__":
    main()
