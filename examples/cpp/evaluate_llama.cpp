// What few-bit weights cost a Llama model: perplexity, and against the float model the divergence of its predictions.
// Also the ids that it generates, with int8 keys and values.
// `evaluate_llama --help` lists the flags.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/zeros.h>
#include <quantrain/nn/captured.h>
#include <quantrain/nn/lora_adapter.h>
#include <torch/cuda.h>

#include "llama_folder.h"
#include "llama_options.h"

namespace {

namespace qnn = quantrain::nn;

constexpr const char* kHelp = R"(evaluate_llama --model FOLDER --ids FILE [flags]

Perplexity of a Llama model on windows of ids, whose first id alone is not predicted, for the weights of each recipe.
Lines that begin with # say how it ran.

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
  --separate             layers of scheme ptq one by one; else a block of them is one call where they can be joined
  --generate N           the N likeliest ids after the first window, and how fast: of recipes of scheme ptq whose blocks
                         are all one call, with int8 keys and values; on a GPU a step is a CUDA graph (0)
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
  bool separate = false;
  int64_t generate = 0;
  std::string log;
};

Options parse(int argc, char** argv) {
  using example::detail::check_one_of;
  example::detail::Flags flags(argc, argv, {"help", "separate"});
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
  options.separate = flags.take("separate");
  flags.take<int64_t>("generate", options.generate, 0);
  if (options.separate && options.generate > 0) example::detail::fail("--generate without --separate", "both");
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

// Lets blocks of scheme ptq run as one call each, and says which do.
void fuse(const std::string& name, example::Llama& model, const Options& options) {
  const auto of_ptq = [](const auto& module) {
    return dynamic_cast<const qnn::PtqLinearImpl*>(module.get()) != nullptr;
  };
  const auto modules = model->modules();
  const bool any = std::any_of(modules.begin(), modules.end(), of_ptq);
  const example::Fusion fusion = any && !options.separate ? model->fuse() : example::Fusion{};
  const auto layers = static_cast<long long>(model->config().layers), fused = static_cast<long long>(fusion.fused);
  if (options.generate > 0 && fused < layers) {
    const std::string why = any ? fusion.separate.begin()->first : "no layer is of scheme ptq";
    example::detail::fail("--generate with blocks that are one call each",
                          std::to_string(fused) + " of " + std::to_string(layers) + " in '" + name + "': " + why);
  }
  if (any) std::printf("# %s: %lld of %lld blocks as one call each\n", name.c_str(), fused, layers);
  for (const auto& [reason, blocks] : fusion.separate) {
    std::printf("# %s: %lld layer by layer: %s\n", name.c_str(), static_cast<long long>(blocks), reason.c_str());
  }
}

struct Generated {
  std::vector<int64_t> ids;
  double per_second = 0;  // of the steps after the first id; 0: there were none
};

// The `count` likeliest ids after prompt, int64 [1, T], each given those before.
Generated generate(example::Llama& model, const at::Tensor& prompt, int64_t count) {
  const at::NoGradGuard no_grad;
  const auto synchronize = [&] {
    if (prompt.is_cuda()) torch::cuda::synchronize(prompt.device().index());
  };
  example::LlamaCache cache = model->empty_cache(1, prompt.size(1) + count);
  const auto likeliest = [&](const std::vector<at::Tensor>& inputs) {  // ids [1, T] and position [1] -> [1, 1]
    return model->forward(inputs[0], cache, inputs[1]).argmax(-1, /*keepdim=*/true);
  };
  at::Tensor position = at::zeros({1}, prompt.options());
  std::vector<at::Tensor> found{likeliest({prompt, position})};
  position = position + prompt.size(1);
  qnn::Captured step(likeliest);
  // The graph is captured before the clock starts. A step that is run twice writes what stands there already.
  if (count > 1) step({found.back(), position});
  synchronize();
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 1; i < count; ++i) {
    found.push_back(step({found.back(), position}).clone());
    position = position + 1;
  }
  synchronize();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const at::Tensor ids = at::cat(found, 1).to(at::kCPU).contiguous();
  const auto* first = ids.const_data_ptr<int64_t>();
  return {{first, first + count}, count > 1 ? static_cast<double>(count - 1) / seconds : 0};
}

void report(const Generated& generated, nlohmann::ordered_json& line) {
  std::printf("ids");
  for (const int64_t id : generated.ids) std::printf(" %lld", static_cast<long long>(id));
  std::printf("\n");
  line["ids"] = generated.ids;
  if (generated.per_second == 0) return;
  std::printf("# %.1f tokens per second after the prompt's\n", generated.per_second);
  line["tokens_per_second"] = generated.per_second;
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
  if (options.generate > config.context - options.length) {
    example::detail::fail(
        "--length and --generate of at most the model's context " + std::to_string(config.context) + " together",
        std::to_string(options.length) + " and " + std::to_string(options.generate));
  }
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
    fuse(name, model, options);
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
    if (options.generate > 0) {
      report(generate(model, windows.slice(0, 0, 1).to(options.source.place()), options.generate), line);
    }
    std::fflush(stdout);
    log.write(line);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return example::told_in_a_line("evaluate_llama", [&] { return run(argc, argv); });
}
