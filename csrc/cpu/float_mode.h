// How a thread rounds and treats subnormals. torch.set_flush_denormal and the like set it for one
// thread only, and the threads that help it must compute the same bits.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fused_attn {

class FloatMode {
 public:
  static FloatMode of_thread() { return FloatMode(read()); }
  void apply() const { write(bits_); }
  bool operator==(const FloatMode& other) const { return bits_ == other.bits_; }

 private:
  explicit FloatMode(uint64_t bits) : bits_(bits) {}

#if defined(__x86_64__)
  static constexpr unsigned kExceptions = 0x3f;  // those that happened; not a mode
  static uint64_t read() { return _mm_getcsr() & ~kExceptions; }
  static void write(uint64_t bits) { _mm_setcsr(unsigned(bits)); }
#elif defined(__aarch64__)
  static uint64_t read() {
    uint64_t bits;
    __asm__ volatile("mrs %0, fpcr" : "=r"(bits));
    return bits;
  }
  static void write(uint64_t bits) { __asm__ volatile("msr fpcr, %0" : : "r"(bits)); }
#else
  static uint64_t read() { return 0; }
  static void write(uint64_t) {}
#endif

  uint64_t bits_;
};

// Sets the mode of this thread until the end of a block.
class WithFloatMode {
 public:
  explicit WithFloatMode(FloatMode mode) : before_(FloatMode::of_thread()), mode_(mode) {
    if (!(before_ == mode_)) mode_.apply();
  }
  ~WithFloatMode() {
    if (!(before_ == mode_)) before_.apply();
  }
  WithFloatMode(const WithFloatMode&) = delete;
  WithFloatMode& operator=(const WithFloatMode&) = delete;

 private:
  const FloatMode before_, mode_;
};

}  // namespace fused_attn
