#include "ops/int8_auto.h"

#include <algorithm>
#include <atomic>
#include <limits>

#if defined(QUANTRAIN_WITH_CUDA)
#include <c10/cuda/CUDAGuard.h>

#include "csrc/cuda/int8.h"
#endif

namespace quantrain {
namespace {

// ---- what a GPU does in a microsecond -------------------------------------------------------------------------------

struct Machine {
  double int8;         // operations of int8_mm, 10^6 per second, in its main loop
  double half;         // of a float16 or bfloat16 product
  double single;       // of a float32 one
  double bytes;        // read or written
  double kernel;       // what a kernel costs beside that, in microseconds
  int64_t processors;  // streaming multiprocessors
};

// Fitted to 54 layers' products and passes on an H200 (benchmarks/results/int8-grid-h200-2026-11-23.csv): of the eight
// combinations the model takes the best or one within 1 %, and none that is slower than bfloat16. The kernels for sm_80
// are modelled on an A100, not measured.
constexpr Machine kHopper{1.61e9, 0.78e9, 0.05e9, 3.88e6, 4.3, 132};
constexpr Machine kAmpere{0.42e9, 0.24e9, 0.018e9, 1.5e6, 4.3, 108};
constexpr double kInt8Result = 0.85;  // share of a result's bytes that its sum does not hide
constexpr double kFloatResult = 0.74;
constexpr double kRandomRows = 1.6;  // stochastic rounding against rounding to nearest, and the factors
constexpr double kRandomColumns = 1.95;
constexpr double kWorthwhile =
    0.93;  // of the time without more int8: less is lost again to the host, which launches more kernels
constexpr double kLeastBusy = 0.91;  // what shared sums and narrower tiles make of a last wave

constexpr int64_t kTile = 128;

// The share of the machine that works on a product of 128 x 128 tiles.
double busy(const Machine& machine, int64_t m, int64_t n) {
  const int64_t tiles = std::max<int64_t>((m + kTile - 1) / kTile * ((n + kTile - 1) / kTile), 1);
  const int64_t waves = (tiles + machine.processors - 1) / machine.processors;
  const int64_t at_work = tiles < machine.processors ? machine.processors / tiles * tiles : tiles;
  return std::max(static_cast<double>(at_work) / static_cast<double>(waves * machine.processors), kLeastBusy);
}

double product(const Machine& machine, bool in_int8, double floating, int64_t m, int64_t n, int64_t k,
               int64_t result_bytes) {
  const double size = static_cast<double>(m) * static_cast<double>(n);
  const double rate = in_int8 ? machine.int8 : floating, shown = in_int8 ? kInt8Result : kFloatResult;
  return 2.0 * size * static_cast<double>(k) / (rate * busy(machine, m, n)) +
         shown * size * static_cast<double>(result_bytes) / machine.bytes + machine.kernel;
}

double passes(const Machine& machine, int64_t rows, int64_t columns, double bytes, int kernels) {
  return static_cast<double>(rows) * static_cast<double>(columns) * bytes / machine.bytes + kernels * machine.kernel;
}

// Microseconds of a forward and backward pass with these products in int8; products that nobody needs cost nothing.
double modelled_time(const Machine& machine, const Int8LinearShape& s, const Int8Products<bool>& int8,
                     const Int8Products<bool>& needed) {
  const int64_t x_bytes = static_cast<int64_t>(c10::elementSize(s.input_type));
  const int64_t w_bytes = static_cast<int64_t>(c10::elementSize(s.weight_type));
  const double floating = s.input_type == at::kFloat ? machine.single : machine.half;
  double time = 0.0;
  if (int8.output || int8.grad_weight) time += passes(machine, s.tokens, s.in, x_bytes + 1.0, 1);
  if (int8.output || int8.grad_input) time += passes(machine, s.out, s.in, w_bytes + 1.0, 1);
  if (needed.output) time += product(machine, int8.output, floating, s.tokens, s.out, s.in, x_bytes);
  if (needed.grad_input) {
    time += product(machine, int8.grad_input, floating, s.tokens, s.in, s.out, x_bytes);
    if (int8.grad_input) {
      time += passes(machine, s.out, s.in, w_bytes + 1.0, 2);
      time += passes(machine, s.tokens, s.out, kRandomRows * (static_cast<double>(x_bytes) + 1.0), 1);
    }
  }
  if (needed.grad_weight) {
    time += product(machine, int8.grad_weight, floating, s.out, s.in, s.tokens, w_bytes);
    if (int8.grad_weight) {
      time += passes(machine, s.tokens, s.in, 2.0, 1);
      time += passes(machine, s.tokens, s.out, kRandomColumns * (static_cast<double>(x_bytes) + 1.0), 1);
      // The reading for the columns' magnitudes, which else finds those of rows too.
      if (!int8.grad_input) time += passes(machine, s.tokens, s.out, 0.9 * static_cast<double>(x_bytes), 1);
    }
  }
  return time;
}

// 10 * major + minor; 0 without a GPU.
int compute_capability([[maybe_unused]] const c10::Device& device) {
#if defined(QUANTRAIN_WITH_CUDA)
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices] = {};
  const int index = device.has_index() ? device.index() : c10::cuda::current_device();
  if (index < kDevices && known[index].load(std::memory_order_relaxed) != 0) return known[index].load();
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(index));
  const int capability = cuda::compute_capability();
  if (index < kDevices) known[index].store(capability);
  return capability;
#else
  return 0;
#endif
}

}  // namespace

int64_t int8_token_bucket(const c10::SymInt& tokens) {
  constexpr int kLargest = 24;
  if (const auto known = tokens.maybe_as_int()) {
    int64_t bucket = 1;
    while (bucket * 2 <= *known && bucket < int64_t{1} << kLargest) bucket *= 2;
    return *known < 1 ? 0 : bucket;
  }
  int low = -1, high = kLargest + 1;  // 2^low <= tokens < 2^high
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (TORCH_GUARD_OR_FALSE(tokens.sym_ge(int64_t{1} << middle)) ? low : high) = middle;
  }
  return low < 0 ? 0 : int64_t{1} << low;
}

Int8Products<bool> choose_int8(const Int8LinearShape& shape, const c10::Device& device,
                               const Int8Products<Int8Mode>& asked) {
  const auto is = [&](Int8Mode mode) {
    return Int8Products<bool>{asked.output == mode, asked.grad_input == mode, asked.grad_weight == mode};
  };
  const Int8Products<bool> fixed = is(Int8Mode::kInt8), open = is(Int8Mode::kAuto);
  if (!open.output && !open.grad_input && !open.grad_weight) return fixed;
  if (!device.is_cuda()) {
    return {fixed.output || open.output, fixed.grad_input || open.grad_input, fixed.grad_weight || open.grad_weight};
  }
  const int capability = compute_capability(device);
  if (capability < 80) return fixed;
  const Machine& machine = capability >= 90 ? kHopper : kAmpere;
  const Int8Products<bool> needed{true, fixed.grad_input || open.grad_input, fixed.grad_weight || open.grad_weight};
  Int8Products<bool> best = fixed;
  double least = std::numeric_limits<double>::infinity(), floating = 0.0;
  for (const int combination : {0, 1, 2, 3, 4, 5, 6, 7}) {
    const Int8Products<bool> chosen{(combination & 1) != 0, (combination & 2) != 0, (combination & 4) != 0};
    if ((chosen.output && !open.output) || (chosen.grad_input && !open.grad_input) ||
        (chosen.grad_weight && !open.grad_weight))
      continue;
    const Int8Products<bool> all{fixed.output || chosen.output, fixed.grad_input || chosen.grad_input,
                                 fixed.grad_weight || chosen.grad_weight};
    const double time = modelled_time(machine, shape, all, needed);
    if (combination == 0) floating = kWorthwhile * time;
    if (time < least) {
      least = time;
      best = all;
    }
  }
  return least < floating ? best : fixed;
}

}  // namespace quantrain
