#include "ops/int8_mm_cpu.h"

#include <ATen/ops/_int_mm.h>
#include <ATen/ops/empty.h>

#include <array>
#include <cstdlib>
#include <optional>
#include <string_view>

#include "csrc/cpu/int8_mm.h"
#include "ops/common/check.h"
#include "ops/common/parallel.h"

namespace quantrain {
namespace {

using cpu::Int8Isa;

struct NamedIsa {
  std::string_view name;
  Int8Isa isa;
};

constexpr std::array<NamedIsa, 5> kNames{{{"plain", Int8Isa::kPlain},
                                          {"avx2", Int8Isa::kAvx2},
                                          {"avx512", Int8Isa::kAvx512},
                                          {"avx_vnni", Int8Isa::kAvxVnni},
                                          {"avx512_vnni", Int8Isa::kAvx512Vnni}}};

std::string_view int8_path_name() {
  const char* variable = std::getenv("QUANTRAIN_CPU_INT8");
  return variable ? variable : "";
}

// AMX multiplies sixteen times as many bytes per instruction as VNNI; oneDNN has the kernels.
bool has_amx() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool amx = __builtin_cpu_supports("amx-int8");
  return amx;
#else
  return false;
#endif
}

// Rows of a below which packing b costs more than it brings: oneDNN takes a third of the time for one row, about the
// same for eight (Cascade Lake).
constexpr int64_t kFewRows = 8;

// None: oneDNN, whose own kernels need VNNI or AMX.
std::optional<Int8Isa> chosen_path(int64_t m) {
  const std::string_view name = int8_path_name();
  if (name == "onednn") return std::nullopt;
  if (!name.empty()) return named_int8_isa("int8_mm");
  const Int8Isa best = cpu::best_int8_isa();
  if (has_amx() || (m < kFewRows && best == Int8Isa::kAvx512Vnni)) return std::nullopt;
  return best;
}

// Where nothing says otherwise and oneDNN is not the better one.
bool reads_as_it_lies(int64_t m) {
  return m <= cpu::kInt8FewRows && int8_path_name().empty() && cpu::has_int8_few_rows() &&
         cpu::best_int8_isa() != Int8Isa::kAvx512Vnni && !has_amx();
}

void multiply(const Int8MmArgs& args, Int8Isa isa) {
  const cpu::Int8MmPlan plan = cpu::plan_int8_mm(args, isa);
  const int64_t a_words = (plan.a_words() + 15) / 16 * 16, b_words = (plan.b_words() + 15) / 16 * 16;
  const at::Tensor words = at::empty({a_words + b_words + plan.a_panels * plan.a_rows}, at::kInt);  // 64-byte boundary
  auto* const first = static_cast<uint32_t*>(words.data_ptr());
  const cpu::Int8MmPacked packed{first, first + a_words, reinterpret_cast<int32_t*>(first + a_words + b_words)};
  parallel_for(plan.a_panels, grain_of(plan.a_rows * args.k),
               [&](int64_t begin, int64_t end) { cpu::pack_int8_a(args, plan, packed, begin, end); });
  parallel_for(plan.b_panels, grain_of(plan.b_rows * args.k),
               [&](int64_t begin, int64_t end) { cpu::pack_int8_b(args, plan, packed, begin, end); });
  parallel_for(plan.tasks, 1, [&](int64_t begin, int64_t end) { cpu::int8_mm(args, plan, packed, begin, end); });
}

}  // namespace

cpu::Int8Isa named_int8_isa(std::string_view op) {
  const std::string_view name = int8_path_name();
  if (name.empty() || name == "onednn") return cpu::best_int8_isa();
  for (const NamedIsa& named : kNames)
    if (named.name == name && cpu::int8_isa_supported(named.isa)) return named.isa;
  QUANTRAIN_CHECK_VALUE(false, "{}: expected QUANTRAIN_CPU_INT8 to name a path that this processor has, got {}", op,
                        name);
  return Int8Isa::kPlain;
}

void int8_mm_cpu(const at::Tensor& a, const at::Tensor& b, const Int8MmArgs& args) {
  if (args.m == 0 || args.n == 0) return;
  if (reads_as_it_lies(args.m)) {
    const at::Tensor sums = at::empty({args.m, args.n}, at::kInt);
    auto* const first = sums.mutable_data_ptr<int32_t>();
    parallel_for(args.n, grain_of(args.m * args.k),
                 [&](int64_t begin, int64_t end) { cpu::int8_few_rows_sums(args, first, begin, end); });
    return cpu::dequantize_sums(args, first, 0, args.m);
  }
  // torch._int_mm of 2.11 is wrong for k = 1 on the CPU.
  if (const std::optional<Int8Isa> isa = chosen_path(args.m); isa || args.k < 2)
    return multiply(args, isa.value_or(Int8Isa::kPlain));
  // Both with the strides of their shapes: a dimension of size 1 may have any, which _int_mm hands on as a leading
  // dimension.
  const at::Tensor x = a.as_strided({args.m, args.k}, {args.k, 1}), y = b.as_strided({args.k, args.n}, {1, args.k});
  const at::Tensor sums = at::_int_mm(x, y);
  parallel_for(args.m, grain_of(args.n), [&](int64_t begin, int64_t end) {
    cpu::dequantize_sums(args, sums.const_data_ptr<int32_t>(), begin, end);
  });
}

}  // namespace quantrain
