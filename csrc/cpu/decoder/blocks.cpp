#include "blocks.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "encoder.h"
#include "runner.h"
#include "schedule.h"

namespace fused_attn {
namespace {

size_t floats(int64_t count) { return size_t(count) * sizeof(float); }

// Rows of (parts, count, width), or of one part, for the sentences of a block.
std::vector<const float*> chosen(Arena& arena, const float* from, int64_t parts, int64_t count,
                                 int64_t width, const std::vector<int64_t>& block) {
  std::vector<const float*> found;
  if (!from) return found;
  for (int64_t part = 0; part < parts; ++part) {
    float* rows = arena.take<float>(int64_t(block.size()) * width);
    for (size_t i = 0; i < block.size(); ++i)
      std::memcpy(rows + int64_t(i) * width, from + (part * count + block[i]) * width,
                  floats(width));
    found.push_back(rows);
  }
  return found;
}

// Starts a runner on the sentences of a block.
void begin(Runner& runner, Arena& arena, const SourceRows& sources,
           const std::vector<int64_t>& block) {
  std::vector<int64_t> lengths;
  for (int64_t b : block) lengths.push_back(sources.lengths[b]);
  const int64_t count = int64_t(block.size());
  if (!sources.ids.empty()) {
    std::vector<const int64_t*> ids;
    for (int64_t b : block) ids.push_back(sources.ids[b]);
    runner.encode(ids.data(), lengths.data(), count);
    return;
  }
  const Model& model = runner.model();
  const int64_t width = model.attention.memory_width;
  BlockMemory memory;
  memory.count = count;
  memory.lengths = lengths;
  for (int64_t length : lengths) {
    memory.first.push_back(memory.rows);
    memory.rows += length;
    memory.longest = std::max(memory.longest, length);
  }
  float* rows = arena.take<float>(memory.rows * width);
  for (int64_t i = 0; sources.memory && i < count; ++i)  // null without attention
    std::memcpy(rows + memory.first[i] * width, sources.memory + block[i] * sources.longest * width,
                floats(lengths[i] * width));
  memory.memory = rows;
  const int64_t layers = int64_t(model.layers.size());
  const auto hidden = chosen(arena, sources.hidden, layers, sources.count, model.hidden, block);
  const auto cell = chosen(arena, sources.cell, layers, sources.count, model.hidden, block);
  runner.begin(memory, hidden, cell, sources.position);
  DecoderRows& state = runner.state();
  for (int64_t row = 0; row < runner.rows(); ++row) {
    const int64_t b = block[row / runner.beams()], attended = model.attentional_width();
    if (state.attentional && sources.attentional)
      std::memcpy(state.attentional + row * attended, sources.attentional + b * attended,
                  floats(attended));
    if (state.coverage && sources.coverage)
      std::memcpy(state.coverage + row * memory.longest, sources.coverage + b * sources.longest,
                  floats(sources.lengths[b]));
  }
}

// One or several models on a block.
class BlockStepper : public Stepper {
 public:
  BlockStepper(const SearchCall& call, const SourceRows& sources, const std::vector<int64_t>& block,
               const DecoderKernels& kernels, Worker& worker)
      : kernels_(kernels), interruption_(worker.interruption) {
    for (const Model* model : call.models) {
      runners_.push_back(
          std::make_unique<Runner>(*model, kernels, worker.arena, worker.team, call.beams));
      begin(*runners_.back(), worker.arena, sources, block);
      if (model->attention.score != ScoreKind::none) attending_.push_back(runners_.back().get());
    }
    const bool wanted = call.options.return_weights || call.options.coverage_penalty > 0;
    has_weights_ = wanted && !attending_.empty();
    longest_ = runners_[0]->memory().longest;
    if (has_weights_ && attending_.size() > 1) mean_ = worker.arena.take<float>(rows() * longest_);
  }

  int64_t sentences() const override { return runners_[0]->sentences(); }
  int64_t beams() const override { return runners_[0]->beams(); }
  int64_t models() const override { return int64_t(runners_.size()); }
  int64_t vocabulary() const override { return runners_[0]->model().output.outputs; }
  int64_t source_length(int64_t sentence) const override {
    return runners_[0]->source_length(sentence);
  }
  bool attends() const override { return !attending_.empty(); }

  void step(const int32_t* symbols) override {
    interruption_.poll();
    for (auto& runner : runners_) runner->step(symbols);
    if (mean_) average();
  }
  float* logits(int64_t model, int64_t row) override { return runners_[model]->logits(row); }
  const float* weights(int64_t row) const override {
    if (!has_weights_) return nullptr;
    return mean_ ? mean_ + row * longest_ : attending_[0]->weights(row);
  }
  void reorder(const int32_t* from) override {
    for (auto& runner : runners_) runner->reorder(from);
  }
  void keep(const int32_t* sentences, int64_t count) override {
    for (auto& runner : runners_) runner->keep(sentences, count);
  }

 private:
  int64_t rows() const { return sentences() * beams(); }

  void average() {
    const float share = 1.0f / float(attending_.size());
    for (int64_t row = 0; row < rows(); ++row) {
      const int64_t length = source_length(row / beams());
      float* mean = mean_ + row * longest_;
      std::memcpy(mean, attending_[0]->weights(row), floats(length));
      for (size_t i = 1; i < attending_.size(); ++i)
        kernels_.add(mean, attending_[i]->weights(row), length, mean);
      for (int64_t s = 0; s < length; ++s) mean[s] *= share;
    }
  }

  const DecoderKernels& kernels_;
  Interruption& interruption_;
  std::vector<std::unique_ptr<Runner>> runners_;
  std::vector<Runner*> attending_;
  bool has_weights_ = false;
  int64_t longest_ = 0;
  float* mean_ = nullptr;  // (rows, longest): of the weights of several models
};

}  // namespace

std::vector<std::vector<Found>> search_blocks(const SearchCall& call, const SourceRows& sources,
                                              const DecoderKernels& kernels) {
  std::vector<std::vector<Found>> results(size_t(sources.count));
  const auto decode = [&](const std::vector<int64_t>& block, Worker& worker) {
    BlockStepper stepper(call, sources, block, kernels, worker);
    std::vector<SentenceLimits> limits;
    for (int64_t b : block) {
      SentenceLimits each;
      each.number = b;
      each.limit = call.limits[b];
      if (call.prefix) each.prefix = call.prefix + b * call.prefix_length;
      each.prefix_length = call.prefix_length;
      limits.push_back(each);
    }
    std::vector<std::vector<Found>> found = search(stepper, kernels, call.options, limits);
    for (size_t i = 0; i < block.size(); ++i) results[block[i]] = std::move(found[i]);
  };
  for_each_block({call.models, call.beams, call.threads, call.check}, sources.lengths, kernels,
                 decode);
  return results;
}

void encode_blocks(const Model& model, const SourceRows& sources, int64_t longest, int threads,
                   const DecoderKernels& kernels, float* memory, float* hidden, float* cell) {
  const int64_t layers = int64_t(model.layers.size()), width = model.encoder.memory_width();
  const auto encode = [&](const std::vector<int64_t>& block, Worker& worker) {
    std::vector<const int64_t*> ids;
    std::vector<int64_t> lengths;
    for (int64_t b : block) {
      ids.push_back(sources.ids[b]);
      lengths.push_back(sources.lengths[b]);
    }
    const Encoded encoded = run_encoder(model, kernels, worker.arena, worker.team, ids.data(),
                                        lengths.data(), int64_t(block.size()));
    const auto copy = [&](const std::vector<const float*>& from, float* to, int64_t layer,
                          size_t i) {
      float* row = to + (layer * sources.count + block[i]) * model.hidden;
      if (from.empty())
        std::memset(row, 0, floats(model.hidden));
      else
        std::memcpy(row, from[layer] + int64_t(i) * model.hidden, floats(model.hidden));
    };
    for (size_t i = 0; i < block.size(); ++i) {
      float* rows = memory + block[i] * longest * width;
      std::memcpy(rows, encoded.memory.memory + encoded.memory.first[i] * width,
                  floats(lengths[i] * width));
      std::memset(rows + lengths[i] * width, 0, floats((longest - lengths[i]) * width));
      for (int64_t layer = 0; layer < layers; ++layer) {
        copy(encoded.hidden, hidden, layer, i);
        if (cell) copy(encoded.cell, cell, layer, i);
      }
    }
  };
  for_each_block({{&model}, 1, threads, nullptr}, sources.lengths, kernels, encode);
}

namespace {

// Steps over given inputs on a block, and the state after them.
class StepsRun {
 public:
  StepsRun(const StepsCall& call, const SourceRows& sources, const std::vector<int64_t>& block,
           Runner& runner, Worker& worker)
      : call_(call),
        sources_(sources),
        block_(block),
        runner_(runner),
        interruption_(worker.interruption),
        model_(*call.model) {
    symbols_.resize(block.size());
    if (call.embedded) width_ = model_.layers[0].input.inputs;
    embedded_ = worker.arena.take<float>(int64_t(block.size()) * width_);
  }

  void run() {
    for (int64_t t = 0; t < call_.steps; ++t) {
      interruption_.poll();
      feed(t);
      for (size_t i = 0; i < block_.size(); ++i) write(int64_t(i), t);
    }
    write_state();
  }

 private:
  void feed(int64_t t) {
    for (size_t i = 0; i < block_.size(); ++i) {
      const int64_t at = block_[i] * call_.steps + t;
      if (call_.symbols)
        symbols_[i] = int32_t(call_.symbols[at]);
      else
        std::memcpy(embedded_ + int64_t(i) * width_, call_.embedded + at * width_, floats(width_));
    }
    runner_.step(call_.symbols ? symbols_.data() : nullptr, embedded_, width_);
  }

  void write(int64_t i, int64_t t) {
    const int64_t at = block_[i] * call_.steps + t, length = sources_.lengths[block_[i]];
    const int64_t width = model_.attentional_width(), symbols = model_.output.outputs;
    std::memcpy(call_.states + at * width, runner_.attentional(i), floats(width));
    if (call_.logits) std::memcpy(call_.logits + at * symbols, runner_.logits(i), floats(symbols));
    if (call_.weights) {
      float* weights = call_.weights + at * sources_.longest;
      std::memcpy(weights, runner_.weights(i), floats(length));
      std::memset(weights + length, 0, floats(sources_.longest - length));
    }
  }

  void write_state() {
    const DecoderRows& state = runner_.state();
    const int64_t hidden = model_.hidden, width = model_.attentional_width();
    const int64_t layers = int64_t(model_.layers.size());
    for (size_t i = 0; i < block_.size(); ++i) {
      const int64_t b = block_[i], row = int64_t(i), length = sources_.lengths[b];
      for (int64_t layer = 0; layer < layers; ++layer) {
        const int64_t to = (layer * sources_.count + b) * hidden;
        std::memcpy(call_.hidden + to, state.hidden[layer] + row * hidden, floats(hidden));
        if (call_.cell)
          std::memcpy(call_.cell + to, state.cell[layer] + row * hidden, floats(hidden));
      }
      if (call_.attentional)
        std::memcpy(call_.attentional + b * width, state.attentional + row * width, floats(width));
      if (!call_.coverage) continue;
      float* coverage = call_.coverage + b * sources_.longest;
      std::memcpy(coverage, state.coverage + row * runner_.memory().longest, floats(length));
      std::memset(coverage + length, 0, floats(sources_.longest - length));
    }
  }

  const StepsCall& call_;
  const SourceRows& sources_;
  const std::vector<int64_t>& block_;
  Runner& runner_;
  Interruption& interruption_;
  const Model& model_;
  std::vector<int32_t> symbols_;
  int64_t width_ = 0;
  float* embedded_ = nullptr;
};

}  // namespace

void run_blocks(const StepsCall& call, const SourceRows& sources, const DecoderKernels& kernels) {
  const auto run = [&](const std::vector<int64_t>& block, Worker& worker) {
    Runner runner(*call.model, kernels, worker.arena, worker.team, 1);
    begin(runner, worker.arena, sources, block);
    StepsRun(call, sources, block, runner, worker).run();
  };
  for_each_block({{call.model}, 1, call.threads, call.check}, sources.lengths, kernels, run);
}

std::vector<GreedyRow> greedy_blocks(const GreedyCall& call, const SourceRows& sources,
                                     const DecoderKernels& kernels) {
  // Grows with the symbols that are found: `steps` may be meant as no limit at all.
  std::vector<GreedyRow> results(size_t(sources.count));
  const auto decode = [&](const std::vector<int64_t>& block, Worker& worker) {
    Runner runner(*call.model, kernels, worker.arena, worker.team, 1);
    std::vector<int64_t> open = block;  // the rows that have not ended
    begin(runner, worker.arena, sources, open);
    std::vector<int32_t> symbols(open.size(), call.bos), kept;
    const int64_t size = call.model->output.outputs;
    for (int64_t t = 0; t < call.steps && !open.empty(); ++t) {
      worker.interruption.poll();
      runner.step(symbols.data());
      kept.clear();
      for (size_t i = 0; i < open.size(); ++i) {
        const float* logits = runner.logits(int64_t(i));
        const int64_t best = kernels.argmax(logits, size);
        GreedyRow& row = results[open[i]];
        row.symbols.push_back(best);
        row.log_probs.push_back(logits[best] - kernels.log_sum_exp(logits, size));
        if (call.return_weights) {
          const float* weights = runner.weights(int64_t(i));
          row.weights.insert(row.weights.end(), weights, weights + sources.lengths[open[i]]);
        }
        symbols[i] = int32_t(best);
        if (best != call.eos) kept.push_back(int32_t(i));
      }
      if (kept.size() == open.size()) continue;
      for (size_t i = 0; i < kept.size(); ++i) {
        open[i] = open[kept[i]];
        symbols[i] = symbols[kept[i]];
      }
      open.resize(kept.size());
      runner.keep(kept.data(), int64_t(kept.size()));
    }
  };
  for_each_block({{call.model}, 1, call.threads, call.check}, sources.lengths, kernels, decode);
  return results;
}

}  // namespace fused_attn
