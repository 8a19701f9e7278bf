// Command-line flags, each taken once by name.
#pragma once

#include <charconv>
#include <cstdint>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace example::detail {

[[noreturn]] inline void fail(const std::string& rule, const std::string& value) {
  throw std::invalid_argument("expected " + rule + ", got " + value);
}

// "--name value", and "--name" alone for those in `switches`; what nobody took is refused by finish().
class Flags {
 public:
  Flags(int argc, char** argv, const std::set<std::string>& switches) {
    for (int i = 1; i < argc; ++i) {
      const std::string argument = argv[i];
      if (argument.rfind("--", 0) != 0) fail("arguments of --help", "'" + argument + "'");
      const std::string name = argument.substr(2);
      if (!switches.count(name) && i + 1 == argc) fail("a value for " + argument, "none");
      values_[name] = switches.count(name) ? "" : argv[++i];
    }
  }

  bool take(const std::string& name) { return values_.erase(name) > 0; }

  void take(const std::string& name, std::string& value) {
    if (auto node = values_.extract(name)) value = node.mapped();
  }

  // A number of at least `least`; `value` stays where the flag is absent.
  template <typename T>
  void take(const std::string& name, T& value, T least) {
    const auto node = values_.extract(name);
    if (!node) return;
    const std::string& text = node.mapped();
    const char* const end_of_text = text.data() + text.size();
    const auto [end, error] = std::from_chars(text.data(), end_of_text, value);
    if (error != std::errc() || end != end_of_text) {
      fail(std::string(std::is_integral_v<T> ? "a whole number" : "a number") + " for --" + name, "'" + text + "'");
    }
    std::ostringstream rule;
    rule << "--" << name << " of at least " << least;
    if (!(value >= least)) fail(rule.str(), text);
  }

  void finish() const {
    if (!values_.empty()) fail("arguments of --help", "'--" + values_.begin()->first + "'");
  }

 private:
  std::map<std::string, std::string> values_;
};

inline void check_one_of(const std::string& flag, const std::string& value, const std::vector<std::string>& names) {
  std::string rule = flag;
  for (const std::string& name : names) {
    if (name == value) return;
    rule += (&name == &names.front() ? " " : " or ") + name;
  }
  fail(rule, "'" + value + "'");
}

}  // namespace example::detail
