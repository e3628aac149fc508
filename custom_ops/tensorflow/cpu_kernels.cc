// The ops on the CPU: check every input, allocate, and call kernels/ on TensorFlow's own threads.
#include <string>

#include "kernels/sparse_matmul.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/intra_op_threads.h"

namespace accel_tf {
namespace {

using ::tensorflow::DEVICE_CPU;
using ::tensorflow::OpKernel;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;

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
    int64_t height;
    OP_REQUIRES_OK(context, context->GetAttr("in_features", &shape_.cols));
    OP_REQUIRES_OK(context, context->GetAttr("out_features", &shape_.rows));
    OP_REQUIRES_OK(context, context->GetAttr("height", &height));
    OP_REQUIRES_OK(context, context->GetAttr("shared", &shape_.shared));
    const std::string fault = CheckForm(shape_.rows, shape_.cols, height, shape_.shared);
    OP_REQUIRES(context, fault.empty(), Invalid(fault));
    shape_.height = static_cast<int>(height);
  }

 protected:
  absl::Status Invalid(const std::string& what) const {
    return absl::InvalidArgumentError(type_string() + ": " + what);
  }

  absl::Status CheckVector(const char* name, const Tensor& t) const {
    if (t.dims() == 1) return absl::OkStatus();
    return Invalid(std::string(name) + " has shape " + t.shape().DebugString() +
                   ", expected one dimension");
  }

  absl::Status CheckLast(const char* name, const Tensor& t, int64_t size,
                         const char* meaning) const {
    if (t.dims() >= 1 && t.dim_size(t.dims() - 1) == size) return absl::OkStatus();
    return Invalid(std::string(name) + " has shape " + t.shape().DebugString() +
                   ", expected [..., " + std::to_string(size) + "], the last dimension being " +
                   meaning);
  }

  // `values` is null where the op reads the pattern only.
  absl::Status ReadMatrix(const Tensor& plan, const Tensor& columns, const Tensor* values,
                          Sliced* w) const {
    *w = shape_;
    TF_RETURN_IF_ERROR(CheckVector("plan", plan));
    TF_RETURN_IF_ERROR(CheckVector("columns", columns));
    const std::string fault = ReadPlan(plan.flat<int32_t>().data(), plan.NumElements(),
                                       columns.flat<uint16_t>().data(), columns.NumElements(), w);
    if (!fault.empty()) return Invalid(fault);
    if (values == nullptr) return absl::OkStatus();
    if (values->dims() != 1 || values->NumElements() != w->steps() * w->height) {
      return Invalid("values has shape " + values->shape().DebugString() + ", expected [" +
                     std::to_string(w->steps() * w->height) + "], the steps of the plan × height");
    }
    if (values->dtype() == tensorflow::DT_INT8) {
      w->int8_values = values->flat<int8_t>().data();
    } else {
      w->values = values->flat<float>().data();
    }
    return absl::OkStatus();
  }

  // The vector `t` of one element for each output, or null if it is empty.
  absl::Status ReadPerOutput(const char* name, const Tensor& t, const float** data) const {
    TF_RETURN_IF_ERROR(CheckVector(name, t));
    *data = t.NumElements() == 0 ? nullptr : t.flat<float>().data();
    if (t.NumElements() == 0 || t.NumElements() == shape_.rows) return absl::OkStatus();
    return Invalid(std::string(name) + " has shape " + t.shape().DebugString() + ", expected [" +
                   std::to_string(shape_.rows) + "], out_features, or [0]");
  }

  // Scratch of `size` floats; a negative size stands for one that does not fit int64.
  absl::Status Scratch(OpKernelContext* context, int64_t size, Tensor* holder, float** data) const {
    TensorShape shape;
    if (size < 0) return Invalid("the packed activations would not fit the address space");
    TF_RETURN_IF_ERROR(TensorShape::BuildTensorShape({size}, &shape));
    TF_RETURN_IF_ERROR(context->allocate_temp(tensorflow::DT_FLOAT, shape, holder));
    *data = holder->flat<float>().data();
    return absl::OkStatus();
  }

  // The output [..., size], the leading dimensions being those of `like`.
  absl::Status Output(OpKernelContext* context, const Tensor& like, int64_t size,
                      float** data) const {
    TensorShape shape = like.shape();
    Tensor* out = nullptr;
    TF_RETURN_IF_ERROR(shape.SetDimWithStatus(like.dims() - 1, size));
    TF_RETURN_IF_ERROR(context->allocate_output(0, shape, &out));
    *data = out->flat<float>().data();
    return absl::OkStatus();
  }

  const Kernels* kernels_ = nullptr;
  Sliced shape_;  // in_features, out_features, height and shared, and nothing else
};

class SparseMatMul : public SparseOp {
 public:
  explicit SparseMatMul(OpKernelConstruction* context) : SparseOp(context) {
    std::string name;
    OP_REQUIRES_OK(context, context->GetAttr("activation", &name));
    activation_ = name == "relu"    ? Activation::kRelu
                  : name == "relu6" ? Activation::kRelu6
                                    : Activation::kLinear;
  }

  void Compute(OpKernelContext* context) override {
    IntraOpThreads threads(context);
    const Tensor &x = context->input(0), &values = context->input(3);
    Sliced w;
    Epilogue epilogue{nullptr, nullptr, activation_};
    OP_REQUIRES_OK(context, CheckLast("x", x, shape_.cols, "in_features"));
    OP_REQUIRES_OK(context, ReadMatrix(context->input(1), context->input(2), &values, &w));
    OP_REQUIRES_OK(context, ReadPerOutput("scales", context->input(4), &epilogue.scales));
    OP_REQUIRES_OK(context, ReadPerOutput("bias", context->input(5), &epilogue.bias));
    float* y = nullptr;
    OP_REQUIRES_OK(context, Output(context, x, w.rows, &y));
    const std::string fault =
        Multiply(*kernels_, w, x.flat<float>().data(), BatchOf(x), epilogue, y, OnThreads(threads));
    OP_REQUIRES(context, fault.empty(), Invalid(fault));
  }

 private:
  Activation activation_ = Activation::kLinear;
};

class SparseMatMulGradX : public SparseOp {
 public:
  using SparseOp::SparseOp;

  void Compute(OpKernelContext* context) override {
    IntraOpThreads threads(context);
    const Tensor &dy = context->input(0), &values = context->input(3);
    Sliced w;
    OP_REQUIRES_OK(context, CheckLast("dy", dy, shape_.rows, "out_features"));
    OP_REQUIRES_OK(context, ReadMatrix(context->input(1), context->input(2), &values, &w));
    const int64_t batch = BatchOf(dy);
    Tensor holder;
    float *dx = nullptr, *scratch = nullptr;
    OP_REQUIRES_OK(context, Output(context, dy, w.cols, &dx));
    OP_REQUIRES_OK(context,
                   Scratch(context, MultiplyTransposedScratch(w, batch), &holder, &scratch));
    const std::string fault = MultiplyTransposed(*kernels_, w, dy.flat<float>().data(), batch, dx,
                                                 scratch, OnThreads(threads));
    OP_REQUIRES(context, fault.empty(), Invalid(fault));
  }
};

class SparseMatMulGradValues : public SparseOp {
 public:
  using SparseOp::SparseOp;

  void Compute(OpKernelContext* context) override {
    IntraOpThreads threads(context);
    const Tensor &dy = context->input(0), &x = context->input(1);
    Sliced pattern;
    OP_REQUIRES_OK(context, CheckLast("dy", dy, shape_.rows, "out_features"));
    OP_REQUIRES_OK(context, CheckLast("x", x, shape_.cols, "in_features"));
    TensorShape expected = x.shape();
    OP_REQUIRES_OK(context, expected.SetDimWithStatus(x.dims() - 1, shape_.rows));
    OP_REQUIRES(context, dy.shape() == expected,
                Invalid("dy has shape " + dy.shape().DebugString() + ", expected " +
                        expected.DebugString() + ", x having shape " + x.shape().DebugString()));
    OP_REQUIRES_OK(context, ReadMatrix(context->input(2), context->input(3), nullptr, &pattern));
    const int64_t batch = BatchOf(x);
    Tensor holder;
    Tensor* d = nullptr;
    float* scratch = nullptr;
    TensorShape shape;
    OP_REQUIRES_OK(context,
                   TensorShape::BuildTensorShape({pattern.steps() * pattern.height}, &shape));
    OP_REQUIRES_OK(context, context->allocate_output(0, shape, &d));
    OP_REQUIRES_OK(context, Scratch(context, SampleScratch(pattern, batch), &holder, &scratch));
    const std::string fault =
        Sample(*kernels_, pattern, dy.flat<float>().data(), x.flat<float>().data(), batch,
               d->flat<float>().data(), scratch, OnThreads(threads));
    OP_REQUIRES(context, fault.empty(), Invalid(fault));
  }
};

#define ACCEL_TF_REGISTER(name, kernel) \
  REGISTER_KERNEL_BUILDER(Name(name).Device(DEVICE_CPU), kernel)
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
