"""Mamba blocks as planish traces them: one node of `planish::selective_scan` instead of a loop over time in Python.

    prepare(module)            swap the forward of every Mamba mixer in `module`, in place; returns how many there were
    Streaming(module)          a language model that takes and returns its states, for generation; see the class
    mixers(module)             {path: mixer}

A mixer is any module with the parameters of the original Mamba block (Gu and Dao 2023), whichever class it has:
in_proj, conv1d, x_proj, dt_proj, out_proj, A_log, D. Those are the names of transformers' MambaMixer and of the authors'
own `Mamba` module. After `prepare` the forward takes hidden states (batch, time, width) and nothing else that matters:
there is no cache and no padding mask; the parameters keep their names. The traced graph is dynamic in time.

What a mixer computes, x and z (batch, time, channels) being the halves of in_proj's output:

    x = silu(conv1d(x))     causal: taps - 1 zeros, or the carried inputs, stand before the first step
    delta, B, C = x_proj(x),  delta = softplus(dt_proj(delta))
    out_proj((selective_scan(x, delta, A, B, C) + D x) * silu(z))
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..common.errors import PlanishError
from ..kernels import selective_scan
from .model import Input

assert selective_scan.SelectiveScan  # importing the file defines torch.ops.planish.selective_scan

PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj", "A_log", "D")


def mixers(module: nn.Module) -> dict[str, Any]:
    """Every Mamba mixer by its path in `module`."""
    return {name: m for name, m in module.named_modules() if all(hasattr(m, part) for part in PARTS)}


def prepare(module: nn.Module) -> int:
    """Give every Mamba mixer of `module` the forward described above, in place; the number of mixers found.

    Raises PlanishError for a mixer with another activation than SiLU, and for one of Mamba 2, whose scan is another.
    """
    found = mixers(module)
    for name, mixer in found.items():
        _check(name, mixer)
        mixer.forward = types.MethodType(_forward, mixer)
    return len(found)


def _check(name: str, mixer: Any) -> None:
    activation = getattr(mixer, "activation", "silu")
    if activation not in ("silu", "swish"):
        raise PlanishError(f"'{name}': activation '{activation}'; Mamba blocks with silu are supported")
    channels, states = mixer.A_log.shape if mixer.A_log.ndim == 2 else (0, 0)
    rank = mixer.dt_proj.in_features
    if mixer.in_proj.out_features != 2 * channels or mixer.x_proj.out_features != rank + 2 * states:
        raise PlanishError(
            f"'{name}': in_proj gives {mixer.in_proj.out_features} and x_proj {mixer.x_proj.out_features} values for A_log"
            f" {tuple(mixer.A_log.shape)} and step rank {rank}; a block of Mamba 1 gives 2 x channels and rank + 2 x states"
        )


def _forward(mixer: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """(batch, time, width) to the same, from empty states."""
    taps = mixer.conv1d.kernel_size[0]
    batch, channels = hidden_states.shape[0], mixer.A_log.shape[0]
    before = hidden_states.new_zeros(batch, channels, taps - 1)
    state = hidden_states.new_zeros(batch, *mixer.A_log.shape)
    return step(mixer, hidden_states, before, state)[0]


def step(
    mixer: Any, hidden: torch.Tensor, before: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One mixer over the next `time` tokens.

    hidden (batch, time, width); before (batch, channels, taps - 1), the convolution's last inputs; state (batch, channels,
    states). Returns the output (batch, time, width) and both states after the last token.
    """
    channels, states = mixer.A_log.shape
    rank = mixer.dt_proj.in_features
    x, z = mixer.in_proj(hidden).split([channels, channels], -1)  # (batch, time, channels) each
    line = torch.cat([before, x.transpose(1, 2)], 2)  # (batch, channels, taps - 1 + time)
    conv = mixer.conv1d
    x = F.silu(F.conv1d(line, conv.weight, conv.bias, groups=channels)).transpose(1, 2)
    low, b, c = mixer.x_proj(x).split([rank, states, states], -1)
    delta = F.softplus(F.linear(low, mixer.dt_proj.weight, mixer.dt_proj.bias))
    y, state = torch.ops.planish.selective_scan(x, delta, mixer.A_log, b, c, mixer.D, state, None, None, None, 0.0)
    after = line[:, :, line.shape[2] - before.shape[2] :]
    return mixer.out_proj(y * F.silu(z)), after, state


class Streaming(nn.Module):
    """A Mamba language model of transformers that takes and returns its states: forward(input_ids, *states).

    input_ids (batch, time); the states are `conv_state_0` (batch, channels, taps - 1), `scan_state_0` (batch, channels, states), `conv_state_1`,
    ... in this order, zeros to start. Returns logits (batch, time, vocabulary) and the states after the last token, in the same
    order. Parameters keep the names they have in the checkpoint.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if not all(hasattr(model, n) for n in ("backbone", "lm_head")) or not mixers(model):
            raise PlanishError(
                f"'{type(model).__name__}' is no Mamba language model: backbone and lm_head are expected"
            )
        self.backbone, self.lm_head = model.backbone, model.lm_head
        # torch.export describes dynamic dimensions argument by argument, so the states need names of their own
        parameters = [inspect.Parameter(i.name, inspect.Parameter.POSITIONAL_ONLY) for i in self.inputs()]
        self.forward = functools.partial(self._run)
        self.forward.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]

    def _run(self, input_ids: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = self.backbone.embeddings(input_ids)  # (batch, time, width)
        found: list[torch.Tensor] = []
        for index, block in enumerate(self.backbone.layers):
            mixed, *carried = step(block.mixer, block.norm(hidden), *states[2 * index : 2 * index + 2])
            hidden = hidden + mixed
            found += carried
        return (self.lm_head(self.backbone.norm_f(hidden)), *found)

    def inputs(self) -> tuple[Input, ...]:
        """The description of the inputs for `model.trace`: any number of tokens at a time."""
        found = [Input("input_ids", (1, 2), torch.int64, (None, "time"))]
        for index, block in enumerate(self.backbone.layers):
            mixer = block.mixer
            taps = mixer.conv1d.kernel_size[0]
            shapes = {"conv_state": (len(mixer.D), taps - 1), "scan_state": tuple(mixer.A_log.shape)}
            found += [Input(f"{n}_{index}", (1, *s), torch.float32, state=True) for n, s in shapes.items()]
        return tuple(found)

    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs: logits, then every state as `present_<its input>`."""
        return ("logits", *(f"present_{i.name}" for i in self.inputs()[1:]))
