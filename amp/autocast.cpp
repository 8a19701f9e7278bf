#include "quantrain/amp/autocast.h"

#include <ATen/autocast_mode.h>

#include "ops/common/check.h"

namespace quantrain::amp {

AutocastGuard::AutocastGuard(c10::DeviceType device_type, std::optional<at::ScalarType> dtype, bool enabled,
                             std::optional<bool> cache_enabled)
    : device_type_(device_type) {
  QUANTRAIN_CHECK_VALUE(device_type == at::kCPU || device_type == at::kCUDA,
                        "AutocastGuard: expected device type cpu or cuda, got {}",
                        c10::DeviceTypeName(device_type, true));
  QUANTRAIN_CHECK_VALUE(!dtype || *dtype == at::kHalf || *dtype == at::kBFloat16,
                        "AutocastGuard: expected dtype float16 or bfloat16, got {}", c10::toString(*dtype));
  enabled_before_ = at::autocast::is_autocast_enabled(device_type);
  dtype_before_ = at::autocast::get_autocast_dtype(device_type);
  cache_enabled_before_ = at::autocast::is_autocast_cache_enabled();
  at::autocast::set_autocast_enabled(device_type, enabled);
  at::autocast::set_autocast_dtype(device_type, dtype.value_or(dtype_before_));
  at::autocast::set_autocast_cache_enabled(cache_enabled.value_or(cache_enabled_before_));
  at::autocast::increment_nesting();
}

AutocastGuard::~AutocastGuard() {
  if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(device_type_, enabled_before_);
  at::autocast::set_autocast_dtype(device_type_, dtype_before_);
  at::autocast::set_autocast_cache_enabled(cache_enabled_before_);
}

}  // namespace quantrain::amp
