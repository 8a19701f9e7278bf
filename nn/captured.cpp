#include "quantrain/nn/captured.h"

#include <list>
#include <optional>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#if defined(QUANTRAIN_WITH_CUDA)
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace quantrain::nn {

struct Captured::State {
  Function function;
  size_t most;

#if defined(QUANTRAIN_WITH_CUDA)
  struct Graph {
    std::vector<at::Tensor> inputs;
    at::Tensor result;
    std::unique_ptr<at::cuda::CUDAGraph> graph;

    bool serves(const std::vector<at::Tensor>& others) const {
      if (others.size() != inputs.size()) return false;
      for (size_t i = 0; i < others.size(); ++i)
        if (others[i].sizes() != inputs[i].sizes() || others[i].scalar_type() != inputs[i].scalar_type() ||
            others[i].device() != inputs[i].device())
          return false;
      return true;
    }
  };

  std::list<Graph> graphs;                             // the most recently used first
  mutable std::optional<c10::cuda::CUDAStream> aside;  // of all captures: memory that it freed serves the next

  Graph captured(const std::vector<at::Tensor>& inputs) const {
    constexpr int kWarmups = 2;  // lazy initialisation may not be captured
    Graph made;
    for (const at::Tensor& input : inputs) made.inputs.push_back(input.clone());
    const auto before = c10::cuda::getCurrentCUDAStream();
    if (!aside) aside = c10::cuda::getStreamFromPool(/*isHighPriority=*/false, inputs.front().device().index());
    before.synchronize();
    const c10::cuda::CUDAStreamGuard guard(*aside);
    for (int i = 0; i < kWarmups; ++i) function(made.inputs);
    aside->synchronize();
    made.graph = std::make_unique<at::cuda::CUDAGraph>();
    if (graphs.empty())
      made.graph->capture_begin();
    else
      made.graph->capture_begin(graphs.front().graph->pool());
    try {
      made.result = function(made.inputs);
    } catch (...) {
      try {
        made.graph->capture_end();
      } catch (...) {  // the first error is the one to tell
      }
      throw;
    }
    made.graph->capture_end();
    aside->synchronize();
    return made;
  }

  at::Tensor replay(const std::vector<at::Tensor>& inputs) {
    const c10::cuda::CUDAGuard guard(inputs.front().device());
    auto found = graphs.begin();
    while (found != graphs.end() && !found->serves(inputs)) ++found;
    if (found == graphs.end()) {
      Graph made = captured(inputs);
      if (graphs.size() >= most) graphs.pop_back();
      graphs.push_front(std::move(made));
    } else {
      graphs.splice(graphs.begin(), graphs, found);
    }
    Graph& graph = graphs.front();
    for (size_t i = 0; i < inputs.size(); ++i) graph.inputs[i].copy_(inputs[i], /*non_blocking=*/true);
    graph.graph->replay();
    return graph.result;
  }
#endif
};

Captured::Captured(Function function, size_t most) : state_(std::make_unique<State>()) {
  TORCH_CHECK_VALUE(function != nullptr && most >= 1, "Captured: expected a function and at least one graph, got ",
                    most);
  state_->function = std::move(function);
  state_->most = most;
}

Captured::~Captured() = default;
Captured::Captured(Captured&&) noexcept = default;
Captured& Captured::operator=(Captured&&) noexcept = default;

at::Tensor Captured::operator()(const std::vector<at::Tensor>& inputs) {
  TORCH_CHECK_VALUE(!inputs.empty(), "Captured: expected at least one input, got none");
  const at::NoGradGuard no_grad;
#if defined(QUANTRAIN_WITH_CUDA)
  if (inputs.front().is_cuda()) return state_->replay(inputs);
#endif
  return state_->function(inputs);
}

size_t Captured::graphs() const {
#if defined(QUANTRAIN_WITH_CUDA)
  return state_->graphs.size();
#else
  return 0;
#endif
}

}  // namespace quantrain::nn
