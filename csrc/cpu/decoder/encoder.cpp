#include "encoder.h"

#include <algorithm>
#include <cstring>

namespace fused_attn {

void Converter::reserve(int64_t inputs, int64_t rows) {
  const int64_t bytes = padded_inputs(compute_, inputs) * compute_bytes(compute_) * rows;
  if (bytes > bytes_) data_ = arena_.take<char>(bytes_ = bytes);
  if (!scales_) scales_ = arena_.take<float>(kRows);
}

void Converter::product(const PackedMatrix& matrix, const float* x, int64_t stride, int64_t rows,
                        const float* start, int64_t start_stride, float* out, int64_t out_stride) {
  if (compute_ != Compute::f32) reserve(matrix.inputs, std::min(rows, kRows));
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t count = std::min(kRows, rows - row);
    const ConvertedRows part =
        convert_rows(kernels_, matrix, x + row * stride, stride, count, data_, scales_);
    team_.product(matrix, part, count, start ? start + row * start_stride : nullptr, start_stride,
                  out + row * out_stride, out_stride);
  }
}

namespace {

constexpr int64_t kChunkRows = 256;  // rows of gates that are computed at once

// The recurrent layers over a block of sentences, longest first: at each step the sentences that
// are not over are the first ones.
class EncoderRun {
 public:
  EncoderRun(const Model& model, const DecoderKernels& kernels, Arena& arena, Team& team,
             const int64_t* const* ids, const int64_t* lengths, int64_t count)
      : model_(model),
        encoder_(model.encoder),
        kernels_(kernels),
        arena_(arena),
        convert_(model.compute, kernels, arena, team),
        ids_(ids) {
    memory_.count = count;
    memory_.lengths.assign(lengths, lengths + count);
    for (int64_t b = 0; b < count; ++b) {
      memory_.first.push_back(memory_.rows);
      memory_.rows += lengths[b];
    }
    memory_.longest = count ? lengths[0] : 0;
  }

  Encoded run() {
    const float* x = nullptr;
    int64_t width = encoder_.embedding.width;
    for (int64_t layer = 0; layer < encoder_.depth(); ++layer) {
      const int64_t out_width = encoder_.width();
      const bool residual = model_.residual && width == out_width;
      if (layer == 0 && (residual || !encoder_.layers[0].table)) x = embed();
      float* y = floats(memory_.rows * out_width);
      finals_.push_back(floats(memory_.count * out_width));
      if (model_.cell == Cell::lstm) cells_.push_back(floats(memory_.count * out_width));
      for (int64_t direction = 0; direction < encoder_.directions; ++direction)
        run_direction(layer, direction, x, width, y);
      if (residual) kernels_.add(y, x, memory_.rows * out_width, y);
      x = y;
      width = out_width;
    }
    Encoded encoded;
    memory_.memory = finish_memory(x);
    build_states(encoded);
    encoded.memory = memory_;
    return encoded;
  }

 private:
  float* floats(int64_t count) { return arena_.take<float>(count); }

  // The symbol at a place of the sequence that the layers read.
  int64_t symbol(int64_t b, int64_t place) const {
    return ids_[b][encoder_.reverse ? memory_.lengths[b] - 1 - place : place];
  }

  const float* embed() {
    const int64_t width = encoder_.embedding.width;
    float* x = floats(memory_.rows * width);
    for (int64_t b = 0; b < memory_.count; ++b)
      for (int64_t s = 0; s < memory_.lengths[b]; ++s)
        std::memcpy(x + (memory_.first[b] + s) * width,
                    encoder_.embedding.data + symbol(b, s) * width, size_t(width) * sizeof(float));
    return x;
  }

  int64_t active(int64_t step) const {
    int64_t count = memory_.count;
    while (count && memory_.lengths[count - 1] <= step) --count;
    return count;
  }

  int64_t place(int64_t b, int64_t step, int64_t direction) const {
    return direction ? memory_.lengths[b] - 1 - step : step;
  }

  // One direction of a layer: x (rows, width) or the embeddings' table, to its columns of y.
  void run_direction(int64_t number, int64_t direction, const float* x, int64_t width, float* y) {
    const RecurrentLayer& layer = encoder_.layers[number * encoder_.directions + direction];
    const int64_t hidden = encoder_.hidden, gates = Model::gate_count(model_.cell) * hidden;
    const int64_t column = direction * hidden, stride = encoder_.width();
    const int64_t count = memory_.count;
    float* h = floats(count * hidden);
    float* c = model_.cell == Cell::lstm ? floats(count * hidden) : nullptr;
    std::memset(h, 0, size_t(count * hidden) * sizeof(float));
    if (c) std::memset(c, 0, size_t(count * hidden) * sizeof(float));
    float* state_gates = model_.cell == Cell::gru ? floats(count * gates) : nullptr;
    const int64_t chunk = std::max<int64_t>(1, kChunkRows / std::max<int64_t>(count, 1));
    float* all = floats(std::min(chunk, std::max<int64_t>(memory_.longest, 1)) * count * gates);
    const bool from_table = number == 0 && layer.table;
    float* inputs = from_table ? nullptr : floats(std::min(chunk, memory_.longest) * count * width);
    for (int64_t step = 0; step < memory_.longest; step += chunk) {
      const int64_t stop = std::min(step + chunk, memory_.longest);
      gather_gates(layer, direction, x, width, step, stop, inputs, all, gates);
      float* own = all;
      for (int64_t t = step; t < stop; ++t) {
        const int64_t n = active(t);
        cell_step(layer, own, state_gates, n, hidden, gates, h, c);
        for (int64_t b = 0; b < n; ++b)
          std::memcpy(y + (memory_.first[b] + place(b, t, direction)) * stride + column,
                      h + b * hidden, size_t(hidden) * sizeof(float));
        own += n * gates;
      }
    }
    for (int64_t b = 0; b < count; ++b) {
      std::memcpy(finals_.back() + b * stride + column, h + b * hidden,
                  size_t(hidden) * sizeof(float));
      if (c)
        std::memcpy(cells_.back() + b * stride + column, c + b * hidden,
                    size_t(hidden) * sizeof(float));
    }
  }

  // The input's part of the gates for the steps [step, stop), one step after the other.
  void gather_gates(const RecurrentLayer& layer, int64_t direction, const float* x, int64_t width,
                    int64_t step, int64_t stop, float* inputs, float* all, int64_t gates) {
    int64_t row = 0;
    for (int64_t t = step; t < stop; ++t) {
      const int64_t n = active(t);
      for (int64_t b = 0; b < n; ++b, ++row) {
        const int64_t at = place(b, t, direction);
        if (inputs)
          std::memcpy(inputs + row * width, x + (memory_.first[b] + at) * width,
                      size_t(width) * sizeof(float));
        else
          std::memcpy(all + row * gates, layer.table + symbol(b, at) * gates,
                      size_t(gates) * sizeof(float));
      }
    }
    if (inputs) convert_.product(layer.input, inputs, width, row, layer.bias, 0, all, gates);
  }

  void cell_step(const RecurrentLayer& layer, float* gates, float* state_gates, int64_t n,
                 int64_t hidden, int64_t width, float* h, float* c) {
    if (model_.cell == Cell::gru) {
      convert_.product(layer.state, h, hidden, n, layer.state_bias, 0, state_gates, width);
      kernels_.gru(gates, state_gates, width, n, hidden, h, hidden);
      return;
    }
    convert_.product(layer.state, h, hidden, n, gates, width, gates, width);
    if (c)
      kernels_.lstm(gates, width, n, hidden, c, hidden, h, hidden);
    else
      kernels_.tanh(gates, n * hidden, h);
  }

  // In source order, and projected where the model does that.
  const float* finish_memory(const float* x) {
    const int64_t width = encoder_.width();
    if (encoder_.reverse) {
      float* turned = floats(memory_.rows * width);
      for (int64_t b = 0; b < memory_.count; ++b)
        for (int64_t s = 0; s < memory_.lengths[b]; ++s)
          std::memcpy(turned + (memory_.first[b] + s) * width,
                      x + (memory_.first[b] + memory_.lengths[b] - 1 - s) * width,
                      size_t(width) * sizeof(float));
      x = turned;
    }
    states_ = x;
    if (!encoder_.memory_proj) return x;
    const int64_t narrow = encoder_.memory_proj.outputs;
    float* projected = floats(memory_.rows * narrow);
    convert_.product(encoder_.memory_proj, x, width, memory_.rows, nullptr, 0, projected, narrow);
    return projected;
  }

  // The bridge: fused_attn.seq2seq.model.encoder.Bridge.
  void build_states(Encoded& encoded) {
    if (encoder_.bridge == BridgeKind::zero) return;
    const int64_t layers = int64_t(model_.layers.size()), depth = int64_t(finals_.size());
    const float* mean = encoder_.bridge == BridgeKind::mean ? mean_memory() : nullptr;
    for (int64_t layer = 0; layer < layers; ++layer) {
      const int64_t from = std::max<int64_t>(depth - layers + layer, 0);
      encoded.hidden.push_back(bridged(0, mean ? mean : finals_[from]));
      if (model_.cell == Cell::lstm) encoded.cell.push_back(bridged(1, mean ? mean : cells_[from]));
    }
  }

  const float* bridged(int part, const float* x) {
    if (encoder_.bridge == BridgeKind::last) return x;
    const PackedMatrix& map = encoder_.maps[part];
    float* out = floats(memory_.count * map.outputs);
    convert_.product(map, x, encoder_.width(), memory_.count, encoder_.map_biases[part], 0, out,
                     map.outputs);
    kernels_.tanh(out, memory_.count * map.outputs, out);
    return out;
  }

  const float* mean_memory() {
    const int64_t width = encoder_.width();
    float* mean = floats(memory_.count * width);
    std::memset(mean, 0, size_t(memory_.count * width) * sizeof(float));
    for (int64_t b = 0; b < memory_.count; ++b) {
      float* row = mean + b * width;
      for (int64_t s = 0; s < memory_.lengths[b]; ++s)
        kernels_.add(row, states_ + (memory_.first[b] + s) * width, width, row);
      const float count = float(std::max<int64_t>(memory_.lengths[b], 1));
      for (int64_t i = 0; i < width; ++i) row[i] /= count;
    }
    return mean;
  }

  const Model& model_;
  const EncoderModel& encoder_;
  const DecoderKernels& kernels_;
  Arena& arena_;
  Converter convert_;
  const int64_t* const* ids_;
  BlockMemory memory_;
  std::vector<float*> finals_, cells_;  // of each layer, (count, width)
  const float* states_ = nullptr;       // (rows, width), in source order
};

}  // namespace

Encoded run_encoder(const Model& model, const DecoderKernels& kernels, Arena& arena, Team& team,
                    const int64_t* const* ids, const int64_t* lengths, int64_t count) {
  return EncoderRun(model, kernels, arena, team, ids, lengths, count).run();
}

}  // namespace fused_attn
