// Where random operators take their Philox state from: PyTorch's generators, under torch.manual_seed's rules.
#pragma once

#include <ATen/core/Generator.h>
#include <c10/core/Device.h>

#include <optional>
#include <string_view>

#include "csrc/common/philox.h"

namespace quantrain {

// A state that no other call of this generator gets. CPU: the seed is 64 bits drawn from the generator, the offset 0.
// CUDA: the generator's own (seed, offset), moved on; under graph capture pointers that each replay refreshes.
PhiloxState next_philox_state(std::string_view op, const std::optional<at::Generator>& generator, c10::Device device);

// The state of a `.seeded` overload.
PhiloxState seeded_philox_state(int64_t seed, int64_t offset);

// How one call rounds.
struct Random {
  bool stochastic;
  PhiloxState philox;
};

// To nearest nothing is drawn.
Random draw(std::string_view op, c10::Device device, bool stochastic, const std::optional<at::Generator>& generator);
Random seeded(int64_t seed, int64_t offset);

}  // namespace quantrain
