// Fields as JSON, and the errors of both. Private to the library.
//
// On reading, a missing field keeps its default and an unknown one is an error, so that a misspelt field never passes
// in silence.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "nn/json.h"
#include "quantrain/nn/fields.h"

namespace quantrain::nn::detail {

using FieldsJson = nlohmann::ordered_json;

[[noreturn]] inline void fail_field(const std::string& name, const std::string& rule, const std::string& value) {
  throw std::invalid_argument(name + ": expected " + rule + ", got " + value);
}

inline std::string number_text(double value) {
  return std::isfinite(value) ? FieldsJson(value).dump() : std::to_string(value);
}

inline std::string words_text(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

inline void check_one_of(const std::string& name, const std::string& field, const std::string& value,
                         const std::vector<std::string>& allowed) {
  for (const std::string& word : allowed) {
    if (word == value) return;
  }
  fail_field(name, field + " to be one of " + words_text(allowed), "'" + value + "'");
}

inline FieldsJson parse_object(const std::string& name, const std::string& text) {
  FieldsJson json = parse_json(text);
  if (!json.is_object()) fail_field(name, "a JSON object", "'" + text.substr(0, 40) + "'");
  return json;
}

class JsonWriter : public FieldVisitor {
 public:
  using FieldVisitor::operator();
  void field(const char* name, bool& value) override { top()[name] = value; }
  void field(const char* name, int64_t& value) override { top()[name] = value; }
  void field(const char* name, double& value) override { top()[name] = value; }
  void field(const char* name, std::string& value) override { top()[name] = value; }
  void choice(const char* name, int& value, const std::vector<std::string>& names) override {
    top()[name] = names.at(static_cast<size_t>(value));
  }
  Presence enter(const char* name, bool present) override {
    top()[name] = nullptr;
    if (!present) return Presence::kKept;
    names_.push_back(name);
    objects_.push_back(FieldsJson::object());
    return Presence::kPresent;
  }
  void leave() override {
    FieldsJson inner = std::move(objects_.back());
    objects_.pop_back();
    top()[names_.back()] = std::move(inner);
    names_.pop_back();
  }
  FieldsJson& top() { return objects_.back(); }

 private:
  std::vector<FieldsJson> objects_{FieldsJson::object()};
  std::vector<std::string> names_;
};

// type, inner_type: the struct that is read and those inside it, for messages.
class JsonReader : public FieldVisitor {
 public:
  JsonReader(std::string type, const FieldsJson& json, std::string inner_type = "QuantSpec")
      : inner_type_(std::move(inner_type)) {
    frames_.push_back({std::move(type), &json, {}});
  }
  using FieldVisitor::operator();
  void field(const char* name, bool& value) override {
    if (const FieldsJson* json = find(name)) {
      if (!json->is_boolean()) fail_field(type(), std::string(name) + " to be true or false", json->dump());
      value = json->get<bool>();
    }
  }
  void field(const char* name, int64_t& value) override {
    if (const FieldsJson* json = find(name)) {
      if (!json->is_number_integer()) fail_field(type(), std::string(name) + " to be an integer", json->dump());
      value = json->get<int64_t>();
    }
  }
  void field(const char* name, double& value) override {
    if (const FieldsJson* json = find(name)) {
      if (!json->is_number()) fail_field(type(), std::string(name) + " to be a number", json->dump());
      value = json->get<double>();
    }
  }
  void field(const char* name, std::string& value) override {
    if (const FieldsJson* json = find(name)) {
      if (!json->is_string()) fail_field(type(), std::string(name) + " to be a string", json->dump());
      value = json->get<std::string>();
    }
  }
  void choice(const char* name, int& value, const std::vector<std::string>& names) override {
    std::string text = names.at(static_cast<size_t>(value));
    field(name, text);
    check_one_of(type(), name, text, names);
    for (size_t i = 0; i < names.size(); ++i) {
      if (names[i] == text) value = static_cast<int>(i);
    }
  }
  Presence enter(const char* name, bool /*present*/) override {
    const FieldsJson* json = find(name);
    if (!json) return Presence::kKept;
    if (json->is_null()) return Presence::kAbsent;
    if (!json->is_object()) fail_field(type(), std::string(name) + " to be null or an object", json->dump());
    frames_.push_back({inner_type_, json, {}});
    return Presence::kPresent;
  }
  void leave() override {
    check_all_known();
    frames_.pop_back();
  }

  // Throws for a key that was no field, but those in `others`.
  void check_all_known(const std::vector<std::string>& others = {}) const {
    const Frame& frame = frames_.back();
    for (const auto& [key, value] : frame.json->items()) {
      bool known = false;
      for (const std::string& name : frame.known) known = known || name == key;
      for (const std::string& name : others) known = known || name == key;
      const bool vowel = frame.type.starts_with("I");
      if (!known)
        fail_field(frame.type, std::string("only fields of ") + (vowel ? "an " : "a ") + frame.type, "'" + key + "'");
    }
  }

 private:
  struct Frame {
    std::string type;
    const FieldsJson* json;
    std::vector<std::string> known;
  };
  const std::string& type() const { return frames_.back().type; }
  const FieldsJson* find(const char* name) {
    Frame& frame = frames_.back();
    frame.known.push_back(name);
    const auto found = frame.json->find(name);
    return found == frame.json->end() ? nullptr : &*found;
  }
  std::vector<Frame> frames_;
  std::string inner_type_;
};

template <typename T>
FieldsJson to_object(const T& value) {
  JsonWriter writer;
  T::fields(const_cast<T&>(value), writer);  // a writer changes nothing
  return std::move(writer.top());
}

template <typename T>
T from_object(const FieldsJson& json) {
  T value;
  JsonReader reader(T::kTypeName, json);
  T::fields(value, reader);
  reader.check_all_known();
  value.validate();
  return value;
}

}  // namespace quantrain::nn::detail
