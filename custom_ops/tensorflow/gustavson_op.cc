// The product of two sparse matrices as an op: its declaration, and its kernel on the CPU.
#include <new>
#include <string>

#include "kernels/gustavson.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/intra_op_threads.h"

namespace accel_tf {
namespace {

using ::tensorflow::OpKernel;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

REGISTER_OP("AccelTfSparseSparseMatMul")
    .Input("a_row_pointers: int64")
    .Input("a_columns: int32")
    .Input("a_values: T")
    .Input("b_row_pointers: int64")
    .Input("b_columns: int32")
    .Input("b_values: T")
    .Output("row_pointers: int64")
    .Output("columns: int32")
    .Output("values: T")
    .Attr("T: {float}")
    .Attr("out_columns: int >= 0")
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle pointers, columns;
      for (const int i : {0, 3}) {
        TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 1, &pointers));
        TF_RETURN_IF_ERROR(c->WithRank(c->input(i + 1), 1, &columns));
        TF_RETURN_IF_ERROR(c->Merge(columns, c->input(i + 2), &columns));
      }
      const ShapeHandle nonzeros = c->Vector(c->UnknownDim());
      c->set_output(0, c->input(0));
      c->set_output(1, nonzeros);
      c->set_output(2, nonzeros);
      return absl::OkStatus();
    })
    .Doc(R"doc(
The product C = A·B of two matrices in CSR form.

a_row_pointers: [rows + 1], from 0 to the number of values, never decreasing; likewise for B.
a_columns: [nonzeros of A], each less than the number of B's rows, that b_row_pointers gives.
a_values: [nonzeros of A].
b_columns: [nonzeros of B], each less than out_columns.
b_values: [nonzeros of B].
row_pointers: [rows + 1].
columns: [nonzeros of C], ascending within each row, each once.
values: [nonzeros of C]; sums that cancel are kept, as zeros.
)doc");

class SparseSparseMatMul : public OpKernel {
 public:
  explicit SparseSparseMatMul(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("out_columns", &out_columns_));
    OP_REQUIRES(context, out_columns_ <= INT32_MAX,
                Invalid("out_columns = " + std::to_string(out_columns_) +
                        ", expected at most 2147483647, as columns are int32"));
  }

  void Compute(OpKernelContext* context) override {
    IntraOpThreads threads(context);
    const ParallelFor parallel_for = OnThreads(threads);
    Csr a, b;
    OP_REQUIRES_OK(context, Describe(context, "b", 3, out_columns_, &b));
    OP_REQUIRES_OK(context, Describe(context, "a", 0, b.rows, &a));
    for (const auto& [name, matrix] : {std::pair("a", a), std::pair("b", b)}) {
      const std::string fault = Check(matrix, parallel_for);
      OP_REQUIRES(context, fault.empty(), Invalid(std::string(name) + "_" + fault));
    }

    SparseProduct product(a, b);
    std::string fault;
    try {
      fault = product.Plan(threads.num_threads());
    } catch (const std::bad_alloc&) {
      context->CtxFailure(absl::ResourceExhaustedError(
          type_string() + ": no memory for the sums of a row of the product"));
      return;
    }
    OP_REQUIRES(context, fault.empty(), Invalid(fault));

    Tensor *row_pointers = nullptr, *columns = nullptr, *values = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, context->input(0).shape(), &row_pointers));
    int64_t* const pointers = row_pointers->flat<int64_t>().data();
    product.Count(pointers, parallel_for);
    TensorShape shape;
    OP_REQUIRES_OK(context, TensorShape::BuildTensorShape({pointers[a.rows]}, &shape));
    OP_REQUIRES_OK(context, context->allocate_output(1, shape, &columns));
    OP_REQUIRES_OK(context, context->allocate_output(2, shape, &values));
    product.Fill(pointers, columns->flat<int32_t>().data(), values->flat<float>().data(),
                 parallel_for);
  }

 private:
  absl::Status Invalid(const std::string& what) const {
    return absl::InvalidArgumentError(type_string() + ": " + what);
  }

  // The matrix whose arrays are the inputs from `index` on; its sizes are checked, its contents
  // not.
  absl::Status Describe(OpKernelContext* context, const std::string& name, int index, int64_t cols,
                        Csr* out) const {
    const Tensor& pointers = context->input(index);
    const Tensor& columns = context->input(index + 1);
    const Tensor& values = context->input(index + 2);
    if (pointers.dims() != 1 || pointers.dim_size(0) < 1) {
      return Invalid(name + "_row_pointers has shape " + pointers.shape().DebugString() +
                     ", expected [rows + 1], with at least one element");
    }
    if (columns.dims() != 1) {
      return Invalid(name + "_columns has shape " + columns.shape().DebugString() +
                     ", expected [nonzeros]");
    }
    if (values.shape() != columns.shape()) {
      return Invalid(name + "_values has shape " + values.shape().DebugString() +
                     ", expected that of " + name + "_columns, " + columns.shape().DebugString());
    }
    *out = {pointers.dim_size(0) - 1,
            cols,
            columns.dim_size(0),
            pointers.flat<int64_t>().data(),
            columns.flat<int32_t>().data(),
            values.flat<float>().data()};
    return absl::OkStatus();
  }

  int64_t out_columns_ = 0;
};

REGISTER_KERNEL_BUILDER(
    Name("AccelTfSparseSparseMatMul").Device(tensorflow::DEVICE_CPU).TypeConstraint<float>("T"),
    SparseSparseMatMul);

}  // namespace
}  // namespace accel_tf
