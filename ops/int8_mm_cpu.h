// The int8 matrix product on the CPU: picks the path that suits the processor, and shares it among threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "csrc/common/int8.h"
#include "csrc/cpu/int8_mm.h"

namespace quantrain {

// The instructions that the environment variable QUANTRAIN_CPU_INT8 names, for `op`; the best of this processor where
// it names none of its own.
cpu::Int8Isa named_int8_isa(std::string_view op);

// a [m, k], b [n, k]: contiguous int8 on the CPU, to which args point. Any k; args.workspace is not used.
// The environment variable QUANTRAIN_CPU_INT8 picks a path by name: "plain", "avx2", "avx512", "avx_vnni",
// "avx512_vnni" or "onednn".
void int8_mm_cpu(const at::Tensor& a, const at::Tensor& b, const Int8MmArgs& args);

}  // namespace quantrain
