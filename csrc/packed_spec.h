// From Python's description of a model, a dict of tensors, to a packed Model.
#pragma once

#include <pybind11/pybind11.h>

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "cpu/decoder/model.h"
#include "cpu/decoder/pack.h"
#include "tensor_exchange.h"

namespace fused_attn {

inline py::object entry_of(const py::dict& spec, const char* name) {
  if (!spec.contains(name)) throw py::value_error(std::string("the model lacks ") + name);
  return spec[name];
}

// The place of the entry `name` in a list of names, as an enumeration.
template <class T>
T choice(const py::dict& spec, const char* name, std::initializer_list<const char*> names) {
  const std::string given = py::str(entry_of(spec, name));
  int32_t number = 0;
  std::string known;
  for (const char* each : names) {
    if (given == each) return T(number);
    known += (number++ ? ", " : "") + std::string(each);
  }
  throw py::value_error(std::string(name) + " must be one of " + known + ", got '" + given + "'");
}

// A model with the memory that it points to.
class PackedModel {
 public:
  // `spec` describes a model; see fused_attn.packed. Raises TypeError or ValueError, which name
  // the tensor, if one does not fit the others.
  explicit PackedModel(const py::dict& spec);

  const Model& model() const { return model_; }
  int64_t bytes() const { return bytes_; }

 private:
  void take_attention(const py::dict& spec);
  void take_score(const py::dict& spec, const std::string& score);
  void take_encoder(const py::dict& spec);
  void take_bridge(const py::dict& spec);
  RecurrentLayer layer_of(const py::tuple& tensors, const Embedding& table, int64_t width,
                          int64_t fed, int64_t hidden, const std::string& name);

  Embedding embedding_of(const py::object& tensor, const std::string& name);
  // A float32 tensor of these sizes; -1 takes any. Its memory is that of the tensor.
  Argument matrix_of(const py::handle& tensor, const std::string& name, int64_t rows,
                     int64_t columns);
  // A copy of a vector (size), or null for None.
  const float* vector_of(const py::handle& tensor, const std::string& name, int64_t size);
  // The same for the entry `name`, which must not be None.
  const float* needed_vector(const py::dict& spec, const char* name, int64_t size);
  // Columns [first, first + count) of a matrix, packed; transposed if asked for.
  PackedMatrix packed(const Argument& matrix, int64_t first, int64_t count);
  PackedMatrix packed_transpose(const Argument& matrix, float factor);
  PackedMatrix kept(const PackedWeights& weights);
  float* own(int64_t count);

  // What model_ points to; it owns this too.
  struct Memory {
    WeightMemory matrices;
    std::vector<std::unique_ptr<float[]>> vectors;
  };

  std::shared_ptr<Memory> memory_ = std::make_shared<Memory>();
  Model model_;
  std::deque<std::string> names_;  // those that an Argument points to
  int64_t bytes_ = 0;
};

}  // namespace fused_attn
