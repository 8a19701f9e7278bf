// Serves a converted BERT: logits of batches of sequences, each block one call. `serve_bert --help` lists the flags.
#include <algorithm>
#include <cctype>
#include <charconv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <quantrain/nn/captured.h>
#include <torch/cuda.h>

#include "bert.h"
#include "flags.h"
#include "llama_options.h"

namespace {

namespace qnn = quantrain::nn;

constexpr const char* kHelp = R"(serve_bert --folder FOLDER --ids FILE [flags]

For each line of ids a line of what the model gives: the logits of BertForSequenceClassification, or the first 8 values
of BertModel's pooler. Lines that begin with # say how it ran.

  --folder FOLDER  config.json of transformers, and model.safetensors that quantrain.save_checkpoint wrote of the
                   converted model: a recipe of scheme int8 or ptq
  --ids FILE       token ids as text, a sequence per line; lengths may differ
  --batch N        so many lines per forward pass; 0: all (0)
  --device NAME    cpu (default) or cuda
  --dtype NAME     of what is not int8: float32 (default), float16 or bfloat16
  --captured       on a GPU a CUDA graph per shape of batches
  --separate       layers one by one, to compare with blocks as one call
  --threads N      CPU threads; 0: PyTorch's choice (0)
  --repeat N       run each batch so often again, and say the median time
)";

struct Options {
  bool help = false;
  std::string folder;
  std::string ids;
  int64_t batch = 0;
  std::string device = "cpu";
  std::string dtype = "float32";
  bool captured = false;
  bool separate = false;
  int64_t threads = 0;
  int64_t repeat = 0;

  at::ScalarType type() const {
    return dtype == "float32" ? at::kFloat : dtype == "bfloat16" ? at::kBFloat16 : at::kHalf;
  }
};

Options parse(int argc, char** argv) {
  using example::detail::check_one_of;
  using example::detail::fail;
  example::detail::Flags flags(argc, argv, {"help", "captured", "separate"});
  Options options;
  options.help = flags.take("help");
  flags.take("folder", options.folder);
  flags.take("ids", options.ids);
  flags.take<int64_t>("batch", options.batch, 0);
  flags.take("device", options.device);
  check_one_of("--device", options.device, {"cpu", "cuda"});
  flags.take("dtype", options.dtype);
  check_one_of("--dtype", options.dtype, {"float32", "float16", "bfloat16"});
  options.captured = flags.take("captured");
  options.separate = flags.take("separate");
  flags.take<int64_t>("threads", options.threads, 0);
  flags.take<int64_t>("repeat", options.repeat, 0);
  flags.finish();
  if (options.help) return options;
  if (options.folder.empty()) fail("--folder FOLDER", "none");
  if (options.ids.empty()) fail("--ids FILE", "none");
  if (options.device == "cuda" && !torch::cuda::is_available()) fail("a GPU for --device cuda", "none");
  return options;
}

using Sequence = std::vector<int64_t>;

// `line` names the file and the line, for messages.
Sequence parse_sequence(const std::string& line, const std::string& text, const example::BertConfig& config) {
  Sequence ids;
  const char* at = text.data();
  const char* const end = at + text.size();
  const auto separates = [](unsigned char c) { return std::isspace(c) || c == ','; };
  while ((at = std::find_if_not(at, end, separates)) != end) {
    const char* const word_end = std::find_if(at, end, separates);
    int64_t id = 0;
    const auto [stop, error] = std::from_chars(at, word_end, id);
    if (error != std::errc() || stop != word_end) {
      throw std::invalid_argument(line + ": expected ids as whole numbers, got '" + std::string(at, word_end) + "'");
    }
    if (id < 0 || id >= config.vocab) {
      throw std::invalid_argument(line + ": expected ids from 0 to " + std::to_string(config.vocab - 1) + ", got " +
                                  std::to_string(id));
    }
    ids.push_back(id);
    at = word_end;
  }
  const auto length = static_cast<int64_t>(ids.size());
  if (length < 1 || length > config.context) {
    throw std::invalid_argument(line + ": expected 1 to " + std::to_string(config.context) +
                                " ids (max_position_embeddings), got " + std::to_string(length));
  }
  return ids;
}

std::vector<Sequence> read_sequences(const std::string& path, const example::BertConfig& config) {
  std::ifstream file(path);
  if (!file || std::filesystem::is_directory(path)) {
    throw std::invalid_argument(path + ": expected a file of ids that can be read, got none");
  }
  std::vector<Sequence> sequences;
  for (std::string text; std::getline(file, text);) {
    sequences.push_back(parse_sequence(path + " line " + std::to_string(sequences.size() + 1), text, config));
  }
  if (sequences.empty()) throw std::invalid_argument(path + ": expected at least one line of ids, got none");
  return sequences;
}

// What the model reads: ids int64 [B, T], and where lengths differ a mask, bool [B, 1, 1, T].
std::vector<at::Tensor> inputs_of(const std::vector<Sequence>& sequences, size_t first, size_t last) {
  const auto rows = static_cast<int64_t>(last - first);
  int64_t longest = 0;
  for (size_t i = first; i < last; ++i) longest = std::max(longest, static_cast<int64_t>(sequences[i].size()));
  at::Tensor ids = at::zeros({rows, longest}, at::kLong);  // any id will do for padding: no token attends to it
  at::Tensor mask = at::zeros({rows, 1, 1, longest}, at::kBool);
  bool padded = false;
  for (int64_t row = 0; row < rows; ++row) {
    const Sequence& sequence = sequences[first + static_cast<size_t>(row)];
    const auto length = static_cast<int64_t>(sequence.size());
    std::copy(sequence.begin(), sequence.end(), ids.data_ptr<int64_t>() + row * longest);
    mask[row].narrow(-1, 0, length).fill_(true);
    padded = padded || length < longest;
  }
  if (!padded) return {ids};
  return {ids, mask};
}

void print_rows(const at::Tensor& values) {
  const at::Tensor rows = values.to(at::kCPU, at::kFloat).contiguous();
  const auto* value = rows.const_data_ptr<float>();
  for (int64_t row = 0; row < rows.size(0); ++row) {
    for (int64_t i = 0; i < rows.size(1); ++i) std::printf("%s%.9g", i == 0 ? "" : " ", *value++);
    std::printf("\n");
  }
}

// The median over options.repeat calls, in milliseconds, of what begins and ends on the device.
template <typename Function>
double median_milliseconds(const Function& function, const Options& options) {
  const auto synchronize = [&] {
    if (options.device == "cuda") torch::cuda::synchronize();
  };
  std::vector<double> times;
  for (int64_t i = 0; i < options.repeat; ++i) {
    synchronize();
    const auto start = std::chrono::steady_clock::now();
    function();
    synchronize();
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  const auto middle = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2);
  std::nth_element(times.begin(), middle, times.end());
  return *middle;
}

int run(int argc, char** argv) {
  const Options options = parse(argc, argv);
  if (options.help) {
    std::fputs(kHelp, stdout);
    return 0;
  }
  const at::NoGradGuard no_grad;
  if (options.threads > 0) at::set_num_threads(static_cast<int>(options.threads));
  const at::Device device = options.device == "cuda" ? at::Device(at::kCUDA, 0) : at::Device(at::kCPU);
  const std::vector<Sequence> sequences = read_sequences(options.ids, example::bert_config_of(options.folder));
  example::Bert model = example::load_bert(options.folder, options.type(), device);
  std::map<size_t, std::string> separate;
  if (!options.separate) separate = model->fuse();
  const size_t fused = options.separate ? 0 : model->blocks() - separate.size();
  std::printf("# %zu of %zu blocks as one call each\n", fused, model->blocks());
  for (const auto& [block, reason] : separate) std::printf("# block %zu layer by layer: %s\n", block, reason.c_str());

  const auto logits_of = [&](const std::vector<at::Tensor>& inputs) {
    return model->forward(inputs[0], inputs.size() > 1 ? std::optional(inputs[1]) : std::nullopt);
  };
  qnn::Captured graphs(logits_of);
  const size_t step = options.batch > 0 ? static_cast<size_t>(options.batch) : sequences.size();
  for (size_t first = 0; first < sequences.size(); first += step) {
    std::vector<at::Tensor> inputs = inputs_of(sequences, first, std::min(first + step, sequences.size()));
    for (at::Tensor& input : inputs) input = input.to(device);
    const auto forward = [&] { return options.captured ? graphs(inputs) : logits_of(inputs); };
    const at::Tensor values = forward();
    print_rows(model->has_classifier() ? values : values.narrow(1, 0, std::min<int64_t>(8, values.size(1))));
    if (options.repeat == 0) continue;
    const double median = median_milliseconds(forward, options);
    std::printf("# median %.4f ms of %lld forward passes, from ids on the device: ", median,
                static_cast<long long>(options.repeat));
    std::printf("%lld sequences of %lld ids%s, %s, %s%s%s\n", static_cast<long long>(inputs[0].size(0)),
                static_cast<long long>(inputs[0].size(1)), inputs.size() > 1 ? " with padding" : "",
                options.device.c_str(), options.dtype.c_str(), options.captured ? ", captured" : "",
                options.separate ? ", layers one by one" : "");
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return example::told_in_a_line("serve_bert", [&] { return run(argc, argv); });
}
