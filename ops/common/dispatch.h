// Looking an operator up by name: once, where it is first called.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <string_view>

namespace quantrain {

// The operator quantrain::<name>, of the overload: static const auto op = find_operator<decltype(kernel)>("quantize",
// "seeded").
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(std::string_view name, const char* overload = "") {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(("quantrain::" + std::string(name)).c_str(), overload)
      .typed<Signature>();
}

}  // namespace quantrain
