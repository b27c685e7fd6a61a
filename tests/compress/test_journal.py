"""A run that stops goes on at the block it had reached, with the same bytes in the end, and holds little in memory meanwhile."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from planish import compress, pipeline
from planish.common.errors import PlanishError
from planish.compress import blocks, journal
from planish.compress.data import Data
from planish.compress.mapped import Mapped
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize.gptq import Gptq
from planish.compress.quantize.smoothquant import SmoothQuant
from planish.targets import target

NET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

class Net(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

def small():
    torch.manual_seed(0)
    return Net(32, 4)

def wide():
    torch.manual_seed(0)
    return Net(256, 8)
"""
RECIPE = "name: low\npasses:\n  - quantize.smoothquant: {}\n  - quantize.gptq: {group: 32}\n"
BLOCKS = 4 + 1
"""of `small`: four and the head"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with networks, data and a recipe."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    Path("low.yaml").write_text(RECIPE)
    generator = np.random.default_rng(0)
    np.savez("data.npz", x=generator.standard_normal((64, 32)).astype(np.float32))
    np.savez("wide.npz", x=generator.standard_normal((512, 256)).astype(np.float32))
    return tmp_path


def run(output="out", **changed):
    given = {"data": "data.npz", "recipe": "low.yaml", "output": Path(output)} | changed
    return pipeline.compress("net.py:small", **given)


def content(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


class Counted:
    """Calls of a method, the last of which fail."""

    def __init__(self, monkeypatch, kind, method, limit=None):
        self.calls, self.limit, inner = 0, limit, getattr(kind, method)

        def call(*args):
            if self.calls == self.limit:
                raise KeyboardInterrupt
            self.calls += 1
            return inner(*args)

        monkeypatch.setattr(kind, method, call)


@pytest.mark.parametrize("kind, method, done", [(SmoothQuant, "factors", 0), (Gptq, "replacements", BLOCKS)])
def test_a_stopped_run_goes_on_at_the_block_it_had_reached(place, monkeypatch, capsys, kind, method, done):
    run("whole")
    with monkeypatch.context() as patch:
        Counted(patch, kind, method, 4)  # two blocks of two groups, and no further
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not Path("out").exists()
    assert len(list(Path("out.partial").rglob("*.safetensors"))) == done + 2
    capsys.readouterr()
    calls = Counted(monkeypatch, kind, method)
    run()
    assert calls.calls == 2 * BLOCKS - 1 - 4  # the head is one group
    assert f"resuming: {done + 2} blocks" in capsys.readouterr().err
    assert not Path("out.partial").exists()
    assert content("out") == content("whole")


def test_other_input_does_not_go_on_from_there(place, monkeypatch):
    with monkeypatch.context() as patch:
        Counted(patch, Gptq, "replacements", 4)
        with pytest.raises(KeyboardInterrupt):
            run()
    with pytest.raises(
        PlanishError, match=r"made of other input \(not the same: 'seed'\); repeat that command .* or pass --force"
    ):
        run(seed=1)
    Path("low.yaml").write_text(RECIPE.replace("32", "16"))
    with pytest.raises(PlanishError, match=r"\(not the same: 'recipe'\)"):
        run()
    assert Path("out.partial").exists()
    run(force=True)
    assert Path("out").exists() and not Path("out.partial").exists()


def test_a_damaged_block_is_named(place, monkeypatch):
    with monkeypatch.context() as patch:
        Counted(patch, Gptq, "replacements", 4)
        with pytest.raises(KeyboardInterrupt):
            run()
    file = sorted(Path("out.partial").rglob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(PlanishError, match=rf"{file.name}' are damaged"):
        run()


def test_a_run_that_fails_before_its_first_block_leaves_nothing(place, monkeypatch):
    Counted(monkeypatch, SmoothQuant, "factors", 0)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert sorted(p.name for p in place.iterdir() if "out" in p.name) == []


def test_a_killed_process_goes_on(place):
    """SIGKILL: no line of ours runs any more."""
    words = [sys.executable, "-c", "from planish.cli import main; main()", "compress", "net.py:wide", "--data", "wide.npz", "--recipe", "low.yaml", "-o"]  # fmt: skip
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}}  # fmt: skip
    subprocess.run([*words, "whole"], check=True, **quiet)
    process = subprocess.Popen([*words, "out"], **quiet)
    while not list(Path("out.partial").glob("02/gptq/layers.1.safetensors")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not Path("out").exists()
    done = subprocess.run([*words, "out"], check=True, **quiet)
    assert "resuming: " in done.stderr
    assert content("out") == content("whole")
    assert sorted(p.name for p in place.iterdir() if "." in p.name and p.name.startswith((".", "out"))) == []


def test_new_tensors_are_written_out_and_read_from_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SPILL", 1000)
    torch.manual_seed(0)
    model = trace(torch.nn.Linear(32, 32), {"x": torch.zeros(1, 32)}, "linear").copy()
    log = journal.Journal(tmp_path / "partial", identity={"a": 1})
    x = torch.randn(3, 32)
    before = model(x)
    log.spill(model.graph)
    assert all(any(m.holds(t) for m in log.maps) for t in model.graph.parameters())
    log.release()
    assert torch.equal(model(x), before)
    assert [p.name for p in (tmp_path / "partial").iterdir()] == ["identity.json"]  # the file has no name any more
    (one,) = log.maps
    log.spill(model.graph)
    assert log.maps == [one]  # nothing new


def test_the_place_of_a_tensor_is_known(tmp_path):
    file = tmp_path / "numbers"
    file.write_bytes(np.arange(64, dtype=np.float32).tobytes())
    mapped = Mapped(file)
    part = mapped.tensor(torch.float32, (4, 4), 32)
    assert mapped.holds(part) and mapped.holds(part[2]) and not mapped.holds(part.clone())


def test_compress_without_an_output_keeps_nothing(place):
    assert compress("net.py:small", data="data.npz", recipe="low.yaml")["recipe"] == "low"
    assert not [p for p in place.iterdir() if p.name.endswith(".partial")]


class Towers(torch.nn.Module):
    """Two lists of blocks, the second of which is larger until the first is packed."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(5))
        self.decoder = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU()) for _ in range(4)
        )

    def forward(self, x):
        for layer in [*self.encoder, *self.decoder]:
            x = x + layer(x)
        return x


def test_editing_a_block_moves_no_border():
    torch.manual_seed(0)
    model = trace(Towers(), {"x": torch.zeros(1, 32)}, "towers")
    names = [b.name for b in blocks.split(model.graph)]
    assert names == [*(f"encoder.{i}" for i in range(5)), *(f"decoder.{i}" for i in range(4))]
    data = Data({"x": np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)}, None, "data")
    result = Gptq(bits=4).apply(model, Context(model, data, target.load("host"), torch.Generator()))
    assert [b.name for b in blocks.split(result.graph)] == names
    assert result.parameters() == model.parameters()  # codes, several to a byte, are as many weights


def test_a_record_of_other_layers_is_refused(tmp_path):
    log = journal.Journal(tmp_path / "partial", identity={})
    made = lambda: journal.Record({"a": torch.ones(2)}, 1)  # noqa: E731 - a record
    log.once("layers.0", ["q"], made, torch.Generator())
    with pytest.raises(PlanishError, match=r"layers.0.safetensors' was made of 'q', not of 'k'; remove the folder"):
        log.once("layers.0", ["k"], made, torch.Generator())


def test_padding_is_not_calibrated_on():
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x, attention_mask):
            return self.second(torch.relu(self.first(x))) * attention_mask[..., None]

    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    model = trace(Masked(), {"x": torch.zeros(2, 3, 8), "attention_mask": mask}, "masked")
    seen = []
    x = torch.where(mask[..., None] > 0, 1.0, 1e6).expand(2, 3, 8).contiguous()
    visit = lambda block, members, moments: seen.extend(moments.values())  # noqa: E731 - collects
    blocks.calibrate(model, [(x, mask)], lambda name: name == "first", visit, journal.Journal())
    (found,) = seen
    assert found.rows == 3 and float(found.peak.max()) == 1
