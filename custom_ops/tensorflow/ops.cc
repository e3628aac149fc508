// Declares the ops to TensorFlow: their inputs, outputs and shapes. The gradients, which are
// products of the same family, are tied together in accel_tf/sparse/_op.py.
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace accel_tf {
namespace {

using ::tensorflow::shape_inference::DimensionHandle;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

// The size that attribute `name` gives.
absl::Status SizeOf(InferenceContext* c, const char* name, DimensionHandle* size) {
  int64_t value;
  TF_RETURN_IF_ERROR(c->GetAttr(name, &value));
  *size = c->MakeDim(value);
  return absl::OkStatus();
}

// Checks that the input at `index` is [..., `from`], by the attribute of that name, and returns
// [..., `to`] in `out`.
absl::Status ReplaceLast(InferenceContext* c, int index, const char* from, const char* to,
                         ShapeHandle* out) {
  DimensionHandle old_size, new_size, merged;
  ShapeHandle shape;
  TF_RETURN_IF_ERROR(SizeOf(c, from, &old_size));
  TF_RETURN_IF_ERROR(SizeOf(c, to, &new_size));
  TF_RETURN_IF_ERROR(c->WithRankAtLeast(c->input(index), 1, &shape));
  TF_RETURN_IF_ERROR(c->Merge(c->Dim(shape, -1), old_size, &merged));
  return c->ReplaceDim(shape, -1, new_size, out);
}

// Checks that the inputs from `first` up to `last`, not included, are vectors.
absl::Status Vectors(InferenceContext* c, int first, int last) {
  ShapeHandle unused;
  for (int i = first; i < last; ++i) TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 1, &unused));
  return absl::OkStatus();
}

REGISTER_OP("AccelTfSparseMatMul")
    .Input("x: float")
    .Input("plan: int32")
    .Input("columns: uint16")
    .Input("values: V")
    .Input("scales: float")
    .Input("bias: float")
    .Output("y: float")
    .Attr("V: {float, int8}")
    .Attr("in_features: int >= 0")
    .Attr("out_features: int >= 0")
    .Attr("height: int >= 4")
    .Attr("shared: bool")
    .Attr("activation: {'linear', 'relu', 'relu6'} = 'linear'")
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle y;
      TF_RETURN_IF_ERROR(ReplaceLast(c, 0, "in_features", "out_features", &y));
      TF_RETURN_IF_ERROR(Vectors(c, 1, 6));
      c->set_output(0, y);
      return absl::OkStatus();
    })
    .Doc(R"doc(
y[..., n] = activation(scales[n] * sum of W[n, k] * x[..., k] over k + bias[n]).

x: [..., in_features], of rank one or more.
plan: the slices of W, in the order that kernels/sliced.h describes.
columns: the columns of its non-zeros, relative to the start of their tile.
values: [steps * height], the weights, in the order of the slices.
scales: [out_features], or [0] for ones.
bias: [out_features], or [0] for none.
y: [..., out_features].
height: the number of rows of a slice, 4 or 16.
shared: whether the rows of a slice have their columns in common. If not, height is 4.
)doc");

REGISTER_OP("AccelTfSparseMatMulGradX")
    .Input("dy: float")
    .Input("plan: int32")
    .Input("columns: uint16")
    .Input("values: V")
    .Output("dx: float")
    .Attr("V: {float, int8}")
    .Attr("in_features: int >= 0")
    .Attr("out_features: int >= 0")
    .Attr("height: int >= 4")
    .Attr("shared: bool")
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle dx;
      TF_RETURN_IF_ERROR(ReplaceLast(c, 0, "out_features", "in_features", &dx));
      TF_RETURN_IF_ERROR(Vectors(c, 1, 4));
      c->set_output(0, dx);
      return absl::OkStatus();
    })
    .Doc(
        "The product with the transposed matrix: dx[..., k] = sum of W[n, k] * dy[..., n] over n.");

REGISTER_OP("AccelTfSparseMatMulGradValues")
    .Input("dy: float")
    .Input("x: float")
    .Input("plan: int32")
    .Input("columns: uint16")
    .Output("dvalues: float")
    .Attr("in_features: int >= 0")
    .Attr("out_features: int >= 0")
    .Attr("height: int >= 4")
    .Attr("shared: bool")
    .SetShapeFn([](InferenceContext* c) {
      bool shared;
      int64_t height;
      ShapeHandle from_dy, x;
      DimensionHandle size = c->UnknownDim();
      TF_RETURN_IF_ERROR(c->GetAttr("shared", &shared));
      TF_RETURN_IF_ERROR(c->GetAttr("height", &height));
      TF_RETURN_IF_ERROR(ReplaceLast(c, 0, "out_features", "in_features", &from_dy));
      TF_RETURN_IF_ERROR(c->Merge(from_dy, c->input(1), &x));
      TF_RETURN_IF_ERROR(Vectors(c, 2, 4));
      if (c->RankKnown(c->input(3))) {
        TF_RETURN_IF_ERROR(c->Multiply(c->Dim(c->input(3), 0), shared ? height : 1, &size));
      }
      c->set_output(0, c->Vector(size));
      return absl::OkStatus();
    })
    .Doc(
        "The sampled product: for each value of W, at row n and column k, the sum of dy[..., n] * "
        "x[..., k] over the batch.");

}  // namespace
}  // namespace accel_tf
