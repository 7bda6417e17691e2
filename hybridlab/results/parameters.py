"""A notebook's parameters as it holds them when it runs, and their hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

HOW_IT_RUNS = ("results", "resume", "at_once")
"""Parameters that say where results go, what is gone on with, and how many runs train at once: no part of what a
notebook asks."""


def parameters_from(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """What a notebook asks: the annotated literals of its namespace, without `HOW_IT_RUNS`.

    Call it as `parameters_from(globals())` straight after the parameters cell. What later cells bind, which a second
    run of all cells finds there, has no annotations; where Python keeps none of these (from 3.14 on), every lower-case
    literal counts.
    """
    literals = (bool, int, float, str, list, type(None))
    declared = namespace.get("__annotations__") or [name for name in namespace if name.islower()]
    named = {name: namespace[name] for name in declared if name in namespace and not name.startswith("_")}
    return asked({name: value for name, value in named.items() if type(value) in literals})


def asked(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters without `HOW_IT_RUNS`."""
    return {name: value for name, value in parameters.items() if name not in HOW_IT_RUNS}


def parameters_sha256(parameters: Mapping[str, Any]) -> str:
    """Hash parameters over their JSON with sorted keys."""
    return hashlib.sha256(json.dumps(dict(parameters), sort_keys=True).encode()).hexdigest()
