// What tests of emulated kernels share: memory, random numbers, and grids of blocks, which run one after the other.
#pragma once

#include "instructions.h"

#include <algorithm>
#include <cstdlib>
#include <random>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

namespace emulated {

inline std::mt19937 generator(1);

inline int random_int(int low, int high) {
  return low + static_cast<int>(generator() % static_cast<unsigned>(high - low + 1));
}

// Memory whose end the address sanitizer guards, where it is on.
template <typename T>
struct Buffer {
  T* data;
  size_t size, bytes;

  explicit Buffer(size_t size) : size(size), bytes((size * sizeof(T) + 64 + 255) / 256 * 256) {
    data = static_cast<T*>(std::aligned_alloc(256, bytes));
    std::memset(static_cast<void*>(data), 0xcc, bytes);
    ASAN_POISON_MEMORY_REGION(data + size, bytes - size * sizeof(T));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    ASAN_UNPOISON_MEMORY_REGION(data, bytes);
    std::free(data);
  }

  Range range() const {
    const auto* const first = reinterpret_cast<const uint8_t*>(data);
    return {first, first + size * sizeof(T)};
  }
  bool end_is_untouched() const {
    ASAN_UNPOISON_MEMORY_REGION(data, bytes);
    const auto* const first = reinterpret_cast<const uint8_t*>(data);
    return std::all_of(first + size * sizeof(T), first + bytes, [](uint8_t byte) { return byte == 0xcc; });
  }
};

inline void run_blocks(unsigned columns, unsigned rows, int threads, const std::function<void()>& kernel) {
  gridDim = {columns, rows};
  for (unsigned y = 0; y < rows; ++y) {
    for (unsigned x = 0; x < columns; ++x) {
      std::memset(quantrain::cuda::conv::shared_bytes, 0xa5, kSharedBytes);
      blockIdx = {x, y};
      run_block(threads, kernel);
    }
  }
}

}  // namespace emulated
