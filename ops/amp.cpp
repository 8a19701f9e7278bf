#include "ops/amp.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>

#include "csrc/cpu/amp.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/common/random.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/amp.h"
#endif

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalGenerator = std::optional<at::Generator>;
using CheckTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// ---- checks, shared with Meta ---------------------------------------------------------------------------------------

void check_list(std::string_view op, std::string_view name, at::TensorList tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    QUANTRAIN_CHECK_TYPE(
        tensor.layout() == at::kStrided,
        "{}: expected dense {} (of a sparse gradient, its coalesced values), got layout {} at index {}", op, name,
        c10::str(tensor.layout()), i);
    const auto type = tensor.scalar_type();
    QUANTRAIN_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
                         "{}: expected {} of float32, float16 or bfloat16, got {} at index {}", op, name,
                         c10::toString(type), i);
    QUANTRAIN_CHECK_TYPE(tensor.device() == tensors[0].device(), "{}: expected {} on one device, got {} and {}", op,
                         name, tensors[0].device().str(), tensor.device().str());
  }
}

void check_one(std::string_view op, std::string_view name, const at::Tensor& tensor, c10::Device device) {
  detail::check_type(op, name, tensor, at::kFloat, "float32");
  QUANTRAIN_CHECK_VALUE(tensor.sym_numel() == 1, "{}: expected {} with one element, got shape {}", op, name,
                        detail::shape_text(tensor));
  QUANTRAIN_CHECK_TYPE(tensor.device() == device, "{}: expected {} on the gradients' device {}, got {}", op, name,
                       device.str(), tensor.device().str());
}

void check_max_norm(std::string_view op, std::optional<double> max_norm) {
  QUANTRAIN_CHECK_VALUE(!max_norm || *max_norm > 0.0, "{}: expected max_norm > 0, got {}", op,
                        *max_norm);  // NaN fails too
}

// Without a limit the clip coefficient is 1.
float limit_of(std::optional<double> max_norm) {
  return static_cast<float>(max_norm.value_or(std::numeric_limits<double>::infinity()));
}

CheckTuple allocate_check(at::TensorList grads, const at::Tensor& scale) {
  const auto one = [&] { return at::empty({}, scale.options()); };
  return {one(), one(), one(), at::zeros({static_cast<int64_t>(grads.size())}, scale.options())};
}

CheckTuple amp_check_norm_meta(at::TensorList grads, const at::Tensor& scale, std::optional<double> max_norm) {
  check_list("_amp_check_norm", "gradients", grads);
  check_one("_amp_check_norm", "scale", scale, grads.empty() ? scale.device() : grads[0].device());
  check_max_norm("_amp_check_norm", max_norm);
  return allocate_check(grads, scale);
}

void amp_scale_meta(at::TensorList grads, const at::Tensor& scale, const OptionalTensor& norm,
                    std::optional<double> max_norm) {
  check_list("_amp_scale_", "gradients", grads);
  const c10::Device device = grads.empty() ? scale.device() : grads[0].device();
  check_one("_amp_scale_", "scale", scale, device);
  if (norm) check_one("_amp_scale_", "norm", *norm, device);
  check_max_norm("_amp_scale_", max_norm);
}

void check_round_stochastic(at::TensorList parameters, at::TensorList masters) {
  constexpr std::string_view kOp = "_amp_round_stochastic_";
  check_list(kOp, "parameters", parameters);
  check_list(kOp, "masters", masters);
  QUANTRAIN_CHECK_VALUE(parameters.size() == masters.size(), "{}: expected a master for each parameter, got {} for {}",
                        kOp, masters.size(), parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i) {
    QUANTRAIN_CHECK_TYPE(parameters[i].scalar_type() != at::kFloat,
                         "{}: expected parameters of float16 or bfloat16, got float at index {}", kOp, i);
    QUANTRAIN_CHECK_TYPE(masters[i].scalar_type() == at::kFloat, "{}: expected masters of float32, got {} at index {}",
                         kOp, c10::toString(masters[i].scalar_type()), i);
    QUANTRAIN_CHECK_TYPE(masters[i].device() == parameters[0].device(),
                         "{}: expected masters on the parameters' device {}, got {}", kOp, parameters[0].device().str(),
                         masters[i].device().str());
    QUANTRAIN_CHECK_VALUE(masters[i].sym_sizes() == parameters[i].sym_sizes(),
                          "{}: expected a master of shape {}, got {} at index {}", kOp,
                          detail::shape_text(parameters[i]), detail::shape_text(masters[i]), i);
  }
}

void amp_round_stochastic_meta(at::TensorList parameters, at::TensorList masters, const OptionalGenerator&) {
  check_round_stochastic(parameters, masters);
}

void amp_round_stochastic_seeded_meta(at::TensorList parameters, at::TensorList masters, int64_t, int64_t) {
  check_round_stochastic(parameters, masters);
}

// Of empty lists, or of a device without a kernel.
void amp_round_stochastic_nothing(at::TensorList parameters, at::TensorList masters, const OptionalGenerator&) {
  check_round_stochastic(parameters, masters);
  QUANTRAIN_CHECK_TYPE(parameters.empty(), "_amp_round_stochastic_: expected parameters on the CPU or CUDA, got {}",
                       parameters[0].device().str());
}

void amp_round_stochastic_seeded_nothing(at::TensorList parameters, at::TensorList masters, int64_t, int64_t) {
  amp_round_stochastic_nothing(parameters, masters, std::nullopt);
}

// ---- CPU and CUDA ---------------------------------------------------------------------------------------------------

at::Tensor with_strides_of(const at::Tensor& like, const at::Tensor& tensor) {
  if (tensor.strides() == like.strides()) return tensor;
  return at::empty_strided(like.sizes(), like.strides(), tensor.options()).copy_(tensor);
}

// The tensors as kernels take them. Those with gaps in memory are copied; `write_back` puts the copies' values where
// they belong.
struct DenseList {
  std::vector<at::Tensor> tensors;
  std::vector<ListTensor> entries;
  int64_t chunks = 0;

  enum class Access { kRead, kWrite };

  DenseList(at::TensorList list, Access access, at::TensorList sources = {}) {
    tensors.reserve(list.size());
    entries.reserve(list.size());
    for (size_t i = 0; i < list.size(); ++i) {
      tensors.push_back(dense(list[i]));
      const float* source = nullptr;
      if (!sources.empty()) {
        sources_.push_back(with_strides_of(tensors[i], sources[i]));
        source = sources_.back().const_data_ptr<float>();
      }
      const int64_t numel = tensors[i].numel();
      void* data =
          access == Access::kWrite ? tensors[i].mutable_data_ptr() : const_cast<void*>(tensors[i].const_data_ptr());
      entries.push_back({data, source, numel, dtype_of(tensors[i])});
      chunks += chunks_of(numel);
    }
  }

  void write_back(at::TensorList list) const {
    for (size_t i = 0; i < list.size(); ++i)
      if (!tensors[i].is_same(list[i])) list[i].copy_(tensors[i]);
  }

 private:
  std::vector<at::Tensor> sources_;
};

// Over the chunks of a list.
template <typename Args>
void run_chunks(const Args& args, const DenseList& list, CpuKernel<Args> kernel, CudaLauncher<Args> launcher) {
  if (list.chunks == 0 || run_on_cuda(args, list.tensors[0], launcher)) return;
  parallel_for(list.chunks, 2, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

CheckTuple amp_check_norm_kernel(at::TensorList grads, const at::Tensor& scale, std::optional<double> max_norm) {
  auto [found_inf, norm, grad_scale, non_finite] = amp_check_norm_meta(grads, scale, max_norm);
  const DenseList list(grads, DenseList::Access::kRead);
  const at::Tensor partial = at::empty({list.chunks}, scale.options());
  const float* scale_data = scale.const_data_ptr<float>();
  const auto count = static_cast<int64_t>(list.entries.size());
  const CheckNormArgs check{list.entries.data(), count, scale_data, partial.mutable_data_ptr<float>(),
                            non_finite.mutable_data_ptr<float>()};
  run_chunks(check, list, QUANTRAIN_KERNELS(check_norm));
  const FinishNormArgs finish{partial.const_data_ptr<float>(),
                              list.chunks,
                              non_finite.const_data_ptr<float>(),
                              count,
                              scale_data,
                              limit_of(max_norm),
                              found_inf.mutable_data_ptr<float>(),
                              norm.mutable_data_ptr<float>(),
                              grad_scale.mutable_data_ptr<float>()};
#if defined(QUANTRAIN_WITH_CUDA)
  if (run_on_cuda(finish, scale, &cuda::finish_norm)) return {found_inf, norm, grad_scale, non_finite};
#endif
  cpu::finish_norm(finish);
  return {found_inf, norm, grad_scale, non_finite};
}

void amp_scale_kernel(at::TensorList grads, const at::Tensor& scale, const OptionalTensor& norm,
                      std::optional<double> max_norm) {
  amp_scale_meta(grads, scale, norm, max_norm);
  const DenseList list(grads, DenseList::Access::kWrite);
  const ScaleArgs args{list.entries.data(), static_cast<int64_t>(list.entries.size()), scale.const_data_ptr<float>(),
                       norm ? norm->const_data_ptr<float>() : nullptr, limit_of(max_norm)};
  run_chunks(args, list, QUANTRAIN_KERNELS(scale_list));
  list.write_back(grads);
}

void round_stochastic_with_state(at::TensorList parameters, at::TensorList masters, const PhiloxState& philox) {
  const DenseList list(parameters, DenseList::Access::kWrite, masters);
  const StochasticRoundArgs args{list.entries.data(), static_cast<int64_t>(list.entries.size()), philox};
  run_chunks(args, list, QUANTRAIN_KERNELS(round_stochastic_list));
  list.write_back(parameters);
}

void amp_round_stochastic_kernel(at::TensorList parameters, at::TensorList masters,
                                 const OptionalGenerator& generator) {
  check_round_stochastic(parameters, masters);
  if (parameters.empty()) return;
  const PhiloxState philox = next_philox_state("_amp_round_stochastic_", generator, parameters[0].device());
  round_stochastic_with_state(parameters, masters, philox);
}

void amp_round_stochastic_seeded_kernel(at::TensorList parameters, at::TensorList masters, int64_t seed,
                                        int64_t offset) {
  check_round_stochastic(parameters, masters);
  round_stochastic_with_state(parameters, masters, seeded_philox_state(seed, offset));
}

}  // namespace

// ---- public functions -----------------------------------------------------------------------------------------------

namespace detail {

NormCheck amp_check_norm(at::TensorList grads, const at::Tensor& scale, std::optional<double> max_norm) {
  static const auto op = find_operator<decltype(amp_check_norm_kernel)>("_amp_check_norm");
  auto [found_inf, norm, grad_scale, non_finite] = op.call(grads, scale, max_norm);
  return {found_inf, norm, grad_scale, non_finite};
}

void amp_scale_(at::TensorList grads, const at::Tensor& scale, const OptionalTensor& norm,
                std::optional<double> max_norm) {
  static const auto op = find_operator<decltype(amp_scale_kernel)>("_amp_scale_");
  op.call(grads, scale, norm, max_norm);
}

void amp_round_stochastic_(at::TensorList parameters, at::TensorList masters, const OptionalGenerator& generator) {
  static const auto op = find_operator<decltype(amp_round_stochastic_kernel)>("_amp_round_stochastic_");
  op.call(parameters, masters, generator);
}

}  // namespace detail
}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def(
      "_amp_check_norm(Tensor[] grads, Tensor scale, *, float? max_norm=None) -> (Tensor found_inf, Tensor norm, "
      "Tensor "
      "grad_scale, Tensor non_finite)");
  m.def("_amp_scale_(Tensor(a!)[] grads, Tensor scale, Tensor? norm=None, *, float? max_norm=None) -> ()");
  m.def("_amp_round_stochastic_(Tensor(a!)[] parameters, Tensor[] masters, *, Generator? generator=None) -> ()",
        {at::Tag::nondeterministic_seeded});
  m.def("_amp_round_stochastic_.seeded(Tensor(a!)[] parameters, Tensor[] masters, *, int seed, int offset) -> ()");
}

#define QUANTRAIN_REGISTER_AMP(kind)                                         \
  m.impl("_amp_check_norm", &quantrain::amp_check_norm_##kind);              \
  m.impl("_amp_scale_", &quantrain::amp_scale_##kind);                       \
  m.impl("_amp_round_stochastic_", &quantrain::amp_round_stochastic_##kind); \
  m.impl("_amp_round_stochastic_.seeded", &quantrain::amp_round_stochastic_seeded_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_AMP(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_AMP(meta); }
// Empty lists name no device: this is where the dispatcher sends them.
TORCH_LIBRARY_IMPL(quantrain, CompositeExplicitAutograd, m) {
  m.impl("_amp_round_stochastic_", &quantrain::amp_round_stochastic_nothing);
  m.impl("_amp_round_stochastic_.seeded", &quantrain::amp_round_stochastic_seeded_nothing);
}
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_AMP(kernel); }
#endif
