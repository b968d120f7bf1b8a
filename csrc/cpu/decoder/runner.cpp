#include "runner.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "encoder.h"

namespace fused_attn {

Runner::Runner(const Model& model, const DecoderKernels& kernels, Arena& arena, Team& team,
               int64_t beams)
    : model_(model), kernels_(kernels), arena_(arena), team_(team), beams_(beams) {}

void Runner::encode(const int64_t* const* ids, const int64_t* lengths, int64_t count) {
  Encoded encoded = run_encoder(model_, kernels_, arena_, team_, ids, lengths, count);
  begin(encoded.memory, encoded.hidden, encoded.cell);
}

void Runner::begin(const BlockMemory& memory, const std::vector<const float*>& hidden,
                   const std::vector<const float*>& cell, int64_t position) {
  memory_ = memory;
  position_ = position;
  allocate();
  prepare_memory();
  const int64_t width = model_.hidden;
  const auto repeat = [&](const std::vector<const float*>& from, const std::vector<float*>& to) {
    for (size_t layer = 0; layer < to.size(); ++layer)
      for (int64_t row = 0; row < rows(); ++row) {
        float* target = to[layer] + row * width;
        if (from.empty())
          std::memset(target, 0, size_t(width) * sizeof(float));
        else
          std::memcpy(target, from[layer] + row / beams_ * width, size_t(width) * sizeof(float));
      }
  };
  repeat(hidden, state_.hidden);
  repeat(cell, state_.cell);
}

void Runner::allocate() {
  const int64_t n = rows(), hidden = model_.hidden, gates = model_.gates();
  const AttentionModel& attention = model_.attention;
  const auto floats = [&](int64_t count) { return arena_.take<float>(count); };
  const size_t layers = model_.layers.size();
  state_.hidden.resize(layers);
  state_.cell.resize(model_.cell == Cell::lstm ? layers : 0);
  for (float*& h : state_.hidden) h = floats(n * hidden);
  for (float*& c : state_.cell) c = floats(n * hidden);
  outputs_width_ = model_.attentional_width();
  outputs_ = floats(n * outputs_width_);
  if (model_.input_feeding) {  // what a step wrote is what the next one is fed
    state_.attentional = outputs_;
    std::memset(outputs_, 0, size_t(n * outputs_width_) * sizeof(float));
  }
  if (attention.coverage) {
    state_.coverage = floats(n * memory_.longest);
    std::memset(state_.coverage, 0, size_t(n * memory_.longest) * sizeof(float));
  }
  gates_ = floats(n * gates);
  if (model_.cell == Cell::gru) state_gates_ = floats(n * gates);
  if (model_.embedding.data) embedded_ = floats(n * model_.embedding.width);
  layer_ = floats(n * hidden);
  weights_ = floats(n * memory_.longest);
  if (attention.query)
    query_ = floats(n * attention.query.outputs);
  else if (attention.scale != 1.0f)
    query_ = floats(n * hidden);
  if (attention.local == Local::predictive) place_ = floats(n * hidden);
  if (model_.output_proj) projected_ = floats(n * model_.output_proj.outputs);
  if (model_.output) logits_ = floats(n * model_.output.outputs);
  const int64_t state = std::max({hidden, outputs_width_, memory_.longest});
  gathered_ = floats(n * state);
  begin_.resize(n);
  end_.resize(n);
  center_.resize(n);
  if (model_.compute == Compute::f32) return;
  int64_t widest = std::max({hidden, outputs_width_, model_.embedding.width});
  for (const RecurrentLayer& layer : model_.layers) widest = std::max(widest, layer.input.inputs);
  if (model_.output_proj) widest = std::max(widest, model_.output_proj.outputs);
  const int64_t bytes = padded_inputs(model_.compute, widest) * compute_bytes(model_.compute);
  narrow_ = arena_.take<char>(n * bytes);
  narrow_scales_ = floats(n);
}

ConvertedRows Runner::converted(const PackedMatrix& matrix, const float* x, int64_t stride,
                                int64_t rows) {
  return convert_rows(kernels_, matrix, x, stride, rows, narrow_, narrow_scales_);
}

// The parts of the attention that no step changes.
void Runner::prepare_memory() {
  const AttentionModel& attention = model_.attention;
  if (attention.score == ScoreKind::none) return;
  Converter convert(model_.compute, kernels_, arena_, team_);
  const int64_t width = attention.memory_width, count = memory_.rows;
  const auto product = [&](const PackedMatrix& matrix) {
    float* out = arena_.take<float>(count * matrix.outputs);
    convert.product(matrix, memory_.memory, width, count, nullptr, 0, out, matrix.outputs);
    return out;
  };
  keys_ = attention.keys ? product(attention.keys) : memory_.memory;
  values_ = attention.values ? product(attention.values) : memory_.memory;
  if (!attention.key_bias) return;
  float* bias = arena_.take<float>(count);
  kernels_.dot_scores(attention.key_bias, width, 1, memory_.memory, width, count, width, nullptr,
                      bias, count);
  key_bias_ = bias;
}

void Runner::step(const int32_t* symbols, const float* embedded, int64_t stride) {
  run_layers(symbols, embedded, stride);
  attend();
  project();
  ++position_;
}

const float* Runner::embed(const int32_t* symbols) {
  const int64_t width = model_.embedding.width;
  for (int64_t row = 0; row < rows(); ++row)
    std::memcpy(embedded_ + row * width, model_.embedding.data + symbols[row] * width,
                size_t(width) * sizeof(float));
  return embedded_;
}

void Runner::run_layers(const int32_t* symbols, const float* embedded, int64_t stride) {
  const int64_t n = rows(), hidden = model_.hidden;
  const float* x = embedded;
  int64_t width = model_.embedding.width;
  if (!symbols) width = model_.layers[0].input.inputs;
  // The input of the first layer ends with what is fed.
  const int64_t own = width, fed = model_.input_feeding ? outputs_width_ : 0;
  const bool residual = model_.residual && own + fed == hidden;
  if (symbols) {
    x = residual || !model_.layers[0].table ? embed(symbols) : nullptr;
    stride = width;
  }
  for (size_t i = 0; i < model_.layers.size(); ++i) {
    float* h = state_.hidden[i];
    run_layer(model_.layers[i], i == 0 ? symbols : nullptr, x, stride, h,
              model_.cell == Cell::lstm ? state_.cell[i] : nullptr);
    const bool adds = i == 0 ? residual : model_.residual;
    if (adds) {
      const int64_t count = i == 0 ? own : hidden;
      for (int64_t row = 0; row < n; ++row) {
        float* sum = layer_ + row * hidden;
        kernels_.add(h + row * hidden, x + row * stride, count, sum);
        if (count < hidden)
          kernels_.add(h + row * hidden + count, state_.attentional + row * fed, fed, sum + count);
      }
      x = layer_;
    } else {
      x = h;
    }
    stride = hidden;
  }
  top_ = x;
}

void Runner::run_layer(const RecurrentLayer& layer, const int32_t* symbols, const float* x,
                       int64_t stride, float* h, float* c) {
  const int64_t n = rows(), hidden = model_.hidden, gates = model_.gates();
  if (symbols && layer.table) {
    for (int64_t row = 0; row < n; ++row)
      std::memcpy(gates_ + row * gates, layer.table + symbols[row] * gates,
                  size_t(gates) * sizeof(float));
  } else {
    team_.product(layer.input, converted(layer.input, x, stride, n), n, layer.bias, 0, gates_,
                  gates);
  }
  if (layer.feed) {
    team_.product(layer.feed, converted(layer.feed, state_.attentional, outputs_width_, n), n,
                  gates_, gates, gates_, gates);
  }
  const ConvertedRows before = converted(layer.state, h, hidden, n);
  if (model_.cell == Cell::gru) {
    team_.product(layer.state, before, n, layer.state_bias, 0, state_gates_, gates);
    kernels_.gru(gates_, state_gates_, gates, n, hidden, h, hidden);
    return;
  }
  team_.product(layer.state, before, n, gates_, gates, gates_, gates);
  if (model_.cell == Cell::lstm) {
    kernels_.lstm(gates_, gates, n, hidden, c, hidden, h, hidden);
  } else {
    kernels_.tanh(gates_, n * hidden, h);
  }
}

// The windows of local attention: reference.window_bounds, in float32.
void Runner::find_windows(const ConvertedRows& y) {
  const AttentionModel& attention = model_.attention;
  const int64_t n = rows(), hidden = model_.hidden;
  if (attention.local == Local::predictive) {
    team_.product(attention.position, y, n, nullptr, 0, place_, hidden);
    kernels_.tanh(place_, n * hidden, place_);
  }
  for (int64_t row = 0; row < n; ++row) {
    const int64_t length = memory_.lengths[row / beams_];
    begin_[row] = 0;
    end_[row] = length;
    if (attention.local == Local::no) continue;
    float center = float(position_);
    if (attention.local == Local::predictive) {
      float sum = 0.0f;
      kernels_.dot_scores(attention.position_v, hidden, 1, place_ + row * hidden, hidden, 1, hidden,
                          nullptr, &sum, 1);
      center = float(length) / (1.0f + std::exp(-sum));
    }
    center_[row] = center;
    const float low = std::ceil(center - attention.window);
    const float high = std::floor(center + attention.window) + 1.0f;
    // Written so that NaN gives the whole row.
    begin_[row] = low > 0.0f ? low < float(length) ? int64_t(low) : length : 0;
    end_[row] =
        high < float(length) ? high > float(begin_[row]) ? int64_t(high) : begin_[row] : length;
  }
}

// Scores of the rows of a sentence within their windows, to weights_. query: of its first row, or
// for the location score the scores themselves.
void Runner::score(int64_t sentence, const float* query) {
  const AttentionModel& attention = model_.attention;
  const int64_t first = memory_.first[sentence], row = sentence * beams_;
  const int64_t stride = memory_.longest, width = attention.key_width();
  float* scores = weights_ + row * stride;
  if (attention.score == ScoreKind::dot && attention.local == Local::no) {
    kernels_.dot_scores(query, width, beams_, keys_ + first * width, width,
                        memory_.lengths[sentence], width, key_bias_ ? key_bias_ + first : nullptr,
                        scores, stride);
    return;
  }
  for (int64_t beam = 0; beam < beams_; ++beam, scores += stride) {
    const int64_t from = begin_[row + beam], count = end_[row + beam] - from;
    if (count <= 0) continue;
    const float* keys = keys_ + (first + from) * width;
    if (attention.score == ScoreKind::dot) {
      kernels_.dot_scores(query + beam * width, width, 1, keys, width, count, width,
                          key_bias_ ? key_bias_ + first + from : nullptr, scores + from, stride);
    } else if (attention.score == ScoreKind::concat) {
      kernels_.concat_scores(
          query + beam * width, keys, width, count, width, attention.v,
          attention.coverage ? state_.coverage + (row + beam) * stride + from : nullptr,
          attention.coverage, scores + from);
    } else {
      const float* given = query + beam * attention.query.outputs + from;
      for (int64_t s = 0; s < count; ++s) scores[from + s] = attention.scale * given[s];
    }
  }
}

// From scores to weights, with zeros outside of the window.
void Runner::normalise(int64_t sentence, int64_t row) {
  const AttentionModel& attention = model_.attention;
  const int64_t from = begin_[row], to = std::max(end_[row], from);
  float* weights = weights_ + row * memory_.longest;
  std::fill(weights, weights + from, 0.0f);
  kernels_.softmax(weights + from, to - from);
  std::fill(weights + to, weights + memory_.lengths[sentence], 0.0f);
  if (attention.local == Local::predictive)
    kernels_.bell(weights + from, to - from, float(from), center_[row], 2.0f / attention.window);
}

void Runner::attend() {
  const AttentionModel& attention = model_.attention;
  const int64_t n = rows(), hidden = model_.hidden, width = outputs_width_;
  if (attention.score == ScoreKind::none) {
    std::memcpy(outputs_, top_, size_t(n * hidden) * sizeof(float));
  } else {
    ConvertedRows y{top_, hidden, nullptr};
    if (attention.query || attention.combine || attention.position)
      y = converted(model_.layers[0].state, top_, hidden, n);  // its matrix is as wide
    find_windows(y);
    const float* query = top_;
    int64_t query_width = hidden;
    if (attention.query) {
      query_width = attention.query.outputs;
      team_.product(attention.query, y, n, attention.query_bias, 0, query_, query_width);
      query = query_;
    } else if (attention.scale != 1.0f) {
      for (int64_t i = 0; i < n * hidden; ++i) query_[i] = attention.scale * top_[i];
      query = query_;
    }
    if (attention.combine)
      team_.product(attention.combine, y, n, attention.combine_bias, 0, outputs_, width);
    for (int64_t sentence = 0; sentence < memory_.count; ++sentence) {
      const int64_t row = sentence * beams_;
      score(sentence, query + row * query_width);
      for (int64_t beam = 0; beam < beams_; ++beam) normalise(sentence, row + beam);
      kernels_.weighted_sum(weights_ + row * memory_.longest, memory_.longest, beams_,
                            memory_.lengths[sentence], values_ + memory_.first[sentence] * width,
                            width, width, attention.combine ? outputs_ + row * width : nullptr,
                            outputs_ + row * width, width);
    }
    if (attention.combine) kernels_.tanh(outputs_, n * width, outputs_);
    if (state_.coverage)
      for (int64_t row = 0; row < n; ++row) {
        float* sum = state_.coverage + row * memory_.longest;
        kernels_.add(sum, weights(row), memory_.lengths[row / beams_], sum);
      }
  }
}

void Runner::project() {
  if (!model_.output) return;
  const int64_t n = rows();
  const float* x = outputs_;
  int64_t width = outputs_width_;
  if (model_.output_proj) {
    const PackedMatrix& matrix = model_.output_proj;
    team_.product(matrix, converted(matrix, x, width, n), n, nullptr, 0, projected_,
                  matrix.outputs);
    x = projected_;
    width = matrix.outputs;
  }
  team_.product(model_.output, converted(model_.output, x, width, n), n, model_.output_bias, 0,
                logits_, model_.output.outputs);
}

// x[i] = x[from[i]] for `count` rows, where rows may repeat.
void Runner::gather(float* x, int64_t width, const int32_t* from, int64_t count) {
  const size_t bytes = size_t(width) * sizeof(float);
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(gathered_ + i * width, x + from[i] * width, bytes);
  std::memcpy(x, gathered_, size_t(count) * bytes);
}

void Runner::reorder(const int32_t* from) {
  const int64_t n = rows();
  bool same = true;
  for (int64_t row = 0; row < n; ++row) same = same && from[row] == row;
  if (same) return;
  move_rows(from, n);
}

void Runner::move_rows(const int32_t* from, int64_t count) {
  for (float* h : state_.hidden) gather(h, model_.hidden, from, count);
  for (float* c : state_.cell) gather(c, model_.hidden, from, count);
  if (state_.attentional) gather(state_.attentional, outputs_width_, from, count);
  if (state_.coverage) gather(state_.coverage, memory_.longest, from, count);
}

void Runner::keep(const int32_t* sentences, int64_t count) {
  std::vector<int32_t> from(size_t(count * beams_));
  for (int64_t i = 0; i < count * beams_; ++i)
    from[i] = int32_t(sentences[i / beams_] * beams_ + i % beams_);
  move_rows(from.data(), count * beams_);
  for (int64_t i = 0; i < count; ++i) {
    memory_.lengths[i] = memory_.lengths[sentences[i]];
    memory_.first[i] = memory_.first[sentences[i]];
  }
  memory_.lengths.resize(count);
  memory_.first.resize(count);
  memory_.count = count;
}

}  // namespace fused_attn
