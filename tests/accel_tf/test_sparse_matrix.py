"""accel_tf.sparse.SparseMatrix from the sparse matrices of other packages."""

import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf

import accel_tf as at

FORMATS = ["coo", "csr", "csc", "lil", "dia", "dok", "bsr"]


@pytest.mark.parametrize("format", FORMATS)
def test_matrices_and_arrays_of_scipy_become_what_their_dense_form_becomes(format):
    matrix = scipy.sparse.random(7, 5, 0.4, random_state=0)
    for w in (matrix.asformat(format), scipy.sparse.coo_array(matrix).asformat(format)):
        before = w.toarray()
        ours, dense = (at.SparseMatrix.from_dense(v, format="unstructured") for v in (w, before))
        assert ours.shape == (7, 5) and ours.nnz == 14
        for name in ("row_pointers", "columns", "values"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(dense, name))
        np.testing.assert_array_equal(w.toarray(), before)


def test_duplicates_are_summed_up_and_stored_zeros_dropped():
    entries = [1.0, 2.0, 3.0, -3.0, 0.0], ([0, 0, 1, 1, 2], [1, 1, 0, 0, 0])
    w = scipy.sparse.coo_array(entries, shape=(3, 2))
    matrix = at.SparseMatrix.from_dense(w)
    assert matrix.nnz == 1
    np.testing.assert_array_equal(matrix.to_dense(), [[0, 3], [0, 0], [0, 0]])
    assert w.nnz == 5  # unchanged
    assert at.SparseMatrix.from_dense(scipy.sparse.csr_array((3, 2))).nnz == 0


def test_a_sparse_tensor_is_refused_with_the_line_to_write():
    w = tf.sparse.from_dense(np.eye(3, dtype="float32"))
    with pytest.raises(ValueError, match=r"from_dense\(tf.sparse.to_dense\(w\)\)"):
        at.SparseMatrix.from_dense(w)
    assert at.SparseMatrix.from_dense(tf.sparse.to_dense(w)).nnz == 3
