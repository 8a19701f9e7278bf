// What qlora_llama and evaluate_llama share: the flags that name a model, ids and a device, and how errors are told.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <torch/cuda.h>
#include <nlohmann/json.hpp>

#include "flags.h"

namespace example {

constexpr const char* kSourceHelp = R"(source
  --model FOLDER         config.json and model.safetensors, or its shards with their index, as transformers writes them
  --ids FILE             token ids: text, or binary where the name ends in .bin
  --ids-dtype NAME       of binary ids: int32 (default) or uint16
  --device NAME          cpu (default) or cuda
  --threads N            CPU threads; 0: PyTorch's choice
)";

struct Source {
  std::string model;
  std::string ids;
  std::string ids_dtype = "int32";
  std::string device = "cpu";
  std::string dtype = "float32";
  int64_t threads = 0;

  at::ScalarType type() const {
    return dtype == "float32" ? at::kFloat : dtype == "bfloat16" ? at::kBFloat16 : at::kHalf;
  }

  at::Device place() const {
    const at::Device named(device);
    return named.is_cuda() && !named.has_index() ? at::Device(named.type(), 0) : named;
  }
};

namespace detail {

inline void take_source(Flags& flags, Source& source, const std::vector<std::string>& dtypes) {
  flags.take("model", source.model);
  flags.take("ids", source.ids);
  flags.take("ids-dtype", source.ids_dtype);
  check_one_of("--ids-dtype", source.ids_dtype, {"int32", "uint16"});
  flags.take("device", source.device);
  check_one_of("--device", source.device.substr(0, source.device.find(':')), {"cpu", "cuda"});
  flags.take("dtype", source.dtype);
  check_one_of("--dtype", source.dtype, dtypes);
  flags.take<int64_t>("threads", source.threads, 0);
}

inline void check_source(const Source& source) {
  if (source.model.empty()) fail("--model FOLDER", "none");
  if (source.ids.empty()) fail("--ids FILE", "none");
  if (source.place().is_cuda() && !torch::cuda::is_available()) fail("a GPU for --device " + source.device, "none");
  if (source.threads > 0) at::set_num_threads(static_cast<int>(source.threads));
}

}  // namespace detail

// Of "a,b": a and b; of nothing none.
inline std::vector<std::string> names_in(const std::string& text) {
  std::vector<std::string> names;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    names.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return names;
}

// A JSON object per line, in a new file; nothing without a path.
class JsonLines {
 public:
  explicit JsonLines(const std::string& path) {
    if (path.empty()) return;
    file_.open(path, std::ios::trunc);
    if (!file_) throw std::invalid_argument(path + ": expected a file that can be written, got none");
  }

  void write(const nlohmann::ordered_json& line) {
    if (file_.is_open()) file_ << line.dump() << std::endl;
  }

 private:
  std::ofstream file_;
};

// run(argc, argv) with what it throws told in one line; the exit status.
template <typename Run>
int told_in_a_line(const char* program, const Run& run) {
  try {
    return run();
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "%s: %s\n", program, error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", program, error.what());
  }
  return 1;
}

}  // namespace example
