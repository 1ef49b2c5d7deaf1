"""Operations of a traced program: matrix products counted in its jaxpr, loops in full, recomputation included."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

ATTENTION_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 5}  # T×T products in splash attention's kernels, by what they yield


def count(jaxpr: Any, devices: int = 1) -> float:
    """Operations (a multiply-add is two) of a jaxpr on all `devices` together.

    A `while` loop counts once (its length is not known before it runs); of a branch the most expensive choice counts.
    Splash attention's kernels count what is under the causal diagonal.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_of(equation, devices) for equation in jaxpr.eqns)


def _of(equation: Any, devices: int) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracting)
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
    if name == "pallas_call":
        return _attention_kernel(equation)
    if name == "cond":
        return max(count(branch, devices) for branch in params["branches"])
    if name == "shard_map":
        return devices * count(params["jaxpr"], devices)
    times = params["length"] if name == "scan" else 1
    return times * sum(count(inner, devices) for inner in _inner(params))


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item


def _attention_kernel(equation: Any) -> float:
    """q is the operand [..., H, T, h] with most entries; the rest of a kernel's work is not counted."""
    label = str(equation.params.get("name") or equation.params.get("name_and_src_info"))
    products = next((n for word, n in ATTENTION_PRODUCTS.items() if word in label), 0)
    shapes = [variable.aval.shape for variable in equation.invars if len(variable.aval.shape) >= 3]
    if not products or not shapes:
        return 0.0
    shape = max(shapes, key=math.prod)
    return products * 2.0 * math.prod(shape) * shape[-2] / 2
