"""A graph for one image, run for each image of a batch."""

from collections.abc import Iterable, Mapping

import onnx
from onnx.helper import make_node, make_tensor_value_info

_AXIS = "image_axis"


def is_per_image(model: onnx.ModelProto) -> bool:
    """Whether the first axis of each input and output is the batch, of any size."""
    return bool(_batch(model.graph))


def _batch(graph: onnx.GraphProto) -> str:
    """The name of the batch axis; empty if there is none."""
    first = set()
    for value in (*graph.input, *graph.output):
        sizes = value.type.tensor_type.shape.dim
        first.add(sizes[0].dim_param if sizes else "")
    return first.pop() if len(first) == 1 else ""


def of_one_image(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for a batch of one."""
    one, batch = onnx.ModelProto(), _batch(model.graph)
    one.CopyFrom(model)
    for value in (*one.graph.input, *one.graph.output, *one.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == batch:
                size.dim_value = 1
    return one


def per_image(model: onnx.ModelProto, batched: onnx.GraphProto) -> onnx.ModelProto:
    """`model`, which takes one image, with the inputs and outputs of `batched`; edited in place.

    Its graph becomes the body of a Scan; weights stay outside.
    """
    body = onnx.GraphProto(name="image")
    nodes, before, after = onnx.GraphProto(node=model.graph.node).node, [], []
    # a name of the file cannot be used again in the body
    _rename(nodes, {value.name: f"{value.name}/one" for value in (*batched.input, *batched.output)})
    for given in model.graph.input:
        before.append(make_node("Unsqueeze", [f"{given.name}/image", _AXIS], [f"{given.name}/one"]))
        body.input.append(_without_batch(given, f"{given.name}/image"))
    for result in model.graph.output:
        after.append(make_node("Squeeze", [f"{result.name}/one", _AXIS], [f"{result.name}/image"]))
        body.output.append(_without_batch(result, f"{result.name}/image"))
    body.node.extend([*before, *nodes, *after])
    inputs, outputs = ([value.name for value in values] for values in (batched.input, batched.output))
    scan = make_node("Scan", inputs, outputs, body=body, num_scan_inputs=len(inputs))
    for field, values in (("node", [scan]), ("input", batched.input), ("output", batched.output)):
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(values)
    model.graph.initializer.append(onnx.helper.make_tensor(_AXIS, onnx.TensorProto.INT64, [1], [0]))
    return model


def _rename(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    for node in nodes:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                _rename(graph.node, names)
                for value in graph.output:
                    value.name = names.get(value.name, value.name)


def _without_batch(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    given = value.type.tensor_type
    sizes = [size.dim_param or size.dim_value for size in given.shape.dim]
    return make_tensor_value_info(name, given.elem_type, sizes[1:])
