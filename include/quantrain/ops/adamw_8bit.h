// AdamW (Loshchilov & Hutter, arXiv:1711.05101) with moments of 8 bits a number (Dettmers et al., "8-bit optimizers via
// block-wise quantization", arXiv:2110.02861). Moments are kept in blocks of 256 elements, each with one float32 scale,
// its largest magnitude; a code is the nearest of the 256 values of a dynamic map, which are bitsandbytes': signed for
// exp_avg, unsigned for exp_avg_sq. On a midpoint it is the lower code. A positive second moment never takes the code
// of 0, nor does a negative first moment.
//
//   p = p (1 - lr weight_decay)
//   m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2            g: the gradient / grad_scale
//   p = p - lr c / (1 - beta1^t) * m / (sqrt(v) + eps c)                            c = sqrt(1 - beta2^t)
//
// in float32 with the moments before they are rounded to codes; lr c / (1 - beta1^t), eps c and 1 - lr weight_decay are
// float64 rounded once. CPU and CUDA agree bit for bit; results are deterministic and nothing waits for the device. A
// block of zeros has scale 0, as in bitsandbytes, and not 1 as elsewhere: a state of zeros is a fresh state. A scale is
// never below 2^-126. A block that holds NaN or Inf has scale NaN and is all NaN from the next step on.
// Errors: c10::ValueError for shapes and values, c10::TypeError for element types and devices.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "quantrain/ops/export.h"

namespace quantrain {

// What one step changes, by parameter: one entry in each list. Of dense tensors blocks are runs of the parameter's
// memory.
struct AdamW8bitTensors {
  std::vector<at::Tensor> params;            // float32, float16 or bfloat16, of one device
  std::vector<at::Tensor> grads;             // of the parameter's shape, each of these types
  std::vector<at::Tensor> exp_avg;           // of the parameter's shape, uint8; float32: kept in 32 bits
  std::vector<at::Tensor> exp_avg_scale;     // float32, ceil(numel / 256) elements; of a moment in 32 bits none
  std::vector<at::Tensor> exp_avg_sq;        // as exp_avg
  std::vector<at::Tensor> exp_avg_sq_scale;  // as exp_avg_scale
  std::vector<at::Tensor> steps;             // float32 of one element: the steps made before, counted here
  std::vector<at::Tensor> masks = {};        // none, or packed as in pruning.h; of no elements: all are kept
};

struct AdamW8bitArguments {
  at::Tensor lr;  // float32 of one element, on the parameters' device, as the next two
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0.01;
  std::optional<at::Tensor> grad_scale = std::nullopt;  // divides the gradients, which stay as they are
  std::optional<at::Tensor> found_inf = std::nullopt;   // not 0: nothing changes, no step is counted
  bool stochastic = false;                              // bfloat16 parameters are rounded up or down at random
  std::optional<at::Generator> generator = std::nullopt;
};

// In place; on CUDA one launch for up to 416 parameters, and a second one that counts their steps. A NaN gradient makes
// its parameter NaN unless found_inf skips the step. Random numbers are Philox's by (seed, offset, element): 16 bits
// for each element. What a mask drops is 0 afterwards, with its moments, whatever its gradient. No derivative.
QUANTRAIN_API void adamw_8bit_(const AdamW8bitTensors& tensors, const AdamW8bitArguments& arguments);
QUANTRAIN_API void adamw_8bit_seeded_(const AdamW8bitTensors& tensors, const AdamW8bitArguments& arguments,
                                      int64_t seed, int64_t offset);

// A moment's codes and scales: of input (float32, float16 or bfloat16, any shape) in row-major order.
struct BlockwiseCodes {
  at::Tensor codes;  // uint8, of input's shape, contiguous
  at::Tensor scale;  // float32 [ceil(numel / 256)]
};

// is_signed: the map of exp_avg; else exp_avg_sq's, where what is not positive has the code of 0. The code is a
// constant for autograd.
QUANTRAIN_API BlockwiseCodes quantize_8bit_blockwise(const at::Tensor& input, bool is_signed = true);

// map[codes] * scale, float32, contiguous; of the codes 0 to 255 and a scale of 1 the map itself. A backward pass
// raises NotImplementedError.
QUANTRAIN_API at::Tensor dequantize_8bit_blockwise(const at::Tensor& codes, const at::Tensor& scale,
                                                   bool is_signed = true);

}  // namespace quantrain
