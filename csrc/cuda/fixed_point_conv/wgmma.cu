#include "csrc/cuda/fixed_point_conv/wgmma.cuh"

// The tiles that wgmma multiplies. For sm_90a alone.

namespace quantrain::cuda::conv {
namespace {

constexpr Candidate kWgmmaCandidates[] = {
    candidate<WgmmaEngine, WgmmaTile<128, 128, 128, 3, 2>>("wgmma_128x128x128", 0.76),
    candidate<WgmmaEngine, WgmmaTile<128, 128, 64, 5, 2>>("wgmma_128x128x64", 0.65),
    candidate<WgmmaEngine, WgmmaTile<128, 64, 128, 3, 3>>("wgmma_128x64x128", 0.47),
    candidate<WgmmaEngine, WgmmaTile<128, 64, 64, 4, 3>>("wgmma_128x64x64", 0.39),
    candidate<WgmmaEngine, WgmmaTile<64, 128, 128, 3, 3>>("wgmma_64x128x128", 1.10),
    candidate<WgmmaEngine, WgmmaTile<64, 64, 128, 4, 3>>("wgmma_64x64x128", 0.63),
};

}  // namespace

Candidates wgmma_candidates() {
  return {kWgmmaCandidates, static_cast<int>(sizeof(kWgmmaCandidates) / sizeof(kWgmmaCandidates[0]))};
}

}  // namespace quantrain::cuda::conv
