// Linear4bit, LoraLinear and Embedding4bit: against the operators, through conversion, files, clones and training.

#include "support.h"

#include <map>
#include <string>
#include <vector>

#include <ATen/ops/embedding.h>
#include <ATen/ops/linear.h>
#include <torch/nn/modules/container/functional.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adamw.h>

using Catch::Matchers::Contains;
using support::same_bits;
using support::TemporaryFolder;
using support::value_error;
using namespace quantrain::nn;

namespace {

Recipe lora(int64_t rank, double alpha = 16, double dropout = 0) {
  Recipe recipe = Recipe::from_name("qlora");
  auto& spec = *recipe.scheme_as<FourBitSpec>();
  spec.lora_rank = rank;
  spec.lora_alpha = alpha;
  spec.lora_dropout = dropout;
  return recipe;
}

struct NetImpl : torch::nn::Module {
  explicit NetImpl(const Recipe& recipe = lora(4)) {
    torch::manual_seed(0);
    table = register_module("table", Embedding4bit(16, 64, recipe));
    up = register_module("up", LoraLinear(64, 128, recipe));
    down = register_module("down", LoraLinear(torch::nn::LinearOptions(128, 64).bias(false), recipe));
    head = register_module("head", torch::nn::Linear(64, 5));
  }
  at::Tensor forward(const at::Tensor& ids) { return head(down(at::gelu(up(table(ids))))); }

  Embedding4bit table{nullptr};
  LoraLinear up{nullptr}, down{nullptr};
  torch::nn::Linear head{nullptr};
};
TORCH_MODULE(Net);

void draw_lora(const torch::nn::Module& module) {
  const at::NoGradGuard no_grad;
  for (const at::Tensor& parameter : lora_parameters(module)) at::Tensor(parameter).normal_(0, 0.1);
}

}  // namespace

TEST_CASE("a packed layer gives what its decoded weight gives", "[four_bit_layers]") {
  for (const char* name : {"nf4", "nf4-dq", "fp4", "int4-g128", "int4-g64-affine"}) {
    for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{8, 128}, {65, 63}, {1, 3420}}) {
      INFO(name << ' ' << n << ' ' << k);
      torch::manual_seed(1);
      Linear4bit layer(k, n, Recipe::from_name(name));
      const at::Tensor exact = layer->weight.detach().clone(), x = at::randn({3, k});
      REQUIRE(at::equal(layer->forward(x), at::linear(x, layer->weight, layer->bias)));  // a float layer until then
      convert(*layer);
      REQUIRE_FALSE(layer->weight.defined());
      REQUIRE(layer->parameters().empty());
      const FourBitWeight packed = pack_four_bit(exact, Recipe::from_name(name));
      REQUIRE(same_bits(layer->weight_codes, packed.codes));
      REQUIRE(same_bits(layer->weight_scale, packed.scale));
      REQUIRE(same_bits(layer->dequantized_weight(), dequantized(packed)));
      const at::Tensor want = at::linear(x, layer->dequantized_weight(), layer->bias);
      REQUIRE(at::allclose(layer->forward(x), want, 1e-4, 1e-5));
      REQUIRE(value_error([&] { convert(*layer); }).find("converted already") != std::string::npos);
    }
  }
}

TEST_CASE("only LoRA trains, and learns", "[four_bit_layers]") {
  Net net;
  convert(*net);
  const std::vector<at::Tensor> parameters = freeze_but_lora(*net);
  REQUIRE(parameters.size() == 4);
  net->train();
  const at::Tensor ids = at::arange(16).reshape({2, 8}), want = at::randn({2, 8, 5});
  const at::Tensor codes = net->up->weight_codes.clone();
  torch::optim::AdamW optimizer(parameters, torch::optim::AdamWOptions(1e-2));
  double first = 0, last = 0;
  for (int step = 0; step < 60; ++step) {
    optimizer.zero_grad();
    const at::Tensor loss = (net(ids) - want).square().mean();
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
  }
  REQUIRE(last < 0.8 * first);
  REQUIRE(same_bits(net->up->weight_codes, codes));
  REQUIRE_FALSE(net->head->weight.grad().defined());
}

TEST_CASE("LoRA adds its product, scaled", "[four_bit_layers]") {
  torch::manual_seed(2);
  LoraLinear layer(64, 24, lora(8, 32));
  draw_lora(*layer);
  const at::Tensor x = at::randn({5, 64});
  const auto expected = [&](const at::Tensor& weight) {
    return at::linear(x, weight, layer->bias) + 4.0 * at::linear(at::linear(x, layer->lora_a), layer->lora_b);
  };
  REQUIRE(at::allclose(layer->forward(x), expected(layer->weight), 1e-4, 1e-5));
  convert(*layer);
  REQUIRE(at::allclose(layer->forward(x), expected(layer->dequantized_weight()), 1e-4, 1e-5));
  const MergedWeight merged = layer->merged_weight(at::kBFloat16);
  REQUIRE(merged.weight_error > 0);
  REQUIRE(merged.weight_error < 1.0 / 256);
  REQUIRE(merged.update_error > merged.weight_error);
  REQUIRE(
      at::allclose(at::linear(x, layer->merged_weight(at::kFloat).weight, layer->bias), layer->forward(x), 1e-4, 1e-4));
  layer->enable_lora(false);
  REQUIRE(at::allclose(layer->forward(x), at::linear(x, layer->dequantized_weight(), layer->bias), 1e-4, 1e-5));
}

TEST_CASE("a table decodes the rows asked for", "[four_bit_layers]") {
  Embedding4bit table(10, 64, Recipe::from_name("nf4-dq"));
  convert(*table);
  REQUIRE(table->weight_scale.scalar_type() == at::kFloat);  // never compressed
  const at::Tensor ids = at::tensor({3, 1, 3, 9}).reshape({2, 2});
  REQUIRE(same_bits(table(ids), at::embedding(table->dequantized_weight(), ids)));
  REQUIRE_THROWS_WITH(Embedding4bit(10, 63), Contains("whole blocks of 64, got 63"));
}

TEST_CASE("clones and files hold the same", "[four_bit_layers]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("net.safetensors");
  for (const bool bfloat16 : {false, true}) {
    Recipe recipe = lora(4);
    recipe.scheme_as<FourBitSpec>()->storage = bfloat16 ? PackedStorage::kBfloat16 : PackedStorage::kUint8;
    recipe.weight->group_size = 32;
    Net net(recipe);
    draw_lora(*net);
    convert(*net);
    REQUIRE((net->up->weight_codes.scalar_type() == at::kBFloat16) == bfloat16);
    const at::Tensor ids = at::arange(8), y = net(ids);
    const at::Tensor rows = net->table(ids);
    REQUIRE(same_bits(std::dynamic_pointer_cast<Embedding4bitImpl>(net->table->clone())->forward(ids), rows));
    REQUIRE(same_bits(std::dynamic_pointer_cast<LoraLinearImpl>(net->up->clone())->forward(rows), net->up(rows)));
    save_checkpoint(path, *net, recipe);
    Net other(recipe);
    convert(*other, /*check_observed=*/false);
    load_checkpoint(path, *other);
    REQUIRE(same_bits(other(ids), y));
  }
  Net fp4([] {
    Recipe recipe = lora(4);
    recipe.weight->format = Format::kFp4;
    recipe.weight->group_size = 32;
    return recipe;
  }());
  convert(*fp4);
  REQUIRE_THROWS_WITH(load_checkpoint(path, *fp4), Contains("weight fp4 per_group of 32") && Contains("nf4"));
}

TEST_CASE("adapters and merged weights go through files", "[four_bit_layers]") {
  const TemporaryFolder folder;
  Net net;
  convert(*net);
  freeze_but_lora(*net);
  draw_lora(*net);
  const at::Tensor ids = at::arange(8), y = net(ids);
  save_lora_adapter(folder.file("adapter"), lora_adapter(*net));
  Net other;
  convert(*other);
  set_lora_adapter(*other, load_lora_adapter(folder.file("adapter")));
  REQUIRE(same_bits(other(ids), y));
  Net wrong(lora(5));
  REQUIRE_THROWS_WITH(set_lora_adapter(*wrong, load_lora_adapter(folder.file("adapter"))),
                      Contains("of shape [5, 128], got [4, 128]"));
  Net scaled(lora(4, 8));
  REQUIRE_THROWS_WITH(set_lora_adapter(*scaled, load_lora_adapter(folder.file("adapter"))),
                      Contains("scaling 4 at 'down' (lora_alpha of 16 in the recipe), got 2"));

  const MergedModel merged = merged_model(*net, at::kFloat);
  REQUIRE(merged.tensors.size() == 6);  // three weights, the bias of one, the head's two
  REQUIRE(merged.layers.size() == 3);
  torch::nn::Sequential plain(
      torch::nn::Linear(64, 128), torch::nn::Functional([](const at::Tensor& x) { return at::gelu(x); }),
      torch::nn::Linear(torch::nn::LinearOptions(128, 64).bias(false)), torch::nn::Linear(64, 5));
  std::map<std::string, at::Tensor> names;
  for (const auto& [to, from] : std::map<std::string, std::string>{{"0.weight", "up.weight"},
                                                                   {"0.bias", "up.bias"},
                                                                   {"2.weight", "down.weight"},
                                                                   {"3.weight", "head.weight"},
                                                                   {"3.bias", "head.bias"}}) {
    names[to] = merged.tensors.at(from);
  }
  load_tensors(names, *plain, "merged");
  REQUIRE(at::allclose(plain->forward(net->table(ids)), y, 1e-4, 1e-5));
}

TEST_CASE("a weight of another library's file becomes a layer", "[four_bit_layers]") {
  torch::manual_seed(4);
  Recipe recipe = Recipe::from_name("int4-g128");
  recipe.weight->group_size = 32;
  FourBitWeight weight = pack_four_bit(at::randn({16, 128}), recipe);
  weight.permutation = at::randperm(128, at::kLong);
  REQUIRE(recipe_of(weight).weight == recipe.weight);
  Linear4bit layer(torch::nn::LinearOptions(128, 16).bias(false), recipe_of(weight));
  layer->load_packed(weight);
  const at::Tensor x = at::randn({3, 128});
  REQUIRE(same_bits(layer->dequantized_weight(), dequantized(weight)));
  REQUIRE(at::allclose(layer->forward(x), at::linear(x, layer->dequantized_weight()), 1e-4, 1e-5));
  REQUIRE(same_bits(std::dynamic_pointer_cast<Linear4bitImpl>(layer->clone())->forward(x), layer->forward(x)));
  Linear4bit other(torch::nn::LinearOptions(128, 16).bias(false));
  REQUIRE_THROWS_WITH(other->load_packed(weight), Contains("format nf4 in blocks of 64") && Contains("got int4"));
  Linear4bit small(torch::nn::LinearOptions(64, 16).bias(false), recipe);
  REQUIRE_THROWS_WITH(small->load_packed(weight), Contains("a weight [16, 64], got [16, 128]"));
}

TEST_CASE("what four bits are not for is refused", "[four_bit_layers]") {
  REQUIRE_THROWS_WITH(Linear4bit(64, 8, Recipe::from_name("qat-w8a8")), Contains("scheme four_bit"));
  REQUIRE_THROWS_WITH(QuantLinear(64, 8, Recipe::from_name("nf4")), Contains("without packed weights of 4 bits"));
  REQUIRE_THROWS_WITH(LoraLinear(64, 8, Recipe::from_name("nf4")), Contains("lora_rank of at least 1"));
  REQUIRE_THROWS_WITH(freeze_but_lora(*torch::nn::Linear(2, 2)), Contains("a LoraLinear, got none"));
  Linear4bit layer(64, 8);
  {
    const at::NoGradGuard no_grad;
    layer->weight[0][0] = std::nan("");
  }
  REQUIRE_THROWS_WITH(convert(*layer), Contains("expected finite weights"));
  REQUIRE_FALSE(layer->converted());
}

TEST_CASE("weights of 8 bits with inputs as they come", "[four_bit_layers]") {
  torch::manual_seed(5);
  QuantLinear layer(70, 9, Recipe::from_name("w8a16"));
  for (const int64_t rows : {1, 40}) {
    const at::Tensor x = at::randn({rows, 70});
    if (!layer->converted()) {
      const at::Tensor simulated = layer->forward(x);
      convert(*layer);
      REQUIRE(at::allclose(layer->forward(x), simulated, 1e-5, 1e-6));
    }
    REQUIRE(at::allclose(layer->forward(x), at::linear(x, layer->dequantized_weight(), layer->bias), 1e-5, 1e-6));
  }
}

TEST_CASE("packed layers run on a GPU as on the CPU", "[four_bit_layers][cuda]") {
  if (!support::has_cuda()) return;
  Net net;
  draw_lora(*net);
  convert(*net);
  const at::Tensor ids = at::arange(8), y = net(ids);
  net->to(at::kCUDA);
  REQUIRE(at::allclose(net(ids.to(at::kCUDA)).cpu(), y, 1e-3, 1e-4));
}
