// A few rows, each with some of the matrices of a mixture: what is chosen is read once, where it stands.
#pragma once

#include "linear.h"
#include "tape.h"

namespace {

// Row i of y is row i / `each` of x with matrix choice[i] of each of several weights [experts, out, k].
struct Chosen {
  long each, rows, k, experts;
  const int64_t* choice;
};

template <class T> void expert(const Chosen& c, const T* x, const Map* maps, int count, long e, const std::vector<long>& rows) {
  static thread_local std::vector<T> in, out;
  const long m = rows.size();
  std::vector<Map> own;
  long wide = 0;
  for (int i = 0; i < count; i++) wide += maps[i].out;
  in.resize(m * c.k);
  out.resize(m * wide);
  T* to = out.data();
  for (long r = 0; r < m; r++) std::memcpy(in.data() + r * c.k, x + rows[r] / c.each * c.k, c.k * sizeof(T));
  for (int i = 0; i < count; i++) {
    const Map& map = maps[i];
    const T *w = static_cast<const T*>(map.w) + e * map.out * c.k, *b = static_cast<const T*>(map.b);
    own.push_back({w, b ? b + e * map.out : nullptr, to, map.out, map.out});
    to += m * map.out;
  }
  fan(own.data(), count, in.data(), c.k, static_cast<int>(m), c.k);
  for (int i = 0; i < count; i++)
    for (long r = 0; r < m; r++)
      std::memcpy(static_cast<T*>(maps[i].y) + rows[r] * maps[i].out, static_cast<const T*>(own[i].y) + r * maps[i].out,
                  maps[i].out * sizeof(T));
}

template <class T> void chosen(const Chosen& c, const T* x, const long* numbers, int count) {
  std::vector<Map> maps;
  for (const long* n = numbers; n < numbers + 5 * count; n += 5)
    maps.push_back({(const void*)n[0], (const void*)n[1], (void*)n[2], n[3], n[3]});
  std::vector<std::vector<long>> rows(c.experts);
  for (long i = 0; i < c.rows; i++) rows[c.choice[i]].push_back(i);
  for (long e = 0; e < c.experts; e++)
    if (!rows[e].empty()) expert(c, x, maps.data(), count, e, rows[e]);
}

}  // namespace

extern "C" {

// maps: of each weight w, b, y, out and a zero.
void assay_experts(int half, const void* x, const int64_t* choice, long each, long rows, long k, long experts,
                   const long* maps, int count) {
  const Chosen c{each, rows, k, experts, choice};
  if (half) chosen(c, static_cast<const uint16_t*>(x), maps, count);
  else chosen(c, static_cast<const float*>(x), maps, count);
}

AGAIN(experts)

}  // extern "C"
