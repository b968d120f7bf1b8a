// Stopping a call of the native decoder between two steps.
#pragma once

#include <atomic>
#include <chrono>
#include <exception>
#include <thread>

namespace fused_attn {

// Throws if the call must stop, such as after Ctrl-C. The thread that makes a call runs it between
// steps, every tenth of a second; null never stops.
using Check = void (*)();

// Stops all blocks of a call when its check throws.
class Interruption {
 public:
  explicit Interruption(Check check) : check_(check) {}

  // Called before each step of a block.
  void poll() {
    if (is_stopped_) std::rethrow_exception(error_);
    if (!check_ || std::this_thread::get_id() != caller_) return;
    const auto now = std::chrono::steady_clock::now();
    if (now < next_) return;
    next_ = now + kPause;
    try {
      check_();
    } catch (...) {
      error_ = std::current_exception();
      is_stopped_ = true;
      throw;
    }
  }

 private:
  static constexpr std::chrono::milliseconds kPause{100};

  const Check check_;
  const std::thread::id caller_ = std::this_thread::get_id();
  std::chrono::steady_clock::time_point next_ = std::chrono::steady_clock::now() + kPause;
  std::exception_ptr error_;
  std::atomic<bool> is_stopped_{false};
};

}  // namespace fused_attn
