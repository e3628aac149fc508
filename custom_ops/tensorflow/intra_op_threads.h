// TensorFlow's intra-op threads, as kernels/threads.h wants them.
#pragma once

#include "kernels/threads.h"
#include "tensorflow/core/framework/device_base.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/lib/core/threadpool.h"

namespace accel_tf {

class IntraOpThreads {
 public:
  explicit IntraOpThreads(tensorflow::OpKernelContext* context)
      : workers_(*context->device()->tensorflow_cpu_worker_threads()) {}
  int64_t num_threads() const { return workers_.num_threads; }
  template <class Task>
  void Schedule(Task task) {
    workers_.workers->Schedule(task);
  }

 private:
  const tensorflow::DeviceBase::CpuWorkerThreads& workers_;
};

}  // namespace accel_tf
