"""Recovery training: the compressed model learns to answer as the original does."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from ..common.errors import PlanishError
from ..common.progress import say, track
from . import layers
from .data import Data
from .model import Entry, Model
from .passes import Context, Pass

DROPOUT = ("aten.dropout", "aten.dropout_", "aten.feature_dropout", "aten.alpha_dropout")


class Distill(Pass):
    """Train the model on the original's soft answers to the data, with batch norm in training mode.

    Loss = (1 - hard) * T^2 * CE(softmax(teacher / T), softmax(student / T)) + hard * CE(labels), the soft part after
    Hinton et al. 2015; soft labels alone (the default) are what MEAL V2 (Shen & Savvides 2020) recovers a network with. Each
    batch is augmented first and then shown to both, so that the teacher answers for what the student sees.
    A part of the data is held out; the state with the lowest soft loss on it is kept. Same seed and thread count,
    same result, unless `minutes` cuts the training short.
    """

    epochs: int = pydantic.Field(default=24, ge=1)
    batch: int = pydantic.Field(default=128, ge=2)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd has Nesterov momentum 0.9"""
    learning_rate: float = pydantic.Field(default=0.05, gt=0)
    """highest rate, after the warm-up; cosine to 0 from there"""
    warmup: float = pydantic.Field(default=1.0, ge=0)
    """epochs of linear rise"""
    weight_decay: float = pydantic.Field(default=1e-4, ge=0)
    """on weights of two and more dimensions, not on biases and norms"""
    clip: float | None = pydantic.Field(default=None, gt=0)
    """largest gradient norm"""
    loss: Literal["soft", "mse"] = "soft"
    """soft: outputs are class scores, or probabilities of a final softmax; mse: outputs are quantities"""
    temperature: float = pydantic.Field(default=4.0, gt=0)
    """T above; 1 is the plain cross entropy of MEAL V2, more lets the teacher's smaller probabilities count"""
    hard: float = pydantic.Field(default=0.0, ge=0, le=1)
    """weight of the true labels"""
    crop: int = pydantic.Field(default=0, ge=0)
    """images are padded by this many pixels with zeros and cut at a random place"""
    flip: bool = False
    """images are mirrored left to right at random"""
    holdout: float = pydantic.Field(default=0.1, gt=0, lt=1)
    """share of the data that is not trained on"""
    patience: int | None = pydantic.Field(default=None, ge=1)
    """stop after this many epochs without a better held-out loss"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of convolutions and matrix products while training; auto: bfloat16 where the CPU computes in it"""
    minutes: float | None = pydantic.Field(default=None, gt=0)
    """limit of training time: after the first epoch the number of epochs is cut to what fits"""

    needs_data: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> Model:
        """The trained model. Raises PlanishError for a quantized model, too little data, and loss that diverges."""
        layers.refuse_quantized(model, "distill")
        if context.data is None:
            raise PlanishError("distill needs data (--data)")
        if self.hard and context.data.labels is None:
            raise PlanishError(f"distill with hard {self.hard} needs 'labels' in the data '{context.data.source}'")
        student = model.copy()
        for value in student.graph.parameters():
            value.requires_grad_(value.is_floating_point())
        # Dropout draws from torch's global generator; it is seeded from ours and put back afterwards.
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**62, (), generator=context.generator)))
            first, best = _Run(self, student, context.original, context.data, context.generator).train()
        note = f"distilled: held-out loss {first:.4f} -> {best:.4f}"
        size = sum(v.numel() * v.element_size() for v in student.graph.parameters())
        return student.with_receipt(Entry("all parameters", "trained", note, size, size))

    def rate(self, progress: float, epochs: int) -> float:
        """Learning rate after `progress` of `epochs` epochs: linear warm-up, then half a cosine."""
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        done = (progress - self.warmup) / max(epochs - self.warmup, 1e-9)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def set_training(model: Model, training: bool) -> None:
    """Switch the training flag of every batch norm and dropout in the graph."""
    for node in model.graph.graph.nodes:
        name = layers.op(node)
        if name == "aten.batch_norm":
            layers.set_argument(node, "training", training)
        elif name in DROPOUT:
            layers.set_argument(node, "train", training)
    model.graph.recompile()


def augment(x: Tensor, crop: int, flip: bool, generator: torch.Generator) -> Tensor:
    """A random crop after zero padding, and a random mirror image, of every sample; x is (n, channels, h, w)."""
    n, channels, height, width = x.shape
    top, left = (torch.randint(2 * crop + 1, (n, 1), generator=generator) for _ in range(2))
    rows = top + torch.arange(height)  # (n, h)
    columns = left + torch.arange(width)  # (n, w)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = torch.nn.functional.pad(x, (crop, crop, crop, crop))
    sample, channel = torch.arange(n).view(n, 1, 1, 1), torch.arange(channels).view(1, channels, 1, 1)
    return padded[sample, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]


@dataclass
class _Run:
    """One training: the student is changed in place."""

    config: Distill
    student: Model
    teacher: Model
    data: Data
    generator: torch.Generator

    def __post_init__(self) -> None:
        self.batch = self.config.batch if self.student.batched else self.student.inputs[0].shape[0]
        order = torch.randperm(self.data.n, generator=self.generator).numpy()
        held = max(int(self.data.n * self.config.holdout) // self.batch, 1) * self.batch
        if self.student.batched:
            held = max(int(self.data.n * self.config.holdout), 1)
        self.held, self.shown = self.data.take(order[:held]), self.data.take(order[held:])
        self.batch = min(self.batch, self.shown.n) if self.student.batched else self.batch
        if self.shown.n < max(self.batch, 2):
            raise PlanishError(
                f"data '{self.data.source}' has {self.data.n} samples; distill with batch {self.batch} needs more"
            )
        self.images = [i for i, item in enumerate(self.student.inputs) if len(item.shape) == 4]
        if (self.config.crop or self.config.flip) and not self.images:
            shapes = {i.name: i.shape for i in self.student.inputs}
            raise PlanishError(
                f"distill: 'crop' and 'flip' need an input of images (n, channels, h, w); found {shapes}"
            )
        self.probabilities = [_ends_in_softmax(m) for m in (self.student, self.teacher)]
        auto = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.half = self.config.precision == "bfloat16" or (self.config.precision == "auto" and bool(auto))
        self.answers: list[list[Tensor]] = []

    def train(self) -> tuple[float, float]:
        """Held-out loss before, and of the state that is kept."""
        with torch.no_grad():
            # Held-out samples are not augmented, so the teacher answers for them once.
            self.answers = [self.scores(1, self.teacher, x) for x in self.held.batches(self.student, self.batch)]
        optimizer = self.optimizer()
        first = self.measure()
        best, state, since = first, self.state(), 0
        epochs, start = self.config.epochs, time.monotonic()
        for epoch in (epochs_left := _Epochs(epochs)).watched():
            self.epoch(optimizer, epoch, epochs_left.count)
            found = self.measure()
            if not math.isfinite(found):
                raise PlanishError(
                    f"distill: the held-out loss is {found} after epoch {epoch + 1}; a lower learning_rate or clip helps"
                )
            since += 1
            if found < best:
                best, state, since = found, self.state(), 0
            if self.config.patience is not None and since >= self.config.patience:
                say(f"distill: no better held-out loss for {since} epochs; stopped after {epoch + 1}")
                break
            if self.config.minutes is not None:
                each = (time.monotonic() - start) / (epoch + 1) / 60
                epochs_left.count = min(epochs_left.count, max(epoch + 1, int(self.config.minutes / each)))
        self.student.graph.load_state_dict(state)
        for value in self.student.graph.parameters():
            value.grad = None
        say(f"distill: held-out loss {first:.4f} -> {best:.4f}")
        return first, best

    def optimizer(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.student.graph.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if self.config.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.config.learning_rate)
        return torch.optim.SGD(groups, lr=self.config.learning_rate, momentum=0.9, nesterov=True)

    def epoch(self, optimizer: torch.optim.Optimizer, epoch: int, epochs: int) -> None:
        """Every sample once, in random order; a last batch that is not full is left out."""
        set_training(self.student, True)
        order = torch.randperm(self.shown.n, generator=self.generator).numpy()
        steps = self.shown.n // self.batch
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        for step in range(steps):
            chosen = self.shown.take(order[step * self.batch : (step + 1) * self.batch])
            (inputs,) = chosen.batches(self.student, self.batch)
            inputs = self.augmented(inputs)
            with torch.no_grad():
                wanted = self.scores(1, self.teacher, inputs)
            loss = self.loss(self.scores(0, self.student, inputs), wanted, chosen)
            optimizer.zero_grad()
            loss.backward()
            if self.config.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)
            for group in optimizer.param_groups:
                group["lr"] = self.config.rate(epoch + (step + 1) / steps, epochs)
            optimizer.step()
        set_training(self.student, False)

    def augmented(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not (self.config.crop or self.config.flip):
            return inputs
        return tuple(
            augment(x, self.config.crop, self.config.flip, self.generator) if i in self.images else x
            for i, x in enumerate(inputs)
        )

    def scores(self, who: int, model: Model, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Outputs in float32 (class scores; logarithms where the model ends in a softmax) of student 0 or teacher 1."""
        # Channels last saves the convolutions a reordering of every image tensor (a tenth of the time on AVX512).
        inputs = tuple(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            outputs = model(*inputs)
        listed = (outputs,) if isinstance(outputs, Tensor) else outputs
        states = sum(i.state for i in model.inputs)  # carried on, they stand behind the answers and are no scores
        found = [o.float() for o in listed[: len(listed) - states]]
        if self.config.loss == "soft" and self.probabilities[who]:
            found = [o.clamp_min(1e-12).log() for o in found]
        return found

    def loss(self, scores: list[Tensor], wanted: list[Tensor], chosen: Data) -> Tensor:
        soft = self.soft(scores, wanted)
        if not self.config.hard:
            return soft
        labels = torch.from_numpy(chosen.labels).long()  # pyright: ignore[reportArgumentType]
        hard = torch.nn.functional.cross_entropy(scores[0], labels)
        return (1 - self.config.hard) * soft + self.config.hard * hard

    def soft(self, scores: list[Tensor], wanted: list[Tensor]) -> Tensor:
        """Divergence from the teacher, mean over samples: T^2 * KL(teacher || student), or squared error."""
        parts = []
        for mine, theirs in zip(scores, wanted, strict=True):
            if self.config.loss == "mse":
                parts.append(torch.nn.functional.mse_loss(mine, theirs))
                continue
            axis = 1 if mine.ndim in (2, 4) else mine.ndim - 1  # classes: (n, c), (n, c, h, w), (n, length, c)
            if mine.ndim < 2 or mine.shape[axis] < 2:
                shape = tuple(mine.shape)
                raise PlanishError(f"distill: outputs of shape {shape} are no class scores; use loss 'mse'")
            heat = self.config.temperature
            target = (theirs / heat).log_softmax(axis)
            divergence = (target.exp() * (target - (mine / heat).log_softmax(axis))).sum(axis)
            parts.append(divergence.mean() * heat * heat)
        return torch.stack(parts).sum()

    def measure(self) -> float:
        """Soft loss on the held-out samples, in eval mode."""
        total, count = 0.0, 0
        with torch.no_grad():
            batches: Iterator[tuple[Tensor, ...]] = self.held.batches(self.student, self.batch)
            for inputs, wanted in zip(batches, self.answers, strict=True):
                total += float(self.soft(self.scores(0, self.student, inputs), wanted)) * len(inputs[0])
                count += len(inputs[0])
        return total / count

    def state(self) -> dict[str, Tensor]:
        """A copy of all parameters and buffers."""
        return {k: v.detach().clone() for k, v in self.student.graph.state_dict().items()}


@dataclass
class _Epochs:
    """Epoch numbers behind a progress bar; `count` may be lowered on the way."""

    count: int

    def watched(self) -> Iterator[int]:
        for epoch in track(range(self.count), "distill", self.count):
            if epoch >= self.count:
                break
            yield epoch


def _ends_in_softmax(model: Model) -> bool:
    """Whether all outputs are probabilities of a final softmax."""
    output = next(n for n in model.graph.graph.nodes if n.op == "output")
    return all(layers.op(n) == "aten.softmax" for n in output.all_input_nodes)
