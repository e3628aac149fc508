// The ops as XLA calls them from compiled code. The targets of the calls have the ops' names.
#pragma once

#include "xla/ffi/api/c_api.h"

#define ACCEL_TF_HANDLER(name) \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* name(XLA_FFI_CallFrame*)
ACCEL_TF_HANDLER(AccelTfSparseMatMulHandler);
ACCEL_TF_HANDLER(AccelTfSparseMatMulGradXHandler);
ACCEL_TF_HANDLER(AccelTfSparseMatMulGradValuesHandler);
#undef ACCEL_TF_HANDLER
