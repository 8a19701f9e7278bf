// A scheme: how a layer runs beyond rounding its tensors. One recipe has one scheme or none, so that schemes exclude
// each other by construction. Code that serves every layer (Calibration, convert, checkpoints) asks the scheme and
// knows none by name. A new scheme is a file of its own and a line in nn/schemes/table.cpp, or a call of
// register_scheme().
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "quantrain/nn/fields.h"
#include "quantrain/ops/export.h"
#include "quantrain/ops/gradient_quant.h"

namespace quantrain::nn {

struct Recipe;
class QuantModule;

// How a scheme rounds a weight, where it does not leave that to the QuantSpec.
struct QUANTRAIN_API WeightQparams {
  at::Tensor scale;       // as QuantSpec::weight_scale_shape
  at::Tensor zero_point;  // int32 of that shape, or undefined: symmetric
  int64_t quant_min = 0, quant_max = 0;
};

// How a 2-D convolution walks its input. padding: sizes, or none where padding_mode is "same" or "valid".
struct QUANTRAIN_API Conv2dArguments {
  std::vector<int64_t> stride, padding, dilation;
  std::string padding_mode;
  int64_t groups = 1;
};

class QUANTRAIN_API Scheme {
 public:
  virtual ~Scheme() = default;
  virtual std::string kind() const = 0;       // what the JSON calls it
  virtual std::string type_name() const = 0;  // of the struct, for messages
  virtual void visit(FieldVisitor& visitor) = 0;
  virtual std::unique_ptr<Scheme> clone() const = 0;

  // Throws std::invalid_argument naming the field, the rule and the value: of this struct's own fields, and of the
  // recipe that holds it.
  virtual void validate() const {}
  virtual void check_recipe(const Recipe& /*recipe*/) const {}

  // Throws c10::ValueError where a layer of that class ("QuantLinear") does not run so.
  virtual void check_layer(const std::string& /*layer*/, const Recipe& /*recipe*/) const {}

  // Whether the scheme has a rule of its own for the codes of a weight [O, ...], which weight_qparams is then; without
  // one the recipe's QuantSpec decides. Both languages' layers ask here, in training and to convert.
  virtual bool has_weight_rule() const { return false; }
  virtual WeightQparams weight_qparams(const at::Tensor& weight) const;

  // Whether layers hold the weight as packed codes of the scheme's own, which no fake-quantizer rounds.
  virtual bool packs_weight() const { return false; }

  // What a file's tensors mean beyond the specs, in words that a file and a module must agree on.
  virtual std::string stored_form() const { return ""; }

  virtual bool linear_only() const { return false; }  // only Linear layers run so

  // Whether the backward pass of a prepared layer is not the float product's. Layers then call linear and conv2d for
  // their products, which else are at::linear and at::conv2d. bias may be undefined.
  virtual bool quantizes_gradients() const { return false; }
  virtual at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) const;
  virtual at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                            const Conv2dArguments& arguments) const;
  // Where linear is fqt_linear, and conv2d fqt_conv2d: grad_input and grad_weight, with which a layer may run that
  // together with what lies around it. None: the layer calls linear or conv2d.
  virtual std::optional<std::pair<GradientQuantizer, GradientQuantizer>> linear_quantizers() const { return {}; }
  virtual std::optional<std::pair<GradientQuantizer, GradientQuantizer>> conv2d_quantizers() const { return {}; }

  // Whether converted Linear layers multiply integers: integer_linear is then what such a layer computes from its
  // unrounded input, before output_fake_quant.
  virtual bool integer_products() const { return false; }
  virtual at::Tensor integer_linear(const QuantModule& layer, const at::Tensor& input) const;

  std::string to_json() const;
  bool operator==(const Scheme& other) const;
};

// What every scheme's struct shares. `Derived` has kKind, kTypeName and fields().
template <typename Derived>
class SchemeOf : public Scheme {
 public:
  std::string kind() const override { return Derived::kKind; }
  std::string type_name() const override { return Derived::kTypeName; }
  void visit(FieldVisitor& visitor) override { Derived::fields(static_cast<Derived&>(*this), visitor); }
  std::unique_ptr<Scheme> clone() const override {
    return std::make_unique<Derived>(static_cast<const Derived&>(*this));
  }

  // Reads to_json()'s text. Throws std::invalid_argument, as QuantSpec's.
  static Derived from_json(const std::string& text);
};

// A scheme or none, with the semantics of a value: a copy of a recipe has a scheme of its own.
class QUANTRAIN_API SchemeValue {
 public:
  SchemeValue() = default;
  SchemeValue(std::unique_ptr<Scheme> scheme) : scheme_(std::move(scheme)) {}
  template <typename S>
    requires std::is_base_of_v<Scheme, S>
  SchemeValue(const S& scheme) : scheme_(scheme.clone()) {}
  SchemeValue(const SchemeValue& other) : scheme_(other ? other->clone() : nullptr) {}
  SchemeValue(SchemeValue&&) = default;
  SchemeValue& operator=(const SchemeValue& other) {
    if (this != &other) scheme_ = other ? other->clone() : nullptr;
    return *this;
  }
  SchemeValue& operator=(SchemeValue&&) = default;

  explicit operator bool() const { return scheme_ != nullptr; }
  Scheme* operator->() const { return scheme_.get(); }
  Scheme& operator*() const { return *scheme_; }
  const std::shared_ptr<Scheme>& pointer() const { return scheme_; }
  bool operator==(const SchemeValue& other) const {
    return scheme_ && other.scheme_ ? *scheme_ == *other.scheme_ : scheme_ == other.scheme_;
  }

 private:
  std::shared_ptr<Scheme> scheme_;
};

// How a scheme is known: what makes one with its defaults, and its named recipes. by_name: of names that are not
// listed. inner_type: what its optional fields are, for messages. network_format, network_reader: the format that the
// files of its converted networks name, where they are no checkpoints of modules, and what reads them.
struct QUANTRAIN_API SchemeEntry {
  std::string kind;
  std::function<std::unique_ptr<Scheme>()> make;
  std::function<std::vector<Recipe>()> recipes = nullptr;
  std::function<std::optional<Recipe>(const std::string&)> by_name = nullptr;
  std::string inner_type = "";
  std::string network_format = "";
  std::string network_reader = "";
};

// Makes a scheme from outside the library known: its recipes have names, its JSON loads. ValueError: a kind that is
// known.
QUANTRAIN_API void register_scheme(SchemeEntry entry);

// The scheme of a kind from the JSON of its fields. Throws std::invalid_argument.
QUANTRAIN_API std::unique_ptr<Scheme> make_scheme(const std::string& kind, const std::string& fields = "{}");

QUANTRAIN_API std::vector<std::string> scheme_kinds();

template <typename Derived>
Derived SchemeOf<Derived>::from_json(const std::string& text) {
  return dynamic_cast<const Derived&>(*make_scheme(Derived::kKind, text));
}

}  // namespace quantrain::nn
