#include "quantrain/nn/gradient_probe.h"

// JSON and text of a GradientProbe. The names of the JSON are those of the structs in the header.

#include <algorithm>
#include <iomanip>
#include <sstream>

#include <nlohmann/json.hpp>

namespace quantrain::nn {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kMostBits = 8;

Json to_json_value(const std::optional<double>& value) { return value ? Json(*value) : Json(nullptr); }

Json quantizer_json(const GradientSpec& spec) { return Json::parse(spec.to_json()); }

std::string text_of(const std::optional<double>& value) {
  if (!value) return "-";
  std::ostringstream text;
  text << std::setprecision(3) << *value;
  return text.str();
}

std::string name_of(const GradientSpec& spec) { return spec.quantizer + ":" + std::to_string(spec.bits); }

// Columns aligned, the first two to the left.
std::string aligned(const std::vector<std::vector<std::string>>& lines) {
  std::vector<size_t> widths(lines.front().size(), 0);
  for (const auto& line : lines)
    for (size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], line[i].size());
  std::ostringstream text;
  for (const auto& line : lines) {
    for (size_t i = 0; i < line.size(); ++i)
      text << (i ? "  " : "") << (i < 2 ? std::left : std::right) << std::setw(static_cast<int>(widths[i])) << line[i];
    text << "\n";
  }
  return text.str();
}

}  // namespace

std::string GradientProbe::to_json() const {
  Json rows_json = Json::array(), layers_json = Json::array(), advice_json = Json::array();
  for (const ProbeRow& row : rows())
    rows_json.push_back({{"layer", row.layer},
                         {"quantizer", quantizer_json(row.quantizer)},
                         {"rows", row.rows},
                         {"columns", row.columns},
                         {"observations", row.observations},
                         {"skipped", row.skipped},
                         {"gradient_square", row.gradient_square},
                         {"variance", row.variance},
                         {"exact_variance", row.exact_variance},
                         {"bound", row.bound},
                         {"bias_z", row.bias_z},
                         {"weight_variance", to_json_value(row.weight_variance)},
                         {"network_variance", to_json_value(row.network_variance)}});
  for (const ProbeLayer& layer : layers())
    layers_json.push_back({{"layer", layer.layer},
                           {"batches", layer.batches},
                           {"gradient_square", to_json_value(layer.gradient_square)},
                           {"batch_variance", to_json_value(layer.batch_variance)},
                           {"repeat_variance", to_json_value(layer.repeat_variance)}});
  for (const ProbeAdvice& advice : recommend())
    advice_json.push_back({{"layer", advice.layer},
                           {"quantizer", quantizer_json(advice.quantizer)},
                           {"basis", advice.basis},
                           {"ratio", advice.ratio},
                           {"allowed", advice.allowed},
                           {"bits_needed", advice.bits_needed}});
  const GradientProbeOptions& options = this->options();
  return Json{{"format", "quantrain gradient probe"},
              {"version", 1},
              {"draws", options.draws},
              {"fraction", options.fraction},
              {"seed", options.seed},
              {"rows", rows_json},
              {"layers", layers_json},
              {"advice", advice_json}}
      .dump(1);
}

std::string GradientProbe::table() const {
  std::vector<std::vector<std::string>> lines{
      {"layer", "quantizer", "bias z", "variance/|g|^2", "bound/|g|^2", "batch variance", "ratio", "bits needed"}};
  const std::vector<ProbeAdvice> advice = recommend();
  const std::vector<ProbeLayer> batches = layers();
  for (const ProbeRow& row : rows()) {
    const auto batch =
        std::find_if(batches.begin(), batches.end(), [&](const auto& l) { return l.layer == row.layer; });
    const auto found = std::find_if(advice.begin(), advice.end(), [&](const auto& a) {
      return a.layer == row.layer && a.quantizer == row.quantizer;
    });
    const bool advised = found != advice.end(), seen = row.gradient_square > 0;
    const auto relative = [&](double value) {
      return seen ? std::optional(value / row.gradient_square) : std::nullopt;
    };
    lines.push_back({row.layer, name_of(row.quantizer), text_of(row.bias_z), text_of(relative(row.variance)),
                     text_of(relative(row.bound)), text_of(batch->batch_variance),
                     text_of(advised ? std::optional(found->ratio) : std::nullopt),
                     !advised                         ? "-"
                     : found->bits_needed > kMostBits ? ">8"
                                                      : std::to_string(found->bits_needed)});
  }
  return aligned(lines);
}

}  // namespace quantrain::nn
