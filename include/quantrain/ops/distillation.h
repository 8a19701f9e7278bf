// Losses of a student against its teacher: the distillation family.
//
// s and t are a student's and a teacher's row, the last dimension of student and teacher; a result is of the rows.
//
//   distillation_kl         T^2 sum p_t (log p_t - log p_s),   p = softmax(. / T)          Hinton et al., 1503.02531
//   distillation_kl_topk    the same over the kept columns and one bucket of all others
//   hidden_mse              mean (s - t)^2;  normalized: sum (s - t)^2 / sum t^2
//   hidden_cosine           1 - s t / (|s| |t|)                                              Sanh et al., 1910.01108
//   attention_kl            sum t (log t - log max(s, 1e-6)) of probabilities             Wang et al., 2002.10957
//
// student and teacher: float32, float16 or bfloat16, each of its own, of one shape [.., K]. mask [..]: bool or numbers,
// 0 where a row does not count; such rows are not read, their loss and gradient are 0. reduction "mean" is over the
// rows that count (0 where none does), "sum" over them, "none" keeps [..]. The result is float32.
//
// Gradients: of student alone, the teacher is a constant. Besides its inputs a loss keeps four float32 per row; nothing
// of the rows' size is made but the gradient. Second derivatives raise. Sums go in a fixed order: results repeat.
// Rows that lie evenly within evenly spaced batches, such as logits[:, :-1], are read where they are.
//
// NaN in a row that counts is NaN in the loss. A column that both exclude by -inf adds nothing; one that the student
// alone excludes makes the loss infinite.
//
// Errors: c10::ValueError for shapes and values, c10::TypeError for element types and devices.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "quantrain/ops/export.h"

namespace quantrain {

// Of logits over a vocabulary.
QUANTRAIN_API at::Tensor distillation_kl(const at::Tensor& student, const at::Tensor& teacher, double temperature = 1.0,
                                         const std::optional<at::Tensor>& mask = std::nullopt,
                                         std::string_view reduction = "mean");

// Of a teacher of which the k likeliest columns were stored: teacher_values [.., k] are log softmax(t / T) at this
// temperature, teacher_indices [.., k] int32 or int64, distinct. What is left of either's probability is one bucket;
// with all columns stored there is none. An index outside of the vocabulary makes its row NaN.
QUANTRAIN_API at::Tensor distillation_kl_topk(const at::Tensor& student, const at::Tensor& teacher_values,
                                              const at::Tensor& teacher_indices, double temperature = 1.0,
                                              const std::optional<at::Tensor>& mask = std::nullopt,
                                              std::string_view reduction = "mean");

// normalize: each row by the mean square of the teacher's, so that a token of large norm is not the whole loss; a row
// of zeros is divided by 1.
QUANTRAIN_API at::Tensor hidden_mse(const at::Tensor& student, const at::Tensor& teacher,
                                    const std::optional<at::Tensor>& mask = std::nullopt, bool normalize = false,
                                    std::string_view reduction = "mean");

// A row of zeros has the loss 1 and the gradient 0.
QUANTRAIN_API at::Tensor hidden_cosine(const at::Tensor& student, const at::Tensor& teacher,
                                       const std::optional<at::Tensor>& mask = std::nullopt,
                                       std::string_view reduction = "mean");

// Rows of probabilities, as attention layers return them. The gradient is 0 below the floor.
QUANTRAIN_API at::Tensor attention_kl(const at::Tensor& student, const at::Tensor& teacher,
                                      const std::optional<at::Tensor>& mask = std::nullopt,
                                      std::string_view reduction = "mean");

}  // namespace quantrain
