"""The GPU benchmark's layers: random codes in the stored form of every op, whose node gives the op's definition. On the CPU."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from planish.kernels.gpu.core import CORES
from planish.kernels.triton import config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu_cases
import tune_gpu


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("make", gpu_cases.KINDS)
def test_the_node_of_a_random_layer_gives_the_definition(make, core):
    torch.manual_seed(0)
    if make is gpu_cases.fp8 and not CORES[core].fp8:
        with pytest.raises(ValueError, match="8-bit floats, which sm_80 does not multiply"):
            gpu_cases.case(make(256, 384), CORES[core], torch.device("cpu"))
        return
    case = gpu_cases.case(make(256, 384), CORES[core], torch.device("cpu"), copies=lambda size: 2)
    x = torch.randn(5, 384, dtype=torch.bfloat16)
    assert case.check(x) < 0.02
    assert torch.equal(case.calls[0](x), case.calls[1](x))
    assert case.stored_bytes < 256 * 384 * 2


@pytest.mark.parametrize("name", tune_gpu.SUBJECTS)
def test_the_tuner_names_the_entry_that_the_kernel_asks_for(name):
    """By the kernel itself, in Triton's interpreter: a candidate is taken, and gives the definition."""
    torch.manual_seed(0)
    subject = tune_gpu.SUBJECTS[name]
    core = CORES["sm_90"]
    case = gpu_cases.case(subject.make(128, 256), core, torch.device("cpu"), launched=True)
    given = (core, 4, 128, 256, *subject.more)
    choices = importlib.import_module(f"planish.kernels.triton.{subject.module}").candidates(*given)
    assert choices and all(isinstance(c, config.Config) for c in choices)
    choices = [c for c in choices if c.form != "hardware"]
    with config.forced(subject.key, choices[0]) as choice:
        assert case.check(torch.randn(4, 256, dtype=torch.float16)) < 0.02
    assert choice.uses
