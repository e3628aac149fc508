"""The schema of LiteRT files: what their numbers for types and operators mean."""

import functools
import importlib


def litert_module(name):
    """Imports a module of ai_edge_litert, or says how to install it."""
    try:
        return importlib.import_module(f"ai_edge_litert.{name}")
    except ImportError as error:
        raise ImportError(
            "LiteRT files are read and run by ai_edge_litert, which is not installed. "
            "Install it with: pip install 'accel-tf[litert]'"
        ) from error


def schema():
    """Returns the module of classes for the tables of a LiteRT file."""
    return litert_module("schema_py_generated")


@functools.cache
def _type_names() -> dict[int, str]:
    return {code: name for name, code in vars(schema().TensorType).items()}


@functools.cache
def _operator_names() -> dict[int, str]:
    return {code: name for name, code in vars(schema().BuiltinOperator).items()}


def type_name(tensor) -> str | None:
    """Returns the data type of a tensor, such as `FLOAT32`; `None` if the schema has no such type."""
    return _type_names().get(tensor.type)


def code_name(code) -> str | None:
    """Returns the operator that a code stands for; `None` if the schema has no such operator."""
    # The code field outgrew a byte; files for old readers carry it in the field of that name.
    return _operator_names().get(max(code.builtinCode, code.deprecatedBuiltinCode))


def operator_name(model, op) -> str:
    """Returns the name of an operator, such as `CONV_2D`."""
    return code_name(model.operatorCodes[op.opcodeIndex])


def has_data(model, tensor) -> bool:
    """Whether the values of a tensor are stored in the file."""
    buffer = model.buffers[tensor.buffer]
    return buffer.offset > 1 or (buffer.data is not None and len(buffer.data) > 0)


def require(condition, message: str) -> None:
    """Raises a `ValueError` with a message unless a condition holds."""
    if not condition:
        raise ValueError(message)
