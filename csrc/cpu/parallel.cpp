#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

#include "float_mode.h"

namespace fused_attn {
namespace {

std::atomic<bool> forked{false};
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool is_forked() { return forked; }

void parallel_for(int64_t n, int threads, const std::function<void(int64_t)>& body) {
  if (threads <= 1 || n <= 1 || forked) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex mutex;
  const FloatMode mode = FloatMode::of_thread();
#pragma omp parallel num_threads(int(std::min<int64_t>(threads, n)))
  {
    const WithFloatMode same(mode);
    for (int64_t i = next++; i < n; i = next++) {
      try {  // nothing may leave a parallel region
        body(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
        next = n;
      }
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace fused_attn
