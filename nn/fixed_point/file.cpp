// The file of an integer network: NAME.safetensors with the tensors and, as metadata, "format" "quantrain.fixed_point",
// "version" "2", "graph" and "checksum", that of the file's bytes with its own sixteen digits as zeros. One file, so
// that replacing it is one rename.
//
// Version 1 was two files tied by checksums, and is still read. NAME.safetensors: the tensors, metadata "format",
// "version" "1", "graph_checksum". NAME.json: the graph with one field more in front, "checksum", that of the whole
// tensor file. graph_checksum is that of the JSON file's bytes with the digits of its "checksum" as zeros.

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "nn/fixed_point/constants.h"
#include "nn/json.h"
#include "nn/replace_file.h"
#include "nn/safetensors.h"
#include "ops/common/check.h"
#include "quantrain/nn/checkpoint.h"
#include "quantrain/nn/fixed_point/network.h"

namespace quantrain::nn {
namespace {

using Json = nlohmann::ordered_json;

const std::string kBeforeDigits = "\"checksum\":\"";  // in the header: the first key of the metadata, which comes first
const std::string kBeforeDigits1 = "{\n \"checksum\": \"";  // in the JSON file of version 1: its first bytes
constexpr size_t kDigits = 16;

// CRC-64/XZ (ECMA-182, reflected): finds every change of up to 64 neighbouring bits. Of the pieces one after the other.
uint64_t crc64(const std::vector<std::string_view>& pieces) {
  static const std::array<uint64_t, 256> kTable = [] {
    std::array<uint64_t, 256> table{};
    for (uint64_t i = 0; i < 256; ++i) {
      uint64_t crc = i;
      for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? crc >> 1 ^ 0xC96C5795D7870F42ull : crc >> 1;
      table[i] = crc;
    }
    return table;
  }();
  uint64_t crc = ~uint64_t{0};
  for (const std::string_view piece : pieces)
    for (const char byte : piece) crc = crc >> 8 ^ kTable[(crc ^ static_cast<unsigned char>(byte)) & 0xff];
  return ~crc;
}

std::string digits(const std::vector<std::string_view>& pieces) { return fmt::format("{:016x}", crc64(pieces)); }

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file && !std::filesystem::is_directory(path), path, ": expected a file that can be read, got ",
              file ? "a folder" : std::strerror(errno));
  std::string bytes{std::istreambuf_iterator<char>(file), {}};
  TORCH_CHECK(!file.bad(), path, ": expected a file that can be read, got a read error");
  return bytes;
}

std::string graph_path(const std::string& path) {
  std::filesystem::path json = path;
  json.replace_extension(".json");
  QUANTRAIN_CHECK_VALUE(json != std::filesystem::path(path),
                        "FixedPointNetwork: expected the path of a .safetensors file, got '{}'", path);
  return json.string();
}

const std::string& metadata(const std::string& path, const SafeTensors& content, const char* key) {
  const auto found = content.metadata.find(key);
  QUANTRAIN_CHECK_VALUE(found != content.metadata.end(), "{}: expected metadata '{}' of an integer network, got none",
                        path, key);
  return found->second;
}

Json parse_graph(const std::string& path, const std::string& text) {
  Json graph = detail::parse_json(text);
  QUANTRAIN_CHECK_VALUE(graph.is_object(), "{}: expected a JSON object, got {} bytes of another content", path,
                        text.size());
  return graph;
}

// Where the digits of the checksum are.
size_t digits_position(const std::string& path, std::string_view bytes) {
  const size_t found = bytes.find(kBeforeDigits);
  QUANTRAIN_CHECK_VALUE(found != std::string_view::npos && found + kBeforeDigits.size() + kDigits <= bytes.size(),
                        "{}: expected a checksum in the metadata, got none", path);
  return found + kBeforeDigits.size();
}

FixedPointNetwork load_version_1(const std::string& path, const std::string& bytes, const SafeTensors& content) {
  const std::string json_path = graph_path(path);
  std::string text = read_file(json_path);
  const size_t begin = kBeforeDigits1.size();
  QUANTRAIN_CHECK_VALUE(text.size() > begin + kDigits && text.compare(0, begin, kBeforeDigits1) == 0,
                        "{}: expected a graph that starts with a checksum, got {} bytes of another content", json_path,
                        text.size());
  const std::string stored = text.substr(begin, kDigits), found = digits({bytes});
  QUANTRAIN_CHECK_VALUE(stored.find_first_not_of("0123456789abcdef") == std::string::npos,
                        "{}: expected a checksum of sixteen digits 0 to f, got other characters", json_path);
  QUANTRAIN_CHECK_VALUE(stored == found,
                        "{}: expected the checksum {} that {} holds, got {}: one of the two was changed or truncated, "
                        "or they are not of one network",
                        path, stored, json_path, found);
  text.replace(begin, kDigits, std::string(kDigits, '0'));
  const std::string& wanted = metadata(path, content, "graph_checksum");
  QUANTRAIN_CHECK_VALUE(wanted == digits({text}),
                        "{}: expected the checksum {} that {} holds, got {}: the graph was changed or truncated",
                        json_path, wanted, path, digits({text}));
  Json graph = parse_graph(json_path, text);
  graph.erase("checksum");
  return FixedPointNetwork(graph.dump(), content.tensors);
}

}  // namespace

void FixedPointNetwork::save(const std::string& path) const {
  graph_path(path);
  detail::PackedSafeTensors packed = detail::pack_safetensors(path, {tensors(),
                                                                     {{"checksum", std::string(kDigits, '0')},
                                                                      {"format", detail::kNetworkFormat},
                                                                      {"graph", graph()},
                                                                      {"version", "2"}}});
  const std::string checksum = digits(packed.pieces());
  packed.head.replace(digits_position(path, packed.head), kDigits, checksum);
  detail::replace_file(path, packed.pieces());
}

FixedPointNetwork FixedPointNetwork::load(const std::string& path) {
  graph_path(path);
  std::string bytes = read_file(path);
  std::istringstream stream(bytes);  // of the bytes whose checksum is taken: the file may be replaced meanwhile
  const SafeTensors content = detail::read_safetensors(path, stream);
  const std::string& format = metadata(path, content, "format");
  QUANTRAIN_CHECK_VALUE(format == detail::kNetworkFormat, "{}: expected metadata format '{}', got '{}'", path,
                        detail::kNetworkFormat, format);
  const std::string& version = metadata(path, content, "version");
  if (version == "1") return load_version_1(path, bytes, content);
  QUANTRAIN_CHECK_VALUE(version == "2", "{}: expected metadata version '1' or '2', got '{}'", path, version);
  const std::string& stored = metadata(path, content, "checksum");
  const size_t position = digits_position(path, bytes);
  bytes.replace(position, kDigits, std::string(kDigits, '0'));
  const std::string found = digits({bytes});
  QUANTRAIN_CHECK_VALUE(stored == found, "{}: expected the checksum {} that the file holds, got {}: it was changed",
                        path, stored, found);
  return FixedPointNetwork(parse_graph(path, metadata(path, content, "graph")).dump(), content.tensors);
}

}  // namespace quantrain::nn
