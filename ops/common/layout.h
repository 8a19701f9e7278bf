// From tensors to what kernels take: pointers into dense memory, element types, and the grouping of elements by scale.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

#include "csrc/common/fake_quant.h"

namespace quantrain {

DType dtype_of(const at::Tensor& tensor);

// Of [..., K], taken as a matrix.
c10::SymInt rows_of(const at::Tensor& tensor);

QuantRange make_range(int64_t quant_min, int64_t quant_max);

// Of a signed integer type of any width, or uint8: what people write as an integer tensor (torch.tensor(3) is int64).
bool holds_integers(const at::Tensor& tensor);
void check_integers(std::string_view op, std::string_view name,
                    const at::Tensor& tensor);  // TypeError where it does not

// Such a tensor as int32, saturating; itself where it is int32.
at::Tensor as_int32(const at::Tensor& integers);

// The tensor itself where its elements fill memory without gaps, in any order of dimensions; else a copy that does.
// Either way it has the strides of at::empty_like(tensor), as results do.
at::Tensor dense(const at::Tensor& tensor);

// Contiguous or channels last, whichever is nearer; the tensor itself where it is one of them.
at::Tensor regular(const at::Tensor& tensor);

// An empty tensor as regular(tensor), of any element type.
at::Tensor empty_regular(const at::Tensor& tensor, at::ScalarType type);

// The tensor itself where it has the strides of `like`, else a copy that does.
at::Tensor strided_as(const at::Tensor& tensor, const at::Tensor& like);

// An input with its parameters in the order of its memory.
struct Arranged {
  at::Tensor input;                      // dense
  at::Tensor scale;                      // float32 or int32, contiguous, dimensions in the order of input's memory
  std::optional<at::Tensor> zero_point;  // likewise
  std::vector<int64_t> order;            // that order; empty: as they are
  Grouping grouping;

  QParamTensors qparams() const;
};

Arranged arrange(std::string_view op, const at::Tensor& input, const at::Tensor& scale,
                 const std::optional<at::Tensor>& zero_point);

// The grouping of a dense input by a scale's shape alone, where there are no parameters yet.
struct ArrangedShape {
  at::Tensor input;
  std::vector<int64_t> scale_sizes;  // in the order of input's memory
  std::vector<int64_t> order;
  Grouping grouping;
};

ArrangedShape arrange_shape(std::string_view op, const at::Tensor& input, at::IntArrayRef scale_shape);

enum class Fold { kSum, kMin, kMax };

// Partial results [..., rows, chunks] to [..., scale sizes], in a fixed order; leading dimensions stay. `scale_sizes`
// are in the order of the input's memory, the result's are in the order of its dimensions.
at::Tensor fold_partials(const at::Tensor& partial, const Grouping& grouping, at::IntArrayRef scale_sizes,
                         const std::vector<int64_t>& order, Fold fold);

// True where rows are so short that reducing them would waste the machine, and a copy can make them longer.
bool wants_regrouping(const Grouping& grouping);

// [groups, elements of a group], contiguous, and back.
at::Tensor regroup(const at::Tensor& input, at::IntArrayRef scale_shape);
at::Tensor ungroup(const at::Tensor& grouped, at::IntArrayRef sizes, at::IntArrayRef scale_shape);

}  // namespace quantrain
