// Text as bytes: training and evaluation parts, and the batch of each step, drawn as examples/python/gpt_data.py draws
// it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Functions.h>

namespace example {

// $QUANTRAIN_DATA/tinyshakespeare/input.txt.
inline std::string default_text() {
  const char* root = std::getenv("QUANTRAIN_DATA");
  const std::filesystem::path path = std::filesystem::path(root ? root : "") / "tinyshakespeare" / "input.txt";
  if (!root || !*root || !std::filesystem::is_regular_file(path)) {
    throw std::invalid_argument("expected --data FILE or $QUANTRAIN_DATA/tinyshakespeare/input.txt, got neither");
  }
  return path.string();
}

// The bytes of a file as tokens; the last tenth is for evaluation. The batch of a step depends on the seed and the step
// alone, so a resumed run needs no position in the data. Sequences are int64 [..., context + 1]: the inputs are all but
// the last token, the targets all but the first. Throws for no file, or one too short for one sequence in each part.
class Text {
 public:
  Text(const std::string& path, int64_t context, at::Device device) : context_(context), device_(device) {
    if (!std::filesystem::is_regular_file(path)) throw std::invalid_argument(path + ": expected a text file, got none");
    size_ = static_cast<int64_t>(std::filesystem::file_size(path));
    const int64_t least = 10 * (context + 1);
    if (size_ < least) {
      throw std::invalid_argument(path + ": expected at least " + std::to_string(least) +
                                  " bytes (10 times --context + 1), got " + std::to_string(size_) + " bytes");
    }
    const at::Tensor content = at::empty({size_}, at::kByte);
    std::ifstream file(path, std::ios::binary);
    if (!file.read(static_cast<char*>(content.data_ptr()), size_)) {
      throw std::invalid_argument(path + ": expected a file that can be read, got none");
    }
    const at::Tensor data = content.to(device);
    const int64_t held_out = size_ / 10;
    train_ = data.narrow(0, 0, size_ - held_out);
    held_out_ = data.narrow(0, size_ - held_out, held_out);
    window_ = at::arange(context + 1, at::TensorOptions(at::kLong).device(device));
  }

  int64_t size() const { return size_; }

  // The sequences of a step, [accumulate, batch_size, context + 1].
  at::Tensor batch(int64_t seed, int64_t step, int64_t accumulate, int64_t batch_size) const {
    constexpr int64_t kSeedStride = 1'000'003;  // between the seeds of two runs, more than the steps of a run
    const at::Generator generator =
        at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(seed * kSeedStride + step));
    const int64_t high = train_.numel() - context_;
    return rows(train_, at::randint(high, {accumulate, batch_size}, generator, at::kLong));
  }

  // At most `most` batches of windows that do not overlap, spread evenly over the evaluation part.
  std::vector<at::Tensor> held_out_batches(int64_t batch_size, int64_t most) const {
    const int64_t windows = (held_out_.numel() - 1) / context_;
    const int64_t used = std::min(windows, most * batch_size);
    const at::Tensor starts = (at::arange(used, at::kLong) * windows).div(used, /*rounding_mode=*/"floor") * context_;
    std::vector<at::Tensor> batches;
    for (const at::Tensor& part : starts.split(batch_size)) batches.push_back(rows(held_out_, part));
    return batches;
  }

 private:
  at::Tensor rows(const at::Tensor& data, const at::Tensor& starts) const {
    // non_blocking: otherwise this copy of a few bytes would wait for all work queued on the device.
    const at::Tensor index = starts.to(device_, /*non_blocking=*/true).unsqueeze(-1) + window_;
    return at::index(data, {index}).to(at::kLong);
  }

  int64_t context_;
  at::Device device_;
  int64_t size_ = 0;
  at::Tensor train_;
  at::Tensor held_out_;
  at::Tensor window_;
};

}  // namespace example
