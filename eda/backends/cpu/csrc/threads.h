// A pool of threads that run one function together, with a barrier between its phases.
//
// A pass has some hundred phases of a few microseconds each, so waiting is spinning. A thread that waits longer sleeps: a
// sleeper is woken within microseconds, ahead of processes of lower priority, while `sched_yield` hands its core even to
// those for a whole tick of the system's clock.
#pragma once

#include <unistd.h>
#if defined(__linux__) && !defined(EDA_SCALAR)
#include <linux/futex.h>
#include <sys/syscall.h>
#define EDA_FUTEX 1
#endif

#include <atomic>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "governor.h"

namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A number that threads wait for to change.
class alignas(64) Signal {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }

  // Whoever registers as a sleeper after the second line finds the new value when it goes to sleep.
  void raise() {
    value_.fetch_add(1);
    if (sleepers_.load()) wake();
  }

  // Returns once the value is not `seen`, and how many nanoseconds of that were spent asleep.
  int64_t wait(uint32_t seen, int spins) {
    for (; spins; --spins) {
      if (value() != seen) return 0;
      pause();
    }
    const int64_t start = nanoseconds();
    sleepers_.fetch_add(1);
    while (value() == seen) sleep(seen);
    sleepers_.fetch_sub(1);
    return nanoseconds() - start;
  }

 private:
#if EDA_FUTEX
  void wake() { syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
  void sleep(uint32_t seen) { syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0); }
#else
  void wake() {
    std::lock_guard<std::mutex> guard(lock_);  // none may be between its look at the value and its sleep
    changed_.notify_all();
  }
  void sleep(uint32_t seen) {
    std::unique_lock<std::mutex> guard(lock_);
    changed_.wait(guard, [&] { return value() != seen; });
  }
  std::mutex lock_;
  std::condition_variable changed_;
#endif
  std::atomic<uint32_t> value_{0};
  std::atomic<int> sleepers_{0};
};

class Pool {
 public:
  explicit Pool(int size) : size_(size), process_(getpid()), governor_(size) {
    for (int rank = 1; rank < size; ++rank) std::thread([this, rank] { serve(rank); }).detach();
  }

  int size() const { return size_; }
  bool belongs_here() const { return process_ == getpid(); }  // threads do not survive a fork
  Governor& governor() { return governor_; }

  // Runs `work(rank)` on every thread, the caller being rank 0; returns when all are done.
  void run(const std::function<void(int)>& work) {
    if (size_ > 1) {
      work_ = &work;
      epoch_.raise();
    }
    work(0);
    if (size_ > 1) barrier();
  }

  // Every thread must come here before any goes on.
  void barrier() {
    if (size_ == 1) return;
    const uint32_t turn = turn_.value();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.raise();
    } else if (const int64_t slept = turn_.wait(turn, PAUSES_IN_PASS)) {
      lose(slept);
    }
  }

  void lose(int64_t slept) { lost_.fetch_add(slept, std::memory_order_relaxed); }

  // Nanoseconds that each thread has slept at barriers since the last call: all wait for the last one.
  int64_t take_lost() {
    if (size_ == 1 || !lost_.load(std::memory_order_relaxed)) return 0;
    return lost_.exchange(0, std::memory_order_relaxed) / (size_ - 1);
  }

 private:
  // About 0.1 and 0.5 ms. Between two passes other code runs for some tenths of a millisecond.
  static constexpr int PAUSES_IN_PASS = 2000, PAUSES_BETWEEN = 10000;

  void serve(int rank) {
    for (uint32_t seen = 0;; ++seen) {
      epoch_.wait(seen, PAUSES_BETWEEN);
      (*work_)(rank);
      barrier();
    }
  }

  const int size_;
  const pid_t process_;
  const std::function<void(int)>* work_ = nullptr;
  Signal epoch_, turn_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> lost_{0};
  Governor governor_;  // of passes that ask for this many threads
};

// One pass runs at a time: hold `pool_lock` around it.
inline std::mutex& pool_lock() {
  static std::mutex lock;
  return lock;
}

// The pool of exactly `size` threads of this process.
inline Pool& exact_pool(int size) {
  static std::vector<Pool*> pools;  // never destroyed: their threads may still be running at exit
  for (Pool* pool : pools)
    if (pool->size() == size && pool->belongs_here()) return *pool;
  pools.push_back(new Pool(size));
  return *pools.back();
}

// The pool for a pass that may have `size` threads: fewer while other processes hold the cores.
inline Pool& pool_of(int size) {
  Pool& full = exact_pool(size);
  Governor& governor = full.governor();
  const int64_t lost = (governor.threads() == size ? full : exact_pool(governor.threads())).take_lost();
  if (governor.at_rest(lost)) return full;
  return exact_pool(governor.next(nanoseconds(), lost));
}

}  // namespace
