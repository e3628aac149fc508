// The ops on the CPU: check every input, allocate, and call kernels/ on TensorFlow's own threads.
#include <cstdlib>
#include <string>

#include "kernels/sparse_matmul.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/util/work_sharder.h"

namespace accel_tf {
namespace {

using ::tensorflow::DEVICE_CPU;
using ::tensorflow::OpKernel;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;

// ACCEL_TF_ISA is read once: a process uses one set of kernels throughout.
const Kernels* ChosenKernels(std::string* error) {
  static std::string* const why = new std::string;
  static const Kernels* const chosen = FindKernels(std::getenv("ACCEL_TF_ISA"), why);
  if (chosen == nullptr) *error = "ACCEL_TF_ISA: " + *why;
  return chosen;
}

ParallelFor OnIntraOpThreads(OpKernelContext* context) {
  const auto* workers = context->device()->tensorflow_cpu_worker_threads();
  return [workers](int64_t total, int64_t cost, const Work& work) {
    tensorflow::Shard(workers->num_threads, workers->workers, total, cost, work);
  };
}

// The number of rows of a [..., size] tensor seen as a matrix; `size` may be 0.
int64_t BatchOf(const Tensor& t) {
  int64_t batch = 1;
  for (int i = 0; i + 1 < t.dims(); ++i) batch *= t.dim_size(i);
  return batch;
}

// What the three ops share: the choice of kernels, the checks and the scratch memory.
class SparseOp : public OpKernel {
 public:
  explicit SparseOp(OpKernelConstruction* context) : OpKernel(context) {
    std::string error;
    kernels_ = ChosenKernels(&error);
    OP_REQUIRES(context, kernels_ != nullptr, absl::InvalidArgumentError(error));
  }

 protected:
  absl::Status Invalid(const std::string& what) const {
    return absl::InvalidArgumentError(type_string() + ": " + what);
  }

  absl::Status CheckInFeatures(int64_t in_features) const {
    if (in_features <= INT32_MAX) return absl::OkStatus();
    return Invalid("in_features = " + std::to_string(in_features) +
                   ", expected at most 2147483647, as columns are int32");
  }

  // `values` is null where the op reads the pattern only.
  absl::Status ReadCsr(const Tensor& pointers, const Tensor& columns, const Tensor* values,
                       int64_t in_features, const ParallelFor& parallel_for, Csr* out) const {
    if (pointers.dims() != 1 || pointers.dim_size(0) < 1) {
      return Invalid("row_pointers has shape " + pointers.shape().DebugString() +
                     ", expected [out_features + 1], with at least one element");
    }
    if (columns.dims() != 1) {
      return Invalid("columns has shape " + columns.shape().DebugString() +
                     ", expected [nonzeros]");
    }
    if (values != nullptr && values->shape() != columns.shape()) {
      return Invalid("values has shape " + values->shape().DebugString() +
                     ", expected that of columns, " + columns.shape().DebugString());
    }
    *out = {pointers.dim_size(0) - 1,
            in_features,
            columns.dim_size(0),
            pointers.flat<int64_t>().data(),
            columns.flat<int32_t>().data(),
            values == nullptr ? nullptr : values->flat<float>().data()};
    const std::string fault = Check(*out, parallel_for);
    return fault.empty() ? absl::OkStatus() : Invalid(fault);
  }

  absl::Status CheckLast(const char* name, const Tensor& t, int64_t size,
                         const char* meaning) const {
    if (t.dims() >= 1 && t.dim_size(t.dims() - 1) == size) return absl::OkStatus();
    return Invalid(std::string(name) + " has shape " + t.shape().DebugString() +
                   ", expected [..., " + std::to_string(size) + "], the last dimension being " +
                   meaning);
  }

  // Scratch of `size` elements; a negative size stands for one that does not fit int64.
  template <class T>
  absl::Status Scratch(OpKernelContext* context, int64_t size, Tensor* holder, T** data) const {
    TensorShape shape;
    if (size < 0) return Invalid("the packed activations would not fit the address space");
    TF_RETURN_IF_ERROR(TensorShape::BuildTensorShape({size}, &shape));
    TF_RETURN_IF_ERROR(context->allocate_temp(tensorflow::DataTypeToEnum<T>::value, shape, holder));
    *data = holder->flat<T>().data();
    return absl::OkStatus();
  }

  // y = x · W for a checked W, x being [..., w.cols].
  absl::Status MultiplyInto(OpKernelContext* context, const Csr& w, const Tensor& x,
                            const ParallelFor& parallel_for) const {
    TensorShape shape = x.shape();
    Tensor* y = nullptr;
    TF_RETURN_IF_ERROR(shape.SetDimWithStatus(x.dims() - 1, w.rows));
    TF_RETURN_IF_ERROR(context->allocate_output(0, shape, &y));
    Tensor holder;
    float* scratch = nullptr;
    const int64_t batch = BatchOf(x);
    TF_RETURN_IF_ERROR(Scratch(context, MultiplyScratch(w, batch), &holder, &scratch));
    Multiply(*kernels_, w, x.flat<float>().data(), batch, y->flat<float>().data(), scratch,
             parallel_for);
    return absl::OkStatus();
  }

  const Kernels* kernels_ = nullptr;
};

// The ops whose matrix is as wide as an attribute says, not as an input is.
class SparseOpOfWidth : public SparseOp {
 public:
  explicit SparseOpOfWidth(OpKernelConstruction* context) : SparseOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("in_features", &in_features_));
    OP_REQUIRES_OK(context, CheckInFeatures(in_features_));
  }

 protected:
  int64_t in_features_ = 0;
};

class SparseMatMul : public SparseOpOfWidth {
 public:
  using SparseOpOfWidth::SparseOpOfWidth;

  void Compute(OpKernelContext* context) override {
    const ParallelFor parallel_for = OnIntraOpThreads(context);
    const Tensor& x = context->input(0);
    Csr w;
    OP_REQUIRES_OK(context, CheckLast("x", x, in_features_, "in_features"));
    OP_REQUIRES_OK(context, ReadCsr(context->input(1), context->input(2), &context->input(3),
                                    in_features_, parallel_for, &w));
    OP_REQUIRES_OK(context, MultiplyInto(context, w, x, parallel_for));
  }
};

class SparseMatMulGradX : public SparseOpOfWidth {
 public:
  using SparseOpOfWidth::SparseOpOfWidth;

  void Compute(OpKernelContext* context) override {
    const ParallelFor parallel_for = OnIntraOpThreads(context);
    const Tensor& dy = context->input(0);
    Csr w;
    OP_REQUIRES_OK(context, ReadCsr(context->input(1), context->input(2), &context->input(3),
                                    in_features_, parallel_for, &w));
    OP_REQUIRES_OK(context, CheckLast("dy", dy, w.rows, "out_features, by row_pointers"));
    OP_REQUIRES(context, w.rows <= INT32_MAX,
                Invalid("out_features = " + std::to_string(w.rows) +
                        ", expected at most 2147483647, as columns are int32"));
    Tensor pointers_holder, columns_holder, values_holder;
    int64_t* pointers = nullptr;
    int32_t* columns = nullptr;
    float* values = nullptr;
    OP_REQUIRES_OK(context, Scratch(context, w.cols + 1, &pointers_holder, &pointers));
    OP_REQUIRES_OK(context, Scratch(context, w.nonzeros, &columns_holder, &columns));
    OP_REQUIRES_OK(context, Scratch(context, w.nonzeros, &values_holder, &values));
    const Csr transposed = Transpose(w, pointers, columns, values);
    OP_REQUIRES_OK(context, MultiplyInto(context, transposed, dy, parallel_for));
  }
};

class SparseMatMulGradValues : public SparseOp {
 public:
  using SparseOp::SparseOp;

  void Compute(OpKernelContext* context) override {
    const ParallelFor parallel_for = OnIntraOpThreads(context);
    const Tensor& dy = context->input(0);
    const Tensor& x = context->input(1);
    OP_REQUIRES(context, x.dims() >= 1,
                Invalid("x has shape [], expected [..., in_features], of rank one or more"));
    const int64_t in_features = x.dim_size(x.dims() - 1);
    OP_REQUIRES_OK(context, CheckInFeatures(in_features));
    Csr pattern;
    OP_REQUIRES_OK(context, ReadCsr(context->input(2), context->input(3), nullptr, in_features,
                                    parallel_for, &pattern));
    OP_REQUIRES_OK(context, CheckLast("dy", dy, pattern.rows, "out_features, by row_pointers"));
    TensorShape expected = x.shape();
    OP_REQUIRES_OK(context, expected.SetDimWithStatus(x.dims() - 1, pattern.rows));
    OP_REQUIRES(context, dy.shape() == expected,
                Invalid("dy has shape " + dy.shape().DebugString() + ", expected " +
                        expected.DebugString() + ", x having shape " + x.shape().DebugString()));
    Tensor* d = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, context->input(3).shape(), &d));
    const int64_t batch = BatchOf(x);
    const int64_t rows_size = PackedSize(batch, pattern.rows);
    const int64_t cols_size = PackedSize(batch, pattern.cols);
    int64_t size;
    if (rows_size < 0 || cols_size < 0 || __builtin_add_overflow(rows_size, cols_size, &size)) {
      size = -1;
    }
    Tensor holder;
    float* scratch = nullptr;
    OP_REQUIRES_OK(context, Scratch(context, size, &holder, &scratch));
    MultiplySampled(*kernels_, pattern, dy.flat<float>().data(), x.flat<float>().data(), batch,
                    d->flat<float>().data(), scratch, parallel_for);
  }
};

#define ACCEL_TF_REGISTER(name, kernel) \
  REGISTER_KERNEL_BUILDER(Name(name).Device(DEVICE_CPU).TypeConstraint<float>("T"), kernel)
ACCEL_TF_REGISTER("AccelTfSparseMatMul", SparseMatMul);
ACCEL_TF_REGISTER("AccelTfSparseMatMulGradX", SparseMatMulGradX);
ACCEL_TF_REGISTER("AccelTfSparseMatMulGradValues", SparseMatMulGradValues);
#undef ACCEL_TF_REGISTER

}  // namespace
}  // namespace accel_tf

// The names of the kernels that are used and of those that could be, for accel_tf.sparse.isa().
extern "C" __attribute__((visibility("default"))) const char* accel_tf_isa() {
  std::string error;
  const accel_tf::Kernels* kernels = accel_tf::ChosenKernels(&error);
  return kernels == nullptr ? "" : kernels->name;
}

extern "C" __attribute__((visibility("default"))) const char* accel_tf_available_isas() {
  static const std::string* const names = [] {
    auto* joined = new std::string;
    for (const accel_tf::Kernels* kernels : accel_tf::AvailableKernels()) {
      *joined += (joined->empty() ? "" : " ") + std::string(kernels->name);
    }
    return joined;
  }();
  return names->c_str();
}
