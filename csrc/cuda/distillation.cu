#include "csrc/cuda/distillation.h"

#include "csrc/cuda/common.cuh"
#include "csrc/cuda/joins.cuh"

// A row's threads read it once, sixteen bytes at a time from where student and teacher are both aligned, and keep a
// running softmax each (Milakov and Gimelshein, arXiv:1805.02867), joined at the end. Compiled with --fmad=false.

namespace quantrain::cuda {
namespace {

constexpr int kItem = 8;  // elements of a step
constexpr int kShortColumns = 512, kLongColumns = 8192;
constexpr int kShortRows = 8;      // of a block, a warp each
constexpr int kThreads = 128;      // of a row between
constexpr int kLongThreads = 512;  // of a long one

// ---- a row's elements -----------------------------------------------------------------------------------------------

// A student's row and a teacher's in steps: single elements up to the first that is aligned in both, whole items, and
// single elements again.
template <typename S, typename T>
struct RowPair {
  const S* __restrict__ s;
  const T* __restrict__ t;
  int64_t columns;
  int head;
  int64_t items;

  __device__ __forceinline__ RowPair(const DistillationArgs& a, int64_t row, const void* also = nullptr)
      : s(static_cast<const S*>(a.student) + a.student_places.of(row)),
        t(static_cast<const T*>(a.teacher) + a.teacher_places.of(row)),
        columns(a.columns) {
    const auto at = reinterpret_cast<uintptr_t>(s);
    const int64_t first = static_cast<int64_t>((kVectorBytes - at % kVectorBytes) % kVectorBytes / sizeof(S));
    const bool both = reinterpret_cast<uintptr_t>(t + first) % kVectorBytes == 0 &&
                      (!also || reinterpret_cast<uintptr_t>(static_cast<const S*>(also) + first) % kVectorBytes == 0);
    const bool whole = both && first < columns;
    head = whole ? static_cast<int>(first) : 0;
    items = whole ? (columns - first) / kItem : 0;
  }

  // Calls f(first column, x, y) with kItem values of each, or with one.
  template <typename F>
  __device__ __forceinline__ void for_each(const F& f) const {
    for (int64_t item = threadIdx.x; item < items; item += blockDim.x) {
      float x[kItem], y[kItem];
      unpack(reinterpret_cast<const Pack<S, kItem>*>(s + head)[item], x);
      unpack(reinterpret_cast<const Pack<T, kItem>*>(t + head)[item], y);
      f(head + item * kItem, x, y);
    }
    const int64_t after = head + items * kItem, singles = columns - items * kItem;
    for (int64_t i = threadIdx.x; i < singles; i += blockDim.x) {
      const int64_t column = i < head ? i : after + (i - head);
      float x[1] = {to_float(s[column])}, y[1] = {to_float(t[column])};
      f(column, x, y);
    }
  }
};

// The same of a student alone.
template <typename S>
struct StudentRow {
  RowPair<S, S> pair;

  __device__ __forceinline__ StudentRow(const DistillationArgs& a, int64_t row, const void* also = nullptr)
      : pair(of_student(a), row, also) {}

  static __device__ __forceinline__ DistillationArgs of_student(DistillationArgs a) {
    a.teacher = a.student;
    a.teacher_places = a.student_places;
    return a;
  }

  template <typename F>
  __device__ __forceinline__ void for_each(const F& f) const {
    for (int64_t item = threadIdx.x; item < pair.items; item += blockDim.x) {
      float x[kItem];
      unpack(reinterpret_cast<const Pack<S, kItem>*>(pair.s + pair.head)[item], x);
      f(pair.head + item * kItem, x);
    }
    const int64_t after = pair.head + pair.items * kItem, singles = pair.columns - pair.items * kItem;
    for (int64_t i = threadIdx.x; i < singles; i += blockDim.x) {
      const int64_t column = i < pair.head ? i : after + (i - pair.head);
      float x[1] = {to_float(pair.s[column])};
      f(column, x);
    }
  }
};

// Writes of the gradient, a step at a time.
template <typename S, int kCount>
__device__ __forceinline__ void store_step(S* row, int64_t column, const float (&values)[kCount]) {
  if constexpr (kCount == 1)
    row[column] = from_float<S>(values[0]);
  else
    *reinterpret_cast<Pack<S, kCount>*>(row + column) = pack<S, kCount>(values);
}

// ---- joins over a row's threads -------------------------------------------------------------------------------------

// A row has blockDim.x threads: a warp, or whole warps and then the block to itself.
template <typename Value, typename Join>
__device__ __forceinline__ Value joined(Value value, const Join& join) {
  for (int offset = 16; offset > 0; offset /= 2) value = join(value, value.from_lane(offset));
  if (blockDim.x == 32) return value;
  __shared__ Value of_warp[32];
  __syncthreads();  // what was joined before may still be read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  value = of_warp[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x / 32); ++warp) value = join(value, of_warp[warp]);
  return value;
}

__device__ __forceinline__ float lane_value(float value, int offset) {
  return __shfl_xor_sync(0xffffffffu, value, offset);
}

// 0 in place of the largest of no number, -inf: the sum of what is relative to it is 0 then.
__device__ __forceinline__ float shift_of(float most) { return most == -HUGE_VALF ? 0.0f : most; }

template <int kCount>
__device__ __forceinline__ float largest_of(const float (&values)[kCount], float most) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) most = fmaxf(most, values[j]);  // NaN is passed over: the sum sees it
  return most;
}

// The largest value so far, and the sum of 2^((value - most) factor).
struct Running {
  float most = -HUGE_VALF;
  float sum = 0.0f;

  __device__ __forceinline__ Running from_lane(int offset) const {
    return {lane_value(most, offset), lane_value(sum, offset)};
  }

  __device__ __forceinline__ float raise(float next, float factor) {
    const float share = next == most ? 1.0f : exponential2((most - next) * factor);
    sum *= share;
    most = next;
    return share;
  }
};

struct JoinRunning {
  float factor;

  __device__ __forceinline__ Running operator()(Running a, Running b) const {
    const float most = fmaxf(a.most, b.most);
    a.raise(most, factor);
    b.raise(most, factor);
    return {most, a.sum + b.sum};
  }
};

// Two softmaxes at once, and in the teacher's weights the sum of (t - most t) - (s - most s).
struct RunningPair {
  Running student;
  Running teacher;
  float gap = 0.0f;

  __device__ __forceinline__ RunningPair from_lane(int offset) const {
    return {student.from_lane(offset), teacher.from_lane(offset), lane_value(gap, offset)};
  }

  __device__ __forceinline__ void raise(float next_student, float next_teacher, float factor) {
    const float by =
        (shift_of(next_teacher) - shift_of(teacher.most)) - (shift_of(next_student) - shift_of(student.most));
    if (by != 0.0f) gap -= teacher.sum * by;
    student.raise(next_student, factor);
    gap *= teacher.raise(next_teacher, factor);
  }
};

struct JoinPairs {
  float factor;

  __device__ __forceinline__ RunningPair operator()(RunningPair a, RunningPair b) const {
    const float student = fmaxf(a.student.most, b.student.most), teacher = fmaxf(a.teacher.most, b.teacher.most);
    a.raise(student, teacher, factor);
    b.raise(student, teacher, factor);
    return {{student, a.student.sum + b.student.sum}, {teacher, a.teacher.sum + b.teacher.sum}, a.gap + b.gap};
  }
};

struct Sums {
  float a, b, c;

  __device__ __forceinline__ Sums from_lane(int offset) const {
    return {lane_value(a, offset), lane_value(b, offset), lane_value(c, offset)};
  }
};

struct JoinSums {
  __device__ __forceinline__ Sums operator()(const Sums& x, const Sums& y) const {
    return {x.a + y.a, x.b + y.b, x.c + y.c};
  }
};

// ---- forward --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void put(const DistillationArgs& a, int64_t row, float loss, float first = 0.0f,
                                    float second = 0.0f, float third = 0.0f, float fourth = 0.0f) {
  if (threadIdx.x != 0) return;
  a.loss[row] = loss;
  reinterpret_cast<float4*>(a.moments)[row] = make_float4(first, second, third, fourth);
}

template <typename S, typename T>
__device__ __forceinline__ void kl_row(const DistillationArgs& a, int64_t row) {
  const float factor = kLog2e / a.temperature;
  RunningPair all;
  RowPair<S, T>(a, row).for_each([&](int64_t, auto& x, auto& y) {
    constexpr int kCount = sizeof(x) / sizeof(float);
    all.raise(largest_of(x, all.student.most), largest_of(y, all.teacher.most), factor);
    const float s_shift = shift_of(all.student.most), t_shift = shift_of(all.teacher.most);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float s = x[j] - s_shift, t = y[j] - t_shift, e = exponential2(t * factor);
      all.teacher.sum += e;
      all.gap += weighted_gap(e, t, s);
      all.student.sum += exponential2(s * factor);
    }
  });
  all = joined(all, JoinPairs{factor});
  const LogSum student{shift_of(all.student.most), log2f(all.student.sum)};
  const LogSum teacher{shift_of(all.teacher.most), log2f(all.teacher.sum)};
  const float loss = kl_of(all.gap / all.teacher.sum, student, teacher, a.temperature);
  put(a, row, loss, student.most, student.log2_sum, teacher.most, teacher.log2_sum);
}

template <typename S, typename T>
__device__ __forceinline__ void sums_row(const DistillationArgs& a, int64_t row) {
  Sums sums{0.0f, 0.0f, 0.0f};
  const bool product = a.kind == DistillationKind::kCosine;
  RowPair<S, T>(a, row).for_each([&](int64_t, auto& x, auto& y) {
    constexpr int kCount = sizeof(x) / sizeof(float);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float gap = x[j] - y[j];
      sums.a += product ? x[j] * y[j] : gap * gap;
      sums.b += x[j] * x[j];
      sums.c += y[j] * y[j];
    }
  });
  sums = joined(sums, JoinSums{});
  if (product) {
    const CosineRow c = cosine_of(sums.a, sums.b, sums.c);
    return put(a, row, c.loss, c.a, c.b);
  }
  const float divisor =
      a.kind == DistillationKind::kMse ? static_cast<float>(a.columns) : mse_divisor(sums.c, a.columns);
  put(a, row, sums.a / divisor, divisor);
}

template <typename S, typename T>
__device__ __forceinline__ void attention_row(const DistillationArgs& a, int64_t row) {
  Sums sums{0.0f, 0.0f, 0.0f};
  RowPair<S, T>(a, row).for_each([&](int64_t, auto& x, auto& y) {
    constexpr int kCount = sizeof(x) / sizeof(float);
#pragma unroll
    for (int j = 0; j < kCount; ++j) sums.a += attention_term(x[j], y[j]);
  });
  put(a, row, joined(sums, JoinSums{}).a);
}

enum class RowForm { kKl, kSums, kAttention };

__device__ __forceinline__ bool counts(const DistillationArgs& a, int64_t row) { return !a.mask || a.mask[row] != 0; }

template <typename S, typename T, RowForm kForm>
__global__ void __launch_bounds__(kLongThreads) forward_kernel(const __grid_constant__ DistillationArgs a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;
  if (!counts(a, row)) return put(a, row, 0.0f);
  if constexpr (kForm == RowForm::kKl)
    kl_row<S, T>(a, row);
  else if constexpr (kForm == RowForm::kAttention)
    attention_row<S, T>(a, row);
  else
    sums_row<S, T>(a, row);
}

// A block to a row, with a bit of shared memory for each column.
template <typename S>
__global__ void __launch_bounds__(kLongThreads) topk_forward_kernel(const __grid_constant__ DistillationArgs a) {
  extern __shared__ uint32_t is_kept[];
  const int64_t row = blockIdx.x;
  if (!counts(a, row)) return put(a, row, 0.0f);
  const float* values = static_cast<const float*>(a.teacher) + row * a.kept;
  const int32_t* index = a.index + row * a.kept;
  const int words = static_cast<int>((a.columns + 31) / 32);
  for (int i = threadIdx.x; i < words; i += blockDim.x) is_kept[i] = 0;
  __syncthreads();
  bool outside = false;
  for (int64_t j = threadIdx.x; j < a.kept; j += blockDim.x) {
    const bool there = index[j] >= 0 && index[j] < a.columns;
    outside |= !there;
    if (there) atomicOr(is_kept + index[j] / 32, 1u << (index[j] % 32));
  }
  if (__syncthreads_or(outside)) return put(a, row, NAN, NAN, NAN, NAN);
  const float factor = kLog2e / a.temperature;
  struct Both {
    Running all, others;
    __device__ __forceinline__ Both from_lane(int offset) const {
      return {all.from_lane(offset), others.from_lane(offset)};
    }
  } both;

  const StudentRow<S> student(a, row);
  student.for_each([&](int64_t column, auto& x) {
    constexpr int kCount = sizeof(x) / sizeof(float);
    both.all.raise(largest_of(x, both.all.most), factor);
    const float shift = shift_of(both.all.most);
#pragma unroll
    for (int j = 0; j < kCount; ++j) both.all.sum += exponential2((x[j] - shift) * factor);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const auto at = static_cast<uint32_t>(column + j);
      if (is_kept[at / 32] >> (at % 32) & 1u) x[j] = -HUGE_VALF;
    }
    both.others.raise(largest_of(x, both.others.most), factor);
    const float others_shift = shift_of(both.others.most);
#pragma unroll
    for (int j = 0; j < kCount; ++j) both.others.sum += exponential2((x[j] - others_shift) * factor);
  });
  both = joined(both, [&](const Both& one, const Both& two) {
    return Both{JoinRunning{factor}(one.all, two.all), JoinRunning{factor}(one.others, two.others)};
  });
  const LogSum of_all{shift_of(both.all.most), log2f(both.all.sum)};
  const LogSum of_others{shift_of(both.others.most), log2f(both.others.sum)};
  Sums sums{0.0f, 0.0f, 0.0f};  // the loss of the kept, and their probability
  for (int64_t j = threadIdx.x; j < a.kept; j += blockDim.x) {
    const float log2_of_teacher = values[j] * kLog2e, p = exponential2(log2_of_teacher);
    sums.a += weighted_gap(p, log2_of_teacher, of_all.log2_of(to_float(student.pair.s[index[j]]), factor));
    sums.b += p;
  }
  sums = joined(sums, JoinSums{});
  const float loss = sums.a + rest_loss(kept_of(sums.b, a.kept < a.columns).rest, of_all, of_others, factor);
  put(a, row, loss * (kLn2 * a.temperature * a.temperature), of_all.most, of_all.log2_sum, of_others.most,
      of_others.log2_sum);
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <typename S>
__device__ __forceinline__ void write_zeros(const DistillationArgs& a, S* out) {
  for (int64_t i = threadIdx.x; i < a.columns; i += blockDim.x) out[i] = from_float<S>(0.0f);
}

template <typename S, typename T, RowForm kForm>
__global__ void __launch_bounds__(kLongThreads) backward_kernel(const __grid_constant__ DistillationArgs a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;
  S* out = static_cast<S*>(a.grad_student) + row * a.columns;
  if (!counts(a, row)) return write_zeros(a, out);
  const float4 moments = reinterpret_cast<const float4*>(a.moments)[row];
  const LogSum of_student{moments.x, moments.y};
  const LogSum of_teacher{moments.z, moments.w};
  const float grad = a.grad[row], factor = kLog2e / a.temperature;
  const float kl = grad * a.temperature, mse = 2.0f * grad / moments.x;
  const bool cosine = a.kind == DistillationKind::kCosine;
  RowPair<S, T>(a, row, out).for_each([&](int64_t column, auto& x, auto& y) {
    constexpr int kCount = sizeof(x) / sizeof(float);
    float z[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if constexpr (kForm == RowForm::kKl)
        z[j] = kl * (of_student.probability_of(x[j], factor) - of_teacher.probability_of(y[j], factor));
      else if constexpr (kForm == RowForm::kAttention)
        z[j] = grad * attention_slope(x[j], y[j]);
      else
        z[j] = cosine ? grad * (x[j] * moments.y - y[j] * moments.x) : mse * (x[j] - y[j]);
    }
    store_step<S>(out, column, z);
  });
}

template <typename S>
__global__ void __launch_bounds__(kLongThreads) topk_backward_kernel(const __grid_constant__ DistillationArgs a) {
  const int64_t row = blockIdx.x;
  S* out = static_cast<S*>(a.grad_student) + row * a.columns;
  if (!counts(a, row)) return write_zeros(a, out);
  const float4 moments = reinterpret_cast<const float4*>(a.moments)[row];
  const LogSum of_student{moments.x, moments.y};
  const float factor = kLog2e / a.temperature, kl = a.grad[row] * a.temperature;
  const float* values = static_cast<const float*>(a.teacher) + row * a.kept;
  const int32_t* index = a.index + row * a.kept;
  Sums sums{0.0f, 0.0f, 0.0f};
  for (int64_t j = threadIdx.x; j < a.kept; j += blockDim.x) sums.a += exponential2(values[j] * kLog2e);
  const Kept kept = kept_of(joined(sums, JoinSums{}).a, a.kept < a.columns);
  const LogSum of_others{moments.z, moments.w};
  const StudentRow<S> student(a, row, out);
  student.for_each([&](int64_t column, auto& x) {
    constexpr int kCount = sizeof(x) / sizeof(float);
    float z[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      z[j] = kl * (kept.total * of_student.probability_of(x[j], factor) -
                   kept.rest * of_others.probability_of(x[j], factor));
    store_step<S>(out, column, z);
  });
  __syncthreads();
  for (int64_t j = threadIdx.x; j < a.kept; j += blockDim.x) {
    if (index[j] < 0 || index[j] >= a.columns) continue;
    const float p = of_student.probability_of(to_float(student.pair.s[index[j]]), factor);
    out[index[j]] = from_float<S>(kl * (p * kept.total - exponential2(values[j] * kLog2e)));
  }
}

// ---- launchers ------------------------------------------------------------------------------------------------------

struct Shape {
  dim3 block;
  unsigned grid;
};

Shape shape_of(const DistillationArgs& a) {
  if (a.columns <= kShortColumns) return {dim3(32, kShortRows), static_cast<unsigned>(ceil_div(a.rows, kShortRows))};
  return {dim3(a.columns < kLongColumns ? kThreads : kLongThreads), static_cast<unsigned>(a.rows)};
}

template <bool kBackward, RowForm kForm>
int launch_form(const DistillationArgs& a, cudaStream_t stream) {
  const Shape shape = shape_of(a);
  dispatch_float(a.student_dtype, [&](auto* s) {
    dispatch_float(a.teacher_dtype, [&](auto* t) {
      using S = std::remove_pointer_t<decltype(s)>;
      using T = std::remove_pointer_t<decltype(t)>;
      if constexpr (kBackward)
        backward_kernel<S, T, kForm><<<shape.grid, shape.block, 0, stream>>>(a);
      else
        forward_kernel<S, T, kForm><<<shape.grid, shape.block, 0, stream>>>(a);
    });
  });
  return cudaGetLastError();
}

template <bool kBackward>
int launch_topk(const DistillationArgs& a, cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(a.rows);
  const int threads = a.columns < kLongColumns ? kThreads : kLongThreads;
  const auto bytes = static_cast<int>((a.columns + 31) / 32 * 4);
  int error = cudaSuccess;
  dispatch_float(a.student_dtype, [&](auto* s) {
    using S = std::remove_pointer_t<decltype(s)>;
    if constexpr (kBackward) {
      topk_backward_kernel<S><<<rows, threads, 0, stream>>>(a);
    } else {
      constexpr int kWithoutAsking = 48 * 1024;
      if (bytes > kWithoutAsking)
        error = cudaFuncSetAttribute(topk_forward_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      if (error == cudaSuccess) topk_forward_kernel<S><<<rows, threads, bytes, stream>>>(a);
    }
  });
  return error == cudaSuccess ? cudaGetLastError() : error;
}

template <bool kBackward>
int launch(const DistillationArgs& a, cudaStream_t stream) {
  switch (a.kind) {
    case DistillationKind::kKl:
      return launch_form<kBackward, RowForm::kKl>(a, stream);
    case DistillationKind::kKlTopk:
      return launch_topk<kBackward>(a, stream);
    case DistillationKind::kAttentionKl:
      return launch_form<kBackward, RowForm::kAttention>(a, stream);
    default:
      return launch_form<kBackward, RowForm::kSums>(a, stream);
  }
}

}  // namespace

int distillation(const DistillationArgs& a, void* stream) {
  return launch<false>(a, static_cast<cudaStream_t>(stream));
}

int distillation_backward(const DistillationArgs& a, void* stream) {
  return launch<true>(a, static_cast<cudaStream_t>(stream));
}

}  // namespace quantrain::cuda
