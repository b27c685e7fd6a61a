"""Damaged .tflite and .onnx files: every one is exported or refused in one line, soon, and nothing half-written stays."""

import signal

import numpy as np
import pytest
from planish import pipeline
from planish.common.errors import PlanishError
from planish.compress import tflite_import

CASES = 250
SECONDS = 20
"""for one file; most take a hundredth of that"""
WORDS = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\0\0\0", b"\1\0\0\0")
"""what lengths and offsets like least"""


def damage(content, seed):
    """Flipped bits, other bytes, a cut end, an extreme word, or bytes too many or too few."""
    rng, b = np.random.default_rng(seed), bytearray(content)
    kind = rng.integers(5)
    if kind == 0:
        for _ in range(rng.integers(1, 9)):
            b[rng.integers(len(b))] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        for _ in range(rng.integers(1, 4)):
            b[rng.integers(len(b))] = int(rng.integers(256))
    elif kind == 2:
        del b[rng.integers(len(b)) :]
    elif kind == 3:
        at = int(rng.integers(len(b) // 4)) * 4
        b[at : at + 4] = WORDS[rng.integers(len(WORDS))]
    else:
        at, count = int(rng.integers(len(b))), int(rng.integers(1, 64))
        b[at : at + count * int(rng.integers(2))] = (
            b"" if rng.integers(2) else bytes(rng.integers(0, 256, count).astype(np.uint8))
        )
    return bytes(b)


@pytest.fixture
def in_time():
    """Ends the test when one file takes too long."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    yield lambda: signal.alarm(SECONDS)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["tflite", "onnx"])
def test_damaged_files(kind, small_tflite, tmp_path, in_time):
    file, output = tmp_path / f"damaged.{kind}", tmp_path / "out"
    (tmp_path / "whole.tflite").write_bytes(small_tflite)
    whole = small_tflite if kind == "tflite" else tflite_import.load(tmp_path / "whole.tflite").SerializeToString()
    refused = 0
    for seed in range(CASES):
        file.write_bytes(damage(whole, seed))
        in_time()
        try:
            pipeline.export(
                str(file), target="host", format="onnx" if seed % 8 == 0 else "c", output=output, force=True
            )
        except PlanishError as error:
            refused += 1
            text = str(error)
            assert "\n" not in text, seed
            assert 10 < len(text) < 700, (seed, text)
            left = {p.name for p in tmp_path.iterdir()} - {file.name, "whole.tflite", "out"}
            assert not left, (seed, left)
    assert refused > CASES // 2
