#include "csrc/cuda/int8_mm_sm90/kernel.cuh"

QUANTRAIN_INT8_SM90(cooperative_256x128_1x2, cutlass::bfloat16_t, Cooperative, 256, 128, 1, 2, false)
QUANTRAIN_INT8_SM90(cooperative_256x128_2x1, cutlass::bfloat16_t, Cooperative, 256, 128, 2, 1, false)
