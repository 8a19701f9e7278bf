"""Layers, observers and model transforms for quantized training: prepare -> train or calibrate -> convert."""

from quantrain.tables import Table

from .calibrate import (
    CalibrationReport,
    calibrate,
    calibration,
    enable_fake_quant,
    enable_gradient_quant,
    enable_observer,
)
from .captured import Captured
from .checkpoint import (
    CheckpointInfo,
    from_checkpoint,
    load_checkpoint,
    read_checkpoint_info,
    save_checkpoint,
    write_safetensors,
)
from .conv_bn import FoldedBatchNorm2d, QuantConvBn2d
from .convert import convert
from .convolutions import QuantConv1d, QuantConvTranspose2d
from .decoder import Int8Decoder
from .dynamic import fake_quantize_per_token, quantize_per_token
from .fake_quantize import FakeQuantize
from .fixed_point.activation import FixedPointActivation
from .fixed_point.convert import audit, fixed_point_program, simulated_codes
from .fixed_point.layers import FixedPointAvgPool2d, FixedPointConv2d, FixedPointLinear
from .fixed_point.network import FixedPointNetwork
from .fixed_point.onnx import export_onnx
from .fixed_point.prepare import FixedPointGraph
from .four_bit import Embedding4bit, FourBitLayer, Linear4bit, LoraLinear, load_packed_layers
from .four_bit_formats import (
    EightBitWeight,
    FourBitConfig,
    FourBitWeight,
    GgufFile,
    LoraAdapter,
    LoraWeight,
    four_bit_layers,
    from_awq,
    from_compressed_tensors,
    from_gptq,
    from_hqq,
    load_bitsandbytes,
    load_four_bit_layers,
    load_lora_adapter,
    read_four_bit_config,
    read_gguf,
    save_lora_adapter,
    to_awq,
    to_bitsandbytes,
    to_compressed_tensors,
    to_gptq,
)
from .gradient_probe import GradientProbe, ProbeTable
from .inductor import enable_inductor_pass
from .int8_blocks import FusedBlocks, Int8Block, fuse_int8_blocks, unfuse_int8_blocks
from .int8_linear import Int8Linear, Int8TransposedLinear, enable_weight_cache
from .layers import QuantConv2d, QuantEmbedding, QuantLayer, QuantLinear, QuantTransposedLinear
from .lora import MergeTable, adapter_recipe, enable_lora, lora_adapter, lora_parameters, merge, set_lora_adapter
from .observers import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
    make_observer,
)
from .pact import PACT, pact
from .prepare import PrepareSummary, prepare
from .ptq import ColumnObserver, PtqLinear, PtqTransposedLinear, QuantizedPtqLinear
from .quantized import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConvTranspose2d,
    QuantizedEmbedding,
    QuantizedInt8Linear,
    QuantizedLayer,
    QuantizedLinear,
)
from .recipes import as_recipe, changed_recipe, weight_scale_shape
from .report import ErrorTable, SizeTable, model_size, quantization_error
from .schemes import SchemeHandler, handler_of
from .schemes import table as _schemes  # noqa: F401, registers them
from .schemes.gradient_quant import gradient_arguments

__all__ = [
    "PACT",
    "CalibrationReport",
    "ColumnObserver",
    "Captured",
    "CheckpointInfo",
    "EightBitWeight",
    "Embedding4bit",
    "ErrorTable",
    "FakeQuantize",
    "FixedPointActivation",
    "FixedPointAvgPool2d",
    "FixedPointConv2d",
    "FixedPointGraph",
    "FixedPointLinear",
    "FixedPointNetwork",
    "FoldedBatchNorm2d",
    "FourBitConfig",
    "FourBitLayer",
    "FourBitWeight",
    "FusedBlocks",
    "GgufFile",
    "GradientProbe",
    "Int8Block",
    "Int8Decoder",
    "enable_inductor_pass",
    "Int8Linear",
    "Int8TransposedLinear",
    "Linear4bit",
    "LoraAdapter",
    "LoraLinear",
    "LoraWeight",
    "MSEObserver",
    "MergeTable",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "Observer",
    "PercentileObserver",
    "PrepareSummary",
    "ProbeTable",
    "PtqLinear",
    "PtqTransposedLinear",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConvBn2d",
    "QuantConvTranspose2d",
    "QuantEmbedding",
    "QuantLayer",
    "QuantLinear",
    "QuantTransposedLinear",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConvTranspose2d",
    "QuantizedEmbedding",
    "QuantizedInt8Linear",
    "QuantizedLayer",
    "QuantizedLinear",
    "QuantizedPtqLinear",
    "SchemeHandler",
    "SizeTable",
    "Table",
    "adapter_recipe",
    "as_recipe",
    "audit",
    "calibrate",
    "calibration",
    "changed_recipe",
    "convert",
    "enable_fake_quant",
    "enable_gradient_quant",
    "enable_lora",
    "enable_observer",
    "enable_weight_cache",
    "export_onnx",
    "fake_quantize_per_token",
    "fixed_point_program",
    "four_bit_layers",
    "from_awq",
    "from_checkpoint",
    "from_compressed_tensors",
    "from_gptq",
    "from_hqq",
    "fuse_int8_blocks",
    "gradient_arguments",
    "handler_of",
    "load_bitsandbytes",
    "load_checkpoint",
    "load_four_bit_layers",
    "load_lora_adapter",
    "load_packed_layers",
    "lora_adapter",
    "lora_parameters",
    "make_observer",
    "merge",
    "model_size",
    "pact",
    "prepare",
    "quantization_error",
    "quantize_per_token",
    "read_checkpoint_info",
    "read_four_bit_config",
    "read_gguf",
    "save_checkpoint",
    "save_lora_adapter",
    "set_lora_adapter",
    "simulated_codes",
    "to_awq",
    "to_bitsandbytes",
    "to_compressed_tensors",
    "to_gptq",
    "unfuse_int8_blocks",
    "weight_scale_shape",
    "write_safetensors",
]
