// The schemes that are known. Private to the library.
#pragma once

#include <vector>

#include "quantrain/nn/recipe.h"

namespace quantrain::nn::detail {

SchemeEntry int8_entry();
SchemeEntry gradient_quant_entry();
SchemeEntry fixed_point_entry();
SchemeEntry four_bit_entry();
SchemeEntry ptq_entry();

// The library's in the order of the table, then those that were registered.
std::vector<SchemeEntry> scheme_entries();

}  // namespace quantrain::nn::detail
