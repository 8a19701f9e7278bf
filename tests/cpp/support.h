// What the C++ tests share: Catch2 beside torch, a temporary folder, the text of an error.
#pragma once

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include <unistd.h>

#include <ATen/Functions.h>
#include <quantrain/quantrain.h>
#include <torch/cuda.h>
#include <torch/utils.h>

#undef CHECK  // c10's; Catch2 defines its own
#include <catch2/catch.hpp>

namespace support {

inline bool has_cuda() { return torch::cuda::is_available(); }

// A folder that is deleted at the end of the test.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    static int count = 0;
    path_ = std::filesystem::temp_directory_path() /
            ("quantrain-test-" + std::to_string(getpid()) + "-" + std::to_string(count++));
    std::filesystem::create_directories(path_);
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::string file(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

// The message of the ValueError that `call` throws; "" where it throws none.
template <typename Call>
std::string value_error(const Call& call) {
  try {
    call();
  } catch (const c10::ValueError& error) {
    return error.what_without_backtrace();
  }
  return "";
}

// Equal bit for bit (NaN equals NaN).
inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || !a.sizes().equals(b.sizes())) return false;
  return at::where(a.isnan(), at::ones_like(a), a).equal(at::where(b.isnan(), at::ones_like(b), b)) &&
         a.isnan().equal(b.isnan());
}

inline double largest_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

}  // namespace support
