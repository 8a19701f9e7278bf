// The model with all that a training step needs, fresh or as --init or the run in --out left it.
#pragma once

#include <quantrain/amp/autocast.h>
#include <quantrain/amp/grad_scaler.h>
#include <quantrain/nn/int8_linear.h>
#include <quantrain/nn/layers.h>
#include <quantrain/optim/fused_adamw.h>
#include <torch/utils.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "gpt.h"
#include "gpt_checkpoint.h"
#include "gpt_data.h"
#include "gpt_options.h"

namespace example {

// A step's loss (mean over its sequences) and gradient norm (undefined without clipping), still on the device.
struct StepResult {
  at::Tensor loss;
  at::Tensor norm;
};

// Of `step`, counted from 0: up linearly over the warm-up, then half a cosine from --lr to --min-lr.
inline double learning_rate(int64_t step, const Options& options) {
  constexpr double kPi = 3.14159265358979323846;
  if (step < options.warmup) return options.lr * static_cast<double>(step + 1) / static_cast<double>(options.warmup);
  const double place = static_cast<double>(step - options.warmup) /
                       static_cast<double>(std::max<int64_t>(1, options.steps - options.warmup));
  return options.min_lr + 0.5 * (options.lr - options.min_lr) * (1 + std::cos(kPi * place));
}

class Trainer {
 public:
  explicit Trainer(const Options& options)
      : options_(options),
        device_(with_index(options.device)),
        text_(options.data.empty() ? default_text() : options.data, options.config.context, device_),
        path_((std::filesystem::path(options.out) / "checkpoint.safetensors").string()),
        scaler_(scaler_options(options)) {
    std::optional<Checkpoint> stored;
    if (std::filesystem::is_regular_file(path_) && !options.restart && options.benchmark == 0) {
      stored = Checkpoint::read(path_);
    }
    build_model(stored);
    make_optimizer();
    if (stored) resume(*stored);
  }

  const Options& options() const { return options_; }
  at::Device device() const { return device_; }
  const std::string& path() const { return path_; }
  int64_t step() const { return step_; }
  int64_t skipped() const { return skipped_; }
  double scale() const { return scaler_.get_scale(); }
  void count_skipped() { ++skipped_; }

  // Issues one step.
  StepResult train_step() {
    const at::Tensor sequences = prepare_step();
    return compute_step(sequences);
  }

  // The host's part of a step: counts it, sets its learning rate and gives its sequences, [accumulate, batch, context +
  // 1].
  at::Tensor prepare_step() {
    optimizer_->set_lr(learning_rate(step_, options_));
    return text_.batch(options_.seed, step_++, options_.accumulate, options_.batch_size);
  }

  // The device's part of a step.
  StepResult compute_step(const at::Tensor& sequences) {
    optimizer_->zero_grad(/*set_to_none=*/true);
    std::optional<quantrain::nn::WeightCache> cache;  // an Int8Linear then rounds its weight once a step
    if (options_.accumulate > 1) cache.emplace(*model_);
    StepResult result{at::zeros({}, sequences.options().dtype(at::kFloat)), {}};
    for (int64_t i = 0; i < options_.accumulate; ++i) {
      const at::Tensor loss = loss_on(sequences[i]) / static_cast<double>(options_.accumulate);
      scaler_.scale(loss).backward();
      result.loss += loss.detach();
    }
    if (options_.clip > 0) result.norm = scaler_.clip_grad_norm_(*optimizer_, options_.clip);
    scaler_.step(*optimizer_);
    scaler_.update();
    return result;
  }

  // What a CUDA graph needs: nothing that the host would have to give anew in a replay.
  void make_capturable() { optimizer_->use_tensor_lr(); }
  void drop_gradients() { optimizer_->zero_grad(/*set_to_none=*/true); }

  // Mean loss on the evaluation part.
  double evaluate() {
    const at::NoGradGuard no_grad;
    model_->eval();
    double total = 0.0;
    double count = 0.0;
    for (const at::Tensor& sequences : text_.held_out_batches(options_.batch_size, options_.eval_batches)) {
      const double rows = static_cast<double>(sequences.size(0));
      total += loss_on(sequences).item<double>() * rows;
      count += rows;
    }
    model_->train();
    return total / count;
  }

  void save() {
    Checkpoint checkpoint{path_, {}, step_, skipped_, {}, options_.sizes(), recipe_, options_.settings(text_.size())};
    for (const auto& item : model_->named_parameters()) checkpoint.tensors[item.key()] = item.value();
    for (const auto& item : model_->named_buffers()) checkpoint.tensors[item.key()] = item.value();
    add_optimizer(checkpoint.tensors, *optimizer_, names_);
    for (auto& [name, generator] : generators(device_)) checkpoint.tensors[name] = generator.get_state();
    checkpoint.scaler = scaler_json();
    checkpoint.save();
  }

 private:
  static at::Device with_index(const std::string& name) {
    const at::Device device(name);
    return device.is_cuda() && !device.has_index() ? at::Device(device.type(), 0) : device;
  }

  static quantrain::amp::GradScalerOptions scaler_options(const Options& options) {
    quantrain::amp::GradScalerOptions scaler;
    scaler.init_scale = options.init_scale;
    scaler.growth_interval = options.growth_interval;
    scaler.enabled = options.precision == "fp16";
    scaler.capturable = options.captured;
    return scaler;
  }

  // Initializes, or takes over --init's weights; then calibrates under a recipe.
  void build_model(const std::optional<Checkpoint>& stored) {
    std::optional<quantrain::nn::Recipe> recipe;
    if (!options_.recipe.empty()) recipe = quantrain::nn::Recipe::from_name(options_.recipe);
    if (recipe && !recipe->training) detail::fail("--recipe for training (qat-...)", "'" + options_.recipe + "'");
    recipe_ = recipe ? recipe->to_json() : "";
    model_ = GPT(options_.config, recipe);
    quantrain::nn::enable_observer(*model_, false);
    torch::manual_seed(static_cast<uint64_t>(options_.seed));
    init_weights(*model_, options_.config.layers);
    bool calibrated = false;
    if (stored) {
      stored->check_model(options_.sizes(), recipe_);
      stored->check_settings(options_.settings(text_.size()));
      calibrated = true;
    } else if (!options_.init.empty()) {
      const Checkpoint start = Checkpoint::read(options_.init);
      start.check_model(options_.sizes(), recipe_, /*float_allowed=*/true);
      start.load_model(*model_);
      calibrated = !start.recipe.empty();
    }
    model_->to(device_);
    model_->train();
    if (recipe && !calibrated) calibrate();
  }

  void calibrate() {
    const quantrain::nn::Calibration calibration(*model_);
    for (int64_t i = 0; i < options_.calibration_batches; ++i) {
      const at::Tensor sequences = text_.batch(options_.seed, i, 1, options_.batch_size)[0];
      model_->forward(sequences.slice(-1, 0, -1));
    }
  }

  // AdamW, one fused kernel for all parameters; weights of two or more dimensions decay.
  void make_optimizer() {
    std::vector<at::Tensor> decayed;
    std::vector<at::Tensor> other;
    std::vector<std::string> other_names;
    for (const auto& item : model_->named_parameters()) {
      const bool decays = is_weight_matrix(item.key(), item.value());
      (decays ? decayed : other).push_back(item.value());
      (decays ? names_ : other_names).push_back(item.key());
    }
    names_.insert(names_.end(), other_names.begin(), other_names.end());
    const auto with_decay = [this](double weight_decay) {
      return torch::optim::AdamWOptions(options_.lr).betas({0.9, 0.95}).eps(1e-8).weight_decay(weight_decay);
    };
    std::vector<torch::optim::OptimizerParamGroup> groups;
    groups.emplace_back(decayed, std::make_unique<torch::optim::AdamWOptions>(with_decay(options_.weight_decay)));
    groups.emplace_back(other, std::make_unique<torch::optim::AdamWOptions>(with_decay(0.0)));
    optimizer_.emplace(groups, with_decay(0.0));
  }

  void resume(const Checkpoint& stored) {
    stored.load_model(*model_);
    load_optimizer(stored, *optimizer_, names_);
    if (!stored.scaler.empty()) load_scaler(stored.scaler);
    for (auto& [name, generator] : generators(device_)) {
      if (stored.tensors.count(name)) generator.set_state(stored.tensor(name));
    }
    step_ = stored.step;
    skipped_ = stored.skipped;
    std::fprintf(stderr, "train_gpt: resuming at step %lld of %lld\n", static_cast<long long>(step_),
                 static_cast<long long>(options_.steps));
  }

  nlohmann::json scaler_json() const {
    if (!scaler_.is_enabled()) return nlohmann::json::object();
    const quantrain::amp::GradScalerState state = scaler_.state_dict();
    return {{"scale", state.scale},
            {"growth_factor", state.growth_factor},
            {"backoff_factor", state.backoff_factor},
            {"growth_interval", state.growth_interval},
            {"_growth_tracker", state.growth_tracker}};
  }

  void load_scaler(const nlohmann::json& state) {
    scaler_.load_state_dict({state.at("scale"), state.at("growth_factor"), state.at("backoff_factor"),
                             state.at("growth_interval"), state.at("_growth_tracker")});
  }

  // The loss of sequences [B, context + 1], under autocast. Its cache of cast weights would hand a replayed graph stale
  // copies.
  at::Tensor loss_on(const at::Tensor& sequences) {
    const bool half = options_.precision == "fp16";
    const quantrain::amp::AutocastGuard autocast(device_.type(), half ? at::kHalf : at::kBFloat16,
                                                 options_.precision != "fp32", !options_.captured);
    return loss_of(model_->forward(sequences.slice(-1, 0, -1)), sequences.slice(-1, 1));
  }

  Options options_;
  at::Device device_;
  Text text_;
  std::string path_;
  std::string recipe_;
  GPT model_{nullptr};
  std::optional<quantrain::optim::FusedAdamW> optimizer_;
  std::vector<std::string> names_;  // of the parameters, in the optimizer's order
  quantrain::amp::GradScaler scaler_;
  int64_t step_ = 0;
  int64_t skipped_ = 0;
};

}  // namespace example
