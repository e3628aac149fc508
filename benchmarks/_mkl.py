"""The sparse product of Intel's MKL, through its own C interface, with nothing in between.

A handle is made once for each batch size, told what it will be used for, and optimized for that; the
output is there beforehand. (The package sparse-dot-mkl makes a handle in each call, which takes 50 µs
more for the same kernels.)
"""

import ctypes
import functools
from importlib import metadata

import numpy as np
import scipy.sparse

_NO_TRANSPOSE, _GENERAL, _ROW_MAJOR = 10, 20, 101
_CALLS = 1000  # that MKL may expect, when it weighs what optimizing is worth


class _Description(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("type", "mode", "diagonal")]


_MATRIX = _Description(_GENERAL, 0, 0)
_ONE, _ZERO = ctypes.c_float(1), ctypes.c_float(0)


@functools.cache
def load():
    """Returns the library, or None where its wheel is not installed."""
    try:
        files = metadata.files("mkl") or []
    except metadata.PackageNotFoundError:
        return None
    return ctypes.CDLL(str(next(f.locate() for f in files if f.name.startswith("libmkl_rt."))))


class Product:
    """y = A · x, for a CSR matrix A in float32 and x of shape (columns, batch), or (columns,)."""

    def __init__(self, matrix: scipy.sparse.csr_matrix):
        self._shape = matrix.shape
        # MKL keeps pointers into these.
        self._pointers = matrix.indptr.astype(np.int32)
        self._columns = matrix.indices.astype(np.int32)
        self._values = matrix.data
        self._prepared = {}

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if x.shape not in self._prepared:
            self._prepared[x.shape] = self._prepare(x.shape)
        handle, outputs = self._prepared[x.shape]
        y = outputs[x is outputs[0]]  # in a chain of products, the input is never the output
        head = (_NO_TRANSPOSE, _ONE, handle, _MATRIX)
        if x.ndim == 1:
            _call("s_mv", *head, _address(x), _ZERO, _address(y))
        else:
            n = x.shape[1]
            _call("s_mm", *head, _ROW_MAJOR, _address(x), n, n, _ZERO, _address(y), n)
        return y

    def _prepare(self, shape):
        handle = ctypes.c_void_p()
        starts = _address(self._pointers)
        ends = ctypes.c_void_p(starts.value + self._pointers.itemsize)
        arrays = (starts, ends, _address(self._columns), _address(self._values))
        _call("s_create_csr", ctypes.byref(handle), 0, *self._shape, *arrays)
        if len(shape) == 1:
            _call("set_mv_hint", handle, _NO_TRANSPOSE, _MATRIX, _CALLS)
        else:
            _call("set_mm_hint", handle, _NO_TRANSPOSE, _MATRIX, _ROW_MAJOR, shape[1], _CALLS)
        _call("optimize", handle)
        y = (self._shape[0], *shape[1:])
        return handle, (np.empty(y, np.float32), np.empty(y, np.float32))

    def __del__(self):
        for handle, _ in self._prepared.values():
            _call("destroy", handle)


def _call(name: str, *arguments) -> None:
    status = getattr(load(), f"mkl_sparse_{name}")(*arguments)
    assert status == 0, f"mkl_sparse_{name} failed with status {status}"


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
