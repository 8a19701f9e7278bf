// Inference as CUDA graphs, of inputs whose shapes vary.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#include <ATen/core/Tensor.h>

#include "quantrain/ops/export.h"

namespace quantrain::nn {

// Runs `function` as a CUDA graph of its own for each combination of input shapes and types, captured where it is first
// met and replayed from then on; the least recently used graph is dropped beyond `most`. On other devices, and in a
// build without CUDA, it is called as it is.
//
// function  of tensors, without effects but its result; it launches the same kernels whenever shapes are the same, and
//           reads nothing that is freed between calls. Run without gradients.
// result    lies in memory that all graphs of one Captured share: the next call, of whatever shapes, may overwrite it.
//           Clone what is to be kept.
//
// Memory: what the largest of the graphs' functions allocates, and each graph's inputs.
class QUANTRAIN_API Captured {
 public:
  using Function = std::function<at::Tensor(const std::vector<at::Tensor>&)>;

  explicit Captured(Function function, size_t most = 16);
  ~Captured();
  Captured(Captured&&) noexcept;
  Captured& operator=(Captured&&) noexcept;

  // Inputs of at least one tensor, all on one device.
  at::Tensor operator()(const std::vector<at::Tensor>& inputs);

  size_t graphs() const;  // held now

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace quantrain::nn
