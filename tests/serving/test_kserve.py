"""kserve.yaml against KServe's published schema. KServe itself needs Kubernetes, and is not run."""

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.serving.processes import ROOT

pytestmark = pytest.mark.servers

SCRIPT = Path(__file__).with_name("kserve_schema.py")


def refusal(manifest: Path) -> str:
    """What the schema says against it; empty if nothing."""
    python = ROOT / ".venv-kserve" / "bin" / "python"
    done = subprocess.run(
        [python, SCRIPT, manifest], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode == 0) == (done.stderr == ""), done.stderr
    return done.stderr


def test_the_manifest_fits_the_schema(repository: Path, tmp_path: Path) -> None:
    manifest = repository / "kserve.yaml"
    assert refusal(manifest) == ""
    service = yaml.safe_load(manifest.read_text())
    service["spec"]["predictor"]["model"]["storageURI"] = "pvc://models"
    (tmp_path / "field.yaml").write_text(yaml.safe_dump(service))
    assert refusal(tmp_path / "field.yaml") == "refused: V1beta1ModelSpec has no storageURI\n"
    service["spec"] = {}
    (tmp_path / "empty.yaml").write_text(yaml.safe_dump(service))
    assert "Invalid value for `predictor`" in refusal(tmp_path / "empty.yaml")
