// Distillation without hooks: a student's layers trained on what a teacher's give. The losses are those of
// <quantrain/ops/distillation.h>; Python's quantrain.distill is the same with hooks.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "quantrain/ops/export.h"

namespace quantrain::distill {

// A layer: what it makes of a hidden state.
using Layer = std::function<at::Tensor(const at::Tensor&)>;

struct LayerOptions {
  int64_t steps = 100;
  double lr = 5e-6;        // of AdamW without weight decay; 1e-4 for 4-bit weights of small models
  bool normalize = false;  // each token's error by the mean square of the teacher's, as hidden_mse
};

struct LayerResult {
  double before;  // the mean squared error over the first batches
  double after;
};

// Layer-by-layer distillation (ZeroQuant's LKD, Yao et al., arXiv:2206.01861, section 4.3): for each k alone
//
//   min || teacher_k(h) - student_k(h) ||^2        h: the hidden state that the teacher's layer k gets
//
// parameters: what is trained, of all student layers. inputs: hidden states of the first layer, begun again where there
// are fewer than steps; masks: as many, [B, T], or none. The teacher runs without gradients.
// ValueError: lists of other lengths, no layer, no input, no parameter, a loss that is not finite (naming the layer).
QUANTRAIN_API std::vector<LayerResult> distill_layers(
    const std::vector<Layer>& teacher, const std::vector<Layer>& student, const std::vector<at::Tensor>& parameters,
    const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& masks = {}, const LayerOptions& options = {});

// The weights of what a student's loss is made of.
struct LossOptions {
  double temperature = 2.0;
  double task = 1.0;    // of the loss on labels
  double logits = 1.0;  // of distillation_kl
  double hidden = 0.0;  // of the mean of hidden_mse over pairs
  bool normalize = false;
};

// task * task_loss + logits * distillation_kl + hidden * mean of hidden_mse over the pairs of hidden states, of which
// there may be none. mask: of logits' rows, or none. task_loss may be undefined. ValueError: other lengths.
QUANTRAIN_API at::Tensor loss(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                              const at::Tensor& task_loss, const LossOptions& options = {}, const at::Tensor& mask = {},
                              const std::vector<at::Tensor>& student_hidden = {},
                              const std::vector<at::Tensor>& teacher_hidden = {});

}  // namespace quantrain::distill
