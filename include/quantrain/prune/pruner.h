// Pruning of a model while it trains: masks as buffers, a schedule, and optimizers that keep what was dropped at zero.
//
//   prune::Pruner pruner(*model, spec, steps);
//   for (int64_t step = 1; step <= steps; ++step) {
//     loss.backward();
//     optimizer.step();
//     pruner.step(step, optimizer);
//   }
//
// Python's quantrain.prune is the same: a module that owns a pruned `weight` has a buffer `weight_mask`, packed as in
// <quantrain/ops/pruning.h>, which checkpoints hold.
#pragma once

#include <map>
#include <string>
#include <vector>

#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

#include "quantrain/nn/recipe.h"
#include "quantrain/ops/export.h"

namespace quantrain::prune {

// What calibration saw of a layer's inputs, by the layer's name: the norm of each column, float32 [K], for score wanda;
// the sum of x x^T, [K, K], for sparsegpt.
using Inputs = std::map<std::string, at::Tensor>;

class QUANTRAIN_API Pruner {
 public:
  // Of every parameter `weight` of two or more dimensions, but embeddings', below `module`; skip: names of layers, or
  // of modules whose layers stay whole. One that has a `weight_mask` goes on with it. Of a one_shot schedule the masks
  // are made here, of `inputs` where the score asks for them; of a cubic one all is kept at first. steps: of the
  // training. ValueError: a spec outside its rules, no weight, a name in skip that is no module's, missing inputs, a
  // pattern that does not divide a weight's columns (all are named); the module is then unchanged.
  Pruner(torch::nn::Module& module, nn::PruneSpec spec, int64_t steps, const std::vector<std::string>& skip = {},
         const Inputs& inputs = {});

  // After step `step`, from 1 on, of the optimizer: new masks where the schedule says so, of |w| at that time or of
  // `inputs`; what was dropped stays so. Then keeps zeros.
  void step(int64_t step, torch::optim::Optimizer& optimizer, const Inputs& inputs = {});

  // Sets what masks drop to zero, in weights and in the optimizer's moments. FusedAdamW and AdamW8bit take the masks
  // themselves from here on, with no pass of its own. Others: SGD, Adam, AdamW, RMSprop, Adagrad; ValueError for one
  // whose moments are not known here.
  void keep_zeros(torch::optim::Optimizer& optimizer);

  // The share of the weights' elements that is dropped now. Waits for the device.
  double sparsity() const;

  // By the layer's name; what the buffers hold.
  const std::map<std::string, at::Tensor>& masks() const { return masks_; }

 private:
  void renew(double sparsity, const Inputs& inputs);

  nn::PruneSpec spec_;
  int64_t steps_;
  std::map<std::string, at::Tensor> weights_;
  std::map<std::string, at::Tensor> masks_;
};

}  // namespace quantrain::prune
