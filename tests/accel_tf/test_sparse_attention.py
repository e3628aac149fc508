"""SparseEinsumDense and SparseMultiHeadAttention: the functions of the dense layers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import accel_tf as at
from accel_tf.sparse._attention import contraction, einsum_matrix


def sparse_kernel(layer, rng, density=0.3):
    kernel = rng.normal(size=layer.kernel.shape) * (rng.random(layer.kernel.shape) < density)
    layer.kernel.assign(kernel)
    return kernel.astype(np.float32)


@pytest.mark.parametrize(
    "equation, output_shape, bias_axes, shape",
    [
        ("abc,cde->abde", (None, 4, 5), "de", (2, 6, 12)),
        ("abcd,cde->abe", (None, 7), "e", (2, 6, 3, 4)),
        ("abc,cd->abd", (None, 9), None, (2, 6, 12)),
        ("ab,bc->ac", 9, "c", (3, 12)),
        ("...x,xy->...y", 9, "y", (2, 1, 6, 12)),
        ("abc,dc->abd", (None, 9), "d", (2, 6, 12)),  # a transposed kernel
        ("abcd,edcf->abfe", (None, 7, 2), "fe", (2, 6, 3, 4)),
    ],
)
def test_equals_einsum_dense(equation, output_shape, bias_axes, shape):
    rng = np.random.default_rng(0)
    dense = keras.layers.EinsumDense(equation, output_shape, bias_axes=bias_axes, activation="relu")
    dense.build(shape)
    kernel = sparse_kernel(dense, rng)
    bias = None
    if bias_axes:
        bias = rng.normal(size=dense.bias.shape).astype(np.float32)
        dense.bias.assign(bias)
    matrix = at.SparseMatrix.from_dense(einsum_matrix(equation, kernel), format="unstructured")
    sparse = at.SparseEinsumDense.from_matrix(
        matrix, equation, output_shape, bias, activation="relu"
    )
    x = rng.normal(size=shape).astype(np.float32)
    np.testing.assert_allclose(sparse(x), dense(x), rtol=1e-4, atol=1e-4)
    assert sparse.compute_output_shape(shape) == tuple(dense(x).shape)
    assert sparse.matrix.nnz == np.count_nonzero(kernel)
    again = at.SparseEinsumDense.from_config(sparse.get_config())
    assert again.get_config() == sparse.get_config()
    again.build(shape)
    again.set_weights(sparse.get_weights())
    np.testing.assert_array_equal(again(x), sparse(x))


@pytest.mark.parametrize(
    "equation",
    ["abc,bcd->abd", "abc,ad->abcd", "abc,cd->adb", "abc,bd->acd", "abc,cd->ab", "ab,bc->abc"],
)
def test_other_equations_are_refused(equation):
    with pytest.raises(ValueError, match=f"'{equation}' is no product with a matrix"):
        at.SparseEinsumDense(equation, (None, 4))


def test_errors_name_the_axes():
    assert contraction("abc,cde->abde") == ("ab", "c", "de")
    with pytest.raises(ValueError, match="bias_axes must be 'de' .* Received: 'e'"):
        at.SparseEinsumDense("abc,cde->abde", (None, 4, 5), bias_axes="e")
    with pytest.raises(ValueError, match=r"sizes of the axes 'de' .* Received: \(None, 5\)"):
        at.SparseEinsumDense("abc,cde->abde", (None, 5))
    layer = at.SparseEinsumDense("abcd,cde->abe", (None, 5), name="proj")
    with pytest.raises(ValueError, match="'proj' needs to know the axes 'cd' of its input"):
        layer.build((None, None, None, 4))


def attention(rng, **kwargs):
    dense = keras.layers.MultiHeadAttention(num_heads=3, key_dim=8, name="att", **kwargs)
    query, value = (rng.normal(size=(2, *s)).astype(np.float32) for s in ((5, 24), (7, 16)))
    dense(query, value)
    for layer in dense._flatten_layers(include_self=False):
        if isinstance(layer, keras.layers.EinsumDense):
            sparse_kernel(layer, rng)
            if layer.bias is not None:
                layer.bias.assign(rng.normal(size=layer.bias.shape))
    return dense, query, value


def from_attention(dense, names=None):
    """The sparse form, made as sparsify makes it."""
    inputs = [keras.Input((None, 24)), keras.Input((None, 16))]
    model = keras.Model(inputs, dense(*inputs))
    return at.sparsify(model, min_sparsity=0.5).get_layer("att")


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"value_dim": 5, "use_bias": False}, {"output_shape": (4, 6)}, {"dropout": 0.5}],
    ids=str,
)
def test_equals_multi_head_attention(kwargs):
    rng = np.random.default_rng(1)
    dense, query, value = attention(rng, **kwargs)
    sparse = from_attention(dense)
    assert isinstance(sparse, at.SparseMultiHeadAttention)
    mask = rng.random((2, 5, 7)) < 0.7
    for arguments in ({}, {"attention_mask": mask}, {"return_attention_scores": True}):
        for got, want in zip(
            tf.nest.flatten(sparse(query, value, **arguments)),
            tf.nest.flatten(dense(query, value, **arguments)),
            strict=True,
        ):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert sparse.compute_output_shape(query.shape, value.shape) == tuple(dense(query, value).shape)


def test_gated_attention():
    rng = np.random.default_rng(1)
    dense, query, value = attention(rng, use_gate=True)
    sparse = from_attention(dense)
    assert isinstance(sparse._gate_dense, at.SparseEinsumDense)
    np.testing.assert_allclose(sparse(query, value), dense(query, value), rtol=1e-4, atol=1e-4)


def test_its_projections_train_with_the_dense_ones():
    """Gradients of all weights, where one projection is dense and the others are not."""
    rng = np.random.default_rng(2)
    dense, query, value = attention(rng)
    dense.key_dense.kernel.assign(rng.normal(size=dense.key_dense.kernel.shape))
    sparse = from_attention(dense)
    assert type(sparse.key_dense) is keras.layers.EinsumDense
    gradients = {}
    for layer in (dense, sparse):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(query, value) ** 2)
        gradients[layer] = dict(
            zip(
                [v.path.split("/", 1)[-1] for v in layer.trainable_weights],
                tape.gradient(loss, [v.value for v in layer.trainable_weights]),
                strict=True,
            )
        )
    for name, gradient in gradients[dense].items():
        if name.endswith("bias"):
            other = tf.reshape(gradients[sparse][name], gradient.shape)
            np.testing.assert_allclose(other, gradient, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        gradients[sparse]["key/kernel"], gradients[dense]["key/kernel"], rtol=1e-3, atol=1e-3
    )


def test_new_attention_is_sparse_throughout():
    layer = at.SparseMultiHeadAttention(4, 8, sparsity=0.75, seed=0)
    x = np.ones((2, 3, 32), np.float32)
    layer(x, x)
    projections = (layer.query_dense, layer.key_dense, layer.value_dense, layer.output_dense)
    assert [p.matrix.density for p in projections] == [0.25] * 4
    with pytest.raises(ValueError, match="except for the last one, must be equal"):
        at.SparseMultiHeadAttention(4, 8).build((2, 3, 32), (2, 3, 32), (2, 4, 32))
