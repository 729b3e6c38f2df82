"""The public function transform."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from pn_compiler.base.config import Anchor, MetricFunction, Norm, ProxyPadding, TransformConfig, WarmStart
from pn_compiler.base.errors import ConfigError
from pn_compiler.base.option_checks import check_function
from pn_compiler.base.options import pick
from pn_compiler.base.stopwatch import Stopwatch
from pn_compiler.base.user_warnings import warn
from pn_compiler.freezing.anchors import choose_anchors, needs_samples
from pn_compiler.graph.graph_module import is_converted, notes, remember, sites
from pn_compiler.graph.pass_log import stage
from pn_compiler.graph.provenance import Provenance
from pn_compiler.inspection.fake_tensors import fake_mode
from pn_compiler.parts.dressing import dress
from pn_compiler.passes import PipelineEdit, conversion_pipeline, edited, preparation_pipeline
from pn_compiler.pipeline.conversion import convert, first_sample, measure_conversion, prepare
from pn_compiler.pipeline.fidelity import Fidelity
from pn_compiler.recovery.calibration import calibrate_prepared
from pn_compiler.regions.regions import Trace, trace
from pn_compiler.running.copying import copy_structure, unwrap
from pn_compiler.running.evaluation import batches_of, check_values
from pn_compiler.running.inputs import Inputs, in_mode_of


def transform(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    norm: Norm | None = TransformConfig.norm,
    num_groups: int | None = TransformConfig.num_groups,
    anchor: Anchor | None = TransformConfig.anchor,
    anchor_budget: float = TransformConfig.anchor_budget,
    metric: str | MetricFunction | None = TransformConfig.metric,
    proxy: bool = TransformConfig.proxy,
    proxy_padding: ProxyPadding = TransformConfig.proxy_padding,
    warm_start: WarmStart = TransformConfig.warm_start,
    calibration: Iterable[Any] | None = None,
    strict: bool = TransformConfig.strict,
    norm_only_bias: bool = TransformConfig.norm_only_bias,
    leaves: Sequence[str | type[nn.Module]] = TransformConfig.leaves,
    pipeline: PipelineEdit | None = None,
) -> nn.Module:
    """Rewrites every BatchNorm of `model` into a normalizer that does not depend on the batch.

    A BatchNorm followed by an activation becomes a `pn_compiler.nn.ProxyNormAct` at the path of the
    BatchNorm; any other becomes an ``nn.GroupNorm``, or, with norm="rms" or an anchor, a
    `pn_compiler.nn.AnchoredNorm`. What cannot be converted is left as it is and
    reported: see `pn_compiler.sites`.

    Args:
        model: left untouched; the result is a copy.
        example_inputs: the positional arguments of a call: a tensor, or a tuple of tensors and nested
            tuples, lists and dicts of them. Needed where the rank of a BatchNorm1d's input cannot be told
            from the layers around it, and to convert the forward with optional arguments: those that are
            not given keep their defaults, and the result takes no other value for them. With them, what was
            traced is compared with `model`, in float64, before it is converted; they are not written to.
        example_kwargs: the arguments of that call that are given by name.
        norm: "layer" normalizes over [C, *] (one group), "group" over groups of channels, "instance"
            over each channel alone; "rms" over [C, *], too, but divides by the root of the mean square about
            the constant mean of the training set. Without, "rms", which with an `anchor` stays closest to a
            trained BatchNorm; with warm_start="none" it is "layer", LN + PN as in the paper.
        num_groups: groups of norm="group", which it implies, or of norm="rms". Without it "group" has as many
            as leave 8 channels in each, at most 32, and "rms" one. Where it does not divide C, the greatest
            common divisor is taken.
        anchor: the share, from 0 to 1, that the variance of the training set has in that of an instance
            (docs/method.md); for all, or by path of the BatchNorm, 0 where a mapping names none. The higher,
            the closer to the trained network; norm="rms" with 1 is BatchNorm as it is evaluated. None is 0,
            or with norm="rms" 0.875 where a site starts warm (docs/real_networks.md). What starts
            cold has the statistics of an untrained BatchNorm, mean 0 and variance 1. "auto" chooses, for each
            BatchNorm, the least with which the network keeps `anchor_budget` on held-out samples of
            `calibration`; ``sites`` says what was chosen. It reads up to 512 samples.
        anchor_budget: for anchor="auto": the largest divergence from the outputs of `model`, mean
            KL(softmax(t) || softmax(s)) in nats, where they are logits [N, K], and relative L2 error of
            other outputs; the worst output counts. With `metric` it is what that may lose, in its own units.
        metric: for anchor="auto": (outputs, labels) -> a number, higher is better, as in
            `freeze_statistics`. Batches of `calibration` are then (inputs, labels).
        proxy: whether to add proxy normalization where an activation follows.
        proxy_padding: where the zero padding of later convolutions stands: before the proxy shift
            ("activation", exact to fold) or behind it ("output", as the reference implementation).
        warm_start: "auto" computes weight and bias from the running statistics where a BatchNorm has
            been trained, and keeps them as they are elsewhere; "running_stats" and "none" do one or the
            other everywhere; "calibrate" fits them to `calibration` (docs/calibration.md). All but "none" add
            proxy normalization only where the consumers can undo it, so that a trained and an untrained
            network get the same structure.
        calibration: unlabelled samples for warm_start="calibrate": batches of inputs, such as a DataLoader
            or a list, as for `diagnose`; and for anchor="auto", which comes first. They are read several
            times. Their first sample stands for `example_inputs` where those are not given.
        strict: raise if any BatchNorm is refused, or converted in another way than asked for.
        norm_only_bias: whether a normalizer without an activation behind it keeps its bias when it does
            not start warm; the reference implementation has none there.
        leaves: paths or classes of modules whose forward must not be traced, for example because it
            branches on values. They stay as they are; what they call is converted on its own.
        pipeline: a function from the passes to those that are run instead: some added, left out or moved.
            What stands before ReplaceBatchNorm is compared with `model`, what comes later may change outputs.

    Returns:
        A trainable torch.fx.GraphModule in the train/eval mode of `model`. Parameters that the conversion
        does not touch keep their names. Submodules whose forward torch.fx cannot trace keep their class,
        with graphs inside; so does the model itself if its own forward is one.

    Raises:
        ConfigError: an option has an impossible value, or the model does not run on the inputs.
        TraceError: nothing of a model without BatchNorm can be traced, or the trace computes something else.
        UnsupportedModelError: `model` has uninitialised lazy modules.
        RefusedError: `strict` and something was refused.
        PassError: a pass fails, or `pipeline` left out one that another requires.

    Warns:
        ConversionWarning: once, of all that you must know: BatchNorms that were refused, a branch on
            ``self.training`` that is fixed now, and the like. Its `diagnostics` have the codes.

    Source: Labatie et al., NeurIPS 2021 (arXiv 2106.03743).
    """
    config = pick(TransformConfig, locals())
    inputs = Inputs.of(example_inputs, example_kwargs)
    return transform_and_measure(model, inputs, config, calibration, pipeline)[0]


def transform_and_measure(
    model: nn.Module,
    inputs: Inputs | None,
    config: TransformConfig,
    calibration: Iterable[Any] | None = None,
    edit: PipelineEdit | None = None,
) -> tuple[nn.Module, Fidelity | None]:
    """The result of `transform`, and how far its outputs are from those of `model`, if both could be run."""
    check_function("pipeline", edit)
    if config.anchor == "auto" and calibration is None:
        raise ConfigError(needs_samples())
    if config.anchor != "auto" and config.metric is not None:
        raise ConfigError("metric has no effect without anchor='auto'")
    edited(edit, preparation_pipeline(), conversion_pipeline(config))  # raises before the work
    model = unwrap(model)
    if is_converted(model):
        raise ConfigError("the model is already converted")
    if calibration is not None:
        check_values(model)
        calibration = batches_of(calibration, again=True)
        inputs = inputs or first_sample(calibration, model)
    inputs = in_mode_of(model, inputs)
    with fake_mode(model):
        traced = trace(model, inputs, config.leaves)
        convert_trace(traced, model, model, inputs, calibration, config, Stopwatch(), edit)
    structure = copy_structure(model)
    dress(traced, structure, inputs)
    fidelity = measure_conversion(model, traced.root, inputs, calibration)
    remember(traced.root, _provenance(config, traced, structure, inputs))
    warn(notes(traced.root))
    return traced.root, fidelity


def _provenance(
    config: TransformConfig, traced: Trace, structure: nn.Module | None, inputs: Inputs | None
) -> Provenance:
    anchor = config.anchor
    if anchor == "auto":
        anchor = {site.name: site.anchor for site in sites(traced.root) if site.kind != "skipped"}
    options = {
        "norm": config.norm,
        "num_groups": config.num_groups,
        "anchor": dict(anchor) if isinstance(anchor, Mapping) else anchor,
        "proxy": config.proxy,
        "proxy_padding": config.proxy_padding,
        # where weights come from does not matter to who loads them
        "warm_start": "none" if config.warm_start == "none" else "auto",
        "norm_only_bias": config.norm_only_bias,
        "leaves": sorted(traced.asked),
    }
    return Provenance(options, structure, None if inputs is None else inputs.on_meta())


def convert_trace(
    traced: Trace,
    model: nn.Module,
    witness: nn.Module,
    inputs: Inputs | None,
    calibration: Iterable[Any] | None,
    config: TransformConfig,
    stopwatch: Stopwatch,
    edit: PipelineEdit | None = None,
) -> None:
    """Converts the trace of `model` in place, after comparing it with `witness`; see `transform`."""
    first, _ = edited(edit, preparation_pipeline(), conversion_pipeline(config))
    with stopwatch("prepare"), stage("prepare"):
        prepare(traced, witness, inputs, stopwatch.announce, first)
    if config.anchor == "auto":
        with stopwatch("anchors"):
            config = config.with_anchors(choose_anchors(traced, model, config, calibration, edit))
    calibrated = None
    if config.warm_start == "calibrate":
        with stopwatch("calibrate"):
            calibrated = calibrate_prepared(traced, model, config, calibration, edit)
    with stopwatch("transform"), stage("convert"):
        convert(
            traced, model, config, calibrated, strict=config.strict, progress=stopwatch.announce, edit=edit
        )
