// One pass over the values: norm, turn and activation.
#pragma once

#include "vectors.h"

namespace {

template <class T> void rms_norm(const T* x, long xs, long m, long d, const T* w, float shift, float eps, T* y) {
#pragma omp parallel for if (m * d > ALONE)
  for (long i = 0; i < m; i++) {
    const T* row = x + i * xs;
    Vec squares = {};
    for (long j = 0; j < d; j += LANES) {
      const Vec v = some(row + j, d - j);
      squares += v * v;
    }
    const float scale = 1.0f / std::sqrt(total(squares) / static_cast<float>(d) + eps);
    for (long j = 0; j < d; j += LANES) {
      const Vec v = some(row + j, d - j) * scale;
      store(y + i * d + j, w ? v * (some(w + j, d - j) + shift) : v, d - j);
    }
  }
}

constexpr long SHARE = 64;  // rows whose gradients of the weight are added up by one thread: fixed, as is their order

// dx = r (g (w + shift) - n mean(g (w + shift) n)) with n = x r and r = 1 / sqrt(mean(x^2) + eps), and of each SHARE rows
// the sum of g n, [shares, d]. g, dx and the sums are dense.
template <class T>
void rms_norm_back(const T* x, long xs, long m, long d, const T* w, float shift, float eps, const T* g, T* dx, float* dw) {
#pragma omp parallel for if (m * d > ALONE)
  for (long share = 0; share < (m + SHARE - 1) / SHARE; share++) {
    float* sums = w ? dw + share * d : nullptr;
    if (w) std::memset(sums, 0, d * sizeof(float));
    for (long i = share * SHARE; i < std::min(m, (share + 1) * SHARE); i++) {
      const T *row = x + i * xs, *by = g + i * d;
      Vec squares = {}, inner = {};
      const auto weighed = [&](long j) {
        const Vec own = some(by + j, d - j);
        return w ? own * (some(w + j, d - j) + shift) : own;
      };
      for (long j = 0; j < d; j += LANES) {
        const Vec v = some(row + j, d - j);
        squares += v * v, inner += weighed(j) * v;
      }
      const float r = 1.0f / std::sqrt(total(squares) / static_cast<float>(d) + eps);
      const float mean = total(inner) * r * r / static_cast<float>(d);
      for (long j = 0; j < d; j += LANES) {
        const Vec v = some(row + j, d - j);
        store(dx + i * d + j, r * (weighed(j) - v * mean), d - j);
        if (w) store(sums + j, some(sums + j, d - j) + some(by + j, d - j) * v * r, d - j);
      }
    }
  }
}

// Rows of heads: x[i, h] with cos[i] (d of them) and sin[i] (half of them), in half-split pairs.
template <class T>
void turn(const T* x, long xs, long xh, long m, long heads, long d, long half, const float* cos, const float* sin, T* y) {
#pragma omp parallel for if (m * heads * d > ALONE)
  for (long i = 0; i < m; i++)
    for (long h = 0; h < heads; h++) {
      const T* __restrict from = x + i * xs + h * xh;
      T* __restrict to = y + (i * heads + h) * d;
      const float *__restrict c = cos + i * d, *__restrict s = sin + i * half;
      for (long j = 0; j < half; j++) {
        const float a = get(from + j), b = get(from + half + j);
        put(to + j, a * c[j] - b * s[j]);
        put(to + half + j, b * c[half + j] + a * s[j]);
      }
      for (long j = 2 * half; j < d; j++) put(to + j, get(from + j) * c[j]);
    }
}

// x / ln 2 as a product of its own: inside the sum that follows it would not be rounded.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
inline Vec halvings(Vec x) { return __builtin_assoc_barrier(x * 1.442695040888963407f); }
#else
__attribute__((noinline)) Vec halvings(Vec x) { return x * 1.442695040888963407f; }
#endif

// e^x as torch's loops have it, to the bit where the compiler fuses products with sums: Sleef's expf of 1.0 ULP (Shibata
// and Petrogalli 2020).
inline Vec sleef_exp(Vec x) {
  typedef int32_t Whole __attribute__((vector_size(64)));
  const Vec near = halvings(x) + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to a whole number
  const Vec n = near - 12582912.0f;
  Vec r = n * -0.693145751953125f + x;
  r = n * -1.428606765330187045e-06f + r;
  Vec p = r * 0.000198527617612853646278381f + 0.00139304355252534151077271f;
  p = p * r + 0.00833336077630519866943359f;
  p = p * r + 0.0416664853692054748535156f;
  p = p * r + 0.166666671633720397949219f;
  p = p * r + 0.5f;
  p = r * r * p + r + 1.0f;
  const Whole whole = __builtin_convertvector(n, Whole), half = whole >> 1;
  p = p * reinterpret_cast<Vec>((half + 127) << 23) * reinterpret_cast<Vec>((whole - half + 127) << 23);
  p = x < -104.0f ? Vec{} : p;
  return x > 100.0f ? Vec{} + INFINITY : p;
}

inline Vec silu(Vec v) { return v / (sleef_exp(-v) + 1.0f); }

// x (1 + tanh(c (x + 0.044715 x^3))) / 2 with c = sqrt(2 / pi), by tanh's exponential.
inline Vec gelu_tanh(Vec v) { return v / (sleef_exp(v * (v * v * -0.07135481283f - 1.595769122f)) + 1.0f); }

// As ALONE, of exponentials and divisions.
constexpr long COSTLY = ALONE / 4;

// y[i] = x[i] / (1 + e^-x[i]) of `count` numbers.
template <class T> void silu(const T* x, T* y, long count) {
#pragma omp parallel for if (count > COSTLY)
  for (long i = 0; i < count; i += LANES) store(y + i, silu(some(x + i, count - i)), count - i);
}

// y[i] = act(x[i]) u[i] of `count` numbers, rounded as if act(x[i]) had been stored.
template <class T, class Act> void gated(const T* x, const T* u, T* y, long count, Act act) {
#pragma omp parallel for if (count > COSTLY)
  for (long i = 0; i < count; i += LANES)
    store(y + i, saved(x, act(some(x + i, count - i))) * some(u + i, count - i), count - i);
}

// z[i] = op(x[i], y[i]) in float32, of `count` numbers.
template <class T, class Op> void each(const T* x, const T* y, T* z, long count, Op op) {
#pragma omp parallel for if (count > ALONE)
  for (long i = 0; i < count; i += LANES)
    store(z + i, op(some(x + i, count - i), some(y + i, count - i)), count - i);
}

}  // namespace
