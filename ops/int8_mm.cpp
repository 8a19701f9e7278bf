#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/int8_mm.h"
#include "ops/int8_mm_cpu.h"
#include "quantrain/ops/int8.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/int8.h"
#endif

// The integer matrix product. The sum runs over both operands' last dimension, as tensor cores take them.

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr std::string_view kMm = "int8_mm";
constexpr std::string_view kAccumulate = "int8_mm_accumulate_";

// So many products of two codes fit in int32; longer sums are split, and the parts added in float32.
constexpr int64_t kMaxSum = 131056;  // a multiple of 16 below 2^31 / 128^2

// ---- checks and shapes, shared with Meta ----------------------------------------------------------------------------

void check_operands(std::string_view op, const at::Tensor& a, const at::Tensor& b) {
  QUANTRAIN_CHECK_TYPE(a.scalar_type() == at::kChar && b.scalar_type() == at::kChar,
                       "{}: expected a and b of int8, got {} and {}", op, c10::toString(a.scalar_type()),
                       c10::toString(b.scalar_type()));
  detail::check_device(op, "b", b, a, "a's");
  QUANTRAIN_CHECK_VALUE(a.dim() >= 1 && b.dim() == 2 && TORCH_GUARD_OR_TRUE(a.sym_size(-1).sym_eq(b.sym_size(1))),
                        "{}: expected a [..., K] and b [N, K], got {} and {}", op, detail::shape_text(a),
                        detail::shape_text(b));
}

void check_scale(std::string_view op, const char* name, const OptionalTensor& scale, const c10::SymInt& rows,
                 const at::Tensor& a) {
  if (!scale) return;
  detail::check_type(op, name, *scale, at::kFloat, "float32");
  detail::check_device(op, name, *scale, a, "the operands'");
  QUANTRAIN_CHECK_VALUE(
      TORCH_GUARD_OR_TRUE(scale->sym_numel().sym_eq(rows)) || TORCH_GUARD_OR_FALSE(scale->sym_numel().sym_eq(1)),
      "{}: expected {} of {} elements or of one, got {}", op, name, c10::str(rows), detail::shape_text(*scale));
}

at::Tensor mm_meta(const at::Tensor& a, const at::Tensor& b, const OptionalTensor& a_scale,
                   const OptionalTensor& b_scale, const OptionalTensor& bias, at::ScalarType out_dtype) {
  check_operands(kMm, a, b);
  check_scale(kMm, "a_scale", a_scale, rows_of(a), a);
  check_scale(kMm, "b_scale", b_scale, b.sym_size(0), a);
  if (bias) {
    QUANTRAIN_CHECK_TYPE(at::isFloatingType(bias->scalar_type()) && bias->device() == a.device(),
                         "{}: expected bias of a floating type on {}, got {} on {}", kMm, a.device().str(),
                         c10::toString(bias->scalar_type()), bias->device().str());
    QUANTRAIN_CHECK_VALUE(bias->dim() == 1 && TORCH_GUARD_OR_TRUE(bias->sym_size(0).sym_eq(b.sym_size(0))),
                          "{}: expected bias of b's dimension 0, got {} and {}", kMm, detail::shape_text(*bias),
                          detail::shape_text(b));
  }
  QUANTRAIN_CHECK_TYPE(out_dtype == at::kFloat || out_dtype == at::kHalf || out_dtype == at::kBFloat16,
                       "{}: expected out_dtype float32, float16 or bfloat16, got {}", kMm, c10::toString(out_dtype));
  std::vector<c10::SymInt> sizes(a.sym_sizes().begin(), a.sym_sizes().end());
  sizes.back() = b.sym_size(0);
  return at::empty_symint(sizes, a.options().dtype(out_dtype));
}

at::Tensor mm_typed_meta(const at::Tensor& a, const at::Tensor& b, const OptionalTensor& a_scale,
                         const OptionalTensor& b_scale, const OptionalTensor& bias, c10::string_view out_dtype) {
  return mm_meta(a, b, a_scale, b_scale, bias, detail::named_type(kMm, "out_dtype", out_dtype));
}

void accumulate_meta(at::Tensor& accumulator, const at::Tensor& a, const at::Tensor& b, const OptionalTensor& a_scale,
                     const OptionalTensor& b_scale) {
  check_operands(kAccumulate, a, b);
  check_scale(kAccumulate, "a_scale", a_scale, rows_of(a), a);
  check_scale(kAccumulate, "b_scale", b_scale, b.sym_size(0), a);
  const auto type = accumulator.scalar_type();
  QUANTRAIN_CHECK_TYPE(
      (type == at::kFloat || type == at::kHalf || type == at::kBFloat16) && accumulator.device() == a.device(),
      "{}: expected accumulator of float32, float16 or bfloat16 on {}, got {} on {}", kAccumulate, a.device().str(),
      c10::toString(type), accumulator.device().str());
  QUANTRAIN_CHECK_VALUE(a.dim() == 2 && accumulator.dim() == 2 &&
                            TORCH_GUARD_OR_TRUE(accumulator.sym_size(0).sym_eq(a.sym_size(0))) &&
                            TORCH_GUARD_OR_TRUE(accumulator.sym_size(1).sym_eq(b.sym_size(0))),
                        "{}: expected accumulator [M, N] for a [M, K] and b [N, K], got {}, {} and {}", kAccumulate,
                        detail::shape_text(accumulator), detail::shape_text(a), detail::shape_text(b));
}

// ---- CPU and CUDA ---------------------------------------------------------------------------------------------------

#if defined(QUANTRAIN_WITH_CUDA)
// Rows of whole 16-byte groups on 16-byte boundaries, filled up with zeros: what the tensor-core kernels load.
at::Tensor padded(const at::Tensor& codes) {
  constexpr int64_t kGroup = 16;
  const int64_t rest = codes.size(1) % kGroup;
  if (rest != 0) return at::constant_pad_nd(codes, {0, kGroup - rest}, 0);
  return reinterpret_cast<uintptr_t>(codes.const_data_ptr()) % kGroup == 0 ? codes : codes.clone();
}

void mm_cuda(const at::Tensor& a, const at::Tensor& b, Int8MmArgs args, const cuda::Int8MmKernel& kernel = {}) {
  const int capability = cuda::compute_capability();
  QUANTRAIN_CHECK_VALUE(capability >= 80, "{}: expected a GPU of compute capability 8.0 (Ampere) or later, got {}.{}",
                        kMm, capability / 10, capability % 10);
  const at::Tensor x = padded(a), y = padded(b);
  args.a = x.const_data_ptr<int8_t>();
  args.b = y.const_data_ptr<int8_t>();
  args.k = x.size(1);
  at::Tensor workspace;
  if (const size_t bytes = cuda::int8_mm_workspace(args, kernel)) {
    workspace = at::empty({static_cast<int64_t>(bytes)}, a.options().dtype(at::kByte));
    args.workspace = workspace.mutable_data_ptr();
  }
  C10_CUDA_CHECK(static_cast<cudaError_t>(
      cuda::int8_mm(args, c10::cuda::getCurrentCUDAStream(a.device().index()).stream(), kernel)));
}
#endif

// Of contiguous tensors; scales and bias float32.
Int8MmArgs mm_args(const at::Tensor& a, const at::Tensor& b, const OptionalTensor& a_scale,
                   const OptionalTensor& b_scale, const OptionalTensor& bias, const at::Tensor& d, bool accumulate) {
  const auto pointer = [](const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr<float>() : nullptr; };
  const auto stride = [](const OptionalTensor& scale) { return int64_t{scale && scale->numel() != 1}; };
  return {a.const_data_ptr<int8_t>(),
          b.const_data_ptr<int8_t>(),
          pointer(a_scale),
          pointer(b_scale),
          stride(a_scale),
          stride(b_scale),
          pointer(bias),
          d.mutable_data_ptr(),
          dtype_of(d),
          a.size(0),
          b.size(0),
          a.size(1),
          accumulate,
          nullptr};
}

void run_mm(const at::Tensor& a, const at::Tensor& b, const Int8MmArgs& args) {
#if defined(QUANTRAIN_WITH_CUDA)
  if (a.is_cuda()) {
    const c10::cuda::CUDAGuard guard(a.device());
    return mm_cuda(a, b, args);
  }
#endif
  int8_mm_cpu(a, b, args);
}

// One sum that fits int32. a [M, K], b [N, K], contiguous, K > 0; d contiguous.
void mm(const at::Tensor& a, const at::Tensor& b, const OptionalTensor& a_scale, const OptionalTensor& b_scale,
        const OptionalTensor& bias, const at::Tensor& d, bool accumulate) {
  run_mm(a, b, mm_args(a, b, a_scale, b_scale, bias, d, accumulate));
}

OptionalTensor as_float(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->to(at::kFloat).contiguous()) : std::nullopt;
}

void split_mm(const at::Tensor& a, const at::Tensor& b, const OptionalTensor& a_scale, const OptionalTensor& b_scale,
              const at::Tensor& sum) {
  for (int64_t begin = 0; begin < a.size(1); begin += kMaxSum) {
    const int64_t size = std::min(kMaxSum, a.size(1) - begin);
    mm(a.narrow(1, begin, size).contiguous(), b.narrow(1, begin, size).contiguous(), a_scale, b_scale, std::nullopt,
       sum, /*accumulate=*/true);
  }
}

// Where there are no columns: zeros times scales, one of which may be NaN.
at::Tensor empty_sums(int64_t m, int64_t n, const OptionalTensor& a_scale, const OptionalTensor& b_scale,
                      const at::Tensor& like) {
  at::Tensor sum = at::zeros({m, n}, like.options().dtype(at::kFloat));
  if (b_scale) sum.mul_(b_scale->view({1, -1}));
  if (a_scale) sum.mul_(a_scale->view({-1, 1}));
  return sum;
}

at::Tensor mm_kernel(const at::Tensor& a, const at::Tensor& b, const OptionalTensor& a_scale,
                     const OptionalTensor& b_scale, const OptionalTensor& bias, at::ScalarType out_dtype) {
  at::Tensor result = mm_meta(a, b, a_scale, b_scale, bias, out_dtype);
  if (result.numel() == 0) return result;
  const int64_t k = b.size(1);
  const OptionalTensor x_scale = as_float(a_scale), y_scale = as_float(b_scale), shift = as_float(bias);
  if (k == 0) {
    at::Tensor sum = empty_sums(result.numel() / b.size(0), b.size(0), x_scale, y_scale, result);
    if (shift) sum.add_(*shift);
    return result.copy_(sum.view(result.sizes()));
  }
  const at::Tensor x = a.contiguous().view({-1, k}), y = b.contiguous();
  if (k <= kMaxSum) {
    mm(x, y, x_scale, y_scale, shift, result, /*accumulate=*/false);
    return result;
  }
  const at::Tensor sum = at::zeros({x.size(0), y.size(0)}, result.options().dtype(at::kFloat));
  split_mm(x, y, x_scale, y_scale, sum);
  if (shift) sum.add_(*shift);
  return result.copy_(sum.view(result.sizes()));
}

at::Tensor mm_typed_kernel(const at::Tensor& a, const at::Tensor& b, const OptionalTensor& a_scale,
                           const OptionalTensor& b_scale, const OptionalTensor& bias, c10::string_view out_dtype) {
  return mm_kernel(a, b, a_scale, b_scale, bias, detail::named_type(kMm, "out_dtype", out_dtype));
}

#if defined(QUANTRAIN_WITH_CUDA)
// By a kernel of the given name, to test and to measure each.
at::Tensor mm_by_kernel(const at::Tensor& a, const at::Tensor& b, const OptionalTensor& a_scale,
                        const OptionalTensor& b_scale, const OptionalTensor& bias, at::ScalarType out_dtype,
                        std::string_view kernel, int64_t swizzle, int64_t splits) {
  at::Tensor result = mm_meta(a, b, a_scale, b_scale, bias, out_dtype);
  if (result.numel() == 0) return result;
  const c10::cuda::CUDAGuard guard(a.device());
  const at::Tensor x = a.contiguous().view({-1, b.size(1)}), y = b.contiguous();
  const OptionalTensor x_scale = as_float(a_scale), y_scale = as_float(b_scale), shift = as_float(bias);
  mm_cuda(x, y, mm_args(x, y, x_scale, y_scale, shift, result, /*accumulate=*/false),
          {kernel, static_cast<int>(swizzle), static_cast<int>(splits)});
  return result;
}
#endif

void accumulate_kernel(at::Tensor& accumulator, const at::Tensor& a, const at::Tensor& b, const OptionalTensor& a_scale,
                       const OptionalTensor& b_scale) {
  accumulate_meta(accumulator, a, b, a_scale, b_scale);
  if (accumulator.numel() == 0) return;
  const OptionalTensor x_scale = as_float(a_scale), y_scale = as_float(b_scale);
  if (a.size(1) == 0) {
    accumulator.add_(empty_sums(a.size(0), b.size(0), x_scale, y_scale, accumulator));
    return;
  }
  const at::Tensor x = a.contiguous(), y = b.contiguous();
  if (a.size(1) <= kMaxSum && accumulator.is_contiguous())
    return mm(x, y, x_scale, y_scale, std::nullopt, accumulator, /*accumulate=*/true);
  const at::Tensor sum =
      accumulator.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
  split_mm(x, y, x_scale, y_scale, sum);
  accumulator.copy_(sum);
}

}  // namespace

void detail::int8_mm_with(const Int8MmOutliers& outliers, const at::Tensor& a, const at::Tensor& b,
                          const at::Tensor& b_scale, const OptionalTensor& bias, const at::Tensor& d) {
  Int8MmArgs args = mm_args(a, b, std::nullopt, b_scale, bias, d, /*accumulate=*/false);
  args.a_scale = outliers.scale;
  args.a_scale_stride = 2;
  args.outliers = outliers;
  run_mm(a, b, args);
}

// ---- public functions -----------------------------------------------------------------------------------------------

at::Tensor int8_mm(const at::Tensor& a, const at::Tensor& b, const OptionalTensor& a_scale,
                   const OptionalTensor& b_scale, const OptionalTensor& bias, at::ScalarType out_dtype) {
  static const auto op = find_operator<decltype(mm_kernel)>("int8_mm");
  return op.call(a, b, a_scale, b_scale, bias, out_dtype);
}

void int8_mm_accumulate_(at::Tensor& accumulator, const at::Tensor& a, const at::Tensor& b,
                         const OptionalTensor& a_scale, const OptionalTensor& b_scale) {
  static const auto op = find_operator<decltype(accumulate_kernel)>("int8_mm_accumulate_");
  op.call(accumulator, a, b, a_scale, b_scale);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  const std::vector<at::Tag> fixed{at::Tag::needs_exact_strides};
  m.def(
      "int8_mm(Tensor a, Tensor b, Tensor? a_scale=None, Tensor? b_scale=None, Tensor? bias=None, *, ScalarType "
      "out_dtype=float) -> Tensor",
      fixed);
  m.def(
      "int8_mm.typed(Tensor a, Tensor b, Tensor? a_scale=None, Tensor? b_scale=None, Tensor? bias=None, *, str "
      "out_dtype=\"float32\") -> Tensor",
      fixed);
  m.def(
      "int8_mm_accumulate_(Tensor(a!) accumulator, Tensor a, Tensor b, Tensor? a_scale=None, Tensor? b_scale=None) "
      "-> ()",
      fixed);
#if defined(QUANTRAIN_WITH_CUDA)
  m.def(
      "_int8_mm_by_kernel(Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale, Tensor? bias, *, ScalarType "
      "out_dtype, str "
      "kernel, int swizzle=1, int splits=0) -> Tensor",
      fixed);
#endif
}

#define QUANTRAIN_REGISTER_INT8_MM(kind)                \
  m.impl("int8_mm", &quantrain::mm_##kind);             \
  m.impl("int8_mm.typed", &quantrain::mm_typed_##kind); \
  m.impl("int8_mm_accumulate_", &quantrain::accumulate_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_INT8_MM(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_INT8_MM(meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) {
  QUANTRAIN_REGISTER_INT8_MM(kernel);
  m.impl("_int8_mm_by_kernel", &quantrain::mm_by_kernel);
}
#endif
