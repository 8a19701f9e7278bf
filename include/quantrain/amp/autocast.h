// Autocast for C++ programs: a scope in which PyTorch runs matrix products in 16 bit and what needs range in float32.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceType.h>

#include <optional>

#include "quantrain/ops/export.h"

namespace quantrain::amp {

// While it lives, operators on `device_type` run under torch's autocast in this thread, as in Python's
// `with torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)`.
//
// Guards nest; the inner one decides, and `enabled = false` switches autocast off inside an outer guard. At its end,
// even by an exception, the previous state is restored; when the outermost guard of the thread ends, the cache of cast
// weights is cleared. Run the forward pass and the loss inside; the backward pass belongs outside (its ops run in the
// types of the forward pass). Which ops run in which type: docs/amp.md.
//
// device_type    kCPU or kCUDA
// dtype          kHalf or kBFloat16; absent: torch's setting for the device (float16 on CUDA, bfloat16 on the CPU)
// cache_enabled  keep each weight's cast for the next use in the scope; absent: as outside. Off under CUDA graph
//                capture.
// Errors: ValueError for another device type or dtype.
class QUANTRAIN_API AutocastGuard {
 public:
  explicit AutocastGuard(c10::DeviceType device_type, std::optional<at::ScalarType> dtype = std::nullopt,
                         bool enabled = true, std::optional<bool> cache_enabled = std::nullopt);
  ~AutocastGuard();
  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;

 private:
  c10::DeviceType device_type_;
  bool enabled_before_;
  at::ScalarType dtype_before_;
  bool cache_enabled_before_;
};

}  // namespace quantrain::amp
