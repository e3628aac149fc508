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

// Checks the inputs row_pointers, columns (and values, when it is an input) that begin at `index`;
// returns the number of rows.
absl::Status CsrShapes(InferenceContext* c, int index, bool has_values, DimensionHandle* rows) {
  ShapeHandle pointers, columns;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(index), 1, &pointers));
  TF_RETURN_IF_ERROR(c->Subtract(c->Dim(pointers, 0), 1, rows));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(index + 1), 1, &columns));
  if (has_values) TF_RETURN_IF_ERROR(c->Merge(columns, c->input(index + 2), &columns));
  return absl::OkStatus();
}

// Checks that `shape` is [..., size], and returns [..., new_size] in `out`.
absl::Status ReplaceLast(InferenceContext* c, ShapeHandle shape, DimensionHandle size,
                         DimensionHandle new_size, ShapeHandle* out) {
  DimensionHandle merged;
  TF_RETURN_IF_ERROR(c->WithRankAtLeast(shape, 1, &shape));
  TF_RETURN_IF_ERROR(c->Merge(c->Dim(shape, -1), size, &merged));
  return c->ReplaceDim(shape, -1, new_size, out);
}

absl::Status InFeatures(InferenceContext* c, DimensionHandle* size) {
  int64_t value;
  TF_RETURN_IF_ERROR(c->GetAttr("in_features", &value));
  *size = c->MakeDim(value);
  return absl::OkStatus();
}

REGISTER_OP("AccelTfSparseMatMul")
    .Input("x: T")
    .Input("row_pointers: int64")
    .Input("columns: int32")
    .Input("values: T")
    .Output("y: T")
    .Attr("T: {float}")
    .Attr("in_features: int >= 0")
    .SetShapeFn([](InferenceContext* c) {
      DimensionHandle in_features, rows;
      ShapeHandle y;
      TF_RETURN_IF_ERROR(InFeatures(c, &in_features));
      TF_RETURN_IF_ERROR(CsrShapes(c, 1, /*has_values=*/true, &rows));
      TF_RETURN_IF_ERROR(ReplaceLast(c, c->input(0), in_features, rows, &y));
      c->set_output(0, y);
      return absl::OkStatus();
    })
    .Doc(R"doc(
y[..., n] = sum of values[p] * x[..., columns[p]] over p in [row_pointers[n], row_pointers[n + 1]).

x: [..., in_features], of rank one or more.
row_pointers: [out_features + 1], from 0 to the number of values, never decreasing.
columns: [nonzeros], each in [0, in_features).
values: [nonzeros].
y: [..., out_features].
)doc");

REGISTER_OP("AccelTfSparseMatMulGradX")
    .Input("dy: T")
    .Input("row_pointers: int64")
    .Input("columns: int32")
    .Input("values: T")
    .Output("dx: T")
    .Attr("T: {float}")
    .Attr("in_features: int >= 0")
    .SetShapeFn([](InferenceContext* c) {
      DimensionHandle in_features, rows;
      ShapeHandle dx;
      TF_RETURN_IF_ERROR(InFeatures(c, &in_features));
      TF_RETURN_IF_ERROR(CsrShapes(c, 1, /*has_values=*/true, &rows));
      TF_RETURN_IF_ERROR(ReplaceLast(c, c->input(0), rows, in_features, &dx));
      c->set_output(0, dx);
      return absl::OkStatus();
    })
    .Doc("The product with the transposed matrix: dx[..., columns[p]] += values[p] * dy[..., n].");

REGISTER_OP("AccelTfSparseMatMulGradValues")
    .Input("dy: T")
    .Input("x: T")
    .Input("row_pointers: int64")
    .Input("columns: int32")
    .Output("dvalues: T")
    .Attr("T: {float}")
    .SetShapeFn([](InferenceContext* c) {
      DimensionHandle rows;
      ShapeHandle dy, x, lead;
      TF_RETURN_IF_ERROR(CsrShapes(c, 2, /*has_values=*/false, &rows));
      TF_RETURN_IF_ERROR(c->WithRankAtLeast(c->input(1), 1, &x));
      TF_RETURN_IF_ERROR(ReplaceLast(c, c->input(0), rows, c->Dim(x, -1), &dy));
      TF_RETURN_IF_ERROR(c->Merge(dy, x, &lead));
      c->set_output(0, c->input(3));
      return absl::OkStatus();
    })
    .Doc(
        "The sampled product: dvalues[p] = sum of dy[..., n] * x[..., columns[p]] over the batch.");

}  // namespace
}  // namespace accel_tf
