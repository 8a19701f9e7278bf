// What few-bit weights cost a Llama model: perplexity, and against the float model the divergence of its predictions.
// `evaluate_llama --help` lists the flags.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/log_softmax.h>
#include <quantrain/nn/lora_adapter.h>

#include "llama_folder.h"
#include "llama_options.h"

namespace {

namespace qnn = quantrain::nn;

constexpr const char* kHelp = R"(evaluate_llama --model FOLDER --ids FILE [flags]

Perplexity of a Llama model on windows of ids, whose first id alone is not predicted, for the weights of each recipe.

)";

constexpr const char* kEvaluationHelp =
    R"(  --dtype NAME           of activations and what is not packed: float32 (default), bfloat16 or float16
evaluation
  --recipe NAME,...      of the blocks' linear layers: float, nf4, nf4-dq, fp4, int4-g128, int4-g64-affine, w8a16
                         (default: float,nf4); or of scheme ptq without calibration: zeroquant-w8a8. A folder that
                         `quantrain quantize` wrote has its own: --recipe as-is (the default there)
  --adapter FOLDER       add this adapter to weights of 4 bits
  --against float        also the mean KL divergence from the float model's predictions, in nats, and the share of places
                         where the likeliest id is the same; or the folder of that float model, where --model is none
  --length N             ids of a window (512)
  --windows N            use the first N; 0: all (0)
  --batch N              windows per forward pass (1)
  --log FILE             a JSON object per recipe
)";

const std::vector<std::string> kRecipes = {"float",           "nf4",   "nf4-dq",         "fp4",  "int4-g128",
                                           "int4-g64-affine", "w8a16", "zeroquant-w8a8", "as-is"};

struct Options {
  bool help = false;
  example::Source source;
  std::vector<std::string> recipes;
  std::string adapter;
  std::string against;
  int64_t length = 512;
  int64_t windows = 0;
  int64_t batch = 1;
  std::string log;
};

Options parse(int argc, char** argv) {
  using example::detail::check_one_of;
  example::detail::Flags flags(argc, argv, {"help"});
  Options options;
  options.help = flags.take("help");
  example::detail::take_source(flags, options.source, {"float32", "bfloat16", "float16"});
  std::string recipes;
  flags.take("recipe", recipes);
  if (recipes.empty()) recipes = example::is_quantized(options.source.model) ? "as-is" : "float,nf4";
  options.recipes = example::names_in(recipes);
  for (const std::string& name : options.recipes) check_one_of("--recipe", name, kRecipes);
  flags.take("adapter", options.adapter);
  for (const std::string& name : options.recipes) {
    if (!options.adapter.empty() &&
        (name == "float" || name == "w8a16" || name == "zeroquant-w8a8" || name == "as-is")) {
      example::detail::fail("--recipe of weights of 4 bits with --adapter", "'" + name + "'");
    }
  }
  flags.take("against", options.against);
  flags.take<int64_t>("length", options.length, 2);
  flags.take<int64_t>("windows", options.windows, 0);
  flags.take<int64_t>("batch", options.batch, 1);
  flags.take("log", options.log);
  flags.finish();
  if (!options.help) example::detail::check_source(options.source);
  return options;
}

// The recipe of that name, with LoRA as the adapter needs it.
example::BlockRecipe recipe_of(const std::string& name, const std::optional<qnn::LoraAdapter>& adapter) {
  if (name == "float") return {};
  const qnn::Recipe recipe = qnn::Recipe::from_name(name);
  return adapter ? example::recipe_for(*adapter, recipe) : example::BlockRecipe(recipe);
}

example::Llama load(const std::string& name, const std::optional<qnn::LoraAdapter>& adapter, const Options& options) {
  const example::Source& source = options.source;
  if (name == "as-is") return example::load_quantized_llama(source.model, source.type(), source.place());
  example::Llama model = example::load_llama(source.model, recipe_of(name, adapter), source.type(), source.place());
  if (adapter && name != "float") qnn::set_lora_adapter(*model, *adapter);
  return model;
}

// Sums over predictions.
struct Sums {
  double predictions = 0;
  double loss = 0;
  double divergence = 0;
  double agreeing = 0;
};

// Windows int64 [W, length]. `exact`: the model to compare with, or empty.
Sums evaluate(example::Llama& model, example::Llama& exact, const at::Tensor& windows, const Options& options) {
  const at::NoGradGuard no_grad;
  Sums sums;
  for (const at::Tensor& part : windows.split(options.batch)) {
    const at::Tensor tokens = part.to(options.source.place());
    const at::Tensor inputs = tokens.slice(1, 0, -1), targets = tokens.slice(1, 1);
    const at::Tensor ours = at::log_softmax(model->forward(inputs).to(at::kFloat), -1);
    sums.predictions += static_cast<double>(targets.numel());
    sums.loss -= ours.gather(-1, targets.unsqueeze(-1)).sum(at::kDouble).item<double>();
    if (exact.is_empty()) continue;
    const at::Tensor theirs = at::log_softmax(exact->forward(inputs).to(at::kFloat), -1);
    sums.divergence += (theirs.exp() * (theirs - ours)).sum(at::kDouble).item<double>();
    sums.agreeing += static_cast<double>(ours.argmax(-1).eq(theirs.argmax(-1)).sum().item<int64_t>());
  }
  return sums;
}

int run(int argc, char** argv) {
  const Options options = parse(argc, argv);
  if (options.help) {
    std::printf("%s%s%s", kHelp, example::kSourceHelp, kEvaluationHelp);
    return 0;
  }
  std::optional<qnn::LoraAdapter> adapter;
  if (!options.adapter.empty()) adapter = qnn::load_lora_adapter(options.adapter);
  const example::LlamaConfig config = example::config_of(options.source.model);
  example::check_length(options.length, config);
  const at::Tensor ids = example::read_ids(options.source.ids, options.source.ids_dtype, config.vocab, options.length);
  const int64_t all = ids.numel() / options.length;
  const int64_t used = options.windows > 0 ? std::min(options.windows, all) : all;
  const at::Tensor windows = ids.slice(0, 0, used * options.length).view({used, -1}).to(at::kLong);
  example::JsonLines log(options.log);
  example::Llama exact{nullptr};
  if (!options.against.empty()) {
    Options other = options;
    if (options.against != "float") other.source.model = options.against;
    exact = load("float", std::nullopt, other);
  }
  for (const std::string& name : options.recipes) {
    example::Llama model = load(name, adapter, options);
    const Sums sums = evaluate(model, exact, windows, options);
    const double perplexity = std::exp(sums.loss / sums.predictions);
    const double megabytes = 1e-6 * static_cast<double>(example::bytes_of(*model));
    nlohmann::ordered_json line = {{"recipe", name},
                                   {"perplexity", perplexity},
                                   {"predictions", static_cast<int64_t>(sums.predictions)},
                                   {"megabytes", megabytes}};
    std::printf("%-16s perplexity %.3f", name.c_str(), perplexity);
    if (!exact.is_empty()) {
      line["kl"] = sums.divergence / sums.predictions;
      line["top1"] = sums.agreeing / sums.predictions;
      std::printf("  KL %.5f  top-1 %.4f", line["kl"].get<double>(), line["top1"].get<double>());
    }
    std::printf("  %.1f MB\n", megabytes);
    std::fflush(stdout);
    log.write(line);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return example::told_in_a_line("evaluate_llama", [&] { return run(argc, argv); });
}
