// The fields of a struct that travels as text, listed once: its function fields() serves JSON, Python and printing.
//
//   struct Options {
//     int64_t bits = 8;
//     template <typename Self, typename Visitor>
//     static void fields(Self& self, Visitor&& visit) { visit("bits", self.bits); }
//   };
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "quantrain/ops/export.h"

namespace quantrain::nn {

// The names of an enum's values, in their order: specialized beside each enum that a struct of fields holds.
template <typename Enum>
inline constexpr const char* const kNames[] = {""};

template <typename Enum>
std::string name_of(Enum value) {
  return kNames<Enum>[static_cast<int>(value)];
}

// The value of that name. Throws std::invalid_argument: "expected <field> to be one of ..., got ...".
template <typename Enum>
Enum value_of(const std::string& name, const std::string& field = "name") {
  std::string words;
  int index = 0;
  for (const char* known : kNames<Enum>) {
    if (name == known) return static_cast<Enum>(index);
    ++index;
    words += (words.empty() ? "" : ", ") + std::string(known);
  }
  throw std::invalid_argument("expected " + field + " to be one of " + words + ", got '" + name + "'");
}

// Reads or writes the fields that it is shown. A field that a text lacks keeps its value.
class QUANTRAIN_API FieldVisitor {
 public:
  virtual ~FieldVisitor() = default;
  virtual void field(const char* name, bool& value) = 0;
  virtual void field(const char* name, int64_t& value) = 0;
  virtual void field(const char* name, double& value) = 0;
  virtual void field(const char* name, std::string& value) = 0;
  virtual void choice(const char* name, int& value, const std::vector<std::string>& names) = 0;

  enum class Presence { kKept, kAbsent, kPresent };
  virtual Presence enter(const char* name, bool present) = 0;  // an object, or null
  virtual void leave() = 0;

  template <typename T>
  void operator()(const char* name, T& value) {
    if constexpr (std::is_enum_v<T>) {
      int index = static_cast<int>(value);
      choice(name, index, {std::begin(kNames<T>), std::end(kNames<T>)});
      value = static_cast<T>(index);
    } else {
      field(name, value);
    }
  }

  template <typename T>
  void operator()(const char* name, std::optional<T>& value) {
    const Presence presence = enter(name, value.has_value());
    if (presence == Presence::kAbsent) value.reset();
    if (presence != Presence::kPresent) return;
    if (!value) value.emplace();
    T::fields(*value, *this);
    leave();
  }
};

}  // namespace quantrain::nn
