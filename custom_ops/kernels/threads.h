// Spreads work over threads that are not ours: TensorFlow's intra-op pool, or what XLA lends.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels/parallel.h"

namespace accel_tf {

// The ranges of one piece of work. Each thread has a share of its own, of neighbouring ranges, in
// which it finds in its cache what it had for the range before; then it helps the others.
//
// The thread that asks takes part, and waits only for ranges that another one has begun, never for
// a task to start: waking a thread takes longer than many a product, and where all threads of a
// pool wait for tasks to start, they wait forever. So a task may also start when everything is long
// done; it then finds no range, and leaves `work`, which is gone, alone.
class Ranges {
 public:
  Ranges(int64_t total, int64_t count, int64_t threads, const Work& work)
      : work_(work), size_((total + count - 1) / count), missing_(total), shares_(threads) {
    for (int64_t i = 0; i < threads; ++i) {
      shares_[i].next = total * i / threads;
      shares_[i].end = total * (i + 1) / threads;
    }
  }

  void TakeAll() {
    const size_t first = arrived_.fetch_add(1);
    for (size_t i = 0; i < shares_.size(); ++i) TakeAll(shares_[(first + i) % shares_.size()]);
  }

  void Wait() {
    // What is missing has begun, and is soon done: sleeping would take longer than it does.
    for (int i = 0; i < 200; ++i) {
      if (missing_.load() == 0) return;
      std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return missing_.load() == 0; });
  }

 private:
  struct Share {
    std::atomic<int64_t> next;
    int64_t end;
  };

  void TakeAll(Share& share) {
    // `next` cannot overflow: each thread adds to it at most once after the last range.
    for (int64_t begin; (begin = share.next.fetch_add(size_)) < share.end;) {
      const int64_t end = std::min(begin + size_, share.end);
      work_(begin, end);
      if (missing_.fetch_sub(end - begin) == end - begin) {
        const std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
    }
  }

  const Work& work_;
  const int64_t size_;
  std::atomic<int64_t> missing_;
  std::atomic<size_t> arrived_{0};
  std::vector<Share> shares_;
  std::mutex mutex_;
  std::condition_variable done_;
};

// `pool` has num_threads() and Schedule(task), and must outlive what is returned.
template <class Pool>
ParallelFor OnThreads(Pool& pool) {
  return [&pool](int64_t total, int64_t cost, const Work& work) {
    // Fewer cycles than this are not worth a range; more ranges than threads balance them.
    constexpr double kCyclesPerRange = 10000;
    constexpr int64_t kRangesPerThread = 16;
    if (total <= 0) return;
    const int64_t threads = pool.num_threads();
    const double worthwhile = static_cast<double>(total) * cost / kCyclesPerRange;
    const int64_t most = std::min(total, threads * kRangesPerThread);
    const int64_t count = worthwhile < most ? static_cast<int64_t>(worthwhile) : most;
    if (threads < 2 || count < 2) return work(0, total);
    const auto ranges = std::make_shared<Ranges>(total, count, std::min(threads, count), work);
    for (int64_t i = 1; i < std::min(threads, count); ++i) {
      pool.Schedule([ranges] { ranges->TakeAll(); });
    }
    ranges->TakeAll();
    ranges->Wait();
  };
}

}  // namespace accel_tf
