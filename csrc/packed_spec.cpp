#include "packed_spec.h"

#include <algorithm>

#include "cpu/isa.h"

namespace fused_attn {
namespace {

// With more symbols than this for each element of an embedding the first layer multiplies instead
// of reading a table, which would be more than four times as large as the matrix it replaces.
constexpr int64_t kTableSymbols = 4;

const float* data_of(const Argument& tensor) { return static_cast<const float*>(tensor.data()); }

}  // namespace

PackedModel::PackedModel(const py::dict& spec) {
  model_.owner = memory_;
  model_.compute = choice<Compute>(spec, "compute", {"float32", "bfloat16", "int8"});
  model_.cell = choice<Cell>(spec, "cell", {"lstm", "gru", "rnn"});
  model_.residual = py::bool_(entry_of(spec, "residual"));
  model_.input_feeding = py::bool_(entry_of(spec, "input_feeding"));
  model_.embedding = embedding_of(entry_of(spec, "embedding"), "embedding");
  const py::list layers = entry_of(spec, "layers");
  if (layers.empty()) throw py::value_error("layers must not be empty");
  const py::tuple first = layers[0];
  model_.hidden = matrix_of(first[1], "layers[0].weight_hh", -1, -1).size(1);
  const py::object attention = entry_of(spec, "attention");
  if (!attention.is_none()) take_attention(attention);
  const int64_t fed = model_.input_feeding ? model_.attentional_width() : 0;
  const Argument input = matrix_of(first[0], "layers[0].weight_ih", -1, -1);
  const int64_t width = model_.embedding.data ? model_.embedding.width : input.size(1) - fed;
  if (width < 0) throw py::value_error("layers[0].weight_ih has no columns for what is fed");
  for (size_t i = 0; i < layers.size(); ++i)
    model_.layers.push_back(layer_of(layers[i], i == 0 ? model_.embedding : Embedding{},
                                     i == 0 ? width : model_.hidden, i == 0 ? fed : 0,
                                     model_.hidden, "layers[" + std::to_string(i) + "]"));
  int64_t last = model_.attentional_width();
  if (const py::object proj = entry_of(spec, "output_proj"); !proj.is_none()) {
    const Argument matrix = matrix_of(proj, "output_proj", -1, last);
    model_.output_proj = packed(matrix, 0, last);
    last = matrix.size(0);
  }
  if (const py::object weight = entry_of(spec, "output_weight"); !weight.is_none()) {
    const Argument matrix = matrix_of(weight, "output_weight", -1, last);
    model_.output = packed(matrix, 0, last);
    model_.output_bias = vector_of(entry_of(spec, "output_bias"), "output_bias", matrix.size(0));
  }
  if (const py::object encoder = entry_of(spec, "encoder"); !encoder.is_none())
    take_encoder(encoder);
}

float* PackedModel::own(int64_t count) {
  memory_->vectors.emplace_back(new float[size_t(std::max<int64_t>(count, 1))]);
  bytes_ += count * int64_t(sizeof(float));
  return memory_->vectors.back().get();
}

Argument PackedModel::matrix_of(const py::handle& tensor, const std::string& name, int64_t rows,
                                int64_t columns) {
  names_.push_back(name);
  Argument matrix(names_.back().c_str(), tensor.ptr());
  matrix.check_dtype(DType::f32);
  const bool fits = matrix.ndim() == 2 && (rows < 0 || matrix.size(0) == rows) &&
                    (columns < 0 || matrix.size(1) == columns);
  if (!fits) {
    const auto shown = [](int64_t size) { return size < 0 ? "any" : std::to_string(size); };
    throw py::value_error(name + " must have shape (" + shown(rows) + ", " + shown(columns) +
                          "), got " + matrix.shape());
  }
  return matrix;
}

const float* PackedModel::vector_of(const py::handle& tensor, const std::string& name,
                                    int64_t size) {
  if (tensor.is_none()) return nullptr;
  names_.push_back(name);
  Argument vector(names_.back().c_str(), tensor.ptr());
  vector.check_dtype(DType::f32).check_shape({size});
  float* copy = own(size);
  for (int64_t i = 0; i < size; ++i) copy[i] = data_of(vector)[i * vector.stride(0)];
  return copy;
}

const float* PackedModel::needed_vector(const py::dict& spec, const char* name, int64_t size) {
  const float* vector = vector_of(entry_of(spec, name), name, size);
  if (!vector) throw py::value_error(std::string(name) + " must not be None");
  return vector;
}

PackedMatrix PackedModel::packed(const Argument& matrix, int64_t first, int64_t count) {
  return kept(PackedWeights(model_.compute, data_of(matrix) + first * matrix.stride(1),
                            matrix.size(0), count, matrix.stride(0), matrix.stride(1),
                            &memory_->matrices));
}

PackedMatrix PackedModel::packed_transpose(const Argument& matrix, float factor) {
  const int64_t rows = matrix.size(1), columns = matrix.size(0);
  std::vector<float> scaled(size_t(rows * columns));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      scaled[i * columns + j] =
          factor * data_of(matrix)[j * matrix.stride(0) + i * matrix.stride(1)];
  return kept(
      PackedWeights(model_.compute, scaled.data(), rows, columns, columns, 1, &memory_->matrices));
}

PackedMatrix PackedModel::kept(const PackedWeights& weights) {
  bytes_ += weights.matrix().bytes();
  model_.largest_bytes = std::max(model_.largest_bytes, weights.matrix().bytes());
  return weights.matrix();
}

Embedding PackedModel::embedding_of(const py::object& tensor, const std::string& name) {
  if (tensor.is_none()) return {};
  const Argument matrix = matrix_of(tensor, name, -1, -1);
  const int64_t symbols = matrix.size(0), width = matrix.size(1);
  float* copy = own(symbols * width);
  for (int64_t i = 0; i < symbols; ++i)
    for (int64_t j = 0; j < width; ++j)
      copy[i * width + j] = data_of(matrix)[i * matrix.stride(0) + j * matrix.stride(1)];
  return {copy, symbols, width};
}

// weight_ih, weight_hh, bias_ih, bias_hh as in torch. With few symbols the first layer's product
// with an embedding is computed for each symbol now.
RecurrentLayer PackedModel::layer_of(const py::tuple& tensors, const Embedding& embedding,
                                     int64_t width, int64_t fed, int64_t hidden,
                                     const std::string& name) {
  if (tensors.size() != 4) throw py::value_error(name + " must have two weights and two biases");
  const int64_t gates = Model::gate_count(model_.cell) * hidden;
  const Argument input = matrix_of(tensors[0], name + ".weight_ih", gates, width + fed);
  const Argument state = matrix_of(tensors[1], name + ".weight_hh", gates, hidden);
  RecurrentLayer layer;
  layer.state = packed(state, 0, hidden);
  if (fed) layer.feed = packed(input, width, fed);
  layer.bias = vector_of(tensors[2], name + ".bias_ih", gates);
  layer.state_bias = vector_of(tensors[3], name + ".bias_hh", gates);
  if (model_.cell != Cell::gru && layer.state_bias) {
    if (layer.bias) {
      float* sum = own(gates);
      for (int64_t i = 0; i < gates; ++i) sum[i] = layer.bias[i] + layer.state_bias[i];
      layer.bias = sum;
    } else {
      layer.bias = layer.state_bias;
    }
    layer.state_bias = nullptr;
  }
  if (!embedding.data || embedding.symbols > kTableSymbols * width) {
    layer.input = packed(input, 0, width);
    return layer;
  }
  const PackedWeights whole(Compute::f32, data_of(input), gates, width, input.stride(0),
                            input.stride(1));
  float* table = own(embedding.symbols * gates);
  decoder_kernels().product(whole.matrix(), {embedding.data, embedding.width, nullptr},
                            embedding.symbols, layer.bias, 0, table, gates);
  layer.table = table;
  return layer;
}

void PackedModel::take_attention(const py::dict& spec) {
  AttentionModel& attention = model_.attention;
  const std::string score = py::str(entry_of(spec, "score"));
  attention.memory_width = py::int_(entry_of(spec, "memory_width"));
  attention.local = choice<Local>(spec, "local", {"None", "monotonic", "predictive"});
  attention.window = py::float_(entry_of(spec, "window"));
  attention.scale = py::float_(entry_of(spec, "scale"));
  take_score(spec, score);
  const int64_t hidden = model_.hidden, width = attention.memory_width;
  if (attention.local == Local::predictive) {
    attention.position = packed(
        matrix_of(entry_of(spec, "position_weight"), "position_weight", hidden, hidden), 0, hidden);
    attention.position_v = needed_vector(spec, "position_v", hidden);
  }
  const py::object combine = entry_of(spec, "combine_weight");
  if (combine.is_none()) return;
  const Argument matrix = matrix_of(combine, "combine_weight", -1, width + hidden);
  attention.values = packed(matrix, 0, width);
  attention.combine = packed(matrix, width, hidden);
  attention.combine_bias =
      vector_of(entry_of(spec, "combine_bias"), "combine_bias", matrix.size(0));
}

void PackedModel::take_score(const py::dict& spec, const std::string& score) {
  AttentionModel& attention = model_.attention;
  const int64_t hidden = model_.hidden, width = attention.memory_width;
  const auto query = [&](int64_t rows) {
    return matrix_of(entry_of(spec, "query_weight"), "query_weight", rows, hidden);
  };
  if (score == "dot") {
    attention.score = ScoreKind::dot;
    if (width != hidden)
      throw py::value_error("the dot score needs a memory as wide as the state, " +
                            std::to_string(hidden) + ", got " + std::to_string(width));
  } else if (score == "general") {
    attention.score = ScoreKind::dot;
    attention.keys = packed_transpose(query(width), attention.scale);
    if (const float* bias = vector_of(entry_of(spec, "query_bias"), "query_bias", width)) {
      float* scaled = own(width);
      for (int64_t i = 0; i < width; ++i) scaled[i] = attention.scale * bias[i];
      attention.key_bias = scaled;
    }
    attention.scale = 1.0f;
  } else if (score == "concat") {
    attention.score = ScoreKind::concat;
    const Argument matrix = query(-1);
    const int64_t inside = matrix.size(0);
    attention.query = packed(matrix, 0, hidden);
    attention.keys = packed(
        matrix_of(entry_of(spec, "memory_weight"), "memory_weight", inside, width), 0, width);
    attention.query_bias = vector_of(entry_of(spec, "query_bias"), "query_bias", inside);
    attention.v = needed_vector(spec, "v", inside);
    attention.coverage = vector_of(entry_of(spec, "coverage_weight"), "coverage_weight", inside);
    attention.scale = 1.0f;  // it is in v
  } else if (score == "location") {
    attention.score = ScoreKind::location;
    const Argument matrix = query(-1);
    attention.query = packed(matrix, 0, hidden);
    attention.query_bias = vector_of(entry_of(spec, "query_bias"), "query_bias", matrix.size(0));
  } else {
    throw py::value_error("score must be dot, general, concat or location, got '" + score + "'");
  }
}

void PackedModel::take_encoder(const py::dict& spec) {
  EncoderModel& encoder = model_.encoder;
  model_.has_encoder = true;
  encoder.embedding = embedding_of(entry_of(spec, "embedding"), "encoder.embedding");
  encoder.reverse = py::bool_(entry_of(spec, "reverse"));
  const py::list layers = entry_of(spec, "layers");
  if (layers.empty()) throw py::value_error("encoder.layers must not be empty");
  const py::list first = layers[0];
  const auto check_directions = [](bool holds) {
    if (!holds)
      throw py::value_error("encoder.layers must have one or two directions each, all the same");
  };
  check_directions(first.size() == 1 || first.size() == 2);
  encoder.directions = int64_t(first.size());
  const py::tuple tensors = first[0];
  encoder.hidden = matrix_of(tensors[1], "encoder.layers[0].weight_hh", -1, -1).size(1);
  for (size_t i = 0; i < layers.size(); ++i) {
    const py::list directions = layers[i];
    check_directions(directions.size() == first.size());
    for (size_t d = 0; d < directions.size(); ++d)
      encoder.layers.push_back(
          layer_of(directions[d], i == 0 ? encoder.embedding : Embedding{},
                   i == 0 ? encoder.embedding.width : encoder.width(), 0, encoder.hidden,
                   "encoder.layers[" + std::to_string(i) + "][" + std::to_string(d) + "]"));
  }
  if (const py::object proj = entry_of(spec, "memory_proj"); !proj.is_none())
    encoder.memory_proj =
        packed(matrix_of(proj, "memory_proj", -1, encoder.width()), 0, encoder.width());
  const AttentionModel& attention = model_.attention;
  if (attention.score != ScoreKind::none && encoder.memory_width() != attention.memory_width)
    throw py::value_error("the attention takes a memory of width " +
                          std::to_string(attention.memory_width) + ", the encoder's has " +
                          std::to_string(encoder.memory_width()));
  take_bridge(spec);
}

void PackedModel::take_bridge(const py::dict& spec) {
  EncoderModel& encoder = model_.encoder;
  encoder.bridge = choice<BridgeKind>(spec, "bridge", {"zero", "last", "mean", "dense"});
  if (encoder.bridge == BridgeKind::last && encoder.width() != model_.hidden)
    throw py::value_error("bridge last needs an encoder as wide as the decoder, " +
                          std::to_string(model_.hidden) + ", got " +
                          std::to_string(encoder.width()));
  if (encoder.bridge == BridgeKind::zero || encoder.bridge == BridgeKind::last) return;
  const py::list maps = entry_of(spec, "maps");
  const size_t parts = model_.cell == Cell::lstm ? 2 : 1;
  if (maps.size() != parts)
    throw py::value_error("bridge.maps must have " + std::to_string(parts) + " maps, got " +
                          std::to_string(maps.size()));
  for (size_t i = 0; i < parts; ++i) {
    const py::tuple map = maps[i];
    const std::string name = "bridge.maps[" + std::to_string(i) + "]";
    encoder.maps[i] =
        packed(matrix_of(map[0], name, model_.hidden, encoder.width()), 0, encoder.width());
    encoder.map_biases[i] = vector_of(map[1], name + ".bias", model_.hidden);
  }
}

}  // namespace fused_attn
