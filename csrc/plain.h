// Whether arguments are of the usual kind, in a tenth of the time that Python would take to check.
#pragma once

#include "tensor_exchange.h"

namespace fused_attn {

// Whether `object` is an ordinary tensor, readable by its pointer and strides: not of a subclass,
// dense, on the CPU or a GPU, without a lazy negation. None is not one.
inline bool is_plain(PyObject* object, TensorView& view) {
  if (!is_exact_tensor(object) || !look_at(object, view)) return false;
  const int32_t device = view.device_type;
  if (device != kCpu && device != kCuda && device != kRocm) return false;
  bool is_empty = false;
  for (int dim = 0; dim < view.ndim; ++dim) is_empty = is_empty || view.shape[dim] == 0;
  if (!view.data && !is_empty) return false;  // torch._efficientzerotensor has no memory
  const TypeCode code = TypeCode(view.code);
  const bool is_number = code != TypeCode::boolean && code != TypeCode::natural;
  return !is_number || !is_negated(object);
}

inline bool are_plain(PyObject* const* objects, Py_ssize_t count) {
  TensorView view;
  for (Py_ssize_t i = 0; i < count; ++i)
    if (objects[i] != Py_None && !is_plain(objects[i], view)) return false;
  return true;
}

inline bool is_float(const TensorView& view) {
  const bool real = TypeCode(view.code) == TypeCode::real;
  return (real && (view.bits == 16 || view.bits == 32 || view.bits == 64)) ||
         (TypeCode(view.code) == TypeCode::bfloat && view.bits == 16);
}

// Lengths (B,), or None.
inline bool are_usual_lengths(PyObject* object, int64_t batch) {
  if (object == Py_None) return true;
  TensorView view;
  if (!is_plain(object, view) || view.device_type != kCpu) return false;
  const TypeCode code = TypeCode(view.code);
  const bool is_integer =
      code == TypeCode::integer || (code == TypeCode::natural && view.bits == 8);
  return is_integer && view.ndim == 1 && view.shape[0] == batch;
}

// A mask (B, S), (B, 1, S) or (B, T, S), or None.
inline bool is_usual_mask(PyObject* object, int64_t batch, int64_t queries, int64_t source) {
  if (object == Py_None) return true;
  TensorView view;
  if (!is_plain(object, view) || view.device_type != kCpu) return false;
  if (TypeCode(view.code) != TypeCode::boolean || view.bits != 8) return false;
  if (view.ndim != 2 && view.ndim != 3) return false;
  const bool fits = view.shape[0] == batch && view.shape[view.ndim - 1] == source;
  return fits && (view.ndim == 2 || view.shape[1] == 1 || view.shape[1] == queries);
}

// Whether the arguments of a call on the CPU fit together, except for their widths: query (B, T, D)
// or (B, D), memory (B, S, E), lengths and mask. See fused_attn.checks.is_usual.
inline bool is_usual(PyObject* const* a) {
  TensorView query, memory;
  if (!is_plain(a[0], query) || !is_plain(a[1], memory)) return false;
  if (query.device_type != kCpu || memory.device_type != kCpu) return false;
  if (!is_float(memory) || query.code != memory.code || query.bits != memory.bits) return false;
  if (memory.ndim != 3 || (query.ndim != 2 && query.ndim != 3)) return false;
  if (query.shape[0] != memory.shape[0]) return false;
  if (query.shape[query.ndim - 1] < 1 || memory.shape[2] < 1) return false;
  const int64_t queries = query.ndim == 3 ? query.shape[1] : 1;
  return are_usual_lengths(a[2], memory.shape[0]) &&
         is_usual_mask(a[3], memory.shape[0], queries, memory.shape[1]);
}

}  // namespace fused_attn
