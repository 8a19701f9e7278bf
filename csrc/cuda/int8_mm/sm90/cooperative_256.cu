#include "csrc/cuda/int8_mm/sm90/kernel.cuh"

QUANTRAIN_INT8_SM90_16_BIT(cooperative_128x256_1x1, Cooperative, 128, 256, 1, 1, Extra::kNone)
