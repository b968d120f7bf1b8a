// Guards after the pieces of shared buffers and of scratch, in debug builds: bytes that nothing
// may touch. AddressSanitizer reports any access at once, reads included; without it a changed
// guard aborts the process when it is checked.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(FUSED_ATTN_GUARDS) && defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fused_attn {
namespace {

#if defined(FUSED_ATTN_GUARDS)
constexpr int64_t kGuardBytes = 64;
#else
constexpr int64_t kGuardBytes = 0;  // the functions below are then not called
#endif
constexpr unsigned char kGuardByte = 0xff;  // NaN as a float, so that using one shows in a result

// Fills `bytes` of a fresh piece, and sets the guard after it, up to `end`.
[[maybe_unused]] static inline void set_guard(char* piece, int64_t bytes, char* end) {
#if defined(FUSED_ATTN_GUARDS) && defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(piece, size_t(end - piece));
  memset(piece, kGuardByte, size_t(bytes));
  __asan_poison_memory_region(piece + bytes, size_t(end - piece - bytes));
#else
  (void)bytes;
  memset(piece, kGuardByte, size_t(end - piece));
#endif
}

[[maybe_unused]] static inline void check_guard([[maybe_unused]] const char* piece,
                                                [[maybe_unused]] int64_t bytes,
                                                [[maybe_unused]] const char* end) {
#if !defined(__SANITIZE_ADDRESS__)
  for (const char* at = piece + bytes; at < end; ++at) {
    if (static_cast<unsigned char>(*at) == kGuardByte) continue;
    fprintf(stderr, "fused_attn: a kernel wrote %lld bytes past the end of a piece of %lld bytes\n",
            static_cast<long long>(at - piece - bytes), static_cast<long long>(bytes));
    abort();
  }
#endif
}

// Before memory is freed: it may be reused by code without guards.
[[maybe_unused]] static inline void lift_guards([[maybe_unused]] void* data,
                                                [[maybe_unused]] int64_t bytes) {
#if defined(FUSED_ATTN_GUARDS) && defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(data, size_t(bytes));
#endif
}

}  // namespace
}  // namespace fused_attn
