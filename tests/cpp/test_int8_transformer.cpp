// A block as one call against its layers one by one; keys and values; captured functions.

#include "support.h"

#include <ATen/ATen.h>

namespace {

namespace nn = quantrain::nn;

nn::PtqLinear converted(int64_t in, int64_t out, const char* recipe) {
  nn::PtqLinear layer(in, out, nn::Recipe::from_name(recipe));
  if (layer->input_observer) {
    nn::Calibration calibration(*layer);
    layer->forward(at::arange(64 * in, at::kFloat).sin().view({64, in}));  // the same for layers of one input
  }
  layer->convert_();
  return layer;
}

double error(const at::Tensor& found, const at::Tensor& exact) {
  return ((found - exact).norm() / exact.norm()).item<double>();
}

struct Block {
  explicit Block(const char* recipe, bool pre_norm)
      : query(converted(kWidth, kWidth, recipe)),
        key(converted(kWidth, kWidth, recipe)),
        value(converted(kWidth, kWidth, recipe)),
        out(converted(kWidth, kWidth, recipe)),
        up(converted(kWidth, kGrown, recipe)),
        down(converted(kGrown, kWidth, recipe)) {
    options.heads = kHeads;
    options.pre_norm = pre_norm;
    options.product = nn::int8_product_options(nn::Recipe::from_name(recipe));
  }

  static constexpr int64_t kWidth = 48, kGrown = 96, kHeads = 4;

  at::Tensor separate(const at::Tensor& x) {
    const at::Tensor first = options.pre_norm ? norm(x) : x;
    const auto heads = [&](const at::Tensor& y) { return y.view({x.size(0), x.size(1), kHeads, -1}).transpose(1, 2); };
    const at::Tensor y = at::scaled_dot_product_attention(heads(query->forward(first)), heads(key->forward(first)),
                                                          heads(value->forward(first)));
    const at::Tensor sum = x + out->forward(y.transpose(1, 2).flatten(2));
    const at::Tensor middle = options.pre_norm ? sum : norm(sum);
    const at::Tensor last = middle + down->forward(at::gelu(up->forward(options.pre_norm ? norm(middle) : middle)));
    return options.pre_norm ? last : norm(last);
  }

  static at::Tensor norm(const at::Tensor& x) { return at::layer_norm(x, {kWidth}); }

  quantrain::Int8TransformerWeights weights() {
    return {nn::int8_transformer_product({query.ptr(), key.ptr(), value.ptr()}),
            nn::int8_transformer_product({out.ptr()}),
            nn::int8_transformer_product({up.ptr()}),
            nn::int8_transformer_product({down.ptr()}),
            {},
            {}};
  }

  nn::PtqLinear query, key, value, out, up, down;
  quantrain::Int8TransformerOptions options;
};

}  // namespace

TEST_CASE("a block as one call is near its layers", "[int8_transformer]") {
  const at::NoGradGuard no_grad;
  at::manual_seed(0);
  for (const char* recipe : {"zeroquant-w8a8", "llm-int8", "zeroquant-w4a8"}) {
    for (const bool pre_norm : {false, true}) {
      Block block(recipe, pre_norm);
      const at::Tensor x = at::randn({2, 40, Block::kWidth});
      const at::Tensor exact = block.separate(x);
      nn::Int8TransformerLayer layer(block.weights(), block.options);
      const auto result = layer->forward(x);
      CHECK(error(result.output - x, exact - x) < 0.02);
      // The layers' codes lie in the product's memory now, and give what they gave.
      CHECK(block.query->weight_codes.storage().data() == block.key->weight_codes.storage().data());
      CHECK(at::equal(block.separate(x), exact));
      if (result.codes) {
        quantrain::Int8TransformerInputs next;
        next.codes = result.codes;
        CHECK(error(layer->forward(result.output, next).output, layer->forward(result.output).output) < 1e-3);
      }
    }
  }
}

TEST_CASE("a block refuses layers that do not fit", "[int8_transformer]") {
  nn::PtqLinear wide(48, 48, nn::Recipe::from_name("zeroquant-w8a8"));
  CHECK_THROWS_WITH(nn::int8_transformer_product({wide.ptr()}),
                    Catch::Contains("expected converted layers with integer products"));
  CHECK_THROWS_WITH(nn::int8_transformer_product({}), Catch::Contains("expected at least one layer, got none"));
  CHECK_THROWS_WITH(nn::int8_transformer_product(
                        {converted(48, 48, "zeroquant-w8a8").ptr(), converted(32, 48, "zeroquant-w8a8").ptr()}),
                    Catch::Contains("expected layers of one input and one form"));
  Block block("zeroquant-w8a8", true);
  block.options.norm = "batch_norm";
  CHECK_THROWS_WITH(nn::Int8TransformerLayer(block.weights(), block.options)->forward(at::randn({1, 2, 48})),
                    Catch::Contains("expected norm layer_norm or rms_norm, got 'batch_norm'"));
}

TEST_CASE("steps with kept keys and values are near the whole", "[int8_transformer]") {
  const at::NoGradGuard no_grad;
  at::manual_seed(1);
  Block block("zeroquant-w8a8", true);
  block.options.causal = true;
  block.options.product.few_rows_float = false;
  const quantrain::Int8TransformerCall call(block.weights(), block.options);
  const at::Tensor x = at::randn({2, 12, Block::kWidth});
  const at::Tensor exact = call.layer(x).output;
  auto cache = quantrain::Int8KvCache::zeros(2, Block::kHeads, 16, 12, at::kCPU);
  at::Tensor position = at::zeros({1}, at::kLong);
  quantrain::Int8TransformerInputs inputs;
  inputs.cache = &cache;
  inputs.position = position;
  CHECK(error(call.layer(x.narrow(1, 0, 8), inputs).output, exact.narrow(1, 0, 8)) < 0.02);
  for (int64_t t = 8; t < 12; ++t) {
    position.fill_(t);
    CHECK(error(call.layer(x.narrow(1, t, 1), inputs).output, exact.narrow(1, t, 1)) < 0.02);
  }
  inputs.position.reset();
  CHECK_THROWS_WITH(call.layer(x, inputs), Catch::Contains("expected a cache with a position"));
}

TEST_CASE("captured functions run by shape", "[captured]") {
  nn::Captured doubled([](const std::vector<at::Tensor>& inputs) { return inputs[0] * 2; }, 2);
  for (const int64_t rows : {3, 5, 3, 7}) {
    const at::Tensor x = at::randn({rows, 4});
    CHECK(at::equal(doubled({x}), x * 2));
  }
  CHECK(doubled.graphs() == 0);
  CHECK_THROWS_WITH(doubled({}), Catch::Contains("expected at least one input, got none"));
  CHECK_THROWS_WITH(nn::Captured(nullptr), Catch::Contains("expected a function"));
}

TEST_CASE("captured functions are graphs on a GPU", "[captured][cuda]") {
  if (!support::has_cuda()) return;
  nn::Captured doubled([](const std::vector<at::Tensor>& inputs) { return inputs[0] * 2; }, 2);
  for (const int64_t rows : {3, 5, 3, 7, 5}) {
    const at::Tensor x = at::randn({rows, 4}, at::kCUDA);
    CHECK(at::equal(doubled({x}).clone(), x * 2));
  }
  CHECK(doubled.graphs() == 2);
}

TEST_CASE("a block on a GPU is near its layers on the CPU", "[int8_transformer][cuda]") {
  if (!support::has_cuda()) return;
  const at::NoGradGuard no_grad;
  at::manual_seed(2);
  Block block("zeroquant-w8a8", false);
  const at::Tensor x = at::randn({2, 40, Block::kWidth});
  const at::Tensor exact = block.separate(x);
  nn::Int8TransformerLayer layer(block.weights(), block.options);
  layer->to(at::kCUDA);
  const at::Tensor found = layer->forward(x.to(at::kCUDA, at::kHalf)).output.to(at::kCPU, at::kFloat);
  CHECK(error(found - x, exact - x) < 0.03);
}
