"""Runtime `cuda`: what it says where it cannot run, its arithmetic, moving a program, and decoding with caches of fixed size."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from planish import pipeline
from planish.common.errors import PlanishError
from planish.compress import layers, program_file
from planish.compress import load as loading
from planish.compress.evaluation import language
from planish.compress.model import from_program, trace
from planish.compress.passes import Context
from planish.compress.quantize.kv_cache import KvCache
from planish.compress.quantize.rtn import RoundToNearest
from planish.export import gpu as gpu_program
from planish.kernels.gpu.core import CORES
from planish.runtimes import cuda, cuda_decode, cuda_device
from planish.runtimes.cuda_device import Facts
from planish.runtimes.cuda_figures import Ceilings, Work, achieved, grouped, work
from planish.targets import target
from torch import nn

HERE = Facts("13.0", True, "H100", 90, True)
ARTIFACT = SimpleNamespace(folder="small", target="cuda-sm90")


@pytest.mark.parametrize(
    ("facts", "core", "line"),
    [
        (replace(HERE, cuda=None, available=False), "sm_90", "built without CUDA; --runtime pt2 runs its reference on the CPU"),
        (replace(HERE, available=False), "sm_90", "torch finds none here; --runtime pt2 runs its reference on the CPU"),
        (replace(HERE, name="T4", capability=75), "sm_80", "'T4' has compute capability 7.5; the kernels need 8.0 or newer"),
        (replace(HERE, name="A100", capability=80), "sm_90", "built for sm_90, and 'A100' is sm_80: export it again with --target cuda-sm80"),
        (HERE, "sm_80", "built for sm_80, and 'H100' is sm_90: export it again with --target cuda-sm90"),
        (replace(HERE, triton=False), "sm_90", "needs the package 'triton': pip install 'planish\\[gpu\\]'"),
        (HERE, None, "has no GPU program; export it again with --target"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(facts, core, line):
    with pytest.raises(PlanishError, match=line) as raised:
        cuda.check(ARTIFACT, core, facts)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("capability", "core"), [(90, "sm_90"), (80, "sm_80"), (86, "sm_80"), (89, "sm_89"), (100, "sm_90")])  # fmt: skip
def test_a_core_runs_what_was_made_for_the_nearest_below(capability, core):
    cuda.check(ARTIFACT, core, replace(HERE, capability=capability))


@pytest.mark.parametrize(("place", "form", "name"), [("host", "pt2", "pt2"), ("cuda-sm90", "pt2", "cuda"), ("cuda-sm89", "onnx", "ort")])  # fmt: skip
def test_the_runtime_follows_target_and_format(place, form, name):
    assert pipeline._default_runtime(SimpleNamespace(folder="x", target=place, format=form)) == name


def test_facts_ask_no_gpu_where_there_is_none():
    assert cuda_device.facts().available == torch.cuda.is_available()


def test_figures_are_shares_of_the_ceilings():
    found = achieved(Work(900, 100, 4000), 2.0, Ceilings(1e6, 1e7, None))
    assert found["bytes_per_second"] == pytest.approx(500e3) and found["share_of_copy"] == pytest.approx(0.5)
    assert found["share_of_16_bit_product"] == pytest.approx(0.2) and "share_of_int8_product" not in found
    rows = [(f"k{i}", 2, 10.0 - i) for i in range(5)]
    assert grouped(rows, 3) == [*rows[:3], ("2 others", 4, 13.0)]
    assert grouped(rows, 5) == rows


def test_work_counts_products_and_each_byte_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.linear = nn.Embedding(100, 16), nn.Linear(16, 8)

        def forward(self, tokens):
            return self.linear(self.table(tokens))

    model = trace(Net().eval(), {"tokens": torch.zeros(2, 5, dtype=torch.int64)}, "net")
    found = work(model, [torch.zeros(3, 5, dtype=torch.int64)])
    assert found.operations == 2 * 15 * 16 * 8
    assert found.weight_bytes == 4 * (16 * 8 + 8) + 4 * 15 * 16  # the table's rows that were looked up
    assert found.activation_bytes == 8 * 15 + 4 * 15 * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small Llama, traced."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True, initializer_range=0.15,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama") / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return loading.load(str(folder))


def stored(model, tmp_path):
    """As a runtime gets it: written to a file and read again, its inputs described."""
    program_file.save(model.program(), tmp_path / "model.pt2")
    made = from_program(program_file.load(tmp_path / "model.pt2"), None, "stored")
    return replace(made, inputs=model.inputs, names=model.names)


def rewritten(model, tmp_path, *steps):
    context = Context(model, None, target.load("host"), torch.Generator().manual_seed(0))
    for step in steps:
        model = step.apply(model, context)
    return stored(gpu_program.rewrite(model, CORES["sm_90"]).model, tmp_path)


@pytest.fixture(scope="module")
def program(model, tmp_path_factory):
    """Its program for a GPU with 4-bit weights, from a file."""
    return rewritten(model, tmp_path_factory.mktemp("program"), RoundToNearest(bits=4, group=32))


@pytest.mark.parametrize("form", ["none", "int8", "e4m3"])
def test_decoding_in_place_gives_the_functional_tokens(model, program, tmp_path, form):
    if form != "none":
        program = rewritten(model, tmp_path, KvCache(format=form))
    prompt, count = [5, 17, 30, 22, 9], 16
    static = cuda_decode.static(program)
    assert [s.format for s in static.shapes] == [form] * 2 and static.dtype == torch.bfloat16
    turned = [
        n for n in static.graph.graph.nodes if layers.op(n).startswith("planish.gpu_") and "_decode" in str(n.target)
    ]
    assert len(turned) == 2 and all(layers.argument(n, "cos") is not None for n in turned)
    decoder = cuda_decode.Decoder(static, len(prompt) + count)
    got = [decoder.read(torch.tensor([prompt])), *(decoder.next() for _ in range(count))]
    reference = language(program)
    states, given, margins = reference.empty(1), prompt, []
    for token in got:  # along the same text, so that a tie that falls the other way is seen as one
        scores, states = reference.step(np.array([given]), states)
        top = np.sort(scores[0, -1])
        margins.append(float(top[-1] - scores[0, -1, token]) / float(np.abs(top).max()))
        given = [token]
    assert max(margins) < (0.01 if form == "none" else 0.05)


def test_a_sequence_rewinds_and_has_an_end(program):
    static = cuda_decode.static(program)
    decoder = cuda_decode.Decoder(static, 100)
    assert decoder.capacity == 128
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    first = [decoder.read(prompt), decoder.next(), decoder.next()]
    decoder.rewind(0)
    assert [decoder.read(prompt), decoder.next(), decoder.next()] == first
    with pytest.raises(PlanishError, match="do not fit a cache of 128"):
        decoder.read(torch.zeros((1, 122), dtype=torch.int64))


def test_capture_leaves_the_sequence_as_it_was(program):
    def capture(step):  # as a graph is captured: run a few times first
        for _ in range(4):
            step()
        return step

    static = cuda_decode.static(program)
    shared = [t.data_ptr() for t in program.graph.state_dict().values()]
    assert {t.data_ptr() for t in static.graph.state_dict().values()} <= set(shared)  # weights are there once
    plain, captured = cuda_decode.Decoder(static, 20), cuda_decode.Decoder(static, 20, capture=capture)
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    for decoder in (plain, captured):
        decoder.read(prompt)
    assert [plain.next() for _ in range(8)] == [captured.next() for _ in range(8)]


def test_what_is_no_plain_decoder_is_refused():
    image = trace(nn.Conv2d(3, 4, 3).eval(), {"image": torch.zeros(2, 3, 8, 8)}, "image")
    with pytest.raises(PlanishError, match="takes other inputs than tokens, keys and values"):
        cuda_decode.static(image)


def test_a_moved_program_makes_nothing_on_the_cpu(program):
    """On a device without values every op must find its operands on one device."""
    made = cuda.on(program, torch.device("meta"))
    feeds = [x.to("meta") for x in made.feeds({"input_ids": np.zeros((2, 5), np.int64)})]
    with torch.no_grad():
        scores = made.graph(*feeds)[0]
    assert scores.shape == (2, 5, 64) and scores.device.type == "meta"
    assert {t.device.type for t in program.graph.state_dict().values()} == {"cpu"}  # the given one stays where it is


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_answers_as_the_reference_and_replays_its_tokens(program):
    device = torch.device("cuda", 0)
    moved = cuda.on(program, device)
    feeds = program.feeds({"input_ids": np.array([[5, 17, 30, 22, 9]])})
    with torch.no_grad():
        want, got = program.graph(*feeds)[0], moved.graph(*(x.to(device) for x in feeds))[0].cpu()
    assert float((want - got).abs().max()) < 0.05 * float(want.abs().max())
    decoders = [
        cuda_decode.Decoder(cuda_decode.static(moved), 32, device),
        cuda_decode.Decoder(cuda_decode.static(moved), 32, device, lambda step: cuda_device.Captured(step).replay),
    ]
    rows = [[d.read(torch.tensor([[5, 17, 30]])), *(d.next() for _ in range(12))] for d in decoders]
    assert rows[0] == rows[1]
