#include "csrc/cuda/int8_mm/sm90/kernel.cuh"

QUANTRAIN_INT8_SM90(pingpong_128x128_2x1, cutlass::bfloat16_t, Pingpong, 128, 128, 2, 1, Extra::kNone)
QUANTRAIN_INT8_SM90(pingpong_64x128_2x1, cutlass::bfloat16_t, Pingpong, 64, 128, 2, 1, Extra::kNone)
