#include "csrc/cpu/distillation.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "csrc/cpu/lanes.h"

// A row at a time, in blocks that stay in the first-level cache: its largest values first, then the sums.

namespace quantrain::cpu {
namespace {

constexpr int kBlock = 512;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Buffers {
  alignas(64) float s[kBlock], t[kBlock], y[kBlock], z[kBlock];
};

// Of a row: its blocks' sums add up in float64, as a long row's terms cancel.
struct RowSum {
  double sum = 0.0;

  QUANTRAIN_INLINE void add(const float* values, int n) {
    LaneSum block;
    block.add(values, n);
    sum += block.total();
  }

  QUANTRAIN_INLINE float total() const { return static_cast<float>(sum); }
};

// Calls f(first column, how many) over a row in blocks.
template <typename F>
QUANTRAIN_INLINE void for_each_of_row(int64_t columns, const F& f) {
  for (int64_t column = 0; column < columns; column += kBlock)
    f(column, static_cast<int>(std::min<int64_t>(kBlock, columns - column)));
}

// NaN is passed over: the sums see it.
template <typename T>
QUANTRAIN_INLINE float largest(const T* x, int64_t columns, float* buffer) {
  Lanes highs = Lanes{} - kInf;
  for_each_of_row(columns, [&](int64_t column, int n) QUANTRAIN_INLINE_LAMBDA {
    const float* values = load_block(x + column, n, buffer);
    for (int i = 0; i < n; i += kLanes) {
      QUANTRAIN_LOAD_LANES(next, values, i, n, -kInf)
      highs = next > highs ? next : highs;
    }
  });
  float high = -kInf;
  for (int j = 0; j < kLanes; ++j) high = std::max(high, highs[j]);
  return high == -kInf ? 0.0f : high;  // of a row without a number: its sums are 0, whose logarithm is -inf
}

template <typename S>
QUANTRAIN_INLINE const S* student_row(const DistillationArgs& a, int64_t row) {
  return static_cast<const S*>(a.student) + a.student_places.of(row);
}

template <typename T>
QUANTRAIN_INLINE const T* teacher_row(const DistillationArgs& a, int64_t row) {
  return static_cast<const T*>(a.teacher) + a.teacher_places.of(row);
}

QUANTRAIN_INLINE bool counts(const DistillationArgs& a, int64_t row) { return !a.mask || a.mask[row] != 0; }

QUANTRAIN_INLINE void put(const DistillationArgs& a, int64_t row, float first = 0.0f, float second = 0.0f,
                          float third = 0.0f, float fourth = 0.0f) {
  const float moments[4] = {first, second, third, fourth};
  std::copy(moments, moments + 4, a.moments + 4 * row);
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <typename S, typename T>
QUANTRAIN_INLINE void kl_row(const DistillationArgs& a, int64_t row, Buffers& b) {
  const S* s = student_row<S>(a, row);
  const T* t = teacher_row<T>(a, row);
  const float factor = kLog2e / a.temperature;
  const float s_most = largest(s, a.columns, b.s), t_most = largest(t, a.columns, b.t);
  RowSum s_sum, t_sum, gaps;
  for_each_of_row(a.columns, [&](int64_t column, int n) QUANTRAIN_INLINE_LAMBDA {
    const float* __restrict__ x = load_block(s + column, n, b.s);
    const float* __restrict__ y = load_block(t + column, n, b.t);
    for (int i = 0; i < n; ++i) b.y[i] = weight_of((y[i] - t_most) * factor);
    t_sum.add(b.y, n);
    for (int i = 0; i < n; ++i) b.z[i] = weighted_gap(b.y[i], y[i] - t_most, x[i] - s_most);
    gaps.add(b.z, n);
    for (int i = 0; i < n; ++i) b.z[i] = weight_of((x[i] - s_most) * factor);
    s_sum.add(b.z, n);
  });
  const LogSum student{s_most, std::log2(s_sum.total())}, teacher{t_most, std::log2(t_sum.total())};
  a.loss[row] = kl_of(gaps.total() / t_sum.total(), student, teacher, a.temperature);
  put(a, row, student.most, student.log2_sum, teacher.most, teacher.log2_sum);
}

template <typename S>
QUANTRAIN_INLINE void kl_topk_row(const DistillationArgs& a, int64_t row, Buffers& b, std::vector<uint8_t>& is_kept) {
  const S* s = student_row<S>(a, row);
  const float* values = teacher_row<float>(a, row);
  const int32_t* index = a.index + row * a.kept;
  const float factor = kLog2e / a.temperature;
  std::fill(is_kept.begin(), is_kept.end(), uint8_t{0});
  for (int64_t j = 0; j < a.kept; ++j) {
    if (index[j] < 0 || index[j] >= a.columns) {
      a.loss[row] = kNaN;
      put(a, row, kNaN, kNaN, kNaN, kNaN);
      return;
    }
    is_kept[index[j]] = 1;
  }
  const auto of_others = [&](int64_t column, int n, const float* x, float* to) QUANTRAIN_INLINE_LAMBDA {
    const uint8_t* kept = is_kept.data() + column;
    for (int i = 0; i < n; ++i) to[i] = select(0u - static_cast<uint32_t>(kept[i]), -kInf, x[i]);
  };
  float others_most = -kInf;
  for_each_of_row(a.columns, [&](int64_t column, int n) QUANTRAIN_INLINE_LAMBDA {
    of_others(column, n, load_block(s + column, n, b.s), b.t);
    for (int i = 0; i < n; ++i) others_most = std::max(others_most, b.t[i]);
  });
  LogSum student{largest(s, a.columns, b.s), 0.0f}, others{others_most == -kInf ? 0.0f : others_most, 0.0f};
  RowSum all_sum, others_sum;
  for_each_of_row(a.columns, [&](int64_t column, int n) QUANTRAIN_INLINE_LAMBDA {
    const float* __restrict__ x = load_block(s + column, n, b.s);
    for (int i = 0; i < n; ++i) b.y[i] = weight_of((x[i] - student.most) * factor);
    all_sum.add(b.y, n);
    of_others(column, n, x, b.t);
    for (int i = 0; i < n; ++i) b.z[i] = weight_of((b.t[i] - others.most) * factor);
    others_sum.add(b.z, n);
  });
  student.log2_sum = std::log2(all_sum.total());
  others.log2_sum = std::log2(others_sum.total());
  float loss = 0.0f, probability = 0.0f;
  for (int64_t j = 0; j < a.kept; ++j) {
    const float log2_of_teacher = values[j] * kLog2e, p = weight_of(log2_of_teacher);
    loss += weighted_gap(p, log2_of_teacher, student.log2_of(to_float(s[index[j]]), factor));
    probability += p;
  }
  loss += rest_loss(kept_of(probability, a.kept < a.columns).rest, student, others, factor);
  a.loss[row] = loss * (kLn2 * a.temperature * a.temperature);
  put(a, row, student.most, student.log2_sum, others.most, others.log2_sum);
}

// Sums of (s - t)^2, s t, s^2, t^2 as the kind needs them.
template <typename S, typename T>
QUANTRAIN_INLINE void sums_row(const DistillationArgs& a, int64_t row, Buffers& b) {
  const S* s = student_row<S>(a, row);
  const T* t = teacher_row<T>(a, row);
  RowSum first, s_squares, t_squares;
  const bool product = a.kind == DistillationKind::kCosine;
  for_each_of_row(a.columns, [&](int64_t column, int n) QUANTRAIN_INLINE_LAMBDA {
    const float* __restrict__ x = load_block(s + column, n, b.s);
    const float* __restrict__ y = load_block(t + column, n, b.t);
    if (product)
      for (int i = 0; i < n; ++i) b.z[i] = x[i] * y[i];
    else
      for (int i = 0; i < n; ++i) b.z[i] = (x[i] - y[i]) * (x[i] - y[i]);
    first.add(b.z, n);
    if (product) {
      for (int i = 0; i < n; ++i) b.z[i] = x[i] * x[i];
      s_squares.add(b.z, n);
    }
    if (a.kind != DistillationKind::kMse) {
      for (int i = 0; i < n; ++i) b.z[i] = y[i] * y[i];
      t_squares.add(b.z, n);
    }
  });
  if (product) {
    const CosineRow c = cosine_of(first.total(), s_squares.total(), t_squares.total());
    a.loss[row] = c.loss;
    put(a, row, c.a, c.b);
    return;
  }
  const float divisor =
      a.kind == DistillationKind::kMse ? static_cast<float>(a.columns) : mse_divisor(t_squares.total(), a.columns);
  a.loss[row] = first.total() / divisor;
  put(a, row, divisor);
}

template <typename S, typename T>
QUANTRAIN_INLINE void attention_row(const DistillationArgs& a, int64_t row, Buffers& b) {
  const S* s = student_row<S>(a, row);
  const T* t = teacher_row<T>(a, row);
  RowSum sum;
  for_each_of_row(a.columns, [&](int64_t column, int n) QUANTRAIN_INLINE_LAMBDA {
    const float* x = load_block(s + column, n, b.s);
    const float* y = load_block(t + column, n, b.t);
    for (int i = 0; i < n; ++i) b.z[i] = attention_term(x[i], y[i]);
    sum.add(b.z, n);
  });
  a.loss[row] = sum.total();
  put(a, row);
}

template <typename S, typename T>
void rows_typed(const DistillationArgs& a, int64_t begin, int64_t end) {
  std::vector<uint8_t> is_kept(a.kind == DistillationKind::kKlTopk ? a.columns : 0);
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    Buffers b;
    for (int64_t row = begin; row < end; ++row) {
      if (!counts(a, row)) {
        a.loss[row] = 0.0f;
        put(a, row);
        continue;
      }
      switch (a.kind) {
        case DistillationKind::kKl:
          kl_row<S, T>(a, row, b);
          break;
        case DistillationKind::kKlTopk:
          kl_topk_row<S>(a, row, b, is_kept);
          break;
        case DistillationKind::kAttentionKl:
          attention_row<S, T>(a, row, b);
          break;
        default:
          sums_row<S, T>(a, row, b);
      }
    }
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <typename S, typename T>
QUANTRAIN_INLINE void gradient_block(const DistillationArgs& a, int64_t row, float grad, Kept kept,
                                     const float* __restrict__ x, const float* __restrict__ y, float* __restrict__ z,
                                     int n) {
  const float* moments = a.moments + 4 * row;
  const float factor = kLog2e / a.temperature;
  const LogSum student{moments[0], moments[1]}, teacher{moments[2], moments[3]};
  switch (a.kind) {
    case DistillationKind::kKl: {
      const float scale = grad * a.temperature;
      for (int i = 0; i < n; ++i)
        z[i] = scale * (student.probability_of(x[i], factor) - teacher.probability_of(y[i], factor));
      return;
    }
    case DistillationKind::kKlTopk: {
      // Of the columns that are not kept; gradient_of_kept writes the others. `teacher` is the student's other columns.
      const float scale = grad * a.temperature;
      for (int i = 0; i < n; ++i)
        z[i] = scale *
               (kept.total * student.probability_of(x[i], factor) - kept.rest * teacher.probability_of(x[i], factor));
      return;
    }
    case DistillationKind::kCosine:
      for (int i = 0; i < n; ++i) z[i] = grad * (x[i] * moments[1] - y[i] * moments[0]);
      return;
    case DistillationKind::kAttentionKl:
      for (int i = 0; i < n; ++i) z[i] = grad * attention_slope(x[i], y[i]);
      return;
    default: {
      const float scale = 2.0f * grad / moments[0];
      for (int i = 0; i < n; ++i) z[i] = scale * (x[i] - y[i]);
    }
  }
}

// Over what gradient_block wrote of the kept columns.
template <typename S>
QUANTRAIN_INLINE void gradient_of_kept(const DistillationArgs& a, int64_t row, float grad, Kept kept, const S* s,
                                       S* out) {
  const float* values = teacher_row<float>(a, row);
  const int32_t* index = a.index + row * a.kept;
  const float factor = kLog2e / a.temperature;
  const LogSum student{a.moments[4 * row], a.moments[4 * row + 1]};
  for (int64_t j = 0; j < a.kept; ++j) {
    if (index[j] < 0 || index[j] >= a.columns) continue;
    const float p = student.probability_of(to_float(s[index[j]]), factor);
    out[index[j]] = from_float<S>(grad * a.temperature * (p * kept.total - weight_of(values[j] * kLog2e)));
  }
}

template <typename S, typename T>
void gradients_typed(const DistillationArgs& a, int64_t begin, int64_t end) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    Buffers b;
    const bool topk = a.kind == DistillationKind::kKlTopk;
    for (int64_t row = begin; row < end; ++row) {
      S* out = static_cast<S*>(a.grad_student) + row * a.columns;
      if (!counts(a, row)) {
        std::fill(out, out + a.columns, from_float<S>(0.0f));
        continue;
      }
      const S* s = student_row<S>(a, row);
      const float grad = a.grad[row];
      float probability = 0.0f;
      for (int64_t j = 0; topk && j < a.kept; ++j) probability += weight_of(teacher_row<float>(a, row)[j] * kLog2e);
      const Kept kept = kept_of(probability, a.kept < a.columns);
      for_each_of_row(a.columns, [&](int64_t column, int n) QUANTRAIN_INLINE_LAMBDA {
        const float* x = load_block(s + column, n, b.s);
        const float* y = topk ? x : load_block(teacher_row<T>(a, row) + column, n, b.t);
        float* z = store_target(out + column, b.z);
        gradient_block<S, T>(a, row, grad, kept, x, y, z, n);
        store_block(out + column, n, z);
      });
      if (topk) gradient_of_kept(a, row, grad, kept, s, out);
    }
  });
}

template <typename F>
void dispatch_pair(const DistillationArgs& a, const F& f) {
  dispatch_float(a.student_dtype, [&](auto* s) {
    if (a.kind == DistillationKind::kKlTopk) return f(s, static_cast<float*>(nullptr));
    dispatch_float(a.teacher_dtype, [&](auto* t) { f(s, t); });
  });
}

}  // namespace

void distillation(const DistillationArgs& a, int64_t begin, int64_t end) {
  dispatch_pair(a, [&](auto* s, auto* t) {
    rows_typed<std::remove_pointer_t<decltype(s)>, std::remove_pointer_t<decltype(t)>>(a, begin, end);
  });
}

void distillation_backward(const DistillationArgs& a, int64_t begin, int64_t end) {
  dispatch_pair(a, [&](auto* s, auto* t) {
    gradients_typed<std::remove_pointer_t<decltype(s)>, std::remove_pointer_t<decltype(t)>>(a, begin, end);
  });
}

}  // namespace quantrain::cpu
