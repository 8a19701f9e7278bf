// Reads GGUF files, llama.cpp's: versions 2 and 3, tensors of the types F32, F16, BF16, Q4_0, Q4_1 and Q8_0.
//
// The file is untrusted: every size is checked against the file before anything is read or allocated for it. Errors are
// c10::ValueError that name the file, the tensor or key, the rule and the value; c10::Error where it cannot be opened.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

#include <ATen/core/Tensor.h>

#include "quantrain/nn/four_bit_formats.h"
#include "quantrain/ops/export.h"

namespace quantrain::nn {

// A key's value. Lists of booleans are lists of 0 and 1.
using GgufValue = std::variant<bool, int64_t, double, std::string, std::vector<int64_t>, std::vector<double>,
                               std::vector<std::string>>;

// Codes of 8 bits, symmetric, one scale for 32 elements of a row: value = code * scale.
struct QUANTRAIN_API EightBitWeight {
  at::Tensor codes;  // int8 [..., K]
  at::Tensor scale;  // float32 [..., K / 32]
};

struct QUANTRAIN_API GgufFile {
  std::map<std::string, GgufValue> metadata;
  std::map<std::string, at::Tensor> tensors;  // of F32, F16 and BF16
  // Q4_0: int4, exact. Q4_1, which is q * d + m of float16 d and m: uint4 with float32 zero points -m / d, whose values
  // are within 2^-22 of a block's largest |q d| + |m|; a block with d = 0 is exact (codes 0, scale m, zero point -1).
  std::map<std::string, FourBitWeight> four_bit;
  std::map<std::string, EightBitWeight> eight_bit;  // of Q8_0, exact
};

// Sizes are in row-major order: the reverse of the file's. Llama's q and k projections are in llama.cpp's order of rows
// (rotary pairs 2i, 2i + 1), as the file has them. ValueError for a tensor of another type.
QUANTRAIN_API GgufFile read_gguf(const std::string& path);

}  // namespace quantrain::nn
