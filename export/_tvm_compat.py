"""The one place that imports TVM: its namespaces moved between releases, and the rest of planish should not notice.

TVM 0.27 names: `tirx` (was tir), `s_tir` (schedules), targets as dictionaries, `relax` for graphs.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from ..common.errors import PlanishError, missing_extra

TESTED = "0.27"
"""the release series whose graph importer, schedules and file format were tested"""


def load() -> Any:
    """TVM's parts under stable names. Raises Missing without TVM, PlanishError for a release that was not tested."""
    try:
        import tvm
        from tvm import relax, s_tir, te, tirx, topi
        from tvm.relax.frontend.onnx import onnx_frontend
        from tvm.script.ir_builder import IRBuilder
        from tvm.script.ir_builder import tirx as script
    except ImportError as error:
        raise missing_extra("apache-tvm", "tvm", "the TVM format and runtime") from error
    if not tvm.__version__.startswith(TESTED):
        raise PlanishError(f"apache-tvm {tvm.__version__} is installed; planish was tested with {TESTED}.*")
    return SimpleNamespace(
        tvm=tvm,
        relax=relax,
        s_tir=s_tir,
        te=te,
        tirx=tirx,
        topi=topi,
        onnx_frontend=onnx_frontend,
        IRBuilder=IRBuilder,
        script=script,
        Schedule=s_tir.Schedule,
        ScheduleError=s_tir.ScheduleError,
        PrimFunc=tirx.PrimFunc,
        Target=tvm.target.Target,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send the process's standard error to nowhere meanwhile: TVM's C++ side logs there, by the hundred lines, what no user can act on.

    Failures are not hidden: they come as exceptions.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
