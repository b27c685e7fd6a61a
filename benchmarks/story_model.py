"""The 260K-parameter Llama-style story model of the data folder as a plain PyTorch module, its tokens, and its perplexity.

`load()` also serves as a factory: `planish compress benchmarks/story_model.py:load`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import models
import numpy as np
import torch
from planish.common.errors import PlanishError
from planish.compress.data import Data
from planish.compress.model import Input, Model, trace
from torch import nn
from torch.nn import functional as F

FILES = ("stories260k.pt", "config_and_vocab.json", "tokens_dev.npz")


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon))


class Attention(nn.Module):
    """Causal attention with rotary positions on adjacent pairs; a key/value head serves consecutive query heads."""

    def __init__(self, width: int, heads: int, groups: int):
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, groups * self.size, bias=False)
        self.wv = nn.Linear(width, groups * self.size, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x, cos, sin):
        """x (batch, length, width), cos and sin (length, size/2) -> (batch, length, width)."""
        batch, length, _ = x.shape
        q = rotate(self.wq(x).view(batch, length, self.heads, self.size), cos, sin).transpose(1, 2)
        k = rotate(self.wk(x).view(batch, length, self.groups, self.size), cos, sin).transpose(1, 2)
        v = self.wv(x).view(batch, length, self.groups, self.size).transpose(1, 2)  # (batch, groups, length, size)
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to its input."""

    def __init__(self, width: int, hidden: int, heads: int, groups: int, epsilon: float):
        super().__init__()
        self.attention_norm, self.ffn_norm = Norm(width, epsilon), Norm(width, epsilon)
        self.attention = Attention(width, heads, groups)
        self.feed_forward = FeedForward(width, hidden)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class Story(nn.Module):
    """input_ids (batch, length) int64 -> logits (batch, length, vocabulary); parameters are named as in the checkpoint."""

    def __init__(self, config: dict, theta: float, epsilon: float):
        super().__init__()
        width, heads = config["dim"], config["n_heads"]
        sizes = (width, config["hidden_dim"], heads, config["n_kv_heads"], epsilon)
        self.tok_embeddings = nn.Embedding(config["vocab_size"], width)
        self.layers = nn.ModuleList(Block(*sizes) for _ in range(config["n_layers"]))
        self.norm = Norm(width, epsilon)
        size = width // heads
        self.register_buffer("rate", theta ** (-torch.arange(0, size, 2) / size), persistent=False)  # (size/2,)

    def forward(self, input_ids):
        angle = torch.arange(input_ids.shape[1])[:, None] * self.rate  # (length, size/2)
        cos, sin = angle.cos(), angle.sin()
        x = self.tok_embeddings(input_ids)
        for block in self.layers:
            x = block(x, cos, sin)
        return F.linear(self.norm(x), self.tok_embeddings.weight)


def rotate(x, cos, sin):
    """Turn each pair (2i, 2i + 1) of x (batch, length, heads, size) by its position's angle, cos and sin (length, size/2)."""
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def file(name: str):
    path = models.data_folder() / "stories260k" / name
    if not path.is_file():
        raise PlanishError(f"'{path}' is missing: set PLANISH_DATA to the folder that holds stories260k/{name}")
    return path


def available() -> bool:
    """Whether the data folder has the model."""
    return all((models.data_folder() / "stories260k" / name).is_file() for name in FILES)


def load() -> nn.Module:
    """The trained model."""
    settings = json.loads(file(FILES[1]).read_text())
    module = Story(settings["config"], settings["rope_theta"], settings["norm_eps"])
    state = torch.load(file(FILES[0]), weights_only=True)
    state.pop("output.weight", None)  # tied to the embedding
    module.load_state_dict({k: v.float() for k, v in state.items()})
    return module.eval()


def model() -> Model:
    """The trained model, traced with a dynamic length."""
    declared = [Input("input_ids", (1, 8), torch.int64, (None, "length"))]
    return trace(load(), {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}, "stories260k", declared)


def tokens() -> dict[str, np.ndarray]:
    """Token ids, int64: 'generated' (96, 256) was sampled from the model, 'tinystories_doc0' .. '4' are texts it never saw."""
    with np.load(file(FILES[2])) as arrays:
        return {name: arrays[name].astype(np.int64) for name in arrays}


def calibration() -> Data:
    """The generated rows."""
    return Data({"input_ids": tokens()["generated"]}, None, "generated")


@torch.no_grad()
def perplexity(logits: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """exp of the mean loss over the 1,802 predicted tokens of the five texts; `logits` maps (1, length) to (1, length, vocabulary)."""
    total = count = 0
    for name, row in tokens().items():
        if name.startswith("tinystories_doc"):
            ids = torch.from_numpy(row)[None]
            total += float(F.cross_entropy(logits(ids)[0, :-1].float(), ids[0, 1:], reduction="sum"))
            count += len(row) - 1
    return math.exp(total / count)
