"""What planish keeps in an ONNX file beside the graph: its metadata properties, each a JSON list."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import onnx

STATES = "planish.states"
"""names of the inputs that are key/value caches or recurrent states: optional, and empty at first"""
NOTES = "planish.notes"
"""lines about low-bit layers whose ONNX form is larger or slower than it might be"""
LOW_BIT = "planish.low_bit"
"""names of the fused low-bit ops that the file's nodes come from"""


def put(model: onnx.ModelProto, key: str, values: Sequence[str]) -> None:
    """Set a property; without values there is none."""
    kept = [(p.key, p.value) for p in model.metadata_props if p.key != key]
    del model.metadata_props[:]
    for name, value in sorted([*kept, (key, json.dumps(list(values)))] if values else kept):
        model.metadata_props.add(key=name, value=value)


def get(model: onnx.ModelProto, key: str) -> list[str]:
    """The values of a property, [] when it is absent."""
    return parsed({p.key: p.value for p in model.metadata_props}, key)


def parsed(properties: Mapping[str, str], key: str) -> list[str]:
    """The same from properties as a runtime hands them out."""
    return json.loads(properties.get(key, "[]"))
