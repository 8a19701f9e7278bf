// Trains a fake-quantized layer against the installed package, in a process without Python. Returns 0 where the loss
// fell.
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>

#include <ATen/Functions.h>
#include <quantrain/quantrain.h>
#include <torch/optim/sgd.h>
#include <torch/utils.h>

namespace {

bool python_is_loaded() {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find("libpython") != std::string::npos || line.find("libtorch_python") != std::string::npos) return true;
  }
  return false;
}

}  // namespace

int main() {
  torch::manual_seed(0);
  quantrain::nn::QuantLinear layer(16, 4, quantrain::nn::Recipe::from_name("qat-w8a8"));
  torch::optim::SGD optimizer(layer->parameters(), torch::optim::SGDOptions(0.1));
  const at::Tensor x = at::randn({64, 16});
  const at::Tensor target = at::randn({64, 4});
  const auto loss_of = [&] { return (layer->forward(x) - target).square().mean(); };
  const double before = loss_of().item<double>();
  for (int step = 0; step < 10; ++step) {
    const at::Tensor loss = loss_of();
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
  }
  const double after = loss_of().item<double>();

  layer->eval();
  const at::Tensor trained = layer->forward(x);
  quantrain::nn::convert(*layer);
  const bool same = layer->forward(x).equal(trained.detach());
  std::printf("loss before %.4f, after %.4f; integer weights give the same output: %s; Python in the process: %s\n",
              before, after, same ? "yes" : "no", python_is_loaded() ? "yes" : "no");
  return after < before && same && !python_is_loaded() ? 0 : 1;
}
