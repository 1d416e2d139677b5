// A pool of threads that run one function together, with a barrier between its phases.
//
// A pass has some hundred phases of a few microseconds each, so waiting is spinning; a thread that waits longer gives
// its core away, and after two milliseconds without work it sleeps.
#pragma once

#include <immintrin.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
 public:
  explicit Pool(int size) : size_(size), process_(getpid()) {
    for (int rank = 1; rank < size; ++rank) std::thread([this, rank] { serve(rank); }).detach();
  }

  int size() const { return size_; }
  bool belongs_here() const { return process_ == getpid(); }  // threads do not survive a fork

  // Runs `work(rank)` on every thread, the caller being rank 0; returns when all are done.
  void run(const std::function<void(int)>& work) {
    if (size_ > 1) {
      work_ = &work;
      {
        std::lock_guard<std::mutex> lock(sleep_);
        epoch_.fetch_add(1, std::memory_order_release);
      }
      if (sleeping_.load(std::memory_order_acquire)) wake_.notify_all();
    }
    work(0);
    if (size_ > 1) barrier();
  }

  // Every thread must come here before any goes on.
  void barrier() {
    if (size_ == 1) return;
    const int turn = turn_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
      if (spins < 2000) _mm_pause(); else sched_yield();
    }
  }

 private:
  void serve(int rank) {
    unsigned seen = 0;
    for (;;) {
      auto since = std::chrono::steady_clock::now();
      for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen; ++spins) {
        if (spins < 2000) { _mm_pause(); continue; }
        sched_yield();
        if (std::chrono::steady_clock::now() - since < std::chrono::milliseconds(2)) continue;
        std::unique_lock<std::mutex> lock(sleep_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return epoch_.load() != seen; });
        sleeping_.fetch_sub(1);
      }
      ++seen;
      (*work_)(rank);
      barrier();
    }
  }

  const int size_;
  const pid_t process_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<unsigned> epoch_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> turn_{0};
  std::atomic<int> sleeping_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
};

// The pool of `size` threads of this process. One pass runs at a time: hold `pool_lock` around it.
inline std::mutex& pool_lock() {
  static std::mutex lock;
  return lock;
}

inline Pool& pool_of(int size) {
  static std::vector<Pool*> pools;  // never destroyed: their threads may still be running at exit
  for (Pool* pool : pools)
    if (pool->size() == size && pool->belongs_here()) return *pool;
  pools.push_back(new Pool(size));
  return *pools.back();
}
