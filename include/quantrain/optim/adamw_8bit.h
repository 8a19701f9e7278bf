// AdamW with moments of 8 bits a number (ops/adamw_8bit.h): a quarter of the state of AdamW in float32. Its step is one
// fused kernel for all parameters of a group, takes the loss scale and the overflow flag on the device, and so needs no
// host synchronization and fits in a CUDA graph.
#pragma once

#include <torch/optim/optimizer.h>

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "quantrain/ops/export.h"
#include "quantrain/optim/grouped_optimizer.h"

namespace quantrain::optim {

class HostState;

// Options of a group, those of torch::optim::AdamW and three more.
struct QUANTRAIN_API AdamW8bitOptions : public torch::optim::OptimizerCloneableOptions<AdamW8bitOptions> {
  explicit AdamW8bitOptions(double lr = 1e-3);

  TORCH_ARG(double, lr) = 1e-3;
  using betas_t = std::tuple<double, double>;
  TORCH_ARG(betas_t, betas) = std::make_tuple(0.9, 0.999);
  TORCH_ARG(double, eps) = 1e-8;
  TORCH_ARG(double, weight_decay) = 1e-2;
  TORCH_ARG(int64_t, bits) = 8;  // 32: the group's moments are float32, as embeddings need
  // Parameters of fewer elements have float32 moments.
  TORCH_ARG(int64_t, min_8bit_size) = 4096;
  // bfloat16 parameters are rounded up or down at random, so that updates below half a step of theirs add up.
  TORCH_ARG(bool, stochastic_rounding) = false;
  // The moments of parameters on a GPU stay in pinned host memory, for states larger than the GPU: a step copies them
  // in and out page by page beside the update. The same numbers. No capture in CUDA graphs.
  TORCH_ARG(bool, state_on_host) = false;

 public:
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
  double get_lr() const override;
  void set_lr(const double lr) override;
};

// Parameters of float32, float16 or bfloat16 on one device (CPU or CUDA); dense gradients of any of these types.
//
// lr of every group is read at each step. Under CUDA graph capture it stays what it was: call set_lr() before each
// replay.
// Errors: ValueError for options outside their ranges, an empty list, sparse gradients, or several devices.
class QUANTRAIN_API AdamW8bit : public GroupedOptimizer {
 public:
  explicit AdamW8bit(const std::vector<torch::optim::OptimizerParamGroup>& param_groups,
                     const AdamW8bitOptions& defaults = AdamW8bitOptions());
  explicit AdamW8bit(std::vector<at::Tensor> parameters, const AdamW8bitOptions& defaults = AdamW8bitOptions());
  ~AdamW8bit() override;

  // Of every group, also on the device.
  void set_lr(double lr);

  // State by parameter, in the order of the groups; zeros before the first step. Waits for what is on its way to the
  // host.
  struct State {
    at::Tensor exp_avg;           // of the parameter's shape: uint8 codes, or float32
    at::Tensor exp_avg_scale;     // float32, one per 256 elements of the parameter; of a float32 moment empty
    at::Tensor exp_avg_sq;        // as exp_avg
    at::Tensor exp_avg_sq_scale;  // as exp_avg_scale
    at::Tensor step;              // float32 without dimensions
  };
  const std::vector<State>& state_tensors();
  // Copies; ValueError where number, types or shapes differ, with nothing changed.
  void load_state_(const std::vector<State>& states);

  // As torch::optim's: torch::save(optimizer, path). By place in the groups.
  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

 private:
  void make_states() override;
  void check_takes_masks(size_t) const override {}
  const at::Tensor& lr_of(size_t group, c10::Device device);
  void step_group(size_t group, size_t first_parameter, const at::Tensor& grad_scale,
                  const at::Tensor& found_inf) override;

  std::vector<State> states_;    // empty before first use
  std::vector<at::Tensor> lrs_;  // of each group float32 without dimensions; undefined before first use
  std::vector<double> lr_values_;
  std::unique_ptr<HostState> host_;  // where a group's state is on the host
};

}  // namespace quantrain::optim
