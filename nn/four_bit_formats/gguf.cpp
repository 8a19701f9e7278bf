#include "quantrain/nn/gguf.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <optional>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include "nn/four_bit_formats/common.h"

// GGUF, little-endian: "GGUF", version, number of tensors, number of keys; each key's name, type and value; each
// tensor's name, sizes (the fastest first), type and offset; the tensors' bytes, aligned. A block of the types Q is a
// float16 scale d, for Q4_1 a float16 minimum m, and 32 codes: 4-bit ones in 16 bytes, elements 0..15 in the low
// nibbles, 16..31 in the high ones. Layout: ggml's docs/gguf.md and gguf 0.19.0 (PyPI).

namespace quantrain::nn {
namespace {

constexpr int64_t kBlock = 32;
constexpr uint64_t kMaxDimensions = 4;
constexpr size_t kNameInMessage = 80;

struct TensorType {
  uint32_t number;
  const char* name;
  int64_t block;  // elements
  int64_t bytes;  // of a block
};
constexpr TensorType kTensorTypes[] = {{0, "F32", 1, 4},        {1, "F16", 1, 2},        {30, "BF16", 1, 2},
                                       {2, "Q4_0", kBlock, 18}, {3, "Q4_1", kBlock, 20}, {8, "Q8_0", kBlock, 34}};

enum ValueType : uint32_t {
  kUint8,
  kInt8,
  kUint16,
  kInt16,
  kUint32,
  kInt32,
  kFloat32,
  kBool,
  kString,
  kArray,
  kUint64,
  kInt64,
  kFloat64,
};

struct Entry {
  std::string name;
  const TensorType* type = nullptr;
  std::vector<int64_t> size;
  uint64_t begin = 0;  // after the header
  uint64_t bytes = 0;
};

// The head of the file, value by value; never past its end.
class Reader {
 public:
  Reader(const std::string& path, std::istream& file) : path_(path), file_(file) {
    file_.seekg(0, std::ios::end);
    size_ = static_cast<uint64_t>(file_.tellg());
    file_.seekg(0);
  }

  [[noreturn]] void fail(const std::string& rule, const std::string& value) const {
    detail::fail_format(path_, rule, value);
  }
  uint64_t position() const { return position_; }
  uint64_t size() const { return size_; }
  uint64_t left() const { return size_ - position_; }

  // Before allocating or reading `count` things of at least `bytes` each.
  void need(uint64_t count, uint64_t bytes, const std::string& what) const {
    if (count > left() / bytes)
      fail(what + " that fits into the file's last " + std::to_string(left()) + " bytes",
           std::to_string(count) + (count == 1 ? " item of " : " items of at least ") + std::to_string(bytes) +
               " bytes");
  }
  void read(void* target, uint64_t bytes, const std::string& what) {
    need(1, std::max<uint64_t>(bytes, 1), what);
    file_.read(static_cast<char*>(target), static_cast<std::streamsize>(bytes));
    if (!file_) fail("the bytes of " + what, "a read error");
    position_ += bytes;
  }
  template <typename T>
  T number(const std::string& what) {
    T value;
    read(&value, sizeof(T), what);
    return value;
  }
  std::string text(const std::string& what) {
    const auto length = number<uint64_t>(what);
    need(length, 1, what);
    std::string value(length, '\0');
    if (length != 0) read(value.data(), length, what);
    return value;
  }
  void go_to(uint64_t position) {
    file_.seekg(static_cast<std::streamoff>(position));
    position_ = position;
  }

 private:
  const std::string& path_;
  std::istream& file_;
  uint64_t size_ = 0;
  uint64_t position_ = 0;
};

// Names come from the file and go into messages.
std::string printable(std::string text) {
  for (char& c : text) {
    if (c < ' ' || c > '~') c = '?';
  }
  if (text.size() > kNameInMessage) text.replace(kNameInMessage, std::string::npos, "...");
  return detail::in_quotes(text);
}

std::optional<int64_t> read_integer(Reader& reader, uint32_t type, const std::string& what) {
  switch (type) {
    case kUint8:
      return reader.number<uint8_t>(what);
    case kInt8:
      return reader.number<int8_t>(what);
    case kUint16:
      return reader.number<uint16_t>(what);
    case kInt16:
      return reader.number<int16_t>(what);
    case kUint32:
      return reader.number<uint32_t>(what);
    case kInt32:
      return reader.number<int32_t>(what);
    case kInt64:
      return reader.number<int64_t>(what);
    case kBool:
      return reader.number<uint8_t>(what) != 0;
    case kUint64: {
      const auto value = reader.number<uint64_t>(what);
      if (value > uint64_t{std::numeric_limits<int64_t>::max()})
        reader.fail(what + " below 2^63", std::to_string(value));
      return static_cast<int64_t>(value);
    }
    default:
      return std::nullopt;
  }
}

uint64_t bytes_of(uint32_t type) {
  switch (type) {
    case kUint8:
    case kInt8:
    case kBool:
      return 1;
    case kUint16:
    case kInt16:
      return 2;
    case kUint32:
    case kInt32:
    case kFloat32:
      return 4;
    default:
      return 8;  // of a string: its length
  }
}

double read_real(Reader& reader, uint32_t type, const std::string& what) {
  return type == kFloat32 ? double{reader.number<float>(what)} : reader.number<double>(what);
}

GgufValue read_array(Reader& reader, const std::string& what) {
  const auto type = reader.number<uint32_t>(what);
  const auto count = reader.number<uint64_t>(what);
  if (type > kFloat64 || type == kArray)
    reader.fail(what + " to be a list of numbers or strings", "type " + std::to_string(type));
  reader.need(count, bytes_of(type), what);
  if (type == kString) {
    std::vector<std::string> values;
    for (uint64_t i = 0; i < count; ++i) values.push_back(reader.text(what));
    return values;
  }
  if (type == kFloat32 || type == kFloat64) {
    std::vector<double> values;
    for (uint64_t i = 0; i < count; ++i) values.push_back(read_real(reader, type, what));
    return values;
  }
  std::vector<int64_t> values;
  for (uint64_t i = 0; i < count; ++i) values.push_back(*read_integer(reader, type, what));
  return values;
}

GgufValue read_value(Reader& reader, const std::string& what) {
  const auto type = reader.number<uint32_t>(what);
  if (type == kBool) return reader.number<uint8_t>(what) != 0;
  if (type == kString) return reader.text(what);
  if (type == kArray) return read_array(reader, what);
  if (type == kFloat32 || type == kFloat64) return read_real(reader, type, what);
  if (const auto integer = read_integer(reader, type, what)) return *integer;
  reader.fail(what + " of a type from 0 to 12", std::to_string(type));
}

Entry read_entry(Reader& reader) {
  Entry entry;
  entry.name = reader.text("a tensor's name");
  const std::string what = "the tensor " + printable(entry.name);
  const auto dimensions = reader.number<uint32_t>(what);
  if (dimensions < 1 || dimensions > kMaxDimensions)
    reader.fail(what + " of 1 to 4 dimensions", std::to_string(dimensions));
  for (uint32_t i = 0; i < dimensions; ++i) {
    const auto size = reader.number<uint64_t>(what);
    if (size < 1 || size > uint64_t{std::numeric_limits<int64_t>::max()})
      reader.fail(what + " of sizes from 1 to 2^63 - 1", std::to_string(size));
    entry.size.insert(entry.size.begin(), static_cast<int64_t>(size));
  }
  const auto number = reader.number<uint32_t>(what);
  const auto* known = std::find_if(std::begin(kTensorTypes), std::end(kTensorTypes),
                                   [number](const TensorType& type) { return type.number == number; });
  if (known == std::end(kTensorTypes))
    reader.fail(what + " of type F32, F16, BF16, Q4_0, Q4_1 or Q8_0", "type number " + std::to_string(number));
  entry.type = known;
  if (entry.size.back() % known->block != 0)
    reader.fail(what + " with rows of a multiple of " + std::to_string(known->block) + " elements for " + known->name,
                std::to_string(entry.size.back()));
  uint64_t bytes = static_cast<uint64_t>(known->bytes);
  for (size_t i = 0; i < entry.size.size(); ++i) {
    const auto factor =
        static_cast<uint64_t>(i + 1 == entry.size.size() ? entry.size[i] / known->block : entry.size[i]);
    if (bytes > reader.size() / factor)  // also where the product would overflow
      reader.fail(what + " of at most the file's " + std::to_string(reader.size()) + " bytes",
                  "shape " + detail::sizes_text(entry.size));
    bytes *= factor;
  }
  entry.bytes = bytes;
  entry.begin = reader.number<uint64_t>(what);
  return entry;
}

// Within the file, aligned, and no byte in two tensors: a small file cannot ask for much memory.
void check_layout(const Reader& reader, std::vector<Entry>& entries, uint64_t data_start, uint64_t alignment) {
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.begin < b.begin; });
  const uint64_t data_bytes = reader.size() - std::min(data_start, reader.size());
  uint64_t end = 0;
  for (const Entry& entry : entries) {
    const std::string what = "the tensor " + printable(entry.name);
    if (entry.begin % alignment != 0)
      reader.fail(what + " at a multiple of " + std::to_string(alignment), std::to_string(entry.begin));
    if (entry.begin < end)
      reader.fail(what + " after the one before, which ends at " + std::to_string(end), std::to_string(entry.begin));
    if (entry.begin > data_bytes || entry.bytes > data_bytes - entry.begin)
      reader.fail(what + " within " + std::to_string(data_bytes) + " bytes of tensors",
                  std::to_string(entry.bytes) + " bytes from " + std::to_string(entry.begin) + " (truncated?)");
    end = entry.begin + entry.bytes;
  }
}

at::Tensor read_bytes(Reader& reader, const Entry& entry, uint64_t data_start) {
  at::Tensor bytes = at::empty({static_cast<int64_t>(entry.bytes)}, at::kByte);
  reader.go_to(data_start + entry.begin);
  reader.read(bytes.data_ptr<uint8_t>(), entry.bytes, "the tensor " + printable(entry.name));
  return bytes;
}

std::vector<int64_t> with_last(std::vector<int64_t> sizes, int64_t last) {
  sizes.back() = last;
  return sizes;
}

// float32 [blocks] from the float16 at byte `offset` of each block.
at::Tensor halves(const at::Tensor& blocks, int64_t offset) {
  return blocks.narrow(1, offset, 2).contiguous().view(at::kHalf).to(at::kFloat).view({-1});
}

float half_at(const uint8_t* bytes) {
  c10::Half value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

// 32 codes as files have them -> 16 bytes of neighbors, the even element in the low nibble.
void pair_codes(const uint8_t* packed, uint8_t* codes) {
  for (int i = 0; i < 8; ++i) {
    const uint8_t first = packed[2 * i];
    const uint8_t second = packed[2 * i + 1];
    codes[i] = static_cast<uint8_t>((first & 15) | (second & 15) << 4);
    codes[i + 8] = static_cast<uint8_t>(first >> 4 | (second & 0xf0));
  }
}

FourBitWeight four_bit(const Entry& entry, const at::Tensor& bytes) {
  const bool affine = entry.type->number == 3;
  const int64_t block_bytes = entry.type->bytes;
  const int64_t columns = entry.size.back();
  FourBitWeight weight;
  weight.format = affine ? "uint4" : "int4";
  weight.size = entry.size;
  weight.block_size = kBlock;
  weight.dtype = at::kHalf;
  weight.codes = at::empty(with_last(entry.size, columns / 2), at::kByte);
  weight.scale = at::empty(with_last(entry.size, columns / kBlock), at::kFloat);
  if (affine) weight.zero_point = at::empty_like(weight.scale);
  const auto* block = bytes.const_data_ptr<uint8_t>();
  auto* codes = weight.codes.data_ptr<uint8_t>();
  auto* scale = weight.scale.data_ptr<float>();
  auto* zero_point = affine ? weight.zero_point.data_ptr<float>() : nullptr;
  for (int64_t i = 0; i < weight.scale.numel(); ++i, block += block_bytes, codes += kBlock / 2) {
    pair_codes(block + block_bytes - kBlock / 2, codes);
    scale[i] = half_at(block);
    if (!affine) {
      for (int j = 0; j < kBlock / 2; ++j) codes[j] ^= 0x88;  // from 0..15 to two's complement of the value less 8
      continue;
    }
    const float minimum = half_at(block + 2);
    zero_point[i] = -minimum / scale[i];
    if (scale[i] == 0) {  // every element is the minimum
      std::fill(codes, codes + kBlock / 2, uint8_t{0});
      zero_point[i] = -1;
      scale[i] = minimum;
    }
  }
  return weight;
}

EightBitWeight eight_bit(const Entry& entry, const at::Tensor& bytes) {
  const at::Tensor blocks = bytes.view({-1, entry.type->bytes});
  return {blocks.narrow(1, 2, kBlock).contiguous().view(at::kChar).view(entry.size),
          halves(blocks, 0).view(with_last(entry.size, entry.size.back() / kBlock))};
}

void read_tensor(Reader& reader, const Entry& entry, uint64_t data_start, GgufFile& file) {
  const at::Tensor bytes = read_bytes(reader, entry, data_start);
  switch (entry.type->number) {
    case 0:
      file.tensors[entry.name] = bytes.view(at::kFloat).view(entry.size);
      return;
    case 1:
      file.tensors[entry.name] = bytes.view(at::kHalf).view(entry.size);
      return;
    case 30:
      file.tensors[entry.name] = bytes.view(at::kBFloat16).view(entry.size);
      return;
    case 8:
      file.eight_bit[entry.name] = eight_bit(entry, bytes);
      return;
    default:
      file.four_bit[entry.name] = four_bit(entry, bytes);
  }
}

void read_metadata(Reader& reader, uint64_t count, GgufFile& file) {
  for (uint64_t i = 0; i < count; ++i) {
    const std::string key = reader.text("a key");
    const std::string what = "the key " + printable(key);
    if (!file.metadata.emplace(key, read_value(reader, what)).second) reader.fail(what + " once", "it twice");
  }
}

uint64_t alignment_of(const Reader& reader, const GgufFile& file) {
  const auto found = file.metadata.find("general.alignment");
  if (found == file.metadata.end()) return 32;
  const auto* value = std::get_if<int64_t>(&found->second);
  if (!value || *value < 1 || *value > 1 << 20 || !std::has_single_bit(static_cast<uint64_t>(*value)))
    reader.fail("the key 'general.alignment' to be a power of two of at most 2^20",
                value ? std::to_string(*value) : "another type");
  return static_cast<uint64_t>(*value);
}

}  // namespace

GgufFile read_gguf(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  TORCH_CHECK(stream && !std::filesystem::is_directory(path), path, ": expected a file that can be read, got ",
              stream ? "a folder" : std::strerror(errno));
  Reader reader(path, stream);
  char magic[4];
  reader.read(magic, sizeof(magic), "a GGUF header");
  if (std::memcmp(magic, "GGUF", sizeof(magic)) != 0)
    reader.fail("a file that begins with GGUF", printable({magic, 4}));
  const auto version = reader.number<uint32_t>("a version");
  if (version != 2 && version != 3) reader.fail("version 2 or 3", std::to_string(version));
  const auto tensors = reader.number<uint64_t>("a number of tensors");
  const auto keys = reader.number<uint64_t>("a number of keys");
  reader.need(keys, 8 + 4 + 1, "a number of keys");
  reader.need(tensors, 8 + 4 + 8 + 4 + 8, "a number of tensors");

  GgufFile file;
  read_metadata(reader, keys, file);
  std::vector<Entry> entries;
  std::map<std::string, int> names;
  for (uint64_t i = 0; i < tensors; ++i) {
    entries.push_back(read_entry(reader));
    if (names[entries.back().name]++) reader.fail("the tensor " + printable(entries.back().name) + " once", "it twice");
  }
  const uint64_t alignment = alignment_of(reader, file);
  const uint64_t data_start = (reader.position() + alignment - 1) / alignment * alignment;
  check_layout(reader, entries, data_start, alignment);
  for (const Entry& entry : entries) read_tensor(reader, entry, data_start, file);
  return file;
}

}  // namespace quantrain::nn
