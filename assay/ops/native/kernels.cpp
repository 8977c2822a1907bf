// Kernels for a few rows on a CPU: weights stream from memory once, sums are made in float32.
//
// Every sum has one order, whatever other rows there are, whichever thread makes it and however wide the machine's
// registers are: 16 lanes that walk the row in steps of 16, then a tree over the lanes. An output belongs to one thread.


#include "attend.h"
#include "elementwise.h"
#include "entropy.h"
#include "experts.h"
#include "invariant.h"
#include "linear.h"
#include "many.h"
#include "packed.h"
#include "pointwise.h"
#include "scans.h"
#include "selective.h"
#include "tape.h"
#include "tiles.h"

extern "C" {

// y = x w^T + b. half: everything is bfloat16, else float32. Strides in elements; w has none.
void assay_linear(int half, const void* x, long xs, int m, long k, const void* w, const void* b, void* y, long out) {
  const Map map{w, b, y, out, out};
  if (half) fan<uint16_t>(&map, 1, static_cast<const uint16_t*>(x), xs, m, k);
  else fan<float>(&map, 1, static_cast<const float*>(x), xs, m, k);
}

static std::vector<Map> listed(const long* maps, int count) {
  std::vector<Map> several;
  for (const long* n = maps; n < maps + 5 * count; n += 5)
    several.push_back({(const void*)n[0], (const void*)n[1], (void*)n[2], n[3], n[3]});
  return several;
}

// The same x with several weights; maps: of each w, b, y, out and bits, which are 0 here.
void assay_linears(int half, const void* x, long xs, long m, long k, const long* maps, int count) {
  const std::vector<Map> several = listed(maps, count);
  if (half) fan(several.data(), count, (const uint16_t*)x, xs, m, k);
  else fan(several.data(), count, (const float*)x, xs, m, k);
}

// The same in bfloat16 with any number of rows, in another order of the sums.
void assay_many(const void* x, long xs, long m, long k, const long* maps, int count) {
  const std::vector<Map> several = listed(maps, count);
  many(several.data(), count, (const uint16_t*)x, xs, m, k);
}

// The same with weights of 8 or 4 bits; half: of x, b and y.
void assay_packed(int half, const void* x, long xs, long m, long k, const long* maps, int count) {
  std::vector<PackedMap> fan;
  for (const long* n = maps; n < maps + 5 * count; n += 5)
    fan.push_back({(const uint8_t*)n[0], (const void*)n[1], (void*)n[2], n[3], n[4]});
  if (half) packed_fan(fan.data(), count, (const uint16_t*)x, xs, m, k);
  else packed_fan(fan.data(), count, (const float*)x, xs, m, k);
}

// Rows sorted by expert, of which the first counts[0] are the first one's, with weights [experts, out, k] of some bits.
void assay_grouped(int half, const void* x, long xs, long m, long k, const void* w, long bits, const int64_t* counts,
                   long experts, void* y, long out) {
  const PackedMap of{(const uint8_t*)w, nullptr, y, out, bits};
  if (half) packed_grouped(of, (const uint16_t*)x, xs, m, k, counts, experts);
  else packed_grouped(of, (const float*)x, xs, m, k, counts, experts);
}

// y = x / sqrt(mean(x^2) + eps) * (w + shift); w null: without it. y is dense.
void assay_rms_norm(int half, const void* x, long xs, long m, long d, const void* w, float shift, float eps, void* y) {
  if (half) rms_norm((const uint16_t*)x, xs, m, d, (const uint16_t*)w, shift, eps, (uint16_t*)y);
  else rms_norm((const float*)x, xs, m, d, (const float*)w, shift, eps, (float*)y);
}

void assay_rms_norm_back(int half, const void* x, long xs, long m, long d, const void* w, float shift, float eps,
                         const void* g, void* dx, float* dw) {
  typedef uint16_t Half;
  if (half) rms_norm_back((const Half*)x, xs, m, d, (const Half*)w, shift, eps, (const Half*)g, (Half*)dx, dw);
  else rms_norm_back((const float*)x, xs, m, d, (const float*)w, shift, eps, (const float*)g, (float*)dx, dw);
}

void assay_turn(int bf16, const void* x, long xs, long xh, long m, long heads, long d, long half, const float* cos,
                const float* sin, void* y) {
  if (bf16) turn((const uint16_t*)x, xs, xh, m, heads, d, half, cos, sin, (uint16_t*)y);
  else turn((const float*)x, xs, xh, m, heads, d, half, cos, sin, (float*)y);
}

static Attend attention(const void* q, const void* k, const void* v, const int64_t* table, const void* seen, void* y,
                        const float* sink, const long* numbers, float scale, float softcap) {
  const long* n = numbers + 8;
  return {q, numbers, {k, numbers + 2}, {v, numbers + 5}, table, (const uint8_t*)seen, y, sink,
          n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], scale, softcap};
}

void assay_attend(int half, const void* q, const void* k, const void* v, const int64_t* table, const void* seen, void* y,
                  const float* sink, const long* numbers, float scale, float softcap) {
  const Attend a = attention(q, k, v, table, seen, y, sink, numbers, scale, softcap);
  if (half) attend<uint16_t>(a);
  else attend<float>(a);
}

// The same with many queries a row; numbers: and of queries in a row, and the stride of `seen` from one to the next.
void assay_attend_tiled(int half, const void* q, const void* k, const void* v, const int64_t* table, const void* seen,
                        void* y, const float* sink, const long* numbers, float scale, float softcap) {
  const Tiled t{attention(q, k, v, table, seen, y, sink, numbers, scale, softcap), numbers[17], numbers[18]};
  if (half) attend_tiled<uint16_t>(t);
  else attend_tiled<float>(t);
}

void assay_add(int half, const void* x, const void* y, void* z, long count) {
  const auto sum = [](Vec a, Vec b) { return a + b; };
  if (half) each((const uint16_t*)x, (const uint16_t*)y, (uint16_t*)z, count, sum);
  else each((const float*)x, (const float*)y, (float*)z, count, sum);
}

void assay_mul(int half, const void* x, const void* y, void* z, long count) {
  const auto product = [](Vec a, Vec b) { return a * b; };
  if (half) each((const uint16_t*)x, (const uint16_t*)y, (uint16_t*)z, count, product);
  else each((const float*)x, (const float*)y, (float*)z, count, product);
}

void assay_silu(int half, const void* x, void* y, long count) {
  if (half) silu((const uint16_t*)x, (uint16_t*)y, count);
  else silu((const float*)x, (float*)y, count);
}

// act(x) u: SiLU, or GELU by tanh.
void assay_gated(int half, int gelu, const void* x, const void* u, void* y, long count) {
  const auto act = [gelu](Vec v) { return gelu ? gelu_tanh(v) : silu(v); };
  if (half) gated((const uint16_t*)x, (const uint16_t*)u, (uint16_t*)y, count, act);
  else gated((const float*)x, (const float*)u, (float*)y, count, act);
}

long assay_share() { return SHARE; }

// Row i of `from`, `size` bytes, becomes row index[i] of `into`.
void assay_put(void* into, const int64_t* index, long count, const void* from, long size) {
  for (long i = 0; i < count; i++) std::memcpy((char*)into + index[i] * size, (const char*)from + i * size, size);
}

void assay_run(const void* entries, long count, double* took) { run((const Entry*)entries, count, took); }

AGAIN(linear)
AGAIN(linears)
AGAIN(many)
AGAIN(packed)
AGAIN(grouped)
AGAIN(rms_norm)
AGAIN(rms_norm_back)
AGAIN(turn)
AGAIN(attend)
AGAIN(attend_tiled)
AGAIN(add)
AGAIN(mul)
AGAIN(silu)
AGAIN(gated)
AGAIN(put)

}  // extern "C"
