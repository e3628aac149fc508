"""Loops of integers: rewrites the loops of a LiteRT file so that their variables are integers.

The converter computes the body of a loop in integers, but a variable of the loop stays float32: the body
dequantizes it at its end and quantizes it again at its start, with the same parameters.
"""

import numpy as np

from accel_tf._litert_file import pack
from accel_tf._litert_schema import operator_name, schema


def integer_loops(content: bytes) -> bytes:
    """Returns the file with each loop variable stored as integers that is only read as such.

    Args:
        content: A LiteRT file.
    """
    file = schema().ModelT.InitFromPackedBuf(content, 0)
    loops = [
        _Loop(file, graph, op)
        for graph in file.subgraphs
        for op in graph.operators
        if operator_name(file, op) == "WHILE"
    ]
    if not loops:
        return content
    for loop in loops:
        for place in range(len(loop.op.inputs)):
            loop.store_as_integers(place)
    return pack(file)


class _Loop:
    """A WHILE operator with the graphs of its condition and its body."""

    def __init__(self, file, graph, op):
        self.file, self.graph, self.op = file, graph, op
        self.condition = file.subgraphs[op.builtinOptions.condSubgraphIndex]
        self.body = file.subgraphs[op.builtinOptions.bodySubgraphIndex]

    def store_as_integers(self, place):
        """Makes the variable at `place` an integer one, if the loop reads it in one format only."""
        before = self._dequantized(self.graph, self.op.inputs[place])
        after = self._dequantized(self.body, self.body.outputs[place])
        if before is None or after is None:
            return
        # What a graph returns as it is has no reader whose format could be compared.
        if self.op.outputs[place] in self.graph.outputs:
            return
        if self.body.inputs[place] in self.body.outputs:
            return
        like = self.body.tensors[after]
        readers = self._readers(self.body, self.body.inputs[place])
        readers_of_result = self._readers(self.graph, self.op.outputs[place])
        made = [
            self.graph.tensors[before],
            *(self.body.tensors[op.outputs[0]] for op in readers),
            *(self.graph.tensors[op.outputs[0]] for op in readers_of_result),
        ]
        operators = [*readers, *readers_of_result]
        if not all(self._is(op, "QUANTIZE") for op in operators) or any(
            not _same_format(tensor, like) for tensor in made
        ):
            return
        if self.condition.inputs[place] in _read(self.condition):
            return
        self.op.inputs = _with(self.op.inputs, place, before)
        self.body.outputs = _with(self.body.outputs, place, after)
        for graph, index in (
            (self.condition, self.condition.inputs[place]),
            (self.body, self.body.inputs[place]),
            (self.graph, self.op.outputs[place]),
        ):
            graph.tensors[index].type = like.type
            graph.tensors[index].quantization = like.quantization
        _bypass(self.body, readers, self.body.inputs[place])
        _bypass(self.graph, readers_of_result, self.op.outputs[place])
        for graph in (self.graph, self.body):
            read = _read(graph)
            graph.operators = [
                op
                for op in graph.operators
                if not self._is(op, "DEQUANTIZE") or op.outputs[0] in read
            ]

    def _is(self, op, name):
        return operator_name(self.file, op) == name

    def _dequantized(self, graph, index):
        """Returns the integers that a tensor of floats was dequantized from, `None` if it was not."""
        for op in graph.operators:
            if index in op.outputs:
                return op.inputs[0] if self._is(op, "DEQUANTIZE") else None
        return None

    def _readers(self, graph, index):
        return [op for op in graph.operators if index in op.inputs]


def _read(graph) -> set[int]:
    """Returns the tensors that an operator of a graph reads, or that are its outputs."""
    return {*graph.outputs, *(index for op in graph.operators for index in op.inputs)}


def _with(indices, place, index):
    return np.array([*indices[:place], index, *indices[place + 1 :]], np.int32)


def _bypass(graph, operators, index):
    """Removes operators with one output; what read their outputs reads tensor `index` instead."""
    outputs = {op.outputs[0] for op in operators}
    graph.operators = [op for op in graph.operators if op not in operators]

    def renamed(indices):
        return np.array([index if i in outputs else i for i in indices], np.int32)

    for op in graph.operators:
        op.inputs = renamed(op.inputs)
    graph.outputs = renamed(graph.outputs)


def _same_format(a, b) -> bool:
    """Whether two tensors have the same type and the same quantization parameters."""
    return a.type == b.type and all(
        np.array_equal(getattr(a.quantization, name), getattr(b.quantization, name))
        for name in ("scale", "zeroPoint")
    )
