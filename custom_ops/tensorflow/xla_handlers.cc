// The ops in code compiled by XLA: the checks and the kernels of cpu_kernels.cc, on XLA's buffers
// and threads. xla_lowering.cc has XLA call them.
#include "tensorflow/xla_handlers.h"

#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <string_view>

#include "kernels/sparse_matmul.h"
#include "kernels/threads.h"
#include "xla/ffi/api/ffi.h"

namespace accel_tf {
namespace {

namespace ffi = ::xla::ffi;

using Floats = ffi::Buffer<ffi::F32>;
using Vector = ffi::BufferR1<ffi::F32>;
using Plan = ffi::BufferR1<ffi::S32>;
using Columns = ffi::BufferR1<ffi::U16>;

std::string ShapeOf(const Floats& t) {
  std::string sizes;
  for (const int64_t size : t.dimensions()) {
    sizes += (sizes.empty() ? "" : ",") + std::to_string(size);
  }
  return "[" + sizes + "]";
}

// One call of an op: first the checks of its inputs, of which the first fault counts, then the run.
class Call {
 public:
  Call(const char* op, int64_t in_features, int64_t out_features, int64_t height, bool shared)
      : op_(op) {
    kernels_ = ChosenKernels(&fault_);
    Fault(CheckForm(out_features, in_features, height, shared));
    w_.rows = out_features;
    w_.cols = in_features;
    w_.height = static_cast<int>(height);
    w_.shared = shared;
  }

  // A tensor [..., size], with as many rows as the others of this call.
  void Rows(const char* name, const Floats& t, int64_t size) {
    const auto dims = t.dimensions();
    int64_t batch = 1;
    for (size_t i = 0; i + 1 < dims.size(); ++i) batch *= dims[i];
    if (dims.size() == 0 || dims.back() != size || (batch_ >= 0 && batch != batch_)) {
      Fault(std::string(name) + " has shape " + ShapeOf(t) + ", expected [..., " +
            std::to_string(size) + "]" +
            (batch_ < 0 ? "" : ", of " + std::to_string(batch_) + " rows"));
    }
    batch_ = batch;
  }

  // A vector of one element for each output, or null if it is empty.
  const float* PerOutput(const char* name, const Vector& t) {
    const int64_t size = t.element_count();
    if (size == 0) return nullptr;
    Size(name, size, w_.rows);
    return t.typed_data();
  }

  void Size(const char* name, int64_t size, int64_t expected) {
    if (size == expected) return;
    Fault(std::string(name) + " has " + std::to_string(size) + " elements, expected " +
          std::to_string(expected));
  }

  void Matrix(const Plan& plan, const Columns& columns) {
    if (!fault_.empty()) return;
    Fault(ReadPlan(plan.typed_data(), plan.element_count(), columns.typed_data(),
                   columns.element_count(), &w_));
  }

  void Values(const ffi::AnyBuffer& values) {
    Size("values", values.element_count(), Stored());
    if (values.element_type() == ffi::F32) w_.values = values.typed_data<float>();
    if (values.element_type() == ffi::S8) w_.int8_values = values.typed_data<int8_t>();
  }

  // The number of stored values; 0 after a fault.
  int64_t Stored() const { return fault_.empty() ? w_.steps() * w_.height : 0; }

  // product(kernels, matrix, batch, scratch, parallel_for), unless there was a fault.
  template <class ScratchSize, class Product>
  ffi::Error Run(ffi::ThreadPool& pool, ScratchSize scratch_size, Product product) {
    if (fault_.empty()) {
      const int64_t size = scratch_size(w_, batch_);
      const std::unique_ptr<float[]> scratch(size < 0 ? nullptr : new (std::nothrow) float[size]);
      if (scratch == nullptr) {
        return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                          op_ + ": no memory for the packed activations");
      }
      Fault(product(*kernels_, w_, batch_, scratch.get(), OnThreads(pool)));
    }
    if (fault_.empty()) return ffi::Error::Success();
    return ffi::Error::InvalidArgument(op_ + ": " + fault_);
  }

 private:
  void Fault(const std::string& fault) {
    if (fault_.empty()) fault_ = fault;
  }

  const std::string op_;
  const Kernels* kernels_ = nullptr;
  Sliced w_;
  int64_t batch_ = -1;
  std::string fault_;
};

ffi::Error SparseMatMul(ffi::ThreadPool pool, int64_t in_features, int64_t out_features,
                        int64_t height, bool shared, std::string_view activation, Floats x,
                        Plan plan, Columns columns, ffi::AnyBuffer values, Vector scales,
                        Vector bias, ffi::Result<Floats> y) {
  Call call("AccelTfSparseMatMul", in_features, out_features, height, shared);
  call.Rows("x", x, in_features);
  call.Rows("y", *y, out_features);
  call.Matrix(plan, columns);
  call.Values(values);
  Epilogue epilogue;
  epilogue.scales = call.PerOutput("scales", scales);
  epilogue.bias = call.PerOutput("bias", bias);
  epilogue.activation = activation == "relu"    ? Activation::kRelu
                        : activation == "relu6" ? Activation::kRelu6
                                                : Activation::kLinear;
  const auto no_scratch = [](const Sliced&, int64_t) { return int64_t{0}; };
  return call.Run(pool, no_scratch,
                  [&](const Kernels& kernels, const Sliced& w, int64_t batch, float*,
                      const ParallelFor& parallel_for) {
                    return Multiply(kernels, w, x.typed_data(), batch, epilogue, y->typed_data(),
                                    parallel_for);
                  });
}

ffi::Error SparseMatMulGradX(ffi::ThreadPool pool, int64_t in_features, int64_t out_features,
                             int64_t height, bool shared, Floats dy, Plan plan, Columns columns,
                             ffi::AnyBuffer values, ffi::Result<Floats> dx) {
  Call call("AccelTfSparseMatMulGradX", in_features, out_features, height, shared);
  call.Rows("dy", dy, out_features);
  call.Rows("dx", *dx, in_features);
  call.Matrix(plan, columns);
  call.Values(values);
  return call.Run(pool, MultiplyTransposedScratch,
                  [&](const Kernels& kernels, const Sliced& w, int64_t batch, float* scratch,
                      const ParallelFor& parallel_for) {
                    return MultiplyTransposed(kernels, w, dy.typed_data(), batch, dx->typed_data(),
                                              scratch, parallel_for);
                  });
}

ffi::Error SparseMatMulGradValues(ffi::ThreadPool pool, int64_t in_features, int64_t out_features,
                                  int64_t height, bool shared, Floats dy, Floats x, Plan plan,
                                  Columns columns, ffi::Result<Floats> dvalues) {
  Call call("AccelTfSparseMatMulGradValues", in_features, out_features, height, shared);
  call.Rows("dy", dy, out_features);
  call.Rows("x", x, in_features);
  call.Matrix(plan, columns);
  call.Size("dvalues", dvalues->element_count(), call.Stored());
  return call.Run(pool, SampleScratch,
                  [&](const Kernels& kernels, const Sliced& w, int64_t batch, float* scratch,
                      const ParallelFor& parallel_for) {
                    return Sample(kernels, w, dy.typed_data(), x.typed_data(), batch,
                                  dvalues->typed_data(), scratch, parallel_for);
                  });
}

auto BindAttributes() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Attr<int64_t>("in_features")
      .Attr<int64_t>("out_features")
      .Attr<int64_t>("height")
      .Attr<bool>("shared");
}

}  // namespace
}  // namespace accel_tf

using namespace accel_tf;  // NOLINT: the macro makes a function of external linkage
XLA_FFI_DEFINE_HANDLER_SYMBOL(AccelTfSparseMatMulHandler, SparseMatMul,
                              BindAttributes()
                                  .Attr<std::string_view>("activation")
                                  .Arg<Floats>()
                                  .Arg<Plan>()
                                  .Arg<Columns>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Vector>()
                                  .Arg<Vector>()
                                  .Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    AccelTfSparseMatMulGradXHandler, SparseMatMulGradX,
    BindAttributes().Arg<Floats>().Arg<Plan>().Arg<Columns>().Arg<ffi::AnyBuffer>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    AccelTfSparseMatMulGradValuesHandler, SparseMatMulGradValues,
    BindAttributes().Arg<Floats>().Arg<Floats>().Arg<Plan>().Arg<Columns>().Ret<Floats>());
