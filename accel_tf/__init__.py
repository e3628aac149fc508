"""Make Keras 3 models faster, smaller and sturdier.

The map of the package; each technique is a module of its own name:

    measure      compare, measure_latency                          accel_tf.benchmark
    prune        prune, train_sparse, remove_channels, …           accel_tf.pruning
    cluster      cluster, strip_clustering                         accel_tf.clustering
    quantize     quantize_aware, calibrate, Int8, Int8Weights, …   accel_tf.quantization
    fuse         fuse                                              accel_tf.fusion
    sparse       sparsify, sparse_matmul, SparseMatrix, …          accel_tf.sparse
    distribute   mirrored_strategy                                 accel_tf.distribute
    export       litert, inspect_litert                            accel_tf.export
    data         digits, mnist1d, docstrings                       accel_tf.datasets
    TFMOT        schedules and models to and from tf_keras         accel_tf.interop.tfmot

Names and modules are imported on first use, except for those that define Keras layers.
"""

import importlib

# A .keras file names the classes of its layers, and Keras finds them once they are registered.
from . import quantization, sparse  # noqa: F401

__version__ = "0.1.0"

_NAMES = {
    "benchmark": ("compare", "measure_latency"),
    "clustering": ("cluster", "strip_clustering"),
    "distribute": ("mirrored_strategy",),
    "export": ("inspect_litert",),
    "fusion": ("fuse",),
    "pruning": (
        "NM",
        "SET",
        "Block",
        "Channels",
        "ConstantSparsity",
        "CosineDecay",
        "Cyclical",
        "ExponentialDecay",
        "FunctionSchedule",
        "Magnitude",
        "Movement",
        "OneShot",
        "PolynomialDecay",
        "RigL",
        "SoftThreshold",
        "SparsityLog",
        "Taylor",
        "Unstructured",
        "mask_channels",
        "prune",
        "remove_channels",
        "sensitivity",
        "sparsity",
        "strip_pruning",
        "train_sparse",
    ),
    "quantization": (
        "Float16",
        "Int4Weights",
        "Int8",
        "Int8Weights",
        "Int16x8",
        "Mixed",
        "calibrate",
        "quantize_aware",
    ),
    "report": ("report_of",),
    "sparse": (
        "SparseConv1D",
        "SparseConv2D",
        "SparseDense",
        "SparseEinsumDense",
        "SparseMatrix",
        "SparseMultiHeadAttention",
        "matrix_power",
        "propagate",
        "sparse_matmul",
        "sparsify",
    ),
}
_MODULES = (
    "benchmark",
    "clustering",
    "datasets",
    "distribute",
    "export",
    "fusion",
    "interop",
    "layers",
    "pruning",
    "quantization",
    "report",
    "sparse",
)
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
