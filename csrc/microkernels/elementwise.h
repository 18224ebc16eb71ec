// Row-wise arithmetic: activations and their derivatives, weighted sums, scores.
//
// Loops run over blocks of kBlock values in float and are written plainly for the compiler to vectorise.
#pragma once

#include <math.h>

#include "microkernels/random.h"
#include "microkernels/table.h"
#include "microkernels/vec.h"

namespace moe::MOE_ISA {

constexpr int kBlock = 64;

// exp(x) within 2 units in the last place. Cody and Waite: x = n ln 2 + r with |r| <= ln 2 / 2, a degree-6 Taylor
// polynomial in r (error 1.2e-7 relative) times 2^n. Branch-free, so that loops of it vectorise. NaN gives NaN.
MOE_INLINE float exp_of(float x) {
  float clamped = x < -104.0f ? -104.0f : x;
  clamped = clamped > 89.0f ? 89.0f : clamped;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const float shifted = clamped * 1.44269504088896f + magic;
  const float n = shifted - magic;
  const float r = (clamped - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  uint32_t bits, magic_bits;
  std::memcpy(&bits, &shifted, 4);
  std::memcpy(&magic_bits, &magic, 4);
  // 2^n in two factors, so that results below 2^-126 come out as denormals
  const int32_t exponent = static_cast<int32_t>(bits - magic_bits);
  const int32_t half = exponent >> 1;
  const uint32_t first_bits = static_cast<uint32_t>(half + 127) << 23;
  const uint32_t second_bits = static_cast<uint32_t>(exponent - half + 127) << 23;
  float first, second;
  std::memcpy(&first, &first_bits, 4);
  std::memcpy(&second, &second_bits, 4);
  const float result = p * first * second;
  return x == x ? result : x;
}
MOE_INLINE double exp_of(double x) { return ::exp(x); }

template <class Acc>
MOE_INLINE Acc sigmoid(Acc x) {
  return Acc{1} / (Acc{1} + exp_of(-x));
}

// tanh(x) = 1 - 2 / (exp(2x) + 1); loses relative accuracy only where tanh itself is small beside the 1 it is added to
template <class Acc>
MOE_INLINE Acc tanh_of(Acc x) {
  return Acc{1} - Acc{2} / (exp_of(Acc{2} * x) + Acc{1});
}

MOE_INLINE float erf_of(float x) { return ::erff(x); }
MOE_INLINE double erf_of(double x) { return ::erf(x); }

template <ActivationKind kKind, class Acc>
MOE_INLINE Acc act(Acc x, Acc alpha) {
  if constexpr (kKind == ActivationKind::silu) {
    return x * sigmoid(alpha * x);
  } else if constexpr (kKind == ActivationKind::gelu) {
    return Acc(0.5) * x * (Acc{1} + erf_of(x * Acc(0.70710678118654752440)));
  } else if constexpr (kKind == ActivationKind::gelu_tanh) {
    const Acc inner = Acc(0.79788456080286535588) * (x + Acc(0.044715) * x * x * x);
    return Acc(0.5) * x * (Acc{1} + tanh_of(inner));
  } else {
    const Acc positive = x > 0 || x != x ? x : Acc{0};
    return kKind == ActivationKind::relu ? positive : positive * positive;
  }
}

template <ActivationKind kKind, class Acc>
MOE_INLINE Acc act_derivative(Acc x, Acc alpha) {
  if constexpr (kKind == ActivationKind::silu) {
    const Acc s = sigmoid(alpha * x);
    return s + alpha * x * s * (Acc{1} - s);
  } else if constexpr (kKind == ActivationKind::gelu) {
    const Acc cdf = Acc(0.5) * (Acc{1} + erf_of(x * Acc(0.70710678118654752440)));
    return cdf + x * Acc(0.39894228040143267794) * exp_of(Acc(-0.5) * x * x);
  } else if constexpr (kKind == ActivationKind::gelu_tanh) {
    const Acc t = tanh_of(Acc(0.79788456080286535588) * (x + Acc(0.044715) * x * x * x));
    const Acc inner = Acc(0.79788456080286535588) * (Acc{1} + Acc(0.134145) * x * x);
    return Acc(0.5) * (Acc{1} + t) + Acc(0.5) * x * (Acc{1} - t * t) * inner;
  } else if constexpr (kKind == ActivationKind::relu) {
    return x > 0 ? Acc{1} : x != x ? x : Acc{0};
  } else {
    return x > 0 || x != x ? Acc{2} * x : Acc{0};
  }
}

// min and clamp that keep NaN, as torch.clamp does
template <class Acc>
MOE_INLINE Acc at_most(Acc x, Acc limit) {
  return x > limit ? limit : x;
}
template <class Acc>
MOE_INLINE Acc clamped(Acc x, Acc limit) {
  const Acc low = x < -limit ? -limit : x;
  return low > limit ? limit : low;
}

template <class F>
MOE_INLINE void with_kind(ActivationKind kind, const F& f) {
  switch (kind) {
    case ActivationKind::silu: return f.template operator()<ActivationKind::silu>();
    case ActivationKind::gelu: return f.template operator()<ActivationKind::gelu>();
    case ActivationKind::gelu_tanh: return f.template operator()<ActivationKind::gelu_tanh>();
    case ActivationKind::relu: return f.template operator()<ActivationKind::relu>();
    case ActivationKind::relu2: return f.template operator()<ActivationKind::relu2>();
  }
}

// An Activation's numbers in Acc; the gate is clamped `before` the activation, or its output `after` it.
template <class Acc>
struct ActivationNumbers {
  Acc alpha, limit, before, after, offset;
  explicit ActivationNumbers(const Activation& activation)
      : alpha(static_cast<Acc>(activation.alpha)),
        limit(static_cast<Acc>(activation.limit)),
        before(activation.clamp_output ? static_cast<Acc>(INFINITY) : limit),
        after(activation.clamp_output ? limit : static_cast<Acc>(INFINITY)),
        offset(static_cast<Acc>(activation.up_offset)) {}
};

// out[i] = in[i * in_stride] + bias[i * stride] for one block
template <class T>
MOE_INLINE void gather_with_bias(const acc_t<T>* in, int64_t in_stride, const T* bias, int64_t stride, int64_t n,
                                 acc_t<T>* out) {
  if (in_stride == 1)
    for (int64_t i = 0; i < n; ++i) out[i] = in[i];
  else
    for (int64_t i = 0; i < n; ++i) out[i] = in[i * in_stride];
  if (bias != nullptr)
    for (int64_t i = 0; i < n; ++i) out[i] += to_acc(bias[i * stride]);
}

template <class T>
MOE_INLINE void scatter_back(const acc_t<T>* in, int64_t stride, int64_t n, T* out) {
  if (stride == 1) {
    convert_back(in, out, n);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i * stride] = from_acc<T>(in[i]);
  }
}

template <class T>
static void activation_forward(const Activation& activation, const acc_t<T>* gate, const acc_t<T>* up, int64_t sum_stride,
                               const T* gate_bias, const T* up_bias, int64_t stride, int64_t n, T* out, T* saved_gate,
                               T* saved_up) {
  using Acc = acc_t<T>;
  const auto [alpha, limit, before, after, offset] = ActivationNumbers<Acc>(activation);
  Acc g[kBlock], u[kBlock], result[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = n - begin < kBlock ? n - begin : kBlock, at = begin * stride;
    gather_with_bias<T>(gate + begin * sum_stride, sum_stride, gate_bias == nullptr ? nullptr : gate_bias + at, stride,
                        size, g);
    if (saved_gate != nullptr) scatter_back<T>(g, stride, size, saved_gate + at);
    for (int64_t i = size; i < kBlock; ++i) g[i] = 0;
    with_kind(activation.kind, [&]<ActivationKind kKind>() {
      for (int i = 0; i < kBlock; ++i) result[i] = at_most(act<kKind>(at_most(g[i], before), alpha), after);
    });
    if (activation.gated) {
      gather_with_bias<T>(up + begin * sum_stride, sum_stride, up_bias == nullptr ? nullptr : up_bias + at, stride, size,
                          u);
      if (saved_up != nullptr) scatter_back<T>(u, stride, size, saved_up + at);
      for (int64_t i = 0; i < size; ++i) result[i] *= clamped(u[i], limit) + offset;
    }
    convert_back(result, out + begin, size);
  }
}

template <class T>
static acc_t<T> activation_backward(const Activation& activation, const T* gate, const T* up, int64_t stride,
                                    const acc_t<T>* grad_act, acc_t<T> weight, int64_t n, T* grad_gate, T* grad_up,
                                    T* weighted_act) {
  using Acc = acc_t<T>;
  const auto [alpha, limit, before, after, offset] = ActivationNumbers<Acc>(activation);
  constexpr int kN = kLanes<Acc>;
  Vec<Acc> inner_sum{};
  Acc g[kBlock], u[kBlock], a[kBlock], d[kBlock], grad[kBlock], out[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = n - begin < kBlock ? n - begin : kBlock, at = begin * stride;
    for (int64_t i = 0; i < size; ++i) g[i] = to_acc(gate[at + i * stride]);
    for (int64_t i = 0; i < size; ++i) grad[i] = grad_act[begin + i];
    for (int64_t i = size; i < kBlock; ++i) g[i] = grad[i] = u[i] = 0;
    if (activation.gated)
      for (int64_t i = 0; i < size; ++i) u[i] = to_acc(up[at + i * stride]);
    with_kind(activation.kind, [&]<ActivationKind kKind>() {
      for (int i = 0; i < kBlock; ++i) {
        const Acc x = at_most(g[i], before);
        const Acc y = act<kKind>(x, alpha);
        a[i] = at_most(y, after);
        d[i] = g[i] > before || y > after ? Acc{0} : act_derivative<kKind>(x, alpha);
      }
    });
    for (int i = 0; i < kBlock; ++i) {
      const Acc factor = activation.gated ? clamped(u[i], limit) + offset : Acc{1};
      const Acc inside = u[i] < -limit || u[i] > limit ? Acc{0} : Acc{1};
      const Acc scaled = weight * grad[i];
      d[i] = scaled * factor * d[i];
      u[i] = scaled * a[i] * inside;
      a[i] *= factor;
      grad[i] *= a[i];
      out[i] = weight * a[i];
    }
    for (int i = 0; i < kBlock; i += kN) inner_sum += load(grad + i);
    scatter_back<T>(d, stride, size, grad_gate + at);
    if (activation.gated) scatter_back<T>(u, stride, size, grad_up + at);
    if (weighted_act != nullptr) convert_back(out, weighted_act + begin, size);
  }
  return reduce<Acc>(inner_sum);
}

template <class T>
static void accumulate(acc_t<T>* sum, const acc_t<T>* row, const T* bias, acc_t<T> weight, int64_t n) {
  if (bias == nullptr)
    for (int64_t i = 0; i < n; ++i) sum[i] += weight * row[i];
  else
    for (int64_t i = 0; i < n; ++i) sum[i] += weight * (row[i] + to_acc(bias[i]));
}

template <class T>
static void load_row(const T* row, acc_t<T>* out, int64_t n) {
  convert(row, out, n);
}

template <class T>
static void store_row(const acc_t<T>* row, const T* bias, T* out, int64_t n) {
  if (bias == nullptr) return convert_back(row, out, n);
  acc_t<T> sum[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = n - begin < kBlock ? n - begin : kBlock;
    for (int64_t i = 0; i < size; ++i) sum[i] = row[begin + i] + to_acc(bias[begin + i]);
    convert_back(sum, out + begin, size);
  }
}

template <class T>
static void weighted_sum(const T* const* rows, const acc_t<T>* weights, int64_t num_rows, T* out, int64_t n) {
  constexpr int kN = kLanes<acc_t<T>>;
  constexpr int kWide = 4 * kN;  // four vectors at a time: rows come from memory in whole cache lines
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    Vec<acc_t<T>> sum[4] = {};
    for (int64_t row = 0; row < num_rows; ++row)
      for (int v = 0; v < 4; ++v) sum[v] += weights[row] * load_converted(rows[row] + i + v * kN);
    for (int v = 0; v < 4; ++v) store_converted(out + i + v * kN, sum[v]);
  }
  for (; i < n; ++i) {
    acc_t<T> sum = 0;
    for (int64_t row = 0; row < num_rows; ++row) sum += weights[row] * to_acc(rows[row][i]);
    out[i] = from_acc<T>(sum);
  }
}

template <class T>
static void scale(const T* row, acc_t<T> weight, T* out, int64_t n) {
  constexpr int kN = kLanes<acc_t<T>>;
  int64_t i = 0;
  for (; i + kN <= n; i += kN) store_converted(out + i, weight * load_converted(row + i));
  for (; i < n; ++i) out[i] = from_acc<T>(weight * to_acc(row[i]));
}

template <class T>
static void dropout(const T* row, uint64_t key, uint64_t number, uint32_t below, T* out, int64_t n) {
  constexpr int64_t kAtOnce = 512;
  uint32_t bits[kAtOnce];
  for (int64_t begin = 0; begin < n; begin += kAtOnce) {
    const int64_t size = n - begin < kAtOnce ? n - begin : kAtOnce;
    random_bits(key, number, begin, size, bits);
    for (int64_t i = 0; i < size; ++i) out[begin + i] = bits[i] < below ? T{} : row[begin + i];
  }
}

// The sum of partial sums over kPartial elements, each in four vectors: the sum of 5120 float products in one vector of
// 4 lanes was 1.4e-4 off, where the tolerance rule allows 8.8e-5.
template <class T>
static acc_t<T> inner_product(const T* a, const T* b, int64_t n) {
  using Acc = acc_t<T>;
  constexpr int kN = kLanes<Acc>;
  constexpr int64_t kPartial = 1024;
  Vec<Acc> total{};
  for (int64_t begin = 0; begin < n; begin += kPartial) {
    const int64_t end = n - begin < kPartial ? n : begin + kPartial;
    Vec<Acc> sum[4] = {};
    int64_t i = begin;
    for (; i + 4 * kN <= end; i += 4 * kN)
      for (int v = 0; v < 4; ++v) sum[v] += load_converted(a + i + v * kN) * load_converted(b + i + v * kN);
    for (; i + kN <= end; i += kN) sum[0] += load_converted(a + i) * load_converted(b + i);
    if (i < end) sum[1] += load_converted_partial(a + i, end - i) * load_converted_partial(b + i, end - i);
    total += (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  return reduce<Acc>(total);
}

template <class T>
static bool scores(const T* logits, int64_t n, bool use_sigmoid, const acc_t<T>* bias, acc_t<T>* out,
                   acc_t<T>* choice) {
  using Acc = acc_t<T>;
  constexpr int kN = kLanes<Acc>;
  constexpr Acc kInfinity = static_cast<Acc>(INFINITY);
  // four vectors at a time: one would wait for itself
  Vec<Acc> most[4];
  for (int v = 0; v < 4; ++v) most[v] = Vec<Acc>{} - kInfinity;
  int64_t i = 0;
  for (; i + 4 * kN <= n; i += 4 * kN)
    for (int v = 0; v < 4; ++v) {
      const Vec<Acc> x = load_converted(logits + i + v * kN);
      store(choice + i + v * kN, x);
      most[v] = larger_of<Acc>(x, most[v]);
    }
  Acc largest = reduce_largest<Acc>(larger_of<Acc>(larger_of<Acc>(most[0], most[1]), larger_of<Acc>(most[2], most[3])));
  for (; i < n; ++i) {
    choice[i] = to_acc(logits[i]);
    largest = choice[i] > largest ? choice[i] : largest;
  }
  if (!(largest > -kInfinity && largest < kInfinity)) return false;

  if (use_sigmoid) {
    for (i = 0; i < n; ++i) out[i] = sigmoid(choice[i]);
  } else {
    for (i = 0; i < n; ++i) out[i] = exp_of(choice[i] - largest);
  }
  Vec<Acc> sums[4] = {};
  for (i = 0; i + 4 * kN <= n; i += 4 * kN)
    for (int v = 0; v < 4; ++v) sums[v] += load(out + i + v * kN);
  Acc sum = reduce<Acc>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) sum += out[i];
  if (sum != sum) return false;  // scores are finite but for a NaN logit's
  const Acc factor = use_sigmoid ? Acc{1} : Acc{1} / sum;
  for (i = 0; i < n; ++i) {
    out[i] *= factor;
    choice[i] = choice[i] > -kInfinity ? out[i] : -kInfinity;
  }
  if (bias != nullptr) {
    for (i = 0; i < n; ++i) {
      const Acc biased = choice[i] + bias[i];  // NaN also where a forced expert is masked
      choice[i] = biased == biased ? biased : -kInfinity;
    }
  }
  return true;
}

}  // namespace moe::MOE_ISA
