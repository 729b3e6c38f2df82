"""Random networks, 400 in `make test-all`, and that the hunt finds, attributes and shrinks what is wrong."""

import dataclasses
import re
import time

import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from benchmarks.fuzz import oracles
from benchmarks.fuzz.__main__ import main, report, runnable
from benchmarks.fuzz.build import build, inputs_of
from benchmarks.fuzz.campaign import FAILURES, Hunt, Tally
from benchmarks.fuzz.compare import difference, run
from benchmarks.fuzz.generate import generate
from benchmarks.fuzz.oracles import check
from benchmarks.fuzz.program import Options, Program, Statement, source
from benchmarks.fuzz.reference import ByHand
from benchmarks.fuzz.shrink import shrink
from pn_compiler.passes.convert import replace_batch_norm

CHUNK = 40  # networks, about 6 seconds
DEFAULT = Options()


def conv_norm(*more: Statement, options: Options = DEFAULT) -> Program:
    """A convolution and a BatchNorm, and what follows."""
    statements = (
        Statement("conv", "$o = self.$m($a)", ("x0",), ("h1",), ("m1",)),
        Statement("norm", "$o = self.$m($a)", ("h1",), ("h2",), ("m2",)),
        *more,
    )
    declarations = (("m1", "self.m1 = nn.Conv2d(3, 4, 3)"), ("m2", "self.m2 = nn.BatchNorm2d(4)"))
    returned = statements[-1].results
    shapes = (("h1", (3, 4, 6, 6)),)
    return Program(1, (("x0", (3, 3, 8, 8)),), declarations, statements, returned, "$a", options, shapes)


LATER = [pytest.param(first, marks=pytest.mark.slow) for first in range(80, 400, CHUNK)]


@pytest.mark.parametrize("first", [*range(0, 80, CHUNK), *LATER])
def test_random_networks(first: int) -> None:
    """The same ones everywhere; `python -m benchmarks.fuzz --model SEED` makes a failure small."""
    tally = Hunt(onnx_share=0.02, shrinking=0).run(range(first, first + CHUNK))
    assert not tally.failures, report(tally)


def test_the_same_seed_gives_the_same_network() -> None:
    for seed in range(20):
        assert source(generate(seed)) == source(generate(seed))
        assert generate(seed).options == generate(seed).options


def test_generated_networks_run_and_differ() -> None:
    sources = set()
    for seed in range(20):
        program = generate(seed)
        sources.add(source(program))
        run(build(program), inputs_of(program))
    assert len(sources) == 20


def test_a_conversion_by_hand_is_what_torch_computes() -> None:
    """Against the normalizer written out, for the network without anything else."""
    program = conv_norm()
    model = build(program)
    sites = pn_compiler.sites(pn_compiler.transform(model, proxy=False, warm_start="none"))
    (x,) = inputs_of(program)
    h = model.m1(x)
    y = (h - h.mean((1, 2, 3), keepdim=True)) / (h.var((1, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    expected = y * model.m2.weight.view(-1, 1, 1) + model.m2.bias.view(-1, 1, 1)
    assert difference(run(ByHand(model, sites), (x,)), expected) < 1e-12


def test_a_network_that_mixes_samples_is_unfit() -> None:
    program = conv_norm(Statement("view", "$o = $a.flip(0)", ("h2",), ("h3",)))
    assert check(program).outcome == "invalid"


@pytest.fixture
def wrong_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that loses the eps of the BatchNorm where a ReLU follows a flip."""
    rewrite = replace_batch_norm.ReplaceBatchNorm._rewrite

    def forgetful(self, gm, path, norm, num_groups):
        site = rewrite(self, gm, path, norm, num_groups)
        if any("flip" in str(node.target) for node in gm.graph.nodes):
            gm.get_submodule(path).eps = 0.1
        return site

    monkeypatch.setattr(replace_batch_norm.ReplaceBatchNorm, "_rewrite", forgetful)


@pytest.mark.usefixtures("wrong_epsilon")
def test_a_planted_error_is_found_and_made_small() -> None:
    program = conv_norm(
        Statement("activation", "$o = F.relu($a)", ("h2",), ("h3",), block="part1"),
        Statement("scalar", "$o = $a * 2.0", ("h3",), ("h4",), block="part1"),
        Statement("view", "$o = $a.flip(-1)", ("h4",), ("h5",)),
        Statement("combine", "$o = torch.cat([$a, $b], 1)", ("h5", "h4"), ("h6",)),
        options=Options(norm="group", num_groups=2, training=True),
    )
    verdict = check(program)
    assert (verdict.outcome, verdict.cause) == ("wrong", "conversion by hand")
    smallest = shrink(program, lambda p: check(p).cause == verdict.cause)
    assert [s.kind for s in smallest.statements] == ["norm", "view"]
    assert smallest.options == DEFAULT
    try:
        exec(runnable(smallest), {})  # what is printed runs as it is
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_hunt_counts_failures_of_one_cause_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> nn.Module:
        raise ZeroDivisionError(f"site {id(args)}")

    monkeypatch.setattr(pn_compiler, "transform", broken)
    tally = Hunt().run(range(6))
    (finding,) = tally.findings.values()
    assert finding.count == tally.outcomes["crash"] == tally.models == tally.failures > 0
    assert finding.key == "crash: ZeroDivisionError: site N"
    assert not finding.program.statements  # nothing of the network matters


@pytest.mark.parametrize("oracle", ["gradient lost or found", "alone against in its batch"])
def test_oracles_see_what_they_are_for(oracle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transform = pn_compiler.transform

    class Mixing(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return (
                y.detach() if oracle.startswith("gradient") else y + 0.1 * (y.mean(0, keepdim=True) - y[:1])
            )

    def changed(model: nn.Module, *args: object, **kwargs: object) -> nn.Module:
        converted = transform(model, *args, **kwargs)
        forward = Mixing(copy_of(converted)).forward
        if oracle.startswith("gradient") or kwargs["proxy"]:
            converted.forward = forward
        return converted

    monkeypatch.setattr(pn_compiler, "transform", changed)
    monkeypatch.setattr("benchmarks.fuzz.oracles._Checker.check_proxy", lambda *_: None)
    assert check(conv_norm()).cause == oracle


def copy_of(module: nn.Module) -> nn.Module:
    """The same graph with the same parameters, in a module of its own."""
    return torch.fx.GraphModule(module, module.graph)


def test_failures_decide_the_exit_status() -> None:
    tally = Tally()
    tally.outcomes.update(ok=3, refused=2, invalid=1)
    assert (tally.models, tally.failures) == (5, 0)
    tally.outcomes.update(FAILURES)
    assert tally.failures == 2


def test_the_command_counts_networks_by_outcome(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["--models", "3", "--seed", "10", "--jobs", "1", "--onnx-share", "0"])
    printed = capsys.readouterr().out
    counts = {name: int(n) for n, name in re.findall(r"(\d+) (ok|wrong|crash|refused|more)\b", printed)}
    assert sum(counts.values()) == 3
    assert status == int(counts["wrong"] + counts["crash"] > 0)


def test_the_command_shows_one_network(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", "1", "--onnx-share", "0"])
    assert source(generate(1)) in capsys.readouterr().out


def test_a_hang_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracles, "_SECONDS", 0.2)
    monkeypatch.setattr(pn_compiler, "transform", lambda *args, **kwargs: time.sleep(30))
    verdict = check(conv_norm())
    assert (verdict.outcome, verdict.cause) == ("crash", "_HangError: longer than N s")


def test_what_torch_exports_to_no_valid_file_either_is_unexportable() -> None:
    """squeeze of an axis that is longer than one does nothing in torch; the Squeeze in the file fails."""
    verdict = check(conv_norm(Statement("view", "$o = $a.squeeze(-1)", ("h2",), ("h3",))), onnx=True)
    assert verdict.outcome == "unexportable", verdict


def test_a_border_that_is_inexact_is_not_compared_in_onnxruntime() -> None:
    """PN207, of the converted network: the conversion by hand pads elsewhere."""
    padded = Statement("conv", "$o = self.$m($a)", ("h3",), ("h4",), ("m4",))
    program = conv_norm(
        Statement("act", "$o = F.mish($a)", ("h2",), ("h3",)),
        padded,
        options=Options(proxy_padding="output", gain=40.0),
    )
    declarations = (*program.declarations, ("m4", "self.m4 = nn.Conv2d(4, 4, 3, padding=1)"))
    verdict = check(dataclasses.replace(program, declarations=declarations), onnx=True)
    assert verdict.outcome == "ok", verdict


def test_a_shared_norm_needs_one_record() -> None:
    """The result lists it first in the part, which is called first and stays whole; the original does not."""
    program = conv_norm(Statement("norm", "$o = self.$m($a)", ("h2",), ("h3",), ("m2",)))
    conv, norm, again = program.statements
    norm = dataclasses.replace(
        norm, template=f"with torch.enable_grad():\n    {norm.template}", block="part1"
    )
    verdict = check(dataclasses.replace(program, statements=(conv, norm, again)))
    assert (verdict.outcome, verdict.codes) == ("ok", ("PN101",)), verdict


NORMS = (("m3", "self.m3 = nn.BatchNorm2d(4)"), ("m4", "self.m4 = nn.BatchNorm2d(4)"))


def test_gradients_that_cancel_are_not_compared() -> None:
    """Three instance norms in a row: those of the convolution are zero, and 1e-11 from rounding."""
    norms = [
        Statement("norm", "$o = self.$m($a)", (a,), (o,), (m,))
        for a, o, m in (("h2", "h3", "m3"), ("h3", "h4", "m4"))
    ]
    program = conv_norm(*norms, options=Options(norm="instance", gain=1e3))
    program = dataclasses.replace(program, declarations=(*program.declarations, *NORMS))
    verdict = check(program)
    assert verdict.outcome == "ok", verdict


def test_gradients_that_overflow_in_the_original_are_not_compared() -> None:
    """Those of SiLU, which it becomes, are finite: outputs reach -88, beyond which exp is infinite."""
    silu = Statement("act", "$o = $a / (1 + torch.exp(-$a))", ("h2",), ("h3",))
    verdict = check(conv_norm(silu, options=Options(gain=100.0, dtype="float32")))
    assert verdict.outcome == "ok", verdict


def test_what_a_network_keeps_of_a_training_step_does_not_stop_the_export() -> None:
    kept = Statement("python", "self.kept = $a\n$o = self.kept.relu()", ("h2",), ("h3",))
    assert check(conv_norm(kept), onnx=True).outcome == "ok"


def test_where_rounding_decides_in_float32_no_file_is_expected() -> None:
    """The last BatchNorm sees constants, in train mode, so that the output consists of last digits."""
    assert check(generate(700142), onnx=True).outcome == "ok"


@pytest.mark.parametrize("factor", [1.0, 1 + 1e-4])
def test_a_wrong_gradient_is_found(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    transform = pn_compiler.transform

    def changed(model: nn.Module, *args: object, **kwargs: object) -> nn.Module:
        converted = transform(model, *args, **kwargs)
        converted.m1.weight.register_hook(lambda gradient: gradient * factor)
        return converted

    monkeypatch.setattr(pn_compiler, "transform", changed)
    assert check(conv_norm()).cause == ("" if factor == 1 else "gradient")
