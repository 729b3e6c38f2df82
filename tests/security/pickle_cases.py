"""Pickles that call what they should not, or describe modules and tensors that torch would not make."""

import collections
import functools
import os
import re
import subprocess
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.security.files import (
    CANARY,
    COMPILE,
    LOADS,
    ONE_IMAGE,
    Case,
    Payload,
    called,
    changed,
    entries,
    packed,
    pickled,
    saved,
)

_RUNS_CODE = "can run any code"
_STATE = "not what torch.save writes"
_FUNCTIONS = """
    os.system posix.system nt.system subprocess.Popen subprocess.check_output commands.getoutput
    commands.Popen builtins.eval builtins.exec builtins.getattr builtins.open builtins.__import__
    __builtin__.execfile importlib.import_module runpy._run_code pty.spawn webbrowser.open shutil.rmtree
    functools.reduce operator.methodcaller operator.attrgetter pickle.loads marshal.loads
    types.FunctionType code.interact torch.load torch.hub.load torch.jit.load torch.ops.load_library
    torch.classes.load_library torch.utils.cpp_extension.load torch.utils._config_module.exec
    torch.package.PackageImporter torch.nn.Module.__subclasses__ torch.nn.modules.module.torch.hub.load
    numpy.load numpy.f2py.compile copyreg._reconstructor pip.main requests.get bdb.Bdb.run
"""
_CLASSES = ("my_package.Net", "my_package.layers.Block", "research.models.resnet.ResNet50")


def pickle_cases() -> Iterator[Case]:
    yield from _calls()
    yield from _spoilt_modules()
    yield from _spoilt_tensors()
    yield from _spoilt_pickles()
    yield from _state_dicts()
    yield from _modules_that_do_not_run()


def _calls() -> Iterator[Case]:
    for name in _FUNCTIONS.split():
        yield Case(f"calls_{name}.pt", pickled(called(name)), f"{_RUNS_CODE}|source text")
    for name in ("torch.fx.graph_module.reduce_graph_module", "torch.jit._script.unpack"):
        yield Case(f"calls_{name}.pt", pickled(called(name)), "source text")
    for name in _CLASSES:
        yield Case(f"unknown_{name}.pt", pickled(called(name)), f"--allow {re.escape(name)}")
    yield Case("script_class.pt", pickled(called("__main__.Net")), "defined in the script")
    yield Case("allowed_function.pt", pickled(called("os.system")), "only classes", ("--allow", "os.system"))
    allowed = ("--allow", "subprocess.Popen")
    yield Case("allowed_class.pt", pickled(called("subprocess.Popen")), "neither an nn.Module", allowed)
    allowed = ("--allow", "torch.fx.GraphModule")
    yield Case("allowed_graph.pt", pickled(called("torch.fx.GraphModule")), "source text", allowed)
    yield Case("module_called.pt", pickled(called("torch.nn.modules.linear.Identity")), _STATE)
    yield Case("activation_called.pt", pickled(called("torch.nn.functional.relu")), _STATE)
    for name, function in (("system", os.system), ("popen", subprocess.Popen), ("eval", eval)):
        argument = "__import__('os').system('touch canary')" if function is eval else CANARY
        yield Case(
            f"payload_{name}.pt", changed(_attribute("extra", Payload(function, argument))), _RUNS_CODE
        )
    traced = saved(torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())))
    yield Case("graph_module.pt", traced, "source text")


def _attribute(key: str, value: Any) -> Callable[[nn.Module], Any]:
    return lambda net: net.__dict__.__setitem__(key, value)


def _in_layer(key: str, value: Any) -> Callable[[nn.Sequential], Any]:
    return lambda net: net[0].__dict__.__setitem__(key, value)


def _renamed(table: str, name: Any) -> bytes:
    """The first entry of a table of the first layer that has one gets another name."""

    def change(net: nn.Sequential) -> None:
        owner = net if table == "_modules" else net[1]
        old = getattr(owner, table)
        owner.__dict__[table] = type(old)(
            (name if i == 0 else key, value) for i, (key, value) in enumerate(old.items())
        )

    return changed(change)


def _spoilt_modules() -> Iterator[Case]:
    names = {
        "source": '0", [__import__("os").system("touch canary")]) or ("',
        "newline": "a\nimport os",
        "dotted": "a.b",
        "dunder": "__class__",
        "method": "forward",
        "empty": "",
        "number": 7,
        "endless": "x" * 100_000,
        "nul": "a\0b",
    }
    for table in ("_modules", "_parameters", "_buffers"):
        for title, name in names.items():
            yield Case(f"{table}_{title}.pt", _renamed(table, name), _STATE)
        yield Case(f"{table}_list.pt", changed(_attribute(table, [])), _STATE)
        yield Case(f"{table}_none.pt", changed(_attribute(table, None)), _STATE)
        yield Case(f"{table}_missing.pt", changed(lambda net, t=table: net.__dict__.pop(t)), _STATE)
        yield Case(f"{table}_text.pt", changed(_attribute(table, {"a": "text"})), _STATE)
    yield Case("contains_itself.pt", changed(lambda net: net._modules.__setitem__("5", net)), _STATE)
    yield Case("contains_parent.pt", changed(lambda net: net[0]._modules.__setitem__("up", net)), _STATE)
    attributes = {
        "forward": F.relu, "__class__": nn.ReLU, "training": "yes", "state_dict": F.silu,
        "named_modules": F.relu,
        "a b": 1, "a;b": 1, "__call__": F.relu, "_call_impl": F.gelu,
        "_forward_hooks": OrderedDict({0: F.relu}), "_forward_pre_hooks": OrderedDict({0: F.relu}),
        "_state_dict_hooks": OrderedDict({0: F.relu}), "huge": 10**30, "_conv_forward": F.hardtanh,
    }  # fmt: skip
    for key, value in attributes.items():
        yield Case(f"attribute_{key.replace(' ', '_')}.pt", changed(_in_layer(key, value)), _STATE)
    compiled = entries(changed(_in_layer("_compiled_call_impX", F.relu)))  # torch.save would leave it out
    compiled = {name: content.replace(b"call_impX", b"call_impl") for name, content in compiled.items()}
    yield Case("attribute_compiled.pt", packed(compiled), "compiled call")
    yield Case("recurrent.pt", changed(lambda net: net.append(_deep_lstm())), _STATE)
    partial = functools.partial(F.relu)
    yield Case(
        "partial.pt",
        changed(_attribute("extra", Payload(functools.partial, Payload(os.system, CANARY)))),
        _RUNS_CODE,
    )
    odd = Payload(functools.partial, torch.Size)
    yield Case("partial_size.pt", changed(_attribute("extra", odd)), _STATE)
    yield Case("partial_forward.pt", changed(_attribute("forward", partial)), _STATE)
    yield Case("nested_lists.pt", changed(_attribute("extra", _nest(400))), "nested too deep")
    yield Case("laughs.pt", changed(_attribute("extra", _double(64))), "too many values")
    yield Case("doubling_modules.pt", saved(_doubling(40)), "too many values")
    yield Case(
        "nested_modules.pt",
        saved(functools.reduce(lambda net, _: nn.Sequential(net), range(70), nn.ReLU())),
        "nested",
    )
    hiding = OrderedDict(a=torch.zeros(1))
    hiding.update = F.relu
    yield Case("hidden_items.pt", saved(hiding), _STATE)


def _deep_lstm() -> nn.Module:
    lstm = nn.LSTM(2, 2)
    lstm.num_layers = 10**12
    return lstm


def _nest(depth: int) -> Any:
    return functools.reduce(lambda inner, _: [inner], range(depth), [])


def _double(times: int) -> Any:
    return functools.reduce(lambda inner, _: [inner, inner], range(times), [0])


def _doubling(times: int) -> nn.Module:
    return functools.reduce(lambda net, _: nn.Sequential(net, net), range(times), nn.ReLU())


class Tensors:
    """Pickles as a tensor with these arguments of ``_rebuild_tensor_v2`` after its storage."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        storage = torch.zeros(8)._typed_storage()
        return torch._utils._rebuild_tensor_v2, (storage, *self.arguments)


def _spoilt_tensors() -> Iterator[Case]:
    hooks: OrderedDict[Any, Any] = OrderedDict()
    shapes = {
        "too_large": (0, (100,), (1,)),
        "offset": (7, (2,), (1,)),
        "negative_offset": (-1, (2,), (1,)),
        "negative_size": (0, (-2,), (1,)),
        "negative_stride": (4, (2,), (-1,)),
        "expanded": (0, (10**12,), (0,)),
        "endless": (0, (2**62, 2**62), (0, 0)),
        "text": (0, ("2",), (1,)),
        "nan": (0, (float("nan"),), (1,)),
        "rank": (0, (2,), (1, 1)),
        "dims": (0, (1,) * 100, (1,) * 100),
        "no_tuple": (0, 3, 1),
    }
    for name, shape in shapes.items():
        yield Case(f"tensor_{name}.pt", saved({"a": Tensors(*shape, False, hooks)}), "impossible size")
    yield Case(
        "tensor_hooks.pt", saved({"a": Tensors(0, (2,), (1,), False, OrderedDict({0: F.relu}))}), "with hooks"
    )
    good = entries(saved(nn.Linear(3, 4)))
    for name, values in (("short", b"1234"), ("long", bytes(1000)), ("empty", b"")):
        yield Case(f"values_{name}.pt", packed(good | {"archive/data/0": values}), "missing or cut short")
    without = {name: content for name, content in good.items() if not name.endswith("data/1")}
    yield Case("values_missing.pt", packed(without), "missing or cut short")
    for name in ("torch.Tensor", "torch.FloatTensor", "builtins.bytearray", "torch._utils._rebuild_qtensor"):
        huge = (
            b"\x80\x02c"
            + name.replace(".", " ", name.count(".") - 1).replace(" ", ".").rpartition(".")[0].encode()
        )
        huge += b"\n" + name.rpartition(".")[2].encode() + b"\n\x8a\x06\0\0\0\0\0\x10\x85R."
        yield Case(f"allocates_{name}.pt", pickled(huge), _RUNS_CODE)


def _spoilt_pickles() -> Iterator[Case]:
    pickles = {
        "empty": b"",
        "no_stop": b"\x80\x02}",
        "only_stop": b"\x80\x02.",
        "underflow": b"\x80\x02R.",
        "frames": b"\x80\x04\x95\x02\0\0\0\0\0\0\0}.",
        "protocol": b"\x80\x05}.",
        "memo": b"\x80\x02h\x07.",
        "long_text": b"\x80\x02X\xff\xff\xff\x7fabc.",
        "bytes": b"\x80\x02B\xff\xff\xff\xff.",
        "instance": b"\x80\x02(ios\nsystem\n.",
        "object": b"\x80\x02(cos\nsystem\nX\x02\0\0\0lso.",
        "extension": b"\x80\x02\x82\x01.",
        "stack_global": b"\x80\x02X\x02\0\0\0osX\x06\0\0\0system\x93.",
        "persistent": b"\x80\x02Pos\n.",
        "append_to_number": b"\x80\x02K\x01K\x02a.",
        "item_of_number": b"\x80\x02K\x01K\x02K\x03s.",
        "odd_items": b"\x80\x02}(K\x01u.",
        "state_of_number": b"\x80\x02K\x01}b.",
        "unhashable": b"\x80\x02}]K\x01s.",
        "itself": b"\x80\x02]q\0h\0a.",
        "storage": b"\x80\x02(X\x07\0\0\0storageK\x01tQ.",
        "garbage": bytes(range(256)),
        "memo_place": b"\x80\x02}r\xff\xff\xff\x7f.",
        "number": b"\x80\x02\x8a\xff" + b"\xff" * 254 + b"\x7f.",
        "calls_a_list": b"\x80\x02])R.",
        "new_of_a_list": b"\x80\x02])\x81.",
        "marks": b"\x80\x02" + b"(" * 100_000 + b".",
        "tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    }
    for name, content in pickles.items():
        yield Case(
            f"pickle_{name}.pt",
            pickled(content),
            "is damaged|not what torch.save writes|nested too deep|neither a|does not write",
        )


def _state_dicts() -> Iterator[Case]:
    linear = ("--arch", "torch.nn:Identity")
    bn = ("--arch", "tests.security.files:network", *ONE_IMAGE)
    yield Case(
        "keys_are_numbers.pt", saved({0: torch.zeros(2), 1: torch.ones(2)}), "keys that are no names", linear
    )
    yield Case("keys_are_tuples.pt", saved({(1, 2): torch.zeros(2)}), "keys that are no names", linear)
    state = changed_state(lambda key, value: value.to(torch.int64) if value.is_floating_point() else value)
    yield Case("state_int64.pt", state, "holds int64, not float32", bn)
    state = changed_state(
        lambda key, value: value.to(torch.complex64) if value.is_floating_point() else value
    )
    yield Case("state_complex.pt", state, "holds complex64, not float32", bn)
    state = changed_state(lambda key, value: value > 0)
    yield Case("state_bool.pt", state, "holds bool, not float32", bn)
    yield Case("state_shapes.pt", changed_state(lambda key, value: value[None]), "does not fit", bn)
    yield Case("state_missing.pt", saved({"0.weight": torch.zeros(4, 3, 3, 3)}), "does not fit", bn)
    yield Case("state_empty.pt", saved({}), "neither a module nor a state_dict", bn)
    yield Case("counter.pt", saved(collections.Counter("abc")), "neither|can run any code", bn)
    for name, value in (
        ("number", 3),
        ("text", "weights"),
        ("list", [1, 2]),
        ("none", None),
        ("tensor", torch.ones(3)),
    ):
        yield Case(f"holds_{name}.pt", saved(value), "neither a module nor a state_dict")


def changed_state(change: Callable[[str, torch.Tensor], torch.Tensor]) -> bytes:
    from tests.security.files import network

    return saved(OrderedDict((key, change(key, value)) for key, value in network().state_dict().items()))


def _modules_that_do_not_run() -> Iterator[Case]:
    fails = "does not run|not enough memory|GB of memory"
    for key, value in {
        "stride": "ab", "padding": None, "dilation": (0, 0), "groups": -1, "padding_mode": "nonsense",
    }.items():  # fmt: skip
        yield _run(f"layer_{key}.pt", _in_layer(key, value), fails)
    for title, size in {
        "text": "abc",
        "texts": ("a", 8),
        "giant": (3, 10**5, 10**5),
        "negative": (3, -8),
    }.items():
        content = changed(_attribute("pretrained_cfg", {"input_size": size}))
        yield Case(
            f"pretrained_{title}.pt", content, LOADS if title == "text" else "input shape", (), COMPILE
        )
    yield Case("wide.pt", saved(_wide()), "too large to be right", (), COMPILE)
    yield _run("int64_weights.pt", lambda net: _cast(net, torch.int64), fails)
    yield _run("complex_weights.pt", lambda net: _cast(net, torch.complex64), fails)
    yield _run("wrong_weights.pt", _wrong_weight, fails)
    yield _run("padded.pt", _in_layer("padding", (2**40, 2**40)), fails)
    yield _run("padded_less.pt", _in_layer("padding", (10**6, 10**6)), fails)


def _run(name: str, change: Callable[[nn.Sequential], Any], expected: str) -> Case:
    return Case(name, changed(change), expected, task=COMPILE)


def _wide() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    net[0].in_features = 10**10
    return net


def _cast(net: nn.Sequential, dtype: torch.dtype) -> None:
    net[0]._parameters["weight"] = nn.Parameter(net[0].weight.detach().to(dtype), requires_grad=False)


def _wrong_weight(net: nn.Sequential) -> None:
    net[0]._parameters["weight"] = nn.Parameter(torch.zeros(4, 7, 3, 3))
