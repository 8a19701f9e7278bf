#include "quantrain/ops/distillation.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "csrc/cpu/distillation.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/distillation_operators.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/distillation.h"
#endif

// A loss is one operator of rows, which has the gradient, and the reduction of what it gives.

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Pair = std::tuple<at::Tensor, at::Tensor>;

struct Loss {
  std::string_view kind;
  std::string_view op;  // what messages call it
  DistillationKind kernel;
};

constexpr Loss kLosses[] = {
    {"kl", "distillation_kl", DistillationKind::kKl},
    {"kl_topk", "distillation_kl_topk", DistillationKind::kKlTopk},
    {"mse", "hidden_mse", DistillationKind::kMse},
    {"mse_normalized", "hidden_mse", DistillationKind::kMseNormalized},
    {"cosine", "hidden_cosine", DistillationKind::kCosine},
    {"attention_kl", "attention_kl", DistillationKind::kAttentionKl},
};

const Loss& loss_of(std::string_view kind) {
  for (const Loss& loss : kLosses)
    if (loss.kind == kind) return loss;
  QUANTRAIN_CHECK_VALUE(false, "_distillation_rows: expected a known kind, got '{}'", kind);
}

// ---- checks, shared with Meta ---------------------------------------------------------------------------------------

// Of [.., K] the [..], and `last` where it is given.
std::vector<c10::SymInt> leading(const at::Tensor& tensor, std::optional<c10::SymInt> last = std::nullopt) {
  std::vector<c10::SymInt> sizes(tensor.sym_sizes().begin(), tensor.sym_sizes().end() - 1);
  if (last) sizes.push_back(*last);
  return sizes;
}

// Its leading sizes as a message has them.
std::string rows_text(const at::Tensor& tensor) {
  const c10::SymIntArrayRef sizes = tensor.sym_sizes();
  return c10::str(sizes.slice(0, sizes.empty() ? 0 : sizes.size() - 1));
}

bool same_sizes(const at::Tensor& tensor, const std::vector<c10::SymInt>& sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (!TORCH_GUARD_OR_TRUE(tensor.sym_size(static_cast<int64_t>(d)).sym_eq(sizes[d]))) return false;
  return true;
}

void check_rows(const Loss& loss, const at::Tensor& student, const at::Tensor& teacher, const OptionalTensor& indices,
                const OptionalTensor& mask, double temperature) {
  const bool topk = loss.kernel == DistillationKind::kKlTopk;
  const std::string_view name = topk ? "teacher_values" : "teacher";
  detail::check_float(loss.op, "student", student.scalar_type());
  detail::check_float(loss.op, name, teacher.scalar_type());
  detail::check_dense(loss.op, "student", student);
  detail::check_dense(loss.op, name, teacher);
  detail::check_device(loss.op, name, teacher, student, "student's");
  QUANTRAIN_CHECK_VALUE(student.dim() >= 1, "{}: expected student [.., K], got {}", loss.op,
                        detail::shape_text(student));
  QUANTRAIN_CHECK_VALUE(temperature > 0 && std::isfinite(temperature), "{}: expected temperature above 0, got {}",
                        loss.op, temperature);
  QUANTRAIN_CHECK_VALUE(topk == indices.has_value(), "{}: expected indices with stored values alone, got {}", loss.op,
                        topk ? "stored values without" : "a teacher with indices");
  if (!topk) {
    QUANTRAIN_CHECK_VALUE(same_sizes(teacher, leading(student, student.sym_size(-1))),
                          "{}: expected teacher of student's shape {}, got {}", loss.op, detail::shape_text(student),
                          detail::shape_text(teacher));
  } else {
    detail::check_device(loss.op, "teacher_indices", *indices, student, "student's");
    QUANTRAIN_CHECK_TYPE(indices->scalar_type() == at::kLong || indices->scalar_type() == at::kInt,
                         "{}: expected teacher_indices of int32 or int64, got {}", loss.op,
                         c10::toString(indices->scalar_type()));
    QUANTRAIN_CHECK_VALUE(teacher.dim() >= 1 && same_sizes(teacher, leading(student, teacher.sym_size(-1))) &&
                              same_sizes(*indices, leading(student, teacher.sym_size(-1))),
                          "{}: expected teacher_values and teacher_indices [.., k] for student {}, got {} and {}",
                          loss.op, detail::shape_text(student), detail::shape_text(teacher),
                          detail::shape_text(*indices));
    QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(teacher.sym_size(-1).sym_le(student.sym_size(-1))),
                          "{}: expected at most student's {} columns in teacher_values, got {}", loss.op,
                          c10::str(student.sym_size(-1)), c10::str(teacher.sym_size(-1)));
#if defined(QUANTRAIN_WITH_CUDA)
    QUANTRAIN_CHECK_VALUE(!student.is_cuda() || TORCH_GUARD_OR_TRUE(student.sym_size(-1).sym_le(cuda::kMaxTopkColumns)),
                          "{}: expected at most {} columns on CUDA, got {}", loss.op, cuda::kMaxTopkColumns,
                          c10::str(student.sym_size(-1)));
#endif
  }
  if (!mask) return;
  detail::check_device(loss.op, "mask", *mask, student, "student's");
  QUANTRAIN_CHECK_TYPE(!mask->is_complex() && mask->layout() == at::kStrided,
                       "{}: expected a dense mask of bool or numbers, got {}", loss.op,
                       c10::toString(mask->scalar_type()));
  QUANTRAIN_CHECK_VALUE(same_sizes(*mask, leading(student)), "{}: expected mask {} for student's rows, got {}", loss.op,
                        rows_text(student), detail::shape_text(*mask));
}

Pair rows_meta(const at::Tensor& student, const at::Tensor& teacher, const OptionalTensor& indices,
               const OptionalTensor& mask, std::string_view kind, double temperature) {
  check_rows(loss_of(kind), student, teacher, indices, mask, temperature);
  const auto floats = student.options().dtype(at::kFloat);
  return {at::empty_symint(leading(student), floats), at::empty_symint(leading(student, 4), floats)};
}

void check_backward(const Loss& loss, const at::Tensor& grad, const at::Tensor& student, const at::Tensor& moments) {
  for (const auto& [name, tensor] : {std::pair("grad", grad), std::pair("moments", moments)}) {
    detail::check_type(loss.op, name, tensor, at::kFloat, "float32");
    detail::check_device(loss.op, name, tensor, student, "student's");
  }
  QUANTRAIN_CHECK_VALUE(same_sizes(grad, leading(student)) && same_sizes(moments, leading(student, 4)),
                        "{}: expected grad and moments of student's rows, got {} and {} for {}", loss.op,
                        detail::shape_text(grad), detail::shape_text(moments), detail::shape_text(student));
}

at::Tensor backward_meta(const at::Tensor& grad, const at::Tensor& student, const at::Tensor& teacher,
                         const OptionalTensor& indices, const OptionalTensor& mask, const at::Tensor& moments,
                         std::string_view kind, double temperature) {
  const Loss& loss = loss_of(kind);
  check_rows(loss, student, teacher, indices, mask, temperature);
  check_backward(loss, grad, student, moments);
  return at::empty_symint(student.sym_sizes(), student.options());
}

// ---- CPU and CUDA ---------------------------------------------------------------------------------------------------

// A tensor whose rows lie where `places` says.
struct Rows {
  at::Tensor tensor;
  RowPlaces places;
};

// The rows where they are, if they lie evenly in evenly spaced batches, else those of a copy.
Rows rows_where_they_are(const at::Tensor& x) {
  const int64_t columns = x.size(-1);
  std::vector<std::pair<int64_t, int64_t>> levels;  // sizes and strides, outermost first, merged
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    if (x.size(d) == 1) continue;
    if (!levels.empty() && levels.back().second == x.size(d) * x.stride(d))
      levels.back() = {levels.back().first * x.size(d), x.stride(d)};
    else
      levels.emplace_back(x.size(d), x.stride(d));
  }
  const bool whole = columns <= 1 || x.stride(-1) == 1;
  if (!whole || levels.size() > 2) return {x.contiguous(), {1, columns, 0}};
  if (levels.empty()) return {x, {1, 0, 0}};
  if (levels.size() == 1) return {x, {1, levels[0].second, 0}};
  return {x, {levels[1].first, levels[0].second, levels[1].second}};
}

// What keeps the memory alive that the arguments point to.
struct Held {
  Rows student, teacher;
  at::Tensor index, mask;
};

DistillationArgs arguments(const Loss& loss, Held& held, const at::Tensor& student, const at::Tensor& teacher,
                           const OptionalTensor& indices, const OptionalTensor& mask, double temperature) {
  const bool topk = loss.kernel == DistillationKind::kKlTopk;
  held.student = rows_where_they_are(student);
  if (topk) {
    held.teacher = {teacher.to(at::kFloat).contiguous(), {1, teacher.size(-1), 0}};
    held.index = at::clamp(*indices, -1, student.size(-1)).to(at::kInt).contiguous();
  } else {
    held.teacher = rows_where_they_are(teacher);
  }
  if (mask) held.mask = (mask->scalar_type() == at::kBool ? *mask : mask->ne(0)).contiguous();
  DistillationArgs args{};
  args.kind = loss.kernel;
  args.student = held.student.tensor.const_data_ptr();
  args.teacher = held.teacher.tensor.const_data_ptr();
  args.index = topk ? held.index.const_data_ptr<int32_t>() : nullptr;
  args.mask = mask ? static_cast<const uint8_t*>(held.mask.const_data_ptr()) : nullptr;
  args.student_places = held.student.places;
  args.teacher_places = held.teacher.places;
  args.columns = student.size(-1);
  args.rows = args.columns > 0 ? student.numel() / args.columns : 0;
  args.kept = topk ? teacher.size(-1) : 0;
  args.student_dtype = dtype_of(student);
  args.teacher_dtype = dtype_of(held.teacher.tensor);
  args.temperature = static_cast<float>(temperature);
  return args;
}

Pair rows_kernel(const at::Tensor& student, const at::Tensor& teacher, const OptionalTensor& indices,
                 const OptionalTensor& mask, std::string_view kind, double temperature) {
  auto [loss, moments] = rows_meta(student, teacher, indices, mask, kind, temperature);
  if (student.numel() == 0) return {loss.zero_(), moments.zero_()};
  Held held;
  DistillationArgs args = arguments(loss_of(kind), held, student, teacher, indices, mask, temperature);
  args.loss = loss.mutable_data_ptr<float>();
  args.moments = moments.mutable_data_ptr<float>();
  run_tasks(args, args.rows, grain_of(args.columns), student, QUANTRAIN_KERNELS(distillation));
  return {loss, moments};
}

at::Tensor backward_kernel(const at::Tensor& grad, const at::Tensor& student, const at::Tensor& teacher,
                           const OptionalTensor& indices, const OptionalTensor& mask, const at::Tensor& moments,
                           std::string_view kind, double temperature) {
  const at::Tensor grad_student = backward_meta(grad, student, teacher, indices, mask, moments, kind, temperature);
  if (student.numel() == 0) return grad_student;
  Held held;
  DistillationArgs args = arguments(loss_of(kind), held, student, teacher, indices, mask, temperature);
  const at::Tensor of_rows = grad.contiguous(), kept = moments.contiguous();
  args.grad = of_rows.const_data_ptr<float>();
  args.moments = const_cast<float*>(kept.const_data_ptr<float>());
  args.grad_student = grad_student.mutable_data_ptr();
  run_tasks(args, args.rows, grain_of(args.columns), student, QUANTRAIN_KERNELS(distillation_backward));
  return grad_student;
}

// ---- the losses -----------------------------------------------------------------------------------------------------

at::Tensor reduced(std::string_view kind, const at::Tensor& student, const at::Tensor& teacher,
                   const OptionalTensor& indices, double temperature, const OptionalTensor& mask,
                   std::string_view reduction) {
  static const auto op = find_operator<DistillationRows>("_distillation_rows");
  QUANTRAIN_CHECK_VALUE(reduction == "mean" || reduction == "sum" || reduction == "none",
                        "{}: expected reduction mean, sum or none, got '{}'", loss_of(kind).op, reduction);
  const at::Tensor loss = std::get<0>(op.call(student, teacher, indices, mask, kind, temperature));
  if (reduction == "none") return loss;
  if (reduction == "sum") return loss.sum();
  if (mask) return loss.sum() / at::clamp(mask->ne(0).sum(), 1);
  return TORCH_GUARD_OR_FALSE(loss.sym_numel().sym_eq(0)) ? loss.sum() : loss.mean();
}

}  // namespace

// ---- public functions -----------------------------------------------------------------------------------------------

at::Tensor distillation_kl(const at::Tensor& student, const at::Tensor& teacher, double temperature,
                           const OptionalTensor& mask, std::string_view reduction) {
  return reduced("kl", student, teacher, std::nullopt, temperature, mask, reduction);
}

at::Tensor distillation_kl_topk(const at::Tensor& student, const at::Tensor& teacher_values,
                                const at::Tensor& teacher_indices, double temperature, const OptionalTensor& mask,
                                std::string_view reduction) {
  return reduced("kl_topk", student, teacher_values, teacher_indices, temperature, mask, reduction);
}

at::Tensor hidden_mse(const at::Tensor& student, const at::Tensor& teacher, const OptionalTensor& mask, bool normalize,
                      std::string_view reduction) {
  return reduced(normalize ? "mse_normalized" : "mse", student, teacher, std::nullopt, 1.0, mask, reduction);
}

at::Tensor hidden_cosine(const at::Tensor& student, const at::Tensor& teacher, const OptionalTensor& mask,
                         std::string_view reduction) {
  return reduced("cosine", student, teacher, std::nullopt, 1.0, mask, reduction);
}

at::Tensor attention_kl(const at::Tensor& student, const at::Tensor& teacher, const OptionalTensor& mask,
                        std::string_view reduction) {
  return reduced("attention_kl", student, teacher, std::nullopt, 1.0, mask, reduction);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def(
      "distillation_kl(Tensor student, Tensor teacher, *, float temperature=1.0, Tensor? mask=None, str "
      "reduction=\"mean\") -> Tensor");
  m.def(
      "distillation_kl_topk(Tensor student, Tensor teacher_values, Tensor teacher_indices, *, float temperature=1.0, "
      "Tensor? mask=None, str reduction=\"mean\") -> Tensor");
  m.def(
      "hidden_mse(Tensor student, Tensor teacher, *, Tensor? mask=None, bool normalize=False, str reduction=\"mean\") "
      "-> Tensor");
  m.def("hidden_cosine(Tensor student, Tensor teacher, *, Tensor? mask=None, str reduction=\"mean\") -> Tensor");
  m.def("attention_kl(Tensor student, Tensor teacher, *, Tensor? mask=None, str reduction=\"mean\") -> Tensor");
  m.def(
      "_distillation_rows(Tensor student, Tensor teacher, Tensor? indices, Tensor? mask, *, str kind, float "
      "temperature) -> (Tensor loss, Tensor moments)");
  m.def(
      "_distillation_rows_backward(Tensor grad, Tensor student, Tensor teacher, Tensor? indices, Tensor? mask, Tensor "
      "moments, *, str kind, float temperature) -> Tensor");
}

TORCH_LIBRARY_IMPL(quantrain, CompositeImplicitAutograd, m) {
  m.impl("distillation_kl", &quantrain::distillation_kl);
  m.impl("distillation_kl_topk", &quantrain::distillation_kl_topk);
  m.impl("hidden_mse", &quantrain::hidden_mse);
  m.impl("hidden_cosine", &quantrain::hidden_cosine);
  m.impl("attention_kl", &quantrain::attention_kl);
}

#define QUANTRAIN_REGISTER_DISTILLATION(kind)            \
  m.impl("_distillation_rows", &quantrain::rows_##kind); \
  m.impl("_distillation_rows_backward", &quantrain::backward_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_DISTILLATION(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_DISTILLATION(meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_DISTILLATION(kernel); }
#endif
