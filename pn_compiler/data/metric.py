"""The user's own measure of a network: any function of outputs and labels."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pn_compiler.base.config import MetricFunction
from pn_compiler.base.errors import ConfigError, PnCompilerError, named_line
from pn_compiler.data.samples import Samples, joined
from pn_compiler.loading.admission import named_function
from pn_compiler.running.evaluation import run


class Metric:
    """Measures a network on labelled samples; higher is better.

    Args:
        metric: a function (outputs, labels) -> number, or its name ``package.module:function``, which is
            imported.
        samples: have labels.

    Attributes:
        name: of the function, for messages.

    Raises:
        ConfigError: the name cannot be imported, or is not that of a function.
    """

    def __init__(self, metric: str | MetricFunction, samples: Samples) -> None:
        self._function = named_function(metric, "a metric") if isinstance(metric, str) else metric
        self.name = metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)
        self._samples = samples

    def value(self, outputs: Sequence[Any], rows: Sequence[Tensor]) -> float:
        """The metric of a network's outputs for batches of the samples `rows`.

        It is called once, with outputs and labels joined along their first axis. Where outputs cannot be, as
        batches cannot be split or outputs are no nesting of tensors, both are lists, an entry for each batch.

        Raises:
            ConfigError: it fails, or returns no number.
        """
        together = None if self._samples.whole else joined(outputs, [len(part) for part in rows])
        given = list(outputs) if together is None else together
        parts = [part.tolist() for part in (rows if together is None else [torch.cat(list(rows))])]
        labels = self._moved([self._samples.labels_of(part) for part in parts], outputs)
        try:
            value: Any = self._function(given, labels if together is None else labels[0])
        except PnCompilerError:
            raise
        except Exception as error:  # the user's code can raise anything
            raise ConfigError(f"the metric {self.name} failed: {named_line(error)}") from error
        return self._number(value)

    def of(self, network: nn.Module, rows: Sequence[Tensor]) -> float:
        """The metric of `network`, which is run on the samples `rows` in its current mode."""
        outputs = [run(network, self._samples.inputs(part.tolist()), "the labelled data") for part in rows]
        return self.value(outputs, rows)

    def _moved(self, labels: list[Any], outputs: Sequence[Any]) -> list[Any]:
        """`labels` on the device of `outputs`."""
        first = next((x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)), None)
        if first is None:
            return labels
        moved: list[Any] = pytree.tree_map_only(Tensor, lambda x: x.to(first.device), labels)
        return moved

    def _number(self, value: Any) -> float:
        if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1:
            value = value.item()
        if not isinstance(value, numbers.Real):
            shown = " ".join(repr(value).split())
            raise ConfigError(f"the metric {self.name} returned {shown:.80}: expected one number")
        return float(value)
