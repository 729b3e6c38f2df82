"""Exported programs that would run code, hang or mislead, and damaged ones."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.security.files import CANARY, Case, Payload, entries, packed, program, reprogrammed, saved

_EXPORT = "not what torch.export writes"
_CODE = "__import__('os').system('touch canary')"
_PROGRAM = "models/model.json"
_WEIGHTS = "data/weights/model_weights_config.json"
_DAMAGED = "is damaged"
_TARGETS = """
    torch.hub.load torch.load torch.ops.load_library torch.ops.aten.from_file.default os.system
    builtins.eval torch.ops.aten.__init__ torch.ops.aten.conv2d.__call__ torch.ops.aten._print.default
    torch.ops.aten.warn.default torch.ops.aten.save.default torch.ops.aten.set_.source_Storage
    _operator.attrgetter _operator.methodcaller _operator.pow _operator.lshift math.factorial
    math.__loader__ torch.ops.higher_order.while_loop
    torch.ops.higher_order.triton_kernel_wrapper_functional torch.ops.my_library.my_operator.default
    torch.ops.aten.no_such_operator.default #ext:call conv2d torch.ops.aten.conv2d torch._C._jit_init
    torch.serialization.os.system torch.ops.prim.Print.default
"""
Change = Callable[[dict[str, Any]], Any]


def program_cases() -> Iterator[Case]:
    for group in (_names, _operators, _expressions, _trees, _versions, _weights, _entries, _values):
        for name, change, expected in group():
            yield Case(f"{name}.pt2", reprogrammed(change), expected, ())
    twin_names = {
        "constant": ("tensor_constant", "tensor_constant_name"),
        "buffer": ("buffer", "buffer_name"),
    }
    for name, (kind, field) in twin_names.items():
        change = _in_signature(kind, field, f'x", {_CODE}, "')
        yield Case(f"twin_{name}.pt2", reprogrammed(change, twins=True), _EXPORT, ())
    yield Case("garbage.pt2", packed({"p/models/model.json": b"{}"}), _DAMAGED, ())


def _graph(contents: dict[str, Any]) -> dict[str, Any]:
    graph: dict[str, Any] = contents[_PROGRAM]["graph_module"]["graph"]
    return graph


def _signature(contents: dict[str, Any]) -> dict[str, Any]:
    signature: dict[str, Any] = contents[_PROGRAM]["graph_module"]["signature"]
    return signature


def _call(contents: dict[str, Any]) -> dict[str, Any]:
    call: dict[str, Any] = contents[_PROGRAM]["graph_module"]["module_call_graph"][0]["signature"]
    return call


def _in_program(**fields: Any) -> Change:
    return lambda contents: contents[_PROGRAM].update(fields)


def _in_node(**fields: Any) -> Change:
    return lambda contents: _graph(contents)["nodes"][0].update(fields)


def _in_signature(kind: str, field: str, value: Any) -> Change:
    def change(contents: dict[str, Any]) -> None:
        spec = next(spec for spec in _signature(contents)["input_specs"] if kind in spec)
        spec[kind][field] = value

    return change


def _names() -> Iterator[tuple[str, Change, str]]:
    def renamed(old: str, new: str) -> Change:
        def change(contents: dict[str, Any]) -> None:
            import json

            text = json.dumps(contents[_PROGRAM]).replace(json.dumps(old), json.dumps(new))
            contents[_PROGRAM] = json.loads(text)

        return change

    for title, name in {
        "call": f"b={_CODE}, *a",
        "newline": "a\n    import os",
        "semicolon": "a; import os",
        "default": f"a={_CODE}",
        "dunder": "__builtins__",
        "torch": "torch",
        "self": "self",
        "empty": "",
        "endless": "a" * 10_000,
    }.items():
        yield f"placeholder_{title}", renamed("p_0_weight", name), _EXPORT
        yield f"node_{title}", renamed("conv2d", name), _EXPORT
    for title, name in {
        "call": f'0"), {_CODE}, ("',
        "dunder": "__class__.x",
        "method": "forward",
        "dots": "a..b",
    }.items():
        yield f"parameter_{title}", _in_signature("parameter", "parameter_name", name), _EXPORT
        yield f"buffer_{title}", _in_signature("buffer", "buffer_name", name), _EXPORT
    yield "node_name", _in_node(name=f"x={_CODE}"), _EXPORT
    yield "argument_name", lambda c: _graph(c)["nodes"][0]["inputs"][0].update(name=f"x={_CODE}, y"), _EXPORT
    yield "forward_names", lambda c: _call(c).update(forward_arg_names=[f"x={_CODE}"]), _EXPORT
    yield (
        "call_name",
        lambda c: c[_PROGRAM]["graph_module"]["module_call_graph"][1].update(fqn='"); import os'),
        _EXPORT,
    )


def _operators() -> Iterator[tuple[str, Change, str]]:
    for target in _TARGETS.split():
        yield f"target_{target.replace('#', '')}", _in_node(target=target), "which is no ATen operator"
    operator = {"as_operator": "torch.hub.load"}
    yield (
        "operator_argument",
        lambda c: _graph(c)["nodes"][0]["inputs"][0].update(arg=operator),
        "no ATen operator",
    )


def _expressions() -> Iterator[tuple[str, Change, str]]:
    def sized(expression: str) -> Change:
        def change(contents: dict[str, Any]) -> None:
            size = {"as_expr": {"expr_str": expression, "hint": None}}
            next(iter(_graph(contents)["tensor_values"].values()))["sizes"][0] = size

        return change

    for title, expression in {
        "tower": "Pow(9,Pow(9,Pow(9,9)))",
        "stars": "9**9**9**9",
        "nested_powers": "Pow(Pow(Pow(Pow(Pow(9,99),99),99),99),99)",
        "symbol_tower": "Pow(Symbol('s0'), Symbol('s0'))",
        "import": _CODE,
        "attribute": "().__class__.__base__",
        "lambda": "(lambda: 0)()",
        "text": "'a'*10**10",
        "factorial": "factorial(10**8)",
        "shift": "1 << 10**10",
        "long": "+".join(["s0"] * 100_000),
        "deep": "(" * 5000 + "1" + ")" * 5000,
        "digits": "9" * 100_000,
        "empty": "",
        "unicode": "\uff530",
        "float": "Float('1e999999999')",
        "symbol": 'Symbol("s0\'); import os")',
        "assumption": "Symbol('s0', cls=s0)",
        "walrus": "(s0 := 5)",
        "summation": "Sum(s0, (s0, 1, 10**9))",
    }.items():
        yield f"expression_{title}", sized(expression), "not arithmetic on sizes"
    for key in ("u999999999999", _CODE, "9**9**9**9"):
        limits = {key: {"min_val": 0, "max_val": None}}
        yield f"range_{len(key)}", _in_program(range_constraints=limits), _EXPORT
    product = {
        "target": "_operator.mul", "name": None, "metadata": {}, "is_hop_single_tensor_return": None,
        "inputs": [{"name": "", "arg": {"as_sym_int": {"as_name": "sym"}}, "kind": 1}] * 2,
        "outputs": [{"as_sym_int": {"as_name": "sym"}}],
    }  # fmt: skip
    yield "products", lambda c: _graph(c)["nodes"].extend([product] * 50), "grows beyond bounds"


def _trees() -> Iterator[tuple[str, Change, str]]:
    import json

    def tree(kind: str | None, context: Any, children: list[Any] | None = None) -> str:
        return json.dumps([1, {"type": kind, "context": context, "children_spec": children or []}])

    leaf = {"type": None, "context": None, "children_spec": []}
    deep: Any = leaf
    for _ in range(200):
        deep = {"type": "builtins.list", "context": "null", "children_spec": [deep]}
    for title, text in {
        "import": tree(
            "collections.defaultdict",
            json.dumps({"default_factory_module": "os", "default_factory_name": "system"}),
        ),
        "enum": tree(
            "builtins.dict", json.dumps([{"__enum__": True, "fqn": "os:system", "name": "x"}]), [leaf]
        ),
        "type": tree("os.system", "null"),
        "namedtuple": tree("collections.namedtuple", '"Point"'),
        "json": "[1, {",
        "protocol": "[99, {}]",
        "deep": json.dumps([1, deep]),
        "empty": "",
        "keys": tree("builtins.dict", '["a", "b"]', [leaf]),
    }.items():
        yield f"tree_{title}", lambda c, t=text: _call(c).update(in_spec=t), _EXPORT
        yield f"out_tree_{title}", lambda c, t=text: _call(c).update(out_spec=t), _EXPORT


def _versions() -> Iterator[tuple[str, Change, str]]:
    for major in (7, 9, 10**6, -1):
        yield f"schema_{major}", _in_program(schema_version={"major": major, "minor": 0}), "schema version"
    for title, version in (("text", "8"), ("none", None), ("list", [8, 20])):
        yield f"schema_{title}", _in_program(schema_version=version), _DAMAGED
    yield "archive_version", lambda c: c.update(archive_version=b"7"), "schema version"
    yield "archive_format", lambda c: c.update(archive_format=b"zip"), _DAMAGED
    yield "verifier", _in_program(verifiers=["MINE"]), _EXPORT
    yield "torch_version", _in_program(torch_version="2.9\nimport os"), _EXPORT
    yield "new_field", _in_program(new_field="text"), _EXPORT
    yield (
        "custom_objects",
        lambda c: _graph(c).update(custom_obj_values={"a": {"name": "a", "class_fqn": "b"}}),
        _EXPORT,
    )
    yield (
        "named_tuples",
        lambda c: c[_PROGRAM]["graph_module"].update(
            treespec_namedtuple_fields={"os.system": {"field_names": []}}
        ),
        _EXPORT,
    )


def _weights() -> Iterator[tuple[str, Change, str]]:
    def in_payload(**fields: Any) -> Change:
        return lambda contents: contents[_WEIGHTS]["config"]["0.weight"].update(fields)

    def in_meta(**fields: Any) -> Change:
        return lambda contents: contents[_WEIGHTS]["config"]["0.weight"]["tensor_meta"].update(fields)

    def sizes(*numbers: Any) -> list[Any]:
        return [{"as_int": number} for number in numbers]

    impossible = "impossible size|not what torch.export writes"
    yield "weight_pickle", in_payload(use_pickle=True), "pickled object"
    yield "weight_path", in_payload(path_name="../../canary"), _EXPORT
    yield "weight_object", in_payload(path_name="custom_obj_0"), "which is no tensor"
    yield "weight_missing_file", in_payload(path_name="weight_999"), _DAMAGED
    yield "weight_no_meta", in_payload(tensor_meta=None), "which is no tensor"
    yield "weight_dtype", in_meta(dtype=8), impossible
    yield "weight_dtype_odd", in_meta(dtype=99), _EXPORT
    yield "weight_dtype_text", in_meta(dtype="float"), _EXPORT
    yield "weight_layout", in_meta(layout=1), _EXPORT
    yield "weight_device", in_meta(device={"type": "os.system", "index": None}), _EXPORT
    for title, shape in {
        "large": (400, 3, 3, 3), "negative": (-4, 3, 3, 3), "endless": (10**12, 10**12, 3, 3),
        "rank": (4, 27), "nan": (float("nan"), 3, 3, 3), "text": ("4", 3, 3, 3), "bool": (True, 3, 3, 3),
        "float": (4.0, 3, 3, 3),
    }.items():  # fmt: skip
        yield f"weight_size_{title}", in_meta(sizes=sizes(*shape)), impossible
    yield "weight_strides", in_meta(strides=sizes(10**9, 1, 1, 1)), impossible
    yield "weight_stride_negative", in_meta(strides=sizes(-27, 9, 3, 1)), impossible
    yield "weight_offset", in_meta(storage_offset={"as_int": 10**9}), impossible
    symbolic = [{"as_expr": {"expr_str": "Symbol('s0')", "hint": None}}] * 4
    yield "weight_symbolic", in_meta(sizes=symbolic), impossible
    yield "weight_empty_file", lambda c: c.update({"data/weights/weight_0": b""}), impossible
    yield "weight_short_file", lambda c: c.update({"data/weights/weight_0": b"123"}), impossible
    yield "weight_missing", lambda c: c[_WEIGHTS]["config"].pop("0.weight"), _DAMAGED
    yield "weight_alias", in_payload(path_name="weight_5"), impossible
    yield "weights_no_config", lambda c: c.pop(_WEIGHTS), _DAMAGED
    yield "weights_list", lambda c: c.update({_WEIGHTS: []}), _EXPORT


def _entries() -> Iterator[tuple[str, Change, str]]:
    inputs = "data/sample_inputs/model.pt"
    payload = saved(Payload(__import__("os").system, CANARY))
    yield "sample_inputs", lambda c: c.update({inputs: payload}), _saves("a call of")
    nested = saved(((torch.zeros(2, 3, 8, 8), Payload(eval, _CODE)), {}))
    yield "sample_inputs_nested", lambda c: c.update({inputs: nested}), _saves("a call of")
    legacy = saved(Payload(eval, _CODE), _use_new_zipfile_serialization=False)
    yield "sample_inputs_legacy", lambda c: c.update({inputs: legacy}), _DAMAGED
    yield "sample_inputs_cut", lambda c: c.update({inputs: saved(1)[:-40]}), _DAMAGED
    yield "sample_inputs_number", lambda c: c.update({inputs: saved(1)}), "load|example inputs"
    yield "sample_inputs_empty", lambda c: c.update({inputs: b""}), "example inputs|keyword"
    yield "sample_inputs_missing", lambda c: c.pop(inputs), "load|damaged"
    yield (
        "sample_inputs_keywords",
        lambda c: c.update({inputs: saved(((torch.zeros(2, 3, 8, 8),), {"a": 1}))}),
        "load|keyword",
    )
    for name in (
        "data/constants/opaque_obj_0", "data/constants/custom_obj_0", "data/constants/model.pt",
        "data/weights/model.pt", "data/aotinductor/model/model.so",
        "data/aotinductor/model/weights_config.json",
        "models/other.json", "code/model.py", "data/executorch/model.pte", "extra/../canary",
    ):  # fmt: skip
        title = name.replace("/", "_").replace("..", "up")
        yield (
            f"entry_{title}",
            lambda c, n=name: c.update({n: b"{}"}),
            "may bring code|is a zip archive but not",
        )
    yield "program_missing", lambda c: c.pop(_PROGRAM), "not a model saved by"
    yield "program_cut", lambda c: c.update({_PROGRAM: b'{"graph_module": {"graph"'}), _DAMAGED
    yield "program_deep", lambda c: c.update({_PROGRAM: b"[" * 100_000}), _DAMAGED
    yield "program_utf16", lambda c: c.update({_PROGRAM: "{}".encode("utf-16")}), _DAMAGED
    yield "program_digits", lambda c: c.update({_PROGRAM: b"[" + b"9" * 10_000 + b"]"}), _DAMAGED
    yield "program_list", lambda c: c.update({_PROGRAM: []}), _DAMAGED


def _saves(what: str) -> str:
    return f"{what}.*not what torch.save writes"


def _values() -> Iterator[tuple[str, Change, str]]:
    yield "no_nodes", lambda c: _graph(c).update(nodes=[]), "load|KeyError"
    yield "no_graph", lambda c: c[_PROGRAM]["graph_module"].pop("graph"), _EXPORT
    yield "nodes_text", lambda c: _graph(c).update(nodes="conv2d"), _EXPORT
    yield "huge_number", lambda c: _graph(c)["nodes"][0]["inputs"][0].update(arg={"as_int": 10**30}), _EXPORT
    yield (
        "huge_sizes",
        lambda c: _graph(c)["nodes"][0]["inputs"][0].update(arg={"as_ints": [10**9, 10**9]}),
        _EXPORT,
    )
    yield (
        "two_values",
        lambda c: _graph(c)["nodes"][0]["inputs"][0].update(arg={"as_int": 1, "as_bool": True}),
        _EXPORT,
    )
    yield "metadata_key", _in_node(metadata={"source": _CODE}), _EXPORT
    yield "lost_input", lambda c: _graph(c)["nodes"][0]["inputs"].pop(0), "load"
    yield (
        "unknown_input",
        lambda c: _graph(c)["nodes"][0]["inputs"][0].update(arg={"as_tensor": {"name": "nobody"}}),
        "load",
    )
    yield "output_twice", lambda c: _graph(c)["nodes"].append(_graph(c)["nodes"][0]), "load"
    giant = [{"as_int": 10**12}]
    yield (
        "giant_tensor",
        lambda c: next(iter(_graph(c)["tensor_values"].values())).update(
            sizes=giant, strides=[{"as_int": 1}]
        ),
        _EXPORT,
    )
    good = entries(program())
    assert good, "the program that is spoilt"
