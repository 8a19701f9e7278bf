// A scheme from outside the library, which proves that one needs a file in each language and no change anywhere else:
// weights of linear layers are -a, 0 or a, one a per output channel (ternary weight networks, Li et al.,
// arXiv:1605.04711, eq. 5 and 6, with the threshold at a / 2 that rounding gives).
#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <quantrain/nn/recipe.h>

namespace {

using namespace quantrain::nn;

struct TernarySpec : SchemeOf<TernarySpec> {
  double threshold = 0.7;  // of the mean magnitude: weights above it make a

  static constexpr const char* kKind = "ternary";
  static constexpr const char* kTypeName = "TernarySpec";
  template <typename Self, typename Visitor>
  static void fields(Self& self, Visitor&& visit) {
    visit("threshold", self.threshold);
  }

  void validate() const override {
    if (!(threshold > 0 && threshold < 1)) throw std::invalid_argument("TernarySpec: expected threshold in (0, 1)");
  }
  void check_layer(const std::string& layer, const Recipe& /*recipe*/) const override {
    TORCH_CHECK_VALUE(layer == "QuantLinear", layer, ": expected a recipe of another scheme than ternary, got one");
  }
  void check_recipe(const Recipe& recipe) const override {
    if (!recipe.weight || !recipe.weight->symmetric || recipe.weight->learnable || recipe.weight->bits != 2) {
      throw std::invalid_argument("Recipe: expected symmetric weights of 2 bits without a learned scale for ternary");
    }
  }
  bool linear_only() const override { return true; }
  bool has_weight_rule() const override { return true; }
  WeightQparams weight_qparams(const at::Tensor& weight) const override {
    const at::Tensor magnitude = weight.abs().to(at::kFloat);
    const at::Tensor large = magnitude > threshold * magnitude.mean(1, /*keepdim=*/true);
    const at::Tensor sum = (magnitude * large).sum(1, true);
    return {at::clamp_min(sum / large.sum(1, true).clamp_min(1), 1e-8), {}, -1, 1};
  }
};

const bool registered = [] {
  register_scheme({TernarySpec::kKind, [] { return std::make_unique<TernarySpec>(); },
                   [] {
                     QuantSpec weight;
                     weight.bits = 2;
                     weight.granularity = Granularity::kPerChannel;
                     weight.observer = ObserverKind::kDynamic;
                     Recipe recipe;
                     recipe.name = "ternary-w2";
                     recipe.weight = weight;
                     recipe.scheme = TernarySpec();
                     return std::vector<Recipe>{recipe};
                   }});
  return true;
}();

}  // namespace
