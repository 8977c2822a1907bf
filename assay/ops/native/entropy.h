// Of rows of logits the largest; cross-entropy and its gradient, with nothing as large as they are kept between. A
// row's sum of exponentials walks it in steps of 64, then a tree over the lanes.
#pragma once

#include "tape.h"
#include "vectors.h"

namespace {

// Sixteen logits from j on; behind the last one nothing (-inf).
template <class T> Vec logits_at(const T* row, long j, long size) {
  if (size - j >= LANES) return load(row + j);
  Vec v = Vec{} - INFINITY;
  for (long i = j; i < size; i++) v[i - j] = get(row + i);
  return v;
}

// e^(v - top), and 0 of what is -inf whatever `top` is.
inline Vec shares(Vec v, float top) { return v == -INFINITY ? Vec{} : exponential(v - top); }

// all[i] = log sum_j e^x[i, j], and nll[i] = all[i] - x[i, targets[i]]; 0 where the target is below 0.
template <class T>
void entropy(const T* x, long xs, long rows, long size, const int64_t* targets, float* all, float* nll) {
#pragma omp parallel for if (rows * size > ALONE)
  for (long i = 0; i < rows; i++) {
    const T* row = x + i * xs;
    Vec most = Vec{} - INFINITY, sum[4] = {};
    for (long j = 0; j < size; j += LANES) most = larger(most, logits_at(row, j, size));
    const float top = largest(most);
    for (long j = 0; j < size; j += 4 * LANES)
      for (long n = 0; n < 4 && j + n * LANES < size; n++) sum[n] += shares(logits_at(row, j + n * LANES, size), top);
    all[i] = top + std::log(total((sum[0] + sum[1]) + (sum[2] + sum[3])));
    nll[i] = targets[i] < 0 ? 0.0f : all[i] - get(row + targets[i]);
  }
}

// y[i] = by (e^(x[i] - all[i]) - 1 at targets[i]), dense; 0 where the target is below 0.
template <class T>
void entropy_back(const T* x, long xs, long rows, long size, const int64_t* targets, const float* all, float by, T* y) {
#pragma omp parallel for if (rows * size > ALONE)
  for (long i = 0; i < rows; i++) {
    const T* row = x + i * xs;
    T* to = y + i * size;
    if (targets[i] < 0) {
      std::memset(to, 0, size * sizeof(T));
      continue;
    }
    for (long j = 0; j < size; j += LANES) store(to + j, by * shares(logits_at(row, j, size), all[i]), size - j);
    const float own = get(row + targets[i]);
    put(to + targets[i], by * (own == -INFINITY ? -1.0f : std::exp(own - all[i]) - 1.0f));
  }
}

// The largest of each row of `size` values and where it stands first; of a row with a NaN, the first of them.
template <class T> void argmax(const T* x, long xs, long rows, long size, float* values, int64_t* places) {
  typedef int32_t Whole __attribute__((vector_size(64)));
#pragma omp parallel for if (rows * size > ALONE)
  for (long row = 0; row < rows; row++) {
    Vec most = Vec{} - INFINITY;
    Whole at = {};  // of each lane, which sixteen
    for (long i = 0; i < size; i += LANES) {
      const Vec v = logits_at(x + row * xs, i, size);
      const Whole taken = (v > most) | ((v != v) & (most == most));
      most = taken ? v : most;
      at = taken ? Whole{} + static_cast<int32_t>(i) : at;
    }
    float top = most[0];
    long place = at[0];
    for (int lane = 1; lane < LANES; lane++) {
      const bool same = most[lane] == top || (std::isnan(most[lane]) && std::isnan(top));
      const bool more = most[lane] > top || (std::isnan(most[lane]) && !std::isnan(top));
      if (more || (same && at[lane] + lane < place)) top = most[lane], place = at[lane] + lane;
    }
    values[row] = top;
    places[row] = place;
  }
}

}  // namespace

extern "C" {

void assay_entropy(int half, const void* x, long xs, long rows, long size, const int64_t* targets, float* all, float* nll) {
  if (half) entropy((const uint16_t*)x, xs, rows, size, targets, all, nll);
  else entropy((const float*)x, xs, rows, size, targets, all, nll);
}

void assay_entropy_back(int half, const void* x, long xs, long rows, long size, const int64_t* targets, const float* all,
                        float by, void* y) {
  if (half) entropy_back((const uint16_t*)x, xs, rows, size, targets, all, by, (uint16_t*)y);
  else entropy_back((const float*)x, xs, rows, size, targets, all, by, (float*)y);
}

void assay_argmax(int half, const void* x, long xs, long rows, long size, float* values, int64_t* places) {
  if (half) argmax((const uint16_t*)x, xs, rows, size, values, places);
  else argmax((const float*)x, xs, rows, size, values, places);
}

AGAIN(argmax)
AGAIN(entropy)
AGAIN(entropy_back)

}  // extern "C"
