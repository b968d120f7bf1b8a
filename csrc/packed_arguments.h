// From Python's arguments of a call to what the native decoder reads. Everything is checked and
// copied, or kept alive: other threads of Python run during the call.
#pragma once

#include <string>
#include <vector>

#include "cpu/decoder/blocks.h"
#include "packed_spec.h"
#include "tensor_exchange.h"

namespace fused_attn {

using Models = std::vector<const PackedModel*>;

// The numbers of an int64 matrix (rows, columns). Raises TypeError or ValueError.
std::vector<int64_t> integer_matrix(const char* name, const py::handle& tensor, int64_t& rows,
                                    int64_t& columns);
// Those of an int64 vector (size).
std::vector<int64_t> integer_vector(const char* name, const py::handle& tensor, int64_t size);
// Raises ValueError unless all lie in low..high.
void check_range(const char* name, const std::vector<int64_t>& values, int64_t low, int64_t high);

// The sources of a call: symbols, or a memory with the states of the decoder.
struct Sources {
  SourceRows rows;
  std::vector<int64_t> ids;
  std::vector<Argument> tensors;
};

// source int64 (B, S), lengths int64 (B), in 1..S.
Sources symbols_of(const Models& models, const py::handle& source, const py::handle& lengths);

// memory (B, S, E) or None, lengths (B) or None, state (hidden, cell, attentional, coverage,
// position): four tensors or None, and a number. `count` is B.
Sources memory_of(const PackedModel& packed, const py::handle& memory, const py::handle& lengths,
                  const py::tuple& state, int64_t count);

// Raises ValueError unless these models can search together.
void check_ensemble(const Models& models);

// The fields of fused_attn.seq2seq.SearchConfig.
SearchOptions options_of(const py::dict& given);

}  // namespace fused_attn
