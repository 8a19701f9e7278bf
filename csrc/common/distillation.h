// Losses between a student's and a teacher's rows: what the kernels of the distillation family take, and the formulas
// that both devices share. s and t are a student's and a teacher's row.
#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/common/activations.h"
#include "csrc/common/macros.h"
#include "csrc/common/types.h"

namespace quantrain {

enum class DistillationKind { kKl, kKlTopk, kMse, kMseNormalized, kCosine, kAttentionKl };

// Where a row begins, in elements: rows of a batch lie evenly, and batches do.
struct RowPlaces {
  int64_t rows_of_batch;
  int64_t batch_stride;
  int64_t row_stride;

  QUANTRAIN_HOST_DEVICE int64_t of(int64_t row) const {
    const int64_t batch = row / rows_of_batch;
    return batch * batch_stride + (row - batch * rows_of_batch) * row_stride;
  }
};

struct DistillationArgs {
  DistillationKind kind;
  const void* student;   // [rows, columns], places below
  const void* teacher;   // likewise; of kKlTopk float32 [rows, kept]: log-probabilities
  const int32_t* index;  // [rows, kept], or null
  const uint8_t* mask;   // [rows], or null; 0: the row does not count
  float* loss;           // [rows]
  float* moments;        // [rows, 4]: what the gradient needs of a row, as below
  const float* grad;     // [rows], of the loss; null in the forward pass
  void* grad_student;    // [rows, columns], contiguous, of the student's type
  RowPlaces student_places;
  RowPlaces teacher_places;
  int64_t rows;
  int64_t columns;
  int64_t kept;
  DType student_dtype;
  DType teacher_dtype;
  float temperature;
};

constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.69314718f;
constexpr float kAttentionFloor = 1e-6f;  // of the student's probabilities inside the logarithm

// 2^d of d <= 0; of what is far below 0 nothing is left, on the host too.
QUANTRAIN_HOST_DEVICE float weight_of(float d) {
#if defined(__CUDA_ARCH__)
  return exponential2(d);
#else
  return select(0u - static_cast<uint32_t>(d < -125.0f), 0.0f, exponential2(d));
#endif
}

// e (t - s) where the weight e of the teacher's is not 0: of two columns that both exclude (-inf) the difference is
// NaN.
QUANTRAIN_HOST_DEVICE float weighted_gap(float e, float t, float s) {
  return select(0u - static_cast<uint32_t>(e == 0.0f), 0.0f, e * (t - s));
}

// A row of logits: its largest value, and the logarithm in powers of two of the sum of 2^((x - largest) factor), with
// factor = log2(e) / T. Apart, so that logits far from 0 lose nothing.
struct LogSum {
  float most;
  float log2_sum;

  QUANTRAIN_HOST_DEVICE float log2_of(float x, float factor) const { return (x - most) * factor - log2_sum; }
  QUANTRAIN_HOST_DEVICE float probability_of(float x, float factor) const { return weight_of(log2_of(x, factor)); }
};

// ---- a row's loss and what its gradient needs ----------------------------------------------------------------------

// gap = sum p_t ((t - most t) - (s - most s)). The result is KL(p_t || p_s) T^2. Moments: the student's LogSum, the
// teacher's.
QUANTRAIN_HOST_DEVICE float kl_of(float gap, LogSum student, LogSum teacher, float temperature) {
  const float apart = student.log2_sum - teacher.log2_sum;
  return (gap * (kLog2e / temperature) + apart) * (kLn2 * temperature * temperature);
}

// squares: sum (s - t)^2; teacher_squares: sum t^2. The divisor of a teacher's row of zeros is 1, as a block's scale
// is.
QUANTRAIN_HOST_DEVICE float mse_divisor(float teacher_squares, int64_t columns) {
  return teacher_squares == 0.0f ? static_cast<float>(columns) : teacher_squares;
}

// loss = 1 - s t / (|s| |t|), whose gradient by s is  -t a + s b. Moments: a, b.
struct CosineRow {
  float loss;
  float a;  // 1 / (|s| |t|), 0 where either is 0
  float b;  // cos / |s|^2
};

QUANTRAIN_HOST_DEVICE CosineRow cosine_of(float product, float student_squares, float teacher_squares) {
  const float norms = sqrtf(student_squares) * sqrtf(teacher_squares);
  if (norms == 0.0f) return CosineRow{1.0f, 0.0f, 0.0f};
  const float cosine = product / norms;
  return CosineRow{1.0f - cosine, 1.0f / norms, cosine / student_squares};
}

// p_t (log p_t - log max(p_s, floor)); 0 of a p_t of 0. NaN of either passes.
QUANTRAIN_HOST_DEVICE float attention_term(float student, float teacher) {
  if (teacher == 0.0f && student == student) return 0.0f;
  return teacher * (logf(teacher) - logf(student < kAttentionFloor ? kAttentionFloor : student));
}

QUANTRAIN_HOST_DEVICE float attention_slope(float student, float teacher) {
  return student < kAttentionFloor ? 0.0f : -teacher / student;
}

// A teacher's kept probabilities and what is left of 1, which has no place where the student has no other column.
// Moments: the student's LogSum, and that of its other columns.
struct Kept {
  float rest;
  float total;  // 1 but for the rounding of stored probabilities
};

QUANTRAIN_HOST_DEVICE Kept kept_of(float probability, bool has_others) {
  const float rest = has_others ? fmaxf(1.0f - probability, 0.0f) : 0.0f;
  return Kept{rest, probability + rest};
}

// The bucket's part of the loss, r_t log(r_t / r_s), in powers of two.
QUANTRAIN_HOST_DEVICE float rest_loss(float rest, LogSum student, LogSum others, float factor) {
  if (rest == 0.0f) return 0.0f;
  return rest * (log2f(rest) - ((others.most - student.most) * factor + (others.log2_sum - student.log2_sum)));
}

}  // namespace quantrain
