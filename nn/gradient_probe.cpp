#include "quantrain/nn/gradient_probe.h"

// State is shared with the hooks that watch() leaves in autograd's graph, which hold it weakly: a probe may go before a
// backward pass.

#include <algorithm>
#include <cmath>
#include <mutex>
#include <sstream>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include "nn/gradient_probe_statistics.h"
#include "ops/common/check.h"
#include "quantrain/nn/layers.h"
#include "quantrain/ops/gradient_quant.h"

namespace quantrain::nn {
namespace {

constexpr int64_t kMostBits = 8;

double steps_of(int64_t bits) { return std::exp2(static_cast<double>(bits)) - 1; }

// "token" or "sample" for a spec's or an observation's rows.
std::string resolved_rows(const std::string& rows, int64_t dim) {
  if (rows != "auto") return rows;
  return dim == 4 ? "sample" : "token";
}

// The gradient as float32 [N, D].
at::Tensor as_matrix(const at::Tensor& grad, const std::string& rows) {
  const at::Tensor values = grad.detach().to(at::kFloat);
  if (values.dim() < 2) return values.reshape({rows == "token" ? 1 : -1, rows == "token" ? -1 : 1});
  const int64_t columns = rows == "token" ? values.size(-1) : values.numel() / std::max<int64_t>(values.size(0), 1);
  return values.reshape({-1, std::max<int64_t>(columns, 1)});
}

GradientQuantOptions quant_options(const GradientSpec& spec, bool stochastic) {
  return {.rows = "sample", .preserve_zero = spec.preserve_zero, .max_group = spec.max_group, .stochastic = stochastic};
}

void check_options(const GradientProbeOptions& options) {
  QUANTRAIN_CHECK_VALUE(options.draws >= 4 && options.draws % 2 == 0,
                        "GradientProbe: expected an even number of draws, at least 4, got {}", options.draws);
  QUANTRAIN_CHECK_VALUE(options.fraction > 0 && std::isfinite(options.fraction),
                        "GradientProbe: expected a positive fraction, got {}", options.fraction);
  for (const GradientSpec& spec : options.quantizers) {
    spec.validate();
    QUANTRAIN_CHECK_VALUE(spec.quantizer != "auto" && spec.quantizer != "none",
                          "GradientProbe: expected a quantizer by name, got '{}'", spec.quantizer);
  }
}

struct Layer {
  std::string name;
  at::Tensor weight;
  int64_t skipped = 0;
  std::vector<ProbeRow> shapes;   // by quantizer: rows, columns and the resolved spec
  std::vector<probe::Sums> sums;  // by quantizer
  std::vector<double> network;    // by quantizer: sum of squared effects
  std::vector<int64_t> network_runs;
  probe::BatchSums batches;
};

// An output whose gradient is awaited. The graph, which holds the hook, must not be held by it.
struct Watch {
  std::string layer;
  std::string rows;
  std::weak_ptr<torch::autograd::Node> node;
  uint32_t index;
  bool exact_backward;
};

enum class Mode { kObserve, kInject, kIdle };

double squared_distance(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i].defined() && b[i].defined())
      sum += (a[i].to(at::kDouble) - b[i].to(at::kDouble)).square().sum().item<double>();
  return sum;
}

double squared_norm(const std::vector<at::Tensor>& tensors) {
  double sum = 0;
  for (const at::Tensor& tensor : tensors)
    if (tensor.defined()) sum += tensor.to(at::kDouble).square().sum().item<double>();
  return sum;
}

}  // namespace

GradientSpec probe_quantizer(const std::string& text) {
  GradientSpec spec;
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ':');) parts.push_back(part);
  const bool digits = parts.size() > 1 && parts[1].size() == 1 && parts[1][0] >= '0' && parts[1][0] <= '9';
  QUANTRAIN_CHECK_VALUE(digits && parts.size() <= 3,
                        "GradientProbe: expected quantizer:bits or quantizer:bits:rows, got '{}'", text);
  spec.quantizer = parts[0];
  spec.bits = parts[1][0] - '0';
  if (parts.size() == 3) spec.rows = parts[2];
  spec.validate();
  return spec;
}

struct GradientProbe::State {
  explicit State(GradientProbeOptions given) : options(std::move(given)) {
    if (options.quantizers.empty())
      for (const char* text : {"per_tensor:5", "per_sample:5", "householder:5"})
        options.quantizers.push_back(probe_quantizer(text));
    check_options(options);
  }

  Layer& layer(const std::string& name) {
    const auto known = std::find_if(layers.begin(), layers.end(), [&](const auto& l) { return l->name == name; });
    if (known != layers.end()) return **known;
    auto added = std::make_unique<Layer>();
    added->name = name;
    const size_t count = options.quantizers.size();
    added->shapes.resize(count);
    for (size_t q = 0; q < count; ++q) added->shapes[q].quantizer = options.quantizers[q];
    added->sums.resize(count);
    added->network.resize(count);
    added->network_runs.resize(count);
    layers.push_back(std::move(added));
    return *layers.back();
  }

  at::Tensor drawn(const at::Tensor& x, const GradientSpec& spec) {
    const int64_t number = draw++;
    if (options.quantize) {
      const at::Tensor result = options.quantize(x, spec, number);
      QUANTRAIN_CHECK_VALUE(result.sizes() == x.sizes(), "GradientProbe: expected quantize to return {}, got {}",
                            quantrain::detail::shape_text(x), quantrain::detail::shape_text(result));
      return result;
    }
    return quantrain::quantize_gradient_seeded(x, spec.bits, spec.quantizer, quant_options(spec, true), options.seed,
                                               4 * number);
  }

  void observe(Layer& layer, const at::Tensor& grad, const std::string& rows,
               const probe::SquaredEffect& weight_effect) {
    if (grad.numel() == 0 || !grad.isfinite().all().item<bool>()) {
      layer.skipped += 1;
      return;
    }
    for (size_t q = 0; q < options.quantizers.size(); ++q) {
      GradientSpec spec = options.quantizers[q];
      spec.rows = resolved_rows(spec.rows == "auto" ? rows : spec.rows, grad.dim());
      const at::Tensor x = as_matrix(grad, spec.rows);
      const probe::ErrorModel model(
          x, spec, quantrain::quantize_gradient_codes(x, spec.bits, spec.quantizer, quant_options(spec, false)));
      layer.shapes[q].quantizer = spec;
      layer.shapes[q].rows = x.size(0);
      layer.shapes[q].columns = x.size(1);
      probe::add_observation(
          layer.sums[q], x, model, options.draws, [&](int64_t) { return drawn(x, spec); }, weight_effect);
    }
  }

  // ||dTheta||^2 of an error in the output's gradient, by the part of the graph between output and weight alone.
  probe::SquaredEffect effect_on_weight(const at::Tensor& grad, const at::Tensor& weight,
                                        const std::shared_ptr<torch::autograd::Node>& node, uint32_t index) {
    return [this, &grad, &weight, &node, index](const at::Tensor& error) {
      const Mode before = std::exchange(mode, Mode::kIdle);
      torch::autograd::variable_list effect;
      try {
        effect = torch::autograd::Engine::get_default_engine().execute(
            {torch::autograd::Edge(node, index)}, {error.reshape(grad.sizes()).to(grad.scalar_type())},
            /*keep_graph=*/true, /*create_graph=*/false, /*accumulate_grad=*/false,
            {torch::autograd::impl::gradient_edge(weight)});
      } catch (...) {
        mode = before;
        throw;
      }
      mode = before;
      return effect[0].defined() ? effect[0].to(at::kDouble).square().sum() : at::zeros({}, error.options());
    };
  }

  at::Tensor on_gradient(const Watch& watch, const at::Tensor& grad) {
    const std::lock_guard lock(mutex);
    if (mode == Mode::kIdle) return {};
    const at::NoGradGuard no_grad;
    if (mode == Mode::kInject) return watch.layer == active_layer ? injected(grad, watch.rows) : at::Tensor();
    Layer& seen = layer(watch.layer);
    const auto node = watch.node.lock();
    const bool weighs = watch.exact_backward && node && seen.weight.defined() && seen.weight.requires_grad();
    observe(seen, grad, watch.rows, weighs ? effect_on_weight(grad, seen.weight, node, watch.index) : nullptr);
    return {};
  }

  at::Tensor injected(const at::Tensor& grad, const std::string& rows) {
    GradientSpec spec = options.quantizers[active_quantizer];
    spec.rows = resolved_rows(spec.rows == "auto" ? rows : spec.rows, grad.dim());
    return drawn(as_matrix(grad, spec.rows), spec).reshape(grad.sizes()).to(grad.scalar_type());
  }

  void take_gradients(bool repeat) {
    const std::lock_guard lock(mutex);
    for (const auto& layer : layers) {
      if (!layer->weight.defined() || !layer->weight.grad().defined()) continue;
      const at::Tensor& grad = layer->weight.grad();
      if (grad.isfinite().all().item<bool>()) layer->batches.add(grad, repeat);
    }
  }

  GradientProbeOptions options;
  std::vector<std::unique_ptr<Layer>> layers;
  std::vector<std::weak_ptr<torch::nn::Module>> attached;
  std::recursive_mutex mutex;  // hooks run on the device's thread of autograd, and once more inside effect_on_weight
  Mode mode = Mode::kObserve;
  int64_t draw = 0;
  std::string active_layer;
  size_t active_quantizer = 0;
};

GradientProbe::GradientProbe(GradientProbeOptions options) : state_(std::make_shared<State>(std::move(options))) {}

GradientProbe::~GradientProbe() { detach(); }

void GradientProbe::attach(torch::nn::Module& module) {
  const auto add = [this](const std::shared_ptr<torch::nn::Module>& held, const std::string& name) {
    auto* layer = dynamic_cast<QuantModule*>(held.get());
    if (!layer || layer->as<QuantEmbedding>()) return;
    layer->set_output_hook([this, layer, name](const at::Tensor& output, bool exact_backward) {
      watch(name, output, layer->weight, exact_backward);
    });
    state_->attached.push_back(held);
  };
  if (dynamic_cast<QuantModule*>(&module)) add(module.shared_from_this(), "(model)");
  for (const auto& item : module.named_modules("", /*include_self=*/false)) add(item.value(), item.key());
  QUANTRAIN_CHECK_VALUE(!state_->attached.empty(),
                        "GradientProbe.attach: expected a module with a quantized layer, got {}", "one without");
}

void GradientProbe::detach() {
  for (const auto& held : state_->attached)
    if (const auto module = held.lock()) dynamic_cast<QuantModule&>(*module).set_output_hook(nullptr);
  state_->attached.clear();
}

void GradientProbe::watch(const std::string& layer, const at::Tensor& output, const at::Tensor& weight,
                          bool exact_backward) {
  if (!output.requires_grad() || !output.grad_fn()) return;
  {
    const std::lock_guard lock(state_->mutex);
    state_->layer(layer).weight = weight;
  }
  const bool convolution = weight.defined() && weight.dim() == 4;
  const Watch watch{layer,
                    convolution        ? "sample"
                    : weight.defined() ? "token"
                                       : "auto",
                    output.grad_fn(), static_cast<uint32_t>(output.output_nr()), exact_backward};
  output.register_hook([held = std::weak_ptr<State>(state_), watch](const at::Tensor& grad) -> at::Tensor {
    const auto state = held.lock();
    return state && grad.defined() ? state->on_gradient(watch, grad) : at::Tensor();
  });
}

void GradientProbe::observe(const std::string& layer, const at::Tensor& grad, const std::string& rows) {
  QUANTRAIN_CHECK_TYPE(grad.is_floating_point(), "GradientProbe.observe: expected a floating-point gradient, got {}",
                       c10::toString(grad.scalar_type()));
  QUANTRAIN_CHECK_VALUE(grad.dim() > 0, "GradientProbe.observe: expected at least one dimension, got {}", "none");
  QUANTRAIN_CHECK_VALUE(rows == "auto" || rows == "sample" || rows == "token",
                        "GradientProbe.observe: expected rows auto, sample or token, got '{}'", rows);
  const std::lock_guard lock(state_->mutex);
  const at::NoGradGuard no_grad;
  state_->observe(state_->layer(layer), grad, rows, nullptr);
}

void GradientProbe::end_batch() { state_->take_gradients(false); }
void GradientProbe::end_repeat() { state_->take_gradients(true); }

void GradientProbe::measure_network(const std::function<at::Tensor()>& loss, int64_t repeats) {
  QUANTRAIN_CHECK_VALUE(repeats > 0, "GradientProbe.measure_network: expected at least one repeat, got {}", repeats);
  State& state = *state_;
  struct Restore {
    State& state;
    ~Restore() { state.mode = Mode::kObserve; }
  } restore{state};
  state.mode = Mode::kIdle;
  const at::AutoGradMode grad_mode(true);
  const at::Tensor value = loss();
  std::vector<at::Tensor> weights;
  for (const auto& layer : state.layers)
    if (layer->weight.defined() && layer->weight.requires_grad()) weights.push_back(layer->weight);
  QUANTRAIN_CHECK_VALUE(!weights.empty(), "GradientProbe.measure_network: expected a watched layer, got {}", "none");
  const auto gradients = [&] {
    return torch::autograd::grad({value}, weights, {}, /*retain_graph=*/true, /*create_graph=*/false,
                                 /*allow_unused=*/true);
  };
  const std::vector<at::Tensor> exact = gradients();
  const double drift = squared_distance(gradients(), exact), norm = squared_norm(exact);
  QUANTRAIN_CHECK_VALUE(
      drift <= 1e-8 * norm,
      "GradientProbe.measure_network: expected a backward pass that repeats itself, got gradients that "
      "differ by {:.2g} of their norm (take the gradients' quantization out of the recipe)",
      std::sqrt(drift / norm));
  for (const auto& layer : state.layers) {
    state.active_layer = layer->name;
    for (size_t q = 0; q < state.options.quantizers.size(); ++q) {
      state.active_quantizer = q;
      for (int64_t i = 0; i < repeats; ++i) {
        state.mode = Mode::kInject;
        layer->network[q] += squared_distance(gradients(), exact);
        state.mode = Mode::kIdle;
        layer->network_runs[q] += 1;
      }
    }
  }
}

std::vector<ProbeRow> GradientProbe::rows() const {
  std::vector<ProbeRow> rows;
  for (const auto& layer : state_->layers) {
    for (size_t q = 0; q < layer->sums.size(); ++q) {
      const probe::Sums& sums = layer->sums[q];
      const double count = std::max<double>(static_cast<double>(sums.observations), 1);
      ProbeRow row = layer->shapes[q];
      row.layer = layer->name;
      row.observations = sums.observations;
      row.skipped = layer->skipped;
      row.gradient_square = sums.gradient_square / count;
      row.variance = sums.variance / count;
      row.exact_variance = sums.exact_variance / count;
      row.bound = sums.bound / count;
      row.bias_z = sums.bias_z();
      if (sums.weight_observations > 0)
        row.weight_variance = sums.weight_variance / static_cast<double>(sums.weight_observations);
      if (layer->network_runs[q] > 0)
        row.network_variance = layer->network[q] / static_cast<double>(layer->network_runs[q]);
      rows.push_back(std::move(row));
    }
  }
  return rows;
}

std::vector<ProbeLayer> GradientProbe::layers() const {
  std::vector<ProbeLayer> result;
  for (const auto& layer : state_->layers) {
    probe::BatchSums batches = layer->batches;  // a copy: the last batch may yet get repeats
    result.push_back(batches.summary(layer->name));
  }
  return result;
}

std::vector<ProbeAdvice> GradientProbe::recommend(double fraction) const {
  if (fraction <= 0) fraction = state_->options.fraction;
  const std::vector<ProbeLayer> batches = layers();
  double total = 0;
  for (const ProbeLayer& layer : batches) total += layer.batch_variance.value_or(0);
  const double share = fraction / std::max<double>(static_cast<double>(batches.size()), 1);
  std::vector<ProbeAdvice> result;
  for (const ProbeRow& row : rows()) {
    const auto layer =
        std::find_if(batches.begin(), batches.end(), [&](const auto& l) { return l.layer == row.layer; });
    const bool network = row.network_variance.has_value();
    const double batch_variance = network ? total : layer->batch_variance.value_or(0);
    if (!(batch_variance > 0) || !(network || row.weight_variance)) continue;
    ProbeAdvice advice{row.layer, row.quantizer, network ? "network" : "weight", 0, network ? share : fraction, 0};
    advice.ratio = (network ? *row.network_variance : *row.weight_variance) / batch_variance;
    advice.bits_needed = 2;
    const double law = advice.ratio * std::pow(steps_of(row.quantizer.bits), 2);
    while (advice.bits_needed <= kMostBits && law > advice.allowed * std::pow(steps_of(advice.bits_needed), 2))
      ++advice.bits_needed;
    result.push_back(std::move(advice));
  }
  const auto lack = [](const ProbeAdvice& a) { return std::max<int64_t>(a.bits_needed - a.quantizer.bits, 0); };
  std::stable_sort(result.begin(), result.end(), [&lack](const ProbeAdvice& a, const ProbeAdvice& b) {
    return lack(a) != lack(b) ? lack(a) > lack(b) : a.ratio > b.ratio;
  });
  return result;
}

const GradientProbeOptions& GradientProbe::options() const { return state_->options; }

}  // namespace quantrain::nn
