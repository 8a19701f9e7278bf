// What the formats share: a layer's tensors by name, with checks; nibbles; the layout of integer codes. Private.
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include <ATen/core/Tensor.h>

#include "quantrain/nn/four_bit_formats.h"

namespace quantrain::nn::detail {

// The message is "<function>: expected <rule>, got <value>".
[[noreturn]] void fail_format(std::string_view function, const std::string& rule, const std::string& value);

std::string sizes_text(at::IntArrayRef sizes);

// "weight" of the layer "a.b" is "a.b.weight", of the layer "" it is "weight".
std::string layer_key(const std::string& prefix, std::string_view name);

// "'key' to be" and "'key' of", for rules.
inline std::string in_quotes(std::string_view key) { return "'" + std::string(key) + "'"; }

// Number of elements; the sizes are positive and their product fits, or ValueError. `what` is for messages.
int64_t checked_numel(std::string_view function, const std::string& what, at::IntArrayRef sizes);

inline constexpr std::initializer_list<at::ScalarType> kFloatTypes = {at::kFloat, at::kHalf, at::kBFloat16};
inline constexpr std::initializer_list<at::ScalarType> kIndexTypes = {at::kInt, at::kLong};

// The tensors of one layer.
class LayerTensors {
 public:
  LayerTensors(std::string_view function, const FourBitTensors& tensors, const std::string& prefix)
      : function_(function), tensors_(tensors), prefix_(prefix) {}

  std::string key(std::string_view name) const { return layer_key(prefix_, name); }
  bool has(std::string_view name) const { return tensors_.count(key(name)) != 0; }

  // Contiguous and without gradient. ValueError where it is missing or of another type.
  at::Tensor get(std::string_view name, std::initializer_list<at::ScalarType> types) const;
  at::Tensor get(std::string_view name, std::initializer_list<at::ScalarType> types, at::IntArrayRef sizes) const;
  at::Tensor get_matrix(std::string_view name, std::initializer_list<at::ScalarType> types) const;
  at::Tensor bias(int64_t rows) const;  // undefined where there is none

  void check_sizes(std::string_view name, const at::Tensor& tensor, at::IntArrayRef sizes) const;
  [[noreturn]] void fail(const std::string& rule, const std::string& value) const {
    fail_format(function_, rule, value);
  }
  std::string_view function() const { return function_; }

 private:
  std::string_view function_;
  const FourBitTensors& tensors_;
  const std::string& prefix_;
};

// The few integers of a tensor that describes another.
std::vector<int64_t> integers_of(const at::Tensor& tensor);

// Equal, with NaN equal to NaN.
bool equal_values(const at::Tensor& a, const at::Tensor& b);

// The same bytes as elements of another type: at::Tensor::view, for any strides and offset.
at::Tensor bytes_as(const at::Tensor& tensor, at::ScalarType type);

// uint8 [..., n] -> [..., 2 n] of 0..15, the low nibble of a byte first; and back, for an even last dimension.
at::Tensor unpack_nibbles(const at::Tensor& bytes);
at::Tensor pack_nibbles(const at::Tensor& nibbles);

// int32 [..., n], 8 nibbles each from the lowest bits up -> uint8 [..., 8 n] of 0..15; and back, where the last
// dimension is filled with zeros to a multiple of 8.
at::Tensor unpack_words(const at::Tensor& words);
at::Tensor pack_words(const at::Tensor& nibbles);

// Integer codes of a weight [N, K] as files have them.
struct IntegerCodes {
  at::Tensor codes;       // uint8 [N, K], 0..15, the columns in the input's order
  at::Tensor packed;      // in place of codes, for pack_integers: the same packed, uint8 [N, K / 2], K even
  at::Tensor scale;       // [N, G], of the file's type
  at::Tensor zero_point;  // int32 [N, G]; undefined: 8, which codes of int4 do without
  at::Tensor group;       // int64 [K], the column's group; undefined: G runs of equal length
};

// The groups of columns as g_idx has them, int64 [columns]. Undefined where there is none, or one that was never set:
// of zeros alone, or of compressed-tensors' -1. ValueError where it is not within 0..groups - 1.
at::Tensor listed_groups(const LayerTensors& layer, std::string_view g_idx, int64_t columns, int64_t groups);

// The groups of columns that are runs of group_size, the last one short or not. Undefined where group_size is 0 and
// `groups` divides the columns, ValueError where it does not.
at::Tensor even_groups(const LayerTensors& layer, int64_t columns, int64_t groups, int64_t group_size);

// Sorts the columns by group and packs them.
FourBitWeight pack_integers(const IntegerCodes& parts);

// Bytes of two elements each from one code an element; zero_point for the nibble after an odd number of them.
at::Tensor pack_elements(const at::Tensor& codes, const at::Tensor& zero_point);

// Codes, scale and zero point in the shapes of FourBitWeight, from bytes of two elements and one scale a block.
void lay_out(FourBitWeight& weight, const at::Tensor& packed, const at::Tensor& scale, const at::Tensor& zero_point);

// The other way, with g_idx in `group` and scales of type weight.dtype. ValueError for a weight that is not int4 or
// uint4 with integer zero points, whose parts do not fit each other, or that the format cannot hold.
IntegerCodes unpack_integers(std::string_view function, const FourBitWeight& weight, int64_t group_size,
                             bool round_scale);

// ValueError where the parts of `weight` do not have the layout that its size and block_size say.
void check_weight(std::string_view function, const FourBitWeight& weight);

}  // namespace quantrain::nn::detail
