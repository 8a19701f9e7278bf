// Shares a range among PyTorch's own threads. Through libtorch's C entry point: at::parallel_for is a header that would
// need OpenMP here, and a second OpenMP runtime in the process would compete with PyTorch's for the cores.
#pragma once

#include <c10/util/Exception.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdint>

namespace quantrain {

// Below it a second thread costs more than it brings.
constexpr int64_t kGrainElements = 32768;
constexpr int64_t kGrainBytes = 65536;

// Tasks that are worth a thread, where one goes through so many elements (or bytes).
inline int64_t grain_of(int64_t a_task, int64_t grain = kGrainElements) {
  return std::max<int64_t>(grain / std::max<int64_t>(a_task, 1), 1);
}

// Calls f(begin, end) for pieces of [0, size), at least `grain` each. f must not throw.
template <typename F>
void parallel_for(int64_t size, int64_t grain, const F& f) {
  if (size <= 0) return;
  if (size <= grain) return f(int64_t{0}, size);
  const auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  const auto error = torch_parallel_for(0, size, grain, call, const_cast<void*>(static_cast<const void*>(&f)));
  TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "quantrain: expected PyTorch's parallel_for to succeed, got error ", error);
}

// The same over elements: pieces begin at multiples of kElementBlock, so that no two threads share a byte of a bit
// mask.
constexpr int64_t kElementBlock = 4096;

template <typename F>
void parallel_for_elements(int64_t numel, const F& f) {
  parallel_for((numel + kElementBlock - 1) / kElementBlock, grain_of(kElementBlock),
               [&](int64_t begin, int64_t end) { f(begin * kElementBlock, std::min(end * kElementBlock, numel)); });
}

}  // namespace quantrain
