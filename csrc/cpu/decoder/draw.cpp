#include "draw.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace fused_attn {
namespace {

constexpr int64_t kDepth = 64;  // symbols that are ranked first to reach top_p
constexpr int64_t kBlock = 64;  // weights that are added at once

// The finalizer of splitmix64: every bit of the result depends on every bit of x.
uint64_t mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

float block_sum(const float* weights) {
  float lanes[8] = {};
  for (int64_t i = 0; i < kBlock; i += 8)
    for (int lane = 0; lane < 8; ++lane) lanes[lane] += weights[i + lane];
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  return sum;
}

// The place i of the weights w (n) with w_0 + ... + w_(i-1) <= share * sum(w) < w_0 + ... + w_i,
// for a share in [0, 1). Never a weight of 0, if any is above 0. Blocks are read whole.
int64_t place_of(const float* weights, int64_t n, double share) {
  double total = 0;
  for (int64_t i = 0; i < n; i += kBlock) total += block_sum(weights + i);
  double rest = share * total;  // of the weights to pass
  int64_t i = 0;
  for (; i + kBlock < n; i += kBlock) {
    const double sum = block_sum(weights + i);
    if (rest < sum) break;
    rest -= sum;
  }
  for (; i < n; ++i) {
    if (rest < weights[i]) return i;
    rest -= weights[i];
  }
  while (i > 1 && weights[i - 1] == 0) --i;  // rounding left a rest beyond the last weight
  return i - 1;
}

int64_t whole_blocks(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

}  // namespace

double uniform(uint64_t seed, int64_t sentence, int64_t step) {
  const uint64_t bits = mixed(mixed(mixed(seed) ^ uint64_t(sentence)) ^ uint64_t(step));
  return double(bits >> 11) * 0x1p-53;
}

Drawer::Drawer(const SearchOptions& options, const DecoderKernels& kernels, int64_t vocabulary)
    : options_(options), kernels_(kernels), probabilities_(whole_blocks(vocabulary)) {}

// Returns false if no symbol can come.
bool Drawer::temper(LogProbs& probs) {
  const float* scores = probs.all();
  const int64_t n = probs.size();
  const float most = scores[kernels_.argmax(scores, n)];
  if (std::isinf(most)) return false;
  // A temperature that float32 rounds to 0 or to infinity would make NaN of the differences.
  using Limits = std::numeric_limits<float>;
  const auto temperature =
      float(std::clamp<double>(options_.temperature, Limits::min(), Limits::max()));
  for (int64_t i = 0; i < n; ++i) probabilities_[i] = (scores[i] - most) / temperature;
  kernels_.softmax(probabilities_.data(), n);
  return true;
}

// Puts the symbols that are kept first in places_, and returns their number. A symbol is kept if it
// is among the top_k and those ranked before it have less than top_p together.
int64_t Drawer::keep(int64_t n) {
  const int64_t most = options_.top_k > 0 ? std::min(options_.top_k, n) : n;
  const int64_t depth = std::min(kDepth, most);
  places_.resize(depth);
  kernels_.top(probabilities_.data(), n, depth, places_.data());
  double before = 0;
  int64_t count = 0;
  while (count < depth && (options_.top_p >= 1 || before < options_.top_p))
    before += probabilities_[places_[count++]];
  return count < depth || depth == most ? count : keep_many(n, most);
}

// The same without ranking them: halves what is left until the last one that is kept is found.
int64_t Drawer::keep_many(int64_t n, int64_t most) {
  const auto is_before = [this](int32_t x, int32_t y) {
    const float p = probabilities_[x], q = probabilities_[y];
    return p > q || (p == q && x < y);
  };
  places_.resize(n);
  std::iota(places_.begin(), places_.end(), 0);
  const auto first = places_.begin();
  std::nth_element(first, first + most, places_.end(), is_before);
  if (options_.top_p >= 1) return most;
  int64_t begin = 0, end = most;  // those before `begin` are kept, those from `end` on are not
  double before = 0;              // what is kept
  while (end - begin > 1) {
    const int64_t middle = begin + (end - begin) / 2;
    std::nth_element(first + begin, first + middle, first + end, is_before);
    double mass = before;
    for (int64_t i = begin; i < middle; ++i) mass += probabilities_[places_[i]];
    if (mass < options_.top_p) {
      before = mass;
      begin = middle;
    } else {
      end = middle;
    }
  }
  return end;
}

Choice Drawer::draw(LogProbs& probs, int64_t sentence, int64_t step) {
  if (!temper(probs)) return {kPad, kNever};
  const double share = uniform(options_.seed, sentence, step);
  int64_t symbol;
  if (options_.top_k == 0 && options_.top_p >= 1) {
    symbol = place_of(probabilities_.data(), probs.size(), share);
  } else {
    const int64_t count = keep(probs.size());
    kept_.assign(whole_blocks(count), 0.0f);
    for (int64_t i = 0; i < count; ++i) kept_[i] = probabilities_[places_[i]];
    symbol = places_[place_of(kept_.data(), count, share)];
  }
  return {int32_t(symbol), probs.of(symbol)};
}

}  // namespace fused_attn
