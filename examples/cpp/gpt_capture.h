// A training step as one CUDA graph: forward, backward, clip, optimizer and scaler, replayed by one launch.
#pragma once

#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <functional>
#include <optional>

#include "gpt_trainer.h"

namespace example {

// The first steps run one kernel at a time, on the stream of the capture: libraries set themselves up, and the
// optimizer and the scaler make their tensors. They are steps of the training like all others. Then a step is captured,
// and the next ones replay it: its sequences and learning rate are copied into the tensors that it reads, and dropout
// draws new numbers because the graph takes the offset of the default generator at each replay.
class CapturedStep {
 public:
  explicit CapturedStep(Trainer& trainer)
      : trainer_(trainer), stream_(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, trainer.device().index())) {}

  // Issues one step. The result is overwritten by the next.
  StepResult run() {
    const at::Tensor sequences = trainer_.prepare_step();
    if (warmed_up_ < kWarmupSteps) {
      ++warmed_up_;
      return on_stream([&] { return trainer_.compute_step(sequences); });
    }
    if (!graph_) capture(sequences);
    sequences_.copy_(sequences);
    graph_->replay();
    return result_;
  }

 private:
  static constexpr int kWarmupSteps = 3;  // as PyTorch's notes on CUDA graphs advise

  // Waits before and after, so that neither stream reads what the other has not written yet.
  StepResult on_stream(const std::function<StepResult()>& function) {
    c10::cuda::device_synchronize();
    const c10::cuda::CUDAStreamGuard guard(stream_);
    StepResult result = function();
    c10::cuda::device_synchronize();
    return result;
  }

  void capture(const at::Tensor& sequences) {
    sequences_ = at::empty_like(sequences).copy_(sequences);
    trainer_.make_capturable();
    trainer_.drop_gradients();  // the captured backward pass makes its own, in the graph's memory
    graph_.emplace();
    result_ = on_stream([this] {
      graph_->capture_begin();
      StepResult result = trainer_.compute_step(sequences_);
      graph_->capture_end();
      return result;
    });
  }

  Trainer& trainer_;
  c10::cuda::CUDAStream stream_;
  int warmed_up_ = 0;
  std::optional<at::cuda::CUDAGraph> graph_;
  at::Tensor sequences_;
  StepResult result_;
};

}  // namespace example
