"""Tracing of Mamba blocks: the same numbers as transformers, parameter names kept, states carried, any length."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import mamba
from planish.compress.model import Model, trace
from planish.export.lowering import to_onnx

transformers = pytest.importorskip("transformers")


def small(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "state_size": 4,
        "time_step_rank": 4,
    } | changes
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(2)
    return model


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(input_ids=ids, use_cache=False).logits


def streaming(model: Any) -> Model:
    wrapped = mamba.Streaming(model)
    inputs = wrapped.inputs()
    examples = {i.name: torch.zeros((2, *(i.shape[1:] or ())), dtype=i.dtype) for i in inputs}
    return dataclasses.replace(trace(wrapped, examples, "mamba", inputs), names=wrapped.outputs())


def test_prepared_mixers_equal_those_of_transformers() -> None:
    model, ids = small(), torch.randint(50, (2, 19), generator=torch.Generator().manual_seed(1))
    expected = logits(model, ids)
    names = set(dict(model.named_parameters()))
    assert mamba.prepare(model) == 2
    assert (logits(model, ids) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert set(dict(model.named_parameters())) == names


def test_streaming_in_pieces_equals_the_whole_in_torch_and_onnx_runtime() -> None:
    model, ids = small(), torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(2))
    expected = logits(model, ids)
    traced = streaming(model)
    assert {"backbone.layers.1.mixer.A_log", "lm_head.weight"} <= {
        str(n.target) for n in traced.graph.graph.nodes if n.op == "get_attr"
    }
    session = onnxruntime.InferenceSession(to_onnx(traced).SerializeToString(), providers=["CPUExecutionProvider"])
    state: Any = [i.empty(2) for i in traced.inputs[1:]]
    arrays = [s.numpy() for s in state]
    names = [i.name for i in traced.inputs[1:]]
    for start, end in ((0, 5), (5, 6), (6, 12)):
        with torch.no_grad():
            found, *state = traced(ids[:, start:end], *state)
        onnx, *arrays = session.run(
            None, {"input_ids": ids[:, start:end].numpy(), **dict(zip(names, arrays, strict=True))}
        )
        assert (found - expected[:, start:end]).abs().max() < 1e-5 * expected.abs().max()
        assert np.abs(onnx - found.numpy()).max() < 1e-5 * float(expected.abs().max())


def test_unsupported_blocks_are_named() -> None:
    with pytest.raises(PlanishError, match=r"layers\.0\.mixer.*activation 'gelu'"):
        mamba.prepare(small(hidden_act="gelu"))
