// Fine-tunes a quantized ResNet-20 on Fashion-MNIST without Python: prepare, calibrate, train, convert, evaluate, save.
// `finetune_fashion_mnist --help` lists the flags; the Python twin is `quantrain finetune`.
#include <algorithm>
#include <cctype>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <iostream>
#include <map>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <quantrain/nn/checkpoint.h>
#include <quantrain/nn/fixed_point/network.h>
#include <quantrain/nn/layers.h>
#include <quantrain/ops/distillation.h>
#include <quantrain/prune/pruner.h>
#include <torch/utils.h>

#include "fashion_mnist.h"
#include "fixed_point_models.h"
#include "resnet20.h"
#include "training.h"

namespace {

namespace qnn = quantrain::nn;
using example::ImageData;
using example::Metrics;
using example::ResNet20;
using qnn::FixedPointGraph;

constexpr int64_t kEvaluationBatch = 256;

constexpr const char* kHelp = R"(finetune_fashion_mnist [flags]

Fine-tunes ResNet-20 under one recipe and writes metrics.jsonl and safetensors checkpoints (prepared, trained, converted).

  --recipe NAME            qat-w8a8 (default), qat-w8a8-token, qat-w4a8, qat-w4a4, ptq-w8a8, ptq-w4a8; with quantized gradients
                           fqt-8 and fqt-ptqN, fqt-psqN, fqt-bhqN for N = 2 to 8 bits, also with -paper behind; f8net and
                           f8net-tiny, which end in a network of integers alone
  --checkpoint FILE        start from this model: a float32 one, which is calibrated first, or a prepared and calibrated one,
                           which brings its recipe (default: train a float32 model first)
  --data FOLDER            the four IDX files of Fashion-MNIST (default: $QUANTRAIN_DATA, Debian's dataset-fashion-mnist)
  --output FOLDER          where results go (default: runs/cpp-RECIPE)
  --epochs X, --lr X       of the fine-tuning (default: 0.25 and 0.005; with 4 bits or fewer 0.5 epochs)
  --float-epochs X, --float-lr X   of the float32 training (2.5 and 0.2)
  --batch-size N           samples a step (128)
  --calibration-batches N  batches that observers see (8)
  --train-rows N, --test-rows N    use only the first N samples
  --prune X                drop this share of the weights on the way; recipe prune-magnitude does that and rounds nothing
  --schedule NAME          cubic (default): more and more over two thirds of the steps; one-shot: before the first
  --distill                also learn the float32 model's answers
  --max-steps N            stop each training after N steps of its schedule
  --seed N                 seeds weights and the order of the data (0)
  --threads N              CPU threads (default: PyTorch's)
  --device NAME            cpu (default) or cuda
  --evaluate               no training: evaluate --checkpoint (prepared, trained or converted) and stop
  --logits FILE            with --evaluate: also write the test set's logits to this safetensors file
  --network FILE           with --evaluate of an f8net model: also convert it, and write the integer network here
  --help                   this text

Ctrl-C saves the model as RECIPE.interrupted.safetensors, which --checkpoint takes, and stops; a second one stops at once.
)";

volatile std::sig_atomic_t stop_requested = 0;

struct Interrupted : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  std::map<std::string, std::string> values;

  bool has(const std::string& flag) const { return values.count(flag) > 0; }

  std::string text(const std::string& flag, const std::string& fallback) const {
    return has(flag) ? values.at(flag) : fallback;
  }

  template <typename T>
  T number(const std::string& flag, T fallback) const {
    if (!has(flag)) return fallback;
    const std::string& value = values.at(flag);
    T result{};
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), result);
    if (error != std::errc() || end != value.data() + value.size() || !(result >= 0)) {
      throw std::invalid_argument("--" + flag + ": expected a number of at least 0, got '" + value + "'");
    }
    return result;
  }
};

Options parse(int argc, char** argv) {
  static const std::set<std::string> kTexts = {"recipe", "checkpoint", "data",    "output",
                                               "device", "logits",     "network", "schedule"};
  static const std::set<std::string> kNumbers = {"epochs", "lr", "float-epochs", "float-lr", "prune"};
  static const std::set<std::string> kWhole = {
      "batch-size", "calibration-batches", "train-rows", "test-rows", "max-steps", "seed", "threads"};
  static const std::set<std::string> kSwitches = {"evaluate", "distill", "help"};
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const std::string flag = argument.rfind("--", 0) == 0 ? argument.substr(2) : "";
    if (kSwitches.count(flag)) {
      options.values[flag] = "";
      continue;
    }
    if (!kTexts.count(flag) && !kNumbers.count(flag) && !kWhole.count(flag)) {
      throw std::invalid_argument("arguments: expected a flag of --help, got '" + argument + "'");
    }
    if (++i == argc) throw std::invalid_argument(argument + ": expected a value, got none");
    options.values[flag] = argv[i];
    if (kNumbers.count(flag)) options.number<double>(flag, 0.0);
    if (kWhole.count(flag)) options.number<int64_t>(flag, 0);
  }
  return options;
}

// A converted network of integers in a model's place: float images in, float logits out.
struct IntegerNetwork {
  qnn::FixedPointNetwork network;

  at::Tensor forward(const at::Tensor& images) const {
    return network.dequantize_output(network.forward(network.quantize_input(images)));
  }
  void eval() const {}
  const IntegerNetwork* operator->() const { return this; }
};

struct Training {
  std::string stage;
  double epochs;
  double peak_lr;
  int64_t batch_size;
  int64_t max_steps;  // 0: all
  int64_t seed;
  double freeze = 0.75;  // the part of the steps after which ranges no longer follow the tensors
};

struct Evaluation {
  double accuracy;
  double loss;
};

template <typename Model>
Evaluation evaluate(Model& model, const ImageData& data, at::Device device,
                    std::vector<at::Tensor>* all_logits = nullptr) {
  const at::NoGradGuard no_grad;
  model->eval();
  int64_t correct = 0;
  double loss = 0.0;
  for (int64_t begin = 0; begin < data.test_size(); begin += kEvaluationBatch) {
    const example::Batch batch = data.test_batch(begin, std::min(kEvaluationBatch, data.test_size() - begin));
    const at::Tensor labels = batch.labels.to(device);
    const at::Tensor logits = model->forward(batch.images.to(device));
    correct += (logits.argmax(1) == labels).sum().item<int64_t>();
    loss += at::cross_entropy_loss(logits, labels, {}, at::Reduction::Sum).item<double>();
    if (all_logits) all_logits->push_back(logits.cpu());
  }
  const double size = static_cast<double>(data.test_size());
  return {static_cast<double>(correct) / size, loss / size};
}

using Teacher = std::function<at::Tensor(const at::Tensor&)>;

// What Python's `quantrain finetune --distill` takes.
constexpr double kTemperature = 2.0, kTaught = 0.7;

at::Tensor loss_of(const at::Tensor& logits, const at::Tensor& images, const at::Tensor& labels,
                   const Teacher& teacher) {
  const at::Tensor loss = at::cross_entropy_loss(logits, labels);
  if (!teacher) return loss;
  at::Tensor taught;
  {
    const at::NoGradGuard no_grad;
    taught = teacher(images);
  }
  return (1 - kTaught) * loss + kTaught * quantrain::distillation_kl(logits, taught, kTemperature);
}

// Trains in place and returns the number of steps taken. Throws Interrupted after the step during which Ctrl-C came.
template <typename Model>
int64_t train(Model& model, const ImageData& data, const Training& training, Metrics& metrics, at::Device device,
              const std::optional<qnn::PruneSpec>& prune = std::nullopt, const Teacher& teacher = {}) {
  const int64_t per_epoch = (data.train_size() + training.batch_size - 1) / training.batch_size;
  const auto total =
      std::max<int64_t>(1, static_cast<int64_t>(std::ceil(training.epochs * static_cast<double>(per_epoch))));
  const int64_t last = training.max_steps > 0 ? std::min(total, training.max_steps) : total;
  const auto freeze_step = static_cast<int64_t>(std::ceil(training.freeze * static_cast<double>(total)));
  torch::optim::SGD optimizer = example::make_optimizer(*model);
  std::optional<quantrain::prune::Pruner> pruner;
  if (prune) pruner.emplace(*model, *prune, total);
  torch::manual_seed(
      static_cast<uint64_t>(training.seed));  // quantized gradients draw from here, as in the Python trainer
  const auto start = std::chrono::steady_clock::now();
  example::ProgressLine progress(training.stage, last);
  at::Generator generator;
  at::Tensor order;
  model->train();
  for (int64_t step = 0; step < last; ++step) {
    if (step == freeze_step) qnn::enable_observer(*model, false);
    const int64_t epoch = step / per_epoch;
    const int64_t place = step % per_epoch;
    if (place == 0) {
      generator = example::seeded_generator(training.seed + epoch);
      order = at::randperm(data.train_size(), generator, at::kLong);
    }
    const int64_t begin = place * training.batch_size;
    const at::Tensor indices = order.narrow(0, begin, std::min(training.batch_size, data.train_size() - begin));
    const example::Batch batch = data.train_batch(indices, generator);
    const double lr = example::learning_rate(step, total, training.peak_lr);
    example::set_learning_rate(optimizer, lr);
    const at::Tensor images = batch.images.to(device);
    const at::Tensor loss = loss_of(model->forward(images), images, batch.labels.to(device), teacher);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    if (pruner) pruner->step(step + 1, optimizer);
    const double value = loss.item<double>();
    if (!std::isfinite(value)) {
      throw std::runtime_error(training.stage + ": expected a finite loss, got " + std::to_string(value) + " at step " +
                               std::to_string(step));
    }
    metrics.step(training.stage, step, epoch, value, lr, example::seconds_since(start));
    progress.update(step + 1, value, lr);
    if (stop_requested) throw Interrupted("interrupted after step " + std::to_string(step));
    if (place + 1 == per_epoch && step + 1 < last) {
      const Evaluation result = evaluate(model, data, device);
      metrics.evaluation(training.stage, step + 1, static_cast<double>(epoch + 1), result.accuracy, result.loss);
      model->train();
    }
  }
  return last;
}

template <typename Model>
void calibrate(Model& model, const ImageData& data, int64_t batch_size, int64_t batches, int64_t seed,
               at::Device device) {
  const at::Tensor order = at::randperm(data.train_size(), example::seeded_generator(seed), at::kLong);
  const qnn::Calibration calibration(*model);
  const int64_t rows = std::min(batch_size * batches, data.train_size());
  for (int64_t begin = 0; begin < rows; begin += batch_size) {
    const at::Tensor indices = order.narrow(0, begin, std::min(batch_size, rows - begin));
    model->forward(data.train_batch(indices, std::nullopt).images.to(device));
  }
}

// The float model's checkpoint, under the names that the Python package gives it.
template <typename Model>
void save_float(const std::string& path, Model& model) {
  qnn::SafeTensors content{
      {}, {{"format", "quantrain"}, {"version", "1"}, {"recipe", ""}, {"converted", "false"}, {"layers", "{}"}}};
  const auto add = [&content](const auto& items) {
    for (const auto& item : items) {
      const std::string name = example::float_name(item.key());
      if (!name.empty()) content.tensors[name] = item.value();
    }
  };
  add(model->named_parameters());
  add(model->named_buffers());
  qnn::write_safetensors(path, content);
}

struct Job {
  Options options;
  ImageData data;
  at::Device device;
  std::optional<qnn::CheckpointInfo> start;
  qnn::Recipe recipe;
  std::filesystem::path output;

  std::string file(const std::string& form) const {
    return (output / (recipe.name + "." + form + ".safetensors")).string();
  }
};

ImageData read_data(const Options& options) {
  const std::string folder = options.text("data", example::fashion_mnist_folder());
  if (folder.empty()) {
    throw std::runtime_error(
        "Fashion-MNIST: expected its four files in $QUANTRAIN_DATA or /usr/share/datasets/fashion-mnist, got none "
        "(Debian's package dataset-fashion-mnist has them; --data names another folder)");
  }
  std::string lower = folder;
  std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
  const bool fashion = !options.has("data") || lower.find("fashion") != std::string::npos;
  return example::load_images(folder, fashion, options.number<int64_t>("train-rows", 0),
                              options.number<int64_t>("test-rows", 0));
}

// Whether the file is a FixedPointNetwork's.
bool is_network(const std::string& path) {
  if (!std::filesystem::is_regular_file(path)) return false;
  const auto metadata = qnn::read_safetensors(path).metadata;
  const auto format = metadata.find("format");
  return format != metadata.end() && format->second == "quantrain.fixed_point";
}

Job make_job(const Options& options) {
  std::optional<qnn::CheckpointInfo> start;
  const bool network = options.has("checkpoint") && is_network(options.text("checkpoint", ""));
  if (options.has("checkpoint") && !network) start = qnn::read_checkpoint_info(options.text("checkpoint", ""));
  if (network && !options.has("evaluate")) {
    throw std::invalid_argument(
        "--checkpoint: expected a model to train, got an integer network (--evaluate takes it)");
  }
  qnn::Recipe recipe;
  if (start && start->recipe) {
    recipe = *start->recipe;
    if (options.has("recipe") && options.text("recipe", "") != recipe.name) {
      throw std::invalid_argument("--recipe: expected '" + recipe.name + "' as in the checkpoint, got '" +
                                  options.text("recipe", "") + "'");
    }
  } else {
    recipe = qnn::Recipe::from_name(options.text("recipe", "qat-w8a8"));
  }
  if (options.has("prune")) {
    if (!recipe.prune) recipe.prune.emplace();
    recipe.prune->sparsity = options.number("prune", 0.0);
    const std::string schedule = options.text("schedule", "cubic");
    if (schedule != "cubic" && schedule != "one-shot")
      throw std::invalid_argument("--schedule: expected cubic or one-shot, got '" + schedule + "'");
    recipe.prune->schedule = schedule == "cubic" ? qnn::PruneSchedule::kCubic : qnn::PruneSchedule::kOneShot;
    recipe.validate();
  }
  const std::string output = options.text("output", "runs/cpp-" + recipe.name);
  return {options, read_data(options), at::Device(options.text("device", "cpu")), start, recipe, output};
}

template <typename Model>
int report(const Job& job, Model& model, const std::string& what) {
  std::vector<at::Tensor> logits;
  const Evaluation result = evaluate(model, job.data, job.device, &logits);
  if (job.options.has("logits"))
    qnn::write_safetensors(job.options.text("logits", ""), {{{"logits", at::cat(logits)}}, {}});
  std::printf("%s: accuracy %.2f %%, loss %.4f\n", what.c_str(), 100 * result.accuracy, result.loss);
  return 0;
}

int run_evaluation(const Job& job) {
  const std::string path = job.options.text("checkpoint", "");
  if (!path.empty() && is_network(path)) {
    IntegerNetwork network{qnn::FixedPointNetwork::load(path).to(job.device)};
    return report(job, network, "integer network");
  }
  if (!job.start || !job.start->recipe)
    throw std::invalid_argument("--evaluate: expected --checkpoint of a quantized model, got none");
  if (job.recipe.scheme_as<qnn::FixedPointSpec>()) {
    FixedPointGraph graph = example::fixed_point_resnet20(job.data.classes(), 1, job.recipe);
    qnn::load_checkpoint(path, *graph);
    graph->to(job.device);
    graph->eval();
    if (job.options.has("network")) qnn::convert(*graph).save(job.options.text("network", ""));
    return report(job, graph, job.recipe.name);
  }
  ResNet20 model(job.data.classes(), 1, job.recipe);
  if (job.start->converted) qnn::convert(*model, /*check_observed=*/false);
  qnn::load_checkpoint(path, *model);
  model->to(job.device);
  return report(job, model, job.recipe.name + (job.start->converted ? " converted" : ""));
}

Training settings(const Job& job, const std::string& stage, const std::string& prefix, double epochs, double lr) {
  Training training{stage,
                    job.options.number(prefix + "epochs", epochs),
                    job.options.number(prefix + "lr", lr),
                    job.options.number<int64_t>("batch-size", 128),
                    job.options.number<int64_t>("max-steps", 0),
                    job.options.number<int64_t>("seed", 0)};
  if (training.batch_size < 1) throw std::invalid_argument("--batch-size: expected at least 1, got 0");
  return training;
}

// The float32 model, trained with the fake-quantizers switched off or loaded, then calibrated.
template <typename Model>
void prepare_from_float(const Job& job, Model& model, Metrics& metrics) {
  if (job.start) {
    qnn::load_float(job.options.text("checkpoint", ""), *model, example::float_name);
  } else {
    qnn::enable_observer(*model, false);
    qnn::enable_fake_quant(*model, false);
    const Training training = settings(job, "float32", "float-", 2.5, 0.2);
    const int64_t steps = train(model, job.data, training, metrics, job.device);
    const Evaluation result = evaluate(model, job.data, job.device);
    metrics.evaluation("float32", steps, training.epochs, result.accuracy, result.loss);
    std::printf("float32: accuracy %.2f %%\n", 100 * result.accuracy);
    save_float((job.output / "float32.safetensors").string(), model);
    qnn::enable_fake_quant(*model, true);
    qnn::enable_observer(*model, true);
  }
  const Training training = settings(job, "", "", 0, 0);
  calibrate(model, job.data, training.batch_size, job.options.number<int64_t>("calibration-batches", 8), training.seed,
            job.device);
  qnn::save_checkpoint(job.file("prepared"), *model, job.recipe);
}

// Converts and writes the model, and evaluates what it became.
Evaluation convert_and_evaluate(const Job& job, ResNet20& model) {
  qnn::convert(*model);
  qnn::save_checkpoint(job.file("converted"), *model, job.recipe);
  return evaluate(model, job.data, job.device);
}

Evaluation convert_and_evaluate(const Job& job, FixedPointGraph& graph) {
  graph->eval();
  IntegerNetwork integers{qnn::convert(*graph)};
  integers.network.save(job.file("converted"));
  return evaluate(integers, job.data, job.device);
}

// The float32 model whose weights `model` begins with: the same layers, rounding nothing.
Teacher teacher_of(const Job& job, ResNet20& model) {
  ResNet20 copy(job.data.classes(), 1, job.recipe);
  copy->to(job.device);
  const at::NoGradGuard no_grad;
  const auto copy_all = [](auto to, const auto& from) {
    for (auto& item : to)
      if (const auto* value = from.find(item.key()); value && value->sizes().equals(item.value().sizes()))
        item.value().copy_(*value);
  };
  copy_all(copy->named_parameters(), model->named_parameters());
  copy_all(copy->named_buffers(), model->named_buffers());
  qnn::enable_fake_quant(*copy, false);
  qnn::enable_observer(*copy, false);
  copy->eval();
  return [copy](const at::Tensor& images) mutable { return copy->forward(images); };
}

Teacher teacher_of(const Job&, FixedPointGraph&) {
  throw std::invalid_argument("--distill: expected a recipe whose float32 model has the same layers, got f8net");
}

template <typename Model>
int run_job(const Job& job, Model model) {
  std::filesystem::create_directories(job.output);
  Metrics metrics((job.output / "metrics.jsonl").string());
  model->to(job.device);
  if (job.start && job.start->converted) {
    throw std::invalid_argument("--checkpoint: expected a model to train, got a converted one (--evaluate takes it)");
  }
  bool calibrated = false;
  try {
    if (job.start && job.start->recipe) {
      qnn::load_checkpoint(job.options.text("checkpoint", ""), *model);
    } else {
      prepare_from_float(job, model, metrics);
    }
    calibrated = true;
    const bool few_bits =
        std::min(job.recipe.weight ? job.recipe.weight->bits : 32, job.recipe.input ? job.recipe.input->bits : 32) <= 4;
    const Training training = settings(job, job.recipe.name, "", few_bits ? 0.5 : 0.25, 0.005);
    int64_t steps = 0;
    if (job.recipe.training) {
      const Teacher teacher = job.options.has("distill") ? teacher_of(job, model) : Teacher{};
      steps = train(model, job.data, training, metrics, job.device, job.recipe.prune, teacher);
      qnn::save_checkpoint(job.file("trained"), *model, job.recipe);
    }
    const Evaluation result = convert_and_evaluate(job, model);
    metrics.evaluation(job.recipe.name, steps, steps > 0 ? training.epochs : 0.0, result.accuracy, result.loss);
    std::printf("%s: accuracy %.2f %% %s, %llu bytes in %s\n", job.recipe.name.c_str(), 100 * result.accuracy,
                job.recipe.scheme_as<qnn::FixedPointSpec>() ? "in integers alone" : "with integer weights",
                static_cast<unsigned long long>(std::filesystem::file_size(job.file("converted"))),
                job.file("converted").c_str());
    return 0;
  } catch (const Interrupted& interrupted) {
    if (calibrated) {
      qnn::save_checkpoint(job.file("interrupted"), *model, job.recipe);
    } else {
      save_float(job.file("interrupted"), model);
    }
    std::fprintf(stderr, "%s; the model is in %s\n", interrupted.what(), job.file("interrupted").c_str());
    return 130;
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  example::keep_freed_memory();
  std::signal(SIGINT, [](int) {
    stop_requested = 1;
    std::signal(SIGINT, SIG_DFL);  // a second Ctrl-C stops at once
  });
  try {
    const Options options = parse(argc, argv);
    if (options.has("help")) {
      std::fputs(kHelp, stdout);
      return 0;
    }
    if (options.has("threads"))
      at::set_num_threads(static_cast<int>(std::max<int64_t>(1, options.number<int64_t>("threads", 1))));
    const Job job = make_job(options);
    if (options.has("evaluate")) return run_evaluation(job);
    torch::manual_seed(static_cast<uint64_t>(options.number<int64_t>("seed", 0)));
    return job.recipe.scheme_as<qnn::FixedPointSpec>()
               ? run_job(job, example::fixed_point_resnet20(job.data.classes(), 1, job.recipe))
               : run_job(job, ResNet20(job.data.classes(), 1, job.recipe));
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "finetune_fashion_mnist: %s\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "finetune_fashion_mnist: %s\n", error.what());
  }
  return 1;
}
