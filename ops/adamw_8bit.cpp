#include "quantrain/ops/adamw_8bit.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <array>
#include <string_view>

#include "csrc/cpu/adamw_8bit.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/common/random.h"
#include "quantrain/ops/pruning.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/adamw_8bit.h"
#endif

namespace quantrain {
namespace {

using at::TensorList;
using OptionalTensor = std::optional<at::Tensor>;
using OptionalGenerator = std::optional<at::Generator>;
using OptionalMasks = std::optional<c10::List<at::Tensor>>;  // a schema's list of tensors has no default but None
using CodesTuple = std::tuple<at::Tensor, at::Tensor>;

constexpr std::string_view kStep = "adamw_8bit_";
constexpr std::string_view kQuantize = "quantize_8bit_blockwise";
constexpr std::string_view kDequantize = "dequantize_8bit_blockwise";

// ---- checks, shared with Meta ---------------------------------------------------------------------------------------

// The schema's arguments but for those of random numbers.
struct Step {
  TensorList params, grads, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, steps;
  const at::Tensor& lr;
  double beta1, beta2, eps, weight_decay;
  const OptionalTensor& grad_scale;
  const OptionalTensor& found_inf;
  std::vector<at::Tensor> masks;

  bool has_mask(size_t i) const { return !masks.empty() && TORCH_GUARD_OR_TRUE(masks[i].sym_numel().sym_ne(0)); }
};

std::vector<at::Tensor> masks_of(const OptionalMasks& masks) {
  return masks ? masks->vec() : std::vector<at::Tensor>{};
}

OptionalMasks list_of(const std::vector<at::Tensor>& masks) {
  return masks.empty() ? OptionalMasks() : OptionalMasks(c10::List<at::Tensor>(masks));
}

c10::SymInt blocks_of(const at::Tensor& tensor) { return (tensor.sym_numel() + kStateBlock - 1) / kStateBlock; }

void check_dense_at(std::string_view name, const at::Tensor& tensor, const at::Tensor& param, size_t i) {
  QUANTRAIN_CHECK_TYPE(tensor.layout() == at::kStrided, "{}: expected dense {}, got layout {} at index {}", kStep, name,
                       c10::str(tensor.layout()), i);
  QUANTRAIN_CHECK_TYPE(tensor.device() == param.device(), "{}: expected {} on {}, got {} at index {}", kStep, name,
                       param.device().str(), tensor.device().str(), i);
}

void check_float_at(std::string_view name, const at::Tensor& tensor, size_t i) {
  const auto type = tensor.scalar_type();
  QUANTRAIN_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
                       "{}: expected {} of float32, float16 or bfloat16, got {} at index {}", kStep, name,
                       c10::toString(type), i);
}

void check_shape_at(std::string_view name, const at::Tensor& tensor, const at::Tensor& param, size_t i) {
  QUANTRAIN_CHECK_VALUE(tensor.sym_sizes() == param.sym_sizes(), "{}: expected {} of shape {}, got {} at index {}",
                        kStep, name, detail::shape_text(param), detail::shape_text(tensor), i);
}

void check_moment_at(std::string_view name, const at::Tensor& moment, const at::Tensor& scale, const at::Tensor& param,
                     size_t i) {
  check_dense_at(name, moment, param, i);
  const bool codes = moment.scalar_type() == at::kByte;
  QUANTRAIN_CHECK_TYPE(codes || moment.scalar_type() == at::kFloat,
                       "{}: expected {} of uint8 (8 bits) or float32 (32 bits), got {} at index {}", kStep, name,
                       c10::toString(moment.scalar_type()), i);
  check_shape_at(name, moment, param, i);
  check_dense_at(std::string(name) + "_scale", scale, param, i);
  QUANTRAIN_CHECK_TYPE(scale.scalar_type() == at::kFloat, "{}: expected {}_scale of float32, got {} at index {}", kStep,
                       name, c10::toString(scale.scalar_type()), i);
  const c10::SymInt expected = codes ? blocks_of(param) : c10::SymInt(0);
  QUANTRAIN_CHECK_VALUE(scale.sym_numel() == expected,
                        "{}: expected {}_scale of {} elements, {}, got shape {} at index {}", kStep, name,
                        c10::str(expected), codes ? "one for 256 of the parameter" : "since a float32 moment has none",
                        detail::shape_text(scale), i);
}

void check_mask_at(const at::Tensor& mask, const at::Tensor& param, size_t i) {
  check_dense_at("masks", mask, param, i);
  QUANTRAIN_CHECK_TYPE(mask.scalar_type() == at::kByte, "{}: expected masks of uint8, got {} at index {}", kStep,
                       c10::toString(mask.scalar_type()), i);
  const c10::SymInt bytes = (param.sym_numel() + 7) / 8;
  QUANTRAIN_CHECK_VALUE(mask.dim() == 1 && TORCH_GUARD_OR_TRUE(mask.sym_numel().sym_eq(bytes)),
                        "{}: expected masks of {} bytes, a bit for each element, got shape {} at index {}", kStep,
                        c10::str(bytes), detail::shape_text(mask), i);
}

void check_one(std::string_view name, const at::Tensor& tensor, const at::Tensor& param) {
  detail::check_dense(kStep, name, tensor);
  detail::check_type(kStep, name, tensor, at::kFloat, "float32");
  QUANTRAIN_CHECK_VALUE(tensor.sym_numel() == 1, "{}: expected {} with one element, got shape {}", kStep, name,
                        detail::shape_text(tensor));
  detail::check_device(kStep, name, tensor, param, "the parameters'");
}

void check_numbers(const Step& s) {
  QUANTRAIN_CHECK_VALUE(s.beta1 >= 0 && s.beta1 < 1, "{}: expected beta1 in [0, 1), got {}", kStep, s.beta1);
  QUANTRAIN_CHECK_VALUE(s.beta2 >= 0 && s.beta2 < 1, "{}: expected beta2 in [0, 1), got {}", kStep, s.beta2);
  QUANTRAIN_CHECK_VALUE(s.eps >= 0, "{}: expected eps >= 0, got {}", kStep, s.eps);
  QUANTRAIN_CHECK_VALUE(s.weight_decay >= 0, "{}: expected weight_decay >= 0, got {}", kStep, s.weight_decay);
}

void check_step(const Step& s, bool stochastic) {
  check_numbers(s);
  const std::array<std::pair<std::string_view, TensorList>, 6> lists{{{"grads", s.grads},
                                                                      {"exp_avg", s.exp_avg},
                                                                      {"exp_avg_scale", s.exp_avg_scale},
                                                                      {"exp_avg_sq", s.exp_avg_sq},
                                                                      {"exp_avg_sq_scale", s.exp_avg_sq_scale},
                                                                      {"steps", s.steps}}};
  for (const auto& [name, list] : lists)
    QUANTRAIN_CHECK_VALUE(list.size() == s.params.size(), "{}: expected {} for each of {} parameters, got {}", kStep,
                          name, s.params.size(), list.size());
  QUANTRAIN_CHECK_VALUE(s.masks.empty() || s.masks.size() == s.params.size(),
                        "{}: expected no masks or one for each of {} parameters, got {}", kStep, s.params.size(),
                        s.masks.size());
  const at::Tensor& first = s.params.empty() ? s.lr : s.params[0];
  for (size_t i = 0; i < s.params.size(); ++i) {
    const at::Tensor& param = s.params[i];
    check_dense_at("params", param, first, i);
    check_float_at("params", param, i);
    QUANTRAIN_CHECK_TYPE(!stochastic || param.scalar_type() != at::kHalf,
                         "{}: expected params of bfloat16 or float32 for stochastic rounding, got Half at index {}",
                         kStep, i);
    check_dense_at("grads", s.grads[i], param, i);
    check_float_at("grads", s.grads[i], i);
    check_shape_at("grads", s.grads[i], param, i);
    check_moment_at("exp_avg", s.exp_avg[i], s.exp_avg_scale[i], param, i);
    check_moment_at("exp_avg_sq", s.exp_avg_sq[i], s.exp_avg_sq_scale[i], param, i);
    QUANTRAIN_CHECK_TYPE(s.exp_avg[i].scalar_type() == s.exp_avg_sq[i].scalar_type(),
                         "{}: expected exp_avg and exp_avg_sq of one type, got {} and {} at index {}", kStep,
                         c10::toString(s.exp_avg[i].scalar_type()), c10::toString(s.exp_avg_sq[i].scalar_type()), i);
    check_one("steps", s.steps[i], param);
    if (s.has_mask(i)) check_mask_at(s.masks[i], param, i);
  }
  check_one("lr", s.lr, first);
  if (s.grad_scale) check_one("grad_scale", *s.grad_scale, first);
  if (s.found_inf) check_one("found_inf", *s.found_inf, first);
}

CodesTuple quantize_meta(const at::Tensor& input, bool) {
  detail::check_dense(kQuantize, "input", input);
  detail::check_float(kQuantize, "input", input.scalar_type());
  return {at::empty_symint(input.sym_sizes(), input.options().dtype(at::kByte)),
          at::empty_symint({blocks_of(input)}, input.options().dtype(at::kFloat))};
}

at::Tensor dequantize_meta(const at::Tensor& codes, const at::Tensor& scale, bool) {
  detail::check_dense(kDequantize, "codes", codes);
  detail::check_dense(kDequantize, "scale", scale);
  detail::check_type(kDequantize, "codes", codes, at::kByte, "uint8");
  detail::check_type(kDequantize, "scale", scale, at::kFloat, "float32");
  detail::check_device(kDequantize, "scale", scale, codes, "codes'");
  QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(scale.sym_numel().sym_eq(blocks_of(codes))),
                        "{}: expected scale of {} elements, one for 256 codes, got shape {}", kDequantize,
                        c10::str(blocks_of(codes)), detail::shape_text(scale));
  return at::empty_symint(codes.sym_sizes(), codes.options().dtype(at::kFloat));
}

// ---- CPU and CUDA ---------------------------------------------------------------------------------------------------

// The list as kernels take it. What does not lie in the order of its parameter's memory, or has gaps, is copied;
// `write_back` puts the copies' values where they belong.
class DenseLists {
 public:
  explicit DenseLists(const Step& s) {
    entries_.reserve(s.params.size());
    for (size_t i = 0; i < s.params.size(); ++i) {
      const at::Tensor param = changed(s.params[i], dense(s.params[i]));
      const bool codes = s.exp_avg[i].scalar_type() == at::kByte;
      AdamW8bitTensor entry;
      entry.param = param.mutable_data_ptr();
      entry.grad = kept(arranged(s.grads[i], param)).const_data_ptr();
      entry.exp_avg = changed(s.exp_avg[i], arranged(s.exp_avg[i], param)).mutable_data_ptr();
      entry.exp_avg_sq = changed(s.exp_avg_sq[i], arranged(s.exp_avg_sq[i], param)).mutable_data_ptr();
      if (codes) {
        entry.exp_avg_scale = floats(s.exp_avg_scale[i]);
        entry.exp_avg_sq_scale = floats(s.exp_avg_sq_scale[i]);
      }
      entry.step = floats(s.steps[i]);
      if (s.has_mask(i)) entry.mask = kept(in_memory_order(s.masks[i], param)).const_data_ptr<uint8_t>();
      entry.numel = param.numel();
      entry.dtype = dtype_of(param);
      entry.grad_dtype = dtype_of(s.grads[i]);
      entry.codes = codes;
      entries_.push_back(entry);
      blocks_ += state_blocks_of(entry.numel);
    }
  }

  const std::vector<AdamW8bitTensor>& entries() const { return entries_; }
  int64_t blocks() const { return blocks_; }

  void write_back() const {
    for (const auto& [original, copy] : copies_) original.copy_(copy);
  }

 private:
  // A mask's bits are in row-major order, a block's elements in that of memory.
  static at::Tensor in_memory_order(const at::Tensor& mask, const at::Tensor& param) {
    if (param.is_contiguous()) return mask.contiguous();
    const at::Tensor kept = arranged(unpack_mask(mask, param.sizes()), param);
    return pack_mask(kept.as_strided({kept.numel()}, {1}));
  }

  // With the strides of a dense parameter.
  static at::Tensor arranged(const at::Tensor& tensor, const at::Tensor& param) {
    if (tensor.strides() == param.strides()) return tensor;
    return at::empty_strided(param.sizes(), param.strides(), tensor.options()).copy_(tensor);
  }

  const at::Tensor& kept(const at::Tensor& tensor) { return kept_.emplace_back(tensor); }

  const at::Tensor& changed(const at::Tensor& original, const at::Tensor& dense_one) {
    if (!dense_one.is_same(original)) copies_.emplace_back(original, dense_one);
    return kept(dense_one);
  }

  float* floats(const at::Tensor& tensor) { return changed(tensor, tensor.contiguous()).mutable_data_ptr<float>(); }

  std::vector<AdamW8bitTensor> entries_;
  std::vector<at::Tensor> kept_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;
  int64_t blocks_ = 0;
};

void run_step(const Step& s, const Random& random) {
  const DenseLists lists(s);
  const auto pointer = [](const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr<float>() : nullptr; };
  const AdamW8bitArgs args{lists.entries().data(),
                           static_cast<int64_t>(lists.entries().size()),
                           s.lr.const_data_ptr<float>(),
                           pointer(s.grad_scale),
                           pointer(s.found_inf),
                           s.beta1,
                           s.beta2,
                           s.eps,
                           s.weight_decay,
                           random.stochastic,
                           random.philox};
#if defined(QUANTRAIN_WITH_CUDA)
  const bool done = run_on_cuda(args, s.params[0], &cuda::adamw_8bit);
#else
  const bool done = false;
#endif
  if (!done) {
    parallel_for(lists.blocks(), grain_of(kStateBlock),
                 [&](int64_t begin, int64_t end) { cpu::adamw_8bit(args, begin, end); });
    cpu::count_steps(args);
  }
  lists.write_back();
  // Autograd falls through, and so leaves the versions alone; what is kept of a parameter would seem current.
  for (const at::Tensor& param : s.params)
    if (!param.is_inference()) param.unsafeGetTensorImpl()->bump_version();
}

#define QUANTRAIN_ADAMW_8BIT_LISTS                                                                                 \
  TensorList params, TensorList grads, TensorList exp_avg, TensorList exp_avg_scale, TensorList exp_avg_sq,        \
      TensorList exp_avg_sq_scale, TensorList steps, const at::Tensor &lr, double beta1, double beta2, double eps, \
      double weight_decay, const OptionalTensor &grad_scale, const OptionalTensor &found_inf,                      \
      const OptionalMasks &masks
#define QUANTRAIN_ADAMW_8BIT_STEP                                                                                    \
  Step {                                                                                                             \
    params, grads, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, steps, lr, beta1, beta2, eps, weight_decay, \
        grad_scale, found_inf, masks_of(masks)                                                                       \
  }

void adamw_8bit_meta(QUANTRAIN_ADAMW_8BIT_LISTS, bool stochastic, const OptionalGenerator&) {
  check_step(QUANTRAIN_ADAMW_8BIT_STEP, stochastic);
}

void adamw_8bit_seeded_meta(QUANTRAIN_ADAMW_8BIT_LISTS, int64_t, int64_t) {
  check_step(QUANTRAIN_ADAMW_8BIT_STEP, true);
}

void adamw_8bit_kernel(QUANTRAIN_ADAMW_8BIT_LISTS, bool stochastic, const OptionalGenerator& generator) {
  const Step step = QUANTRAIN_ADAMW_8BIT_STEP;
  check_step(step, stochastic);
  if (!params.empty()) run_step(step, draw(kStep, params[0].device(), stochastic, generator));
}

void adamw_8bit_seeded_kernel(QUANTRAIN_ADAMW_8BIT_LISTS, int64_t seed, int64_t offset) {
  const Step step = QUANTRAIN_ADAMW_8BIT_STEP;
  check_step(step, true);
  if (!params.empty()) run_step(step, seeded(seed, offset));
}

CodesTuple quantize_kernel(const at::Tensor& input, bool is_signed) {
  auto [codes, scale] = quantize_meta(input, is_signed);
  const at::Tensor x = input.contiguous();
  const StateCodesArgs args{const_cast<void*>(x.const_data_ptr()),
                            codes.mutable_data_ptr<uint8_t>(),
                            scale.mutable_data_ptr<float>(),
                            x.numel(),
                            dtype_of(x),
                            is_signed};
  if (x.numel() > 0)
    run_tasks(args, state_blocks_of(x.numel()), grain_of(kStateBlock), x, QUANTRAIN_KERNELS(quantize_state));
  return {codes, scale};
}

at::Tensor dequantize_kernel(const at::Tensor& codes, const at::Tensor& scale, bool is_signed) {
  const at::Tensor result = dequantize_meta(codes, scale, is_signed);
  const at::Tensor from = codes.contiguous(), factors = scale.contiguous();
  const StateCodesArgs args{result.mutable_data_ptr(),
                            const_cast<uint8_t*>(from.const_data_ptr<uint8_t>()),
                            const_cast<float*>(factors.const_data_ptr<float>()),
                            from.numel(),
                            DType::kFloat32,
                            is_signed};
  if (from.numel() > 0)
    run_tasks(args, state_blocks_of(from.numel()), grain_of(kStateBlock), from, QUANTRAIN_KERNELS(dequantize_state));
  return result;
}

}  // namespace

// ---- public functions -----------------------------------------------------------------------------------------------

void adamw_8bit_(const AdamW8bitTensors& t, const AdamW8bitArguments& a) {
  static const auto op = find_operator<decltype(adamw_8bit_kernel)>("adamw_8bit_");
  op.call(t.params, t.grads, t.exp_avg, t.exp_avg_scale, t.exp_avg_sq, t.exp_avg_sq_scale, t.steps, a.lr, a.beta1,
          a.beta2, a.eps, a.weight_decay, a.grad_scale, a.found_inf, list_of(t.masks), a.stochastic, a.generator);
}

void adamw_8bit_seeded_(const AdamW8bitTensors& t, const AdamW8bitArguments& a, int64_t seed, int64_t offset) {
  static const auto op = find_operator<decltype(adamw_8bit_seeded_kernel)>("adamw_8bit_", "seeded");
  op.call(t.params, t.grads, t.exp_avg, t.exp_avg_scale, t.exp_avg_sq, t.exp_avg_sq_scale, t.steps, a.lr, a.beta1,
          a.beta2, a.eps, a.weight_decay, a.grad_scale, a.found_inf, list_of(t.masks), seed, offset);
}

BlockwiseCodes quantize_8bit_blockwise(const at::Tensor& input, bool is_signed) {
  static const auto op = find_operator<decltype(quantize_kernel)>("quantize_8bit_blockwise");
  auto [codes, scale] = op.call(input, is_signed);
  return {codes, scale};
}

at::Tensor dequantize_8bit_blockwise(const at::Tensor& codes, const at::Tensor& scale, bool is_signed) {
  static const auto op = find_operator<decltype(dequantize_kernel)>("dequantize_8bit_blockwise");
  return op.call(codes, scale, is_signed);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def(
      "adamw_8bit_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_scale, Tensor(d!)[] "
      "exp_avg_sq, Tensor(e!)[] exp_avg_sq_scale, Tensor(f!)[] steps, *, Tensor lr, float beta1=0.9, float "
      "beta2=0.999, float eps=1e-8, float weight_decay=0.01, Tensor? grad_scale=None, Tensor? found_inf=None, "
      "Tensor[]? masks=None, bool stochastic=False, Generator? generator=None) -> ()",
      {at::Tag::nondeterministic_seeded});
  m.def(
      "adamw_8bit_.seeded(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_scale, "
      "Tensor(d!)[] exp_avg_sq, Tensor(e!)[] exp_avg_sq_scale, Tensor(f!)[] steps, *, Tensor lr, float beta1=0.9, "
      "float beta2=0.999, float eps=1e-8, float weight_decay=0.01, Tensor? grad_scale=None, Tensor? found_inf=None, "
      "Tensor[]? masks=None, int seed, int offset) -> ()");
  m.def("quantize_8bit_blockwise(Tensor input, *, bool signed=True) -> (Tensor codes, Tensor scale)");
  m.def("dequantize_8bit_blockwise(Tensor codes, Tensor scale, *, bool signed=True) -> Tensor");
}

#define QUANTRAIN_REGISTER_ADAMW_8BIT(kind)                           \
  m.impl("adamw_8bit_", &quantrain::adamw_8bit_##kind);               \
  m.impl("adamw_8bit_.seeded", &quantrain::adamw_8bit_seeded_##kind); \
  m.impl("quantize_8bit_blockwise", &quantrain::quantize_##kind);     \
  m.impl("dequantize_8bit_blockwise", &quantrain::dequantize_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_ADAMW_8BIT(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_ADAMW_8BIT(meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_ADAMW_8BIT(kernel); }
#endif
