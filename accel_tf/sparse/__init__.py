"""Sparse weights that make a layer faster, on a compiled op.

::

    the matrix      SparseMatrix                         _matrix.py
    the product     sparse_matmul                        _matrix.py, custom_ops/
    the layer       SparseDense                          _layers.py
    a whole model   sparsify                             _sparsify.py
    the build       isa, available_isas, OpVersionError  _op.py

Loading a `.keras` file or a SavedModel that holds sparse layers needs `import accel_tf` first.
"""

from ._layers import SparseDense
from ._matrix import SparseMatrix, sparse_matmul
from ._op import OpVersionError, available_isas, isa
from ._sparsify import sparsify

__all__ = [
    "OpVersionError",
    "SparseDense",
    "SparseMatrix",
    "available_isas",
    "isa",
    "sparse_matmul",
    "sparsify",
]
