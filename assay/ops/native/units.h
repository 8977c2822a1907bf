// What the rows of a product are read by, and how their products are added up.
#pragma once

#include "vectors.h"

namespace {

// A unit is 16 floats, or 32 halves as the 16 of odd and then the 16 of even place: the order of the instruction that
// takes them in pairs. (A product of two halves is exact in float32, so both ways have the same bits; but numbers below
// 2^-126 that instruction takes for 0.) R: a register of all lanes, or of half of them.
template <class T, class R> struct Unit;

template <class R> struct Unit<float, R> {
  static constexpr int parts = 1, size = LANES;
  static R part(const float* w, int, int half) {
    R v;
    std::memcpy(&v, w + half * (sizeof(R) / sizeof(float)), sizeof v);
    return v;
  }
  static R add(R sum, R w, R x) { return sum + w * x; }
};

template <class R> struct Unit<uint16_t, R> {
  static constexpr int size = 2 * LANES;
#if defined(__AVX512BF16__)
  static_assert(sizeof(R) == sizeof(__m512));
  static constexpr int parts = 1;
  static R part(const uint16_t* w, int, int) { return reinterpret_cast<R>(_mm512_loadu_ps(w)); }
  static R add(R sum, R w, R x) {
    return reinterpret_cast<R>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), (__m512bh)w, (__m512bh)x));
  }
#else
  static constexpr int parts = 2;
  static R part(const uint16_t* w, int even, int half) {
    typedef uint32_t Pairs __attribute__((vector_size(sizeof(R))));
    Pairs u;
    std::memcpy(&u, w + half * (sizeof(R) / sizeof(uint16_t)), sizeof u);
    return reinterpret_cast<R>(even ? (u << 16) : (u & 0xffff0000u));
  }
  static R add(R sum, R w, R x) { return sum + w * x; }
#endif
};

// A row of `size` values as lines of units, the last one padded with zeros; `apart` lines lie from one to the next.
template <class T, class R> void lay(const T* from, long size, Line* to, long apart) {
  typedef Unit<T, R> U;
  const long whole = size / U::size, units = (size + U::size - 1) / U::size;
  T rest[U::size] = {};
  std::memcpy(rest, from + whole * U::size, (size - whole * U::size) * sizeof(T));
  for (long i = 0; i < units; i++)
    for (int part = 0; part < U::parts; part++)
      for (size_t half = 0; half < sizeof(Line) / sizeof(R); half++)
        *reinterpret_cast<R*>(to[(i * U::parts + part) * apart].at + half * (sizeof(R) / sizeof(float))) =
            U::part(i < whole ? from + i * U::size : rest, part, half);
}

}  // namespace
