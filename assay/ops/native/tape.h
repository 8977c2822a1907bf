// Kernels behind one another, with arguments that were written down: no way back to Python between them.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

namespace {

// A kernel, and its arguments in words of 8 bytes each.
struct Entry {
  void (*run)(const int64_t*);
  const int64_t* words;
};

template <class A> A word(int64_t bits) {
  A value;
  if constexpr (sizeof(A) == sizeof(bits)) std::memcpy(&value, &bits, sizeof(A));
  else {
    const int32_t low = static_cast<int32_t>(bits);
    static_assert(sizeof(A) == sizeof(low));
    std::memcpy(&value, &low, sizeof(A));
  }
  return value;
}

template <class... A, std::size_t... I>
void unpacked(void (*run)(A...), const int64_t* words, std::index_sequence<I...>) {
  run(word<A>(words[I])...);
}

template <class... A> void unpacked(void (*run)(A...), const int64_t* words) {
  unpacked(run, words, std::index_sequence_for<A...>{});
}

// took: seconds of each, or null.
inline void run(const Entry* entries, long count, double* took) {
  for (long i = 0; i < count; i++) {
    const auto began = took ? std::chrono::steady_clock::now() : std::chrono::steady_clock::time_point{};
    entries[i].run(entries[i].words);
    if (took) took[i] = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  }
}

}  // namespace

// Every kernel of the library has one of these.
#define AGAIN(name) \
  void assay_again_##name(const int64_t* words) { unpacked(assay_##name, words); }
