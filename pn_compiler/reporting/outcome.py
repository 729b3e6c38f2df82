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
from pn_compiler.base.versions import versions

if TYPE_CHECKING:
    from pn_compiler.export import Report

_PAGES = (".html", ".htm")


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a run of the command found.

    Attributes:
        report: of a compilation or a dry run; None if the model was only diagnosed.
        diagnoses: by what was diagnosed, "as given" and "converted".
        title: of a page: the name of the model's file.
        command: as it was typed; empty if it is not known.
    """

    report: "Report | None" = None
    diagnoses: Mapping[str, Diagnosis] = dataclasses.field(default_factory=dict)
    title: str = "model"
    command: str = ""

    @property
    def versions(self) -> dict[str, str]:
        """Of the packages involved."""
        return versions()

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
        """Writes a page to those of `paths` that end in ``.html``, and JSON to the others."""
        from pn_compiler.reporting.page import page  # jinja2 only when it is needed

        for path in paths:
            content = page(self) if path.suffix.lower() in _PAGES else self.to_json()
            write_atomically(path, content.encode())
