// QLoRA without Python (Dettmers et al., arXiv:2305.14314): packs a Llama model's weights in 4 bits, trains low-rank
// updates beside them and saves these as a PEFT adapter. `qlora_llama --help` lists the flags.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <quantrain/nn/lora_adapter.h>
#include <quantrain/optim/adamw_8bit.h>
#include <quantrain/optim/fused_adamw.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/utils.h>

#include "llama_folder.h"
#include "llama_options.h"

namespace {

namespace qnn = quantrain::nn;
using Clock = std::chrono::steady_clock;

constexpr const char* kHelp = R"(qlora_llama --model FOLDER --ids FILE --out FOLDER [flags]

Packs the linear layers of a Llama model's blocks in 4 bits, trains low-rank updates beside them (LoRA) and saves these as an
adapter in the files of PEFT.

)";

constexpr const char* kTrainingHelp =
    R"(  --dtype NAME           of activations and what is not packed: float32 (default) or bfloat16
adapter
  --out FOLDER           where the adapter goes
  --recipe NAME          of the packed weights: qlora (default; NF4 with compressed scales), nf4, nf4-dq, fp4, int4-g128 or
                         int4-g64-affine
  --rank N, --alpha X    the update is alpha / rank B A (64, 16)
  --dropout X            share of the input that A does not see (0)
  --targets NAME,...     layers that get one, of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj (all)
  --adapter FOLDER       start from this adapter, whose rank, alpha and layers count
training
  --steps N, --batch N, --length N    steps, sequences per step, predictions per sequence (100, 4, 512)
  --lr X, --warmup N     constant after N steps of linear warm-up (2e-4, 0)
  --clip X               largest gradient norm; 0: no clipping (0.3)
  --optimizer NAME       adamw8bit (default) or adamw
  --seed N               seeds lora_a, the sequences of each step and dropout (0)
  --checkpointing        compute blocks again in the backward pass, in the memory of one
  --log FILE             a JSON object per step: step, loss, lr, grad_norm, tokens_per_second

Ctrl-C saves the adapter and stops. A second Ctrl-C stops at once.
)";

volatile std::sig_atomic_t stop_requested = 0;

struct Options {
  bool help = false;
  example::Source source;
  std::string out;
  std::string recipe = "qlora";
  int64_t rank = 0;  // 0: the recipe's, or the adapter's
  double alpha = 0;  // as rank
  double dropout = 0;
  std::set<std::string> targets;  // empty: all
  std::string adapter;
  int64_t steps = 100;
  int64_t batch = 4;
  int64_t length = 512;
  double lr = 2e-4;
  int64_t warmup = 0;
  double clip = 0.3;
  std::string optimizer = "adamw8bit";
  int64_t seed = 0;
  bool checkpointing = false;
  std::string log;
};

Options parse(int argc, char** argv) {
  using example::detail::check_one_of;
  using example::detail::fail;
  example::detail::Flags flags(argc, argv, {"help", "checkpointing"});
  Options options;
  options.help = flags.take("help");
  example::detail::take_source(flags, options.source, {"float32", "bfloat16"});
  flags.take("out", options.out);
  flags.take("recipe", options.recipe);
  check_one_of("--recipe", options.recipe, {"qlora", "nf4", "nf4-dq", "fp4", "int4-g128", "int4-g64-affine"});
  flags.take<int64_t>("rank", options.rank, 1);
  flags.take<double>("alpha", options.alpha, 0.0);
  flags.take<double>("dropout", options.dropout, 0.0);
  flags.take("adapter", options.adapter);
  std::string targets;
  flags.take("targets", targets);
  for (const std::string& name : example::names_in(targets)) {
    check_one_of("--targets", name, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"});
    options.targets.insert(name);
  }
  if (!options.adapter.empty() && (options.rank > 0 || options.alpha > 0 || !targets.empty())) {
    fail("no --rank, --alpha and --targets with --adapter, which has its own", "one");
  }
  flags.take<int64_t>("steps", options.steps, 1);
  flags.take<int64_t>("batch", options.batch, 1);
  flags.take<int64_t>("length", options.length, 1);
  flags.take<double>("lr", options.lr, 0.0);
  flags.take<int64_t>("warmup", options.warmup, 0);
  flags.take<double>("clip", options.clip, 0.0);
  flags.take("optimizer", options.optimizer);
  check_one_of("--optimizer", options.optimizer, {"adamw8bit", "adamw"});
  flags.take<int64_t>("seed", options.seed, 0);
  options.checkpointing = flags.take("checkpointing");
  flags.take("log", options.log);
  flags.finish();
  if (options.help) return options;
  example::detail::check_source(options.source);
  if (options.out.empty()) fail("--out FOLDER", "none");
  return options;
}

// The named recipe with LoRA of the options' rank, alpha, dropout and layers; of those of the adapter where there is
// one, but for the dropout.
example::BlockRecipe recipe_of(const Options& options, const std::optional<qnn::LoraAdapter>& adapter) {
  qnn::Recipe recipe = qnn::Recipe::from_name(options.recipe);
  const qnn::Recipe qlora = qnn::Recipe::from_name("qlora");
  const auto& standard = *qlora.scheme_as<qnn::FourBitSpec>();
  auto* spec = recipe.scheme_as<qnn::FourBitSpec>();
  recipe.training = true;
  spec->lora_rank = options.rank > 0 ? options.rank : standard.lora_rank;
  spec->lora_alpha = options.alpha > 0 ? options.alpha : standard.lora_alpha;
  spec->lora_dropout = options.dropout;
  recipe.validate();
  if (adapter) return example::recipe_for(*adapter, recipe);
  example::BlockRecipe result(recipe);
  result.targets = options.targets;
  return result;
}

// The sequences of a step, int64 [batch, length + 1]: they depend on the seed and the step alone. Inputs are all ids
// but the last, targets all but the first.
at::Tensor sequences_of(const at::Tensor& ids, int64_t step, const Options& options) {
  constexpr int64_t kSeedStride = 1'000'003;  // between the seeds of two runs, more than the steps of a run
  const at::Generator generator =
      at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(options.seed * kSeedStride + step));
  const at::Tensor starts = at::randint(ids.numel() - options.length, {options.batch, 1}, generator, at::kLong);
  return at::index(ids, {starts + at::arange(options.length + 1, at::kLong)}).to(at::kLong);
}

std::unique_ptr<torch::optim::Optimizer> make_optimizer(const std::vector<at::Tensor>& parameters,
                                                        const Options& options) {
  if (options.optimizer == "adamw") {
    return std::make_unique<quantrain::optim::FusedAdamW>(parameters,
                                                          torch::optim::AdamWOptions(options.lr).weight_decay(0));
  }
  return std::make_unique<quantrain::optim::AdamW8bit>(parameters,
                                                       quantrain::optim::AdamW8bitOptions(options.lr).weight_decay(0));
}

double learning_rate(int64_t step, const Options& options) {
  if (step >= options.warmup) return options.lr;
  return options.lr * static_cast<double>(step + 1) / static_cast<double>(options.warmup);
}

void save(const example::Llama& model, const Options& options) {
  qnn::LoraAdapter adapter = qnn::lora_adapter(*model);
  adapter.base_model = options.source.model;
  adapter.task_type = "CAUSAL_LM";
  qnn::save_lora_adapter(options.out, adapter);
}

// Trains to the last step; the exit status: 0, or 130 where the user stopped the run.
int train(example::Llama& model, const at::Tensor& ids, const Options& options) {
  const at::Device device = options.source.place();
  const std::vector<at::Tensor> parameters = qnn::freeze_but_lora(*model);
  const auto optimizer = make_optimizer(parameters, options);
  example::JsonLines log(options.log);
  model->train();
  const double tokens = static_cast<double>(options.batch * options.length);
  int64_t done = 0;
  while (done < options.steps && stop_requested == 0) {
    const auto started = Clock::now();
    const double lr = learning_rate(done, options);
    for (auto& group : optimizer->param_groups()) group.options().set_lr(lr);
    const at::Tensor sequences = sequences_of(ids, done, options).to(device);
    const at::Tensor loss = example::loss_of(model->forward(sequences.slice(1, 0, -1)), sequences.slice(1, 1));
    optimizer->zero_grad();
    loss.backward();
    const double most = options.clip > 0 ? options.clip : std::numeric_limits<double>::infinity();
    const double norm = torch::nn::utils::clip_grad_norm_(parameters, most);
    const double value = loss.item<double>();
    if (!std::isfinite(value) || !std::isfinite(norm)) {
      throw std::runtime_error("expected a finite loss and gradient, got " + std::to_string(value) + " and " +
                               std::to_string(norm) + " at step " + std::to_string(done) + " (try a lower --lr)");
    }
    optimizer->step();
    const double speed = tokens / std::chrono::duration<double>(Clock::now() - started).count();
    std::printf("step %lld/%lld  loss %.4f  lr %.3g  gradient %.3g  %.0f tokens/s\n", static_cast<long long>(done + 1),
                static_cast<long long>(options.steps), value, lr, norm, speed);
    std::fflush(stdout);
    log.write({{"step", done}, {"loss", value}, {"lr", lr}, {"grad_norm", norm}, {"tokens_per_second", speed}});
    ++done;
  }
  save(model, options);
  std::printf("adapter %s after %lld steps\n", options.out.c_str(), static_cast<long long>(done));
  return done < options.steps ? 130 : 0;
}

int run(int argc, char** argv) {
  const Options options = parse(argc, argv);
  if (options.help) {
    std::printf("%s%s%s", kHelp, example::kSourceHelp, kTrainingHelp);
    return 0;
  }
  std::optional<qnn::LoraAdapter> adapter;
  if (!options.adapter.empty()) {
    adapter = qnn::load_lora_adapter(options.adapter);
    if (!adapter->others.empty()) {  // frozen here, they would be missing from what is saved
      throw std::invalid_argument(options.adapter + ": expected an adapter of low-rank updates alone, got '" +
                                  adapter->others.begin()->first + "' too");
    }
  }
  const example::BlockRecipe recipe = recipe_of(options, adapter);
  const example::LlamaConfig config = example::config_of(options.source.model);
  example::check_length(options.length, config);
  const at::Tensor ids =
      example::read_ids(options.source.ids, options.source.ids_dtype, config.vocab, options.length + 1);
  torch::manual_seed(static_cast<uint64_t>(options.seed));
  example::Llama model =
      example::load_llama(options.source.model, recipe, options.source.type(), options.source.place());
  if (adapter) qnn::set_lora_adapter(*model, *adapter);
  model->use_checkpointing(options.checkpointing);
  int64_t trained = 0;
  for (const at::Tensor& parameter : qnn::lora_parameters(*model)) trained += parameter.numel();
  std::printf("%s: %.1f MB with %s weights, %lld parameters to train\n", options.source.model.c_str(),
              1e-6 * static_cast<double>(example::bytes_of(*model)), recipe.recipe->name.c_str(),
              static_cast<long long>(trained));
  return train(model, ids, options);
}

}  // namespace

int main(int argc, char** argv) {
  const auto stop = [](int signal) {
    stop_requested = 1;
    std::signal(signal, SIG_DFL);  // a second one stops at once
  };
  std::signal(SIGINT, stop);
  std::signal(SIGTERM, stop);
  return example::told_in_a_line("qlora_llama", [&] { return run(argc, argv); });
}
