// Reading JSON of which nothing is trusted, with the errors of an integer network. Private to the library.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "ops/common/check.h"

namespace quantrain::nn::detail {

using Json = nlohmann::ordered_json;

[[noreturn]] inline void fail(const std::string& where, const std::string& rule, const std::string& value) {
  TORCH_CHECK_VALUE(false, "FixedPointNetwork: ", where, ": expected ", rule, ", got ", value);
}

inline std::string in_quotes(const std::string& text) { return "'" + text + "'"; }

inline std::string shortened(const Json& json) {
  const std::string text = json.dump(-1, ' ', /*ensure_ascii=*/true);  // so that the cut leaves whole characters
  return text.size() > 80 ? text.substr(0, 77) + "..." : text;
}

// An object whose fields must all be read: whatever is left over is unknown.
class Fields {
 public:
  Fields(std::string where, const Json& json) : where_(std::move(where)), json_(json) {
    if (!json.is_object()) fail(where_, "a JSON object", shortened(json));
  }

  const std::string& where() const { return where_; }
  void set_where(std::string where) { where_ = std::move(where); }

  const Json& get(const char* key) {
    if (!json_.contains(key)) fail(where_, std::string("the field ") + in_quotes(key), "none");
    read_.insert(key);
    return json_[key];
  }

  std::string string(const char* key) {
    const Json& json = get(key);
    if (!json.is_string()) fail(where_, std::string(key) + " to be a string", shortened(json));
    return json.get<std::string>();
  }

  bool boolean(const char* key) {
    const Json& json = get(key);
    if (!json.is_boolean()) fail(where_, std::string(key) + " to be true or false", shortened(json));
    return json.get<bool>();
  }

  double number(const char* key) {
    const Json& json = get(key);
    if (!json.is_number()) fail(where_, std::string(key) + " to be a number", shortened(json));
    return json.get<double>();
  }

  int64_t integer(const char* key, int64_t low, int64_t high) { return integer(key, get(key), low, high); }

  std::array<int64_t, 2> pair(const char* key, int64_t low, int64_t high) {
    const Json& json = get(key);
    if (!json.is_array() || json.size() != 2) fail(where_, std::string(key) + " to be two integers", shortened(json));
    return {integer(key, json[0], low, high), integer(key, json[1], low, high)};
  }

  // One integer, or a list of `length`.
  std::vector<int64_t> integers(const char* key, int64_t length, int64_t low, int64_t high) {
    const Json& json = get(key);
    if (!json.is_array()) return {integer(key, json, low, high)};
    if (static_cast<int64_t>(json.size()) != length) {
      fail(where_, std::string(key) + " to be one integer or a list of " + std::to_string(length),
           "a list of " + std::to_string(json.size()));
    }
    std::vector<int64_t> values;
    for (const Json& item : json) values.push_back(integer(key, item, low, high));
    return values;
  }

  void done() const {
    for (const auto& item : json_.items()) {
      if (!read_.count(item.key())) fail(where_, "only known fields", in_quotes(item.key()));
    }
  }

 private:
  int64_t integer(const char* key, const Json& json, int64_t low, int64_t high) const {
    const bool fits =
        json.is_number_integer() &&
        (!json.is_number_unsigned() || json.get<uint64_t>() <= uint64_t{std::numeric_limits<int64_t>::max()});
    if (!fits || json.get<int64_t>() < low || json.get<int64_t>() > high) {
      fail(where_, std::string(key) + " to be an integer from " + std::to_string(low) + " to " + std::to_string(high),
           shortened(json));
    }
    return json.get<int64_t>();
  }

  std::string where_;
  const Json& json_;
  std::set<std::string> read_;
};

}  // namespace quantrain::nn::detail
