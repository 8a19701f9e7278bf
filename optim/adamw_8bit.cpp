#include "quantrain/optim/adamw_8bit.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/serialize/archive.h>

#include <array>
#include <limits>

#include "ops/common/check.h"
#include "optim/host_state.h"
#include "optim/options.h"
#include "quantrain/ops/adamw_8bit.h"

namespace quantrain::optim {
namespace {

using torch::optim::OptimizerParamGroup;

constexpr int64_t kBlock = 256;           // elements of a scale
constexpr int64_t kSignedZeroCode = 127;  // of exp_avg's map

const AdamW8bitOptions& options_of(const OptimizerParamGroup& group) {
  return static_cast<const AdamW8bitOptions&>(group.options());
}

void check_options(const AdamW8bitOptions& options) {
  check_adamw_options("AdamW8bit", options);
  QUANTRAIN_CHECK_VALUE(options.bits() == 8 || options.bits() == 32, "AdamW8bit: expected bits of 8 or 32, got {}",
                        options.bits());
  QUANTRAIN_CHECK_VALUE(options.min_8bit_size() >= 0, "AdamW8bit: expected min_8bit_size >= 0, got {}",
                        options.min_8bit_size());
}

bool has_codes(const at::Tensor& parameter, const AdamW8bitOptions& options) {
  return options.bits() == 8 && parameter.numel() >= options.min_8bit_size();
}

AdamW8bit::State fresh_state(const at::Tensor& parameter, const AdamW8bitOptions& options) {
  const auto floats = parameter.options().dtype(at::kFloat).requires_grad(false);
  const bool codes = has_codes(parameter, options);
  const at::TensorOptions moment = codes ? floats.dtype(at::kByte) : floats;
  const int64_t scales = codes ? (parameter.numel() + kBlock - 1) / kBlock : 0;
  const auto keep = at::MemoryFormat::Preserve;
  AdamW8bit::State state;
  state.exp_avg =
      codes ? at::full_like(parameter, kSignedZeroCode, moment, keep) : at::zeros_like(parameter, moment, keep);
  state.exp_avg_sq = at::zeros_like(parameter, moment, keep);
  state.exp_avg_scale = at::zeros({scales}, floats);
  state.exp_avg_sq_scale = at::zeros({scales}, floats);
  state.step = at::zeros({}, floats);
  return state;
}

// The tensors of a state by name, in the order in which they are written.
template <typename StateType>
auto fields_of(StateType& state) {
  using Field = std::pair<const char*, decltype(&state.step)>;
  return std::array<Field, 5>{{{"exp_avg", &state.exp_avg},
                               {"exp_avg_scale", &state.exp_avg_scale},
                               {"exp_avg_sq", &state.exp_avg_sq},
                               {"exp_avg_sq_scale", &state.exp_avg_sq_scale},
                               {"step", &state.step}}};
}

}  // namespace

// ---- options --------------------------------------------------------------------------------------------------------

AdamW8bitOptions::AdamW8bitOptions(double lr) : lr_(lr) {}

double AdamW8bitOptions::get_lr() const { return lr(); }

void AdamW8bitOptions::set_lr(const double lr) { this->lr(lr); }

void AdamW8bitOptions::serialize(torch::serialize::OutputArchive& archive) const {
  const auto [beta1, beta2] = betas();
  archive.write("lr", c10::IValue(lr()));
  archive.write("beta1", c10::IValue(beta1));
  archive.write("beta2", c10::IValue(beta2));
  archive.write("eps", c10::IValue(eps()));
  archive.write("weight_decay", c10::IValue(weight_decay()));
  archive.write("bits", c10::IValue(bits()));
  archive.write("min_8bit_size", c10::IValue(min_8bit_size()));
  archive.write("stochastic_rounding", c10::IValue(stochastic_rounding()));
  archive.write("state_on_host", c10::IValue(state_on_host()));
}

void AdamW8bitOptions::serialize(torch::serialize::InputArchive& archive) {
  const auto read = [&](const char* name) {
    c10::IValue value;
    archive.read(name, value);
    return value;
  };
  lr(read("lr").toDouble());
  betas(std::make_tuple(read("beta1").toDouble(), read("beta2").toDouble()));
  eps(read("eps").toDouble());
  weight_decay(read("weight_decay").toDouble());
  bits(read("bits").toInt());
  min_8bit_size(read("min_8bit_size").toInt());
  stochastic_rounding(read("stochastic_rounding").toBool());
  c10::IValue on_host;  // files of earlier releases lack it
  state_on_host(archive.try_read("state_on_host", on_host) && on_host.toBool());
}

// ---- construction ---------------------------------------------------------------------------------------------------

AdamW8bit::AdamW8bit(const std::vector<OptimizerParamGroup>& param_groups, const AdamW8bitOptions& defaults)
    : GroupedOptimizer(param_groups, std::make_unique<AdamW8bitOptions>(defaults)) {
  for (const auto& group : param_groups_) check_options(options_of(group));
  check_parameters("AdamW8bit");
  for (const at::Tensor& parameter : all_parameters()) {
    const auto type = parameter.scalar_type();
    QUANTRAIN_CHECK_VALUE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
                          "AdamW8bit: expected parameters of float32, float16 or bfloat16, got {}",
                          c10::toString(type));
  }
}

AdamW8bit::AdamW8bit(std::vector<at::Tensor> parameters, const AdamW8bitOptions& defaults)
    : AdamW8bit(std::vector<OptimizerParamGroup>{OptimizerParamGroup(std::move(parameters))}, defaults) {}

AdamW8bit::~AdamW8bit() = default;

// ---- step -----------------------------------------------------------------------------------------------------------

void AdamW8bit::step_group(size_t group, size_t first_parameter, const at::Tensor& grad_scale,
                           const at::Tensor& found_inf) {
  const auto& parameters = param_groups_[group].params();
  const AdamW8bitOptions& options = options_of(param_groups_[group]);
  std::vector<size_t> given;
  std::vector<HostState::Tensors> states;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const at::Tensor& grad = parameters[i].grad();
    if (!grad.defined()) continue;
    QUANTRAIN_CHECK_VALUE(grad.layout() == at::kStrided, "AdamW8bit: expected dense gradients, got layout {}",
                          c10::str(grad.layout()));
    given.push_back(i);
    HostState::Tensors& state = states.emplace_back();
    for (const auto& field : fields_of(states_[first_parameter + i])) state.push_back(*field.second);
  }
  if (given.empty()) return;
  const auto optional = [](const at::Tensor& tensor) {
    return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
  };
  AdamW8bitArguments arguments;
  arguments.lr = lr_of(group, parameters[0].device());
  std::tie(arguments.beta1, arguments.beta2) = options.betas();
  arguments.eps = options.eps();
  arguments.weight_decay = options.weight_decay();
  arguments.grad_scale = optional(grad_scale);
  arguments.found_inf = optional(found_inf);
  arguments.stochastic = options.stochastic_rounding();
  const at::Tensor none = at::empty({0}, parameters[0].options().dtype(at::kByte).requires_grad(false));
  const auto update = [&](size_t first, const std::vector<HostState::Tensors>& page) {
    AdamW8bitTensors tensors;
    for (size_t i = 0; i < page.size(); ++i) {
      const at::Tensor& parameter = parameters[given[first + i]];
      tensors.params.push_back(parameter);
      tensors.grads.push_back(parameter.grad());
      tensors.exp_avg.push_back(page[i][0]);  // in the order of fields_of
      tensors.exp_avg_scale.push_back(page[i][1]);
      tensors.exp_avg_sq.push_back(page[i][2]);
      tensors.exp_avg_sq_scale.push_back(page[i][3]);
      tensors.steps.push_back(page[i][4]);
      const at::Tensor mask = mask_of(first_parameter + given[first + i]);
      tensors.masks.push_back(mask.defined() ? mask : none);
    }
    adamw_8bit_(tensors, arguments);
  };
  if (options.state_on_host() && !parameters[0].is_cpu()) {
    if (!host_) host_ = std::make_unique<HostState>(parameters[0].device());
    host_->update(states, update);
  } else {
    update(0, states);
  }
}

// ---- learning rate --------------------------------------------------------------------------------------------------

// Written where the number changed, so that a captured step does not write it again at each replay.
const at::Tensor& AdamW8bit::lr_of(size_t group, c10::Device device) {
  lrs_.resize(param_groups_.size());
  lr_values_.resize(param_groups_.size(), std::numeric_limits<double>::quiet_NaN());
  const double lr = options_of(param_groups_[group]).lr();
  if (!lrs_[group].defined())
    lrs_[group] = at::full({}, lr, at::TensorOptions().dtype(at::kFloat).device(device));
  else if (lr != lr_values_[group])
    lrs_[group].fill_(lr);
  lr_values_[group] = lr;
  return lrs_[group];
}

void AdamW8bit::set_lr(double lr) {
  QUANTRAIN_CHECK_VALUE(lr >= 0, "AdamW8bit.set_lr: expected lr >= 0, got {}", lr);
  const at::NoGradGuard no_grad;
  for (size_t group = 0; group < param_groups_.size(); ++group) {
    param_groups_[group].options().set_lr(lr);
    const auto& parameters = param_groups_[group].params();
    if (!parameters.empty()) lr_of(group, parameters[0].device());
  }
}

// ---- state ----------------------------------------------------------------------------------------------------------

void AdamW8bit::make_states() {
  if (!states_.empty()) return;
  const at::NoGradGuard no_grad;
  for (const auto& group : param_groups_) {
    for (const at::Tensor& parameter : group.params()) {
      State state = fresh_state(parameter, options_of(group));
      if (options_of(group).state_on_host() && !parameter.is_cpu()) {
        for (const auto& field : fields_of(state)) {
          if (field.second != &state.step) *field.second = pinned(*field.second);
        }
      }
      states_.push_back(std::move(state));
    }
  }
}

const std::vector<AdamW8bit::State>& AdamW8bit::state_tensors() {
  make_states();
  if (host_) host_->synchronize();
  return states_;
}

void AdamW8bit::load_state_(const std::vector<State>& states) {
  const at::NoGradGuard no_grad;
  state_tensors();
  QUANTRAIN_CHECK_VALUE(states.size() == states_.size(),
                        "AdamW8bit.load_state_: expected the state of {} parameters, got {}", states_.size(),
                        states.size());
  const auto text = [](const at::Tensor& tensor) {
    return tensor.defined() ? fmt::format("{} {}", c10::toString(tensor.scalar_type()), detail::shape_text(tensor))
                            : std::string("none");
  };
  for (size_t i = 0; i < states.size(); ++i) {
    const auto own = fields_of(states_[i]);
    const auto other = fields_of(states[i]);
    for (size_t field = 0; field < own.size(); ++field) {
      const at::Tensor &mine = *own[field].second, &theirs = *other[field].second;
      QUANTRAIN_CHECK_VALUE(
          theirs.defined() && mine.scalar_type() == theirs.scalar_type() && mine.sizes() == theirs.sizes(),
          "AdamW8bit.load_state_: expected {} of parameter {} to be {}, got {}", own[field].first, i, text(mine),
          text(theirs));
    }
  }
  for (size_t i = 0; i < states.size(); ++i) {
    const auto own = fields_of(states_[i]);
    const auto other = fields_of(states[i]);
    for (size_t field = 0; field < own.size(); ++field) own[field].second->copy_(*other[field].second);
  }
}

void AdamW8bit::save(torch::serialize::OutputArchive& archive) const {
  if (host_) host_->synchronize();
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    torch::serialize::OutputArchive options(archive.compilation_unit());
    options_of(param_groups_[g]).serialize(options);
    archive.write("options/" + std::to_string(g), options);
  }
  for (size_t i = 0; i < states_.size(); ++i)
    for (const auto& [name, tensor] : fields_of(states_[i]))
      archive.write("state/" + std::to_string(i) + "/" + name, *tensor);
}

void AdamW8bit::load(torch::serialize::InputArchive& archive) {
  std::vector<State> states;
  for (size_t i = 0; i < all_parameters().size(); ++i) {
    const std::string prefix = "state/" + std::to_string(i) + "/";
    State state;
    if (!archive.try_read(prefix + "exp_avg", state.exp_avg)) break;
    for (const auto& [name, tensor] : fields_of(state)) archive.read(prefix + name, *tensor);
    states.push_back(std::move(state));
  }
  // The options first: they say which moments have 8 bits. Those that keep their type stay where a graph knows them.
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    torch::serialize::InputArchive options;
    archive.read("options/" + std::to_string(g), options);
    param_groups_[g].options().serialize(options);
  }
  size_t i = 0;
  state_tensors();
  for (const auto& group : param_groups_)
    for (const at::Tensor& parameter : group.params()) {
      State& state = states_[i++];
      if (has_codes(parameter, options_of(group)) != (state.exp_avg.scalar_type() == at::kByte))
        state = fresh_state(parameter, options_of(group));
    }
  if (!states.empty()) load_state_(states);
}

}  // namespace quantrain::optim
