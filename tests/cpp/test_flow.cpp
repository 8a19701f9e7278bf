#include "recomputed.h"
#include "support.h"

#include <cmath>
#include <limits>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include <quantrain/nn/checkpoint.h>
#include <quantrain/nn/fixed_point/graph.h>
#include <quantrain/nn/int8_linear.h>
#include <quantrain/nn/layers.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adam.h>
#include <torch/optim/sgd.h>
#include <torch/serialize.h>

using Catch::Matchers::Contains;
using namespace quantrain::nn;
using support::read_file;
using support::Recomputed;
using support::same_bits;
using support::TemporaryFolder;
using support::value_error;

namespace {

struct NetImpl : torch::nn::Module {
  explicit NetImpl(const Recipe& recipe, int64_t width = 32)
      : conv(register_module("conv", QuantConvBn2d(torch::nn::Conv2dOptions(2, width, 3).bias(false), recipe))),
        middle(register_module("middle", QuantLinear(width, width, recipe))),
        head(register_module("head", QuantLinear(width, 3, recipe))) {}

  at::Tensor forward(const at::Tensor& x) {
    return head->forward(at::relu(middle->forward(at::relu(conv->forward(x)).mean({2, 3}))));
  }

  QuantConvBn2d conv;
  QuantLinear middle;
  QuantLinear head;
};
TORCH_MODULE(Net);

std::map<std::string, at::Tensor> state(const torch::nn::Module& net) {
  std::map<std::string, at::Tensor> all;
  for (const auto& item : net.named_parameters()) all[item.key()] = item.value().detach().clone();
  for (const auto& item : net.named_buffers()) all[item.key()] = item.value().clone();
  return all;
}

void check_same(const torch::nn::Module& net, const std::map<std::string, at::Tensor>& before) {
  const auto now = state(net);
  REQUIRE(now.size() == before.size());
  for (const auto& [name, tensor] : now) {
    INFO(name);
    CHECK(same_bits(tensor, before.at(name)));
  }
}

QuantSpec spec_of(const std::string& observer, int64_t bits = 8, bool learnable = false) {
  QuantSpec spec;
  spec.observer = value_of<ObserverKind>(observer);
  spec.bits = bits;
  spec.learnable = learnable;
  return spec;
}

std::vector<double> train(Net& net, torch::optim::Optimizer& optimizer, int first, int last) {
  std::vector<double> losses;
  for (int step = first; step < last; ++step) {
    auto generator = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(step));
    const at::Tensor x = at::randn({8, 2, 6, 6}, generator) * (1.0 + step);
    const at::Tensor loss = at::cross_entropy_loss(net->forward(x), at::arange(8).remainder(3));
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    losses.push_back(loss.item<double>());
  }
  return losses;
}

}  // namespace

TEST_CASE("ranges follow training until they are frozen", "[flow]") {
  QuantLinear layer(4, 2, Recipe::from_name("qat-w8a8"));
  {
    const Calibration calibration(*layer);
    layer->forward(at::ones({2, 4}));
  }
  const auto scale = [&] { return layer->input_fake_quant->scale.item<float>(); };
  const float before = scale();
  layer->forward(at::full({2, 4}, 11.0));
  CHECK(scale() == Approx(2 * before));  // 1 + 0.1 (11 - 1)
  enable_observer(*layer, false);
  layer->forward(at::full({2, 4}, 100.0));
  CHECK(scale() == Approx(2 * before));
}

TEST_CASE("ranges of post-training recipes are fixed by calibration", "[flow]") {
  torch::manual_seed(1);
  QuantLinear layer(32, 2, Recipe::from_name(GENERATE("ptq-w8a8", "ptq-w4a8", "int8-static")));
  {
    const Calibration calibration(*layer);
    layer->forward(at::rand({4, 32}));
  }
  const auto before = state(*layer);
  layer->forward(at::full({4, 32}, 7.0));
  check_same(*layer, before);
}

TEST_CASE("calibration restores switches, and after an exception ranges and scales", "[flow]") {
  torch::manual_seed(2);
  QuantLinear layer(32, 4, Recipe::from_name(GENERATE("qat-w8a8", "qat-w4a4", "ptq-w4a8")));
  enable_fake_quant(*layer, false);
  for (int round = 0; round < 2; ++round) {  // of a layer that was never calibrated, then of one that was
    const auto before = state(*layer);
    CHECK_THAT(value_error([&] {
                 const Calibration calibration(*layer);
                 layer->forward(at::rand({4, 32}));
                 layer->forward(at::full({4, 32}, NAN));
               }),
               Contains("Observer 'input_fake_quant.observer': expected a batch without NaN"));
    check_same(*layer, before);
    CHECK(layer->is_training());
    CHECK_FALSE(layer->input_fake_quant->fake_quant_enabled());
    Calibration calibration(*layer);
    layer->forward(at::rand({4, 32}));
    CHECK(calibration.finish().empty());
  }
}

TEST_CASE("a resumed run takes the same steps bit for bit", "[flow]") {
  const TemporaryFolder folder;
  const Recipe recipe = Recipe::from_name(GENERATE("qat-w8a8", "qat-w4a8", "qat-w4a4", "fqt-bhq5"));
  const bool frozen = GENERATE(false, true);
  const bool calibrated = GENERATE(false, true);
  INFO(recipe.name << " frozen " << frozen << " calibrated " << calibrated);
  torch::manual_seed(3);
  Net net(recipe);
  if (calibrated) {
    net->conv->bn->running_var.fill_(0.8);
    const Calibration calibration(*net);
    net->forward(at::randn({8, 2, 6, 6}));
  }
  torch::optim::SGD optimizer(net->parameters(), torch::optim::SGDOptions(0.01).momentum(0.9));
  train(net, optimizer, 0, 3);
  if (frozen) enable_observer(*net, false);
  save_checkpoint(folder.file("model"), *net, recipe);
  torch::save(optimizer, folder.file("optimizer"));
  torch::manual_seed(4);
  const std::vector<double> losses = train(net, optimizer, 3, 6);

  Net again(recipe);
  load_checkpoint(folder.file("model"), *again);
  torch::optim::SGD resumed(again->parameters(), torch::optim::SGDOptions(0.01).momentum(0.9));
  torch::load(resumed, folder.file("optimizer"));
  torch::manual_seed(4);
  CHECK(train(again, resumed, 3, 6) == losses);
  check_same(*again, state(*net));
}

TEST_CASE("enable_observer does not undo a learned scale", "[flow]") {
  FakeQuantize fake_quant(spec_of("min_max", 4, /*learnable=*/true));
  fake_quant->forward(at::randn({8}));
  fake_quant->scale.variable_data().mul_(3);
  const float trained = fake_quant->scale.item<float>();
  fake_quant->enable_observer(true);
  fake_quant->forward(at::randn({8}));
  CHECK(fake_quant->scale.item<float>() == trained);
}

TEST_CASE("a zero block does not count as observed", "[flow]") {
  const std::string name = GENERATE("min_max", "moving_average", "percentile", "mse");
  Observer watching(spec_of(name), std::vector<int64_t>{2, 1});
  watching->forward(at::zeros({2, 4}));
  CHECK(watching->only_zeros().all().item<bool>());
  const at::Tensor x = at::tensor({0.0f, 0.0f, 0.0f, 0.0f, -1.0f, 2.0f, -2.0f, 1.0f}).reshape({2, 4});
  watching->forward(x);
  Observer fresh(spec_of(name), std::vector<int64_t>{2, 1});
  fresh->forward(x);
  CHECK(same_bits(watching->max_val, fresh->max_val));
  watching->forward(at::zeros({2, 4}));
  CHECK(same_bits(watching->max_val, fresh->max_val));
}

TEST_CASE("an input calibrated on zeros takes its range from the first other batch", "[flow]") {
  const bool learnable = GENERATE(false, true);
  Recipe recipe;
  recipe.input = spec_of("moving_average", 8, learnable);
  QuantLinear layer(4, 2, recipe);
  Calibration calibration(*layer);
  layer->forward(at::zeros({3, 4}));
  const CalibrationReport report = calibration.finish();
  CHECK(report.only_zeros == std::vector<std::string>{"input_fake_quant"});
  CHECK_THAT(report.text(), Contains("seen only as zeros: input_fake_quant"));
  layer->forward(at::full({3, 4}, 0.1));
  CHECK(layer->input_fake_quant->scale.item<float>() == Approx(0.1 / 127));
}

TEST_CASE("a weight folded with a gamma of zero trains under a learned scale", "[flow]") {
  torch::manual_seed(5);
  const bool calibrated = GENERATE(false, true);
  QuantConvBn2d layer(torch::nn::Conv2dOptions(4, 6, 3).padding(1).bias(false), Recipe::from_name("qat-w4a4"));
  {
    const at::NoGradGuard no_grad;
    layer->bn->weight.zero_();
  }
  const at::Tensor x = at::randn({8, 4, 6, 6});
  if (calibrated) {
    Calibration calibration(*layer);
    layer->forward(x);
    calibration.finish();
  }
  const at::Tensor target = at::randn({8, 6, 6, 6});
  torch::optim::Adam optimizer(layer->parameters(), torch::optim::AdamOptions(0.02));
  for (int step = 0; step < 40; ++step) {
    optimizer.zero_grad();
    (layer->forward(x) - target).square().mean().backward();
    optimizer.step();
  }
  const at::NoGradGuard no_grad;
  layer->eval();
  const at::Tensor codes = at::round(layer->weight_to_quantize() / layer->weight_fake_quant->scale);
  CHECK((codes != 0).flatten(1).any(1).all().item<bool>());
  CHECK(at::logical_or(codes < -8, codes > 7).to(at::kFloat).mean().item<double>() < 0.1);
  CHECK(layer->bn->weight.abs().min().item<double>() > 0);
}

TEST_CASE("a recomputed forward pass does not observe", "[flow]") {
  torch::manual_seed(6);
  QuantLinear layer(8, 4, Recipe::from_name(GENERATE("qat-w8a8", "qat-w4a4")));
  const at::Tensor x = at::randn({16, 8});
  {
    const Calibration calibration(*layer);
    layer->forward(x);
  }
  const auto copy = std::dynamic_pointer_cast<QuantLinearImpl>(layer->clone());
  for (const double scale : {3.0, 0.2}) {
    const at::Tensor input = (x * scale).requires_grad_();
    Recomputed<QuantLinear>::apply(input, &layer).square().sum().backward();
    copy->forward(x * scale).square().sum().backward();
  }
  CHECK(same_bits(layer->weight.grad(), copy->weight.grad()));
  check_same(*layer, state(*copy));
}

TEST_CASE("calibration names what it did not reach, and empty batches pass", "[flow]") {
  torch::manual_seed(7);
  struct ExpertsImpl : torch::nn::Module {
    ExpertsImpl()
        : a(register_module("a", QuantLinear(4, 4, Recipe::from_name("ptq-w4a8")))),
          b(register_module("b", QuantLinear(4, 4, Recipe::from_name("ptq-w4a8")))) {}
    at::Tensor forward(const at::Tensor& x) { return a->forward(x) + b->forward(x.slice(0, 0, 0)).sum(); }
    QuantLinear a, b;
  };
  const auto model = std::make_shared<ExpertsImpl>();
  const at::Tensor x = at::randn({3, 4});
  {
    Calibration calibration(*model);
    model->forward(x);
    CHECK(calibration.finish().unreached == std::vector<std::string>{"b.input_fake_quant"});
  }
  CHECK(model->b->input_fake_quant->observer_enabled());
  CHECK_FALSE(model->a->input_fake_quant->observer_enabled());
  model->eval();
  CHECK(model->forward(x).isfinite().all().item<bool>());
  CHECK_THAT(value_error([&] { model->b->forward(x); }),
             Contains("FakeQuantize 'b.input_fake_quant': expected a scale"));
}

TEST_CASE("convert leaves float what no batch reached, and its file comes back", "[flow]") {
  torch::manual_seed(9);
  const std::string recipe = GENERATE("ptq-w4a8", "qat-w8a8", "fqt-psq8");
  CAPTURE(recipe);
  Net net(Recipe::from_name(recipe));
  CHECK_THAT(value_error([&] { convert(*net); }), Contains("convert: expected every scale of layer"));
  const at::Tensor x = at::randn({4, 2, 6, 6});
  {
    Calibration calibration(*net);
    at::relu(net->conv->forward(x));
    net->head->forward(at::randn({4, 32}));
    CHECK(calibration.finish().unreached == std::vector<std::string>{"middle.input_fake_quant"});
  }
  CHECK_THAT(value_error([&] { convert(*net, true, {"midle"}); }), Contains("expected skip to name a layer"));
  CHECK_FALSE(net->head->converted());
  convert(*net);
  CHECK(net->conv->converted());
  CHECK(net->head->converted());
  CHECK(net->middle->left_float());
  const at::Tensor rows = at::randn({4, 32});
  CHECK(same_bits(net->middle->forward(rows), at::linear(rows, net->middle->weight, net->middle->bias)));
  CHECK_THAT(value_error([&] { convert(*net); }), Contains("got one converted already"));
  const at::Tensor want = net->forward(x);

  const TemporaryFolder folder;
  save_checkpoint(folder.file("net"), *net, Recipe::from_name(recipe));
  Net other(Recipe::from_name(recipe));
  convert(*other, /*check_observed=*/false);
  CHECK_THAT(value_error([&] { load_checkpoint(folder.file("net"), *other); }), Contains("'middle'"));
  Net skeleton(Recipe::from_name(recipe));
  convert(*skeleton, /*check_observed=*/false, {"middle"});
  load_checkpoint(folder.file("net"), *skeleton);
  CHECK(same_bits(skeleton->forward(x), want));
}

TEST_CASE("a convolution with batch norm that stays float is the float pair", "[flow]") {
  torch::manual_seed(10);
  Net net(Recipe::from_name("qat-w8a8"));
  const at::Tensor x = at::randn({4, 2, 6, 6});
  net->forward(x);
  convert(*net, true, {"conv"});
  CHECK(net->conv->left_float());
  const at::Tensor y = at::conv2d(x, net->conv->weight);
  for (const bool training : {false, true}) {
    net->conv->train(training);
    const auto bn = std::dynamic_pointer_cast<torch::nn::BatchNorm2dImpl>(net->conv->bn->clone());
    CHECK(at::allclose(net->conv->forward(x), bn->forward(y), 1e-4, 1e-5));
  }
}

TEST_CASE("the first and the last layer take the edge bits in one call", "[flow]") {
  const Recipe recipe = Recipe::from_name("qat-w4a4");
  Net net(recipe);
  use_edge_recipes(*net);
  CHECK(net->conv->weight_fake_quant->spec().bits == 8);
  CHECK(net->conv->input_fake_quant->spec().bits == 8);
  CHECK(net->middle->weight_fake_quant->spec().bits == 4);
  CHECK(net->head->recipe() == recipe.edge());
  CHECK(net->conv->weight_fake_quant->of_weight());
  net->forward(at::randn({4, 2, 6, 6}));
  CHECK_THAT(value_error([&] { use_edge_recipes(*net); }), Contains("before calibration and training"));
  const TemporaryFolder folder;
  save_checkpoint(folder.file("a"), *net, recipe);
  CHECK(read_checkpoint_info(folder.file("a")).layers.at("middle") == recipe);
  Net without(recipe);
  CHECK_THAT(value_error([&] { load_checkpoint(folder.file("a"), *without); }),
             Contains("the layer 'conv' with weight int4 per_channel") && Contains("got weight int8 per_channel"));
}

TEST_CASE("a checkpoint of other bits is refused, and saved only under its own recipe", "[flow]") {
  torch::manual_seed(8);
  const TemporaryFolder folder;
  const Recipe w8 = Recipe::from_name("qat-w8a8");
  const Recipe w4 = Recipe::from_name("qat-w4a8");
  Net net(w8);
  save_checkpoint(folder.file("a"), *net, w8);
  Net other(w4);
  const auto before = state(*other);
  const auto refusal = [&] { return value_error([&] { load_checkpoint(folder.file("a"), *other); }); };
  CHECK_THAT(refusal(), Contains("expected the layer 'conv' with weight int4 per_group of 32, input uint8 per_tensor, "
                                 "got weight int8 per_channel, input uint8 per_tensor"));
  SafeTensors content = read_safetensors(folder.file("a"));  // as of an earlier release
  content.metadata.erase("layer_recipes");
  std::erase_if(content.tensors, [](const auto& item) { return item.first.ends_with("observer.frozen"); });
  write_safetensors(folder.file("a"), content);
  CHECK_THAT(refusal(), Contains("got weight int8 per_channel, input uint8 per_tensor ('qat-w8a8')"));
  check_same(*other, before);
  Net same(w8);
  enable_observer(*same, false);
  load_checkpoint(folder.file("a"), *same);
  CHECK_FALSE(same->head->input_fake_quant->observer_enabled());  // the module's own switch
  CHECK_THAT(value_error([&] { save_checkpoint(folder.file("b"), *net, w4); }),
             Contains("save_checkpoint: expected the recipe of the module's layers ('conv': weight int8"));
  CHECK_THAT(value_error([&] { save_checkpoint(folder.file("b"), *torch::nn::Linear(2, 2), w8); }),
             Contains("expected no recipe for a float model"));
}

TEST_CASE("weights of a float model load into quantized layers", "[flow]") {
  torch::manual_seed(9);
  const TemporaryFolder folder;
  SafeTensors content;
  const std::map<std::string, at::Tensor> tensors = {{"conv.weight", at::randn({32, 2, 3, 3})},
                                                     {"bn.weight", at::rand({32})},
                                                     {"bn.bias", at::rand({32})},
                                                     {"bn.running_mean", at::rand({32})},
                                                     {"bn.running_var", at::rand({32})},
                                                     {"bn.num_batches_tracked", at::full({}, 7, at::kLong)},
                                                     {"middle.weight", at::randn({32, 32})},
                                                     {"middle.bias", at::randn({32})},
                                                     {"head.weight", at::randn({3, 32})},
                                                     {"head.bias", at::randn({3})}};
  content.tensors = tensors;
  write_safetensors(folder.file("float"), content);
  Net net(Recipe::from_name("qat-w4a4"));
  CHECK_THAT(value_error([&] { load_float(folder.file("float"), *net); }), Contains("none for 'conv.bn.bias'"));
  load_float(folder.file("float"), *net,
             [](const std::string& name) { return name.starts_with("conv.bn.") ? name.substr(5) : name; });
  CHECK(same_bits(net->conv->weight.detach(), tensors.at("conv.weight")));
  CHECK(net->conv->bn->num_batches_tracked.item<int64_t>() == 7);
  CHECK(net->head->input_fake_quant->scale.isnan().all().item<bool>());
}

TEST_CASE("layers print their bits", "[flow]") {
  std::ostringstream text;
  text << QuantLinear(64, 10, Recipe::from_name("qat-w4a4"));
  CHECK_THAT(text.str(),
             Catch::Matchers::StartsWith("quantrain::nn::QuantLinear(weight [10, 64] int4 per_channel (mse, learned), "
                                         "input uint4 per_tensor (mse, learned), recipe qat-w4a4)"));
}

TEST_CASE("clone copies prepared and converted layers and shares nothing", "[flow]") {
  torch::manual_seed(10);
  struct WholeImpl : torch::nn::Cloneable<WholeImpl> {
    explicit WholeImpl(Recipe recipe) : recipe(std::move(recipe)) { WholeImpl::reset(); }
    void reset() override {
      table = register_module("table", QuantEmbedding(7, 32, recipe));
      conv = register_module("conv", QuantConvBn2d(torch::nn::Conv2dOptions(1, 3, 3), recipe));
      plain = register_module("plain", QuantConv2d(torch::nn::Conv2dOptions(3, 2, 3).groups(1), recipe));
      head = register_module("head", QuantLinear(28, 3, recipe));
    }
    at::Tensor forward(const at::Tensor& index) {
      const at::Tensor x = table->forward(index).unsqueeze(1);
      return head->forward(plain->forward(conv->forward(x)).flatten(1).slice(1, 0, 28));
    }
    Recipe recipe;
    QuantEmbedding table{nullptr};
    QuantConvBn2d conv{nullptr};
    QuantConv2d plain{nullptr};
    QuantLinear head{nullptr};
  };
  const std::string name = GENERATE("qat-w8a8", "qat-w4a4", "ptq-w4a8");
  const auto model = std::make_shared<WholeImpl>(Recipe::from_name(name));
  const at::Tensor index = at::randint(0, 7, {4, 5}, at::kLong);
  model->forward(index);
  model->head->weight.requires_grad_(false);
  enable_observer(*model, false);
  model->conv->eval();
  const at::Tensor random = at::detail::getDefaultCPUGenerator().get_state();
  auto copy = std::dynamic_pointer_cast<WholeImpl>(model->clone());
  REQUIRE(copy);
  check_same(*copy, state(*model));
  CHECK_FALSE(copy->head->weight.requires_grad());
  CHECK_FALSE(copy->head->input_fake_quant->observer_enabled());
  CHECK((!copy->conv->is_training() && copy->head->is_training()));
  copy->head->weight.variable_data().zero_();
  copy->head->input_fake_quant->scale.variable_data().fill_(5);
  CHECK_FALSE(model->head->weight.eq(0).all().item<bool>());
  CHECK_FALSE(model->head->input_fake_quant->scale.eq(5).all().item<bool>());

  const auto layer = std::dynamic_pointer_cast<QuantLinearImpl>(model->head->clone());
  CHECK(at::detail::getDefaultCPUGenerator().get_state().equal(random) == false);  // reset() of the model draws
  convert(*model->head);
  const auto converted = std::dynamic_pointer_cast<QuantLinearImpl>(model->head->clone());
  CHECK(converted->converted());
  CHECK_FALSE(layer->converted());
  const at::Tensor x = at::randn({2, 28});
  CHECK(same_bits(converted->forward(x), model->head->forward(x)));
  check_same(*converted, state(*model->head));
}

TEST_CASE("clone of a layer draws no random number", "[flow]") {
  QuantLinear layer(4, 2, Recipe::from_name("qat-w8a8-token"));
  const at::Tensor before = at::detail::getDefaultCPUGenerator().get_state();
  layer->clone();
  Int8Linear(4, 2);
  torch::manual_seed(1);
  const Int8Linear trained(8, 4);
  const auto copy = std::dynamic_pointer_cast<Int8LinearImpl>(trained->clone());
  check_same(*copy, state(*trained));
  CHECK(before.defined());
}

TEST_CASE("conversion refuses a weight that is not finite", "[flow]") {
  const std::string name = GENERATE("qat-w8a8", "qat-w4a4");
  QuantLinear layer(4, 2, Recipe::from_name(name));
  layer->forward(at::randn({2, 4}));
  layer->weight.variable_data()[0][0] = std::numeric_limits<float>::quiet_NaN();
  CHECK_THAT(value_error([&] { convert(*layer); }), Contains("convert: expected finite weights in QuantLinear"));
}

TEST_CASE("converting twice says so", "[flow]") {
  QuantLinear layer(4, 2, Recipe::from_name("qat-w8a8-token"));
  convert(*layer);
  CHECK_THAT(value_error([&] { convert(*layer); }), Contains("got one converted already"));
}

// ---- fixed point ----------------------------------------------------------------------------------------------------

namespace {

FixedPointGraph adding_graph(const std::string& recipe) {
  using Conv = torch::nn::Conv2dOptions;
  FixedPointGraph g(Recipe::from_name(recipe), 3);
  const FixedPointConvArguments relu{.batch_norm = true, .relu = true};
  const FixedPointValue a = g->conv2d("a", g->input(), Conv(3, 6, 3).padding(1).bias(false), relu);
  FixedPointConvArguments like = relu;
  like.like = a;
  const FixedPointValue b = g->conv2d("b", a, Conv(6, 6, 3).padding(1).bias(false), like);
  const FixedPointValue c = g->conv2d("c", b, Conv(6, 6, 1).bias(false), relu);
  const FixedPointValue sum = g->add("add", a, b);
  const FixedPointValue d = g->conv2d("d", sum, Conv(6, 6, 3).padding(1).bias(false), relu);
  FixedPointConvArguments held = relu;
  held.residual = d;
  const FixedPointValue e = g->conv2d("e", c, Conv(6, 6, 1).bias(false), held);
  g->linear("linear", g->avg_pool2d("pool", e), 4, /*bias=*/false);
  return g;
}

}  // namespace

TEST_CASE("a graph with an addition of codes trains and converts to the same integers", "[flow]") {
  torch::manual_seed(11);
  FixedPointGraph g = adding_graph(GENERATE("f8net", "f8net-tiny"));
  const at::Tensor x = at::rand({4, 3, 8, 8});
  for (int i = 0; i < 3; ++i) {
    enable_fake_quant(*g, false);
    g->forward(x);
  }
  enable_fake_quant(*g, true);
  {
    Calibration calibration(*g);
    g->forward(x);
    CHECK(calibration.finish().empty());
  }
  g->forward(x).square().sum().backward();
  g->eval();
  const at::NoGradGuard no_grad;
  const FixedPointProgram program = g->program();
  CHECK(program.tensors.at("linear.bias").eq(0).all().item<bool>());  // a missing bias is zeros, as in Python's
  CHECK_THAT(program.graph, Contains(R"("op":"add")"));
  FixedPointNetwork network = convert(*g);
  CHECK(same_bits(network.dequantize_output(network.forward(network.quantize_input(x))), g->forward(x)));
  const auto copy = std::dynamic_pointer_cast<FixedPointGraphImpl>(g->clone());
  check_same(*copy, state(*g));
  CHECK(same_bits(copy->forward(x), g->forward(x)));
  g->train();
  copy->train();
  CHECK(same_bits(copy->forward(x), g->forward(x)));
}

TEST_CASE("a network with an addition is the one that Python makes", "[flow]") {
  const std::string data = QUANTRAIN_TEST_DATA;  // written by tests/python/samples/fixed_point_add.py
  FixedPointGraph g = adding_graph("f8net");
  load_checkpoint(data + "/fixed_point_add.safetensors", *g);
  g->eval();
  const at::NoGradGuard no_grad;
  std::map<std::string, at::Tensor> python = read_safetensors(data + "/fixed_point_add_network.safetensors").tensors;
  const at::Tensor images = python.extract("images").mapped();
  const at::Tensor logits = python.extract("logits").mapped();
  const FixedPointProgram program = g->program();
  REQUIRE(program.tensors.size() == python.size());
  for (const auto& [name, tensor] : program.tensors) {
    INFO(name);
    CHECK(same_bits(tensor, python.at(name)));
  }
  const FixedPointNetwork network = convert(*g);
  CHECK(same_bits(network.dequantize_output(network.forward(network.quantize_input(images))), logits));
}

TEST_CASE("an addition of codes in other units names both sides", "[flow]") {
  using Conv = torch::nn::Conv2dOptions;
  FixedPointGraph g(Recipe::from_name("f8net"), 3);
  const FixedPointValue a = g->conv2d("a", g->input(), Conv(3, 6, 1), {.relu = true});
  const FixedPointValue b = g->conv2d("b", g->input(), Conv(3, 6, 1), {.relu = true});
  CHECK_THAT(value_error([&] { g->add("sum", a, b); }), Contains("codes in the same units") && Contains("like"));
  CHECK_THAT(value_error([&] { g->add("sum", a, g->input()); }), Contains("6 channels, got 3 of 'input'"));
}

TEST_CASE("a fixed-point calibration that fails changes nothing, and a NaN weight does not convert", "[flow]") {
  torch::manual_seed(12);
  FixedPointGraph g = adding_graph("f8net");
  const at::Tensor x = at::rand({2, 3, 6, 6});
  enable_fake_quant(*g, false);
  g->forward(x);
  enable_fake_quant(*g, true);
  for (int round = 0; round < 2; ++round) {
    const auto before = state(*g);
    CHECK(!value_error([&] {
             const Calibration calibration(*g);
             g->forward(2 * x);
             g->forward(x * NAN);
           }).empty());
    check_same(*g, before);
    Calibration calibration(*g);
    g->forward(x);
    calibration.finish();
  }
  g->eval();
  for (auto& item : g->named_parameters()) {
    if (item.key() == "a.weight") item.value().variable_data()[0][0][0][0] = NAN;
  }
  CHECK_THAT(value_error([&] { g->program(); }), Contains("convert: 'a': expected finite weights"));
}
