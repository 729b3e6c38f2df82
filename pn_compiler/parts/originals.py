"""What a converted network remembers of the network that it was made from."""

import dataclasses
from typing import Any

from torch import nn

from pn_compiler.graph.provenance import picklable_or_none
from pn_compiler.running.inputs import Inputs


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Original:
    """The network, or the part of it, that became one graph, before its conversion.

    Attributes:
        module: its structure, on the meta device; None if it cannot be copied or pickled.
        inputs: the arguments that it was traced with, on the meta device, or None.
        kinds: class of each module of the graph by path, when it was made.
        parts: paths of the modules that became part of the graph, and of the containers around them.
        entered: paths of the modules whose forward became part of the graph.
        feeds: path of a convolution that pads the output of a site -> path of the site.
    """

    module: nn.Module | None
    inputs: Inputs | None
    kinds: dict[str, type[nn.Module]]
    parts: set[str]
    entered: frozenset[str]
    feeds: dict[str, str] = dataclasses.field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Original":
        return self  # nothing changes it

    def __reduce__(self) -> tuple[Any, ...]:
        module = picklable_or_none(self.module)
        kinds = {path: kind for path, kind in self.kinds.items() if module is not None}
        return Original, (module, self.inputs, kinds, self.parts, self.entered, self.feeds)
