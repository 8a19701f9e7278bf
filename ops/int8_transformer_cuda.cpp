#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "csrc/cuda/int8.h"
#include "ops/common/layout.h"
#include "ops/int8_transformer_launch.h"

namespace quantrain::detail {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Product = Int8TransformerProduct;
using Norm = Int8TransformerNorm;

constexpr int64_t kAlignment = 256;

const float* floats(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr<float>() : nullptr; }

void launched(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }

// One allocation for what lies between the kernels.
class Arena {
 public:
  Arena(int64_t bytes, const at::Tensor& beside)
      : memory_(at::empty({bytes}, beside.options().dtype(at::kByte))), next_(memory_.mutable_data_ptr<uint8_t>()) {}

  template <typename T>
  T* take(int64_t bytes) {
    auto* taken = reinterpret_cast<T*>(next_);
    next_ += padded(bytes);
    return taken;
  }

  static int64_t padded(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

 private:
  at::Tensor memory_;
  uint8_t* next_;
};

// Rows in int8: what a product reads.
struct Rows {
  const int8_t* codes;
  const float* scale;
};

struct MutableRows {
  int8_t* codes;
  float* scale;

  operator Rows() const { return {codes, scale}; }
};

int64_t bytes_of_rows(int64_t rows, int64_t columns) {
  return Arena::padded(rows * columns) + Arena::padded(rows * int64_t{sizeof(float)});
}

MutableRows take_rows(Arena& arena, int64_t rows, int64_t columns) {
  auto* codes = arena.take<int8_t>(rows * columns);
  return {codes, arena.take<float>(rows * int64_t{sizeof(float)})};
}

class Launcher {
 public:
  Launcher(const at::Tensor& x, const Int8TransformerOptions& o)
      : o_(o),
        dtype_(dtype_of(x)),
        rows_(x.size(0) * x.size(1)),
        width_(x.size(2)),
        stream_(c10::cuda::getCurrentCUDAStream(x.device().index()).stream()) {}

  int64_t rows() const { return rows_; }
  int64_t width() const { return width_; }

  Int8MmArgs product(const Product& p, Rows x, void* y) const {
    const at::Tensor &codes = p.weight.codes, &scale = p.weight.scale;
    return {x.codes,
            codes.const_data_ptr<int8_t>(),
            x.scale,
            scale.const_data_ptr<float>(),
            1,
            int64_t{scale.numel() != 1},
            floats(p.bias),
            y,
            dtype_,
            rows_,
            codes.size(0),
            codes.size(1),
            /*accumulate=*/false,
            nullptr};
  }

  int64_t workspace(const Product& p) const {
    return static_cast<int64_t>(cuda::int8_mm_workspace(product(p, {}, nullptr)));
  }

  void multiply(const Product& p, Rows x, void* y, void* workspace) const {
    Int8MmArgs args = product(p, x, y);
    args.workspace = workspace;
    launched(cuda::int8_mm(args, stream_));
  }

  void quantize(const void* x, const Product& next, MutableRows y) const {
    launched(cuda::int8_quantize_rows(
        {x, floats(next.weight.input_factor), y.codes, y.scale, dtype_, rows_, next.weight.codes.size(1), false, {}},
        stream_));
  }

  // The norm of x, or of x + branch, which `carried` keeps.
  void norm(const void* x, const void* branch, const Norm& n, const Product& next, void* carried, MutableRows y) const {
    const auto pointer = [](const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; };
    launched(cuda::int8_norm({branch ? branch : x, branch ? x : nullptr, pointer(n.weight), pointer(n.bias), carried,
                              y.codes, y.scale, dtype_,
                              n.weight ? dtype_of(*n.weight)
                              : n.bias ? dtype_of(*n.bias)
                                       : dtype_,
                              rows_, width_, static_cast<float>(o_.eps), o_.norm == "rms_norm", branch && !o_.pre_norm,
                              floats(next.weight.input_factor)},
                             stream_));
  }

  // y += x
  void add(const void* x, void* y) const { launched(cuda::add_to(x, y, dtype_, rows_ * width_, stream_)); }

  void activate(const void* x, int64_t columns, const Product& next, MutableRows y) const {
    const bool gated = o_.activation == "silu_mul";
    const Int8Activation activation = gated                          ? Int8Activation::kSiluMul
                                      : o_.activation == "relu"      ? Int8Activation::kRelu
                                      : o_.activation == "gelu_tanh" ? Int8Activation::kGeluTanh
                                                                     : Int8Activation::kGeluErf;
    const int64_t kept = next.weight.codes.size(1);
    const void* up = gated ? static_cast<const uint8_t*>(x) + kept * 2 : nullptr;  // 16-bit elements
    launched(cuda::int8_activation(
        {x, up, y.codes, y.scale, dtype_, rows_, kept, columns, activation, floats(next.weight.input_factor)},
        stream_));
  }

 private:
  const Int8TransformerOptions& o_;
  DType dtype_;
  int64_t rows_, width_;
  void* stream_;
};

bool launches(const Product& p, const Int8TransformerOptions& o, const at::Tensor& beside) {
  if (!int8_transformer_plain(p, o)) return false;
  const at::Tensor &codes = p.weight.codes, &scale = p.weight.scale;
  const auto is_plain_float = [&](const OptionalTensor& t) {
    return !t || (t->scalar_type() == at::kFloat && t->is_contiguous() && t->device() == beside.device());
  };
  constexpr int64_t kMaxSum = 131056;  // of int8_mm
  return codes.is_contiguous() && codes.device() == beside.device() && codes.size(1) % 16 == 0 && codes.size(1) > 0 &&
         codes.size(1) <= kMaxSum && reinterpret_cast<uintptr_t>(codes.const_data_ptr()) % 16 == 0 &&
         is_plain_float(scale) && (scale.numel() == 1 || scale.numel() == codes.size(0)) && is_plain_float(p.bias) &&
         (!p.bias || p.bias->numel() == codes.size(0)) && is_plain_float(p.weight.input_factor) &&
         (!p.weight.input_factor || p.weight.input_factor->numel() == codes.size(1));
}

}  // namespace

bool int8_transformer_launches(const at::Tensor& input, const Int8TransformerWeights& w,
                               const Int8TransformerOptions& o) {
  if (!input.is_cuda() || input.element_size() != 2 || input.size(2) % 8 != 0 || cuda::compute_capability() < 80)
    return false;
  const auto whole = [](const OptionalTensor& t) { return !t || t->is_contiguous(); };
  const auto one_type = [](const Norm& n) { return !n.weight || !n.bias || n.weight->dtype() == n.bias->dtype(); };
  return launches(w.qkv, o, input) && launches(w.out, o, input) && launches(w.up, o, input) &&
         launches(w.down, o, input) && whole(w.norm_1.weight) && whole(w.norm_1.bias) && whole(w.norm_2.weight) &&
         whole(w.norm_2.bias) && one_type(w.norm_1) && one_type(w.norm_2);
}

at::Tensor int8_transformer_launch_qkv(const at::Tensor& input, const Int8TransformerWeights& w,
                                       const Int8TransformerOptions& o, const Int8TransformerInputs& in) {
  const c10::cuda::CUDAGuard guard(input.device());
  const Launcher launch(input, o);
  const int64_t heads = o.heads + 2 * (o.kv_heads > 0 ? o.kv_heads : o.heads),
                size = w.qkv.weight.codes.size(0) / heads;
  at::Tensor qkv = at::empty({input.size(0), input.size(1), heads, size}, input.options());
  const int64_t workspace = launch.workspace(w.qkv);
  const bool given = !o.pre_norm && in.codes && in.codes->codes.is_contiguous() && in.codes->scale.is_contiguous();
  Arena arena((given ? 0 : bytes_of_rows(launch.rows(), launch.width())) + workspace, input);
  Rows rows{};
  if (given) {
    rows = {in.codes->codes.const_data_ptr<int8_t>(), in.codes->scale.const_data_ptr<float>()};
  } else {
    const MutableRows made = take_rows(arena, launch.rows(), launch.width());
    if (o.pre_norm)
      launch.norm(input.const_data_ptr(), nullptr, w.norm_1, w.qkv, nullptr, made);
    else
      launch.quantize(input.const_data_ptr(), w.qkv, made);
    rows = made;
  }
  launch.multiply(w.qkv, rows, qkv.mutable_data_ptr(), arena.take<void>(workspace));
  return qkv;
}

Int8TransformerResult int8_transformer_launch_output(const at::Tensor& input, const at::Tensor& attended,
                                                     const Int8TransformerWeights& w, const Int8TransformerOptions& o,
                                                     bool gives_codes) {
  const c10::cuda::CUDAGuard guard(input.device());
  const Launcher launch(input, o);
  const int64_t m = launch.rows(), width = launch.width(), mixed = w.out.weight.codes.size(1),
                up = w.up.weight.codes.size(0), hidden = w.down.weight.codes.size(1);
  const auto values = [](int64_t count) { return Arena::padded(count * 2); };
  const int64_t workspace = std::max({launch.workspace(w.out), launch.workspace(w.up), launch.workspace(w.down)});
  Arena arena(bytes_of_rows(m, mixed) + 2 * values(m * width) + bytes_of_rows(m, width) + values(m * up) +
                  bytes_of_rows(m, hidden) + Arena::padded(workspace) + (gives_codes ? 0 : bytes_of_rows(m, width)),
              input);
  void* const scratch = arena.take<void>(workspace);
  void* const branch = arena.take<void>(m * width * 2);
  void* const carried = arena.take<void>(m * width * 2);
  void* const grown = arena.take<void>(m * up * 2);
  const MutableRows of_attended = take_rows(arena, m, mixed), middle = take_rows(arena, m, width),
                    active = take_rows(arena, m, hidden);
  launch.quantize(attended.const_data_ptr(), w.out, of_attended);
  launch.multiply(w.out, of_attended, branch, scratch);
  launch.norm(input.const_data_ptr(), branch, o.pre_norm ? w.norm_2 : w.norm_1, w.up, carried, middle);
  launch.multiply(w.up, middle, grown, scratch);
  launch.activate(grown, up, w.down, active);
  Int8TransformerResult result{at::empty(input.sizes(), input.options()), std::nullopt};
  if (o.pre_norm) {
    launch.multiply(w.down, active, result.output.mutable_data_ptr(), scratch);
    launch.add(carried, result.output.mutable_data_ptr());
    return result;
  }
  launch.multiply(w.down, active, branch, scratch);
  MutableRows last{};
  if (gives_codes) {
    Int8Codes codes{at::empty(input.sizes(), input.options().dtype(at::kChar)),
                    at::empty({input.size(0), input.size(1), 1}, input.options().dtype(at::kFloat))};
    last = {codes.codes.mutable_data_ptr<int8_t>(), codes.scale.mutable_data_ptr<float>()};
    result.codes = std::move(codes);
  } else {
    last = take_rows(arena, m, width);
  }
  launch.norm(carried, branch, w.norm_2, w.qkv, result.output.mutable_data_ptr(), last);
  return result;
}

}  // namespace quantrain::detail
