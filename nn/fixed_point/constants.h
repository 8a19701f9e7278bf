// Constants of fixed point, once. Private to the library; Python reads them from quantrain._C.
#pragma once

#include <cstdint>

namespace quantrain::nn::detail {

constexpr int64_t kWordLength = 8;
constexpr double kMedianC = 40.0;  // fraction length 7 is for a standard deviation of at most 40 / 2^7
constexpr double kLargestAccumulator = 2147483647.0;
constexpr const char* kNetworkFormat = "quantrain.fixed_point";
constexpr int kProgramVersion = 1;

}  // namespace quantrain::nn::detail
