// Cells, attention of a sentence and statistics of logits; see DecoderKernels. Every function
// calls its kernel `repeat` times and returns the seconds of one call, unless it returns a result.
#include <pybind11/stl.h>

#include <chrono>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "decoder_checks.h"
#include "tensor_exchange.h"

namespace fused_attn {
namespace {

// A float32 tensor of a caller, used in place: the elements of a row are next to one another.
struct Floats {
  Argument view;
  Floats(const char* name, const py::handle& tensor, int dims) : view(name, tensor.ptr()) {
    view.check_dtype(DType::f32);
    if (view.ndim() != dims)
      throw py::value_error(std::string(name) + " has shape " + view.shape());
    if (width() > 1 && view.stride(dims - 1) != 1)
      throw py::value_error(std::string(name) + " has strided columns");
  }
  Floats& expect(Sizes sizes) {
    view.check_shape(sizes);
    return *this;
  }
  float* data() const { return static_cast<float*>(view.data()); }
  int64_t rows() const { return view.size(0); }
  int64_t width() const { return view.size(view.ndim() - 1); }
  int64_t stride() const { return view.stride(0); }
};

// The same, or null for None.
struct Optional {
  Argument view;
  float* data = nullptr;
  Optional(const char* name, const py::handle& tensor, int64_t size) {
    if (tensor.is_none()) return;
    Floats given(name, tensor, 1);
    given.expect({size});
    data = given.data();
    view = std::move(given.view);
  }
};

template <class F>
double seconds(int64_t repeat, F call) {
  const py::gil_scoped_release release;
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < repeat; ++i) call(decoder_kernels());
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  return took.count() / double(repeat > 0 ? repeat : 1);
}

double lstm(const py::handle& gates, const py::handle& state, const py::handle& result,
            int64_t repeat) {
  Floats g("gates", gates, 2), c("c", state, 2), h("h", result, 2);
  g.expect({c.rows(), 4 * c.width()});
  h.expect({c.rows(), c.width()});
  return seconds(repeat, [&](const DecoderKernels& kernels) {
    kernels.lstm(g.data(), g.stride(), c.rows(), c.width(), c.data(), c.stride(), h.data(),
                 h.stride());
  });
}

double gru(const py::handle& from_input, const py::handle& from_state, const py::handle& state,
           int64_t repeat) {
  Floats x("from_input", from_input, 2), y("from_state", from_state, 2), h("h", state, 2);
  x.expect({h.rows(), 3 * h.width()});
  y.expect({h.rows(), 3 * h.width()});
  if (x.stride() != y.stride()) throw py::value_error("from_input and from_state differ in stride");
  return seconds(repeat, [&](const DecoderKernels& kernels) {
    kernels.gru(x.data(), y.data(), x.stride(), h.rows(), h.width(), h.data(), h.stride());
  });
}

double tanh(const py::handle& from, const py::handle& result, int64_t repeat) {
  Floats x("x", from, 1), out("out", result, 1);
  out.expect({x.width()});
  return seconds(repeat, [&](const DecoderKernels& kernels) {
    kernels.tanh(x.data(), x.width(), out.data());
  });
}

double add(const py::handle& first, const py::handle& second, const py::handle& result,
           int64_t repeat) {
  Floats x("x", first, 1), y("y", second, 1), out("out", result, 1);
  y.expect({x.width()});
  out.expect({x.width()});
  return seconds(repeat, [&](const DecoderKernels& kernels) {
    kernels.add(x.data(), y.data(), x.width(), out.data());
  });
}

double dot_scores(const py::handle& queries, const py::handle& memory, const py::handle& added,
                  const py::handle& result, int64_t repeat) {
  Floats query("query", queries, 2), keys("keys", memory, 2), scores("scores", result, 2);
  const Optional bias("bias", added, keys.rows());
  keys.expect({keys.rows(), query.width()});
  scores.expect({query.rows(), keys.rows()});
  return seconds(repeat, [&](const DecoderKernels& kernels) {
    kernels.dot_scores(query.data(), query.stride(), query.rows(), keys.data(), keys.stride(),
                       keys.rows(), keys.width(), bias.data, scores.data(), scores.stride());
  });
}

double concat_scores(const py::handle& queries, const py::handle& memory, const py::handle& weights,
                     const py::handle& covered, const py::handle& along, const py::handle& result,
                     int64_t repeat) {
  Floats query("query", queries, 1), keys("keys", memory, 2), v("v", weights, 1);
  Floats scores("scores", result, 1);
  const Optional coverage("coverage", covered, keys.rows());
  const Optional direction("direction", along, keys.width());
  query.expect({keys.width()});
  v.expect({keys.width()});
  scores.expect({keys.rows()});
  return seconds(repeat, [&](const DecoderKernels& kernels) {
    kernels.concat_scores(query.data(), keys.data(), keys.stride(), keys.rows(), keys.width(),
                          v.data(), coverage.data, direction.data, scores.data());
  });
}

double softmax(const py::handle& row, int64_t repeat) {
  const Floats scores("scores", row, 1);
  return seconds(repeat, [&](const DecoderKernels& kernels) {
    kernels.softmax(scores.data(), scores.width());
  });
}

double bell(const py::handle& row, float first, float center, float rate, int64_t repeat) {
  const Floats weights("weights", row, 1);
  return seconds(repeat, [&](const DecoderKernels& kernels) {
    kernels.bell(weights.data(), weights.width(), first, center, rate);
  });
}

double weighted_sum(const py::handle& factors, const py::handle& memory, bool added,
                    const py::handle& result, int64_t repeat) {
  Floats weights("weights", factors, 2), values("values", memory, 2), out("out", result, 2);
  values.expect({weights.width(), values.width()});
  out.expect({weights.rows(), values.width()});
  return seconds(repeat, [&](const DecoderKernels& kernels) {
    kernels.weighted_sum(weights.data(), weights.stride(), weights.rows(), values.rows(),
                         values.data(), values.stride(), values.width(),
                         added ? out.data() : nullptr, out.data(), out.stride());
  });
}

float log_sum_exp(const py::handle& row) {
  const Floats x("x", row, 1);
  return decoder_kernels().log_sum_exp(x.data(), x.width());
}

int64_t argmax(const py::handle& row) {
  const Floats x("x", row, 1);
  return decoder_kernels().argmax(x.data(), x.width());
}

// The number of places, and the places followed by -1 wherever nothing was written.
py::tuple top(const py::handle& row, int64_t count) {
  const Floats x("x", row, 1);
  std::vector<int32_t> places(size_t(count) + 4, -1);
  const int64_t found = decoder_kernels().top(x.data(), x.width(), count, places.data());
  return py::make_tuple(found, places);
}

double time_of_statistic(const std::string& name, const py::handle& row, int64_t count,
                         int64_t repeat) {
  const Floats x("x", row, 1);
  std::vector<int32_t> places(size_t(count) + 1);
  if (name == "log_sum_exp")
    return seconds(repeat, [&](const DecoderKernels& k) { k.log_sum_exp(x.data(), x.width()); });
  if (name == "argmax")
    return seconds(repeat, [&](const DecoderKernels& k) { k.argmax(x.data(), x.width()); });
  if (name == "top")
    return seconds(
        repeat, [&](const DecoderKernels& k) { k.top(x.data(), x.width(), count, places.data()); });
  throw py::value_error("no statistic " + name);
}

}  // namespace

void add_decoder_cell_checks(py::module_& checks) {
  const py::arg_v repeat = py::arg("repeat") = 1;
  checks.def("lstm", &lstm, py::arg("gates"), py::arg("c"), py::arg("h"), repeat);
  checks.def("gru", &gru, py::arg("from_input"), py::arg("from_state"), py::arg("h"), repeat);
  checks.def("tanh", &tanh, py::arg("x"), py::arg("out"), repeat);
  checks.def("add", &add, py::arg("x"), py::arg("y"), py::arg("out"), repeat);
  checks.def("dot_scores", &dot_scores, py::arg("query"), py::arg("keys"), py::arg("bias"),
             py::arg("scores"), repeat);
  checks.def("concat_scores", &concat_scores, py::arg("query"), py::arg("keys"), py::arg("v"),
             py::arg("coverage"), py::arg("direction"), py::arg("scores"), repeat);
  checks.def("softmax", &softmax, py::arg("scores"), repeat);
  checks.def("bell", &bell, py::arg("weights"), py::arg("first"), py::arg("center"),
             py::arg("rate"), repeat);
  checks.def("weighted_sum", &weighted_sum, py::arg("weights"), py::arg("values"), py::arg("add"),
             py::arg("out"), repeat);
  checks.def("log_sum_exp", &log_sum_exp, py::arg("x"));
  checks.def("argmax", &argmax, py::arg("x"));
  checks.def("top", &top, py::arg("x"), py::arg("count"));
  checks.def("time_of_statistic", &time_of_statistic, py::arg("name"), py::arg("x"),
             py::arg("count"), repeat);
}

}  // namespace fused_attn
