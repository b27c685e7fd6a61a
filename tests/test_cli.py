"""The command line as a user meets it: what it prints, its exit codes, and what it leaves behind on bad input."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from planish import cli
from safetensors.torch import save_file

NET = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))

def other():
    return nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5), nn.Linear(5, 5))

def number():
    return 3

class Pair(nn.Module):
    def forward(self, input):
        return {"scores": input.mean((2, 3)), "count": 3}

def pair():
    return Pair()
"""


def planish(*words):
    """Run a command line in this process: exit code."""
    sys.argv = ["planish", *map(str, words)]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a network, its weights and labelled data."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(128, 4)
    )
    save_file(module.state_dict(), "net.safetensors")
    x = np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)
    with torch.no_grad():
        labels = module(torch.from_numpy(x)).argmax(1).numpy()
    np.savez("data.npz", input=x, labels=labels)
    return tmp_path


GOOD = ["compress", "net.py:net", "--weights", "net.safetensors", "--data", "data.npz", "-o", "small"]


def test_checkpoint_to_profile(place, capsys):
    """The three commands of the README, their JSON, and the verbs on the result."""
    assert planish(*GOOD, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {
        "model",
        "target",
        "recipe",
        "params",
        "macs",
        "bytes",
        "original",
        "accuracy",
        "seconds",
        "peak_memory_bytes",
    } <= set(report)
    assert report["original"]["bytes"] > 3 * report["bytes"]
    assert report["accuracy"]["original"] == 1 and report["accuracy"]["n"] == 64

    assert planish("export", "small", "-o", "artifact", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {"artifact", "format", "target", "files", "bytes", "warnings"} <= set(report)
    assert report["warnings"] == []

    assert planish("profile", "artifact", "--runs", 3, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "measured" and set(report["latency_ms"]) >= {"p50", "p90", "p99", "runs"}
    assert report["macs"] == 8 * 16 * 27 + 128 * 4
    assert {"name", "op"} <= set(report["layers"][0])

    assert planish("verify", "artifact", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["exact"] and report["max_error"] == 0 and all(report["hashes"].values())

    assert planish("evaluate", "artifact", "--data", "data.npz", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["metric"] == "accuracy" and report["value"] > 0.9 and report["n"] == 64
    assert planish("evaluate", "artifact", "--json") == 0
    assert json.loads(capsys.readouterr().out)["value"] > 0.99

    np.savez("x.npz", input=np.load("data.npz")["input"][:5])
    assert planish("run", "artifact", "-i", "x.npz", "-o", "y.npz") == 0
    assert np.load("y.npz")["output"].shape == (5, 4)


def test_same_inputs_same_bytes(place, capsys):
    for name in ("a", "b"):
        assert planish(*GOOD[:-1], f"{name}/small") == 0
        assert planish("export", f"{name}/small", "-o", f"{name}/onnx") == 0
        assert planish("export", f"{name}/small", "-f", "pt2", "-o", f"{name}/pt2") == 0
    files = sorted(p.relative_to("a") for p in Path("a").rglob("*") if p.is_file())
    assert len(files) == 9
    for file in files:
        assert (Path("a") / file).read_bytes() == (Path("b") / file).read_bytes(), file


def test_other_model_forms_reach_the_same_artifact(place, capsys):
    """The factory exported as it is, the same as .pt2 and the same as .onnx, all float."""
    assert planish("export", "net.py:net", "-w", "net.safetensors", "-i", "input=1,3,8,8", "-o", "float") == 0
    assert planish("export", "float/model.onnx", "-o", "again") == 0
    assert planish("profile", "float/model.onnx", "--runs", 2) == 0
    assert planish("compress", "float/model.onnx", "-d", "data.npz", "-o", "from_onnx") == 0
    assert planish("evaluate", "from_onnx", "-d", "data.npz", "--json") == 0
    assert json.loads(capsys.readouterr().out.rpartition("\n{")[2].join(["{", ""]))["value"] > 0.9


class Bomb:
    """A pickle that runs a command when it is loaded."""

    def __reduce__(self):
        return (os.system, ("touch bomb_went_off",))


def arrays(**changes):
    data = dict(np.load("data.npz"))
    data.update(changes)
    np.savez("bad.npz", **{k: v for k, v in data.items() if v is not None})


def set_up_nan():
    x = np.load("data.npz")["input"]
    x[7, 0, 0, 0] = np.nan
    arrays(input=x)


def set_up_pickle():
    Path("bad.pt").write_bytes(pickle.dumps(Bomb()))


def set_up_truncated():
    Path("bad.safetensors").write_bytes(Path("net.safetensors").read_bytes()[:300])


def set_up_existing():
    Path("small").mkdir()
    Path("small/manifest.json").write_text("{}")


def set_up_recipe():
    Path("bad.yaml").write_text("name: r\ndescription: d\npasses:\n  - quantize.static: {observers: mse}\n")


def set_up_pass():
    Path("bad.yaml").write_text("name: r\ndescription: d\npasses:\n  - quantize.magic\n")


COMPRESS = "compress net.py:net -w net.safetensors -d data.npz -o small"
BAD = [
    ("missing weights", None, "compress net.py:net -w none.safetensors -d data.npz -o small", ["none.safetensors"]),
    ("truncated weights", set_up_truncated, "compress net.py:net -w bad.safetensors -d data.npz -o small", ["bad.safetensors"]),
    ("pickle that runs code", set_up_pickle, "compress net.py:net -w bad.pt -d data.npz -o small", ["bad.pt"]),
    ("keys and shapes do not match", None, "compress net.py:other -w net.safetensors -d data.npz -o small", ["0.weight", "4.weight"]),
    ("no module", None, "compress net.py:number -w net.safetensors -d data.npz -o small", ["number"]),
    ("no factory", None, "compress net.py:nothing -w net.safetensors -d data.npz -o small", ["nothing", "net"]),
    ("non-tensor output", None, "compress net.py:pair -d data.npz -o small", ["tensor"]),
    ("wrong shape", lambda: arrays(input=np.zeros((4, 3, 9, 9), np.float32), labels=np.zeros(4, int)), "compress float.onnx -d bad.npz -o small", ["(n, 3, 9, 9)", "(n, 3, 8, 8)"]),
    ("wrong dtype", lambda: arrays(input=np.zeros((64, 3, 8, 8), np.int64)), "compress float.onnx -d bad.npz -o small", ["int64", "float32"]),
    ("NaN", set_up_nan, "compress net.py:net -w net.safetensors -d bad.npz -o small", ["NaN", "sample 7"]),
    ("empty data", lambda: arrays(input=np.zeros((0, 3, 8, 8), np.float32), labels=np.zeros(0, int)), "compress float.onnx -d bad.npz -o small", ["bad.npz", "empty"]),
    ("wrong key", lambda: arrays(input=None, picture=np.zeros((64, 3, 8, 8), np.float32)), "compress float.onnx -d bad.npz -o small", ["picture", "input"]),
    ("no data", None, "compress net.py:net -w net.safetensors -i input=1,3,8,8 -o small", ["--data"]),
    ("unknown target", None, f"{COMPRESS} -t toaster", ["toaster", "stm32f746"]),
    ("unknown recipe", None, f"{COMPRESS} -r magic", ["magic", "w8a8-static"]),
    ("unknown pass", set_up_pass, f"{COMPRESS} -r bad.yaml", ["quantize.magic", "4", "quantize.static"]),
    ("unknown field", set_up_recipe, f"{COMPRESS} -r bad.yaml", ["observers", "4", "observer"]),
    ("output exists", set_up_existing, COMPRESS, ["small", "--force"]),
    ("unwritable output", lambda: Path("file").write_text(""), COMPRESS.replace("-o small", "-o file/small"), ["file"]),
    ("unknown format", None, "export float.onnx -f brick -o small", ["brick", "onnx"]),
    ("unknown op in C", None, "export odd.onnx -t stm32f746 -o small", ["sums", "CumSum", "Conv"]),
    ("damaged onnx", lambda: Path("bad.onnx").write_bytes(b"abc"), "export bad.onnx -o small", ["bad.onnx"]),
    ("no artifact", None, "profile nowhere", ["nowhere"]),
    ("missing option", None, "compress net.py:net", ["--output"]),
]  # fmt: skip


@pytest.mark.parametrize("set_up, line, expected", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_gets_one_line_and_leaves_nothing(place, capsys, set_up, line, expected):
    if "float.onnx" in line:
        write_float()
    if "odd.onnx" in line:
        write_odd()
    if set_up is not None:
        set_up()
    before = sorted(place.rglob("*"))
    assert planish(*line.split()) not in (0, None)
    errors = capsys.readouterr().err.strip().splitlines()
    last = errors[-1]
    assert last.startswith("error: ")
    assert sum(e.startswith("error: ") for e in errors) == 1 and "Traceback" not in "".join(errors)
    for word in expected:
        assert word in last
    assert not (place / "bomb_went_off").exists()
    after = [p for p in sorted(place.rglob("*")) if "__pycache__" not in p.parts]
    assert after == [p for p in before if "__pycache__" not in p.parts]


def write_float():
    weight = np.random.default_rng(0).standard_normal((4, 192)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w"], ["output"], transB=1),
    ]
    write(nodes, [numpy_helper.from_array(weight, "w")], "float.onnx", ["n", 3, 8, 8], ["n", 4])


def write_odd():
    constants = [numpy_helper.from_array(np.array(v, t), k) for k, v, t in (("s", 0.1, np.float32), ("z", 0, np.uint8), ("a", 1, np.int64))]  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("CumSum", ["d", "a"], ["c"], name="sums"),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["q2"]),
        helper.make_node("DequantizeLinear", ["q2", "s", "z"], ["output"]),
    ]
    write(nodes, constants, "odd.onnx", [1, 8], [1, 8])


def write(nodes, constants, path, shape, result):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("input", TensorProto.FLOAT, shape)], [value("output", TensorProto.FLOAT, result)], constants
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def test_keys_that_do_not_match_are_counted(place, capsys):
    assert planish("compress", "net.py:other", "-w", "net.safetensors", "-d", "data.npz", "-o", "small") == 1
    assert "2" in capsys.readouterr().err.splitlines()[-1]


def test_force_replaces_and_only_what_planish_wrote(place, capsys):
    assert planish(*GOOD) == 0
    first = (place / "small" / "manifest.json").read_text()
    assert planish(*GOOD, "--force") == 0
    assert (place / "small" / "manifest.json").read_text() == first
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("years of work")
    assert planish(*GOOD[:-1], "mine", "--force") == 1
    assert (place / "mine" / "thesis.txt").read_text() == "years of work"


def test_force_never_replaces_the_model_itself(place, capsys):
    assert planish(*GOOD) == 0
    assert planish("export", "small", "-o", "small", "--force") == 1
    assert "choose another path" in capsys.readouterr().err.splitlines()[-1]
    assert (place / "small" / "model.pt2").exists()


def test_every_format_passes_its_own_verification(place, capsys):
    """Float and quantized, each on its default runtime; a foreign folder with a manifest is not replaced."""
    assert planish(*GOOD) == 0
    for source in (["small"], ["net.py:net", "-w", "net.safetensors", "-d", "data.npz"]):
        for format in ("onnx", "pt2"):
            assert planish("export", *source, "-f", format, "-o", "artifact", "--force") == 0
            assert planish("verify", "artifact") == 0
    (place / "web").mkdir()
    (place / "web" / "manifest.json").write_text('{"name": "my page"}')
    assert planish("export", "small", "-o", "web", "--force") == 1
    assert (place / "web" / "manifest.json").read_text() == '{"name": "my page"}'


def test_data_for_an_artifact_is_checked_like_a_models(place, capsys):
    assert planish(*GOOD) == 0
    assert planish("export", "small", "-o", "artifact") == 0
    x = np.load("data.npz")["input"]
    np.savez("wide.npz", input=x.astype(np.float64))
    assert planish("run", "artifact", "-i", "wide.npz", "-o", "y.npz") == 0
    for bad in (x.astype(np.int32), x[:, :2], np.where(x > 2, np.nan, x)):
        np.savez("bad.npz", input=bad)
        assert planish("run", "artifact", "-i", "bad.npz", "-o", "z.npz") == 1
        assert "bad.npz" in capsys.readouterr().err.splitlines()[-1]
    assert not (place / "z.npz").exists()


def test_a_changed_artifact_is_not_timed(place, capsys):
    assert planish(*GOOD) == 0
    assert planish("export", "small", "-o", "artifact") == 0
    path = place / "artifact" / "model.onnx"
    path.write_bytes(path.read_bytes() + b"\n")
    assert planish("profile", "artifact") == 1
    assert "model.onnx" in capsys.readouterr().err.splitlines()[-1]


def child(place, words, **options):
    code = "from planish.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=place, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_full_disk_leaves_nothing(place):
    """Every write past 8 KiB fails, as on a full disk."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # noqa: E731 - runs in the child
    process = child(place, GOOD, preexec_fn=limit)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: output 'small' cannot be written" in errors.splitlines()[-1]
    assert {p.name for p in place.iterdir()} <= {"net.py", "net.safetensors", "data.npz", "__pycache__"}


def test_ctrl_c_leaves_nothing(place):
    Path("slow.py").write_text(
        "import time, numpy as np\ndef data():\n    print('loading', flush=True)\n    time.sleep(60)\n"
    )
    words = [w if w != "data.npz" else "slow.py:data" for w in GOOD]
    process = child(place, words, stdout=subprocess.PIPE)
    assert process.stdout.readline().strip() == "loading"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors.splitlines()[-1]
    assert not (place / "small").exists()
    assert not [p for p in place.iterdir() if p.name.startswith(".small")]


def test_python_api_is_the_command_line(place):
    import planish as package

    report = package.compress("net.py:net", weights=Path("net.safetensors"), data="data.npz", output=Path("small"))
    assert report["bytes"] < report["original"]["bytes"]
    assert package.export("small", output=Path("artifact"))["format"] == "onnx"
    assert package.verify(Path("artifact"))["ok"]
    with pytest.raises(package.PlanishError, match="toaster"):
        package.export("small", target="toaster", output=Path("other"))


def test_version(capsys):
    import planish

    with pytest.raises(SystemExit) as stopped:
        cli.app(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"planish {planish.__version__}\n"
