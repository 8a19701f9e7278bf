// The two files of an integer network, tied by checksums.
//
// NAME.safetensors: the tensors, metadata "format" "quantrain.fixed_point", "version" "1", "graph_checksum". NAME.json: the graph with one field more
// in front, "checksum", that of the whole tensor file. graph_checksum is that of the JSON file's bytes with the sixteen digits of its
// "checksum" as zeros: so each byte of either file is covered, the digits by comparison.

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

#include <nlohmann/json.hpp>

#include "ops/check.h"
#include "quantrain/nn/checkpoint.h"
#include "quantrain/nn/fixed_point_network.h"

namespace quantrain::nn {
namespace {

using Json = nlohmann::ordered_json;

const std::string kBeforeDigits = "{\n \"checksum\": \"";
constexpr size_t kDigits = 16;

// CRC-64/XZ (ECMA-182, reflected): finds every change of up to 64 neighbouring bits.
uint64_t crc64(const std::string& bytes) {
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
  for (const char byte : bytes) crc = crc >> 8 ^ kTable[(crc ^ static_cast<unsigned char>(byte)) & 0xff];
  return ~crc;
}

std::string digits(const std::string& bytes) { return fmt::format("{:016x}", crc64(bytes)); }

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file && !std::filesystem::is_directory(path), path, ": expected a file that can be read, got ",
              file ? "a folder" : std::strerror(errno));
  std::string bytes{std::istreambuf_iterator<char>(file), {}};
  TORCH_CHECK(!file.bad(), path, ": expected a file that can be read, got a read error");
  return bytes;
}

void write_file(const std::string& path, const std::string& bytes) {
  const std::string temporary = path + ".tmp";
  std::ofstream file(temporary, std::ios::binary | std::ios::trunc);
  TORCH_CHECK(file, temporary, ": expected a file that can be written, got ", std::strerror(errno));
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  if (!file) {
    const std::string reason = std::strerror(errno);
    std::filesystem::remove(temporary);
    TORCH_CHECK(false, temporary, ": expected to write ", bytes.size(), " bytes, got ", reason);
  }
  std::filesystem::rename(temporary, path);
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

}  // namespace

void FixedPointNetwork::save(const std::string& path) const {
  const std::string json_path = graph_path(path);
  std::string text = Json::parse(graph()).dump(1);
  text = kBeforeDigits + std::string(kDigits, '0') + "\"," + text.substr(1) + "\n";
  write_safetensors(
      path, {tensors(), {{"format", "quantrain.fixed_point"}, {"version", "1"}, {"graph_checksum", digits(text)}}});
  text.replace(kBeforeDigits.size(), kDigits, digits(read_file(path)));
  write_file(json_path, text);
}

FixedPointNetwork FixedPointNetwork::load(const std::string& path) {
  const std::string json_path = graph_path(path);
  const std::string bytes = read_file(path);
  std::string text = read_file(json_path);
  const size_t begin = kBeforeDigits.size();
  QUANTRAIN_CHECK_VALUE(text.size() > begin + kDigits && text.compare(0, begin, kBeforeDigits) == 0,
                        "{}: expected a graph that starts with a checksum, got {} bytes of another content", json_path,
                        text.size());
  const std::string stored = text.substr(begin, kDigits), found = digits(bytes);
  QUANTRAIN_CHECK_VALUE(stored.find_first_not_of("0123456789abcdef") == std::string::npos,
                        "{}: expected a checksum of sixteen digits 0 to f, got other characters", json_path);
  QUANTRAIN_CHECK_VALUE(stored == found,
                        "{}: expected the checksum {} that {} holds, got {}: one of the two was changed or truncated, "
                        "or they are not of one network",
                        path, stored, json_path, found);
  const SafeTensors content = read_safetensors(path);
  const std::string& format = metadata(path, content, "format");
  QUANTRAIN_CHECK_VALUE(format == "quantrain.fixed_point",
                        "{}: expected metadata format 'quantrain.fixed_point', got '{}'", path, format);
  const std::string& version = metadata(path, content, "version");
  QUANTRAIN_CHECK_VALUE(version == "1", "{}: expected metadata version '1', got '{}'", path, version);
  text.replace(begin, kDigits, std::string(kDigits, '0'));
  const std::string& wanted = metadata(path, content, "graph_checksum");
  QUANTRAIN_CHECK_VALUE(wanted == digits(text),
                        "{}: expected the checksum {} that {} holds, got {}: the graph was changed or truncated",
                        json_path, wanted, path, digits(text));
  Json graph = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  QUANTRAIN_CHECK_VALUE(graph.is_object(), "{}: expected a JSON object, got {} bytes of another content", json_path,
                        text.size());
  graph.erase("checksum");
  return FixedPointNetwork(graph.dump(), content.tensors);
}

}  // namespace quantrain::nn
