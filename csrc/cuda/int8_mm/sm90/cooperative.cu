#include "csrc/cuda/int8_mm/sm90/kernel.cuh"

QUANTRAIN_INT8_SM90(cooperative_128x192_2x1, cutlass::bfloat16_t, Cooperative, 128, 192, 2, 1, Extra::kNone)
QUANTRAIN_INT8_SM90(cooperative_128x256_1x1, cutlass::bfloat16_t, Cooperative, 128, 256, 1, 1, Extra::kNone)
