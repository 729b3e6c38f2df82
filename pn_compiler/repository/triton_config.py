"""The file ``config.pbtxt`` of a model on Triton Inference Server, written by protobuf's own text format."""

import functools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import Message

from pn_compiler.base.errors import ExportError

#: ONNX element type -> that of the Open Inference Protocol; Triton's has TYPE_ before it.
DATATYPES = {
    "float": "FP32", "float16": "FP16", "double": "FP64", "bool": "BOOL",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
}  # fmt: skip

_QUEUE_DELAY = 2000  # microseconds that a request waits for others to share a batch with
_ENUM = (
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
)
#: The messages of Triton's model_config.proto that are needed here: field, number, type, whether repeated.
_MESSAGES = {
    "ModelInput": (
        ("name", 1, "string", False), ("data_type", 2, "DataType", False), ("dims", 4, "int64", True),
    ),
    "ModelOutput": (
        ("name", 1, "string", False), ("data_type", 2, "DataType", False), ("dims", 3, "int64", True),
    ),
    "ModelDynamicBatching": (("max_queue_delay_microseconds", 2, "uint64", False),),
    "ModelConfig": (
        ("backend", 17, "string", False), ("max_batch_size", 4, "int32", False),
        ("input", 5, "ModelInput", True), ("output", 6, "ModelOutput", True),
        ("dynamic_batching", 11, "ModelDynamicBatching", False),
    ),
}  # fmt: skip


def triton_config(
    inputs: list[dict[str, Any]], outputs: list[dict[str, Any]], max_batch_size: int
) -> Message:
    """The configuration of a model.

    Args:
        inputs, outputs: name, shape and element type, as in a report; an axis with a name has any size.
        max_batch_size: 0 if the server must not batch: the shapes then hold the first axis as well.
    """
    config = model_config_class()(backend="onnxruntime", max_batch_size=max_batch_size)
    for field, values in ((config.input, inputs), (config.output, outputs)):
        for value in values:
            dims = [size if isinstance(size, int) else -1 for size in value["shape"]]
            field.add(
                name=value["name"],
                data_type=f"TYPE_{datatype(value)}",
                dims=dims[1:] if max_batch_size else dims,
            )
    if max_batch_size:
        config.dynamic_batching.max_queue_delay_microseconds = _QUEUE_DELAY
    return config


def datatype(value: dict[str, Any]) -> str:
    """Element type in the Open Inference Protocol. Raises ExportError if it has none."""
    if value["dtype"] not in DATATYPES:
        raise ExportError(f"{value['name']} is of type {value['dtype']}, which servers do not take")
    return DATATYPES[value["dtype"]]


def parse_config(text: str) -> Any:
    """A configuration that someone wrote; what is not known here is left out.

    Raises:
        ExportError: it is not in protobuf's text format.
    """
    try:
        return text_format.Parse(text, model_config_class()(), allow_unknown_field=True)
    except text_format.ParseError as error:
        raise ExportError(f"config.pbtxt cannot be read: {error}") from error


def config_text(config: Message) -> str:
    text: str = text_format.MessageToString(config)
    return text


@functools.cache
def model_config_class() -> Any:
    """The protobuf class of ``inference.ModelConfig``."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    types = file.enum_type.add(name="DataType")
    for number, name in enumerate(("INVALID", *_ENUM)):
        types.value.add(name=f"TYPE_{name}", number=number)
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind, repeated in fields:
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            added = message.field.add(name=field, number=number, label=label)
            if kind.islower():
                added.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
            else:
                added.type = kinds.TYPE_ENUM if kind == "DataType" else kinds.TYPE_MESSAGE
                added.type_name = f".inference.{kind}"
    pool = descriptor_pool.DescriptorPool()  # its own: the default one may hold the whole of Triton's
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
