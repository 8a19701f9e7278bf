// An emulation of a block of CUDA threads and of the instructions that the fixed-point convolutions and int8_mm use:
// tensor cores, matrix loads, asynchronous copies. It checks what a GPU would not say: copies outside the tensors,
// misaligned addresses, bank conflicts of matrix loads.
#pragma once

#include <cuda_runtime.h>
#include <ucontext.h>

#include <deque>
#include <functional>
#include <stdexcept>
#include <vector>

#define QUANTRAIN_EMULATED

namespace emulated {

constexpr int kMaxThreads = 512;
constexpr size_t kSharedBytes = 227 * 1024, kStackBytes = 1 << 18;

struct Copy {
  uint32_t to;
  const uint8_t* from;  // null: zeros
};

struct Thread {
  ucontext_t context{};
  std::vector<char> stack;
  bool done = false;
  int flag = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  // What the other threads of a warp read of this one.
  uint32_t address = 0, a[4] = {}, b[2] = {};
};

struct Range {
  const uint8_t *first, *end;
};

inline Thread threads[kMaxThreads];
inline ucontext_t scheduler;
inline int current = 0, running = 0;
inline std::function<void()> body;
inline std::vector<Range> readable;  // what may be copied from
inline long bank_conflicts = 0;
inline const char* fault = nullptr;

inline void expect(bool holds, const char* what) {
  if (!holds) fault = what;
}

// To the next thread. All threads of a block reach the same calls in the same order, so that each has gone by when a
// call returns.
inline void yield() { swapcontext(&threads[current].context, &scheduler); }

inline void enter() {
  body();
  threads[current].done = true;
  yield();
}

inline void run_block(int count, std::function<void()> kernel) {
  body = std::move(kernel);
  running = count;
  for (int t = 0; t < count; ++t) {
    Thread& thread = threads[t];
    thread.stack.resize(kStackBytes);
    thread.done = false;
    thread.open.clear();
    thread.groups.clear();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  for (int left = count; left > 0;) {
    for (int t = 0; t < count; ++t) {
      if (threads[t].done) continue;
      current = t;
      threadIdx.x = static_cast<unsigned>(t);
      swapcontext(&scheduler, &threads[t].context);
      left -= threads[t].done;
    }
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::yield(); }

inline int __syncthreads_and(int value) {
  emulated::threads[emulated::current].flag = value;
  emulated::yield();
  int all = 1;
  for (int t = 0; t < emulated::running; ++t) all &= emulated::threads[t].flag != 0;
  emulated::yield();
  return all;
}

namespace quantrain::cuda::conv {
alignas(1024) inline uint8_t shared_bytes[emulated::kSharedBytes];  // the kernels' extern array
}

// As csrc/cuda/ptx.cuh.
namespace quantrain::cuda::ptx {

using conv::shared_bytes;
using SharedAddress = uint32_t;

inline SharedAddress shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - shared_bytes);
}

inline uint8_t* dynamic_shared() { return shared_bytes; }

inline void cp_async_16(SharedAddress to, const void* from, int size = 16) {
  const bool inside = size == 16;
  const auto* const bytes = static_cast<const uint8_t*>(from);
  emulated::expect(to % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0, "a copy is not on 16 bytes");
  bool allowed = !inside;
  for (const auto& range : emulated::readable) allowed |= bytes >= range.first && bytes + 16 <= range.end;
  emulated::expect(allowed, "a copy reads outside the tensors");
  emulated::threads[emulated::current].open.push_back({to, inside && allowed ? bytes : nullptr});
}

inline void cp_async_commit_group() {
  auto& thread = emulated::threads[emulated::current];
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

template <int kPending>
void cp_async_wait_group() {
  auto& thread = emulated::threads[emulated::current];
  for (; static_cast<int>(thread.groups.size()) > kPending; thread.groups.pop_front())
    for (const auto& copy : thread.groups.front()) {
      if (copy.from)
        std::memcpy(shared_bytes + copy.to, copy.from, 16);
      else
        std::memset(shared_bytes + copy.to, 0, 16);
    }
}

inline void prefetch_global_l2(const void*) {}
inline int opaque(int value) { return value; }

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> i * 4 & 15;
    auto byte = static_cast<uint8_t>(bytes >> (digit & 7) * 8);
    if (digit & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= uint32_t{byte} << i * 8;
  }
  return result;
}

inline void ldmatrix_x4(uint32_t (&r)[4], SharedAddress from) {
  using emulated::threads;
  emulated::expect(from % 16 == 0, "a matrix row is not on 16 bytes");
  const int me = emulated::current, lane = me % 32, first = me - lane;
  threads[me].address = from;
  emulated::yield();
  for (int m = 0; m < 4; ++m)
    std::memcpy(&r[m], shared_bytes + threads[first + m * 8 + lane / 4].address + lane % 4 * 4, 4);
  for (int m = 0; lane == 0 && m < 4; ++m) {
    unsigned banks = 0;
    for (int i = 0; i < 8; ++i) banks |= 1u << (threads[first + m * 8 + i].address / 16 % 8);
    emulated::bank_conflicts += banks != 0xff;
  }
  emulated::yield();
}

// Fragments of m16n8k32 as the PTX ISA lays them out.
template <bool kSigned>
void mma_m16n8k32(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using emulated::threads;
  const int me = emulated::current, lane = me % 32, first = me - lane;
  std::memcpy(threads[me].a, a, sizeof a);
  threads[me].b[0] = b0;
  threads[me].b[1] = b1;
  emulated::yield();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 32; ++k) {
      const uint32_t a_word = threads[first + row % 8 * 4 + k % 16 / 4].a[row / 8 + k / 16 * 2];
      const uint32_t b_word = threads[first + column * 4 + k % 16 / 4].b[k / 16];
      const auto x = static_cast<uint8_t>(a_word >> k % 4 * 8);
      c[i] += (kSigned ? static_cast<int8_t>(x) : x) * static_cast<int8_t>(b_word >> k % 4 * 8);
    }
  }
  emulated::yield();
}

}  // namespace quantrain::cuda::ptx

namespace quantrain::cuda::conv {

using ptx::SharedAddress;

// ---- wgmma: descriptors keep the address in units of 16 bytes and the depth, which names the swizzle ----------------

template <int kDepth>
uint64_t operand_descriptor(SharedAddress address) {
  emulated::expect(address % 1024 == 0, "an operand is not on 1024 bytes");
  return address >> 4 | uint64_t{kDepth} << 40;
}

inline uint8_t operand_byte(uint64_t descriptor, int row, int k) {
  const auto depth = static_cast<uint32_t>(descriptor >> 40);
  const uint32_t at = (static_cast<uint32_t>(descriptor) << 4) + static_cast<uint32_t>(row) * depth + k;
  return shared_bytes[at ^ (at >> 7 & (depth == 128 ? 7 : 3)) << 4];
}

template <bool kInputSigned, int kN>
void multiply_group(int (&c)[kN][4], uint64_t a, uint64_t b, int accumulate) {
  const int lane = emulated::current % 32, warp = emulated::current / 32 % 4;
  for (int j = 0; j < kN; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + lane / 4 + i / 2 * 8, column = j * 8 + lane % 4 * 2 + i % 2;
      if (!accumulate) c[j][i] = 0;
      for (int k = 0; k < 32; ++k) {
        const uint8_t x = operand_byte(a, row, k);
        c[j][i] += (kInputSigned ? static_cast<int8_t>(x) : x) * static_cast<int8_t>(operand_byte(b, column, k));
      }
    }
  }
}

inline void begin_groups() {}
inline void commit_groups() {}
template <int kN>
void wait_groups(int (&)[kN][4]) {
  emulated::yield();
}
inline int warp_uniform(int value) { return value; }
inline void publish_copies() {}

}  // namespace quantrain::cuda::conv
