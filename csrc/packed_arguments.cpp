#include "packed_arguments.h"

#include <algorithm>

namespace fused_attn {

namespace {

Argument integer_tensor(const char* name, const py::handle& object, int dims) {
  Argument tensor(name, object.ptr());
  if (tensor.code() != TypeCode::integer || tensor.bits() != 64)
    throw py::type_error(std::string(name) + " must be an int64 Tensor");
  if (tensor.ndim() != dims)
    throw py::value_error(std::string(name) + " must have " + std::to_string(dims) +
                          (dims == 1 ? " dimension" : " dimensions") + ", got shape " +
                          tensor.shape());
  return tensor;
}

const int64_t* numbers_of(const Argument& tensor) {
  return static_cast<const int64_t*>(tensor.data());
}

const float* rows_of(Sources& sources, const char* name, const py::handle& tensor, Sizes sizes) {
  sources.tensors.emplace_back(name, tensor.ptr());
  Argument& argument = sources.tensors.back();
  argument.check_dtype(DType::f32).check_shape(sizes).make_contiguous();
  return static_cast<const float*>(argument.data());
}

}  // namespace

std::vector<int64_t> integer_matrix(const char* name, const py::handle& object, int64_t& rows,
                                    int64_t& columns) {
  const Argument tensor = integer_tensor(name, object, 2);
  rows = tensor.size(0);
  columns = tensor.size(1);
  std::vector<int64_t> values(size_t(rows * columns));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      values[i * columns + j] = numbers_of(tensor)[i * tensor.stride(0) + j * tensor.stride(1)];
  return values;
}

std::vector<int64_t> integer_vector(const char* name, const py::handle& object, int64_t size) {
  Argument tensor = integer_tensor(name, object, 1);
  tensor.check_shape({size});
  std::vector<int64_t> values(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) values[i] = numbers_of(tensor)[i * tensor.stride(0)];
  return values;
}

void check_range(const char* name, const std::vector<int64_t>& values, int64_t low, int64_t high) {
  for (int64_t value : values)
    if (value < low || value > high)
      throw py::value_error(std::string(name) + " must lie in " + std::to_string(low) + ".." +
                            std::to_string(high) + ", got " + std::to_string(value));
}

Sources symbols_of(const Models& models, const py::handle& source, const py::handle& lengths) {
  Sources sources;
  int64_t count = 0, longest = 0;
  sources.ids = integer_matrix("source", source, count, longest);
  sources.rows.lengths = integer_vector("source_lengths", lengths, count);
  check_range("source_lengths", sources.rows.lengths, 1, longest);
  for (const PackedModel* model : models) {
    if (!model) throw py::type_error("models must be PackedModels, got None");
    if (!model->model().has_encoder) throw py::value_error("the model has no encoder");
    const int64_t symbols = model->model().encoder.embedding.symbols;
    for (int64_t b = 0; b < count; ++b)
      for (int64_t s = 0; s < sources.rows.lengths[b]; ++s) {
        const int64_t id = sources.ids[b * longest + s];
        if (id < 0 || id >= symbols)
          throw py::value_error("source must lie in 0.." + std::to_string(symbols - 1) + ", got " +
                                std::to_string(id));
      }
    const AttentionModel& attention = model->model().attention;
    if (attention.score == ScoreKind::location && count &&
        *std::max_element(sources.rows.lengths.begin(), sources.rows.lengths.end()) >
            attention.query.outputs)
      throw py::value_error("source must have at most max_source = " +
                            std::to_string(attention.query.outputs) + " positions");
  }
  sources.rows.count = count;
  sources.rows.longest = longest;
  for (int64_t b = 0; b < count; ++b) sources.rows.ids.push_back(sources.ids.data() + b * longest);
  return sources;
}

Sources memory_of(const PackedModel& packed, const py::handle& memory, const py::handle& lengths,
                  const py::tuple& state, int64_t count) {
  const Model& model = packed.model();
  Sources sources;
  sources.tensors.reserve(8);
  sources.rows.count = count;
  sources.rows.lengths.assign(size_t(count), 0);
  const bool attends = model.attention.score != ScoreKind::none;
  int64_t longest = 0;
  if (attends) {
    Argument given("memory", memory.ptr());
    if (given.ndim() != 3) throw py::value_error("memory must have shape (B, S, E)");
    longest = given.size(1);
    sources.rows.memory =
        rows_of(sources, "memory", memory, {count, longest, model.attention.memory_width});
    sources.rows.longest = longest;
    sources.rows.lengths.assign(size_t(count), longest);
    if (!lengths.is_none()) {
      sources.rows.lengths = integer_vector("memory_lengths", lengths, count);
      check_range("memory_lengths", sources.rows.lengths, 0, longest);
    }
    if (model.attention.score == ScoreKind::location && longest > model.attention.query.outputs)
      throw py::value_error(
          "memory must have S <= max_source = " + std::to_string(model.attention.query.outputs) +
          ", got S=" + std::to_string(longest));
  }
  const int64_t layers = int64_t(model.layers.size()), hidden = model.hidden;
  const auto part = [&](size_t index, const char* name, Sizes sizes) -> const float* {
    const py::object tensor = state[index];
    return tensor.is_none() ? nullptr : rows_of(sources, name, tensor, sizes);
  };
  sources.rows.hidden = part(0, "hidden", {layers, count, hidden});
  sources.rows.cell = part(1, "cell", {layers, count, hidden});
  sources.rows.attentional = part(2, "attentional", {count, model.attentional_width()});
  sources.rows.coverage = part(3, "coverage", {count, longest});
  sources.rows.position = py::cast<int64_t>(state[4]);
  return sources;
}

void check_ensemble(const Models& models) {
  if (models.empty()) throw py::value_error("models must have one model at least, got none");
  for (const PackedModel* model : models) {
    const Model& each = model->model();
    if (!each.output || !each.embedding.data)
      throw py::value_error("a search needs a model with an embedding and an output layer");
    if (each.output.outputs != models[0]->model().output.outputs)
      throw py::value_error("the models must have the same number of target symbols");
    if (each.output.outputs > each.embedding.symbols)
      throw py::value_error("the embedding lacks symbols of the output layer");
  }
}

SearchOptions options_of(const py::dict& given) {
  SearchOptions options;
  const auto whole = [&](const char* name, int64_t least) {
    const int64_t value = py::cast<int64_t>(given[name]);
    if (value < least)
      throw py::value_error(std::string(name) + " must be at least " + std::to_string(least) +
                            ", got " + std::to_string(value));
    return value;
  };
  // Written so that NaN is refused.
  const auto number = [&](const char* name, bool (*holds)(double), const char* wanted) {
    const double value = py::cast<double>(given[name]);
    if (!holds(value))
      throw py::value_error(std::string(name) + " must be " + wanted + ", got " +
                            std::to_string(value));
    return value;
  };
  const auto at_least_0 = [](double value) { return value >= 0.0; };
  options.most = whole("most", 1);
  options.nbest_mass = number("nbest_mass", at_least_0, "at least 0");
  options.length_penalty =
      choice<LengthPenalty>(given, "length_penalty", {"none", "average", "gnmt"});
  options.alpha = number("alpha", at_least_0, "at least 0");
  options.coverage_penalty = number("coverage_penalty", at_least_0, "at least 0");
  options.min_length = whole("min_length", 0);
  options.block_ngrams = whole("block_ngrams", 0);
  options.sample = py::cast<bool>(given["sample"]);
  options.temperature = number("temperature", [](double value) { return value > 0.0; }, "above 0");
  options.top_k = whole("top_k", 0);
  options.top_p = number("top_p", [](double value) { return value > 0.0; }, "above 0");
  options.seed = py::cast<uint64_t>(given["seed"]);
  options.return_weights = py::cast<bool>(given["return_weights"]);
  return options;
}

}  // namespace fused_attn
