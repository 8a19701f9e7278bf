// Runs an integer network from its file: accuracy and images per second, without Python.
//
//   run_fixed_point NETWORK.safetensors [--data FOLDER | --records FILE --size HxW] [--mean M --std S] [--batch N]
//   [--threads N] [--device cpu|cuda]
//
// NETWORK.safetensors is what FixedPointNetwork.save or FixedPointNetwork::save wrote. The images are MNIST's IDX files
// in FOLDER (by default Fashion-MNIST where example::fashion_mnist_folder finds it), or FILE: records of one label byte
// and C x H x W pixel bytes, as CIFAR-10's binary version. A network of signed input takes (pixel / 255 - mean) / std,
// Fashion-MNIST's by default; one of unsigned input pixel / 255.
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <c10/core/Device.h>

#include <quantrain/nn/fixed_point/network.h>

#include "fashion_mnist.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include <cuda_runtime.h>
#endif

namespace {

struct Options {
  std::string network;
  std::map<std::string, std::string> values{{"--data", ""},    {"--records", ""},  {"--size", "32x32"},
                                            {"--mean", ""},    {"--std", ""},      {"--batch", "64"},
                                            {"--threads", ""}, {"--device", "cpu"}};
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto found = options.values.find(argument);
    if (found != options.values.end() && i + 1 < argc) {
      found->second = argv[++i];
    } else if (argument.rfind("--", 0) != 0 && options.network.empty()) {
      options.network = argument;
    } else {
      throw std::runtime_error("run_fixed_point: expected NETWORK.safetensors and known options with values, got " +
                               argument);
    }
  }
  if (options.network.empty()) throw std::runtime_error("run_fixed_point: expected NETWORK.safetensors, got none");
  return options;
}

struct Images {
  at::Tensor pixels;  // uint8 [N, C, H, W]
  at::Tensor labels;  // int64 [N]
  double mean = 0, std = 1;
};

Images read_records(const std::string& path, const std::string& size, int64_t channels) {
  const size_t cross = size.find('x');
  if (cross == std::string::npos) throw std::runtime_error("--size: expected HxW, got " + size);
  const int64_t height = std::stoll(size.substr(0, cross)), width = std::stoll(size.substr(cross + 1));
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": expected a file that can be read, got none");
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  const int64_t record = 1 + channels * height * width, total = static_cast<int64_t>(bytes.size());
  if (total == 0 || total % record != 0)
    throw std::runtime_error(path + ": expected records of " + std::to_string(record) + " bytes, got " +
                             std::to_string(total));
  const at::Tensor records =
      at::from_blob(const_cast<char*>(bytes.data()), {total / record, record}, at::TensorOptions().dtype(at::kByte));
  return {records.narrow(1, 1, record - 1).reshape({-1, channels, height, width}).clone(),
          records.select(1, 0).to(at::kLong)};
}

Images read_idx_folder(std::string folder) {
  const bool fashion = folder.empty() || folder == example::fashion_mnist_folder();
  if (folder.empty()) folder = example::fashion_mnist_folder();
  if (folder.empty())
    throw std::runtime_error("expected --data FOLDER or --records FILE, got neither, and no Fashion-MNIST");
  const example::ImageData data = example::load_images(folder, fashion, /*train_rows=*/0, /*test_rows=*/0);
  return {data.test_images, data.test_labels, data.mean, data.std};
}

void wait_for(const at::Device& device) {
#if defined(QUANTRAIN_WITH_CUDA)
  if (device.is_cuda() && cudaDeviceSynchronize() != cudaSuccess) throw std::runtime_error("expected a working GPU");
#else
  (void)device;
#endif
}

int64_t channels_of(const quantrain::nn::FixedPointNetwork& network) {
  const std::string& graph = network.graph();  // "input":{..."channels":3
  return std::stoll(graph.substr(graph.find("\"channels\":", graph.find("\"input\":")) + 11));
}

void run(const Options& options) {
  const at::Device device(options.values.at("--device"));
  const auto network = quantrain::nn::FixedPointNetwork::load(options.network).to(device);
  for (const auto& row : network.audit())
    std::cout << row.name << ": " << row.operations << ", " << row.operands << " -> " << row.result << "\n";

  const std::string& records = options.values.at("--records");
  Images images = records.empty() ? read_idx_folder(options.values.at("--data"))
                                  : read_records(records, options.values.at("--size"), channels_of(network));
  if (const std::string& mean = options.values.at("--mean"); !mean.empty()) images.mean = std::stod(mean);
  if (const std::string& std = options.values.at("--std"); !std.empty()) images.std = std::stod(std);

  at::Tensor reals = images.pixels.to(device, at::kFloat).div_(255);
  if (network.quantize_input(reals.narrow(0, 0, 1)).scalar_type() == at::kChar)
    reals.sub_(images.mean).div_(images.std);
  const at::Tensor codes = network.quantize_input(reals);
  const int64_t count = codes.size(0), batch = std::stoll(options.values.at("--batch"));
  if (batch < 1) throw std::runtime_error("--batch: expected at least 1, got " + std::to_string(batch));

  std::vector<at::Tensor> outputs;
  network.forward(codes.narrow(0, 0, std::min(batch, count)));  // plans its memory
  wait_for(device);
  const auto start = std::chrono::steady_clock::now();
  for (int64_t first = 0; first < count; first += batch)
    outputs.push_back(network.forward(codes.narrow(0, first, std::min(batch, count - first))));
  wait_for(device);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const int64_t right = at::cat(outputs).argmax(1).cpu().eq(images.labels).sum().item<int64_t>();
  std::cout << "accuracy " << 100.0 * static_cast<double>(right) / static_cast<double>(count) << " % of " << count
            << " images, " << static_cast<int64_t>(static_cast<double>(count) / seconds) << " images/s at batch "
            << batch << " on " << device.str() << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse(argc, argv);
    if (const std::string& threads = options.values.at("--threads"); !threads.empty())
      at::set_num_threads(std::stoi(threads));
    run(options);
    return 0;
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << "\n";
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
  }
  return 1;
}
