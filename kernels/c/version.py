"""`Version`: a faster C version of an op for cores with certain features. Each is one file `<isa>/<op>.py` beside its C.

The portable version is the op's own `call`; every version gives the same codes bit for bit. Versions are asked in the order
of how many features they need, most first, and the first that takes the node is used.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from typing import ClassVar

from ...common import plugins
from ..op import Call, Node, Op, Unsupported


class Version(abc.ABC):
    """C code for one op on cores with `features`. Stateless."""

    op: ClassVar[str]
    """name of the op"""
    features: ClassVar[tuple[str, ...]]
    """target features that the code needs, e.g. ('dsp', 'fpu')"""

    @abc.abstractmethod
    def call(self, node: Node) -> Call | None:
        """The generated C for the node; None when this version does not take it (a shape, a zero point)."""


def versions(op: str, features: Iterable[str]) -> list[Version]:
    """Versions of an op that run on a core with `features`, most demanding first."""
    has = set(features)
    found = [kind for kind in plugins.find(__package__ or "planish.kernels.c", Version).values() if kind.op == op]
    fitting = [kind() for kind in found if has.issuperset(kind.features)]
    return sorted(fitting, key=lambda v: (-len(v.features), type(v).__module__))


def choose(ops: Mapping[str, Op], node: Node, features: Iterable[str]) -> Call:
    """The C of a node for a core with `features`: the first version that takes it, the portable one last."""
    for version in versions(node.op, features):
        call = version.call(node)
        if call is not None:
            return call
    narrow = [t for t in (*node.inputs, node.output) if t.bits < 8]
    if narrow and not ops[node.op].packed:
        raise Unsupported(f"'{node.name}' ({node.op}) takes codes of 8 bits; '{narrow[0].name}' has {narrow[0].bits}")
    return ops[node.op].call(node)
