// TensorBoard event files of scalars, without TensorFlow or protobuf.
//
// A file is TFRecords (8 bytes little-endian length, masked CRC-32C of it, the bytes, masked CRC-32C of them), each an
// Event message (tensorboard/compat/proto/event.proto) encoded by hand: wall_time = 1, step = 2, file_version = 3,
// summary = 5 {value = 1 {tag = 1, simple_value = 2}}, session_log = 7 {status = 1}.
#pragma once

#include <unistd.h>

#include <array>
#include <bit>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>

namespace example {

class TensorBoardWriter {
 public:
  // A new file in `folder`. TensorBoard drops what earlier files hold from purge_step on, where that is above 0.
  explicit TensorBoardWriter(const std::filesystem::path& folder, int64_t purge_step = 0) {
    std::filesystem::create_directories(folder);
    std::array<char, 256> host{};
    gethostname(host.data(), host.size() - 1);
    const auto path = folder / ("events.out.tfevents." + std::to_string(static_cast<int64_t>(now())) + "." +
                                host.data() + "." + std::to_string(getpid()));
    file_.open(path, std::ios::binary | std::ios::app);
    if (!file_) throw std::runtime_error(path.string() + ": expected a file that can be written, got none");
    write(event(0) + bytes_field(3, "brain.Event:2"));
    if (purge_step > 0) write(event(purge_step) + bytes_field(7, varint_field(1, /*START=*/1)));
  }

  void add_scalar(const std::string& tag, double value, int64_t step) {
    const std::string scalar = bytes_field(1, tag) + fixed_field<uint32_t>(2, static_cast<float>(value));
    write(event(step) + bytes_field(5, bytes_field(1, scalar)));
  }

  void flush() { file_.flush(); }

 private:
  static double now() {
    return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  }

  template <typename Word>
  static std::string little_endian(Word word) {
    std::string bytes;
    for (size_t i = 0; i < sizeof(Word); ++i) bytes += static_cast<char>(word >> (8 * i) & 0xff);
    return bytes;
  }

  static std::string varint(uint64_t value) {
    std::string bytes;
    for (; value >= 0x80; value >>= 7) bytes += static_cast<char>((value & 0x7f) | 0x80);
    return bytes + static_cast<char>(value);
  }

  static std::string varint_field(uint64_t number, uint64_t value) { return varint(number << 3) + varint(value); }

  static std::string bytes_field(uint64_t number, const std::string& bytes) {
    return varint(number << 3 | 2) + varint(bytes.size()) + bytes;
  }

  template <typename Word, typename Float>
  static std::string fixed_field(uint64_t number, Float value) {
    return varint(number << 3 | (sizeof(Word) == 4 ? 5 : 1)) + little_endian(std::bit_cast<Word>(value));
  }

  static std::string event(int64_t step) {
    return fixed_field<uint64_t>(1, now()) + varint_field(2, static_cast<uint64_t>(step));
  }

  // CRC-32C (Castagnoli), reflected polynomial 0x82f63b78, then TFRecord's mask.
  static uint32_t masked_crc(const std::string& bytes) {
    static const std::array<uint32_t, 256> kTable = [] {
      std::array<uint32_t, 256> table{};
      for (uint32_t i = 0; i < 256; ++i) {
        table[i] = i;
        for (int bit = 0; bit < 8; ++bit) table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0x82f63b78u : 0u);
      }
      return table;
    }();
    uint32_t crc = ~0u;
    for (const char byte : bytes) crc = crc >> 8 ^ kTable[(crc ^ static_cast<unsigned char>(byte)) & 0xff];
    crc = ~crc;
    return (crc >> 15 | crc << 17) + 0xa282ead8u;
  }

  void write(const std::string& record) {
    const std::string length = little_endian<uint64_t>(record.size());
    file_ << length << little_endian(masked_crc(length)) << record << little_endian(masked_crc(record));
  }

  std::ofstream file_;
};

}  // namespace example
