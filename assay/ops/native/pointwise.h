// One pass over the values: norm and turn.
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

// z[i] = op(x[i], y[i]) in float32, of `count` numbers.
template <class T, class Op> void each(const T* x, const T* y, T* z, long count, Op op) {
#pragma omp parallel for if (count > ALONE)
  for (long i = 0; i < count; i += LANES)
    store(z + i, op(some(x + i, count - i), some(y + i, count - i)), count - i);
}

}  // namespace
