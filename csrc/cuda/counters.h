// The allocation of the counters that find the last block of a row.
//
// A device has one array of counters, zero when the module is loaded and zero again after every
// launch, so that no call has to clear them. Launches that may run at the same time must not share
// counters:
//
// - Launches on one stream run one after the other: a stream has one range for all its calls.
// - A call captured into a graph runs wherever and whenever the graph is launched: it gets its own
//   range, which is never freed. (The launches of one graph run one after the other.)
//
// When no counters are left, a call clears some in its workspace, at the cost of one more operation
// on its stream.
#pragma once

#include <cstdint>
#include <mutex>
#include <unordered_map>

#include "plan.h"

namespace fused_attn {

class CounterSlots {
 public:
  CounterSlots(int streams, int captured)
      : streams_(streams), end_(int64_t(streams) * kCountersPerCall + captured) {
    next_captured_ = int64_t(streams) * kCountersPerCall;
  }

  // The first of `count` counters, or -1 if none are left. `stream` is a number that no other
  // stream of this process has or ever had.
  int64_t take(uint64_t stream, bool capturing, int64_t count) {
    const std::lock_guard<std::mutex> locked(mutex_);
    if (capturing) {
      if (next_captured_ + count > end_) return -1;
      next_captured_ += count;
      return next_captured_ - count;
    }
    const auto found = by_stream_.find(stream);
    if (found != by_stream_.end()) return found->second;
    if (int64_t(by_stream_.size()) >= streams_) return -1;
    const int64_t first = int64_t(by_stream_.size()) * kCountersPerCall;
    by_stream_.emplace(stream, first);
    return first;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<uint64_t, int64_t> by_stream_;
  int64_t streams_, end_, next_captured_;
};

}  // namespace fused_attn
