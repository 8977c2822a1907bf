// The compiled kernels against plain loops in double, as one program for machines that have no Python here. A line a
// kernel: its name, its largest error as a share of the sum of its terms' sizes, and a hash of its result's bits.
#include "kernels.cpp"

#include <cstdio>

namespace {

typedef std::vector<float> Floats;
typedef std::vector<double> Doubles;

uint64_t state = 1;

float drawn() {  // of -1 to 1
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<float>(static_cast<int32_t>(state >> 33) - (1 << 30)) / (1 << 30);
}

Floats draws(long count, float scale = 1.0f) {
  Floats found(count);
  for (float& f : found) f = drawn() * scale;
  return found;
}

std::vector<uint16_t> halves(Floats& from) {  // what is lost is lost from both
  std::vector<uint16_t> found;
  for (float& f : from) found.push_back(narrowed(f)), f = widened(found.back());
  return found;
}

bool wrong = false;

void told(const char* name, const Floats& found, const Doubles& exact, const Doubles& size, double bound) {
  double most = 0;
  uint64_t hash = 14695981039346656037u;
  for (size_t i = 0; i < found.size(); i++) {
    const double error = std::fabs(found[i] - exact[i]) / size[i];
    most = error > most || std::isnan(error) ? error : most;
    uint32_t bits;
    std::memcpy(&bits, &found[i], 4);
    hash = (hash ^ bits) * 1099511628211u;
  }
  wrong |= !(most < bound);
  std::printf("%s %.3g %016llx\n", name, most, static_cast<unsigned long long>(hash));
}

void linear_(bool half, long m, long k, long n) {
  Floats x = draws(m * k), w = draws(n * k), b = draws(n), y(m * n);
  Doubles exact(m * n), size(m * n);
  std::vector<uint16_t> hx, hw, hb, hy(m * n);
  if (half) hx = halves(x), hw = halves(w), hb = halves(b);
  for (long i = 0; i < m; i++)
    for (long o = 0; o < n; o++) {
      double sum = b[o], all = std::fabs(b[o]);
      for (long j = 0; j < k; j++) sum += double(x[i * k + j]) * w[o * k + j], all += std::fabs(x[i * k + j] * w[o * k + j]);
      exact[i * n + o] = sum, size[i * n + o] = all;
    }
  if (half) assay_linear(1, hx.data(), k, m, k, hw.data(), hb.data(), hy.data(), n);
  else assay_linear(0, x.data(), k, m, k, w.data(), b.data(), y.data(), n);
  for (long i = 0; half && i < m * n; i++) y[i] = widened(hy[i]);
  told(half ? "linear16" : "linear32", y, exact, size, half ? 4e-3 : 1e-6);
}

// Codes are as assay/ops/packed.py lays them: of 16 outputs the scales of their groups, then in 8 bits the inputs by four.
void packed_(long bits, long m, long k, long n) {
  const long groups = (k + 31) / 32, tiles = (n + 15) / 16, head = scale_bytes(groups), bytes = head + groups * bits * 64;
  const Floats x = draws(m * k);
  Floats y(m * n);
  std::vector<uint8_t> codes(tiles * bytes);
  Doubles w(tiles * 16 * groups * 32), exact(m * n), size(m * n);
  for (long t = 0; t < tiles; t++)
    for (long g = 0; g < groups; g++)
      for (long o = 0; o < 16; o++) {
        const uint16_t scale = narrowed(0.01f + 0.01f * std::fabs(drawn()));
        std::memcpy(&codes[t * bytes + (g * 16 + o) * 2], &scale, 2);
        for (long c = 0; c < 32; c++) {
          const long zero = 1 << (bits - 1), u = zero + std::lround(drawn() * (zero - 1));
          const long line = bits == 8 ? c / 4 : c / 4 % 4, shift = bits == 8 || c < 16 ? 0 : 4;
          codes[t * bytes + head + ((g * bits + line) * 16 + o) * 4 + c % 4] |= u << shift;
          w[((t * 16 + o) * groups + g) * 32 + c] = widened(scale) * double(u - zero);
        }
      }
  for (long i = 0; i < m; i++)
    for (long g = 0; g < groups; g++) {
      const long count = std::min(32L, k - g * 32);
      float most = 0;
      for (long c = 0; c < count; c++) most = std::max(most, std::fabs(x[i * k + g * 32 + c]));
      for (long o = 0; o < n; o++)
        for (long c = 0; c < count; c++) {
          const double q = std::nearbyint(double(x[i * k + g * 32 + c]) * (127.0f / most));
          const double term = q * (most / 127.0f) * w[(o * groups + g) * 32 + c];
          exact[i * n + o] += term, size[i * n + o] += std::fabs(term);
        }
    }
  const long map[5] = {(long)codes.data(), 0, (long)y.data(), n, bits};
  assay_packed(0, x.data(), k, m, k, map, 1);
  told(bits == 8 ? "packed8" : "packed4", y, exact, size, 1e-6);
}

// tokens 0: one query a row by `assay_attend`, with pages; else by `assay_attend_tiled` without.
void attend_(long tokens, float cap) {
  const long rows = 2, heads = 6, groups = 2, size = 32, width = 48, entries = 160, page = tokens ? entries : 8;
  const long queries = std::max(1L, tokens), each = entries / page;
  Floats q = draws(rows * queries * heads * size), k = draws(rows * entries * groups * size), y(q.size() / size * width);
  Floats v = draws(rows * entries * groups * width), sink = draws(heads);
  std::vector<uint8_t> seen(rows * queries * entries);
  for (uint8_t& s : seen) s = drawn() < 0.3f;
  std::vector<int64_t> table(rows * each);
  for (size_t i = 0; i < table.size(); i++) table[i] = (i * 7 + 3) % table.size();
  Doubles exact(y.size()), all(y.size(), 1.0);
  for (long i = 0; i < rows * queries * heads; i++) {
    const long head = i % heads, row = i / heads / queries, group = head / (heads / groups);
    double total = std::exp(double(sink[head]));
    for (long e = 0; e < entries; e++) {
      if (!seen[i / heads * entries + e]) continue;
      const long at = ((tokens ? row : table[row * each + e / page]) * page + e % page) * groups + group;
      double z = 0;
      for (long j = 0; j < size; j++) z += double(q[i * size + j]) * k[at * size + j];
      const double share = std::exp(cap > 0 ? cap * std::tanh(z / cap) : z);
      total += share;
      for (long j = 0; j < width; j++) exact[i * width + j] += share * v[at * width + j];
    }
    for (long j = 0; j < width; j++) exact[i * width + j] /= total;
  }
  const long numbers[19] = {heads * size, size, page * groups * size, groups * size, size, page * groups * width,
                            groups * width, width, queries * entries, rows, heads, groups, entries, size, width, page,
                            tokens ? 0 : each, queries, entries};
  const auto call = tokens ? assay_attend_tiled : assay_attend;
  call(0, q.data(), k.data(), v.data(), tokens ? nullptr : table.data(), seen.data(), y.data(), sink.data(), numbers, 1.0f, cap);
  told(tokens ? "attend_tiled" : "attend", y, exact, all, 3e-6);
}

// A delta rule with a decay a head, from the state of another row on.
void scan_() {
  const long lanes = 2, tokens = 5, heads = 3, keys = 9, values = 37;
  Floats q = draws(lanes * tokens * heads * keys), k = draws(q.size(), 0.5f), v = draws(lanes * tokens * heads * values);
  Floats rate = draws(lanes * tokens * heads), decay = draws(rate.size()), past = draws(2 * heads * keys * values);
  Floats y(v.size()), end(past.size());
  for (float& d : decay) d = -std::fabs(d);
  const int64_t place[2] = {1, 0};
  Doubles exact(v.size()), all(v.size(), 1.0);
  for (long l = 0; l < lanes; l++)
    for (long h = 0; h < heads; h++)
      for (long c = 0; c < values; c++) {
        Doubles s(keys);
        for (long i = 0; i < keys; i++) s[i] = past[((place[l] * heads + h) * keys + i) * values + c];
        for (long t = 0; t < tokens; t++) {
          const long at = (l * tokens + t) * heads + h;
          double found = 0, out = 0;
          for (long i = 0; i < keys; i++) s[i] *= std::exp(double(decay[at])), found += k[at * keys + i] * s[i];
          for (long i = 0; i < keys; i++) s[i] += k[at * keys + i] * rate[at] * (v[at * values + c] - found);
          for (long i = 0; i < keys; i++) out += q[at * keys + i] * s[i];
          exact[at * values + c] = out;
        }
      }
  const auto stream = [&](const Floats& f, long width) {
    return std::vector<long>{(long)f.data(), tokens * heads * width, heads * width, width, 1};
  };
  std::vector<long> numbers{lanes, tokens, heads, keys, values, 0, 1};
  const std::vector<long> nothing{0, 0, 0, 0, 1};
  for (const auto& s : {stream(q, keys), nothing, nothing, stream(decay, 1), stream(k, keys), stream(k, keys),
                        stream(v, values), stream(rate, 1), nothing, std::vector<long>{(long)past.data(), (long)place,
                        (long)y.data(), (long)end.data()}})
    numbers.insert(numbers.end(), s.begin(), s.end());
  assay_scan(numbers.data());
  told("scan", y, exact, all, 5e-6);
}

void norm_(long m, long d) {
  Floats x = draws(m * d), w = draws(d), y(m * d);
  Doubles exact(m * d), all(m * d, 1.0);
  for (long i = 0; i < m; i++) {
    double sum = 0;
    for (long j = 0; j < d; j++) sum += double(x[i * d + j]) * x[i * d + j];
    for (long j = 0; j < d; j++) exact[i * d + j] = x[i * d + j] / std::sqrt(sum / d + 1e-5) * (w[j] + 1.0);
  }
  assay_rms_norm(0, x.data(), d, m, d, w.data(), 1.0f, 1e-5f, y.data());
  told("rms_norm", y, exact, all, 2e-6);
}

}  // namespace

int main() {
  linear_(false, 3, 70, 33);
  linear_(false, 17, 1301, 40);
  linear_(true, 3, 70, 33);
  linear_(true, 9, 321, 21);
  packed_(8, 3, 70, 33);
  packed_(8, 11, 96, 20);
  packed_(4, 3, 70, 33);
  packed_(4, 11, 96, 20);
  attend_(0, 0.0f);
  attend_(0, 2.0f);
  attend_(9, 2.0f);
  scan_();
  norm_(3, 70);
  return wrong;
}
