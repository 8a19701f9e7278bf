// Text from outside as JSON. The parser takes any depth, but what follows it (copies, dumps) recurses: 80,000 brackets
// overflow the stack.
#pragma once

#include <string_view>

#include <nlohmann/json.hpp>

namespace quantrain::nn::detail {

constexpr int kMaxJsonDepth = 64;  // of recipes, graphs and headers: a tenth is used

// Whether brackets nest no deeper than that. Brackets inside strings do not count.
inline bool is_shallow(std::string_view text) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kMaxJsonDepth) return false;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return true;
}

// Discarded (no object, no array, nothing) where the text is not JSON or nests too deep.
template <typename Json = nlohmann::ordered_json>
Json parse_json(std::string_view text) {
  if (!is_shallow(text)) return Json(nlohmann::detail::value_t::discarded);
  return Json::parse(text, nullptr, /*allow_exceptions=*/false);
}

}  // namespace quantrain::nn::detail
