// How many threads a pass gets while other processes want the cores too.
//
// Threads that meet at a hundred barriers a pass are as slow as the one that the system has just put aside, usually for
// milliseconds. One thread alone waits for nobody: it is slower on a quiet machine and many times faster on a busy one.
// Results do not depend on the number of threads, so it may change from pass to pass.
#pragma once

#include <algorithm>
#include <cstdint>

namespace {

class Governor {
 public:
  explicit Governor(int full) : full_(full), threads_(full) {}

  int threads() const { return threads_; }

  // Whether `next` would change nothing, so that the clock need not be read.
  bool at_rest(int64_t lost) const { return threads_ == full_ && !lost && level_ == 0; }

  // The number of threads of the next pass, at `now`, when each thread of the passes since the last call has lost `lost`
  // nanoseconds in waiting that work alone does not explain.
  int next(int64_t now, int64_t lost) {
    // Losses fill a bucket that runs dry at the rate that half of the threads would cost: what is lost more slowly than
    // that is better borne.
    level_ = std::max<int64_t>(0, level_ - int64_t(WORTH * double(now - seen_))) + lost;
    seen_ = now;
    if (level_ > LIMIT && threads_ > 1) {
      hold_ = now - tried_ > 4 * hold_ ? SHORTEST : std::min(2 * hold_, LONGEST);
      threads_ /= 2;
      until_ = now + hold_;
      level_ = LIMIT - TRIAL;
    } else if (threads_ < full_ && now >= until_) {
      threads_ = std::min(full_, 2 * threads_);
      tried_ = now;
      until_ = now + hold_;
      level_ = LIMIT - TRIAL;
    }
    return threads_;
  }

 private:
  static constexpr double WORTH = 0.3;
  static constexpr int64_t MILLISECOND = 1000000;
  static constexpr int64_t LIMIT = 6 * MILLISECOND;  // more than one turn of another process, which may be the only one
  static constexpr int64_t TRIAL = 1 * MILLISECOND;  // what a larger number may lose when it was too large just before
  static constexpr int64_t SHORTEST = 5 * MILLISECOND, LONGEST = 500 * MILLISECOND;  // until the next trial

  const int full_;
  int threads_;
  int64_t level_ = 0, seen_ = 0, tried_ = 0, until_ = 0, hold_ = SHORTEST;
};

}  // namespace
