#include "packed_model.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/isa.h"
#include "packed_arguments.h"

namespace fused_attn {
namespace {

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
  check_range("beam", {beam}, 1, kMostBeams);
  check_range("most", {call.options.most}, 1, beam);
  const int64_t count = sources.rows.count, symbols = models[0]->model().output.outputs;
  call.limits = integer_vector("limits", limits, count);
  check_range("limits", call.limits, 0, std::numeric_limits<int32_t>::max());
  std::vector<int64_t> prefixes;
  if (!prefix.is_none()) {
    int64_t rows = 0;
    prefixes = integer_matrix("prefix", prefix, rows, call.prefix_length);
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
  const int64_t longest = sources.rows.longest, width = model.encoder.memory_width();
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

// What run_steps returns: seven tensors, those that there are not to be without an object.
struct StepResults {
  Argument tensors[7];

  StepResults(const StepsCall& call, const Argument& like, int64_t count, int64_t longest,
              bool return_weights) {
    const Model& model = *call.model;
    const int64_t layers = int64_t(model.layers.size()), width = model.attentional_width();
    const auto make = [&](Sizes sizes) { return new_floats(like, sizes); };
    tensors[0] = make({count, call.steps, width});
    if (model.output) tensors[1] = make({count, call.steps, model.output.outputs});
    if (return_weights && model.attention.score != ScoreKind::none)
      tensors[2] = make({count, call.steps, longest});
    tensors[3] = make({layers, count, model.hidden});
    if (model.cell == Cell::lstm) tensors[4] = make({layers, count, model.hidden});
    if (model.input_feeding) tensors[5] = make({count, width});
    if (model.attention.coverage) tensors[6] = make({count, longest});
  }

  void give_to(StepsCall& call) const {
    float** places[7] = {&call.states, &call.logits,      &call.weights, &call.hidden,
                         &call.cell,   &call.attentional, &call.coverage};
    for (int i = 0; i < 7; ++i)
      if (tensors[i].object()) *places[i] = static_cast<float*>(tensors[i].data());
  }

  py::tuple release() {
    py::tuple found(7);
    for (int i = 0; i < 7; ++i) found[i] = tensors[i].object() ? tensors[i].release() : py::none();
    return found;
  }
};

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
  const int64_t count = given.size(0);
  Sources sources = memory_of(packed, memory, lengths, state, count);
  std::vector<int64_t> symbols;
  StepsCall call;
  call.model = &model;
  call.steps = given.size(1);
  call.threads = threads;
  call.check = check_signals;
  if (embedded) {
    if (!model.layers[0].input) throw py::value_error("inputs must be symbols for this decoder");
    given.check_dtype(DType::f32)
        .check_shape({count, call.steps, model.layers[0].input.inputs})
        .make_contiguous();
    call.embedded = static_cast<const float*>(given.data());
  } else {
    int64_t rows = 0, columns = 0;
    symbols = integer_matrix("inputs", inputs, rows, columns);
    if (!model.embedding.data)
      throw py::value_error("inputs must be embedded: the decoder has no embedding");
    check_range("inputs", symbols, 0, model.embedding.symbols - 1);
    call.symbols = symbols.data();
  }
  StepResults results(call, Argument("inputs", inputs.ptr()), count, sources.rows.longest,
                      return_weights);
  results.give_to(call);
  {
    py::gil_scoped_release unlocked;
    run_blocks(call, sources.rows, decoder_kernels());
  }
  return results.release();
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
  const Argument counted("rows", like.ptr());
  if (counted.ndim() != 1 || counted.code() != TypeCode::integer || counted.bits() != 64)
    throw py::type_error("rows must be an int64 Tensor with one dimension");
  const int64_t count = counted.size(0);
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
  py::register_exception<NotNumbers>(m, "NotNumbersError", PyExc_ValueError);
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
