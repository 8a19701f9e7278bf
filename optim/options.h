// Checks of the options that every AdamW here has. Private to the library.
#pragma once

#include "ops/common/check.h"

namespace quantrain::optim {

template <typename Options>
void check_adamw_options(const char* optimizer, const Options& options) {
  const auto [beta1, beta2] = options.betas();
  QUANTRAIN_CHECK_VALUE(options.lr() >= 0, "{}: expected lr >= 0, got {}", optimizer, options.lr());
  QUANTRAIN_CHECK_VALUE(options.eps() >= 0, "{}: expected eps >= 0, got {}", optimizer, options.eps());
  QUANTRAIN_CHECK_VALUE(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1,
                        "{}: expected betas in [0, 1), got {} and {}", optimizer, beta1, beta2);
  QUANTRAIN_CHECK_VALUE(options.weight_decay() >= 0, "{}: expected weight_decay >= 0, got {}", optimizer,
                        options.weight_decay());
}

}  // namespace quantrain::optim
