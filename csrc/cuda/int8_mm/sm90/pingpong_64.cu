#include "csrc/cuda/int8_mm/sm90/kernel.cuh"

QUANTRAIN_INT8_SM90_16_BIT(pingpong_64x128_2x1, Pingpong, 64, 128, 2, 1, Extra::kNone)
