#include "log_probs.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace fused_attn {
namespace {

constexpr int64_t kDepth = 8;      // symbols of each model that are looked at first
constexpr int64_t kDeepest = 256;  // where looking at all symbols takes less time
// More than float32 rounding can move a log probability that matters, and far less than the usual
// distance between two.
constexpr float kRounding = 1e-4f;

bool is_before(const Choice& x, const Choice& y) {
  return x.log_prob > y.log_prob || (x.log_prob == y.log_prob && x.symbol < y.symbol);
}

}  // namespace

LogProbs::LogProbs(Stepper& stepper, const DecoderKernels& kernels)
    : stepper_(stepper),
      kernels_(kernels),
      size_(stepper.vocabulary()),
      log_models_(float(std::log(double(stepper.models())))),
      logits_(stepper.models()),
      normalizers_(stepper.models()),
      ends_(stepper.models()),
      each_(stepper.models()) {}

void LogProbs::read(int64_t row) {
  for (size_t model = 0; model < logits_.size(); ++model) {
    logits_[model] = stepper_.logits(int64_t(model), row);
    normalizers_[model] = kernels_.log_sum_exp(logits_[model], size_);
    ends_[model] = logits_[model][kEos];
    if (!std::isfinite(normalizers_[model])) throw NotNumbers();
  }
}

void LogProbs::bar(int32_t symbol) {
  for (float* logits : logits_) logits[symbol] = kNever;
}

void LogProbs::allow_end() {
  for (size_t model = 0; model < logits_.size(); ++model) logits_[model][kEos] = ends_[model];
}

// The logarithm of the mean probability, from the log probabilities in each_.
float LogProbs::joint() const {
  const float most = *std::max_element(each_.begin(), each_.end());
  if (most == kNever) return kNever;
  float sum = 0;
  for (const float one : each_) sum += std::exp(one - most);
  return most + std::log(sum) - log_models_;
}

float LogProbs::of(int64_t symbol) {
  if (symbol < 0 || symbol >= size_) return kNever;
  if (logits_.size() == 1) return logits_[0][symbol] - normalizers_[0];
  for (size_t model = 0; model < logits_.size(); ++model)
    each_[model] = logits_[model][symbol] - normalizers_[model];
  return joint();
}

Choice LogProbs::first() {
  if (logits_.size() > 1) {
    const std::vector<Choice>& found = best(1);
    return found.empty() ? Choice{kPad, kNever} : found[0];
  }
  const int64_t place = kernels_.argmax(logits_[0], size_);
  return {int32_t(place), logits_[0][place] - normalizers_[0]};
}

const std::vector<Choice>& LogProbs::best(int64_t count) {
  count = std::min(count, size_);
  if (logits_.size() > 1) {
    int64_t depth = std::max(count, kDepth);
    while (!best_of_depth(count, depth)) depth *= 4;
    return choices_;
  }
  choices_.clear();
  places_.resize(count);
  const int64_t found = kernels_.top(logits_[0], size_, count, places_.data());
  for (int64_t i = 0; i < found; ++i) {
    const Choice choice{places_[i], logits_[0][places_[i]] - normalizers_[0]};
    if (choice.log_prob == kNever) break;
    choices_.push_back(choice);
  }
  return choices_;
}

// Looks at the `depth` best symbols of each model only, or at all if these are many. A symbol that
// is among those of no model is at most as probable as the mean of what the models give their last
// ones. Returns whether that settles the `count` best.
bool LogProbs::best_of_depth(int64_t count, int64_t depth) {
  const bool complete = depth >= std::min(size_, kDeepest);
  float bound = kNever;
  if (complete) {
    places_.resize(size_);
    std::iota(places_.begin(), places_.end(), 0);
  } else {
    bound = rank_each(depth);
  }
  choices_.clear();
  for (const int32_t symbol : places_) {
    const Choice choice{symbol, of(symbol)};
    if (choice.log_prob != kNever) choices_.push_back(choice);
  }
  const auto middle = choices_.begin() + std::min<int64_t>(count, int64_t(choices_.size()));
  std::partial_sort(choices_.begin(), middle, choices_.end(), is_before);
  choices_.erase(middle, choices_.end());
  return complete ||
         (int64_t(choices_.size()) == count && choices_.back().log_prob > bound + kRounding);
}

// Puts the `depth` best symbols of each model into places_, each once. Returns the largest log
// probability of the others.
float LogProbs::rank_each(int64_t depth) {
  places_.resize(depth * int64_t(logits_.size()));
  for (size_t model = 0; model < logits_.size(); ++model) {
    int32_t* places = places_.data() + int64_t(model) * depth;
    kernels_.top(logits_[model], size_, depth, places);
    each_[model] = logits_[model][places[depth - 1]] - normalizers_[model];
  }
  std::sort(places_.begin(), places_.end());
  places_.erase(std::unique(places_.begin(), places_.end()), places_.end());
  return joint();
}

const float* LogProbs::all() {
  if (logits_.size() == 1) return logits_[0];
  all_.resize(size_);
  for (int64_t symbol = 0; symbol < size_; ++symbol) all_[symbol] = of(symbol);
  return all_.data();
}

}  // namespace fused_attn
