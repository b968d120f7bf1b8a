#include "helpers.h"

#include <signal.h>

#include <algorithm>
#include <chrono>
#include <thread>

namespace fused_attn {

#if defined(__linux__)
Cores Cores::of_thread() {
  Cores cores;
  CPU_ZERO(&cores.set_);
  cores.is_known_ = sched_getaffinity(0, sizeof cores.set_, &cores.set_) == 0;
  return cores;
}
int Cores::count() const {
  return is_known_ ? CPU_COUNT(&set_) : std::max(1, int(std::thread::hardware_concurrency()));
}
void Cores::apply() const {
  if (is_known_) sched_setaffinity(0, sizeof set_, &set_);
}
bool Cores::operator==(const Cores& other) const {
  return is_known_ == other.is_known_ && (!is_known_ || CPU_EQUAL(&set_, &other.set_));
}
#else
Cores Cores::of_thread() { return {}; }
int Cores::count() const { return std::max(1, int(std::thread::hardware_concurrency())); }
void Cores::apply() const {}
bool Cores::operator==(const Cores&) const { return true; }
#endif

Helpers& Helpers::of_process() {
  static Helpers* const helpers = new Helpers;  // never destroyed: its threads never end
  return *helpers;
}

void Helpers::send(int count, const std::shared_ptr<Team>& team) {
  const Cores cores = Cores::of_thread();
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
      thread.cores = cores;
      thread.has_team.store(true, std::memory_order_release);
    }
    thread.wake.notify_one();
  }
}

// Helpers block all signals except those of their own faults; the threads of the program handle the
// others. False if no more threads can be made.
bool Helpers::add_thread() {
  threads_.push_back(std::make_unique<Thread>());
  free_.reserve(threads_.size());  // nothing after it allocates
  Thread* const thread = threads_.back().get();
  sigset_t others, before;
  sigfillset(&others);
  for (const int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&others, own);
  pthread_sigmask(SIG_SETMASK, &others, &before);
  bool is_made = true;
  try {
    std::thread([this, thread] { work(*thread); }).detach();
  } catch (...) {
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
  Cores cores = Cores::of_thread();
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::milliseconds kAwake{1};  // from one word to the next; waking takes 0.05 ms
  for (;;) {
    const auto end = Clock::now() + kAwake;
    for (int64_t turn = 0; !self.has_team.load(std::memory_order_acquire); ++turn) {
      spin_or_yield(turn);
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
      if (!(cores == self.cores)) (cores = self.cores).apply();
    }
    team->help(number);
    team.reset();
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(&self);
  }
}

}  // namespace fused_attn
