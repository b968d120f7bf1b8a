#include "helpers.h"

#include <signal.h>

#include <chrono>
#include <system_error>
#include <thread>

#include "../parallel.h"

namespace fused_attn {

Helpers& Helpers::of_process() {
  static Helpers* const helpers = new Helpers;  // never destroyed: its threads never end
  return *helpers;
}

void Helpers::send(int count, const std::shared_ptr<Team>& team) {
  if (is_forked()) return;  // the threads, and perhaps a locked mutex, are those of the parent
  const std::lock_guard<std::mutex> lock(mutex_);
  while (int(threads_.size()) < count && int(free_.size()) < count)
    if (!add_thread()) break;
  for (int number = 0; number < count && !free_.empty(); ++number) {
    Thread& thread = *free_.back();
    free_.pop_back();
    {
      const std::lock_guard<std::mutex> own(thread.mutex);
      thread.team = team;
      thread.number = number;
      thread.has_team.store(true, std::memory_order_release);
    }
    thread.wake.notify_one();
  }
}

// Signals are left to the threads of the program. False if there can be no more threads.
bool Helpers::add_thread() {
  threads_.push_back(std::make_unique<Thread>());
  Thread* const thread = threads_.back().get();
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  bool is_made = true;
  try {
    std::thread([this, thread] { work(*thread); }).detach();
  } catch (const std::system_error&) {
    is_made = false;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (is_made)
    free_.push_back(thread);
  else
    threads_.pop_back();
  return is_made;
}

void Helpers::work(Thread& self) {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::milliseconds kAwake{1};  // from one word to the next; waking takes 0.05 ms
  for (;;) {
    const auto end = Clock::now() + kAwake;
    for (int64_t turn = 0; !self.has_team.load(std::memory_order_acquire); ++turn) {
      wait_a_turn(turn);
      if (turn % 32 == 0 && Clock::now() > end) break;
    }
    std::shared_ptr<Team> team;
    int number = 0;
    {
      std::unique_lock<std::mutex> own(self.mutex);
      self.wake.wait(own, [&] { return self.has_team.load(std::memory_order_relaxed); });
      self.has_team.store(false, std::memory_order_relaxed);
      team = std::move(self.team);
      number = self.number;
    }
    team->help(number);
    team.reset();
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(&self);
  }
}

}  // namespace fused_attn
