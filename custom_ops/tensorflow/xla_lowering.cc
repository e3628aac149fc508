// Has XLA compile the ops, on the CPU, to calls of the handlers in xla_handlers.cc.
//
// This is the one file that includes headers of XLA's compiler, which takes half a minute, and the
// one file of its library: where XLA is not what it was built for, the ops load and run without it.
#include <cstdint>
#include <string>
#include <vector>

#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/xla_handlers.h"
#include "xla/ffi/api/ffi.h"
#include "xla/hlo/builder/xla_builder.h"

namespace accel_tf {
namespace {

using ::tensorflow::OpKernelConstruction;
using ::tensorflow::XlaOpKernel;
using ::tensorflow::XlaOpKernelContext;

// What the three ops have in common: their attributes, and the call.
class Lowering : public XlaOpKernel {
 public:
  explicit Lowering(OpKernelConstruction* context) : XlaOpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("in_features", &in_features_));
    OP_REQUIRES_OK(context, context->GetAttr("out_features", &out_features_));
    OP_REQUIRES_OK(context, context->GetAttr("height", &height_));
    OP_REQUIRES_OK(context, context->GetAttr("shared", &shared_));
    // As MLIR writes a dictionary, which is how XLA hands attributes to a handler.
    attributes_ = "in_features = " + std::to_string(in_features_) + " : i64, " +
                  "out_features = " + std::to_string(out_features_) + " : i64, " +
                  "height = " + std::to_string(height_) + " : i64, " +
                  "shared = " + (shared_ ? "true" : "false");
    if (context->HasAttr("activation")) {
      std::string activation;
      OP_REQUIRES_OK(context, context->GetAttr("activation", &activation));
      attributes_ += ", activation = \"" + activation + "\"";
    }
  }

 protected:
  // Calls the handler of the op's name. The first `batches` inputs are [..., features].
  xla::XlaOp Call(XlaOpKernelContext* context, int batches, absl::Span<const int64_t> result) {
    std::vector<xla::XlaOp> inputs;
    for (int i = 0; i < context->num_inputs(); ++i) {
      inputs.push_back(i < batches ? Padded(context->Input(i)) : context->Input(i));
    }
    return xla::CustomCall(context->builder(), type_string(), inputs,
                           xla::ShapeUtil::MakeShape(xla::F32, result), "{" + attributes_ + "}",
                           /*has_side_effect=*/false, /*output_operand_aliasing=*/{},
                           /*literal=*/nullptr, xla::CustomCallSchedule::SCHEDULE_NONE,
                           xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
  }

  // Calls it for a result like the first input, but [..., features].
  void CallForBatch(XlaOpKernelContext* context, int64_t features) {
    const xla::XlaOp batch = context->Input(0);
    const absl::StatusOr<xla::Shape> shape = context->InputXlaShape(0);
    OP_REQUIRES_OK(context, shape.status());
    const auto sizes = shape->dimensions();
    OP_REQUIRES(context, !sizes.empty(),
                absl::InvalidArgumentError(type_string() + ": the first input has shape [], "
                                                           "expected [..., features]"));
    std::vector<int64_t> result_sizes(sizes.begin(), sizes.end());
    result_sizes.back() = features;
    xla::XlaOp result = Call(context, 1, result_sizes);
    for (int64_t d = 0; d + 1 < static_cast<int64_t>(sizes.size()); ++d) {
      if (!shape->is_dynamic_dimension(d)) continue;
      result = xla::SetDimensionSize(result, xla::GetDimensionSize(batch, d), d);
    }
    context->SetOutput(0, result);
  }

  int64_t in_features_ = 0, out_features_ = 0, height_ = 0;
  bool shared_ = false;

 private:
  // A batch whose size is known at run time only, such as that of tf.boolean_mask, lies in memory
  // for the largest one. This is all of it, with zeros at the end: they add nothing to any sum.
  static xla::XlaOp Padded(xla::XlaOp x) {
    xla::XlaBuilder* const builder = x.builder();
    const absl::StatusOr<xla::Shape> shape = builder->GetShape(x);
    if (!shape.ok()) return builder->ReportError(shape.status());
    const auto sizes = shape->dimensions();
    xla::XlaOp padded = x;
    for (int64_t d = 0; d < static_cast<int64_t>(sizes.size()); ++d) {
      if (!shape->is_dynamic_dimension(d)) continue;
      const auto index = xla::Iota(builder, xla::ShapeUtil::MakeShape(xla::S32, sizes), d);
      const auto zeros = xla::Broadcast(xla::ConstantR0<float>(builder, 0.0f), sizes);
      padded = xla::Select(xla::Lt(index, xla::GetDimensionSize(x, d)),
                           xla::RemoveDynamicDimension(padded, d), zeros);
    }
    return padded;
  }

  std::string attributes_;
};

class SparseMatMul : public Lowering {
 public:
  using Lowering::Lowering;
  void Compile(XlaOpKernelContext* context) override { CallForBatch(context, out_features_); }
};

class SparseMatMulGradX : public Lowering {
 public:
  using Lowering::Lowering;
  void Compile(XlaOpKernelContext* context) override { CallForBatch(context, in_features_); }
};

class SparseMatMulGradValues : public Lowering {
 public:
  using Lowering::Lowering;
  void Compile(XlaOpKernelContext* context) override {
    const absl::StatusOr<xla::Shape> columns = context->InputXlaShape(3);
    OP_REQUIRES_OK(context, columns.status());
    const int64_t values = xla::ShapeUtil::ElementsIn(*columns) * (shared_ ? height_ : 1);
    context->SetOutput(0, Call(context, 2, {values}));
  }
};

// Not REGISTER_XLA_OP: TensorFlow reads that register once, when it first compiles anything, and
// this library may be loaded later. It then makes of each entry what is registered here at once.
#define ACCEL_TF_REGISTER(op)                                             \
  REGISTER_KERNEL_BUILDER(Name("AccelTf" #op).Device("XLA_CPU_JIT"), op); \
  XLA_FFI_REGISTER_HANDLER(XLA_FFI_GetApi(), "AccelTf" #op, "Host", AccelTf##op##Handler)
ACCEL_TF_REGISTER(SparseMatMul);
ACCEL_TF_REGISTER(SparseMatMulGradX);
ACCEL_TF_REGISTER(SparseMatMulGradValues);
#undef ACCEL_TF_REGISTER

}  // namespace
}  // namespace accel_tf
