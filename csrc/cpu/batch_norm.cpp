#include "csrc/cpu/batch_norm.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "csrc/cpu/fake_quant_blocks.h"
#include "csrc/cpu/mask_bits.h"

// The passes of the batch_norm family. A block of elements goes through float32 buffers; the norms of its elements are
// one, where a channel's elements lie together, else those of consecutive channels.

namespace quantrain::cpu {
namespace {

// ---- channels of a block --------------------------------------------------------------------------------------------

// A value per channel, as arrays that loops over consecutive channels read.
struct ChannelTable {
  std::vector<float> mean, factor, bias;

  ChannelTable(const BatchNormParams& p, int64_t channels) : mean(channels), factor(channels), bias(channels) {
    for (int64_t c = 0; c < channels; ++c) {
      const ChannelNorm n = channel_norm(p, c);
      mean[c] = n.mean;
      factor[c] = n.factor;
      bias[c] = n.bias;
    }
  }
};

struct OneChannel {
  ChannelNorm norm;
  float constant, slope;
  QUANTRAIN_INLINE ChannelNorm of(int) const { return norm; }
  QUANTRAIN_INLINE float constant_of(int) const { return constant; }
  QUANTRAIN_INLINE float slope_of(int) const { return slope; }
};

struct SideBySide {
  const float *mean, *factor, *bias, *constants, *slopes;
  QUANTRAIN_INLINE ChannelNorm of(int i) const { return {mean[i], factor[i], bias[i]}; }
  QUANTRAIN_INLINE float constant_of(int i) const { return constants[i]; }
  QUANTRAIN_INLINE float slope_of(int i) const { return slopes[i]; }
};

// Calls f(offset, length, channels) for each run of [begin, end) that lies in one channel, or whose channels are
// consecutive. terms: [2, C] or null.
template <typename F>
QUANTRAIN_INLINE void for_each_channel_run(const ChannelLayout& l, const ChannelTable& table, const float* terms,
                                           int64_t begin, int64_t end, const F& f) {
  static const float kZero = 0.0f;
  if (l.inner == 1) {
    for (int64_t at = begin; at < end;) {
      const int64_t c = at % l.channels;
      const int n = static_cast<int>(std::min(l.channels - c, end - at));
      const float* constants = terms ? terms + c : table.mean.data() + c;  // unread where there are none
      const float* slopes = terms ? terms + l.channels + c : constants;
      f(static_cast<int>(at - begin), n,
        SideBySide{table.mean.data() + c, table.factor.data() + c, table.bias.data() + c, constants, slopes});
      at += n;
    }
    return;
  }
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / l.inner, c = row % l.channels;
    const int n = static_cast<int>(std::min((row + 1) * l.inner, end) - at);
    f(static_cast<int>(at - begin), n,
      OneChannel{{table.mean[c], table.factor[c], table.bias[c]},
                 terms ? terms[c] : kZero,
                 terms ? terms[l.channels + c] : kZero});
    at += n;
  }
}

// Calls f(first, length, channel, consecutive) for the runs of part `part`, in the order of memory; runs are no longer
// than kBlock.
template <typename F>
QUANTRAIN_INLINE void for_each_part_run(const ChannelLayout& l, int64_t parts, int64_t part, const F& f) {
  const int64_t rows = (l.outer + parts - 1) / parts;
  const int64_t begin = part * rows, end = std::min(begin + rows, l.outer);
  const int64_t length = l.inner == 1 ? l.channels : l.inner;
  const int64_t runs = l.inner == 1 ? 1 : l.channels;
  for (int64_t o = begin; o < end; ++o)
    for (int64_t run = 0; run < runs; ++run)
      for (int64_t at = 0; at < length; at += kBlock)
        f((o * runs + run) * length + at, static_cast<int>(std::min<int64_t>(kBlock, length - at)),
          l.inner == 1 ? at : run);
}

// ---- kernels --------------------------------------------------------------------------------------------------------

template <typename T>
void statistics_typed(const BatchNormStatisticsArgs& a, int64_t begin, int64_t end) {
  const T* y = static_cast<const T*>(a.y);
  const int64_t channels = a.layout.channels;
  const bool side = a.layout.inner == 1;
  std::vector<float> firsts(channels);
  for (int64_t c = 0; c < channels; ++c) firsts[c] = to_float(y[c * a.layout.inner]);
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    alignas(64) float buffer[kBlock];
    constexpr float kInf = std::numeric_limits<float>::infinity();
    for (int64_t part = begin; part < end; ++part) {
      float* partial = a.partial + part * 4 * channels;
      for (int64_t c = 0; c < channels; ++c) {
        partial[c] = partial[channels + c] = 0.0f;
        partial[2 * channels + c] = kInf;
        partial[3 * channels + c] = -kInf;
      }
      for_each_part_run(a.layout, a.parts, part, [&](int64_t at, int n, int64_t c) QUANTRAIN_INLINE_LAMBDA {
        const float* __restrict__ ys = load_block(y + at, n, buffer);
        if (side) {
          float* __restrict__ sum = partial + c;
          float* __restrict__ squares = partial + channels + c;
          float* __restrict__ low = partial + 2 * channels + c;
          float* __restrict__ high = partial + 3 * channels + c;
          const float* __restrict__ first = firsts.data() + c;
          for (int i = 0; i < n; ++i) {
            const float value = ys[i], distance = value - first[i];
            sum[i] += distance;
            squares[i] += distance * distance;
            // false for a NaN kept already; a new one is taken, and then the sums are NaN too
            low[i] = (value < low[i]) | (value != value) ? value : low[i];
            high[i] = (value > high[i]) | (value != value) ? value : high[i];
          }
        } else {
          const float first = firsts[c];
          Lanes sum = {}, squares = {}, low = Lanes{} + kInf, high = Lanes{} - kInf;
          for (int i = 0; i < n; i += kLanes) {
            QUANTRAIN_LOAD_LANES(value, ys, i, n, ys[0])
            Lanes distance = value - first;
            if (i + kLanes > n)
              for (int j = n - i; j < kLanes; ++j) distance[j] = 0.0f;
            sum += distance;
            squares += distance * distance;
            low = value < low ? value : low;
            high = value > high ? value : high;
          }
          float totals[2] = {}, min = partial[2 * channels + c], max = partial[3 * channels + c];
          for (int j = 0; j < kLanes; ++j) {
            totals[0] += sum[j];
            totals[1] += squares[j];
            min = low[j] < min ? low[j] : min;
            max = high[j] > max ? high[j] : max;
          }
          partial[c] += totals[0];
          partial[channels + c] += totals[1];
          const bool nan = totals[0] != totals[0];  // of a NaN or of infinities, which no range outlives either
          partial[2 * channels + c] = nan ? totals[0] : min;
          partial[3 * channels + c] = nan ? totals[0] : max;
        }
      });
    }
  });
}

template <typename T, Activation kActivation>
void apply_typed(const BatchNormApplyArgs& a, int64_t begin, int64_t end) {
  const T* y = static_cast<const T*>(a.y);
  const T* residual = static_cast<const T*>(a.residual);
  T* output = static_cast<T*>(a.output);
  auto* codes = static_cast<uint8_t*>(a.codes);
  const ChannelTable table(a.params, a.layout.channels);
  const bool quantizes = a.qparams.scale != nullptr;
  const QParams qparams = quantizes ? load_qparams(a.qparams, 0, a.range) : QParams{};
  const float zero_code = quantizes ? clamp_code(qparams.zero_point, a.range) : 0.0f;
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    alignas(64) float y_buffer[kBlock], r_buffer[kBlock], z_buffer[kBlock], code[kBlock];
    alignas(64) uint8_t passes[kBlock];
    for_each_block(begin, end, [&](int64_t at, int n) QUANTRAIN_INLINE_LAMBDA {
      const float* __restrict__ ys = load_block(y + at, n, y_buffer);
      float* __restrict__ zs = store_target(output + at, z_buffer);
      const float* __restrict__ rs = residual ? load_block(residual + at, n, r_buffer) : nullptr;
      for_each_channel_run(a.layout, table, nullptr, at, at + n,
                           [&](int offset, int length, const auto& channels) QUANTRAIN_INLINE_LAMBDA {
                             if (rs) {
                               for (int i = 0; i < length; ++i)
                                 code[offset + i] = normalized(ys[offset + i], channels.of(i)) + rs[offset + i];
                             } else {
                               for (int i = 0; i < length; ++i)
                                 code[offset + i] = normalized(ys[offset + i], channels.of(i));
                             }
                           });
      if (quantizes) {
        const QParams p = qparams;  // copies, as in fake_quant.cpp
        const QuantRange range = a.range;
        for (int i = 0; i < n; ++i) {
          const float z = code[i], v = unclamped_code(activated<kActivation>(z), p);
          passes[i] = static_cast<uint8_t>((activation_slope<kActivation>(z) != 0.0f) & code_in_range(v, range));
          code[i] = clamp_code(v, range);
          zs[i] = dequantized(code[i], p);
        }
        if (codes) {
          const float zero = zero_code;
          uint8_t* __restrict__ to = codes + at;
          for (int i = 0; i < n; ++i) {
            const float q = code[i] == code[i] ? code[i] : zero;
            to[i] = static_cast<uint8_t>(static_cast<int32_t>(q));
          }
        }
      } else {
        for (int i = 0; i < n; ++i) {
          passes[i] = activation_slope<kActivation>(code[i]) != 0.0f;
          zs[i] = activated<kActivation>(code[i]);
        }
      }
      store_block(output + at, n, z_buffer);
      if (a.mask) pack_bits(passes, n, a.mask + at / 8);
    });
  });
}

// The gradient at the norm's output of n elements, into `g`.
template <Activation kActivation, typename Channels>
QUANTRAIN_INLINE void norm_gradients(const float* __restrict__ grad, const float* __restrict__ keep,
                                     const float* __restrict__ ys, int n, const Channels& channels,
                                     float* __restrict__ g) {
  for (int i = 0; i < n; ++i) {
    const float passed = keep[i] != 0.0f ? grad[i] : 0.0f;
    if constexpr (kActivation == Activation::kIdentity)
      g[i] = passed;
    else
      g[i] = passed * activation_slope<kActivation>(normalized(ys[i], channels.of(i)));
  }
}

// 1 where the mask's bit is set, or everywhere.
QUANTRAIN_INLINE void load_mask(const uint8_t* mask, int64_t at, int n, float* __restrict__ keep) {
  if (!mask) {
    for (int i = 0; i < n; ++i) keep[i] = 1.0f;
    return;
  }
  if (at % 8 != 0) {
    for (int i = 0; i < n; ++i) keep[i] = static_cast<float>(mask[(at + i) / 8] >> ((at + i) % 8) & 1);
    return;
  }
  for (int byte = 0; byte * 8 < n; ++byte) {
    const uint32_t bits = mask[at / 8 + byte];
    for (int j = 0; j < 8; ++j) keep[byte * 8 + j] = static_cast<float>(bits >> j & 1u);  // kBlock is a multiple of 8
  }
}

// What each element adds to the gradient of a learned scale.
template <Activation kActivation, typename Channels>
QUANTRAIN_INLINE void step_gradients(const float* __restrict__ grad, const float* __restrict__ y, int n,
                                     const Channels& channels, QParams p, QuantRange range,
                                     float* __restrict__ result) {
  for (int i = 0; i < n; ++i)
    result[i] = grad[i] * learnable_gradient(activated<kActivation>(normalized(y[i], channels.of(i))), p, range).scale;
}

template <typename T, Activation kActivation>
void reduce_typed(const BatchNormReduceArgs& a, int64_t begin, int64_t end) {
  const T* y = static_cast<const T*>(a.y);
  const T* grad_output = static_cast<const T*>(a.grad_output);
  T* grad_residual = static_cast<T*>(a.grad_residual);
  const int64_t channels = a.layout.channels;
  const bool side = a.layout.inner == 1;
  const ChannelTable table(a.params, channels);
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    alignas(64) float y_buffer[kBlock], grad_buffer[kBlock], keep[kBlock], g[kBlock];
    const QParams p = a.learned ? load_qparams(a.qparams, 0, a.range) : QParams{};
    const QuantRange range = a.range;
    for (int64_t part = begin; part < end; ++part) {
      float* partial = a.partial + part * a.sums() * channels;
      for (int64_t c = 0; c < a.sums() * channels; ++c) partial[c] = 0.0f;
      for_each_part_run(a.layout, a.parts, part, [&](int64_t at, int n, int64_t c) QUANTRAIN_INLINE_LAMBDA {
        const float* __restrict__ ys = load_block(y + at, n, y_buffer);
        const float* __restrict__ grad = load_block(grad_output + at, n, grad_buffer);
        load_mask(a.mask, at, n, keep);
        if (side) {
          const SideBySide own{table.mean.data() + c, table.factor.data() + c, table.bias.data() + c, nullptr, nullptr};
          norm_gradients<kActivation>(grad, keep, ys, n, own, g);
          float* __restrict__ sum = partial + c;
          float* __restrict__ product = partial + channels + c;
          const float* __restrict__ mean = table.mean.data() + c;
          for (int i = 0; i < n; ++i) {
            sum[i] += g[i];
            product[i] += g[i] * (ys[i] - mean[i]);
          }
          if (a.learned) {
            step_gradients<kActivation>(grad, ys, n, own, p, range, keep);
            float* __restrict__ of_step = partial + 2 * channels + c;
            for (int i = 0; i < n; ++i) of_step[i] += keep[i];
          }
        } else {
          const ChannelNorm norm{table.mean[c], table.factor[c], table.bias[c]};
          norm_gradients<kActivation>(grad, keep, ys, n, OneChannel{norm, 0.0f, 0.0f}, g);
          LaneSum sum, product;
          sum.add(g, n);
          for (int i = 0; i < n; ++i) keep[i] = g[i] * (ys[i] - norm.mean);
          product.add(keep, n);
          partial[c] += sum.total();
          partial[channels + c] += product.total();
          if (a.learned) {
            LaneSum of_step;
            step_gradients<kActivation>(grad, ys, n, OneChannel{norm, 0.0f, 0.0f}, p, range, keep);
            of_step.add(keep, n);
            partial[2 * channels + c] += of_step.total();
          }
        }
        if (grad_residual)
          for (int i = 0; i < n; ++i) grad_residual[at + i] = from_float<T>(g[i]);
      });
    }
  });
}

template <typename T, Activation kActivation>
void backward_typed(const BatchNormBackwardArgs& a, int64_t begin, int64_t end) {
  const T* y = static_cast<const T*>(a.y);
  const T* grad_output = static_cast<const T*>(a.grad_output);
  T* grad_input = static_cast<T*>(a.grad_input);
  const ChannelTable table(a.params, a.layout.channels);
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    alignas(64) float y_buffer[kBlock], grad_buffer[kBlock], keep[kBlock], out_buffer[kBlock], g[kBlock];
    for_each_block(begin, end, [&](int64_t at, int n) QUANTRAIN_INLINE_LAMBDA {
      const float* __restrict__ ys = load_block(y + at, n, y_buffer);
      const float* __restrict__ grad = load_block(grad_output + at, n, grad_buffer);
      float* __restrict__ out = store_target(grad_input + at, out_buffer);
      load_mask(a.mask, at, n, keep);
      for_each_channel_run(
          a.layout, table, a.terms, at, at + n,
          [&](int offset, int length, const auto& channels) QUANTRAIN_INLINE_LAMBDA {
            norm_gradients<kActivation>(grad + offset, keep + offset, ys + offset, length, channels, g);
            for (int i = 0; i < length; ++i)
              out[offset + i] =
                  input_gradient(g[i], ys[offset + i], channels.of(i), channels.constant_of(i), channels.slope_of(i));
          });
      store_block(grad_input + at, n, out_buffer);
    });
  });
}

template <typename Args, typename F>
void dispatch(const Args& a, const F& f) {
  dispatch_float(a.dtype,
                 [&](auto* type) { dispatch_activation(a.activation, [&](auto activation) { f(type, activation); }); });
}

}  // namespace

void batch_norm_statistics(const BatchNormStatisticsArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype,
                 [&](auto* type) { statistics_typed<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

void batch_norm_fold(const BatchNormFoldArgs& a, int64_t begin, int64_t end) {
  const int64_t channels = a.layout.channels;
  dispatch_float(a.dtype, [&](auto* type) {
    const auto* y = static_cast<decltype(type)>(const_cast<void*>(a.y));
    for (int64_t c = begin; c < end; ++c) {
      ChannelSums sums;
      for (int64_t part = 0; part < a.parts; ++part) {
        const float* p = a.partial + part * 4 * channels + c;
        sums.add(p[0], p[channels], p[2 * channels], p[3 * channels]);
      }
      store_statistics(a, c, sums, to_float(y[c * a.layout.inner]));
    }
  });
}

void batch_norm_update(const BatchNormUpdateArgs& a, int64_t, int64_t) {
  dispatch_activation(a.activation, [&](auto activation) {
    ChannelSums ends;
    for (int64_t c = 0; c < a.channels; ++c) {
      if (a.range) {
        const Extremes e = output_extremes<activation.value>(a, c);
        ends.add(0.0, 0.0, e.min, e.max);
      }
      if (a.running_mean) update_running(a, c);
    }
    if (a.range) {
      a.range[0] = ends.min;
      a.range[1] = ends.max;
    }
  });
}

void batch_norm_apply(const BatchNormApplyArgs& args, int64_t begin, int64_t end) {
  dispatch(args, [&](auto* type, auto activation) {
    apply_typed<std::remove_pointer_t<decltype(type)>, activation.value>(args, begin, end);
  });
}

void batch_norm_reduce(const BatchNormReduceArgs& args, int64_t begin, int64_t end) {
  dispatch(args, [&](auto* type, auto activation) {
    reduce_typed<std::remove_pointer_t<decltype(type)>, activation.value>(args, begin, end);
  });
}

void batch_norm_gradients(const BatchNormGradientArgs& a, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    double sum = 0.0, product = 0.0, of_step = 0.0;
    for (int64_t part = 0; part < a.parts; ++part) {
      const float* partial = a.partial + part * a.sums() * a.channels + c;
      sum += partial[0];
      product += partial[a.channels];
      if (a.grad_step) of_step += partial[2 * a.channels];
    }
    store_gradients(a, c, sum, product);
    if (a.grad_step) a.grad_step[c] = static_cast<float>(of_step);
  }
}

void batch_norm_backward(const BatchNormBackwardArgs& args, int64_t begin, int64_t end) {
  dispatch(args, [&](auto* type, auto activation) {
    backward_typed<std::remove_pointer_t<decltype(type)>, activation.value>(args, begin, end);
  });
}

}  // namespace quantrain::cpu
