// How the kernels ask for threads: the caller has them, here is only the shape of the request.
#pragma once

#include <cstdint>
#include <functional>

namespace accel_tf {

// Calls work(begin, end) on ranges that cover [0, total) exactly once, on any threads, and returns
// when all are done. `cost` is the work of one unit, in cycles, roughly.
using Work = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t total, int64_t cost, const Work& work)>;

}  // namespace accel_tf
