// Weights of 4 bits in the files of others: bitsandbytes, GPTQ, AWQ, compressed-tensors (pack-quantized) and HQQ, to
// and from the codes and scales that dequantize_4bit and linear_4bit take.
//
// The functions work on the tensors of a safetensors file (read_safetensors, write_safetensors) and the path of a layer
// in it, such as "model.layers.0.mlp.up_proj"; a path of "" is the file's root. They check all of a layer before they
// return any of it: errors are c10::ValueError that name the tensor, the rule and the value.
//
// Codes and scales are exact: no code changes, and float16 and bfloat16 scales are float32 numbers. What each format
// keeps in a round trip is in docs/four_bit_formats.md.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "quantrain/ops/export.h"

namespace quantrain::nn {

// A packed weight [N, K] (bitsandbytes: of any rank) and what belongs to it. Tensors that a format lacks are undefined.
//
// Blocks are runs of block_size elements in row-major order. Where block_size divides K and K is even, codes are uint8
// [N, K / 2] and scales [N, K / block_size]; else both are flat, [(N K + 1) / 2] and [ceil(N K / block_size)].
struct QUANTRAIN_API FourBitWeight {
  at::Tensor codes;  // uint8; nf4, fp4, table: element 2i in the high nibble of byte i; int4, uint4: in the low one
  at::Tensor scale;  // float32; uint8 codes of the signed dynamic map where scale_scale is defined
  at::Tensor zero_point;    // uint4: int32 or float32, shaped as scale
  at::Tensor scale_scale;   // float32 [ceil(number of scales / 256)]
  at::Tensor scale_offset;  // float32 []
  at::Tensor table;         // format "table": float32 [16]
  at::Tensor permutation;   // int64 [K]: column j of the codes multiplies input column permutation[j]
  at::Tensor bias;          // [N], as the file has it
  std::string format;       // nf4, fp4, int4, uint4 or table
  std::vector<int64_t> size;
  int64_t block_size = 0;
  at::ScalarType dtype = at::kFloat;  // of the weight before it was quantized, which is also that of scales in files
};

using FourBitTensors = std::map<std::string, at::Tensor>;

// bitsandbytes 4 bit, its scales compressed ("nested") or not. The packed weight may be a view as any element type
// (bnb_4bit_quant_storage), and the names may be flattened ("weight_absmax" for "weight.absmax"). A quant_map that is
// not nf4's or fp4's gives format "table".
QUANTRAIN_API FourBitWeight load_bitsandbytes(const FourBitTensors& tensors, const std::string& prefix);

// The tensors that bitsandbytes writes and reads, byte for byte what load_bitsandbytes read. Formats nf4 and fp4: of a
// table bitsandbytes reads the name, not the values.
QUANTRAIN_API FourBitTensors to_bitsandbytes(const FourBitWeight& weight, const std::string& prefix,
                                             at::ScalarType quant_storage = at::kByte);

// GPTQ. version: 1 where the file's zero points are stored less one (checkpoint_format "gptq", AutoGPTQ), 2 where they
// are not ("gptq_v2"); the tensors do not say. group_size: needed where the last group is short and there is no g_idx.
// Where every zero point is 8 the format is int4, codes less 8: no zero points to store and to subtract, and the same
// values. With act-order (g_idx out of order) the columns are sorted by group and `permutation` says how; g_idx of
// zeros alone counts as none, as other readers have it. Groups that are not all of one length become blocks of their
// greatest common divisor.
QUANTRAIN_API FourBitWeight from_gptq(const FourBitTensors& tensors, const std::string& prefix, int64_t version,
                                      int64_t group_size = 0);

// int4 and uint4 with integer zero points; N and K multiples of 8. group_size: that of the file, a multiple of
// block_size whose blocks agree; 0 for block_size. Scales become `dtype`: one that it does not hold exactly raises,
// unless round_scale is set. Version 1 stores a zero point of 0 as the version's own converters do, by borrowing from
// the next, which not every reader undoes.
QUANTRAIN_API FourBitTensors to_gptq(const FourBitWeight& weight, const std::string& prefix, int64_t version,
                                     int64_t group_size = 0, bool round_scale = false);

// AWQ, layout "gemm". As GPTQ: int4 where every zero point is 8.
QUANTRAIN_API FourBitWeight from_awq(const FourBitTensors& tensors, const std::string& prefix, int64_t group_size = 0);

// As to_gptq; AWQ has no permutation, and K need not be a multiple of 8.
QUANTRAIN_API FourBitTensors to_awq(const FourBitWeight& weight, const std::string& prefix, int64_t group_size = 0,
                                    bool round_scale = false);

// compressed-tensors, format "pack-quantized" of 4 bits, one scale a group, a row or a tensor: int4 without zero
// points, uint4 with them. weight_g_idx as GPTQ's g_idx.
QUANTRAIN_API FourBitWeight from_compressed_tensors(const FourBitTensors& tensors, const std::string& prefix);

// As to_gptq, for every N and K.
QUANTRAIN_API FourBitTensors to_compressed_tensors(const FourBitWeight& weight, const std::string& prefix,
                                                   int64_t group_size = 0, bool round_scale = false);

// HQQ, 4 bits packed as "4bit_u8", axis 1 (groups along the input), scales and zero points not quantized themselves:
// uint4 with float32 zero points.
QUANTRAIN_API FourBitWeight from_hqq(const FourBitTensors& tensors, const std::string& prefix);

// The layers of a file that hold a packed weight, each with its format: "bitsandbytes", "gptq", "awq",
// "compressed-tensors" or "hqq". By names, and for GPTQ and AWQ by shapes: the layers themselves are not checked.
QUANTRAIN_API std::map<std::string, std::string> four_bit_layers(const FourBitTensors& tensors);

// What a model's config.json says of its format.
struct QUANTRAIN_API FourBitConfig {
  std::string method;      // as in four_bit_layers
  int64_t version = 0;     // of GPTQ: 1 or 2
  int64_t group_size = 0;  // 0: not said, or one group a row
};

// Reads the text of a config.json with a quantization_config, or of AutoGPTQ's quantize_config.json. ValueError: no
// quantization, another method, another number of bits, a layout that is not read here ("marlin", AWQ's "gemv").
QUANTRAIN_API FourBitConfig read_four_bit_config(const std::string& json);

// Every packed layer of a file. config: needed for GPTQ.
QUANTRAIN_API std::map<std::string, FourBitWeight> load_four_bit_layers(
    const FourBitTensors& tensors, const std::optional<FourBitConfig>& config = std::nullopt);

}  // namespace quantrain::nn
