// The README's C++ example; tests/python/house/test_docs.py compares the two, and what this prints.
#include <iostream>

#include <quantrain/quantrain.h>
#include <torch/all.h>

int main() {
  auto x = torch::tensor({{0.1f, -0.4f, 1.3f, 2.0f}, {10.0f, -20.0f, 5.0f, 0.5f}}).requires_grad_();
  auto [scale, zero_point] = quantrain::choose_qparams(x.detach(), {2, 1}, /*quant_min=*/-8, /*quant_max=*/7);
  auto y = quantrain::fake_quantize(x, scale, /*zero_point=*/{}, -8, 7);
  y.square().sum().backward();
  std::cout << y << "\n" << x.grad() << "\n";
}
