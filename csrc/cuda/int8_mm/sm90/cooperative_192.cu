#include "csrc/cuda/int8_mm/sm90/kernel.cuh"

QUANTRAIN_INT8_SM90_16_BIT(cooperative_128x192_2x1, Cooperative, 128, 192, 2, 1, Extra::kNone)
