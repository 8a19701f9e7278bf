// A CUTLASS main loop whose sums begin with the product of outlier columns (csrc/common/int8.h): one tile more of
// depth, before the others, of operands of its own. The sums are int32 from the first to the last, so that epilogue and
// registers stay those of int8_mm.
//
// side a [m, kInt8SideBytes], as int8_mm.cu writes it: hi in bytes 0 to 31, lo in 32 to 63, the shift as int32 in 64 to
// 67. side b [n, count]: the weight's codes. Beyond their widths the loads give zeros. Two steps of 32 bytes multiply:
// hi b, and after a shift lo b.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/cutlass.h>
#include <cute/tensor.hpp>

#include "csrc/common/int8.h"
#include "csrc/cuda/int8_mm/sm90/kernels.h"

namespace quantrain::cuda::sm90 {

// Base: CollectiveMma of MainloopSm90TmaGmmaWarpSpecialized, int8 operands of a depth of 128. The kernel is launched
// with a problem that is one tile deeper than the operands.
template <typename Base>
struct WithOutliers : Base {
  using TileShape = typename Base::TileShape;
  using Pipeline = typename Base::MainloopPipeline;
  using State = typename Base::PipelineState;
  using Cluster = typename Base::DispatchPolicy::ClusterShape;
  static constexpr int kDepth = cute::size<2>(TileShape{});
  static_assert(kDepth == 128 && Base::K_PIPE_MMAS == 1);

  struct Arguments {
    typename Base::Arguments main;
    const int8_t* side_a;
    const int8_t* side_b;
    int count;
  };

  struct Params : Base::Params {
    typename Base::Params side;
  };

  template <class Problem>
  static Params to_underlying_arguments(const Problem& problem, const Arguments& args, void* workspace) {
    using namespace cute;
    const auto [m, n, k, l] = append<4>(problem, 1);
    const auto main = Base::to_underlying_arguments(make_shape(m, n, k - Int<kDepth>{}, l), args.main, workspace);
    auto side = main;
    const auto a = reinterpret_cast<const typename Base::InternalElementA*>(args.side_a);
    const auto b = reinterpret_cast<const typename Base::InternalElementB*>(args.side_b);
    auto stride_a = args.main.dA;
    auto stride_b = args.main.dB;
    get<0>(stride_a) = kInt8SideBytes;
    get<0>(stride_b) = args.count;
    side.tma_load_a = make_tma_copy_A_sm90(typename Base::GmemTiledCopyA{},
                                           make_tensor(a, make_layout(make_shape(m, kInt8SideBytes, l), stride_a)),
                                           typename Base::SmemLayoutA{}(_, _, Int<0>{}), TileShape{}, Cluster{});
    side.tma_load_b = make_tma_copy_B_sm90(typename Base::GmemTiledCopyB{},
                                           make_tensor(b, make_layout(make_shape(n, args.count, l), stride_b)),
                                           typename Base::SmemLayoutB{}(_, _, Int<0>{}), TileShape{}, Cluster{});
    return Params{main, side};
  }

  template <class Problem>
  static bool can_implement(const Problem& problem, const Arguments& args) {
    return Base::can_implement(problem, args.main);
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    Base::prefetch_tma_descriptors(params);
    Base::prefetch_tma_descriptors(params.side);
  }

  // The first two tell the kernel how many tiles there are: one more than the operands have.
  template <class Problem>
  CUTLASS_DEVICE auto load_init(const Problem& problem, const Params& params) const {
    const auto [m, n, k, l] = problem;
    const auto main = Base::load_init(problem, params);
    const auto side = Base::load_init(cute::make_shape(m, n, cute::Int<kDepth>{}, l), params.side);
    return cute::make_tuple(cute::get<0>(main), cute::get<1>(main), cute::get<0>(side), cute::get<1>(side));
  }

  template <class Inputs, class Coord, class Iterator>
  CUTLASS_DEVICE void load(const Params& params, Pipeline pipeline, State state, const Inputs& inputs,
                           const Coord& coord, Iterator tiles, int count, int thread, uint32_t rank,
                           typename Base::TensorStorage& shared) {
    using namespace cute;
    const auto side = make_tuple(get<2>(inputs), get<3>(inputs));
    Base::load(params.side, pipeline, state, side, coord, make_coord_iterator(shape<3>(get<0>(side))), 1, thread, rank,
               shared);
    ++state;
    Base::load(params, pipeline, state, make_tuple(get<0>(inputs), get<1>(inputs)), coord, tiles, count - 1, thread,
               rank, shared);
  }

  // The shift of a row of the tile in `stage`, from where a load with a swizzle of 128 bytes put byte 64.
  CUTLASS_DEVICE static int shift_of(const typename Base::TensorStorage& shared, int stage, int row) {
    constexpr int kStage = cute::size<0>(TileShape{}) * kDepth;
    const auto* bytes = reinterpret_cast<const char*>(shared.smem_A.data()) + stage * kStage + row * kDepth;
    const uint32_t chunk = 4u ^ (cute::cast_smem_ptr_to_uint(bytes) >> 7 & 7u);
    return *reinterpret_cast<const int*>(bytes + chunk * 16u);
  }

  template <class Sums>
  CUTLASS_DEVICE void mma(Pipeline pipeline, State state, Sums& sums, int count, int thread,
                          typename Base::TensorStorage& shared, const Params&) {
    using namespace cute;
    using cutlass::NumThreadsPerWarpGroup;
    typename Base::TiledMma product;
    const int group = __shfl_sync(0xffffffffu, thread / NumThreadsPerWarpGroup, 0);
    const auto slice = product.get_slice(group * NumThreadsPerWarpGroup);
    const auto a = slice.make_fragment_A(
        slice.partition_A(make_tensor(make_smem_ptr(shared.smem_A.data()), typename Base::SmemLayoutA{})));
    const auto b = slice.make_fragment_B(
        slice.partition_B(make_tensor(make_smem_ptr(shared.smem_B.data()), typename Base::SmemLayoutB{})));

    // The outlier columns.
    const auto places = product.get_slice(thread).partition_C(
        make_identity_tensor(make_shape(size<0>(TileShape{}), size<1>(TileShape{}))));
    constexpr int kHalves = size<0, 1>(Sums{}), kBlocks = size<1>(Sums{});  // a thread's rows of a block, and blocks
    int shift[kHalves][kBlocks], any = 0;
    pipeline.consumer_wait(state, pipeline.consumer_try_wait(state));
    int stage = state.index();
    warpgroup_fence_operand(sums);
    warpgroup_arrive();
    product.accumulate_ = GMMA::ScaleOut::Zero;
    cute::gemm(product, a(_, _, Int<0>{}, stage), b(_, _, Int<0>{}, stage), sums);
    warpgroup_commit_batch();
#pragma unroll
    for (int row = 0; row < kHalves * kBlocks; ++row) {
      const int h = row % kHalves, i = row / kHalves;
      any |= shift[h][i] = shift_of(shared, stage, get<0>(places(make_coord(0, h, 0), i, 0)));
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(sums);
#pragma unroll
    for (int i = 0; i < size(sums); ++i) sums(i) *= kInt8Plane;
    warpgroup_fence_operand(sums);
    warpgroup_arrive();
    product.accumulate_ = GMMA::ScaleOut::One;
    cute::gemm(product, a(_, _, Int<1>{}, stage), b(_, _, Int<0>{}, stage), sums);
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(sums);
    if (__any_sync(0xffffffffu, any != 0)) {  // rare: an outlier more than 128 times as large as the row's others
      for_each(make_seq<kHalves * kBlocks>{}, [&](auto row) {
        constexpr int h = decltype(row)::value % kHalves, i = decltype(row)::value / kHalves;
        auto of_row = sums(make_coord(_, Int<h>{}, _), Int<i>{}, _);
#pragma unroll
        for (int j = 0; j < size(of_row); ++j) of_row(j) <<= shift[h][i];
      });
    }
    // One thread gives the stage back for all, who must have read their shifts.
    cutlass::arch::NamedBarrier::sync(NumThreadsPerWarpGroup,
                                      static_cast<uint32_t>(threadIdx.x) / NumThreadsPerWarpGroup);
    pipeline.consumer_release(state);
    ++state;

    // The others: a stage goes back once the product behind it is under way. The first product stands before the loop,
    // or the compiler would wait for each.
    State release = state;
    const auto multiply = [&] {
      pipeline.consumer_wait(state, pipeline.consumer_try_wait(state));
      stage = state.index();
      warpgroup_fence_operand(sums);
      warpgroup_arrive();
      cute::gemm(product, a(_, _, _, stage), b(_, _, _, stage), sums);
      warpgroup_commit_batch();
      ++state;
    };
    multiply();
    warpgroup_fence_operand(sums);
#pragma unroll 1
    for (int tile = 2; tile < count; ++tile) {
      multiply();
      warpgroup_wait<1>();
      warpgroup_fence_operand(sums);
      pipeline.consumer_release(release);
      ++release;
    }
    warpgroup_fence_operand(sums);
  }
};

}  // namespace quantrain::cuda::sm90
