"""A small decoder-only language model in the cache form, trained for a moment on sequences of a known source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from planish.compress.data import Data
from planish.compress.model import Input, Model, trace
from torch import nn
from torch.nn import functional as F

VOCABULARY, WIDTH, HEADS, GROUPS, HIDDEN, LAYERS = 64, 64, 4, 2, 96, 2
SIZE = WIDTH // HEADS
"""features of a head"""
LENGTH = 32
"""tokens of a training row"""


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def rotate(x, position):
    """Rotary embedding of x (batch, heads, length, size) at position (length,)."""
    rate = 1e4 ** (-torch.arange(0, SIZE, 2, dtype=torch.float32) / SIZE)  # (size/2,)
    angle = position[:, None].float() * rate  # (length, size/2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Attention(nn.Module):
    """Causal attention, each key/value head shared by HEADS / GROUPS query heads."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, GROUPS * SIZE, bias=False)
        self.v_proj = nn.Linear(WIDTH, GROUPS * SIZE, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x, past_key, past_value):
        """x (batch, length, width), past (batch, groups, past, size) -> the same of the whole, and both caches."""
        batch, length, _ = x.shape
        past = past_key.shape[2]
        position = torch.arange(past, past + length)
        q = rotate(self.q_proj(x).view(batch, length, HEADS, SIZE).transpose(1, 2), position)
        k = rotate(self.k_proj(x).view(batch, length, GROUPS, SIZE).transpose(1, 2), position)
        v = self.v_proj(x).view(batch, length, GROUPS, SIZE).transpose(1, 2)
        key, value = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)  # (batch, groups, total, size)
        wide_key = key.repeat_interleave(HEADS // GROUPS, 1)
        wide_value = value.repeat_interleave(HEADS // GROUPS, 1)
        seen = torch.arange(past + length) <= position[:, None]  # (length, total)
        if self.fused:
            y = F.scaled_dot_product_attention(q, wide_key, wide_value, attn_mask=seen)
        else:
            scores = q @ wide_key.transpose(-1, -2) * SIZE**-0.5
            y = torch.softmax(scores.masked_fill(~seen, torch.finfo(torch.float32).min), -1) @ wide_value
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, WIDTH)), key, value


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm and added to its input."""

    def __init__(self, fused):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.self_attn = Attention(fused)
        self.gate_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x, past_key, past_value):
        y, key, value = self.self_attn(self.input_layernorm(x), past_key, past_value)
        x = x + y
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y)), key, value


class Decoder(nn.Module):
    """input_ids (batch, length), then past_key_i and past_value_i -> logits (batch, length, vocabulary), then the caches."""

    def __init__(self, fused=True):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(fused) for _ in range(LAYERS))
        self.norm = Norm()
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids, past_key_0, past_value_0, past_key_1, past_value_1):
        past = (past_key_0, past_value_0, past_key_1, past_value_1)
        x = self.embed_tokens(input_ids)
        present = []
        for index, block in enumerate(self.layers):
            x, key, value = block(x, past[2 * index], past[2 * index + 1])
            present += [key, value]
        return self.lm_head(self.norm(x)), *present


def state_inputs():
    """The caches as inputs, their length dynamic."""
    dims = (None, None, "past", None)
    names = [f"past_{kind}_{i}" for i in range(LAYERS) for kind in ("key", "value")]
    return [Input(n, (1, GROUPS, 2, SIZE), torch.float32, dims, state=True) for n in names]


def sequences(count, seed, length=LENGTH):
    """(count, length) int64 rows of a sparse second-order source: each token follows from the last two, up to a choice of three."""
    rng = np.random.default_rng(1)
    follow = rng.integers(0, VOCABULARY, (VOCABULARY, 4, 3))
    rng = np.random.default_rng(seed)
    rows = np.zeros((count, length), np.int64)
    rows[:, 0] = rng.integers(0, VOCABULARY, count)
    for t in range(1, length):
        before = rows[:, t - 2] if t > 1 else rows[:, 0]
        choice = rng.choice(3, count, p=[0.7, 0.2, 0.1])
        rows[:, t] = follow[rows[:, t - 1], before % 4, choice]
    return rows


def train(module, steps, seed=0):
    """A few Adam steps on next-token prediction."""
    generator = np.random.default_rng(seed)
    rows = torch.from_numpy(sequences(512, 3))
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    empty = [i.empty(16) for i in state_inputs()]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        batch = rows[generator.integers(0, len(rows), 16)]
        logits = module(batch, *empty)[0]  # (16, length, vocabulary)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


@pytest.fixture(scope="session")
def decoder_module() -> nn.Module:
    """The trained module, attention fused (aten.scaled_dot_product_attention)."""
    torch.manual_seed(0)
    return train(Decoder(), 150)


@pytest.fixture(scope="session")
def make_decoder(decoder_module) -> Callable[[bool], Model]:
    """The trained decoder traced in the cache form; with `fused` False attention is matmul, softmax, matmul."""

    def make(fused: bool = True) -> Model:
        module = Decoder(fused)
        module.load_state_dict(decoder_module.state_dict())
        declared = [Input("input_ids", (1, 8), torch.int64, (None, "length")), *state_inputs()]
        examples = {i.name: torch.zeros((2, *i.shape[1:]), dtype=i.dtype) for i in declared}
        model = trace(module, examples, "decoder", declared)
        names = ("logits", *(i.name.replace("past", "present") for i in declared[1:]))
        return Model(model.graph, model.inputs, model.batched, model.source, names=names)

    return make


@pytest.fixture(scope="session")
def decoder(make_decoder) -> Model:
    """A trained two-layer decoder: RMSNorm, rotary grouped attention, SwiGLU, embeddings, key/value cache. Do not change it: copy()."""
    return make_decoder(True)


@pytest.fixture(scope="session")
def tokens() -> Data:
    """64 rows of 32 tokens that the decoder was not trained on: {'input_ids': (64, 32)}; caches start empty."""
    return Data({"input_ids": sequences(64, 7)}, None, "tokens")


@pytest.fixture(scope="session")
def inject():
    """Puts outliers into a model without changing what it computes, as the benchmarks do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        import outliers

        return outliers.inject
