// CUDA kernels of the layers in fixed point. Launchers neither allocate nor wait; the stream is a cudaStream_t of the
// current device. Each returns cudaGetLastError() as an int, for the operator to report.
#pragma once

#include "csrc/common/fixed_point_conv.h"

namespace quantrain::cuda {

// Any sizes, groups and alignment. On tensor cores: groups 1, with c a multiple of 16, or 1, 3 or 4, or windows of up
// to 512 bytes; depthwise by words of four channels where c is a multiple of 4. A sum must keep to int32.
// The environment variable QUANTRAIN_CUDA_FIXED_POINT_CONV, where set, names the kernel for measurements: a tile such
// as "128x64x64" or "wgmma_128x128x128", "patch", "gather", "depthwise" or "plain". cudaErrorInvalidValue where that
// does not serve the shape.
int fixed_point_conv2d(const FixedPointConvArgs& args, void* stream);
int fixed_point_max_pool2d(const FixedPointPoolArgs& args, void* stream);
int fixed_point_sum_pool2d(const FixedPointPoolArgs& args, void* stream);
int fixed_point_add(const FixedPointAddArgs& args, void* stream);

namespace conv {

// Where a kernel serves the shape.
bool suits_mma(const FixedPointConvArgs& args);
bool suits_patch(const FixedPointConvArgs& args);
bool suits_gather(const FixedPointConvArgs& args);
bool suits_depthwise(const FixedPointConvArgs& args);

// tile: a name, or empty for the best one by estimate.
int launch_mma(const FixedPointConvArgs& args, const char* tile, void* stream);
int launch_patch(const FixedPointConvArgs& args, void* stream);
int launch_gather(const FixedPointConvArgs& args, void* stream);
int launch_depthwise(const FixedPointConvArgs& args, void* stream);
int launch_plain(const FixedPointConvArgs& args, void* stream);

}  // namespace conv
}  // namespace quantrain::cuda
