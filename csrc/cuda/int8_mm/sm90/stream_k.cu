#undef CUTLASS_ENABLE_GDC_FOR_SM90  // CUTLASS 4.2: its stream-K scheduler does not compile with it
#include "csrc/cuda/int8_mm/sm90/kernel.cuh"

QUANTRAIN_INT8_SM90_16_BIT(stream_k_128x128_2x1, StreamK, 128, 128, 2, 1, Extra::kNone)
QUANTRAIN_INT8_SM90(stream_k_128x128_2x1_float32, float, StreamK, 128, 128, 2, 1, Extra::kNone)
