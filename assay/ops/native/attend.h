// One query a sequence over its stored keys and values. Dao et al. 2022, arXiv 2205.14135, section 3.1; the keys cut
// into pieces that are merged at the end: Dao et al. 2023, Flash-Decoding.
#pragma once

#include "vectors.h"

namespace {

constexpr long PIECE = 128;  // keys of a piece: fixed, so that the order of a sum never changes
constexpr long WIDEST = 256;  // dimensions of a head

// q [rows, heads, size]; k and v [rows, entries, groups, size or width], strides of rows, entries and groups in elements
// (those of the width are 1); seen [rows, entries]: which entries count. y [rows, heads, width] is dense.
struct Attend {
  const void *q, *k, *v;
  const uint8_t* seen;
  void* y;
  const float* sink;
  const long* strides;  // q: row, head; k: row, entry, group; v: row, entry, group; seen: row
  long rows, heads, groups, entries, size, width;
  float scale, softcap;
};

template <class T> const T* at(const void* base, long offset) { return static_cast<const T*>(base) + offset; }

inline void scores(float* z, long count, const Attend& a, const uint8_t* seen) {
  for (long i = 0; i < count; i++) {
    z[i] *= a.scale;
    if (a.softcap > 0.0f) z[i] = a.softcap * std::tanh(z[i] / a.softcap);
    if (!seen[i]) z[i] = -INFINITY;
  }
  for (long i = count; i < (count + LANES - 1) / LANES * LANES; i++) z[i] = -INFINITY;
}

// e^(z - top) over z, and its sum; 0 where z is -inf.
inline float weights(float* z, long count, float top) {
  Vec sum = {};
  for (long i = 0; i < count; i += LANES) {
    const Vec v = load(z + i);
    const Vec e = v == -INFINITY ? Vec{} : exponential(v - top);
    sum += e;
    *reinterpret_cast<Loose*>(z + i) = e;
  }
  return total(sum);
}

// One query head with the keys [first, last): out[0] the largest logit, out[1] the sum of e^(z - out[0]), then the
// values in those shares.
template <class T> void piece(const Attend& a, long row, long head, long first, long last, float* out) {
  const long* s = a.strides;
  const long group = head / (a.heads / a.groups), count = last - first;
  const uint8_t* seen = a.seen + row * s[8] + first;
  Vec acc[WIDEST / LANES] = {};
  float z[PIECE];
  Vec q[WIDEST / LANES];
  const T* from = at<T>(a.q, row * s[0] + head * s[1]);
  for (long j = 0; j < a.size; j += LANES) q[j / LANES] = load(from + j);
  const T* k = at<T>(a.k, row * s[2] + first * s[3] + group * s[4]);
  for (long i = 0; i < count; i++, k += s[3]) {
    Vec sum = {};
    for (long j = 0; j < a.size; j += LANES) sum += q[j / LANES] * load(k + j);
    z[i] = total(sum);
  }
  scores(z, count, a, seen);
  float top = -INFINITY;
  for (long i = 0; i < count; i++) top = z[i] > top || std::isnan(z[i]) ? z[i] : top;
  out[0] = top;
  out[1] = top == -INFINITY ? 0.0f : weights(z, count, top);
  if (top == -INFINITY) return;
  const T* v = at<T>(a.v, row * s[5] + first * s[6] + group * s[7]);
  for (long i = 0; i < count; i++, v += s[6])
    if (seen[i])
      for (long j = 0; j < a.width; j += LANES) acc[j / LANES] += z[i] * load(v + j);
  for (long j = 0; j < a.width; j += LANES) *reinterpret_cast<Loose*>(out + 2 + j) = acc[j / LANES];
}

// The pieces of a head, from the first to the last; nothing seen gives zeros.
template <class T> void merge(const Attend& a, long head, const float* parts, long count, T* y) {
  const long step = a.width + 2;
  float top = a.sink ? a.sink[head] : -INFINITY;
  for (long p = 0; p < count; p++) top = parts[p * step] > top || std::isnan(parts[p * step]) ? parts[p * step] : top;
  float sum = a.sink && top != -INFINITY ? std::exp(a.sink[head] - top) : 0.0f;
  Vec acc[WIDEST / LANES] = {};
  for (long p = 0; p < count; p++) {
    const float* part = parts + p * step;
    if (part[0] == -INFINITY) continue;
    const float share = std::exp(part[0] - top);
    sum += share * part[1];
    for (long j = 0; j < a.width; j += LANES) acc[j / LANES] += share * load(part + 2 + j);
  }
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (long j = 0; j < a.width; j += LANES) store(y + j, acc[j / LANES] * inverse, LANES);
}

template <class T> void attend(const Attend& a) {
  static thread_local std::vector<float> buffer;
  const long pieces = std::max<long>(1, (a.entries + PIECE - 1) / PIECE), step = a.width + 2;
  const long shared = a.heads / a.groups, tasks = a.rows * a.groups * pieces;
  buffer.resize(a.rows * a.heads * pieces * step);
  float* parts = buffer.data();
#pragma omp parallel for schedule(static) if (tasks * shared * PIECE * a.size > ALONE)
  for (long task = 0; task < tasks; task++) {
    const long p = task % pieces, group = task / pieces % a.groups, row = task / pieces / a.groups;
    for (long head = group * shared; head < (group + 1) * shared; head++)
      piece<T>(a, row, head, p * PIECE, std::min(a.entries, (p + 1) * PIECE),
               parts + ((row * a.heads + head) * pieces + p) * step);
  }
  for (long i = 0; i < a.rows * a.heads; i++)
    merge<T>(a, i % a.heads, parts + i * pieces * step, pieces, static_cast<T*>(a.y) + i * a.width);
}

}  // namespace
