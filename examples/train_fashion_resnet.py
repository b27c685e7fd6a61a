"""Train the demo's network on Fashion-MNIST and write its weights and data slice into demo/.

    python examples/train_fashion_resnet.py --train fashion_train.npz --test fashion_test.npz

Each .npz holds `x` (n, 28, 28) uint8 and `y` (n,). About ten minutes on two cores for 15,000 images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from planish.demo.fashion_resnet import network, prepare
from safetensors.torch import save_file

DEMO = Path(__file__).resolve().parent.parent / "demo"


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift by up to two pixels and mirror at random; (n, 1, 28, 28)."""
    n = len(images)
    flip = torch.rand(n, generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (2, 2, 2, 2), value=float(images.min()))
    rows = torch.randint(0, 5, (n, 1), generator=generator) + torch.arange(28)  # (n, 28)
    columns = torch.randint(0, 5, (n, 1), generator=generator) + torch.arange(28)  # (n, 28)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def accuracy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of correct classes."""
    model.eval()
    with torch.inference_mode():
        return float(torch.cat([model(b).argmax(1) for b in x.split(500)]).eq(y).float().mean())


def main() -> None:
    """Train, report test accuracy, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    with np.load(options.train) as a, np.load(options.test) as b:
        train_x, train_y, test_x, test_y = a["x"], a["y"], b["x"], b["y"]
    x, y = torch.from_numpy(prepare(train_x)), torch.from_numpy(train_y.astype(np.int64))
    held_x, held_y = torch.from_numpy(prepare(test_x)), torch.from_numpy(test_y.astype(np.int64))
    model = network()
    batch = 128
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, options.epochs * (len(x) // batch), pct_start=0.15)
    for epoch in range(options.epochs):
        model.train()
        order = torch.randperm(len(x), generator=generator)
        for index in order[: len(x) // batch * batch].split(batch):
            loss = F.cross_entropy(model(augment(x[index], generator)), y[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 5 == 4 or epoch == options.epochs - 1:
            print(f"epoch {epoch + 1}: test accuracy {accuracy(model, held_x, held_y):.4f}", flush=True)
    model.eval()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, DEMO / "fashion_resnet.safetensors")
    np.savez_compressed(
        DEMO / "fashion_mnist.npz",
        train_x=train_x[:5000], train_y=train_y[:5000], test_x=test_x[:1000], test_y=test_y[:1000],
    )  # fmt: skip


if __name__ == "__main__":
    main()
