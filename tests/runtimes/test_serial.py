"""A board on a serial line: the generated firmware in QEMU behind a pseudo-terminal, and lines that are silent, garbled or foreign."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import onnx
import pytest
from planish import cli, pipeline
from planish.common.errors import PlanishError
from planish.export import artifact as artifacts
from planish.export import serial as protocol
from planish.runtimes import serial_line
from planish.runtimes.serial_line import SerialLine
from planish.targets import target as targets

pytest.importorskip("serial", reason="pyserial is not installed (extra 'mcu')")
pytest.importorskip("elftools", reason="pyelftools is not installed (extra 'mcu')")

BOARDS = {
    "mps2-an386": ["mps2-an386", "-serial", "pty"],
    "corstone-300": ["mps3-an547", "-serial", "pty"],
    "stm32f446": ["netduinoplus2", "-serial", "null", "-serial", "pty"],
}
"""targets with a driver for their UART, and QEMU's boards for them (an STM32F405 has the memories and the USART2 of the F446)"""


def test_checksum():
    assert protocol.crc(b"123456789") == 0x29B1  # the check value of CRC-16/CCITT-FALSE
    assert protocol.unframe(protocol.frame("RUN")) == "RUN"
    assert protocol.unframe(b"RUM*" + protocol.frame("RUN")[4:]) is None
    assert protocol.unframe(b"") is None


# --- the real firmware


def exported(made, folder, target):
    """The artifact of a small model and its serial firmware, built as its Makefile says."""
    pytest.importorskip("ziglang", reason="ziglang is not installed (extra 'mcu')")
    pytest.importorskip("unicorn", reason="unicorn is not installed (extra 'mcu')")
    folder.mkdir()
    model, x = made
    onnx.save(model, folder / "tiny.onnx")
    np.savez(folder / "x.npz", x=x[:6])
    pipeline.export(str(folder / "tiny.onnx"), target=target, output=folder / "out", data=str(folder / "x.npz"))
    text = (folder / "out" / "Makefile").read_text(encoding="utf-8")
    flags = re.search(r"ARM_FLAGS='([^']*)'", text)
    assert flags
    built = folder / "built"  # a copy: the artifact stays as it was written
    shutil.copytree(folder / "out", built)
    compiler = f"ARM_CC={sys.executable} -m ziglang cc"
    command = ["make", "serial", compiler, f"ARM_FLAGS={flags[1]}"]
    subprocess.run(command, cwd=built, check=True, capture_output=True, text=True)
    return folder / "out", built / "tiny_serial.elf"


@pytest.fixture(scope="module", params=BOARDS)
def board(request, tiny, tmp_path_factory):
    """(artifact folder, port) of a board in QEMU that runs the artifact's serial firmware."""
    program = shutil.which("qemu-system-arm")
    if program is None:
        pytest.skip("qemu-system-arm is not installed")
    folder, elf = exported(tiny("residual"), tmp_path_factory.mktemp("serial") / "a", request.param)
    command = [program, "-display", "none", "-monitor", "none", "-icount", "shift=5", "-M", *BOARDS[request.param]]
    process = subprocess.Popen(
        [*command, "-kernel", str(elf)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        port = re.search(r"/dev/\S+", said)
        if port is None:
            pytest.skip(f"this QEMU does not run the board: {said.strip()}")
        yield folder, port[0]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.qemu
def test_a_board_gives_the_reference_codes(board):
    folder, port = board
    checked = pipeline.verify(folder, runtime=f"serial://{port}")
    assert checked["ok"]
    assert checked["exact"]
    assert checked["runtime"] == f"serial://{port}"


@pytest.mark.qemu
def test_profile_is_measured_by_layer(board, monkeypatch, capsys):
    folder, port = board
    monkeypatch.setattr(
        "sys.argv", ["planish", "profile", str(folder), "--on", f"serial://{port}?baud=115200", "--runs", "2", "--json"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    report = json.loads(capsys.readouterr().out)
    assert ended.value.code in (0, None)
    assert report["kind"] == "measured"
    uart = targets.load(report["target"]).uart
    assert uart is not None
    assert report["environment"]["clock_hz"] == uart.core_hz
    assert report["latency_ms"]["runs"] == 2
    layers = report["layers"]
    assert [x["op"] for x in layers] == ["conv2d", "conv2d", "add", "global_average_pool", "fully_connected"]
    cycles = [x["measured_cycles"] for x in layers]
    assert all(c > 0 for c in cycles)
    assert max(cycles) == cycles[1]  # the convolution with the most products
    assert abs(sum(cycles) - report["cycles"]) <= 0.2 * report["cycles"]
    assert layers[1]["ms"] == pytest.approx(cycles[1] * 1e3 / uart.core_hz)


@pytest.mark.qemu
def test_the_firmware_bears_bad_lines(board):
    _, port = board
    line = serial_line.Line(port, protocol.BAUD)
    line.clear()
    with pytest.raises(PlanishError, match="refused 'SPEAK': command"):
        line.ask("SPEAK")
    for text in ("INPUT 7 0 00", "INPUT 0 999999 00", "INPUT 0 0 0G", "INPUT 0 0 1", "INPUT", "INPUT 0 191 0000"):
        with pytest.raises(PlanishError, match=r"refused .*: input"):
            line.ask(text)
    for text in ("OUTPUT 0 0 97", "OUTPUT 0 4 2", "OUTPUT 3 0 1", "OUTPUT 0 0", "OUTPUT 0 99999999999 1"):
        with pytest.raises(PlanishError, match=r"refused .*: output"):
            line.ask(text)
    with pytest.raises(PlanishError, match="layer"):
        line.ask("CYCLES 5000")
    for garbage in (b"HELLO*0000\n", b"\xff" * 3000 + b"\n", b"*\n", b"x\n", b"HELLO*GGGG\n"):
        line.port.write(garbage)
        answer = line._read(time.monotonic() + 5)
        assert protocol.unframe(answer) == "ERROR checksum", garbage[:10]
    line.port.write(b"HEL")  # a line that was cut
    line.clear()
    assert line.ask("HELLO").startswith("PLANISH 1 ")
    line.close()


@pytest.mark.qemu
def test_another_model_is_named(board, tiny, tmp_path):
    folder, port = board
    shutil.copytree(folder, tmp_path / "other")
    with (tmp_path / "other" / "tiny_weights.c").open("a", encoding="utf-8") as file:
        file.write("/* retrained */\n")
    with pytest.raises(PlanishError, match="another model"):
        SerialLine(f"serial://{port}").open(artifacts.load(tmp_path / "other"), 1)


# --- lines and boards that are not right


@pytest.fixture
def faulty(monkeypatch):
    """faulty(answers) -> a port whose far end gives `answers` (bytes), one for each line that comes."""
    monkeypatch.setattr(serial_line, "REPLY", 0.5)
    monkeypatch.setattr(serial_line.Line.ask, "__defaults__", (0.5,))
    opened = []

    def make(answers):
        ours, theirs = os.openpty()

        def serve():
            left, seen = list(answers), b""
            while True:
                try:
                    seen += os.read(ours, 4096)
                    while b"\n" in seen:
                        first, _, seen = seen.partition(b"\n")
                        if first and left:
                            os.write(ours, left.pop(0))
                except OSError:
                    return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        opened.append((theirs, thread, ours))
        return os.ttyname(theirs)

    yield make
    for theirs, thread, ours in opened:
        os.close(theirs)  # which ends the thread's read
        thread.join()
        os.close(ours)


@pytest.fixture(scope="module")
def artifact(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    model, x = tiny("residual")
    onnx.save(model, folder / "tiny.onnx")
    np.savez(folder / "x.npz", x=x[:2])
    pipeline.export(
        str(folder / "tiny.onnx"), target="host", format="c", output=folder / "out", data=str(folder / "x.npz")
    )
    return artifacts.load(folder / "out")


def greeting(item):
    layers = len(json.loads((item.folder / "model.json").read_text())["layers"])
    return protocol.frame(f"PLANISH 1 {protocol.identity(item.folder, 'tiny')} {layers} dwt 16000000")


@pytest.mark.parametrize(
    "answers, text",
    [
        ([], "answered nothing within 0.5 s"),
        ([b"PLANI"], "answered only b'PLANI'"),
        ([b"PLANISH 1 x 3 dwt 0*0000\n"], "is garbled"),
        ([b"\x00\xfe\xff\x80\n"], "is garbled"),
        ([b"\xaa" * 5000], "answered only"),
        ([protocol.frame("login:")], "greets with 'login:'"),
        ([protocol.frame("PLANISH 2 x 3 dwt 0")], "greets with 'PLANISH 2"),
        ([protocol.frame("PLANISH 1 x y dwt 0")], "greets with"),
        ([protocol.frame("PLANISH 1 0123456789abcdef 5 dwt 0")], "another model"),
        ([protocol.frame("ERROR checksum")], "refused 'HELLO': checksum"),
    ],
)  # fmt: skip
def test_a_wrong_greeting_is_one_clear_line(answers, text, faulty, artifact):
    with pytest.raises(PlanishError) as error:
        SerialLine(f"serial://{faulty(answers)}").open(artifact, 1)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "later, text",
    [
        ([], "answered nothing"),
        ([protocol.frame("FINE")], "answered 'INPUT' with 'FINE'"),
        ([protocol.frame("OK")] * 2 + [protocol.frame("DONE soon")], "answered 'RUN' with 'DONE soon'"),
        ([protocol.frame("OK")] * 2 + [protocol.frame("DONE 5"), protocol.frame("DATA 00")], "answered 'OUTPUT'"),
        ([protocol.frame("OK")] * 2 + [protocol.frame("DONE 5"), protocol.frame("DATA 00zz000000")], "answered 'OUTPUT'"),
    ],
)  # fmt: skip
def test_a_board_that_fails_later_is_one_clear_line(later, text, faulty, artifact):
    port = faulty([greeting(artifact), *later])
    with SerialLine(f"serial://{port}?timeout=0.5").open(artifact, 1) as session, pytest.raises(PlanishError) as error:
        session.run({"x": np.zeros((1, 3, 8, 8), np.float32)})
    assert text in str(error.value)


@pytest.mark.parametrize(
    "address",
    [
        "serial://",
        "serial:///dev/x?speed=9",
        "serial:///dev/x?baud=fast",
        "serial:///dev/x?baud=-1",
        "serial:///dev/x?timeout=nan",
    ],
)
def test_addresses(address, artifact):
    with pytest.raises(PlanishError, match=r"serial://PORT is accepted"):
        SerialLine(address).open(artifact, 1)


def test_a_port_that_is_not_there(artifact, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["planish", "profile", str(artifact.folder), "--on", "serial:///dev/nowhere"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert said.err.startswith("error: the port '/dev/nowhere' cannot be opened")
    assert said.err.count("\n") == 1
    assert not said.out


def test_places_that_do_not_go_together(artifact):
    with pytest.raises(PlanishError, match="serial://PORT is accepted"):
        pipeline.verify(artifact.folder, runtime="carrier-pigeon://coop")
    with pytest.raises(PlanishError, match="needs a port"):
        pipeline.verify(artifact.folder, runtime="serial_line")
    with pytest.raises(PlanishError, match="give one"):
        cli._place("emulator", "serial:///dev/x")
