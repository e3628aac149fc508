"""Where time and memory go: what a model costs, measured and counted.

::

    compare             quality, size, FLOPs and latency of models and files, as one table
    measure_latency     median and spread of the latency, candidates interleaved
    flops               multiplications and additions of the contractions in the graph
    parameters          numbers in the weights, and how many of them are not zero
    file_size           bytes on disk, plain and gzipped
    roofline            measured peak of this machine, in FLOP/s and bytes/s
    host                the processor, its instruction sets, and the versions of the software

Numbers are SI units without a prefix (seconds, bytes, FLOPs); only tables round and abbreviate.
"""

from accel_tf.benchmark._compare import Comparison, Measurement, compare
from accel_tf.benchmark._cost import FileSize, Parameters, file_size, flops, parameters
from accel_tf.benchmark._host import Host, Roofline, host, roofline
from accel_tf.benchmark._latency import Latency, measure_latency

__all__ = [
    "Comparison",
    "FileSize",
    "Host",
    "Latency",
    "Measurement",
    "Parameters",
    "Roofline",
    "compare",
    "file_size",
    "flops",
    "host",
    "measure_latency",
    "parameters",
    "roofline",
]
