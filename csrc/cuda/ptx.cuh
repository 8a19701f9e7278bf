// Instructions that CUDA C++ has no name for, one function each, named as in the PTX manual. tests/cpp/emulated has its
// own of those that the fixed-point convolutions use.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if !defined(QUANTRAIN_EMULATED)
namespace quantrain::cuda::ptx {

// min.NaN, max.NaN: NaN wins.
__device__ __forceinline__ float min_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// What a kernel was launched with.
__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ __align__(1024) uint8_t dynamic_shared_bytes[];
  return dynamic_shared_bytes;
}

// 16 bytes from global to shared memory, past the registers and the first-level cache.
__device__ __forceinline__ void cp_async_16(SharedAddress to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// The same where `bytes` is 16; zeros, and `from` is not read, where it is 0.
__device__ __forceinline__ void cp_async_16(SharedAddress to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// 4 or 8 bytes, through the first-level cache.
__device__ __forceinline__ void cp_async_4(SharedAddress to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void cp_async_8(SharedAddress to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void prefetch_global_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory");
}

// As __byte_perm, which knows no signs: bit 3 of a selector's digit repeats the sign of its byte.
__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

// Four 8 x 8 matrices of 16-bit elements: here 16 rows of 32 bytes.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], SharedAddress from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from));
}

// c += a b over 32 bytes of depth: a [16, 32] int8 or uint8, b [32, 8] int8.
template <bool kSigned>
__device__ __forceinline__ void mma_m16n8k32(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define QUANTRAIN_MMA(type)                                                                                         \
  asm("mma.sync.aligned.m16n8k32.row.col.s32." type ".s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (kSigned)
    QUANTRAIN_MMA("s8");
  else
    QUANTRAIN_MMA("u8");
#undef QUANTRAIN_MMA
}

// c += a b: a [16, 16], b [16, 8] of 16-bit floats, two to a register.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What a kernel that was launched to overlap the one before it reads or writes comes after the first: that one has
// ended, and its writes are seen. The second lets the next kernel of that kind start.
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Of kernels that launch_overlapping starts: their first statement.
__device__ __forceinline__ void begin_overlapping() {
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
}

// Where `valid`, through the cache of constant data. Written so that nothing waits for the value before it is used,
// which a branch around the load may do.
__device__ __forceinline__ void ld_global_nc(uint32_t& value, const void* from, bool valid) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %2, 0;\n"
      "@p ld.global.nc.b32 %0, [%1]; }"
      : "+r"(value)
      : "l"(from), "r"(static_cast<int>(valid)));
}

__device__ __forceinline__ void ld_global_nc(uint32_t (&value)[4], const void* from, bool valid) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %5, 0;\n"
      "@p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(value[0]), "+r"(value[1]), "+r"(value[2]), "+r"(value[3])
      : "l"(from), "r"(static_cast<int>(valid)));
}

// The rest of this kind is Hopper's.

// The place of this thread block's shared memory address in that of a thread block of its cluster.
__device__ __forceinline__ uint32_t mapa(SharedAddress address, int rank) {
  uint32_t result;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
  return result;
}

// Writes to the shared memory of a thread block of the cluster, and counts the bytes on a barrier of that thread block.
__device__ __forceinline__ void st_async(uint32_t to, float value, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(value),
               "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void st_async_4(uint32_t to, float a, float b, float c, float d, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "f"(a), "f"(b), "f"(c), "f"(d), "r"(barrier)
               : "memory");
}

// An 8 x 8 matrix of 16-bit elements, a fragment, is stored transposed: lane i of the first eight has the address of
// row i.
__device__ __forceinline__ void stmatrix_trans(SharedAddress to, uint32_t value) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(to), "r"(value) : "memory");
}

__device__ __forceinline__ void mbarrier_init(SharedAddress barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Initialized barriers are seen by other thread blocks and by asynchronous copies, after the next barrier.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and that many bytes more are to come in this phase.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(SharedAddress barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of that parity is over.
__device__ __forceinline__ void mbarrier_wait(SharedAddress barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "QUANTRAIN_AGAIN_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra QUANTRAIN_AGAIN_%=; }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A box of the matrix that `map` describes, from that column and row on; its bytes count on the barrier.
__device__ __forceinline__ void cp_async_bulk_tensor_2d(SharedAddress to, const void* map, int column, int row,
                                                        SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// Bytes, a multiple of 16, from and to places on 16 bytes.
__device__ __forceinline__ void cp_async_bulk(SharedAddress to, const void* from, uint32_t bytes,
                                              SharedAddress barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void prefetch_tensormap(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Writes before the first are seen after the second, by all threads of the cluster.
__device__ __forceinline__ void barrier_cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void barrier_cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The value, of which the compiler knows nothing: what follows from it is computed again instead of kept in registers.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

template <typename T>
__device__ __forceinline__ T* opaque(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

}  // namespace quantrain::cuda::ptx
#endif
