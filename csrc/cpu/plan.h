// How a call is cut into tasks. A function of the shape alone, never of the number of threads or
// the instruction set, so that the same input gives the same bits whatever runs the tasks.
#pragma once

#include <cstdint>

namespace fused_attn {

struct Plan {
  int64_t t_block;       // queries a task holds at a time
  int64_t t_blocks;      // forward tasks along T; the backward walks them inside a task
  int64_t chunk;         // memory rows that stay in the second-level cache between their two uses
  int64_t segment_rows;  // memory rows of a task, a multiple of chunk
  int64_t segments;      // tasks along S; their partial results are merged in order
};

// The buffers a call shares between its tasks: a piece for each, laid out by sizes.h, but for
// `scores`. `A` stands for the arithmetic type, float or double.
struct Shared {
  void* partial = nullptr;       // forward, segments > 1: what `Partial` says
  void* scores = nullptr;        // A (B, T, S) when weights are wanted and their dtype is not A
  void* grad_query = nullptr;    // backward: what `Sums` says, like the next two
  void* grad_v = nullptr;        // concat
  void* grad_centers = nullptr;  // with centers
};

// Bytes that the kernels want: of a thread's scratch, and of what each task leaves. 0 where a task
// leaves nothing, or writes to the result itself.
struct ForwardSizes {
  int64_t scratch, partial;
};
struct BackwardSizes {
  int64_t scratch, grad_query, grad_v, grad_centers;
};

struct AttentionParams;

// What one instruction set offers. Scratch is private to the thread that runs a task.
struct KernelTable {
  ForwardSizes (*forward_sizes)(const AttentionParams&, const Plan&);
  void (*forward_task)(const AttentionParams&, const Plan&, const Shared&, int64_t, void*);
  void (*forward_merge)(const AttentionParams&, const Plan&, const Shared&, int64_t);
  BackwardSizes (*backward_sizes)(const AttentionParams&, const Plan&);
  void (*backward_task)(const AttentionParams&, const Plan&, const Shared&, int64_t, void*);
  void (*backward_merge)(const AttentionParams&, const Plan&, const Shared&, int64_t);
  void (*backward_merge_v)(const AttentionParams&, const Plan&, const Shared&);
  int64_t (*multiply_adds)();
};

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace fused_attn
