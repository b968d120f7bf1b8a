// Memory of a block: arrays that outlive the call in their thread, so that the system does not have
// to clear fresh pages for every word.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../guard.h"
#include "../plan.h"

namespace fused_attn {

// Gives out pieces of large chunks. All pieces are valid until `reset`.
class Arena {
 public:
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = round_up(count * int64_t(sizeof(T)), 64);
    while (chunk_ < chunks_.size() && used_ + bytes > chunks_[chunk_].size) {
      ++chunk_;
      used_ = 0;
    }
    if (chunk_ == chunks_.size()) add(bytes > kChunkBytes ? bytes : kChunkBytes);
    void* piece = chunks_[chunk_].data.get() + used_;
    used_ += bytes;
    if (kGuardBytes) std::memset(piece, kGuardByte, size_t(bytes));  // NaN, so that a use shows
    return static_cast<T*>(piece);
  }

  // Makes all pieces free again; keeps memory up to a limit.
  void reset() {
    int64_t kept = 0;
    size_t count = 0;
    while (count < chunks_.size() && kept + chunks_[count].size <= kKeptBytes)
      kept += chunks_[count++].size;
    chunks_.resize(count);
    chunk_ = 0;
    used_ = 0;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  struct Chunk {
    std::unique_ptr<char, Free> data;
    int64_t size = 0;
  };
  static constexpr int64_t kChunkBytes = 1 << 20;
  static constexpr int64_t kKeptBytes = 32 << 20;

  void add(int64_t bytes) {
    std::unique_ptr<char, Free> data(static_cast<char*>(std::aligned_alloc(64, size_t(bytes))));
    if (!data) throw std::bad_alloc();
    chunks_.push_back({std::move(data), bytes});
    used_ = 0;
  }

  std::vector<Chunk> chunks_;
  size_t chunk_ = 0;
  int64_t used_ = 0;
};

}  // namespace fused_attn
