// A packed weight between a forward and a backward pass, and what else a node of the four_bit family saves.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <string>
#include <string_view>

#include "ops/four_bit_check.h"

namespace quantrain {

class FourBitKept {
 public:
  static void save(torch::autograd::AutogradContext* ctx, const PackedWeight& w, std::string_view method,
                   const torch::autograd::variable_list& others = {}) {
    const auto or_undefined = [](const std::optional<at::Tensor>& tensor) { return tensor ? *tensor : at::Tensor(); };
    torch::autograd::variable_list tensors{w.codes,
                                           w.scale,
                                           or_undefined(w.zero_point),
                                           or_undefined(w.scale_scale),
                                           or_undefined(w.scale_offset),
                                           or_undefined(w.table)};
    tensors.insert(tensors.end(), others.begin(), others.end());
    ctx->save_for_backward(std::move(tensors));
    ctx->saved_data["format"] = std::string(w.format);
    ctx->saved_data["method"] = std::string(method);
  }

  explicit FourBitKept(torch::autograd::AutogradContext* ctx)
      : method(ctx->saved_data["method"].toStringRef()),
        tensors_(ctx->get_saved_variables()),
        format_(ctx->saved_data["format"].toStringRef()) {}

  PackedWeight weight() const {
    const auto or_none = [](const at::Tensor& tensor) {
      return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
    };
    return {tensors_[0],          tensors_[1], or_none(tensors_[2]), or_none(tensors_[3]),
            or_none(tensors_[4]), format_,     or_none(tensors_[5])};
  }

  const at::Tensor& others(size_t index) const { return tensors_[6 + index]; }

  const std::string method;

 private:
  torch::autograd::variable_list tensors_;
  std::string format_;
};

}  // namespace quantrain
