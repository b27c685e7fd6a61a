"""Freed memory goes back to the system."""

import subprocess
import sys

import pytest
from planish.common import memory

SCRIPT = """
import resource, torch
from planish.common import memory
assert memory.return_freed()
held = []
for _ in range(200):  # small tensors that stay between large ones that go
    large = torch.zeros(1 << 18)  # 1 MiB
    held.append(torch.zeros(64))
    del large
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()
before = resident()
large = [torch.zeros(1 << 18) for _ in range(100)]
grown = resident() - before
del large
print(grown >= 90 << 20, resident() - before < 10 << 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_is_freed_is_gone():
    if not memory.return_freed():
        pytest.skip("the C library has no mallopt")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
