#include "nn/schemes/table.h"

#include <mutex>

#include <ATen/ops/linear.h>
#include <c10/util/Exception.h>

#include "nn/json_fields.h"
#include "nn/layer_arguments.h"

namespace quantrain::nn {

using detail::fail_field;

namespace {

struct Table {
  std::mutex mutex;
  std::vector<SchemeEntry> entries = {detail::int8_entry(), detail::gradient_quant_entry(), detail::fixed_point_entry(),
                                      detail::four_bit_entry(),
                                      detail::ptq_entry()};  // a scheme of the library's own: one line here
};

Table& table() {
  static Table the_table;
  return the_table;
}

}  // namespace

std::vector<SchemeEntry> detail::scheme_entries() {
  const std::lock_guard lock(table().mutex);
  return table().entries;
}

void register_scheme(SchemeEntry entry) {
  const std::lock_guard lock(table().mutex);
  for (const SchemeEntry& known : table().entries) {
    TORCH_CHECK_VALUE(known.kind != entry.kind, "register_scheme: expected a kind that is new, got '", entry.kind, "'");
  }
  table().entries.push_back(std::move(entry));
}

std::unique_ptr<Scheme> make_scheme(const std::string& kind, const std::string& fields) {
  for (const SchemeEntry& entry : detail::scheme_entries()) {
    if (entry.kind != kind) continue;
    std::unique_ptr<Scheme> scheme = entry.make();
    const detail::FieldsJson json = detail::parse_object(scheme->type_name(), fields);
    detail::JsonReader reader(scheme->type_name(), json, entry.inner_type);
    scheme->visit(reader);
    reader.check_all_known();
    scheme->validate();
    return scheme;
  }
  fail_field("Recipe", "scheme to be one of " + detail::words_text(scheme_kinds()), "'" + kind + "'");
}

std::vector<std::string> scheme_kinds() {
  std::vector<std::string> kinds;
  for (const SchemeEntry& entry : detail::scheme_entries()) kinds.push_back(entry.kind);
  return kinds;
}

WeightQparams Scheme::weight_qparams(const at::Tensor& /*weight*/) const {
  TORCH_CHECK_VALUE(false, type_name(), ": expected a scheme with a rule for weights, got one without");
}

at::Tensor Scheme::linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) const {
  return at::linear(input, weight, bias);
}

at::Tensor Scheme::conv2d(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                          const Conv2dArguments& arguments) const {
  return detail::float_conv2d(input, weight, bias, arguments);
}

at::Tensor Scheme::integer_linear(const QuantModule& /*layer*/, const at::Tensor& /*input*/) const {
  TORCH_CHECK_VALUE(false, type_name(), ": expected a scheme of integer products, got one without");
}

std::string Scheme::to_json() const {
  detail::JsonWriter writer;
  const_cast<Scheme*>(this)->visit(writer);  // a writer changes nothing
  return writer.top().dump();
}

bool Scheme::operator==(const Scheme& other) const { return kind() == other.kind() && to_json() == other.to_json(); }

}  // namespace quantrain::nn
