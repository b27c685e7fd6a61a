"""Hugging Face model folders: config.json and safetensors, sharded or not, traced to a `Model` through `transformers`.

transformers gives the code of the architecture and nothing else: the folder's own code is never run, nothing is fetched, and
the module is built without memory for its weights. It is traced once, then the tensors of the files take the places of its
parameters, memory-mapped and in the type in which they are stored; 16-bit ones are converted where they are read.

A causal language model is traced in the cache form: `input_ids` (batch, length), then `past_key_i` and `past_value_i` (batch,
heads, past, size) of every layer, which start empty; outputs `logits` (batch, length, vocabulary) and `present_key_i`,
`present_value_i` (batch, heads, past + length, size). A Mamba carries `conv_state_i` and `scan_state_i`. An encoder takes
`input_ids` and `attention_mask`, a vision model `pixel_values`; their outputs have transformers' names.

Linears that the folder holds as bitsandbytes codes are traced as planish ops on these codes: bitsandbytes_file.py.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode

from ..common import files
from ..common.errors import PlanishError, listed, missing_extra
from . import bitsandbytes_file, layers, mamba, text
from .mapped import Mapped, safetensors_file
from .model import Entry, Input, Model, Text, trace
from .weights import misfits

DECODERS = ("gemma", "gpt2", "gpt_neox", "llama", "mistral", "opt", "phi", "phi3", "qwen2", "qwen3")
STATE_SPACE = ("mamba",)
ENCODERS = ("bert", "distilbert", "electra", "roberta", "xlm-roberta")
VISION = ("deit", "dinov2", "vit")
"""values of `model_type` whose traced graphs are tested against transformers' own outputs"""
OWN_POSITIONS = ("roberta", "xlm-roberta")
"""encoders that count positions themselves, from behind the padding token"""
ENDINGS = {
    **dict.fromkeys(DECODERS, ("ForCausalLM", "LMHeadModel")),
    **dict.fromkeys(STATE_SPACE, ("ForCausalLM",)),
    **dict.fromkeys(ENCODERS, ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")),
    **dict.fromkeys(VISION, ("Model", "ForImageClassification")),
}
"""how the names of the accepted classes end, by model_type"""
UNLIMITED = 2048
"""window of a model without a limit of its own (a Mamba): the length that the published ones were trained with"""
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
COMPANIONS = (
    "chat_template.jinja", "config.json", "generation_config.json", "preprocessor_config.json", "special_tokens_map.json", "tokenizer_config.json",
)  # fmt: skip
"""small files of a folder that travel with its model, so that a folder can be written again"""
SMALL = 1 << 20
"""bytes of the largest of them"""


def is_folder(path: Path) -> bool:
    """Whether the folder is a Hugging Face model folder."""
    return (path / "config.json").is_file()


def load(folder: Path) -> Model:
    """The model in the folder. Raises PlanishError, one line, for everything that is missing, damaged or not supported."""
    content = files.read_json(folder / "config.json")
    packing = bitsandbytes_file.packing(content, folder)
    config, module = skeleton(content, folder)
    mapped, tensors = read(folder)
    receipt: tuple[Entry, ...] = ()
    if packing is not None:
        if config.model_type in STATE_SPACE:
            raise PlanishError(f"'{folder}': a '{config.model_type}' whose linears are bitsandbytes codes is not read")
        tensors, receipt = bitsandbytes_file.place(module, tensors, packing, _renaming(module), folder)
    given = _matched(module, tensors, folder)
    _untie(module, given)
    model = _traced(module, config, str(folder))
    _fill(model.graph, given)
    return replace(model, text=_text(folder, config), mapped=mapped, receipt=receipt, origin=_origin(folder))


# ---- the architecture


def skeleton(content: Mapping[str, Any], folder: Path) -> tuple[Any, torch.nn.Module]:
    """The configuration object and the module, without values, of a config.json's content; `folder` is what messages name."""
    config, kind = architecture(content, folder)
    return config, _build(kind, config)


def architecture(content: Mapping[str, Any], folder: Path) -> tuple[Any, type[torch.nn.Module]]:
    """The configuration object and the model class that transformers has for the folder."""
    try:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ModuleNotFoundError as error:
        raise missing_extra("transformers", "hf", f"reading the Hugging Face folder '{folder}'") from error
    model_type = content.get("model_type")
    named = content.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    if model_type not in ENDINGS:
        raise PlanishError(f"'{folder}' has the architecture {_quoted(model_type)}; supported: {', '.join(ENDINGS)}")
    if name is None or not name.endswith(ENDINGS[model_type]):
        raise PlanishError(
            f"'{folder}' holds a {_quoted(name)} of architecture '{model_type}'; supported of it: …{', …'.join(ENDINGS[model_type])}"
        )
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        raise PlanishError(f"'{folder}': transformers {transformers.__version__} has no class '{name}'")
    try:
        config = CONFIG_MAPPING[model_type].from_dict({k: v for k, v in content.items() if k != "quantization_config"})
    except Exception as error:  # the configuration classes check their fields each in its own way
        raise PlanishError(
            f"'{folder / 'config.json'}' is not a configuration of '{model_type}': {_line(error)}"
        ) from None
    config._attn_implementation = "eager"
    return config, kind


def _quoted(name: object) -> str:
    return f"'{name}'" if name else "none named in config.json"


class _Weightless(TorchFunctionMode):
    """torch.empty, from which modules make their parameters, gives tensors without memory: filling them costs nothing."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.empty:
            return func(*args, **{**(kwargs or {}), "device": "meta"})
        return func(*args, **(kwargs or {}))


def _build(kind: type[torch.nn.Module], config: Any) -> torch.nn.Module:
    """The module in eval mode: real buffers, and parameters whose memory is never touched, so that it costs none."""
    with torch.random.fork_rng(devices=[]), _Weightless():
        module = kind(config).eval()
    made: dict[int, torch.nn.Parameter] = {}
    for owner in module.modules():
        for name, old in owner._parameters.items():
            if old is not None:
                shape = tuple(old.shape)
                owner._parameters[name] = made.setdefault(
                    id(old), torch.nn.Parameter(torch.empty(shape, dtype=torch.float32))
                )
        unknown = [n for n, b in owner._buffers.items() if b is not None and b.is_meta]
        assert not unknown, f"{type(owner).__name__} computes its buffers {unknown} from torch.empty"
    return module


# ---- the files


def read(folder: Path) -> tuple[tuple[Mapped, ...], dict[str, torch.Tensor]]:
    """The folder's safetensors files, mapped, and their tensors by name.

    Raises PlanishError for a missing, truncated or damaged file and for an index that does not describe its files.
    """
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            other = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
            found = f"; {listed(other)} hold pickles, which are not read" if other else ""
            raise PlanishError(f"'{folder}' has neither {SINGLE} nor {INDEX}{found}")
        mapped, tensors = safetensors_file(folder / SINGLE)
        return (mapped,), tensors
    where = folder / INDEX
    index = files.read_json(where).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(v, str) for v in index.values()) or not index:
        raise PlanishError(f"'{where}' has no 'weight_map' of file names by tensor name")
    shards = sorted(set(index.values()))
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise PlanishError(f"'{where}' names '{shard}'; a .safetensors file beside it is expected")
        if not (folder / shard).is_file():
            count = sum(v == shard for v in index.values())
            raise PlanishError(f"'{where}' names '{shard}' for {count} tensors; there is no such file")
    mappings: list[Mapped] = []
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        mapped, own = safetensors_file(folder / shard)
        wanted = {n for n, v in index.items() if v == shard}
        lacking, extra = sorted(wanted - set(own)), sorted(set(own) - wanted)
        if lacking:
            raise PlanishError(f"'{where}' does not fit '{shard}', which lacks {listed(lacking)}")
        if extra:
            raise PlanishError(f"'{where}' does not fit '{shard}', which also holds {listed(extra)}")
        mappings.append(mapped)
        tensors |= own
    return tuple(mappings), tensors


def _matched(module: Any, tensors: Mapping[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """The files' tensors by the module's names. Raises PlanishError unless names and shapes agree (first three, counts)."""
    own = {n: p for n, p in module.named_parameters(remove_duplicate=False)}
    buffers = dict(module.named_buffers())
    stored = module.state_dict()
    rename = _renaming(module)
    found = {rename(n): t for n, t in tensors.items()}
    ignored = tuple(module._keys_to_ignore_on_load_unexpected or ())
    tied: dict[int, list[str]] = {}
    for name, parameter in own.items():
        tied.setdefault(id(parameter), []).append(name)
    lacking = [names[0] for names in tied.values() if not any(n in found for n in names)]
    lacking += [n for n in stored if n not in own and n not in found]
    unexpected = [n for n in found if n not in own and n not in buffers and not any(re.search(p, n) for p in ignored)]
    shapes = {
        n: (tuple(t.shape), tuple(own[n].shape)) for n, t in found.items() if n in own and t.shape != own[n].shape
    }
    other = [
        f"{n} is {t.dtype}".replace("torch.", "") for n, t in found.items() if n in own and not t.is_floating_point()
    ]
    faults = misfits(lacking, unexpected, shapes)
    if other:
        faults.append(f"{len(other)} of no float type: {listed(other)}")
    if faults:
        raise PlanishError(f"the weights in '{folder}' do not fit its config.json: {'; '.join(faults)}")
    given = {n: found[n] for n in found if n in own or n in stored}
    for names in tied.values():
        present = [n for n in names if n in given]
        for name in names:
            given.setdefault(name, given[present[0]])
            if len(present) > 1 and torch.equal(given[name], given[present[0]]):
                given[name] = given[present[0]]  # stored twice, though tied
    return given


def _untie(module: torch.nn.Module, given: Mapping[str, torch.Tensor]) -> None:
    """Give a parameter of its own to every name whose tensor in the files is another than that of the names it shares with."""
    first: dict[int, str] = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if given[first.setdefault(id(parameter), name)] is not given[name]:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(torch.empty_like(parameter)))


def _renaming(module: Any) -> Callable[[str], str]:
    """From a tensor's name in a file to its name in the module: transformers knows how older files call them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = [r for r in get_model_conversion_mapping(module) if isinstance(r, WeightRenaming)]
    own, prefix = module.state_dict(), module.base_model_prefix
    return lambda name: name if name in own else rename_source_key(name, rules, [], prefix, own)[0]


# ---- tracing


def _traced(module: Any, config: Any, source: str) -> Model:
    """The traced model, its parameters still without values."""
    module, inputs, outputs = in_form(module, config)
    examples = {i.name: torch.ones(i.shape, dtype=i.dtype) for i in inputs}
    with _quiet():
        model = trace(module, examples, source, inputs)
    return replace(model, names=tuple(outputs))


def in_form(module: Any, config: Any) -> tuple[Any, tuple[Input, ...], Sequence[str]]:
    """The module with a forward that takes and returns tensors by position; its inputs, and the names of its outputs once it has run."""
    if config.model_type in STATE_SPACE:
        module = mamba.Streaming(module)
        inputs, outputs = module.inputs(), module.outputs()
    elif config.model_type in DECODERS:
        inputs, outputs = _decoder(module, config)
    elif config.model_type in ENCODERS:
        dims = (None, "length")
        inputs = tuple(Input(n, (1, 2), torch.int64, dims) for n in ("input_ids", "attention_mask"))
        outputs = _plain(module, inputs, config.model_type not in OWN_POSITIONS)
    else:
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        inputs = (Input("pixel_values", (1, config.num_channels, height, width), torch.float32),)
        outputs = _plain(module, inputs)
    return module, tuple(inputs), outputs


def _signature(module: Any, names: Sequence[str], forward: Callable[..., Any]) -> None:
    """Give the module a forward with one positional argument per input: torch.export describes dimensions by argument."""
    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    forward.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    module.forward = forward


def _plain(module: Any, inputs: Sequence[Input], computed: bool = False) -> list[str]:
    """Let the module take its inputs by position and give tensors only; the list gets their names when it is traced.

    `computed`: positions 0, 1, ... and token types 0 are given to it, where it takes them.
    """
    original, names = module.forward, [i.name for i in inputs]
    accepted = inspect.signature(original).parameters
    found: list[str] = []

    def forward(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(names, args, strict=True))
        if computed:  # else they are cut from buffers, which would bound the length
            length = args[0].shape[1]
            made = {"position_ids": torch.arange(length).unsqueeze(0), "token_type_ids": torch.zeros_like(args[0])}
            given |= {n: t for n, t in made.items() if n in accepted}
        answers = original(**given, return_dict=True)
        found[:] = [n for n, value in answers.items() if isinstance(value, torch.Tensor)]
        return tuple(answers[n] for n in found)

    _signature(module, names, forward)
    return found


def _decoder(module: Any, config: Any) -> tuple[tuple[Input, ...], tuple[str, ...]]:
    """Give a causal language model the cache form; its inputs, and the names of its outputs."""
    from transformers.cache_utils import Cache, DynamicLayer

    class Layer(DynamicLayer):
        """Keys and values of one layer that were there before, of any length, none included."""

        def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
            super().__init__()
            self.keys, self.values = keys, values
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

        def get_seq_length(self) -> int:
            assert self.keys is not None
            return self.keys.shape[-2]

    count, heads, size = config.num_hidden_layers, _heads(config), _head_size(config)
    dims = (None, None, "past", None)
    inputs = [Input("input_ids", (1, 5), torch.int64, (None, "length"))]
    for index in range(count):
        inputs += [Input(f"past_{k}_{index}", (1, heads, 3, size), torch.float32, dims, True) for k in ("key", "value")]
    original = module.forward

    def forward(input_ids: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        held = [Layer(past[2 * i], past[2 * i + 1]) for i in range(count)]
        before = past[0].shape[2]
        position = torch.arange(before, before + input_ids.shape[1]).unsqueeze(0)  # (1, length)
        cache = Cache(layers=list(held))
        answers = original(input_ids=input_ids, past_key_values=cache, position_ids=position, use_cache=True)
        present: list[torch.Tensor] = []
        for layer in held:
            assert layer.keys is not None
            assert layer.values is not None
            present += [layer.keys, layer.values]
        return (answers.logits, *present)

    _signature(module, [i.name for i in inputs], forward)
    outputs = ("logits", *(f"present_{i.name.removeprefix('past_')}" for i in inputs[1:]))
    return tuple(inputs), outputs


def _heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No remarks of transformers on how it is used, which is not the user's doing."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# ---- the traced graph


def _fill(graph: GraphModule, given: Mapping[str, torch.Tensor]) -> None:
    """Put the files' tensors in the place of the parameters, in place. A tensor that is tied stands in the graph once."""
    known = set(given)
    first: dict[int, Node] = {}
    for node in [n for n in graph.graph.nodes if n.op == "get_attr" and n.target in known]:
        value = given[str(node.target)]
        if id(value) in first:
            node.replace_all_uses_with(first[id(value)])
            graph.graph.erase_node(node)
            continue
        first[id(value)] = node
        layers.set_tensor(graph, str(node.target), value)
    for node in first.values():
        if layers.read(graph, node).dtype != torch.float32 and layers.read(graph, node).is_floating_point():
            for user in list(node.users):
                _widen(graph, node, user)
    layers.drop_unused(graph)


def _widen(graph: GraphModule, node: Node, user: Node) -> None:
    """Convert to float32 where `user` reads a 16-bit parameter, or behind it when it only picks rows."""
    picks = user.target is torch.ops.aten.embedding.default
    with graph.graph.inserting_after(user) if picks else graph.graph.inserting_before(user):
        source = user if picks else node
        made = graph.graph.call_function(torch.ops.aten._to_copy.default, (source,), {"dtype": torch.float32})
    made.meta["val"] = source.meta.get("val")
    if picks:
        user.replace_all_uses_with(made, delete_user_cb=lambda n: n is not made)
    else:
        user.replace_input_with(node, made)


# ---- text and what else travels with the model


def _origin(folder: Path) -> dict[str, str]:
    """Content of the folder's COMPANIONS by name; one that is large or no text is left where it is."""
    found: dict[str, str] = {}
    for name in COMPANIONS:
        path = folder / name
        if path.is_file() and path.stat().st_size <= SMALL:
            with contextlib.suppress(UnicodeDecodeError):
                found[name] = path.read_text(encoding="utf-8")
    return found


def _text(folder: Path, config: Any) -> Text | None:
    """What turns text into tokens; None without a tokenizer.json, and for a model that takes no tokens."""
    path = folder / "tokenizer.json"
    if not path.is_file() or config.model_type in VISION:
        return None
    content = path.read_text(encoding="utf-8")
    window = getattr(config, "max_position_embeddings", None) or UNLIMITED
    if config.model_type in OWN_POSITIONS:  # positions count from behind the padding token
        window = int(window) - config.pad_token_id - 1
    causal = config.model_type in (*DECODERS, *STATE_SPACE)
    return Text(content, text.begin(content, folder), int(window), causal)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
