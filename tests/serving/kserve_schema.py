"""``python kserve_schema.py kserve.yaml`` builds what KServe's published schema says of the manifest.

The classes in KServe's own package are generated from the schema of its resources: they know all fields,
their types, and which are required. For `.venv-kserve`.
"""

import re
import sys
from pathlib import Path
from typing import Any

import kserve
import kubernetes.client
import yaml


def build(value: Any, kind: str) -> Any:
    """`value`, as it stands in a manifest, as an object of the schema. Raises ValueError if it is none."""
    if match := re.fullmatch(r"list\[(.*)\]", kind):
        return [build(item, match[1]) for item in value]
    if match := re.fullmatch(r"dict\(str, (.*)\)", kind):
        return {key: build(item, match[1]) for key, item in value.items()}
    if kind in ("str", "int", "bool", "float"):
        if type(value).__name__ != kind:
            raise ValueError(f"{value!r} is no {kind}")
        return value
    schema = getattr(kserve, kind, None) or getattr(kubernetes.client, kind)
    fields = {spelling: name for name, spelling in schema.attribute_map.items()}
    unknown = value.keys() - fields.keys()
    if unknown:
        raise ValueError(f"{kind} has no {', '.join(unknown)}")
    known = {fields[key]: build(item, schema.openapi_types[fields[key]]) for key, item in value.items()}
    return schema(**known)


if __name__ == "__main__":
    try:
        build(yaml.safe_load(Path(sys.argv[1]).read_text()), "V1beta1InferenceService")
    except ValueError as error:
        sys.exit(f"refused: {error}")
