"""What a run of the command found, and the files it is written to."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pn_compiler.analysis.diagnosis import Diagnosis
from pn_compiler.analysis.power_plot import power_plot
from pn_compiler.base.files import write_atomically
from pn_compiler.base.strict_json import to_json

if TYPE_CHECKING:
    from pn_compiler.export import Report


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a run of the command found.

    Attributes:
        report: of a compilation or a dry run; None if the model was only diagnosed.
        diagnoses: by what was diagnosed, "as given" and "converted".
    """

    report: "Report | None" = None
    diagnoses: Mapping[str, Diagnosis] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """The report, or the diagnoses by name."""
        if self.report is not None:
            return self.report.to_json()
        return to_json({title: json.loads(found.to_json()) for title, found in self.diagnoses.items()})

    def plot(self, path: Path) -> None:
        """Draws the diagnoses, a panel for each."""
        titles = {f"Power of pre-activations by depth, {title}": d for title, d in self.diagnoses.items()}
        write_atomically(path, power_plot(titles, path))

    def write(self, paths: Sequence[Path]) -> None:
        """Writes it to each of `paths`."""
        for path in paths:
            write_atomically(path, self.to_json().encode())
