"""Sparse weights that make a layer faster, on a compiled op.

::

    the matrix      SparseMatrix                               _matrix.py, _pattern.py
    the product     sparse_matmul                              _matrix.py, _op.py, custom_ops/
    powers, graphs  matrix_power, propagate, a @ b             _power.py, custom_ops/
    its memory      tiles, chunks, slices                      _layout.py
    the layers      SparseDense, SparseConv1D, SparseConv2D    _layers.py, _conv.py, _base.py
                    SparseEinsumDense, SparseMultiHeadAttention   _attention.py
    a whole model   sparsify                                   _sparsify.py
    the choice      costs, tune, Costs                         _choice.py, _tune.py
    the build       isa, available_isas, OpVersionError        _op.py

Loading a `.keras` file or a SavedModel that holds sparse layers needs `import accel_tf` first.
"""

from ._attention import SparseEinsumDense, SparseMultiHeadAttention
from ._base import SparseLayer
from ._choice import Costs, costs
from ._conv import SparseConv1D, SparseConv2D
from ._layers import SparseDense
from ._matrix import SparseMatrix, sparse_matmul
from ._op import OpVersionError, available_isas, isa
from ._power import matrix_power, propagate
from ._sparsify import sparsify
from ._tune import tune

__all__ = [
    "Costs",
    "OpVersionError",
    "SparseConv1D",
    "SparseConv2D",
    "SparseDense",
    "SparseEinsumDense",
    "SparseLayer",
    "SparseMatrix",
    "SparseMultiHeadAttention",
    "available_isas",
    "costs",
    "isa",
    "matrix_power",
    "propagate",
    "sparse_matmul",
    "sparsify",
    "tune",
]
