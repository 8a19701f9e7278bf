#include "ops/four_bit_lora.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "quantrain/ops/four_bit.h"

// A packed weight with a low-rank update beside it. The derivative is in autograd/four_bit_lora.cpp.

namespace quantrain {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalGenerator = std::optional<at::Generator>;

namespace {

constexpr std::string_view kOp = "linear_4bit_lora";

}  // namespace

c10::SymInt check_linear_4bit_lora(const at::Tensor& input, const PackedWeight& weight, const OptionalTensor& bias,
                                   const Lora& lora, std::string_view method,
                                   const std::optional<c10::SymInt>& out_features) {
  const c10::SymInt n = check_linear_4bit(kOp, input, weight, bias, method, out_features);
  for (const auto& [name, tensor] : {std::pair<const char*, const at::Tensor&>{"lora_a", lora.a}, {"lora_b", lora.b}}) {
    detail::check_float(kOp, name, tensor.scalar_type());
    detail::check_device(kOp, name, tensor, input, "input's");
    detail::check_dense(kOp, name, tensor);
  }
  QUANTRAIN_CHECK_VALUE(
      lora.a.dim() == 2 && lora.b.dim() == 2 && TORCH_GUARD_OR_TRUE(lora.a.sym_size(1).sym_eq(input.sym_size(-1))) &&
          TORCH_GUARD_OR_TRUE(lora.b.sym_size(0).sym_eq(n)) &&
          TORCH_GUARD_OR_TRUE(lora.b.sym_size(1).sym_eq(lora.a.sym_size(0))),
      "{}: expected lora_a [r, {}] and lora_b [{}, r], got {} and {}", kOp, c10::str(input.sym_size(-1)), c10::str(n),
      detail::shape_text(lora.a), detail::shape_text(lora.b));
  QUANTRAIN_CHECK_VALUE(std::abs(lora.scaling) <= std::numeric_limits<float>::max(),
                        "{}: expected scaling within float32, got {}", kOp, lora.scaling);
  QUANTRAIN_CHECK_VALUE(lora.dropout >= 0 && lora.dropout < 1, "{}: expected dropout in [0, 1), got {}", kOp,
                        lora.dropout);
  return n;
}

at::Tensor dropped_out(const at::Tensor& x, const at::Tensor& state, double p) {
  static const auto op = find_operator<at::Tensor(const at::Tensor&, const at::Tensor&, double)>("_dropout");
  return state.defined() ? op.call(x, state, p) : x;
}

LoraForward linear_4bit_lora_forward(const at::Tensor& input, const PackedWeight& w, const OptionalTensor& bias,
                                     const Lora& lora, std::string_view method,
                                     const std::optional<c10::SymInt>& out_features, const DropoutDraw& draw) {
  static const auto linear = find_operator<Linear4bitSignature>("linear_4bit");
  static const auto drawn = find_operator<at::Tensor(const at::Tensor&, const OptionalGenerator&)>("_dropout_state");
  static const auto given = find_operator<at::Tensor(const at::Tensor&, int64_t, int64_t)>("_dropout_state", "seeded");
  const at::ScalarType type = input.scalar_type();
  LoraForward result;
  if (lora.dropout > 0)
    result.state =
        draw.seeded ? given.call(input, draw.seeded->first, draw.seeded->second) : drawn.call(input, draw.generator);
  result.u = at::linear(dropped_out(matrix(input), result.state, lora.dropout), in_type(lora.a, type));
  const at::Tensor y = linear.call(input, w.codes, w.scale, w.zero_point, bias, w.scale_scale, w.scale_offset, w.format,
                                   w.table, method, out_features);
  matrix(y).addmm_(result.u, in_type(lora.b, type).t(), 1, lora.scaling);
  result.output = y;
  return result;
}

namespace {

using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                             const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const at::Tensor&,
                             const at::Tensor&, double, double, std::string_view, const OptionalTensor&,
                             std::string_view, std::optional<c10::SymInt>, const OptionalGenerator&);

at::Tensor lora_kernel(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                       const OptionalTensor& zero_point, const OptionalTensor& bias, const OptionalTensor& scale_scale,
                       const OptionalTensor& scale_offset, const at::Tensor& lora_a, const at::Tensor& lora_b,
                       double scaling, double dropout, std::string_view format, const OptionalTensor& table,
                       std::string_view method, std::optional<c10::SymInt> out_features,
                       const OptionalGenerator& generator) {
  const PackedWeight weight{codes, scale, zero_point, scale_scale, scale_offset, format, table};
  const Lora lora{lora_a, lora_b, scaling, dropout};
  check_linear_4bit_lora(input, weight, bias, lora, method, out_features);
  return linear_4bit_lora_forward(input, weight, bias, lora, method, out_features, {generator, std::nullopt}).output;
}

at::Tensor lora_seeded_kernel(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                              const OptionalTensor& zero_point, const OptionalTensor& bias,
                              const OptionalTensor& scale_scale, const OptionalTensor& scale_offset,
                              const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling, double dropout,
                              std::string_view format, const OptionalTensor& table, std::string_view method,
                              std::optional<c10::SymInt> out_features, int64_t seed, int64_t offset) {
  const PackedWeight weight{codes, scale, zero_point, scale_scale, scale_offset, format, table};
  const Lora lora{lora_a, lora_b, scaling, dropout};
  check_linear_4bit_lora(input, weight, bias, lora, method, out_features);
  const DropoutDraw draw{std::nullopt, std::pair(seed, offset)};
  return linear_4bit_lora_forward(input, weight, bias, lora, method, out_features, draw).output;
}

template <c10::DeviceType kDevice>
at::Tensor lora_autocast(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                         const OptionalTensor& zero_point, const OptionalTensor& bias,
                         const OptionalTensor& scale_scale, const OptionalTensor& scale_offset,
                         const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling, double dropout,
                         std::string_view format, const OptionalTensor& table, std::string_view method,
                         std::optional<c10::SymInt> out_features, const OptionalGenerator& generator) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  static const auto op = find_operator<Signature>(kOp);
  const at::Tensor cast = at::autocast::cached_cast(at::autocast::get_autocast_dtype(kDevice), input, kDevice);
  return op.call(cast, codes, scale, zero_point, bias, scale_scale, scale_offset, lora_a, lora_b, scaling, dropout,
                 format, table, method, std::move(out_features), generator);
}

}  // namespace

at::Tensor linear_4bit_lora(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                            const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling, double dropout,
                            const OptionalTensor& bias, std::string_view format, const FourBitExtras& extras,
                            std::string_view method, std::optional<int64_t> out_features,
                            const OptionalGenerator& generator) {
  static const auto op = find_operator<Signature>(kOp);
  const auto n = out_features ? std::optional<c10::SymInt>(*out_features) : std::nullopt;
  return op.call(input, codes, scale, extras.zero_point, bias, extras.scale_scale, extras.scale_offset, lora_a, lora_b,
                 scaling, dropout, format, extras.table, method, n, generator);
}

}  // namespace quantrain

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def(
      "linear_4bit_lora(Tensor input, Tensor codes, Tensor scale, Tensor? zero_point=None, Tensor? bias=None, Tensor? "
      "scale_scale=None, Tensor? scale_offset=None, *, Tensor lora_a, Tensor lora_b, float scaling, float dropout=0.0, "
      "str format=\"nf4\", Tensor? table=None, str method=\"auto\", SymInt? out_features=None, Generator? "
      "generator=None) -> Tensor",
      {at::Tag::nondeterministic_seeded});
  m.def(
      "linear_4bit_lora.seeded(Tensor input, Tensor codes, Tensor scale, Tensor? zero_point=None, Tensor? bias=None, "
      "Tensor? scale_scale=None, Tensor? scale_offset=None, *, Tensor lora_a, Tensor lora_b, float scaling, float "
      "dropout=0.0, str format=\"nf4\", Tensor? table=None, str method=\"auto\", SymInt? out_features=None, int seed, "
      "int offset) -> Tensor");
}

TORCH_LIBRARY_IMPL(quantrain, CompositeExplicitAutograd, m) {
  m.impl("linear_4bit_lora", &quantrain::lora_kernel);
  m.impl("linear_4bit_lora.seeded", &quantrain::lora_seeded_kernel);
}
TORCH_LIBRARY_IMPL(quantrain, AutocastCPU, m) { m.impl("linear_4bit_lora", &quantrain::lora_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(quantrain, AutocastCUDA, m) { m.impl("linear_4bit_lora", &quantrain::lora_autocast<at::kCUDA>); }
