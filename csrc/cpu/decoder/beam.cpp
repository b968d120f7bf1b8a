#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "constraints.h"
#include "log_probs.h"
#include "penalties.h"
#include "strategies.h"

namespace fused_attn {
namespace {

// A hypothesis is a path of nodes back to the start, node -1.
struct Node {
  int32_t parent, symbol;
  float total;      // log probability up to and including the symbol
  int32_t weights;  // where those of this step begin, in rows of the source's length
};

struct Live {
  int32_t node;
  float total;
};

struct Ended {
  float score, log_prob;
  int32_t node;  // of the last symbol before EOS
};

struct Extension {
  float total;
  int32_t beam, symbol;
};

// The most probable first; among equals the lowest beam and symbol.
bool is_before(const Extension& x, const Extension& y) {
  if (x.total != y.total) return x.total > y.total;
  return x.beam != y.beam ? x.beam < y.beam : x.symbol < y.symbol;
}

// Scratch that all sentences share.
struct Workspace {
  std::vector<Extension> extensions;
  std::vector<int32_t> history;
  std::vector<Live> live;
  std::vector<float> coverage;
};

class Sentence {
 public:
  Sentence(const SearchOptions& options, const SentenceLimits& limits, int64_t beams,
           int64_t source, bool attends)
      : options_(&options), limits_(&limits), beams_(beams), source_(source) {
    live_.push_back({-1, 0.0f});
    if (attends && options.coverage_penalty > 0) coverage_.resize(beams * source);
  }

  // Extends the live hypotheses, whose rows begin at `row`, by a symbol.
  void extend(Stepper& stepper, LogProbs& probs, int64_t row, Workspace& workspace) {
    rank(probs, row, workspace);
    const auto first_weights = add_weights(stepper, row);
    const std::vector<Extension>& extensions = workspace.extensions;
    ++step_;
    take_ended(extensions);
    workspace.live.clear();
    for (const Extension& e : extensions) {
      if (e.symbol == kEos || int64_t(workspace.live.size()) == beams_) continue;
      beams_of_live_[workspace.live.size()] = e.beam;
      workspace.live.push_back({int32_t(nodes_.size()), e.total});
      nodes_.push_back({live_[e.beam].node, e.symbol, e.total, first_weights + e.beam});
    }
    live_.swap(workspace.live);
    reorder_coverage(workspace);
  }

  // Whether fewer than K hypotheses are finished and a live one can enter the n best.
  bool is_open() const {
    if (int64_t(ended_.size()) >= beams_) return false;
    const float total = live_.empty() ? kNever : live_[0].total;
    const float bound = total / length_penalty(*options_, limits_->limit + 1);
    return (int64_t(ended_.size()) < options_->most ? kNever : ended_[options_->most - 1].score) <
           bound;
  }

  // The next symbol of each of the K rows, and the row it continues; `row` is the first of them.
  // Rows without a hypothesis stay as they are.
  void next(int64_t row, int32_t* symbols, int32_t* from) const {
    const int64_t live = int64_t(live_.size());
    for (int64_t beam = 0; beam < beams_; ++beam) {
      symbols[beam] = beam < live ? nodes_[live_[beam].node].symbol : kPad;
      from[beam] = int32_t(row + (beam < live ? beams_of_live_[beam] : beam));
    }
  }

  std::vector<Found> results() const {
    std::vector<Found> results;
    double mass = 0;
    for (const Ended& ended : ended_) {
      if (int64_t(results.size()) == options_->most) break;
      if (options_->nbest_mass > 0 && mass >= options_->nbest_mass) break;
      results.push_back(found(ended));
      mass += std::exp(double(ended.log_prob));
    }
    if (results.empty()) throw NotNumbers();
    return results;
  }

 private:
  // The 2 K most probable extensions, best first, to workspace.extensions. 2 K suffice to have K
  // that do not end, because each hypothesis has one extension that ends.
  void rank(LogProbs& probs, int64_t row, Workspace& workspace) {
    std::vector<Extension>& extensions = workspace.extensions;
    extensions.clear();
    const int64_t only = only_symbol(*limits_, step_);
    for (int32_t beam = 0; beam < int32_t(live_.size()); ++beam) {
      probs.read(row + beam);
      const float total = live_[beam].total;
      if (only >= 0) {
        const float gain = probs.of(only);
        if (gain != kNever) extensions.push_back({total + gain, beam, int32_t(only)});
        continue;
      }
      if (options_->block_ngrams > 0) path(live_[beam].node, workspace.history);
      bar_symbols(*options_, workspace.history, step_, probs);
      for (const Choice& choice : probs.best(2 * beams_))
        extensions.push_back({total + choice.log_prob, beam, choice.symbol});
    }
    const int64_t count = std::min<int64_t>(2 * beams_, int64_t(extensions.size()));
    std::partial_sort(extensions.begin(), extensions.begin() + count, extensions.end(), is_before);
    extensions.resize(count);
  }

  // Stores the weights of this step and adds them to the coverage of the live hypotheses, which
  // becomes that of all their extensions. Returns where the weights begin, in rows.
  int32_t add_weights(Stepper& stepper, int64_t row) {
    const int32_t first = weight_rows_;
    for (int64_t beam = 0; beam < int64_t(live_.size()); ++beam) {
      const float* weights = stepper.weights(row + beam);
      if (!weights) continue;
      if (options_->return_weights) {
        weights_.insert(weights_.end(), weights, weights + source_);
        ++weight_rows_;
      }
      if (coverage_.empty()) continue;
      float* coverage = coverage_.data() + beam * source_;
      for (int64_t s = 0; s < source_; ++s) coverage[s] += weights[s];
    }
    return first;
  }

  void take_ended(const std::vector<Extension>& extensions) {
    const int64_t count = std::min<int64_t>(beams_, int64_t(extensions.size()));
    for (int64_t i = 0; i < count; ++i) {
      const Extension& e = extensions[i];
      if (e.symbol != kEos) continue;
      float score = e.total / length_penalty(*options_, step_);
      if (!coverage_.empty())
        score += coverage_penalty(*options_, coverage_.data() + e.beam * source_, source_);
      if (std::isnan(score)) throw NotNumbers();
      if (score != kNever) ended_.push_back({score, e.total, live_[e.beam].node});
    }
    std::stable_sort(ended_.begin(), ended_.end(),
                     [](const Ended& x, const Ended& y) { return x.score > y.score; });
    if (int64_t(ended_.size()) > beams_) ended_.resize(beams_);
  }

  void reorder_coverage(Workspace& workspace) {
    if (coverage_.empty()) return;
    workspace.coverage.resize(coverage_.size());
    for (size_t beam = 0; beam < live_.size(); ++beam)
      std::copy_n(coverage_.data() + beams_of_live_[beam] * source_, source_,
                  workspace.coverage.data() + int64_t(beam) * source_);
    coverage_.swap(workspace.coverage);
  }

  // The symbols of a hypothesis up to and including a node.
  void path(int32_t node, std::vector<int32_t>& symbols) const {
    symbols.clear();
    for (; node >= 0; node = nodes_[node].parent) symbols.push_back(nodes_[node].symbol);
    std::reverse(symbols.begin(), symbols.end());
  }

  Found found(const Ended& ended) const {
    Found result;
    result.score = ended.score;
    result.log_prob = ended.log_prob;
    path(ended.node, result.tokens);
    result.gains.resize(result.tokens.size());
    const bool has_weights = !weights_.empty();
    if (has_weights) result.weights.resize(result.tokens.size() * source_);
    size_t token = result.tokens.size();
    for (int32_t node = ended.node; node >= 0; node = nodes_[node].parent) {
      --token;
      const Node& n = nodes_[node];
      const double before = n.parent < 0 ? 0.0 : double(nodes_[n.parent].total);
      result.gains[token] = float(double(n.total) - before);
      if (has_weights)
        std::copy_n(weights_.data() + int64_t(n.weights) * source_, source_,
                    result.weights.data() + int64_t(token) * source_);
    }
    return result;
  }

  const SearchOptions* options_;
  const SentenceLimits* limits_;
  int64_t beams_, source_;
  int64_t step_ = 0;  // symbols of the live hypotheses
  std::vector<Node> nodes_;
  std::vector<Live> live_;                                             // best first
  std::vector<int32_t> beams_of_live_ = std::vector<int32_t>(beams_);  // that they continue
  std::vector<Ended> ended_;                                           // best first, at most K
  std::vector<float> weights_;                                         // (weight_rows_, source)
  int32_t weight_rows_ = 0;
  std::vector<float> coverage_;  // (K, source), the sums of weights, or empty
};

class BeamSearch {
 public:
  BeamSearch(Stepper& stepper, const DecoderKernels& kernels, const SearchOptions& options,
             const std::vector<SentenceLimits>& limits)
      : stepper_(stepper), beams_(stepper.beams()), probs_(stepper, kernels) {
    for (int64_t i = 0; i < int64_t(limits.size()); ++i) {
      sentences_.emplace_back(options, limits[i], beams_, stepper.source_length(i),
                              stepper.attends());
      numbers_.push_back(i);
    }
    results_.resize(limits.size());
  }

  std::vector<std::vector<Found>> run() {
    std::vector<int32_t> symbols(sentences_.size() * beams_, kBos), open;
    while (!sentences_.empty()) {
      stepper_.step(symbols.data());
      open.clear();
      for (size_t i = 0; i < sentences_.size(); ++i) {
        sentences_[i].extend(stepper_, probs_, int64_t(i) * beams_, workspace_);
        if (sentences_[i].is_open())
          open.push_back(int32_t(i));
        else
          results_[numbers_[i]] = sentences_[i].results();
      }
      keep(open);
      reorder(symbols);
    }
    return std::move(results_);
  }

 private:
  void keep(const std::vector<int32_t>& open) {
    if (open.size() == sentences_.size()) return;
    for (size_t i = 0; i < open.size(); ++i) {
      if (int32_t(i) == open[i]) continue;
      sentences_[i] = std::move(sentences_[open[i]]);
      numbers_[i] = numbers_[open[i]];
    }
    sentences_.erase(sentences_.begin() + int64_t(open.size()), sentences_.end());
    numbers_.resize(open.size());
    if (!open.empty()) stepper_.keep(open.data(), int64_t(open.size()));
  }

  // The next symbols; each row gets the state that it continues.
  void reorder(std::vector<int32_t>& symbols) {
    const size_t rows = sentences_.size() * beams_;
    symbols.resize(rows);
    from_.resize(rows);
    for (size_t i = 0; i < sentences_.size(); ++i) {
      const int64_t row = int64_t(i) * beams_;
      sentences_[i].next(row, symbols.data() + row, from_.data() + row);
    }
    if (rows) stepper_.reorder(from_.data());
  }

  Stepper& stepper_;
  const int64_t beams_;
  LogProbs probs_;
  Workspace workspace_;
  std::vector<Sentence> sentences_;  // that are not done
  std::vector<int64_t> numbers_;     // of these, in the block at its start
  std::vector<int32_t> from_;
  std::vector<std::vector<Found>> results_;
};

}  // namespace

std::vector<std::vector<Found>> beam_search(Stepper& stepper, const DecoderKernels& kernels,
                                            const SearchOptions& options,
                                            const std::vector<SentenceLimits>& limits) {
  return BeamSearch(stepper, kernels, options, limits).run();
}

}  // namespace fused_attn
