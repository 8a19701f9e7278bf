#include "nn/four_bit_formats/common.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>

#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/stack.h>
#include <c10/util/Exception.h>

namespace quantrain::nn::detail {

static_assert(std::endian::native == std::endian::little, "packed words are read as bytes");

void fail_format(std::string_view function, const std::string& rule, const std::string& value) {
  TORCH_CHECK_VALUE(false, function, ": expected ", rule, ", got ", value);
}

std::string sizes_text(at::IntArrayRef sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

std::string layer_key(const std::string& prefix, std::string_view name) {
  return prefix.empty() ? std::string(name) : prefix + "." + std::string(name);
}

int64_t checked_numel(std::string_view function, const std::string& what, at::IntArrayRef sizes) {
  int64_t numel = 1;
  for (const int64_t size : sizes) {
    if (size < 1 || numel > std::numeric_limits<int64_t>::max() / size)
      fail_format(function, what + " to be positive sizes of fewer than 2^63 elements", sizes_text(sizes));
    numel *= size;
  }
  if (sizes.empty()) fail_format(function, what + " to be positive sizes of fewer than 2^63 elements", "[]");
  return numel;
}

namespace {

std::string names_of(std::initializer_list<at::ScalarType> types) {
  std::string names;
  for (const at::ScalarType type : types) names += (names.empty() ? "" : " or ") + std::string(c10::toString(type));
  return names;
}

}  // namespace

at::Tensor LayerTensors::get(std::string_view name, std::initializer_list<at::ScalarType> types) const {
  const auto found = tensors_.find(key(name));
  if (found == tensors_.end()) fail("a tensor " + in_quotes(key(name)), "none");
  const at::Tensor& tensor = found->second;
  if (!tensor.defined()) fail("a tensor " + in_quotes(key(name)), "an undefined one");
  if (types.size() != 0 && std::find(types.begin(), types.end(), tensor.scalar_type()) == types.end()) {
    fail(in_quotes(key(name)) + " of type " + names_of(types), c10::toString(tensor.scalar_type()));
  }
  return tensor.detach().contiguous();
}

at::Tensor LayerTensors::get(std::string_view name, std::initializer_list<at::ScalarType> types,
                             at::IntArrayRef sizes) const {
  const at::Tensor tensor = get(name, types);
  check_sizes(name, tensor, sizes);
  return tensor;
}

at::Tensor LayerTensors::get_matrix(std::string_view name, std::initializer_list<at::ScalarType> types) const {
  const at::Tensor tensor = get(name, types);
  if (tensor.dim() != 2 || tensor.numel() == 0)
    fail(in_quotes(key(name)) + " to be a matrix with elements", "shape " + sizes_text(tensor.sizes()));
  return tensor;
}

at::Tensor LayerTensors::bias(int64_t rows) const {
  return has("bias") ? get("bias", kFloatTypes, {rows}) : at::Tensor();
}

void LayerTensors::check_sizes(std::string_view name, const at::Tensor& tensor, at::IntArrayRef sizes) const {
  if (!tensor.sizes().equals(sizes))
    fail(in_quotes(key(name)) + " of shape " + sizes_text(sizes), sizes_text(tensor.sizes()));
}

std::vector<int64_t> integers_of(const at::Tensor& tensor) {
  const at::Tensor values = tensor.to(at::kCPU, at::kLong).contiguous();
  return {values.const_data_ptr<int64_t>(), values.const_data_ptr<int64_t>() + values.numel()};
}

bool equal_values(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes().equals(b.sizes()) && a.eq(b).logical_or(a.isnan().logical_and(b.isnan())).all().item<bool>();
}

at::Tensor bytes_as(const at::Tensor& tensor, at::ScalarType type) {
  at::Tensor dense = tensor.contiguous();
  // A tensor of one column is contiguous with any stride, and a slice may begin anywhere.
  const auto offset = dense.storage_offset() * static_cast<int64_t>(dense.element_size());
  if (dense.stride(-1) != 1 || offset % static_cast<int64_t>(c10::elementSize(type)) != 0)
    dense = dense.clone(at::MemoryFormat::Contiguous);
  return dense.view(type);
}

at::Tensor unpack_nibbles(const at::Tensor& bytes) {
  return at::stack({bytes.bitwise_and(15), bytes.bitwise_right_shift(4)}, -1).flatten(-2);
}

at::Tensor pack_nibbles(const at::Tensor& nibbles) {
  const at::Tensor pairs = nibbles.unflatten(-1, {nibbles.size(-1) / 2, 2});
  return pairs.select(-1, 1).bitwise_left_shift(4).bitwise_or(pairs.select(-1, 0));
}

at::Tensor unpack_words(const at::Tensor& words) { return unpack_nibbles(bytes_as(words, at::kByte)); }

at::Tensor pack_words(const at::Tensor& nibbles) {
  const int64_t missing = (8 - nibbles.size(-1) % 8) % 8;
  const at::Tensor filled = missing ? at::constant_pad_nd(nibbles, {0, missing}) : nibbles;
  return bytes_as(pack_nibbles(filled), at::kInt);
}

at::Tensor listed_groups(const LayerTensors& layer, std::string_view g_idx, int64_t columns, int64_t groups) {
  if (!layer.has(g_idx) || layer.get(g_idx, kIndexTypes).numel() == 0) return {};
  const at::Tensor group = layer.get(g_idx, kIndexTypes, {columns}).to(at::kLong);
  const int64_t low = group.min().item<int64_t>();
  const int64_t high = group.max().item<int64_t>();
  if (low == high && (low == -1 || (low == 0 && groups > 1))) return {};
  if (low < 0 || high >= groups)
    layer.fail(in_quotes(layer.key(g_idx)) + " within 0 and " + std::to_string(groups - 1),
               std::to_string(low < 0 ? low : high));
  return group;
}

at::Tensor even_groups(const LayerTensors& layer, int64_t columns, int64_t groups, int64_t group_size) {
  if (group_size < 0) layer.fail("a group size that is not negative", std::to_string(group_size));
  if (group_size == 0) {
    if (columns % groups != 0)
      layer.fail("a number of groups that divides " + std::to_string(columns) + " columns, or a group size",
                 std::to_string(groups));
    return {};
  }
  const int64_t expected = (columns - 1) / group_size + 1;
  if (expected != groups)
    layer.fail(std::to_string(expected) + " groups of " + std::to_string(group_size) + " for " +
                   std::to_string(columns) + " columns",
               std::to_string(groups) + " scales a row");
  return at::arange(columns, at::kLong).div(group_size, "floor");
}

namespace {

bool in_rows(int64_t columns, int64_t block_size) { return columns % block_size == 0 && columns % 2 == 0; }

int64_t number_of_blocks(int64_t numel, int64_t block_size) { return (numel - 1) / block_size + 1; }

// Both nibbles of each byte from 0..15 to two's complement of the value less 8; what follows an odd number of elements
// becomes the code of 0.
at::Tensor less_eight(const at::Tensor& packed, int64_t elements) {
  at::Tensor codes = packed.bitwise_xor(0x88);
  if (elements % 2 != 0) codes.narrow(0, elements / 2, 1).bitwise_and_(15);
  return codes;
}

// The largest length that divides every run of equal groups, for columns in the order of their groups.
int64_t common_run(const at::Tensor& sorted) {
  const std::vector<int64_t> groups = integers_of(sorted);
  int64_t common = static_cast<int64_t>(groups.size());
  for (size_t i = 1; i < groups.size(); ++i) {
    if (groups[i] != groups[i - 1]) common = std::gcd(common, static_cast<int64_t>(i));
  }
  return common;
}

}  // namespace

at::Tensor pack_elements(const at::Tensor& codes, const at::Tensor& zero_point) {
  at::Tensor flat = codes.reshape({-1});
  if (flat.numel() % 2 != 0) {
    at::Tensor zero = at::full_like(flat.narrow(0, 0, 1), 0);
    if (zero_point.defined() && !zero_point.is_floating_point())
      zero = zero_point.reshape({-1}).narrow(0, zero_point.numel() - 1, 1).to(at::kByte);
    flat = at::cat({flat, zero});
  }
  return pack_nibbles(flat);
}

void lay_out(FourBitWeight& weight, const at::Tensor& packed, const at::Tensor& scale, const at::Tensor& zero_point) {
  const int64_t columns = weight.size.back();
  const bool rows = in_rows(columns, weight.block_size);
  std::vector<int64_t> code_sizes = weight.size;
  std::vector<int64_t> scale_sizes = weight.size;
  code_sizes.back() = columns / 2;
  scale_sizes.back() = columns / weight.block_size;
  const auto shaped = [rows](const at::Tensor& tensor, const std::vector<int64_t>& sizes) {
    return (rows ? tensor.reshape(sizes) : tensor.reshape({-1})).contiguous();
  };
  weight.codes = shaped(packed, code_sizes);
  weight.scale = shaped(scale, scale_sizes);
  if (zero_point.defined()) weight.zero_point = shaped(zero_point, scale_sizes);
}

FourBitWeight pack_integers(const IntegerCodes& parts) {
  const at::Tensor& source = parts.packed.defined() ? parts.packed : parts.codes;
  const int64_t columns = parts.packed.defined() ? parts.packed.size(1) * 2 : parts.codes.size(1);
  FourBitWeight weight;
  weight.format = parts.zero_point.defined() ? "uint4" : "int4";
  weight.size = {source.size(0), columns};
  weight.dtype = parts.scale.scalar_type();
  weight.block_size = columns / parts.scale.size(1);
  at::Tensor scale = parts.scale.to(at::kFloat);
  at::Tensor zero_point = parts.zero_point;
  if (parts.group.defined()) {
    const at::Tensor group = parts.group.to(source.device());
    const at::Tensor order = at::argsort(group, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    const at::Tensor sorted = group.index_select(0, order);
    if (!order.equal(at::arange(columns, order.options()))) weight.permutation = order;
    weight.block_size = common_run(sorted);
    const at::Tensor group_of_block = sorted.slice(0, 0, columns, weight.block_size);
    scale = scale.index_select(1, group_of_block);
    if (zero_point.defined()) zero_point = zero_point.index_select(1, group_of_block);
  }
  at::Tensor packed = parts.packed;
  if (!packed.defined() || weight.permutation.defined()) {
    at::Tensor codes = packed.defined() ? unpack_nibbles(packed) : parts.codes;
    if (weight.permutation.defined()) codes = codes.index_select(1, weight.permutation);
    packed = pack_elements(codes, zero_point);
  }
  if (!zero_point.defined()) packed = less_eight(packed, weight.size[0] * columns);
  lay_out(weight, packed, scale, zero_point);
  return weight;
}

void check_weight(std::string_view function, const FourBitWeight& weight) {
  using Types = std::initializer_list<at::ScalarType>;
  const int64_t numel = checked_numel(function, "the weight's size", weight.size);
  if (weight.block_size < 1) fail_format(function, "a block_size of at least 1", std::to_string(weight.block_size));
  const int64_t blocks = number_of_blocks(numel, weight.block_size);
  const auto check = [&](const char* name, const at::Tensor& tensor, Types types, int64_t elements) {
    if (!tensor.defined()) fail_format(function, std::string("a weight with ") + name, "none");
    if (std::find(types.begin(), types.end(), tensor.scalar_type()) == types.end())
      fail_format(function, std::string(name) + " of type " + names_of(types), c10::toString(tensor.scalar_type()));
    if (tensor.numel() != elements)
      fail_format(function,
                  std::string(name) + " of " + std::to_string(elements) + " elements for a weight " +
                      sizes_text(weight.size) + " in blocks of " + std::to_string(weight.block_size),
                  std::to_string(tensor.numel()));
  };
  const bool compressed = weight.scale_scale.defined();
  check("codes", weight.codes, {at::kByte}, numel / 2 + numel % 2);
  check("scale", weight.scale, compressed ? Types{at::kByte} : Types{at::kFloat}, blocks);
  if (compressed) {
    check("scale_scale", weight.scale_scale, {at::kFloat}, number_of_blocks(blocks, 256));
    check("scale_offset", weight.scale_offset, {at::kFloat}, 1);
  }
  if (weight.format == "uint4") check("zero_point", weight.zero_point, {at::kInt, at::kFloat}, blocks);
  if (weight.permutation.defined()) check("permutation", weight.permutation, {at::kLong}, weight.size.back());
  if (weight.bias.defined()) check("bias", weight.bias, kFloatTypes, weight.size.front());
}

namespace {

// One value a group from one a block [N, K / block_size]: the blocks of a group must agree.
at::Tensor merge_blocks(std::string_view function, const char* name, const at::Tensor& blocks, const at::Tensor& first,
                        const at::Tensor& group_of_block, int64_t group_size) {
  at::Tensor groups = blocks.index_select(1, first);
  if (!equal_values(groups.index_select(1, group_of_block), blocks))
    fail_format(function, std::string("blocks with one ") + name + " in each group of " + std::to_string(group_size),
                "blocks that differ");
  return groups;
}

at::Tensor stored_scale(std::string_view function, const at::Tensor& scale, at::ScalarType dtype, bool round_scale) {
  at::Tensor stored = scale.to(dtype);
  if (!round_scale && !equal_values(stored.to(at::kFloat), scale))
    fail_format(function,
                std::string("scales that ") + c10::toString(dtype) + " holds exactly, or round_scale (which changes " +
                    "the weight)",
                "others");
  return stored;
}

// The size of groups, a multiple of the block_size.
int64_t check_integers(std::string_view function, const FourBitWeight& weight, int64_t group_size) {
  if (weight.format != "int4" && weight.format != "uint4")
    fail_format(function, "a weight of format int4 or uint4", in_quotes(weight.format));
  check_weight(function, weight);
  if (weight.size.size() != 2) fail_format(function, "a weight [N, K]", sizes_text(weight.size));
  if (weight.scale_scale.defined()) fail_format(function, "scales in float32", "compressed ones");
  if (weight.format == "uint4" && weight.zero_point.is_floating_point())
    fail_format(function, "integer zero points", "float32 ones");
  if (std::find(kFloatTypes.begin(), kFloatTypes.end(), weight.dtype) == kFloatTypes.end())
    fail_format(function, "a dtype of Float, Half or BFloat16", c10::toString(weight.dtype));
  if (weight.size[1] % weight.block_size != 0)
    fail_format(function, "a block_size that divides " + std::to_string(weight.size[1]) + " columns",
                std::to_string(weight.block_size));
  const int64_t size = group_size == 0 ? weight.block_size : group_size;
  if (size < 0 || size % weight.block_size != 0)
    fail_format(function, "a group size that is a multiple of the block_size " + std::to_string(weight.block_size),
                std::to_string(size));
  return size;
}

// Puts the columns back into the input's order.
void undo_permutation(std::string_view function, const at::Tensor& permutation, IntegerCodes& parts) {
  const at::Tensor inverse = permutation.argsort();
  if (!permutation.index_select(0, inverse).equal(at::arange(permutation.numel(), inverse.options())))
    fail_format(function, "a permutation of " + std::to_string(permutation.numel()) + " columns", "another tensor");
  parts.codes = parts.codes.index_select(1, inverse);
  parts.group = parts.group.index_select(0, inverse);
}

}  // namespace

IntegerCodes unpack_integers(std::string_view function, const FourBitWeight& weight, int64_t group_size,
                             bool round_scale) {
  const int64_t size = check_integers(function, weight, group_size);
  const int64_t rows = weight.size[0];
  const int64_t columns = weight.size[1];
  const at::Tensor scale = weight.scale.detach().reshape({rows, -1});
  const at::Tensor group_of_block =
      at::arange(scale.size(1), scale.options().dtype(at::kLong)).mul(weight.block_size).div(size, "floor");
  const int64_t groups = (columns - 1) / size + 1;
  const at::Tensor first = at::arange(groups, group_of_block.options()).mul(size / weight.block_size);
  const auto merged = [&](const char* name, const at::Tensor& blocks) {
    return merge_blocks(function, name, blocks, first, group_of_block, size);
  };

  IntegerCodes parts;
  parts.scale = stored_scale(function, merged("scale", scale), weight.dtype, round_scale);
  parts.codes = unpack_nibbles(weight.codes.detach().reshape({-1})).narrow(0, 0, rows * columns).view({rows, columns});
  if (weight.format == "int4") {
    parts.codes = parts.codes.bitwise_xor(8);
  } else {
    parts.zero_point = merged("zero point", weight.zero_point.detach().reshape({rows, -1}));
    const int64_t low = parts.zero_point.min().item<int64_t>();
    const int64_t high = parts.zero_point.max().item<int64_t>();
    if (low < 0 || high > 15) fail_format(function, "zero points of 0 to 15", std::to_string(low < 0 ? low : high));
  }
  parts.group = at::arange(columns, group_of_block.options()).div(size, "floor");
  if (weight.permutation.defined()) undo_permutation(function, weight.permutation.detach(), parts);
  return parts;
}

}  // namespace quantrain::nn::detail
