// What the tests of the kernels share: expectations, arrays whose end is the end of a heap block,
// and ways to spread work over threads that differ as much as they may.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernels/parallel.h"

namespace accel_tf {

inline int failures = 0;

#define EXPECT(condition, ...)                                    \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      if (++::accel_tf::failures > 20) std::exit(1);              \
    }                                                             \
  } while (false)

inline void ExpectFault(const std::string& got, const std::string& want) {
  EXPECT(got == want, "\"%s\", not \"%s\"", got.c_str(), want.c_str());
}

// `size` elements that begin `offset` elements after an aligned address, and end where the heap
// block ends: AddressSanitizer sees one element too many.
template <class T>
class Array {
 public:
  Array(int64_t size, int offset) : size_(size), offset_(offset), block_(new T[size + offset]()) {}
  T* data() { return block_.get() + offset_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data()[i]; }

 private:
  int64_t size_;
  int offset_;
  std::unique_ptr<T[]> block_;
};

template <class T>
Array<T> Copy(const std::vector<T>& from, int offset) {
  Array<T> copy(static_cast<int64_t>(from.size()), offset);
  std::copy(from.begin(), from.end(), copy.data());
  return copy;
}

inline void Serial(int64_t total, int64_t, const Work& work) {
  if (total > 0) work(0, total);
}

// Each unit by itself, last first: the most different split from `Serial` that there is.
inline void OneByOneBackwards(int64_t total, int64_t, const Work& work) {
  for (int64_t i = total; i-- > 0;) work(i, i + 1);
}

inline ParallelFor Threads(int count) {
  return [count](int64_t total, int64_t, const Work& work) {
    std::vector<std::thread> threads;
    for (int t = 1; t < count; ++t) {
      const int64_t begin = total * t / count, end = total * (t + 1) / count;
      if (begin < end) threads.emplace_back(work, begin, end);
    }
    Serial(total / count, 0, work);
    for (std::thread& thread : threads) thread.join();
  };
}

}  // namespace accel_tf
