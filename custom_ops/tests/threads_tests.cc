// Tests of how work is spread over a pool of threads that is not ours: each unit is done once,
// whenever the pool starts its tasks, if it ever does.
#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "kernels/threads.h"
#include "tests/testing.h"

namespace accel_tf {
namespace {

// Starts each task in a thread of its own.
struct EagerPool {
  std::vector<std::thread> threads;
  int64_t num_threads() const { return 4; }
  template <class Task>
  void Schedule(Task task) {
    threads.emplace_back(task);
  }
  ~EagerPool() {
    for (std::thread& thread : threads) thread.join();
  }
};

// Starts tasks when it is destroyed, which is long after the work was done: a busy pool.
struct LatePool {
  std::vector<std::function<void()>> tasks;
  int64_t num_threads() const { return 4; }
  template <class Task>
  void Schedule(Task task) {
    tasks.push_back(task);
  }
  ~LatePool() {
    for (const auto& task : tasks) task();
  }
};

// A pool that has no thread to lend, and would not run a task.
struct NoPool {
  int64_t num_threads() const { return 0; }
  template <class Task>
  void Schedule(Task) {
    EXPECT(false, "a task for no thread");
  }
};

template <class Pool>
void TestEachUnitIsDoneOnce(const char* name) {
  for (const int64_t total : {0, 1, 2, 3, 4, 5, 15, 16, 17, 1000}) {
    for (const int64_t cost : {int64_t{0}, int64_t{100}, int64_t{1000000}, INT64_MAX}) {
      std::vector<std::atomic<int>> times(total);
      std::atomic<bool> done{false};
      Pool pool;
      {
        const Work work = [&](int64_t begin, int64_t end) {
          EXPECT(!done, "%s: work after the end", name);
          EXPECT(begin < end, "%s: range [%ld, %ld)", name, long(begin), long(end));
          for (int64_t i = begin; i < end; ++i) ++times[i];
        };
        OnThreads(pool)(total, cost, work);
      }
      done = true;
      for (int64_t i = 0; i < total; ++i) {
        EXPECT(times[i] == 1, "%s: unit %ld of %ld at cost %ld was done %d times", name, long(i),
               long(total), long(cost), times[i].load());
      }
    }
  }
}

// Work that asks for threads itself, as when each thread of a pool runs a handler.
void TestNested() {
  EagerPool pool;
  std::atomic<int> units{0};
  std::mutex mutex;  // the pool's own list of threads is guarded by nothing
  struct Guarded {
    EagerPool& pool;
    std::mutex& mutex;
    int64_t num_threads() const { return 4; }
    void Schedule(std::function<void()> task) {
      const std::lock_guard<std::mutex> lock(mutex);
      pool.Schedule(task);
    }
  } guarded{pool, mutex};
  OnThreads(guarded)(8, 1000000, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      OnThreads(guarded)(8, 1000000, [&](int64_t b, int64_t e) { units += int(e - b); });
    }
  });
  EXPECT(units == 64, "%d units", units.load());
}

}  // namespace
}  // namespace accel_tf

int main() {
  accel_tf::TestEachUnitIsDoneOnce<accel_tf::EagerPool>("eager");
  accel_tf::TestEachUnitIsDoneOnce<accel_tf::LatePool>("late");
  accel_tf::TestEachUnitIsDoneOnce<accel_tf::NoPool>("none");
  accel_tf::TestNested();
  std::printf("%d failures\n", accel_tf::failures);
  return accel_tf::failures != 0;
}
