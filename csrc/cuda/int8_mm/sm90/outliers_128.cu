#include "csrc/cuda/int8_mm/sm90/kernel.cuh"

QUANTRAIN_INT8_SM90_16_BIT(pingpong_128x128_2x1_outliers, Pingpong, 128, 128, 2, 1, Extra::kOutliers)
