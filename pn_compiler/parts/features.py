"""The public function features."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from pn_compiler.base.errors import ConfigError, TraceError
from pn_compiler.graph.graph_module import ConvertedModule, is_converted
from pn_compiler.graph.own_class import PART
from pn_compiler.parts.following import why
from pn_compiler.running.copying import unwrap

if TYPE_CHECKING:
    from pn_compiler.parts.part import Part


def features(model: nn.Module, paths: Sequence[str] | Mapping[str, str]) -> fx.GraphModule:
    """A module that returns what modules inside `model` return, as torchvision's feature extractors do.

    Args:
        model: a result of `transform`. The extractor has its modules, and so its parameters.
        paths: of modules that the network had before its conversion, such as "layer3", or a mapping from
            them to names in the result.

    Returns:
        A torch.fx.GraphModule with the arguments of `model` whose result is a dict: path, or its name, ->
        output, a tuple of those of each call if there are several. An output is the value that another
        network would read there: scale and shift of proxy normalization are applied.

    Raises:
        ConfigError: `model` has no such module, or none that its graph goes through.
    """
    model = unwrap(model)
    if not is_converted(model):
        raise ConfigError(f"{type(model).__name__} is not a result of pn_compiler.transform")
    names = dict(paths) if isinstance(paths, Mapping) else {path: path for path in _listed(paths)}
    part: Part | None = vars(model).get(PART)
    if not isinstance(model, ConvertedModule) or part is None:
        raise ConfigError(
            f"{type(model).__name__} is not one graph: its modules are called as they are, with their hooks"
        )
    known: Any = {path for path, _ in (part.original.module or model).named_modules(remove_duplicate=False)}
    for path in names:
        if path not in known | {name for name, _ in model.named_modules()} or not path:
            raise ConfigError(f"the network has no module {path!r}, of which features are asked for")
    try:
        gm = part.followed(model, "forward", part.original.inputs, taps=(*names,))
    except TraceError as error:
        raise ConfigError(f"PN214 features of {', '.join(names)}: {why(error)}") from error
    output = gm.graph.output_node()
    output.args = ({names[path]: value for path, value in output.args[0].items()},)  # type: ignore[union-attr]
    gm.recompile()
    return gm


def _listed(paths: Sequence[str]) -> Sequence[str]:
    if isinstance(paths, str) or not all(isinstance(path, str) for path in paths) or not paths:
        raise ConfigError(f"paths={paths!r:.80}: expected a list of paths of modules")
    return paths
