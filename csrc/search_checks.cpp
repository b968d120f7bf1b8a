// The native search over a model that is a Python function: what the tests compare with the search
// in Python.
#include "search_checks.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/decoder/search.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace fused_attn {
namespace {

// Calls step(sentences, histories), lists with one entry for each row: its sentence, and the
// symbols it was fed since kBos. That returns float32 buffers: logits (models, rows, V), and
// weights (rows, S) or None.
class PythonStepper : public Stepper {
 public:
  PythonStepper(py::function step, int64_t models, int64_t vocabulary, int64_t beams,
                std::vector<int64_t> sources, bool attends)
      : step_(std::move(step)),
        models_(models),
        vocabulary_(vocabulary),
        beams_(beams),
        sources_(std::move(sources)),
        attends_(attends),
        histories_(sources_.size() * beams) {
    for (size_t row = 0; row < histories_.size(); ++row) numbers_.push_back(int64_t(row) / beams);
  }

  int64_t sentences() const override { return int64_t(sources_.size()); }
  int64_t beams() const override { return beams_; }
  int64_t models() const override { return models_; }
  int64_t vocabulary() const override { return vocabulary_; }
  int64_t source_length(int64_t sentence) const override { return sources_[sentence]; }
  bool attends() const override { return attends_; }

  void step(const int32_t* symbols) override {
    for (size_t row = 0; row < histories_.size(); ++row) histories_[row].push_back(symbols[row]);
    const py::tuple found = step_(numbers_, histories_);
    logits_ = floats(found[0], models_ * int64_t(histories_.size()) * vocabulary_);
    weights_.clear();
    if (found[1].is_none()) return;
    const int64_t rows = int64_t(histories_.size());
    weights_ = floats(found[1], -1);
    width_ = int64_t(weights_.size()) / rows;
  }

  float* logits(int64_t model, int64_t row) override {
    return logits_.data() + (model * int64_t(histories_.size()) + row) * vocabulary_;
  }
  const float* weights(int64_t row) const override {
    return weights_.empty() ? nullptr : weights_.data() + row * width_;
  }

  void reorder(const int32_t* from) override {
    std::vector<std::vector<int32_t>> histories;
    for (size_t row = 0; row < histories_.size(); ++row) {
      if (numbers_.at(from[row]) != numbers_[row]) throw std::logic_error("another sentence's row");
      histories.push_back(histories_[from[row]]);
    }
    histories_ = std::move(histories);
  }

  void keep(const int32_t* sentences, int64_t count) override {
    std::vector<int64_t> sources, numbers;
    std::vector<std::vector<int32_t>> histories;
    for (int64_t i = 0; i < count; ++i) {
      if (i > 0 && sentences[i] <= sentences[i - 1]) throw std::logic_error("not ascending");
      sources.push_back(sources_.at(sentences[i]));
      for (int64_t row = sentences[i] * beams_; row < (sentences[i] + 1) * beams_; ++row) {
        numbers.push_back(numbers_[row]);
        histories.push_back(histories_[row]);
      }
    }
    sources_ = std::move(sources);
    numbers_ = std::move(numbers);
    histories_ = std::move(histories);
  }

 private:
  static std::vector<float> floats(const py::handle& object, int64_t count) {
    const py::buffer_info info = py::cast<py::buffer>(object).request();
    if (info.format != "f" || (count >= 0 && info.size != count))
      throw std::invalid_argument("expected another number of float32");
    const float* data = static_cast<const float*>(info.ptr);
    return {data, data + info.size};
  }

  py::function step_;
  int64_t models_, vocabulary_, beams_;
  std::vector<int64_t> sources_;
  bool attends_;
  std::vector<std::vector<int32_t>> histories_;  // of the rows
  std::vector<int64_t> numbers_;                 // the sentences of the rows
  std::vector<float> logits_, weights_;
  int64_t width_ = 0;
};

SearchOptions options_of(const py::dict& fields) {
  SearchOptions options;
  const auto set = [&](const char* name, auto& field) {
    if (fields.contains(name)) field = fields[name].cast<std::decay_t<decltype(field)>>();
  };
  int32_t penalty = int32_t(options.length_penalty);
  set("most", options.most);
  set("nbest_mass", options.nbest_mass);
  set("length_penalty", penalty);
  set("alpha", options.alpha);
  set("coverage_penalty", options.coverage_penalty);
  set("min_length", options.min_length);
  set("block_ngrams", options.block_ngrams);
  set("sample", options.sample);
  set("temperature", options.temperature);
  set("top_k", options.top_k);
  set("top_p", options.top_p);
  set("seed", options.seed);
  set("return_weights", options.return_weights);
  options.length_penalty = LengthPenalty(penalty);
  return options;
}

using Result =
    std::tuple<std::vector<int32_t>, float, float, std::vector<float>, std::vector<float>>;

std::vector<std::vector<Result>> search_with(
    py::function step, int64_t models, int64_t vocabulary, int64_t beams,
    std::vector<int64_t> sources, bool attends, const py::dict& options,
    const std::vector<std::tuple<int64_t, int64_t, std::vector<int64_t>>>& sentences) {
  std::vector<SentenceLimits> limits;
  for (const auto& [number, limit, prefix] : sentences)
    limits.push_back({number, limit, prefix.data(), int64_t(prefix.size())});
  PythonStepper stepper(std::move(step), models, vocabulary, beams, std::move(sources), attends);
  std::vector<std::vector<Result>> results;
  for (const auto& found : search(stepper, decoder_kernels(), options_of(options), limits)) {
    results.emplace_back();
    for (const Found& f : found)
      results.back().emplace_back(f.tokens, f.log_prob, f.score, f.gains, f.weights);
  }
  return results;
}

}  // namespace

void bind_search_checks(py::module_& module) {
  module.def("search_with", &search_with, py::arg("step"), py::arg("models"), py::arg("vocabulary"),
             py::arg("beams"), py::arg("sources"), py::arg("attends"), py::arg("options"),
             py::arg("sentences"), "Search over a model that is a Python function (for tests).");
}

}  // namespace fused_attn
