// Tasks over the threads of OpenMP.
#pragma once

#include <cstdint>
#include <functional>

namespace fused_attn {

// Runs body(i) for i in [0, n). Which thread runs a task must not change its result. The first
// exception of a task is thrown when all threads have stopped; tasks that have not begun are left
// out then.
void parallel_for(int64_t n, int threads, const std::function<void(int64_t)>& body);

// Whether this process is a fork. A fork does not copy the threads of the pool: a parallel region
// in the child would wait for them forever. `parallel_for` then runs on the calling thread.
bool is_forked();

}  // namespace fused_attn
