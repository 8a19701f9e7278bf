#include "csrc/cuda/int8_mm/sm90/kernel.cuh"

QUANTRAIN_INT8_SM90(stream_k_128x128_2x1, cutlass::bfloat16_t, StreamK, 128, 128, 2, 1, Extra::kNone)
QUANTRAIN_INT8_SM90(stream_k_128x128_2x1_float32, float, StreamK, 128, 128, 2, 1, Extra::kNone)
