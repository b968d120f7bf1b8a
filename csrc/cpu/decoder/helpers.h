// The threads that help the leaders of teams. OpenMP has none for this: it ends a region when its
// last thread has arrived, however late that is, and gives each calling thread a pool of its own.
#pragma once

#if defined(__linux__)
#include <sched.h>
#endif

#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "team.h"

namespace fused_attn {

// The cores that a thread may run on.
class Cores {
 public:
  static Cores of_thread();
  int count() const;   // at least 1
  void apply() const;  // moves the calling thread to them
  bool operator==(const Cores& other) const;

 private:
#if defined(__linux__)
  cpu_set_t set_;
  bool is_known_ = false;  // false with more cores than the set has places
#endif
};

class Helpers {
 public:
  // Those of this process. They live until it ends.
  static Helpers& of_process();

  // Sends up to `count` free threads to a team, where they help until it dismisses them. There are
  // as many threads as the largest count so far, so leaders at the same time share them. They run
  // on the cores of the calling thread.
  void send(int count, const std::shared_ptr<Team>& team);

 private:
  struct Thread {
    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<bool> has_team{false};
    std::shared_ptr<Team> team;
    int number = 0;
    Cores cores;
  };

  bool add_thread();
  void work(Thread& self);

  std::mutex mutex_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Thread*> free_;  // the last one is the one that was freed last
};

}  // namespace fused_attn
