// Images in MNIST's four IDX files (plain or gzipped): reading, the order of batches, and augmentation, as in the
// Python job.
#pragma once

#include <zlib.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Functions.h>

namespace example {

struct Batch {
  at::Tensor images;  // float32 [N, 1, H, W]
  at::Tensor labels;  // int64 [N]
};

struct ImageData {
  at::Tensor train_images;  // uint8 [N, 1, H, W]
  at::Tensor train_labels;  // int64 [N]
  at::Tensor test_images;
  at::Tensor test_labels;
  double mean = 0.2860;
  double std = 0.3530;
  bool flip = true;  // left to right, at random, in training

  int64_t train_size() const { return train_labels.size(0); }
  int64_t test_size() const { return test_labels.size(0); }
  int64_t classes() const { return train_labels.max().item<int64_t>() + 1; }

  at::Tensor normalize(const at::Tensor& images) const { return images.to(at::kFloat).div_(255).sub_(mean).div_(std); }

  // The training samples at `indices`; the generator decides the flips, without one the images stay as they are.
  Batch train_batch(const at::Tensor& indices, std::optional<at::Generator> generator) const {
    at::Tensor images = normalize(train_images.index_select(0, indices));
    if (flip && generator) {
      const at::Tensor flipped = at::rand({indices.size(0)}, generator, at::kFloat) < 0.5;
      images = at::where(flipped.reshape({-1, 1, 1, 1}), images.flip({-1}), images);
    }
    return {images, train_labels.index_select(0, indices)};
  }

  Batch test_batch(int64_t begin, int64_t size) const {
    return {normalize(test_images.narrow(0, begin, size)), test_labels.narrow(0, begin, size)};
  }
};

namespace detail {

[[noreturn]] inline void fail(const std::string& path, const std::string& rule, const std::string& value) {
  throw std::runtime_error(path + ": expected " + rule + ", got " + value);
}

// uint8 tensor of an IDX file: bytes 0, 0, 8 (unsigned byte), rank, then the sizes as big-endian 32-bit numbers, then
// the elements.
inline at::Tensor read_idx(const std::string& path) {
  const std::unique_ptr<gzFile_s, int (*)(gzFile)> file(gzopen(path.c_str(), "rb"), gzclose);
  if (!file) fail(path, "a file that can be read", "none");
  const auto read = [&](void* into, int64_t size) {
    auto* bytes = static_cast<unsigned char*>(into);
    while (size > 0) {
      const int got = gzread(file.get(), bytes, static_cast<unsigned>(std::min<int64_t>(size, 1 << 24)));
      if (got <= 0) fail(path, std::to_string(size) + " more bytes of an IDX file", "its end (truncated or damaged)");
      bytes += got;
      size -= got;
    }
  };
  std::array<unsigned char, 4> magic{};
  read(magic.data(), 4);
  if (magic[0] != 0 || magic[1] != 0 || magic[2] != 8 || magic[3] == 0 || magic[3] > 4) {
    fail(path, "an IDX file of unsigned bytes (starting 00 00 08)", "another file");
  }
  std::vector<int64_t> shape;
  int64_t elements = 1;
  for (int d = 0; d < magic[3]; ++d) {
    std::array<unsigned char, 4> size{};
    read(size.data(), 4);
    shape.push_back(int64_t{size[0]} << 24 | size[1] << 16 | size[2] << 8 | size[3]);
    elements *= shape.back();
    if (elements <= 0 || elements > int64_t{1} << 32) fail(path, "1 to 2^32 elements", std::to_string(elements));
  }
  at::Tensor tensor = at::empty(shape, at::kByte);
  read(tensor.data_ptr(), elements);
  return tensor;
}

inline std::string idx_path(const std::filesystem::path& folder, const std::string& stem) {
  for (const std::string& name : {stem + ".gz", stem}) {
    if (std::filesystem::is_regular_file(folder / name)) return (folder / name).string();
  }
  return "";
}

inline constexpr std::array<const char*, 4> kStems = {"train-images-idx3-ubyte", "train-labels-idx1-ubyte",
                                                      "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"};

}  // namespace detail

// The first folder that holds the four files: $QUANTRAIN_DATA/fashion-mnist, $QUANTRAIN_DATA, Debian's
// dataset-fashion-mnist, the Python job's download. Empty where none does.
inline std::string fashion_mnist_folder() {
  std::vector<std::filesystem::path> candidates;
  if (const char* root = std::getenv("QUANTRAIN_DATA"); root && *root) {
    candidates = {std::filesystem::path(root) / "fashion-mnist", root};
  }
  candidates.emplace_back("/usr/share/datasets/fashion-mnist");
  const char* cache = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  if (cache && *cache) {
    candidates.push_back(std::filesystem::path(cache) / "quantrain/FashionMNIST/raw");
  } else if (home) {
    candidates.push_back(std::filesystem::path(home) / ".cache/quantrain/FashionMNIST/raw");
  }
  for (const auto& folder : candidates) {
    bool whole = true;
    for (const char* stem : detail::kStems) whole = whole && !detail::idx_path(folder, stem).empty();
    if (whole) return folder.string();
  }
  return "";
}

// The four files in `folder`; the first train_rows and test_rows samples (0: all). `fashion` says whether to use
// Fashion-MNIST's mean and standard deviation and to flip; otherwise they are measured and nothing is flipped. Throws
// where a file is missing or damaged.
inline ImageData load_images(const std::string& folder, bool fashion, int64_t train_rows = 0, int64_t test_rows = 0) {
  std::array<at::Tensor, 4> tensors;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::string path = detail::idx_path(folder, detail::kStems[i]);
    if (path.empty()) detail::fail(folder, std::string("the file ") + detail::kStems[i] + ".gz", "none");
    tensors[i] = detail::read_idx(path);
  }
  for (const size_t part : {0, 2}) {
    if (tensors[part].dim() != 3 || tensors[part + 1].dim() != 1 ||
        tensors[part].size(0) != tensors[part + 1].size(0)) {
      detail::fail(folder, "images [N, H, W] and as many labels [N]", "other shapes");
    }
  }
  ImageData data{tensors[0].unsqueeze(1), tensors[1].to(at::kLong), tensors[2].unsqueeze(1), tensors[3].to(at::kLong)};
  if (!fashion) {
    const at::Tensor pixels = data.train_images.to(at::kDouble) / 255;
    data.mean = pixels.mean().item<double>();
    data.std = std::max(pixels.std().item<double>(), 1e-3);
    data.flip = false;
  }
  const auto first = [](at::Tensor& tensor, int64_t rows) {
    if (rows > 0) tensor = tensor.narrow(0, 0, std::min(rows, tensor.size(0)));
  };
  first(data.train_images, train_rows);
  first(data.train_labels, train_rows);
  first(data.test_images, test_rows);
  first(data.test_labels, test_rows);
  return data;
}

inline at::Generator seeded_generator(int64_t seed) {
  return at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(seed));
}

}  // namespace example
