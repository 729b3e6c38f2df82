"""ONNX files: what is in them, what verification catches, and what is left behind when things go wrong."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler.base.errors import ConfigError, ExportError, TraceError, VerificationError
from pn_compiler.base.files import write_atomically
from pn_compiler.export import make_session, relative_error, verify_onnx, write_onnx
from pn_compiler.export.exporter import export_graph
from pn_compiler.export.options import ExportOptions
from pn_compiler.export.verify import expect
from pn_compiler.running.inputs import Inputs
from pn_compiler.testing import randomize_batch_norms

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(activation: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    act = activation or nn.ReLU()
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), act, nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), act, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip
    return randomize_batch_norms(net).eval()  # type: ignore[return-value]


def with_group_norm(net: nn.Sequential) -> nn.Sequential:
    layers = [nn.GroupNorm(1, m.num_features) if isinstance(m, nn.BatchNorm2d) else m for m in net]
    for layer in layers:
        if isinstance(layer, nn.GroupNorm):  # a weight of 1 and a bias of 0 would be left out
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.uniform_(layer.bias)
    return nn.Sequential(*layers).eval()


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def run(path: Path, x: Tensor) -> np.ndarray:
    session = make_session(str(path))
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network, compiled without options."""
    path = tmp_path_factory.mktemp("compiled") / "m.onnx"
    pn_compiler.compile(network(), path, IMAGES)
    return path


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.SiLU()], ids=str)
def test_nothing_of_proxy_normalization_remains(tmp_path: Path, activation: nn.Module) -> None:
    net = network(activation)
    pn_compiler.export_onnx(with_group_norm(net), tmp_path / "plain.onnx", IMAGES)
    for warm_start in ("auto", "none"):
        report = pn_compiler.compile(net, tmp_path / "m.onnx", IMAGES, norm="layer", warm_start=warm_start)
        assert [site.kind for site in report.sites] == ["pn", "pn"]
        assert operators(tmp_path / "m.onnx") == operators(tmp_path / "plain.onnx")
        assert operators(tmp_path / "m.onnx")["Shape"] == 0
        assert report.max_error is not None
        assert report.max_error < 1e-5


def test_report_is_complete_and_json(tmp_path: Path) -> None:
    report = pn_compiler.compile(network(), tmp_path / "m.onnx", input_shape=(1, 3, 8, 8), norm="layer")
    content = json.loads(report.to_json())
    assert content["operators_before"]["BatchNorm2d"] == 2
    assert content["operators_after"]["InstanceNormalization"] == 2
    assert content["parameters_after"] == content["parameters_before"]  # every consumer has a bias already
    assert {(c["batch"], c["optimized"]) for c in content["checks"]} == {
        (b, o) for b in (1, 3) for o in (False, True)
    }
    assert content["file_bytes"] == (tmp_path / "m.onnx").stat().st_size
    assert {"transform", "fold", "export", "check", "verify", "write"} <= set(content["seconds"])
    assert content["inputs"][0]["shape"] == ["batch", 3, 8, 8]
    for part in ("1     pn", "verified", "wrote", "InstanceNormalization"):
        assert part in str(report)


def test_what_is_converted_already_is_exported_as_it_is(tmp_path: Path) -> None:
    converted = pn_compiler.transform(network(), num_groups=2)
    report = pn_compiler.compile(converted, tmp_path / "m.onnx", IMAGES)
    assert report.sites == pn_compiler.sites(pn_compiler.fold(converted))
    assert relative_error(run(tmp_path / "m.onnx", IMAGES), converted(IMAGES).detach().numpy()) < 1e-5
    folded = pn_compiler.fold(converted)
    pn_compiler.export_onnx(folded, tmp_path / "f.onnx", IMAGES)
    assert operators(tmp_path / "f.onnx") == operators(tmp_path / "m.onnx")


def test_old_servers_load_the_default(compiled: Path) -> None:
    proto = onnx.load(compiled)
    assert (proto.ir_version, proto.opset_import[0].version) == (9, 20)
    assert {node.domain for node in proto.graph.node} == {""}


@pytest.mark.parametrize(("opset", "ir"), [(18, 8), (21, 10)])
def test_opset_and_ir_version_go_together(tmp_path: Path, opset: int, ir: int) -> None:
    pn_compiler.compile(network(), tmp_path / "m.onnx", IMAGES, opset_version=opset)
    proto = onnx.load(tmp_path / "m.onnx")
    assert (proto.opset_import[0].version, proto.ir_version) == (opset, ir)


def test_batch_axis_is_dynamic_or_fixed(tmp_path: Path, compiled: Path) -> None:
    assert run(compiled, IMAGES.repeat(4, 1, 1, 1)).shape == (8, 5)
    report = pn_compiler.compile(network(), tmp_path / "s.onnx", IMAGES, dynamic_batch=False)
    assert {check.batch for check in report.checks} == {2}
    assert report.inputs[0]["shape"] == [2, 3, 8, 8]


def test_no_trace_of_the_machine_that_compiled(compiled: Path) -> None:
    content = compiled.read_bytes()
    assert str(Path.cwd()).encode() not in content
    assert b"site-packages" not in content


def test_multiple_inputs_and_outputs(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3, padding=1)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            z = self.conv(torch.relu(self.bn(x)))
            return z, {"sum": z.mean((2, 3)) + y}

    net = randomize_batch_norms(Net()).eval()
    inputs = (IMAGES, torch.randn(2, 2))
    report = pn_compiler.compile(net, tmp_path / "m.onnx", inputs)
    assert [len(report.inputs), len(report.outputs)] == [2, 2]
    assert report.sites[0].kind == "pn"


def test_a_model_without_batch_norm_exports_as_it_is(tmp_path: Path) -> None:
    report = pn_compiler.compile(nn.Sequential(nn.Linear(3, 2)), tmp_path / "m.onnx")
    assert [note.code for note in report.notes] == ["PN100"]
    assert report.input_shape_source.startswith("guessed")


def test_verification_names_the_worst_output_and_leaves_no_file(tmp_path: Path) -> None:
    net = pn_compiler.transform(network())
    pn_compiler.export_onnx(net, tmp_path / "m.onnx", IMAGES)
    proto = onnx.load(tmp_path / "m.onnx")
    (bias,) = [t for t in proto.graph.initializer if list(t.dims) == [5]]
    values = onnx.numpy_helper.to_array(bias).copy()
    values[3] += 0.01
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    name = proto.graph.output[0].name
    with pytest.raises(VerificationError, match=f"output {name} differs from PyTorch"):
        verify_onnx(proto, net, Inputs((IMAGES,)), (1, 3))


def test_normalizers_are_summed_in_two_stages_where_one_is_too_far_off(tmp_path: Path) -> None:
    """onnxruntime's InstanceNormalization loses 8e-6 over a million values."""
    net = nn.Sequential(nn.GroupNorm(1, 64), nn.GELU()).eval()
    report = write_onnx(
        net, net, tmp_path / "m.onnx", Inputs((torch.randn(1, 64, 128, 128),)), tolerance=2e-6
    )
    assert report.norms.startswith("two-stage sums")
    assert "norms       two-stage sums" in str(report)
    assert report.max_error is not None
    assert report.max_error < 2e-6
    assert "InstanceNormalization" not in report.operators_after


def test_a_model_that_computes_nan_is_not_called_verified(tmp_path: Path) -> None:
    net = network()
    nn.init.constant_(net[9].weight, float("nan"))
    with pytest.raises(VerificationError, match="not finite"):
        pn_compiler.compile(net, tmp_path / "m.onnx", IMAGES)
    assert list(tmp_path.iterdir()) == []


def test_relative_error_cannot_be_fooled() -> None:
    one = np.ones((2, 2))
    assert relative_error(one * 2, one) == 1.0
    assert relative_error(one, np.ones((2, 1))) == float("inf")
    assert relative_error(one * np.nan, one) == float("inf")
    assert relative_error(one, one * np.nan) == float("inf")
    assert relative_error(one * np.inf, one) == float("inf")
    assert relative_error(np.zeros(3), np.zeros(3)) == 0.0


def test_a_trace_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.bn(x))
            return y * (1.0 if vars(y) else 0.5)  # a proxy has attributes, and a tensor none

    with pytest.raises(TraceError, match=r"to something else.*outputs are off by"):
        pn_compiler.compile(randomize_batch_norms(Net()).eval(), tmp_path / "m.onnx", IMAGES)


def test_what_onnxruntime_cannot_run_is_an_error_of_ours(tmp_path: Path) -> None:
    net = network().bfloat16()
    with pytest.raises(ExportError):
        pn_compiler.compile(net, tmp_path / "m.onnx", IMAGES.bfloat16())
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments(tmp_path: Path) -> None:
    net = network()
    with pytest.raises(ExportError, match="opset 7: expected 18 to 24"):
        pn_compiler.compile(net, tmp_path / "m.onnx", IMAGES, opset_version=7)
    with pytest.raises(ExportError, match="there is no folder"):
        pn_compiler.compile(net, tmp_path / "no" / "m.onnx", IMAGES)
    with pytest.raises(ExportError, match="it is a folder"):
        pn_compiler.compile(net, tmp_path, IMAGES)
    with pytest.raises(ConfigError, match=r"does not run on an input of shape \[1, 4, 8, 8\]"):
        pn_compiler.compile(net, tmp_path / "m.onnx", input_shape=(1, 4, 8, 8))
    with pytest.raises(ConfigError, match="not both"):
        pn_compiler.compile(net, tmp_path / "m.onnx", IMAGES, input_shape=(1, 3, 8, 8))
    with pytest.raises(ConfigError, match="options of transform have no effect"):
        pn_compiler.compile(pn_compiler.transform(net), tmp_path / "m.onnx", IMAGES, proxy=False)
    with pytest.raises(ExportError, match="expected a tensor"):
        pn_compiler.export_onnx(net, tmp_path / "m.onnx", ())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m.onnx"
    write_atomically(target, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match="No space left on device"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.skipif(not Path("/dev/full").exists() or os.geteuid() != 0, reason="mounts a small disk as root")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(ExportError, match="No space left on device"):
            write_atomically(disk / "m.onnx", bytes(1 << 20))
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    torch.save(network(), tmp_path / "model.pt")
    code = textwrap.dedent(
        """
        import signal, sys, time
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
        import pn_compiler.export.to_onnx as to_onnx
        from pn_compiler.cli import main
        def slow(*arguments, **options):
            print("verifying", flush=True)
            time.sleep(60)
        to_onnx.verify_onnx = slow
        sys.exit(main(["model.pt", "-o", "model.onnx", "--input-shape", "1,3,8,8"]))
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "verifying\n"
    time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors == "pn-compile: error: interrupted; nothing was written\n"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_pieces_of_a_split_may_be_overwritten(tmp_path: Path) -> None:
    """Which torch allows without gradients, only."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            y.chunk(2, 1)[0].mul_(0.5)
            return y

    net = randomize_batch_norms(Net()).eval()
    with torch.no_grad():
        converted = pn_compiler.transform(net, IMAGES)
        pn_compiler.export_onnx(converted, tmp_path / "net.onnx", IMAGES)  # verified


class Noisy(nn.Module):
    """A steady output and one that varies from call to call, in eval mode, too."""

    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.noise = network(), (noise,)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x)
        return y, y + self.noise[0](y)


class Counts:
    """Noise of a counter, which no generator shows."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, y: Tensor) -> Tensor:
        self.calls += 1
        return torch.full_like(y, 2e-3 * self.calls)


@pytest.mark.parametrize("noise", [lambda y: 5e-3 * torch.rand_like(y), torch.rand_like, Counts()])
@pytest.mark.parametrize("batches", [(1, 3), (None,)])
def test_what_varies_widens_no_limit(
    noise: Callable[[Tensor], Tensor], batches: tuple[int | None, ...]
) -> None:
    model = Noisy(noise).eval()
    steady = Noisy(torch.zeros_like).eval()
    proto = onnx_ir.to_proto(export_graph(steady, Inputs((IMAGES,)), ExportOptions(), None))
    with pytest.raises(VerificationError, match=r"output_1 .*limit 1\.0e-04.*cannot repeat"):
        verify_onnx(proto, model, Inputs((IMAGES,)), batches)


def test_a_steady_output_still_widens_the_limit() -> None:
    """A difference of two large numbers: float32 itself is far off, random numbers beside it or not."""
    magnify = nn.Module()
    magnify.forward = lambda x: (x + 1e4 - 1e4, torch.rand_like(x) * 1e-9)  # type: ignore[method-assign]
    expected = expect(magnify, Inputs((IMAGES,)), (1, 3))
    assert expected.random
    graph = onnx.parser.parse_graph(
        "g (float[N,3,8,8] x) => (float[N,3,8,8] a, float[N,3,8,8] b) "
        "{ big = Constant<value=float {10000.0}>() s = Add(x, big) a = Sub(s, big) b = Mul(x, big) }"
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    with pytest.raises(VerificationError, match=r"output b .*limit [2-9]\.\de-04"):
        verify_onnx(proto, expected)


class Renorm(nn.Conv2d):
    """The spelling of EEGNet: `.data`, at which a second attempt of torch.onnx would end the process."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        return super().forward(x)


class Scales(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.mul_(0.9)
        return super().forward(x)


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.data.mul_(2)
        return x


@pytest.mark.parametrize(
    "layer", [Renorm(3, 8, 1), Scales(3, 8, 1), nn.Sequential(nn.Conv2d(3, 8, 1), Doubles())]
)
def test_a_forward_that_uses_data_is_an_error_of_ours(layer: nn.Module, tmp_path: Path) -> None:
    net = nn.Sequential(layer, nn.BatchNorm2d(8), nn.ReLU()).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ExportError, match=r"\.data"):
        pn_compiler.compile(net, tmp_path / "model.onnx", IMAGES)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
