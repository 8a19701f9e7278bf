#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "csrc/cpu/dropout.h"
#include "ops/common/check.h"
#include "ops/common/launch.h"
#include "ops/common/random.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/dropout.h"
#endif

// Dropout by a state of random numbers, for operators that need its mask twice and do not keep it: _dropout_state draws
// one, _dropout applies it.

namespace quantrain {
namespace {

constexpr std::string_view kDropout = "_dropout";
constexpr std::string_view kState = "_dropout_state";

at::Tensor state_meta(const at::Tensor& like, const std::optional<at::Generator>&) {
  return at::empty({2}, like.options().dtype(at::kLong));
}

at::Tensor seeded_meta(const at::Tensor& like, int64_t, int64_t) { return state_meta(like, std::nullopt); }

at::Tensor dropout_meta(const at::Tensor& input, const at::Tensor& state, double p) {
  detail::check_float(kDropout, "input", input.scalar_type());
  detail::check_type(kDropout, "state", state, at::kLong, "int64");
  detail::check_device(kDropout, "state", state, input, "input's");
  QUANTRAIN_CHECK_VALUE(state.dim() == 1 && TORCH_GUARD_OR_TRUE(state.sym_size(0).sym_eq(2)),
                        "{}: expected a state of 2 elements, got {}", kDropout, detail::shape_text(state));
  QUANTRAIN_CHECK_VALUE(p >= 0 && p < 1, "{}: expected p in [0, 1), got {}", kDropout, p);
  return at::empty_symint(input.sym_sizes(), input.options());
}

at::Tensor written_state(const at::Tensor& like, const PhiloxState& philox) {
  const at::Tensor state = state_meta(like, std::nullopt);
  const DropoutStateArgs args{philox, state.mutable_data_ptr<int64_t>()};
#if defined(QUANTRAIN_WITH_CUDA)
  if (run_on_cuda(args, state, &cuda::dropout_state)) return state;
#endif
  cpu::dropout_state(args);
  return state;
}

at::Tensor state_kernel(const at::Tensor& like, const std::optional<at::Generator>& generator) {
  return written_state(like, next_philox_state(kState, generator, like.device()));
}

at::Tensor seeded_kernel(const at::Tensor& like, int64_t seed, int64_t offset) {
  return written_state(like, seeded_philox_state(seed, offset));
}

at::Tensor dropout_kernel(const at::Tensor& input, const at::Tensor& state, double p) {
  const at::Tensor y = dropout_meta(input, state, p);
  if (y.numel() == 0) return y;
  const at::Tensor x = input.contiguous(), s = state.contiguous();
  const DropoutArgs args{
      x.const_data_ptr(),    s.const_data_ptr<int64_t>(),        y.mutable_data_ptr(), dtype_of(x), x.numel(),
      static_cast<float>(p), static_cast<float>(1.0 / (1.0 - p))};
  run_elementwise(args, y, QUANTRAIN_KERNELS(dropout));
  return y;
}

}  // namespace
}  // namespace quantrain

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def("_dropout_state(Tensor like, *, Generator? generator=None) -> Tensor", {at::Tag::nondeterministic_seeded});
  m.def("_dropout_state.seeded(Tensor like, *, int seed, int offset) -> Tensor");
  m.def("_dropout(Tensor input, Tensor state, *, float p) -> Tensor", {at::Tag::needs_exact_strides});
}

#define QUANTRAIN_REGISTER_DROPOUT(kind)                      \
  m.impl("_dropout_state", &quantrain::state_##kind);         \
  m.impl("_dropout_state.seeded", &quantrain::seeded_##kind); \
  m.impl("_dropout", &quantrain::dropout_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_DROPOUT(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_DROPOUT(meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_DROPOUT(kernel); }
#endif
