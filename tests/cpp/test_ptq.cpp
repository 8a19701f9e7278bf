// Layers of scheme ptq: calibration, conversion, files, clones; outlier products and GPTQ against the float product.

#include "support.h"

#include <string>

#include <ATen/ATen.h>
#include <torch/nn/modules/container/sequential.h>

namespace qnn = quantrain::nn;

namespace {

at::Tensor rows_with_outliers(int64_t rows = 128, int64_t columns = 64) {
  at::Tensor x = at::randn({rows, columns});
  x.select(1, 3).mul_(50);
  return x;
}

double error(const at::Tensor& found, const at::Tensor& exact) {
  return ((found - exact).norm() / exact.norm()).item<double>();
}

}  // namespace

TEST_CASE("layers of scheme ptq calibrate, convert and load each other's files", "[ptq]") {
  at::manual_seed(3);
  const at::Tensor x = rows_with_outliers();
  const support::TemporaryFolder folder;
  for (const std::string name : {"zeroquant-w8a8", "llm-int8", "llm-int8-threshold", "smoothquant-w8a8",
                                 "smoothquant-w8a8-static", "gptq-w4a16", "awq-w4a16", "awq-gptq-w4a8"}) {
    CAPTURE(name);
    const qnn::Recipe recipe = qnn::Recipe::from_name(name);
    torch::nn::Sequential model(qnn::PtqLinear(64, 24, recipe));
    const auto layer = std::dynamic_pointer_cast<qnn::PtqLinearImpl>(model->ptr(0));
    const at::Tensor exact = at::linear(x, layer->weight, layer->bias).detach();
    {
      qnn::Calibration calibration(*model);
      model->forward(x);
    }
    const std::string prepared = folder.file("prepared.safetensors");
    qnn::save_checkpoint(prepared, *model, recipe);
    qnn::convert(*model);
    const at::Tensor found = model->forward(x);
    CHECK(error(found, exact) < (recipe.weight->bits == 4 ? 0.2 : 0.03));
    CHECK(error(at::linear(x, layer->dequantized_weight(), layer->bias), exact) < 0.2);

    // The statistics travel: another program converts to the same bits.
    torch::nn::Sequential other(qnn::PtqLinear(64, 24, recipe));
    qnn::load_checkpoint(prepared, *other);
    qnn::convert(*other);
    CHECK(at::equal(other->forward(x), found));

    const std::string converted = folder.file("converted.safetensors");
    qnn::save_checkpoint(converted, *model, recipe);
    torch::nn::Sequential skeleton(qnn::PtqLinear(64, 24, recipe));
    qnn::convert(*skeleton, /*check_observed=*/false);
    qnn::load_checkpoint(converted, *skeleton);
    CHECK(at::equal(skeleton->forward(x), found));
    const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(skeleton->clone());
    CHECK(at::equal(copy->forward(x), found));
  }
}

TEST_CASE("a PtqLinear that was not calibrated does not convert", "[ptq]") {
  torch::nn::Sequential model(qnn::PtqLinear(8, 4, qnn::Recipe::from_name("llm-int8")));
  CHECK_THROWS_WITH(qnn::convert(*model), Catch::Contains("to be calibrated"));
  CHECK_THROWS_WITH(qnn::PtqLinear(8, 4, qnn::Recipe::from_name("nf4")), Catch::Contains("got 'nf4'"));
  CHECK_THROWS_WITH(qnn::PtqLinear(8, 4, qnn::Recipe::from_name("kv-int8")), Catch::Contains("got 'kv-int8'"));
}

TEST_CASE("outlier columns at 15 bits", "[ptq]") {
  at::manual_seed(4);
  const at::Tensor x = rows_with_outliers(), columns = at::tensor({3}, at::kInt);
  const quantrain::Int8Codes w = quantrain::int8_quantize_rows(at::randn({24, 64}));
  const at::Tensor weight = w.codes.to(at::kFloat) * w.scale;
  const quantrain::Int8OutlierCodes a = quantrain::int8_quantize_rows_outliers(x, columns);
  const at::Tensor apart = w.codes.index_select(1, columns.to(at::kLong));
  const at::Tensor y = quantrain::int8_mm_outliers(a.codes, a.planes, a.scale, w.codes, apart, w.scale);
  CHECK(error(y, at::matmul(x, weight.t())) < 0.01);
  const quantrain::Int8Codes plain = quantrain::int8_quantize_rows(x);
  CHECK(error(y, at::matmul(x, weight.t())) <
        0.5 * error(quantrain::int8_mm(plain.codes, w.codes, plain.scale, w.scale), at::matmul(x, weight.t())));
}

TEST_CASE("GPTQ makes up for rounding", "[ptq]") {
  at::manual_seed(5);
  const at::Tensor x = at::matmul(at::randn({256, 32}), at::randn({32, 32})), w = at::randn({16, 32});
  const at::Tensor hessian = at::matmul(x.t(), x) * (2.0 / 256);
  const quantrain::ColumnGrid grid = quantrain::absmax_grid(w, 4, 16);
  const auto off = [&](const at::Tensor& codes) {
    const at::Tensor d = w - quantrain::decode_columns(codes, grid);
    return (at::matmul(d, hessian) * d).sum().item<double>();
  };
  CHECK(off(quantrain::gptq_round(w, hessian, grid).codes) < 0.7 * off(quantrain::round_columns(w, grid)));
}

TEST_CASE("scales of two levels are multiples of one per row", "[ptq]") {
  at::manual_seed(6);
  qnn::Recipe recipe = qnn::Recipe::from_name("zeroquant-w4a8");
  recipe.scheme_as<qnn::PtqSpec>()->group_scales = "two_level";
  recipe.weight->group_size = 32;
  const at::Tensor w = at::randn({12, 128}) * at::rand({12, 4}).repeat_interleave(32, 1);
  const at::Tensor scale = qnn::ptq_weight(w, recipe, {}).weight.scale;
  const at::Tensor multiple = scale / at::amax(scale, {1}, /*keepdim=*/true) * 15;
  CHECK((multiple - multiple.round()).abs().max().item<double>() < 1e-5);
  CHECK(multiple.min().item<double>() > 0.99);
}

TEST_CASE("statistics begin anew, and what calibration began with comes back where it fails", "[ptq]") {
  qnn::ColumnObserver observer(4, /*with_hessian=*/true);
  for (const bool keep : {false, true, false}) {
    const at::Tensor before = observer->hessian.clone();
    observer->begin_calibration();
    observer->observe(at::ones({3, 4}));
    observer->end_calibration(keep);
    CHECK(at::equal(observer->hessian, keep ? at::full({4, 4}, 2.0f) : before));
    CHECK(observer->rows.item<int64_t>() == (keep || before.any().item<bool>() ? 3 : 0));
  }
}
