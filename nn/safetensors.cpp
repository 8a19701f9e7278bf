#include "nn/safetensors.h"

// Reading trusts nothing: a header says where each tensor's bytes are, so it is checked against the file's size first.

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <limits>
#include <utility>

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <nlohmann/json.hpp>

#include "nn/json.h"
#include "nn/replace_file.h"

namespace quantrain::nn {

using detail::fail_file;
using detail::in_quotes;
using detail::SafeTensorsEntry;
using detail::SafeTensorsHeader;
using detail::shape_text;

namespace {

using Json = nlohmann::ordered_json;

constexpr uint64_t kMaxHeader = 100'000'000;  // the format's own limit

struct Dtype {
  const char* name;
  at::ScalarType type;
};
constexpr Dtype kDtypes[] = {{"F64", at::kDouble},
                             {"F32", at::kFloat},
                             {"F16", at::kHalf},
                             {"BF16", at::kBFloat16},
                             {"F8_E4M3", at::kFloat8_e4m3fn},
                             {"F8_E5M2", at::kFloat8_e5m2},
                             {"I64", at::kLong},
                             {"I32", at::kInt},
                             {"I16", at::kShort},
                             {"I8", at::kChar},
                             {"U64", at::kUInt64},
                             {"U32", at::kUInt32},
                             {"U16", at::kUInt16},
                             {"U8", at::kByte},
                             {"BOOL", at::kBool}};

std::string dtype_names() {
  std::string text;
  for (const Dtype& dtype : kDtypes) text += (text.empty() ? "" : ", ") + std::string(dtype.name);
  return text;
}

// What may be no text at all, for a message.
std::string printable(std::string bytes) {
  for (char& byte : bytes)
    if (byte < ' ' || byte > '~') byte = '?';
  return bytes;
}

uint64_t product(const std::string& path, const SafeTensorsEntry& entry, uint64_t size) {
  for (const int64_t length : entry.shape) {
    const uint64_t factor = static_cast<uint64_t>(length);
    if (factor != 0 && size > std::numeric_limits<uint64_t>::max() / factor) {
      fail_file(path, "a tensor of fewer than 2^64 bytes",
                in_quotes(entry.name) + " of shape " + shape_text(entry.shape));
    }
    size *= factor;
  }
  return size;
}

SafeTensorsEntry read_entry(const std::string& path, const std::string& name, const Json& json) {
  const auto is_sizes = [](const Json& value) {
    return value.is_array() && std::all_of(value.begin(), value.end(), [](const Json& size) {
             return size.is_number_unsigned() && size.get<uint64_t>() <= std::numeric_limits<int64_t>::max();
           });
  };
  if (!json.is_object() || !json.contains("dtype") || !json["dtype"].is_string() || !json.contains("shape") ||
      !is_sizes(json["shape"]) || !json.contains("data_offsets") || !is_sizes(json["data_offsets"]) ||
      json["data_offsets"].size() != 2) {
    fail_file(path, "dtype, shape and data_offsets for the tensor " + in_quotes(name), json.dump().substr(0, 80));
  }
  const std::string dtype = json["dtype"];
  const auto* known =
      std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](const Dtype& d) { return dtype == d.name; });
  if (known == std::end(kDtypes)) {
    fail_file(path, "a dtype of " + dtype_names() + " for the tensor " + in_quotes(name), in_quotes(dtype));
  }
  SafeTensorsEntry entry{name, known->type, json["shape"], json["data_offsets"][0], json["data_offsets"][1]};
  const uint64_t bytes = product(path, entry, c10::elementSize(entry.dtype));
  if (entry.end < entry.begin || entry.end - entry.begin != bytes) {
    fail_file(
        path,
        std::to_string(bytes) + " bytes for the tensor " + in_quotes(name) + " of shape " + shape_text(entry.shape),
        "data_offsets " + json["data_offsets"].dump());
  }
  return entry;
}

// The tensors' bytes must fill the rest of the file: this finds truncation, gaps and overlaps.
void check_layout(const std::string& path, std::vector<SafeTensorsEntry>& entries, uint64_t data_bytes) {
  std::sort(entries.begin(), entries.end(), [](const SafeTensorsEntry& a, const SafeTensorsEntry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t end = 0;
  for (const SafeTensorsEntry& entry : entries) {
    if (entry.begin != end) {
      fail_file(path, "the tensor " + in_quotes(entry.name) + " to start at byte " + std::to_string(end),
                std::to_string(entry.begin));
    }
    end = entry.end;
  }
  if (end != data_bytes) {
    fail_file(path, std::to_string(end) + " bytes of tensors",
              std::to_string(data_bytes) + (data_bytes < end ? " (truncated)" : ""));
  }
}

std::string dtype_name(const std::string& path, const std::string& name, at::ScalarType type) {
  for (const Dtype& dtype : kDtypes) {
    if (dtype.type == type) return dtype.name;
  }
  fail_file(path, "a dtype that safetensors files of this library hold",
            std::string(c10::toString(type)) + " in " + in_quotes(name));
}

}  // namespace

void detail::fail_file(const std::string& path, const std::string& rule, const std::string& value) {
  TORCH_CHECK_VALUE(false, path, ": expected ", rule, ", got ", value);
}

std::string detail::in_quotes(const std::string& name) { return "'" + name + "'"; }

std::string detail::shape_text(at::IntArrayRef shape) { return Json(shape.vec()).dump(); }

std::ifstream detail::open_to_read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file && !std::filesystem::is_directory(path), path, ": expected a file that can be read, got ",
              file ? "a folder" : std::strerror(errno));
  return file;
}

SafeTensorsHeader detail::read_header(const std::string& path, std::istream& file) {
  file.seekg(0, std::ios::end);
  const auto size = static_cast<uint64_t>(file.tellg());
  file.seekg(0);
  if (size < 8) fail_file(path, "a safetensors file of at least 8 bytes", std::to_string(size) + " bytes");
  unsigned char prefix[8];
  file.read(reinterpret_cast<char*>(prefix), 8);
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | prefix[i];
  if (length > kMaxHeader || length > size - 8) {
    fail_file(path, "a safetensors header of at most " + std::to_string(std::min(kMaxHeader, size - 8)) + " bytes",
              std::to_string(length) + " (truncated, or not a safetensors file)");
  }
  std::string text(length, '\0');
  file.read(text.data(), static_cast<std::streamsize>(length));
  const Json json = detail::parse_json(text);
  if (!file || !json.is_object())
    fail_file(path, "a safetensors header (a JSON object)", in_quotes(printable(text.substr(0, 40))));
  SafeTensorsHeader header;
  header.data_start = 8 + length;
  for (const auto& [name, value] : json.items()) {
    if (name != "__metadata__") {
      header.entries.push_back(read_entry(path, name, value));
      continue;
    }
    if (!value.is_object()) fail_file(path, "__metadata__ to be an object of strings", value.dump().substr(0, 80));
    for (const auto& [key, item] : value.items()) {
      if (!item.is_string()) fail_file(path, "__metadata__ to be an object of strings", item.dump().substr(0, 80));
      header.metadata[key] = item.get<std::string>();
    }
  }
  check_layout(path, header.entries, size - header.data_start);
  return header;
}

SafeTensors detail::read_tensors(const std::string& path, std::istream& file, const SafeTensorsHeader& header) {
  SafeTensors content;
  content.metadata = header.metadata;
  for (const SafeTensorsEntry& entry : header.entries) {
    at::Tensor tensor = at::empty(entry.shape, at::TensorOptions().dtype(entry.dtype));
    file.read(static_cast<char*>(tensor.data_ptr()), static_cast<std::streamsize>(entry.end - entry.begin));
    if (!file) fail_file(path, "the bytes of the tensor " + in_quotes(entry.name), "a read error");
    content.tensors[entry.name] = std::move(tensor);
  }
  return content;
}

SafeTensors detail::read_safetensors(const std::string& path, std::istream& file) {
  const SafeTensorsHeader header = read_header(path, file);
  return read_tensors(path, file, header);
}

SafeTensors read_safetensors(const std::string& path) {
  std::ifstream file = detail::open_to_read(path);
  return detail::read_safetensors(path, file);
}

detail::PackedSafeTensors detail::pack_safetensors(const std::string& path, const SafeTensors& content) {
  // Wide elements first keeps every tensor aligned to its element size, as the format's own writer does.
  std::vector<std::pair<std::string, at::Tensor>> order;
  for (const auto& [name, tensor] : content.tensors) order.emplace_back(name, tensor.detach().cpu().contiguous());
  std::stable_sort(order.begin(), order.end(),
                   [](const auto& a, const auto& b) { return a.second.element_size() > b.second.element_size(); });
  Json header = Json::object();
  if (!content.metadata.empty()) header["__metadata__"] = content.metadata;
  PackedSafeTensors packed;
  uint64_t offset = 0;
  for (const auto& [name, tensor] : order) {
    const uint64_t end = offset + tensor.nbytes();
    header[name] = {{"dtype", dtype_name(path, name, tensor.scalar_type())},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", {offset, end}}};
    offset = end;
    packed.tensors.push_back(tensor);
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  for (int i = 0; i < 8; ++i) packed.head.push_back(static_cast<char>(text.size() >> 8 * i & 0xff));
  packed.head += text;
  return packed;
}

std::vector<std::string_view> detail::PackedSafeTensors::pieces() const {
  std::vector<std::string_view> pieces{head};
  for (const at::Tensor& tensor : tensors)
    pieces.emplace_back(static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes());
  return pieces;
}

void write_safetensors(const std::string& path, const SafeTensors& content) {
  const detail::PackedSafeTensors packed = detail::pack_safetensors(path, content);
  detail::replace_file(path, packed.pieces());
}

}  // namespace quantrain::nn
