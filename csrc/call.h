// One call: Python's arguments, checked and converted to AttentionParams, and the results.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "attention_params.h"
#include "cpu/driver.h"
#include "tensor_exchange.h"
#ifdef FUSED_ATTN_CUDA
#include "cuda/driver.h"
#endif

namespace fused_attn {

inline double number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// The gradients that the caller wants, in the inputs' order; None for the others.
class Gradients {
 public:
  // `wanted` is a list of bools, one for each of `count` inputs.
  Gradients(PyObject* wanted, size_t count) : wanted_(wanted), results_(count) {
    if (!PyList_Check(wanted) || size_t(PyList_GET_SIZE(wanted)) != count)
      throw py::type_error("wanted must be a list of " + std::to_string(count) + " bools");
    for (size_t i = 0; i < count; ++i) results_[i] = py::none();
  }

  // Where to write the gradient of the input `index`, or null.
  template <class... Type>
  void* make(size_t index, const Argument& like, Sizes sizes, Type... dtype) {
    if (PyList_GET_ITEM(wanted_, Py_ssize_t(index)) != Py_True) return nullptr;
    Argument made = new_empty(like, sizes, dtype...);
    void* data = made.data();
    results_[index] = made.release();
    return data;
  }

  PyObject* release() { return results_.release().ptr(); }

 private:
  PyObject* wanted_;
  py::tuple results_;
};

// The parameters, and the objects that must outlive the call.
class Call {
 public:
  Call(PyObject* query, PyObject* memory, Device device = {})
      : memory_("memory", memory, device), query_("query", query, memory_.device()) {
    is_ragged_ = memory_.ndim() == 2 && device.type == kCpu;
    if (query_.ndim() != 3 || (memory_.ndim() != 3 && !is_ragged_)) {
      throw py::value_error("query and memory must have shapes (B, T, K) and (B, S, E), got " +
                            query_.shape() + " and " + memory_.shape());
    }
    p.dtype = memory_.dtype();
    p.B = is_ragged_ ? query_.size(0) : memory_.size(0);
    p.S = is_ragged_ ? 0 : memory_.size(1);  // `take_offsets` sets that of a ragged memory
    p.E = memory_.size(memory_.ndim() - 1);
    p.T = query_.size(1);
    p.K = query_.size(2);
    if (p.E < 1 || p.K < 1) {
      throw py::value_error("query and memory must have widths of at least 1, got shapes " +
                            query_.shape() + " and " + memory_.shape());
    }
    if (on_gpu()) {
      p.device = memory_.device().id;
      p.stream = current_stream(memory_.device());
    } else {
      p.threads = torch_threads();
    }
    query_.check_shape({p.B, p.T, p.K}).check_dtype(p.dtype);
    p.query = query_.make_unit_stride().rows();
    p.memory = memory_.make_unit_stride().rows();
  }

  void dot(double scale) {
    if (p.K != p.E) query_.check_shape({p.B, p.T, p.E});
    p.scale = scale;
  }

  void concat(PyObject* memory_proj, PyObject* memory_exp, PyObject* v) {
    p.score = Score::concat;
    proj_ = argument("memory_proj", memory_proj);
    p.memory_proj = memory_rows(proj_, p.dtype);
    if (memory_exp != Py_None) {
      exp_ = argument("memory_exp", memory_exp);
      p.exp_dtype = exp_.dtype();
      // A GPU's kernels are compiled for the types that fused_attn.prepared.exponentials returns.
      const bool is_short = p.dtype == DType::bf16, may_be_short = !on_gpu() || is_short;
      const DType whole = p.dtype == DType::f64  ? DType::f64
                          : on_gpu() && is_short ? DType::bf16
                                                 : DType::f32;
      if (whole == DType::f64 || p.exp_dtype != DType::bf16 || !may_be_short)
        exp_.check_dtype(whole);
      p.memory_exp = memory_rows(exp_, p.exp_dtype);
    }
    v_ = argument("v", v);
    p.v = v_.check_shape({p.K}).check_dtype(p.dtype).make_contiguous().data();
  }

  // The fields of fused_attn.reference.Masking. For a memory (rows, E) a tuple takes the place of
  // the lengths: offsets (B + 1) and the longest length.
  void masking(PyObject* fields) {
    if (!PyTuple_Check(fields) || PyTuple_GET_SIZE(fields) != 5) {
      throw py::type_error("masking must be a tuple (lengths, mask, keep, keep_scale, window)");
    }
    PyObject* lengths = PyTuple_GET_ITEM(fields, 0);
    PyObject* mask = PyTuple_GET_ITEM(fields, 1);
    PyObject* keep = PyTuple_GET_ITEM(fields, 2);
    p.keep_scale = number(PyTuple_GET_ITEM(fields, 3));
    if (is_ragged_) {
      take_offsets(lengths);
    } else if (lengths != Py_None) {
      const Argument given = argument("memory_lengths", lengths);
      on_gpu() ? take_device_lengths(given) : take_lengths(given);
    }
    if (mask != Py_None) {
      Argument view = argument("memory_mask", mask);
      const bool is_3d = view.ndim() == 3;
      const int64_t queries = is_3d && view.size(1) != 1 ? p.T : 1;
      (is_3d ? view.check_shape({p.B, queries, p.S}) : view.check_shape({p.B, p.S})).check_bool();
      p.mask = static_cast<const uint8_t*>(view.data());
      p.mask_b = view.stride(0);
      p.mask_t = queries == 1 ? 0 : view.stride(1);
      p.mask_s = view.stride(is_3d ? 2 : 1);
    }
    if (keep != Py_None) {
      keep_ = argument("keep_mask", keep);
      keep_.check_shape({p.B, p.T, p.S}).check_bool();
      p.keep = static_cast<const uint8_t*>(keep_.make_contiguous().data());
    }
    if (PyObject* window = PyTuple_GET_ITEM(fields, 4); window != Py_None) take_window(window);
  }

  // Returns (context, weights, logsumexp), with None for those not asked for.
  PyObject* forward(bool with_weights, bool with_logsumexp) {
    Argument context = new_empty(memory_, {p.B, p.T, p.E}), weights, logsumexp;
    p.context = context.data();
    if (with_weights) p.weights = (weights = new_empty(memory_, {p.B, p.T, p.S})).data();
    if (with_logsumexp)
      p.logsumexp = (logsumexp = new_empty(memory_, {p.B, p.T}, statistics())).data();
    on_gpu() ? run_on_gpu() : run(cpu_forward);
    py::tuple results(3);
    results[0] = context.release();
    results[1] = with_weights ? weights.release() : py::none();
    results[2] = with_logsumexp ? logsumexp.release() : py::none();
    return results.release().ptr();
  }

  // Here memory_ is the projection, passed in place of a memory; only its shape is used.
  PyObject* scores() {
    p.E = 0;
    p.scores_only = true;
    Argument scores = new_empty(memory_, {p.B, p.T, p.S}, statistics());
    p.raw_scores = scores.data();
    run(cpu_forward);
    return scores.release().release().ptr();
  }

  PyObject* scores_backward(PyObject* grad_scores, PyObject* wanted) {
    p.E = 0;
    p.scores_only = true;
    Argument grad("grad_scores", grad_scores);
    grad.check_shape({p.B, p.T, p.S}).check_dtype(statistics());
    p.raw_grad_scores = grad.make_contiguous().data();
    Gradients grads(wanted, 3);
    p.grad_query = grads.make(0, memory_, {p.B, p.T, p.K});
    p.grad_memory_proj = grads.make(1, memory_, {p.B, p.S, p.K});
    p.grad_v = grads.make(2, memory_, {p.K});
    run(cpu_backward);
    return grads.release();
  }

  // `saved` is (context, weights or None, logsumexp). Returns the gradients in the inputs' order,
  // None for those that are not wanted.
  PyObject* backward(PyObject* given_context, PyObject* given_weights, PyObject* saved,
                     PyObject* wanted) {
    if (!PyTuple_Check(saved) || PyTuple_GET_SIZE(saved) != 3) {
      throw py::type_error("saved must be a tuple (context, weights, logsumexp)");
    }
    Argument context("context", PyTuple_GET_ITEM(saved, 0)), grad_context, grad_weights, weights;
    p.context = context.check_shape({p.B, p.T, p.E}).check_dtype(p.dtype).make_contiguous().data();
    grad_context =
        given_context == Py_None ? new_zeros(context) : Argument("grad_context", given_context);
    p.grad_context = rows(grad_context, {p.B, p.T, p.E}, p.dtype);
    if (given_weights != Py_None) {
      grad_weights = Argument("grad_weights", given_weights);
      p.grad_weights = rows(grad_weights, {p.B, p.T, p.S}, p.dtype);
    }
    if (given_weights != Py_None || PyTuple_GET_ITEM(saved, 1) != Py_None) {
      weights = Argument("weights", PyTuple_GET_ITEM(saved, 1));
      weights.check_shape({p.B, p.T, p.S}).check_dtype(p.dtype);
      p.weights = weights.make_contiguous().data();
    }
    Argument logsumexp("logsumexp", PyTuple_GET_ITEM(saved, 2));
    logsumexp.check_shape({p.B, p.T}).check_dtype(statistics());
    p.logsumexp = logsumexp.make_contiguous().data();

    const bool concat = p.score == Score::concat;
    Gradients grads(wanted, concat ? 5 : 3);
    p.grad_query = grads.make(0, memory_, {p.B, p.T, p.K});
    if (concat) {
      p.grad_memory_proj = new_memory(grads, 1, p.K);
      p.grad_v = grads.make(2, memory_, {p.K});
    }
    p.grad_memory = new_memory(grads, concat ? 3 : 1, p.E);
    if (p.centers) p.grad_centers = grads.make(concat ? 4 : 2, memory_, {p.B, p.T}, statistics());
    run(cpu_backward);
    return grads.release();
  }

  AttentionParams p;

 private:
  static Rows rows(Argument& argument, Sizes sizes, DType dtype) {
    return argument.check_shape(sizes).check_dtype(dtype).make_unit_stride().rows();
  }

  // A tensor with one row for each row of the memory: (B, S, K), or (rows, K).
  Rows memory_rows(Argument& argument, DType dtype) const {
    return is_ragged_ ? rows(argument, {memory_.size(0), p.K}, dtype)
                      : rows(argument, {p.B, p.S, p.K}, dtype);
  }

  void* new_memory(Gradients& grads, size_t index, int64_t width) const {
    return is_ragged_ ? grads.make(index, memory_, {memory_.size(0), width})
                      : grads.make(index, memory_, {p.B, p.S, width});
  }

  bool on_gpu() const { return memory_.device().type == kCuda; }

  Argument argument(const char* name, PyObject* object) const {
    return Argument(name, object, memory_.device());
  }

  // `window` is (centers, half_width, gaussian). The bounds are those of reference.window_bounds,
  // in the same arithmetic.
  void take_window(PyObject* window) {
    if (!PyTuple_Check(window) || PyTuple_GET_SIZE(window) != 3) {
      throw py::type_error("window must be a tuple (centers, half_width, gaussian)");
    }
    if (on_gpu()) throw py::value_error("the cuda backend has no windows");
    centers_ = argument("window.centers", PyTuple_GET_ITEM(window, 0));
    centers_.check_shape({p.B, p.T}).check_dtype(statistics()).make_contiguous();
    const double half_width = number(PyTuple_GET_ITEM(window, 1));
    bounds_.resize(2 * p.B * p.T);
    statistics() == DType::f64 ? cut_windows<double>(half_width) : cut_windows<float>(half_width);
    p.bounds = bounds_.data();
    if (!PyObject_IsTrue(PyTuple_GET_ITEM(window, 2))) return;
    p.centers = centers_.data();
    p.rate = 2.0 / half_width;  // 1 / sigma
  }

  template <class A>
  void cut_windows(double half_width) {
    const A* centers = static_cast<const A*>(centers_.data());
    for (int64_t row = 0; row < p.B * p.T; ++row) {
      const A low = std::ceil(centers[row] - A(half_width));
      const A high = std::floor(centers[row] + A(half_width)) + A(1);
      const int64_t stop = p.lengths ? p.lengths[row / p.T] : p.S;
      // Written so that NaN gives the whole row.
      const int64_t first = low > A(0) ? low < A(stop) ? int64_t(low) : stop : 0;
      const int64_t last = high < A(stop) ? high > A(first) ? int64_t(high) : first : stop;
      bounds_[2 * row] = first;
      bounds_[2 * row + 1] = last;
    }
  }

  DType statistics() const { return p.dtype == DType::f64 ? DType::f64 : DType::f32; }

  // They stay on the device, and the host does not wait for them: kernels clamp them to 0..S.
  void take_device_lengths(Argument given) {
    given.check_shape({p.B});
    check_integer(given);
    p.device_lengths = given.data();
    p.length_stride = given.stride(0);
    p.length_bytes = given.bits() / 8;
    p.lengths_are_signed = given.code() == TypeCode::integer;
  }

  static void check_integer(const Argument& tensor) {
    const bool byte = tensor.code() == TypeCode::natural && tensor.bits() == 8;
    if (tensor.code() != TypeCode::integer && !byte)
      throw py::type_error("memory_lengths must be an integer Tensor");
  }

  void run_on_gpu() {
#ifdef FUSED_ATTN_CUDA
    Argument workspace;
    if (const int64_t floats = cuda_workspace(p)) {
      workspace = new_empty(memory_, {floats}, DType::f32);
      p.workspace = static_cast<float*>(workspace.data());
    }
    run(cuda_forward);
#endif
  }

  // Checks a copy: the kernels would read out of bounds if another thread changed it afterwards.
  void take_lengths(Argument given) {
    given.check_shape({p.B});
    lengths_.resize(p.B);
    for (int64_t b = 0; b < p.B; ++b) {
      const int64_t length = lengths_[b] = integer_at(given, b);
      if (length < 0 || length > p.S) {
        throw py::value_error("memory_lengths must lie in 0.." + std::to_string(p.S) +
                              " (the source length of memory), got " + std::to_string(length));
      }
    }
    p.lengths = lengths_.data();
  }

  void take_offsets(PyObject* pair) {
    if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2) {
      throw py::type_error("a memory (rows, E) needs a tuple (offsets, longest) for its lengths");
    }
    const Argument given = argument("offsets", PyTuple_GET_ITEM(pair, 0)).check_shape({p.B + 1});
    p.S = PyLong_AsLongLong(PyTuple_GET_ITEM(pair, 1));
    if (p.S == -1 && PyErr_Occurred()) throw py::error_already_set();
    if (p.S < 0 || p.S > kLongest) {
      throw py::value_error("max_source must lie in 0.." + std::to_string(kLongest) + ", got " +
                            std::to_string(p.S));
    }
    starts_.resize(p.B + 1);
    for (int64_t b = 0; b <= p.B; ++b) starts_[b] = integer_at(given, b);
    lengths_.resize(p.B);
    bool fits = starts_[0] == 0 && starts_[p.B] == memory_.size(0);
    for (int64_t b = 0; b < p.B; ++b) {
      lengths_[b] = starts_[b + 1] - starts_[b];
      fits = fits && lengths_[b] >= 0 && lengths_[b] <= p.S;
    }
    if (!fits) {
      throw py::value_error("offsets must rise from 0 to the " + std::to_string(memory_.size(0)) +
                            " rows of memory, by at most " + std::to_string(p.S) + " each");
    }
    p.lengths = lengths_.data();
    p.memory.starts = p.memory_proj.starts = p.memory_exp.starts = starts_.data();
  }

  // Far more than fits in memory, and no product with it overflows. See fused_attn.ops.LONGEST.
  static constexpr int64_t kLongest = int64_t(1) << 40;

  static int64_t integer_at(const Argument& tensor, int64_t index) {
    check_integer(tensor);
    const int64_t at = index * tensor.stride(0);
    const bool is_signed = tensor.code() == TypeCode::integer;
    if (is_signed && tensor.bits() == 64) return static_cast<const int64_t*>(tensor.data())[at];
    if (is_signed && tensor.bits() == 32) return static_cast<const int32_t*>(tensor.data())[at];
    if (is_signed && tensor.bits() == 16) return static_cast<const int16_t*>(tensor.data())[at];
    if (is_signed && tensor.bits() == 8) return static_cast<const int8_t*>(tensor.data())[at];
    return static_cast<const uint8_t*>(tensor.data())[at];
  }

  void run(void (*compute)(const AttentionParams&)) {
    py::gil_scoped_release unlocked;
    compute(p);
  }

  Argument memory_, query_, proj_, exp_, v_, keep_, centers_;
  std::vector<int64_t> lengths_, bounds_, starts_;
  bool is_ragged_ = false;
};

}  // namespace fused_attn
