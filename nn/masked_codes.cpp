#include "nn/masked_codes.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros.h>

#include "nn/safetensors.h"
#include "quantrain/ops/pruning.h"

namespace quantrain::nn::detail {
namespace {

constexpr std::string_view kCodes = "weight_codes", kKept = "weight_codes_kept", kMask = "weight_mask";

// "a.weight_mask" -> "a."; none where the name does not end so.
std::optional<std::string> prefix_of(const std::string& name, std::string_view end) {
  if (!name.ends_with(end)) return std::nullopt;
  std::string prefix = name.substr(0, name.size() - end.size());
  if (!prefix.empty() && prefix.back() != '.') return std::nullopt;
  return prefix;
}

bool fits(const at::Tensor& mask, int64_t numel) {
  return mask.scalar_type() == at::kByte && mask.dim() == 1 && mask.numel() == (numel + 7) / 8;
}

}  // namespace

void keep_codes(NamedTensors& tensors) {
  std::vector<std::string> prefixes;
  for (const auto& item : tensors)
    if (const auto prefix = prefix_of(item.first, kMask)) prefixes.push_back(*prefix);
  for (const std::string& prefix : prefixes) {
    const auto codes = tensors.find(prefix + std::string(kCodes));
    if (codes == tensors.end()) continue;
    const at::Tensor& mask = tensors.at(prefix + std::string(kMask));
    if (!fits(mask, codes->second.numel())) continue;  // two codes to a byte
    const at::Tensor kept = unpack_mask(mask, codes->second.sizes());
    if (codes->second.masked_select(kept.logical_not()).ne(0).any().item<bool>()) continue;
    tensors[prefix + std::string(kKept)] = codes->second.masked_select(kept);
    tensors.erase(codes);
  }
}

void spread_codes(const std::string& path, NamedTensors& tensors,
                  const std::map<std::string, std::vector<int64_t>>& shapes) {
  std::vector<std::string> prefixes;
  for (const auto& item : tensors)
    if (const auto prefix = prefix_of(item.first, kKept)) prefixes.push_back(*prefix);
  for (const std::string& prefix : prefixes) {
    const std::string layer = prefix.empty() ? "" : prefix.substr(0, prefix.size() - 1);
    const auto shape = shapes.find(layer);
    const auto mask = tensors.find(prefix + std::string(kMask));
    if (shape == shapes.end() || mask == tensors.end())
      fail_file(path, "mask and shape of the layer " + in_quotes(layer) + ", whose kept codes it has", "none");
    const int64_t numel = c10::multiply_integers(shape->second);
    if (!fits(mask->second, numel))
      fail_file(path, "a mask of a bit for each of " + std::to_string(numel) + " codes of " + in_quotes(layer),
                shape_text(mask->second.sizes()));
    const at::Tensor given = tensors.at(prefix + std::string(kKept));
    const at::Tensor kept = unpack_mask(mask->second, shape->second);
    const int64_t count = kept.sum().item<int64_t>();
    if (given.dim() != 1 || given.numel() != count || given.is_floating_point())
      fail_file(path, std::to_string(count) + " kept codes of " + in_quotes(layer), shape_text(given.sizes()));
    tensors[prefix + std::string(kCodes)] = at::zeros(shape->second, given.options()).masked_scatter_(kept, given);
    tensors.erase(prefix + std::string(kKept));
  }
}

NamedTensors take_new_masks(const std::string& path, NamedTensors& tensors, const torch::nn::Module& module) {
  NamedTensors masks;
  const auto modules = module.named_modules("", /*include_self=*/true);
  for (auto item = tensors.begin(); item != tensors.end();) {
    const auto prefix = prefix_of(item->first, kMask);
    const std::string owner = !prefix || prefix->empty() ? "" : prefix->substr(0, prefix->size() - 1);
    if (!prefix || !modules.contains(owner) ||
        modules[owner]->named_buffers(/*recurse=*/false).contains(std::string(kMask))) {
      ++item;
      continue;
    }
    const auto weight = tensors.find(*prefix + "weight"), codes = tensors.find(*prefix + std::string(kCodes));
    const auto found = weight != tensors.end() ? weight : codes;
    const int64_t most = found == tensors.end() ? 0 : found->second.numel();
    // Packed codes are fewer bytes than there are bits.
    const bool right =
        found == weight ? fits(item->second, most) : item->second.scalar_type() == at::kByte && item->second.dim() == 1;
    if (found == tensors.end() || !right)
      fail_file(path, "a mask of the weight beside " + in_quotes(item->first), shape_text(item->second.sizes()));
    masks[owner] = item->second;
    item = tensors.erase(item);
  }
  return masks;
}

void add_masks(torch::nn::Module& module, const NamedTensors& masks) {
  const auto modules = module.named_modules("", /*include_self=*/true);
  for (const auto& [owner, mask] : masks) {
    const auto parameters = modules[owner]->named_parameters(/*recurse=*/false);
    const auto buffers = modules[owner]->named_buffers(/*recurse=*/false);
    const at::Device device = parameters.contains("weight") ? parameters["weight"].device()
                              : buffers.is_empty()          ? mask.device()
                                                            : buffers.begin()->value().device();
    modules[owner]->register_buffer(std::string(kMask), mask.to(device));
  }
}

}  // namespace quantrain::nn::detail
