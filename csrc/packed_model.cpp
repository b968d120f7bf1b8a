#include "packed_model.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/decoder/blocks.h"
#include "cpu/isa.h"
#include "packed_spec.h"

namespace fused_attn {
namespace {

using Models = std::vector<const PackedModel*>;

std::vector<int64_t> integers(const char* name, const py::handle& object, int64_t& rows,
                              int64_t& columns) {
  Argument tensor(name, object.ptr());
  if (tensor.code() != TypeCode::integer || tensor.bits() != 64)
    throw py::type_error(std::string(name) + " must be an int64 Tensor");
  const bool is_matrix = tensor.ndim() == 2;
  if (!is_matrix && tensor.ndim() != 1)
    throw py::value_error(std::string(name) + " must have one or two dimensions, got shape " +
                          tensor.shape());
  rows = tensor.size(0);
  columns = is_matrix ? tensor.size(1) : 1;
  std::vector<int64_t> values(size_t(rows * columns));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      values[i * columns + j] = static_cast<const int64_t*>(
          tensor.data())[i * tensor.stride(0) + (is_matrix ? j * tensor.stride(1) : 0)];
  return values;
}

std::vector<int64_t> vector_of(const char* name, const py::handle& object, int64_t size) {
  int64_t rows = 0, columns = 0;
  std::vector<int64_t> values = integers(name, object, rows, columns);
  if (columns != 1 || rows != size)
    throw py::value_error(std::string(name) + " must have shape (" + std::to_string(size) +
                          ",), got (" + std::to_string(rows) + ", " + std::to_string(columns) +
                          ")");
  return values;
}

void check_range(const char* name, const std::vector<int64_t>& values, int64_t low, int64_t high) {
  for (int64_t value : values)
    if (value < low || value > high)
      throw py::value_error(std::string(name) + " must lie in " + std::to_string(low) + ".." +
                            std::to_string(high) + ", got " + std::to_string(value));
}

// The sources of a call: symbols, or a memory with the states of the decoder.
struct Sources {
  SourceRows rows;
  std::vector<int64_t> ids;
  std::vector<Argument> tensors;
};

// source int64 (B, S), lengths int64 (B).
Sources symbols_of(const Models& models, const py::handle& source, const py::handle& lengths) {
  Sources sources;
  int64_t count = 0, longest = 0;
  sources.ids = integers("source", source, count, longest);
  sources.rows.lengths = vector_of("source_lengths", lengths, count);
  check_range("source_lengths", sources.rows.lengths, 1, longest);
  for (const PackedModel* model : models) {
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
  for (int64_t b = 0; b < count; ++b) sources.rows.ids.push_back(sources.ids.data() + b * longest);
  return sources;
}

const float* rows_of(Sources& sources, const char* name, const py::handle& tensor, Sizes sizes) {
  sources.tensors.emplace_back(name, tensor.ptr());
  Argument& argument = sources.tensors.back();
  argument.check_dtype(DType::f32).check_shape(sizes).make_contiguous();
  return static_cast<const float*>(argument.data());
}

// memory (B, S, E) or None, lengths (B) or None, state (hidden, cell, attentional, coverage), each
// a tensor or None, and the position.
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
      sources.rows.lengths = vector_of("memory_lengths", lengths, count);
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

SearchOptions options_of(const py::dict& given) {
  SearchOptions options;
  const auto number = [&](const char* name) { return py::cast<double>(given[name]); };
  const auto whole = [&](const char* name) { return py::cast<int64_t>(given[name]); };
  options.most = whole("most");
  options.nbest_mass = number("nbest_mass");
  const std::string penalty = py::str(given["length_penalty"]);
  options.length_penalty = penalty == "gnmt"      ? LengthPenalty::gnmt
                           : penalty == "average" ? LengthPenalty::average
                                                  : LengthPenalty::none;
  options.alpha = number("alpha");
  options.coverage_penalty = number("coverage_penalty");
  options.min_length = whole("min_length");
  options.block_ngrams = whole("block_ngrams");
  options.sample = py::cast<bool>(given["sample"]);
  options.temperature = number("temperature");
  options.top_k = whole("top_k");
  options.top_p = number("top_p");
  options.seed = py::cast<uint64_t>(given["seed"]);
  options.return_weights = py::cast<bool>(given["return_weights"]);
  return options;
}

py::object list_of(const std::vector<float>& values) {
  py::list list(values.size());
  for (size_t i = 0; i < values.size(); ++i) list[i] = py::float_(values[i]);
  return list;
}

// (tokens, log_prob, score, weights or None, gains) of each hypothesis: the fields of
// fused_attn.seq2seq.search.hypothesis.Hypothesis.
py::list results_of(const std::vector<std::vector<Found>>& found, const py::object& like,
                    const std::vector<int64_t>& lengths, bool with_weights) {
  const Argument source("source", like.ptr());
  py::list sentences(found.size());
  for (size_t b = 0; b < found.size(); ++b) {
    py::list hypotheses(found[b].size());
    for (size_t k = 0; k < found[b].size(); ++k) {
      const Found& each = found[b][k];
      py::list tokens(each.tokens.size());
      for (size_t t = 0; t < each.tokens.size(); ++t) tokens[t] = py::int_(each.tokens[t]);
      py::object weights = py::none();
      if (with_weights) {
        const int64_t rows = int64_t(each.weights.size()) / lengths[b];  // 0 without attention
        Argument made = new_floats(source, {rows, lengths[b]});
        if (!each.weights.empty())
          std::memcpy(made.data(), each.weights.data(), each.weights.size() * sizeof(float));
        weights = made.release();
      }
      hypotheses[k] =
          py::make_tuple(tokens, each.log_prob, each.score, weights, list_of(each.gains));
    }
    sentences[b] = hypotheses;
  }
  return sentences;
}

// Runs Python's signal handlers, if this is its main thread. Called without the GIL.
void check_signals() {
  const py::gil_scoped_acquire locked;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void check_ensemble(const Models& models) {
  if (models.empty()) throw py::value_error("models must have one model at least, got none");
  for (const PackedModel* model : models) {
    if (!model->model().output || !model->model().embedding.data)
      throw py::value_error("a search needs a model with an embedding and an output layer");
    if (model->model().output.outputs != models[0]->model().output.outputs)
      throw py::value_error("the models must have the same number of target symbols");
    if (model->model().output.outputs > model->model().embedding.symbols)
      throw py::value_error("the embedding lacks symbols of the output layer");
  }
}

py::list run_search(const Models& models, Sources& sources, const py::object& like,
                    const py::object& limits, const py::object& prefix, int64_t beam,
                    const py::dict& options, int threads) {
  check_ensemble(models);
  if (models[0]->model().output.outputs <= kEos)
    throw py::value_error("a search needs the symbols " + std::to_string(kPad) + " to " +
                          std::to_string(kEos) + ": padding, start and end");
  SearchCall call;
  for (const PackedModel* model : models) call.models.push_back(&model->model());
  call.options = options_of(options);
  call.beams = beam;
  call.threads = threads;
  call.check = check_signals;
  constexpr int64_t kMostBeams = int64_t(1) << 24;  // sizes of arrays do not overflow then
  if (beam < 1 || beam > kMostBeams)
    throw py::value_error("beam must lie in 1.." + std::to_string(kMostBeams) + ", got " +
                          std::to_string(beam));
  const int64_t count = sources.rows.count, symbols = models[0]->model().output.outputs;
  call.limits = vector_of("limits", limits, count);
  std::vector<int64_t> prefixes;
  if (!prefix.is_none()) {
    int64_t rows = 0;
    prefixes = integers("prefix", prefix, rows, call.prefix_length);
    if (rows != count) throw py::value_error("prefix must have one row for each source");
    check_range("prefix", prefixes, 0, symbols - 1);
    call.prefix = prefixes.data();
  }
  std::vector<std::vector<Found>> found;
  {
    py::gil_scoped_release unlocked;
    found = search_blocks(call, sources.rows, decoder_kernels());
  }
  return results_of(found, like, sources.rows.lengths, call.options.return_weights);
}

py::list search_sources(const Models& models, const py::object& source, const py::object& lengths,
                        const py::object& limits, const py::object& prefix, int64_t beam,
                        const py::dict& options, int threads) {
  Sources sources = symbols_of(models, source, lengths);
  return run_search(models, sources, source, limits, prefix, beam, options, threads);
}

// (memory (B, S, E), hidden (layers, B, hidden), cell or None)
py::tuple encode(const PackedModel& packed, const py::object& source, const py::object& lengths,
                 int threads) {
  Sources sources = symbols_of({&packed}, source, lengths);
  const Model& model = packed.model();
  const int64_t count = sources.rows.count;
  const int64_t longest = Argument("source", source.ptr()).size(1);
  const int64_t width =
      model.encoder.memory_proj ? model.encoder.memory_proj.outputs : model.encoder.width();
  const Argument like("source", source.ptr());
  const int64_t layers = int64_t(model.layers.size());
  Argument memory = new_floats(like, {count, longest, width});
  Argument hidden = new_floats(like, {layers, count, model.hidden}), cell;
  const bool is_lstm = model.cell == Cell::lstm;
  if (is_lstm) cell = new_floats(like, {layers, count, model.hidden});
  {
    py::gil_scoped_release unlocked;
    encode_blocks(model, sources.rows, longest, threads, decoder_kernels(),
                  static_cast<float*>(memory.data()), static_cast<float*>(hidden.data()),
                  is_lstm ? static_cast<float*>(cell.data()) : nullptr);
  }
  return py::make_tuple(memory.release(), hidden.release(), is_lstm ? cell.release() : py::none());
}

// Feeds given symbols, int64 (B, T), or embedded ones, float32 (B, T, width). Returns (states
// (B, T, width), logits (B, T, V) or None, weights (B, T, S) or None, hidden, cell, attentional,
// coverage).
py::tuple run_steps(const PackedModel& packed, const py::object& inputs, const py::object& memory,
                    const py::object& lengths, const py::tuple& state, bool return_weights,
                    int threads) {
  const Model& model = packed.model();
  Argument given("inputs", inputs.ptr());
  const bool embedded = given.ndim() == 3;
  if (given.ndim() != 2 && !embedded)
    throw py::value_error("inputs must have two or three dimensions, got shape " + given.shape());
  const int64_t count = given.size(0), steps = given.size(1);
  Sources sources = memory_of(packed, memory, lengths, state, count);
  std::vector<int64_t> symbols;
  StepsCall call;
  call.model = &model;
  call.steps = steps;
  call.threads = threads;
  call.check = check_signals;
  if (embedded) {
    if (!model.layers[0].input) throw py::value_error("inputs must be symbols for this decoder");
    given.check_dtype(DType::f32)
        .check_shape({count, steps, model.layers[0].input.inputs})
        .make_contiguous();
    call.embedded = static_cast<const float*>(given.data());
  } else {
    int64_t rows = 0, columns = 0;
    symbols = integers("inputs", inputs, rows, columns);
    if (!model.embedding.data)
      throw py::value_error("inputs must be embedded: the decoder has no embedding");
    check_range("inputs", symbols, 0, model.embedding.symbols - 1);
    call.symbols = symbols.data();
  }
  const Argument like("inputs", inputs.ptr());
  const int64_t layers = int64_t(model.layers.size()), width = model.attentional_width();
  const int64_t longest = sources.rows.longest;
  const auto make = [&](Sizes sizes) { return new_floats(like, sizes); };
  Argument results[7];
  results[0] = make({count, steps, width});
  if (model.output) results[1] = make({count, steps, model.output.outputs});
  if (return_weights && model.attention.score != ScoreKind::none)
    results[2] = make({count, steps, longest});
  results[3] = make({layers, count, model.hidden});
  if (model.cell == Cell::lstm) results[4] = make({layers, count, model.hidden});
  if (model.input_feeding) results[5] = make({count, width});
  if (model.attention.coverage) results[6] = make({count, longest});
  float* data[7];
  for (int i = 0; i < 7; ++i)
    data[i] = results[i].object() ? static_cast<float*>(results[i].data()) : nullptr;
  call.states = data[0];
  call.logits = data[1];
  call.weights = data[2];
  call.hidden = data[3];
  call.cell = data[4];
  call.attentional = data[5];
  call.coverage = data[6];
  {
    py::gil_scoped_release unlocked;
    run_blocks(call, sources.rows, decoder_kernels());
  }
  py::tuple found(7);
  for (int i = 0; i < 7; ++i) found[i] = results[i].object() ? results[i].release() : py::none();
  return found;
}

// (symbols int64 (B, T), log_probs (B, T), lengths int64 (B), weights (B, T, S) or None) of the
// rows found, where T is the largest length. The padding of symbols is `eos`, that of the rest 0.
py::tuple tensors_of(const std::vector<GreedyRow>& rows, const py::object& like, int64_t eos,
                     const SourceRows& sources, bool with_weights) {
  const int64_t count = int64_t(rows.size());
  int64_t steps = 0;
  for (const GreedyRow& row : rows) steps = std::max(steps, int64_t(row.symbols.size()));
  const Argument floats_like("rows", like.ptr());
  const py::object symbols = like.attr("new_full")(py::make_tuple(count, steps), eos);
  const py::object ends = like.attr("new_zeros")(count);
  Argument log_probs = new_zeros(new_floats(floats_like, {count, steps})), weights;
  if (with_weights) weights = new_zeros(new_floats(floats_like, {count, steps, sources.longest}));
  auto* symbol_data = static_cast<int64_t*>(Argument("symbols", symbols.ptr()).data());
  auto* length_data = static_cast<int64_t*>(Argument("lengths", ends.ptr()).data());
  auto* log_prob_data = static_cast<float*>(log_probs.data());
  for (int64_t b = 0; b < count; ++b) {
    const GreedyRow& row = rows[b];
    std::copy(row.symbols.begin(), row.symbols.end(), symbol_data + b * steps);
    std::copy(row.log_probs.begin(), row.log_probs.end(), log_prob_data + b * steps);
    length_data[b] = int64_t(row.symbols.size());
    if (!with_weights) continue;
    const int64_t length = sources.lengths[b];
    auto* to = static_cast<float*>(weights.data()) + b * steps * sources.longest;
    for (int64_t t = 0; t < length_data[b]; ++t, to += sources.longest)
      std::copy_n(row.weights.begin() + t * length, length, to);
  }
  return py::make_tuple(symbols, log_probs.release(), ends,
                        with_weights ? weights.release() : py::none());
}

// Returns what `tensors_of` does, of at most `steps` symbols. `like` is an int64 tensor with the B
// rows that the results are to have.
py::tuple greedy(const PackedModel& packed, const py::object& like, const py::object& memory,
                 const py::object& lengths, const py::tuple& state, int32_t bos, int32_t eos,
                 int64_t steps, bool return_weights, int threads) {
  const Model& model = packed.model();
  check_ensemble({&packed});
  const int64_t count = Argument("rows", like.ptr()).size(0);
  Sources sources = memory_of(packed, memory, lengths, state, count);
  check_range("bos", {bos}, 0, model.embedding.symbols - 1);
  GreedyCall call;
  call.model = &model;
  call.steps = steps;
  call.threads = threads;
  call.check = check_signals;
  call.bos = bos;
  call.eos = eos;
  call.return_weights = return_weights && model.attention.score != ScoreKind::none;
  std::vector<GreedyRow> rows;
  {
    py::gil_scoped_release unlocked;
    rows = greedy_blocks(call, sources.rows, decoder_kernels());
  }
  return tensors_of(rows, like, eos, sources.rows, call.return_weights);
}

}  // namespace

void bind_decoder(py::module_& m) {
  static py::exception<NotNumbers> not_numbers(m, "NotNumbersError", PyExc_ValueError);
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const NotNumbers& problem) {
      py::set_error(not_numbers, problem.what());
    }
  });
  py::class_<PackedModel>(m, "PackedModel", "A model packed for the native decoder; immutable.")
      .def(py::init<const py::dict&>(), py::arg("spec"))
      .def_property_readonly("bytes", &PackedModel::bytes, "Size of the packed parameters.")
      .def_property_readonly(
          "takes_embedded", [](const PackedModel& m) { return bool(m.model().layers[0].input); },
          "Whether steps can be fed embedded inputs.")
      .def("encode", &encode, py::arg("source"), py::arg("source_lengths"), py::arg("threads"))
      .def("run_steps", &run_steps, py::arg("inputs"), py::arg("memory"), py::arg("memory_lengths"),
           py::arg("state"), py::arg("return_weights"), py::arg("threads"))
      .def("greedy", &greedy, py::arg("rows"), py::arg("memory"), py::arg("memory_lengths"),
           py::arg("state"), py::arg("bos"), py::arg("eos"), py::arg("steps"),
           py::arg("return_weights"), py::arg("threads"));
  m.def("search", &search_sources, py::arg("models"), py::arg("source"), py::arg("source_lengths"),
        py::arg("limits"), py::arg("prefix"), py::arg("beam"), py::arg("options"),
        py::arg("threads"));
}

}  // namespace fused_attn
