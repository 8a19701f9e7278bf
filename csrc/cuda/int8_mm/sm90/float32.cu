#include "csrc/cuda/int8_mm/sm90/kernel.cuh"

QUANTRAIN_INT8_SM90(cooperative_128x256_2x1_float32, float, Cooperative, 128, 256, 2, 1, Extra::kNone)
QUANTRAIN_INT8_SM90(cooperative_128x128_2x1_accumulate, float, Cooperative, 128, 128, 2, 1, Extra::kAccumulate)
