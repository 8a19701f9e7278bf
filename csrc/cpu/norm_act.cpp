#include "csrc/cpu/norm_act.h"

#include <algorithm>
#include <limits>

#include "csrc/cpu/fake_quant_blocks.h"
#include "csrc/cpu/mask_bits.h"

// Rows in blocks that stay in the first-level cache: z is computed anew for each pass over a row.

namespace quantrain::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Buffers {
  alignas(64) float x[kBlock], other[kBlock], weight[kBlock], bias[kBlock], z[kBlock], out[kBlock];
  alignas(64) uint8_t passes[kBlock];
};

// n values from element `at`, as float32.
template <typename T>
QUANTRAIN_INLINE const float* load(const void* from, int64_t at, int n, float* buffer) {
  return load_block(static_cast<const T*>(from) + at, n, buffer);
}

template <typename T>
QUANTRAIN_INLINE const float* load_parameters(const void* from, DType type, int64_t column, int n, float* buffer) {
  return type == DType::kFloat32 ? static_cast<const float*>(from) + column : load<T>(from, column, n, buffer);
}

QUANTRAIN_INLINE RowMoments moments_of(const float* moments, int64_t row) {
  return moments ? RowMoments{moments[2 * row], moments[2 * row + 1]} : RowMoments{0.0f, 1.0f};
}

// z of n elements of a row from `column` on.
template <typename T>
QUANTRAIN_INLINE void values_of(const NormActInput& in, int64_t row, int64_t column, int n, RowMoments m, Buffers& b) {
  const int64_t at = row * in.columns + column;
  const float* __restrict__ x = load<T>(in.x, at, n, b.x);
  float* __restrict__ z = b.z;
  if (is_norm(in.function)) {
    for (int i = 0; i < n; ++i) z[i] = row_normalized(x[i], m);
    if (in.weight) {
      const float* __restrict__ weight = load_parameters<T>(in.weight, in.parameter_dtype, column, n, b.weight);
      for (int i = 0; i < n; ++i) z[i] *= weight[i];
    }
    if (in.bias) {
      const float* __restrict__ bias = load_parameters<T>(in.bias, in.parameter_dtype, column, n, b.bias);
      for (int i = 0; i < n; ++i) z[i] += bias[i];
    }
    return;
  }
  dispatch_function(in.function, [&](auto function) QUANTRAIN_INLINE_LAMBDA {
    for (int i = 0; i < n; ++i) z[i] = function_at<function.value>(x[i]).value;
  });
  if (in.function != RowFunction::kSiluMul) return;
  const float* __restrict__ other = load<T>(in.other, at, n, b.other);
  for (int i = 0; i < n; ++i) z[i] *= other[i];
}

// Calls f(first column, how many) over a row in blocks.
template <typename F>
QUANTRAIN_INLINE void for_each_of_row(int64_t columns, const F& f) {
  for (int64_t column = 0; column < columns; column += kBlock)
    f(column, static_cast<int>(std::min<int64_t>(kBlock, columns - column)));
}

struct LaneExtremes {
  Lanes lows = Lanes{} + kInf, highs = Lanes{} - kInf;
  LaneMask nans = {};

  QUANTRAIN_INLINE void add(const float* values, int n) {
    for (int i = 0; i < n; i += kLanes) {
      QUANTRAIN_LOAD_LANES(next, values, i, n, values[0])
      lows = next < lows ? next : lows;
      highs = next > highs ? next : highs;
      nans |= next != next;
    }
  }

  // NaN where there was one.
  QUANTRAIN_INLINE void ends(float& low, float& high) const {
    low = kInf;
    high = -kInf;
    int32_t nan = 0;
    for (int j = 0; j < kLanes; ++j) {
      low = std::min(low, lows[j]);
      high = std::max(high, highs[j]);
      nan |= nans[j];
    }
    if (nan) low = high = std::numeric_limits<float>::quiet_NaN();
  }
};

template <typename T>
QUANTRAIN_INLINE RowMoments measured(const NormActInput& in, int64_t row, Buffers& b) {
  RowMoments m{0.0f, 0.0f};
  const int64_t first = row * in.columns;
  const auto columns = static_cast<float>(in.columns);
  if (in.function == RowFunction::kLayerNorm) {
    LaneSum sum;
    for_each_of_row(in.columns, [&](int64_t column, int n)
                                    QUANTRAIN_INLINE_LAMBDA { sum.add(load<T>(in.x, first + column, n, b.x), n); });
    m.mean = sum.total() / columns;
  }
  LaneSum squares;
  for_each_of_row(in.columns, [&](int64_t column, int n) QUANTRAIN_INLINE_LAMBDA {
    const float* __restrict__ x = load<T>(in.x, first + column, n, b.x);
    for (int i = 0; i < n; ++i) b.z[i] = (x[i] - m.mean) * (x[i] - m.mean);
    squares.add(b.z, n);
  });
  m.inverse = inverse_root(squares.total() / columns, in.eps);
  return m;
}

template <typename T>
void rows_typed(const NormActArgs& a, int64_t begin, int64_t end) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    Buffers b;
    const NormActInput& in = a.input;
    for (int64_t row = begin; row < end; ++row) {
      RowMoments m{0.0f, 1.0f};
      if (is_norm(in.function)) {
        m = measured<T>(in, row, b);
        if (a.moments) {
          a.moments[2 * row] = m.mean;
          a.moments[2 * row + 1] = m.inverse;
        }
      }
      if (!a.row_scale && !a.extremes) continue;
      LaneExtremes extremes;
      for_each_of_row(in.columns, [&](int64_t column, int n) QUANTRAIN_INLINE_LAMBDA {
        values_of<T>(in, row, column, n, m, b);
        extremes.add(b.z, n);
      });
      float low, high;
      extremes.ends(low, high);
      if (a.extremes) {
        a.extremes[2 * row] = low;
        a.extremes[2 * row + 1] = high;
        continue;
      }
      const QParams p = qparams_from_range(low, high, a.range, a.symmetric);
      a.row_scale[row] = p.scale;
      if (a.row_zero_point) a.row_zero_point[row] = static_cast<int32_t>(p.zero_point);
    }
  });
}

template <typename T, typename U>
void elements_typed(const NormActArgs& a, int64_t begin, int64_t end) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    Buffers b;
    const NormActInput& in = a.input;
    auto* codes = static_cast<uint8_t*>(a.codes);
    // A block of elements may span rows: the mask's bytes do.
    for (int64_t block = begin; block < end; block += kBlock) {
      const int64_t until = std::min<int64_t>(block + kBlock, end);
      for (int64_t at = block; at < until;) {
        const int64_t row = at / in.columns;
        const int n = static_cast<int>(std::min(until, (row + 1) * in.columns) - at);
        values_of<T>(in, row, at - row * in.columns, n, moments_of(a.moments, row), b);
        const QParams p = a.row_scale ? make_qparams(a.row_scale[row], a.row_zero_point ? a.row_zero_point[row] : 0)
                                      : load_qparams(a.qparams, 0, a.range);
        const QuantRange range = a.range;
        const RowFunction function = in.function;
        const float nearest = clamp_code(p.zero_point, range);
        float* __restrict__ out = store_target(static_cast<U*>(a.output) + at, b.out);
        const float* __restrict__ z = b.z;
        uint8_t* __restrict__ passes = b.passes + (at - block);
        float* __restrict__ kept = b.x;  // of an input that is no longer needed
        for (int i = 0; i < n; ++i) {
          const float v = unclamped_code(z[i], p), code = clamp_code(v, range);
          passes[i] = gradient_passes(function, z[i], code == v);
          out[i] = dequantized(code, p);
          kept[i] = code == code ? code : nearest;
        }
        store_block(static_cast<U*>(a.output) + at, n, b.out);
        if (codes)
          for (int i = 0; i < n; ++i) codes[at + i] = static_cast<uint8_t>(static_cast<int32_t>(kept[i]));
        at += n;
      }
      if (a.mask) pack_bits(b.passes, static_cast<int>(until - block), a.mask + block / 8);
    }
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

// The gradient at n elements of z.
template <typename U>
QUANTRAIN_INLINE void gradients_of(const NormActBackwardArgs& a, int64_t at, int n, float* g) {
  const float* __restrict__ given = load<U>(a.grad_output, at, n, g);
  if (!a.mask) {
    if (given != g) std::copy(given, given + n, g);
    return;
  }
  for (int i = 0; i < n; ++i) g[i] = a.mask[(at + i) / 8] >> ((at + i) % 8) & 1 ? given[i] : 0.0f;
}

template <typename T, typename U>
void activation_typed(const NormActBackwardArgs& a, int64_t begin, int64_t end) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    Buffers b;
    const NormActInput& in = a.input;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, end - at));
      gradients_of<U>(a, at, n, b.z);
      const float* __restrict__ x = load<T>(in.x, at, n, b.x);
      const float* __restrict__ g = b.z;
      float* __restrict__ out = store_target(static_cast<T*>(a.grad_input) + at, b.out);
      if (in.function == RowFunction::kSiluMul) {
        const float* __restrict__ other = load<T>(in.other, at, n, b.other);
        float* __restrict__ of_other = store_target(static_cast<T*>(a.grad_other) + at, b.weight);
        for (int i = 0; i < n; ++i) {
          const ValueAndSlope f = silu_at(x[i]);
          of_other[i] = g[i] * f.value;
          out[i] = g[i] * (other[i] * f.slope);
        }
        store_block(static_cast<T*>(a.grad_other) + at, n, b.weight);
      } else {
        dispatch_function(in.function, [&](auto function) QUANTRAIN_INLINE_LAMBDA {
          for (int i = 0; i < n; ++i) out[i] = g[i] * function_at<function.value>(x[i]).slope;
        });
      }
      store_block(static_cast<T*>(a.grad_input) + at, n, b.out);
    }
  });
}

template <typename T, typename U>
void norm_typed(const NormActBackwardArgs& a, int64_t begin, int64_t end) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    Buffers b;
    const NormActInput& in = a.input;
    const bool layer = in.function == RowFunction::kLayerNorm;
    const auto columns = static_cast<float>(in.columns);
    const int64_t of_part = (in.rows + a.parts - 1) / a.parts;
    // g in b.z, times weight in b.out; (x - m) r in b.x, through b.other where it is read in place.
    const auto prepare = [&](int64_t row, int64_t column, int n, RowMoments m) QUANTRAIN_INLINE_LAMBDA {
      const int64_t at = row * in.columns + column;
      gradients_of<U>(a, at, n, b.z);
      const float* __restrict__ x = load<T>(in.x, at, n, b.other);
      for (int i = 0; i < n; ++i) b.x[i] = row_normalized(x[i], m);
      if (in.weight) {
        const float* __restrict__ weight = load_parameters<T>(in.weight, in.parameter_dtype, column, n, b.weight);
        for (int i = 0; i < n; ++i) b.out[i] = b.z[i] * weight[i];
      } else {
        std::copy(b.z, b.z + n, b.out);
      }
    };
    for (int64_t part = begin; part < end; ++part) {
      const int64_t last = std::min((part + 1) * of_part, in.rows);
      float* __restrict__ along = a.partial ? a.partial + part * 2 * in.columns : nullptr;
      float* __restrict__ total = along + in.columns;
      if (along) std::fill(along, along + 2 * in.columns, 0.0f);
      for (int64_t row = part * of_part; row < last; ++row) {
        const RowMoments m = moments_of(a.moments, row);
        LaneSum sum, product;
        for_each_of_row(in.columns, [&](int64_t column, int n) QUANTRAIN_INLINE_LAMBDA {
          prepare(row, column, n, m);
          if (along)
            for (int i = 0; i < n; ++i) {
              along[column + i] += b.z[i] * b.x[i];
              total[column + i] += b.z[i];
            }
          if (layer) sum.add(b.out, n);
          for (int i = 0; i < n; ++i) b.z[i] = b.out[i] * b.x[i];
          product.add(b.z, n);
        });
        const float mean_g = layer ? sum.total() / columns : 0.0f, mean_product = product.total() / columns;
        for_each_of_row(in.columns, [&](int64_t column, int n) QUANTRAIN_INLINE_LAMBDA {
          prepare(row, column, n, m);
          T* target = static_cast<T*>(a.grad_input) + row * in.columns + column;
          float* __restrict__ out = store_target(target, b.z);
          for (int i = 0; i < n; ++i) out[i] = row_gradient(b.out[i], b.x[i], m, mean_g, mean_product);
          store_block(target, n, b.z);
        });
      }
    }
  });
}

}  // namespace

void norm_act_rows(const NormActArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.input.dtype,
                 [&](auto* type) { rows_typed<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

void norm_act_elements(const NormActArgs& args, int64_t begin, int64_t end) {
  dispatch_types(args.input.dtype, args.output_dtype, [&](auto* type, auto* output) {
    elements_typed<std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(output)>>(args, begin, end);
  });
}

void norm_act_range(const NormActRangeArgs& a, int64_t, int64_t) {
  float low = kInf, high = -kInf;
  for (int64_t row = 0; row < a.rows; ++row) {  // NaN wins, from either side
    const float min = a.extremes[2 * row], max = a.extremes[2 * row + 1];
    low = min < low || min != min ? min : low;
    high = max > high || max != max ? max : high;
  }
  a.range[0] = low;
  a.range[1] = high;
}

void norm_act_backward(const NormActBackwardArgs& args, int64_t begin, int64_t end) {
  dispatch_types(args.input.dtype, args.output_dtype, [&](auto* type, auto* output) {
    using T = std::remove_pointer_t<decltype(type)>;
    using U = std::remove_pointer_t<decltype(output)>;
    is_norm(args.input.function) ? norm_typed<T, U>(args, begin, end) : activation_typed<T, U>(args, begin, end);
  });
}

void norm_act_gradients(const NormActGradientArgs& a, int64_t begin, int64_t end) {
  for (int64_t column = begin; column < end; ++column) {
    double along = 0.0, total = 0.0;
    for (int64_t part = 0; part < a.parts; ++part) {
      along += a.partial[part * 2 * a.columns + column];
      total += a.partial[(part * 2 + 1) * a.columns + column];
    }
    a.grad_weight[column] = static_cast<float>(along);
    a.grad_bias[column] = static_cast<float>(total);
  }
}

}  // namespace quantrain::cpu
