#include "ops/common/random.h"

#include <ATen/CPUGeneratorImpl.h>

#include <mutex>

#include "ops/common/check.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include <ATen/cuda/CUDAGeneratorImpl.h>
#endif

namespace quantrain {

PhiloxState next_philox_state(std::string_view op, const std::optional<at::Generator>& generator, c10::Device device) {
  QUANTRAIN_CHECK_TYPE(!generator || generator->device().type() == device.type(),
                       "{}: expected generator on {}, got {}", op, device.str(),
                       generator ? generator->device().str() : "none");
  PhiloxState state;
#if defined(QUANTRAIN_WITH_CUDA)
  if (device.is_cuda()) {
    constexpr uint64_t kIncrement = 4;  // the generator counts in fours
    auto* cuda_generator = at::get_generator_or_default<at::CUDAGeneratorImpl>(
        generator, at::cuda::detail::getDefaultCUDAGenerator(device.index()));
    const std::lock_guard<std::mutex> lock(cuda_generator->mutex_);
    const at::PhiloxCudaState cuda_state = cuda_generator->philox_cuda_state(kIncrement);
    if (cuda_state.captured_) {
      state.seed_pointer = cuda_state.seed_.ptr;
      state.offset_pointer = cuda_state.offset_.ptr;
      state.offset = cuda_state.offset_intragraph_;
    } else {
      state.seed = cuda_state.seed_.val;
      state.offset = cuda_state.offset_.val;
    }
    return state;
  }
#endif
  auto* cpu_generator =
      at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(cpu_generator->mutex_);
  state.seed = cpu_generator->random64();
  return state;
}

PhiloxState seeded_philox_state(int64_t seed, int64_t offset) {
  PhiloxState state;
  state.seed = static_cast<uint64_t>(seed);
  state.offset = static_cast<uint64_t>(offset);
  return state;
}

Random draw(std::string_view op, c10::Device device, bool stochastic, const std::optional<at::Generator>& generator) {
  return {stochastic, stochastic ? next_philox_state(op, generator, device) : PhiloxState{}};
}

Random seeded(int64_t seed, int64_t offset) { return {true, seeded_philox_state(seed, offset)}; }

}  // namespace quantrain
