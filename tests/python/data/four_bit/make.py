"""Makes the files of this folder by the libraries whose formats they have. Run once, on a CPU, in an environment of its own:

    pip install torch==2.11.0 bitsandbytes==0.50.2 compressed-tensors==0.20.0 peft==0.21.2 safetensors
    python make.py

Beside each layer of a packed file stands what its own library makes of it, under the name "<layer>.dequantized".
"""

from pathlib import Path

import bitsandbytes as bnb
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

FOLDER = Path(__file__).resolve().parent


def bitsandbytes_layers(nested):
    tensors = {}
    for name, quant_type, size, dtype, block_size in (
        ("nf4", "nf4", (6, 128), torch.bfloat16, 64),
        ("fp4", "fp4", (6, 128), torch.float16, 64),
        ("odd", "nf4", (3, 65), torch.float32, 64),
        ("wide", "nf4", (2, 420), torch.float16, 128),
    ):
        weight = bnb.nn.Params4bit(
            torch.randn(size, dtype=dtype),
            requires_grad=False,
            quant_type=quant_type,
            blocksize=block_size,
            compress_statistics=nested,
        ).to("cpu")
        layer = bnb.nn.Linear4bit(
            size[1], size[0], bias=name == "nf4", compress_statistics=nested, quant_type=quant_type
        )
        layer.weight = weight
        for key, tensor in layer.state_dict().items():
            tensors[f"{name}.{key}"] = tensor.contiguous()
        tensors[f"{name}.dequantized"] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return tensors


def compressed_tensors_layers():
    compressor, tensors = BaseCompressor.get_value_from_registry("pack-quantized"), {}
    for name, size, symmetric, group_size in (
        ("symmetric", (6, 64), True, 32),
        ("asymmetric", (9, 64), False, 32),
        ("rows", (3, 63), True, None),
        ("asymmetric_rows", (9, 65), False, None),
    ):
        strategy = "channel" if group_size is None else "group"
        args = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy=strategy, group_size=group_size)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        weight = torch.randn(size, dtype=torch.bfloat16)
        groups = weight.reshape(size[0], -1, group_size or size[1])
        scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
        packed = compressor.compress(state, scheme)
        for key, tensor in packed.items():
            tensors[f"{name}.{key}"] = tensor.contiguous()
        tensors[f"{name}.dequantized"] = compressor.decompress(packed, scheme)["weight"].contiguous()
    return tensors


def main():
    torch.manual_seed(0)
    save_file(bitsandbytes_layers(nested=False), FOLDER / "bitsandbytes-0.50.2-plain.safetensors")
    save_file(bitsandbytes_layers(nested=True), FOLDER / "bitsandbytes-0.50.2-nested.safetensors")
    save_file(compressed_tensors_layers(), FOLDER / "compressed-tensors-0.20.0.safetensors")
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], lora_dropout=0.1))
    adapted.save_pretrained(FOLDER / "peft")
    (FOLDER / "peft" / "README.md").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
