"""Bundles made by hand, without torch: a classifier and a causal LM of a few numbers, as the contract wants them."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from molehill_edge import manifest as manifests
from molehill_edge import tensors as tensor_files
from molehill_protos.v1 import bundle_pb2 as pb

BASE = "ab" * 32
LABELS = ("bad", "good", "odd")
D, RANK, SLOTS = 16, 2, 4  # width; rank of an expert; the last slot is empty
WORDS = ("awful", "boring", "fine", "great", "lovely", "the", "film", "was", "and", "music", "plot", "very")


class Build:
    """A graph that grows by one node at a time."""

    def __init__(self) -> None:
        self.nodes, self.weights, self.inputs, self.outputs = [], {}, [], []
        self.external: dict[str, str] = {}

    def node(self, op, inputs, *, out=None, more=(), **attributes):
        name = out or f"{op}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name, *more], name=f"n{len(self.nodes)}", **attributes))
        return name

    def const(self, value, dtype=np.float32, name=None, file=None):
        name = name or f"c{len(self.weights)}"
        self.weights[name] = np.ascontiguousarray(np.asarray(value, dtype))
        if file:
            self.external[name] = file
        return name

    def input(self, name, kind, shape, default=None, file=None):
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        if default is not None:
            self.const(default, default.dtype, name, file)
        return name

    def output(self, name, kind, shape):
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def save(self, folder: Path, gate_metadata: dict[str, str]) -> None:
        """Write the graph and the files that its weights lie in."""
        places = {}
        for file, metadata in ((manifests.EXPERTS, {}), (manifests.GATE, gate_metadata)):
            tensors = {name: value for name, value in self.weights.items() if self.external.get(name) == file}
            tensors = {name: v.astype(np.uint8) if v.dtype == bool else v for name, v in tensors.items()}
            offsets = tensor_files.write(folder / file, tensors, metadata)
            places.update({name: (file, at, tensors[name].nbytes) for name, at in offsets.items()})
        initializers = []
        for name, value in self.weights.items():
            tensor = numpy_helper.from_array(value, name)
            if name in places:
                file, at, length = places[name]
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
                for key, entry in (("location", file), ("offset", str(at)), ("length", str(length))):
                    tensor.external_data.add(key=key, value=entry)
            initializers.append(tensor)
        graph = helper.make_graph(self.nodes, "tiny", self.inputs, self.outputs, initializers)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)], ir_version=10
        )
        (folder / manifests.GRAPH).write_bytes(model.SerializeToString())


def experts(rng, slots=SLOTS, d_out=D, scale=0.6):
    """A ``[d, R]`` and B ``[R, d_out]``; the last slot is zero."""
    a = rng.standard_normal((D, slots * RANK)).astype(np.float32)
    b = (scale * rng.standard_normal((slots * RANK, d_out))).astype(np.float32)
    a[:, -RANK:], b[-RANK:] = 0, 0
    return a, b


def molora(build, manifest, x, name, rng, *, slots=(0, 1, 2, 3)):
    """An adapted linear with a router of its own; returns its output."""
    index = len(manifest.routers)
    n = len(slots)
    manifest.routers.add(name=name, slots=slots)
    weight = rng.standard_normal((n, D)).astype(np.float32)
    gate = f"{name}/-/gate.weight"
    build.input(gate, TensorProto.FLOAT, weight.shape, weight, manifests.GATE)
    manifest.gate.add(name=gate, shape=weight.shape, router=index, expert_axis=0)
    scores = build.node("MatMul", [x, build.node("Transpose", [gate], perm=[1, 0])])
    begin = sum(len(router.slots) for router in manifest.routers[:-1])
    part = [build.const([begin], np.int64), build.const([begin + n], np.int64)]
    scores = build.node("Add", [scores, build.node("Slice", ["router_bias", *part])])
    allowed = build.node("Slice", ["expert_mask", *part])
    weights = build.node("Softmax", [build.node("Where", [allowed, scores, build.const(-1e9)])], axis=-1)
    build.node("Identity", [weights], out=f"route.{index}")
    build.output(f"route.{index}", TensorProto.FLOAT, ["batch", "sequence", n])
    a, b = experts(rng, n)
    a = build.const(a, name=f"{name}/A", file=manifests.EXPERTS)
    b = build.const(b, name=f"{name}/B", file=manifests.EXPERTS)
    manifest.sites.add(
        name=name, d_in=D, d_out=D, slots=slots, ranks=[RANK] * n, form=pb.GEMM_FP32, a=f"{name}/A", b=f"{name}/B"
    )
    spread = build.const(np.kron(np.eye(n), np.ones((1, RANK))))
    h = build.node("Mul", [build.node("MatMul", [x, a]), build.node("MatMul", [weights, spread])])
    frozen = build.node("MatMul", [x, build.const(0.3 * rng.standard_normal((D, D)))])
    return build.node("Add", [frozen, build.node("MatMul", [h, b])])


def _overrides(build, size):
    default = np.ones(size, bool)
    default[SLOTS - 1 :: SLOTS] = False
    build.input("router_bias", TensorProto.FLOAT, [size], np.zeros(size, np.float32))
    build.input("expert_mask", TensorProto.BOOL, [size], default)


def _start(kind) -> pb.Manifest:
    manifest = pb.Manifest(format=1, id=f"tiny-{kind}", version=1, base=pb.Base(id="tiny", digest=BASE))
    manifest.quantisation.CopyFrom(pb.Quantisation(base="fp32", head="fp32", experts="fp32"))
    for name in ("cats", "dogs", "newts", ""):
        manifest.slots.add(id=name)
    manifest.runtime.onnxruntime, manifest.runtime.opset = "1.20", 18
    manifest.provenance.gate = "global"
    return manifest


def _finish(folder, manifest, build, tokenizer):
    manifest.layout = manifests.layout_digest(manifest)
    (folder / "base.bin").write_bytes(b"")
    build.save(folder, gate_metadata(manifest, "global"))
    tokenizer.save(str(folder / manifests.TOKENIZER))
    sign(folder, manifest)
    return manifest


def gate_metadata(manifest, name):
    slots = json.dumps([slot.id for slot in manifest.slots])
    return {
        "format": "1", "kind": "gate", "name": name, "base": BASE, "layout": manifest.layout.hex(), "slots": slots
    }  # fmt: skip


def sign(folder: Path, manifest: pb.Manifest) -> None:
    """List the files of a folder in its manifest, and write it."""
    del manifest.files[:]
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != manifests.NAME:
            data = path.read_bytes()
            name = path.relative_to(folder).as_posix()
            manifest.files.add(path=name, length=len(data), sha256=hashlib.sha256(data).digest())
    (folder / manifests.NAME).write_bytes(manifest.SerializeToString(deterministic=True))


def write_gate(path: Path, manifest: pb.Manifest, *, seed=1, scale=1.0, **more) -> Path:
    """A gate file of random numbers."""
    rng = np.random.default_rng(seed)
    tensors = {t.name: (scale * rng.standard_normal(tuple(t.shape))).astype(np.float32) for t in manifest.gate}
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(safetensors.numpy.save({**tensors, **more}, gate_metadata(manifest, path.stem)))
    return path


def write_expert(path: Path, manifest: pb.Manifest, name="owls", *, seed=1, rank=RANK, base=BASE, drop=(), **more):
    """An expert file of random numbers."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for site in manifest.sites:
        tensors[f"{site.name}/A"] = rng.standard_normal((rank, site.d_in)).astype(np.float32)
        tensors[f"{site.name}/B"] = rng.standard_normal((site.d_out, rank)).astype(np.float32)
    for tensor in manifest.gate:
        if tensor.expert_axis >= 0:
            tensors[tensor.name] = rng.standard_normal(tuple(tensor.shape)[1:]).astype(np.float32)
    tensors = {key: value for key, value in {**tensors, **more}.items() if key not in drop}
    path.write_bytes(safetensors.numpy.save(tensors, {"format": "1", "kind": "expert", "id": name, "base": base}))
    return path


def words_tokenizer() -> Tokenizer:
    """One token a word, between [CLS] and [SEP], as BERT has it."""
    vocabulary = {token: i for i, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.enable_padding(length=64)  # as files of real models have it
    tokenizer.enable_truncation(4)
    return tokenizer


def pieces_tokenizer() -> Tokenizer:
    """Words and pieces of them, as BERT has it to the letter."""
    pieces = (
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *WORDS,
        *"abcdefghijklmnopqrstuvwxyz",
        "##s",
        "##ly",
        "##ing",
        "!",
        ",",
    )
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    return tokenizer


def classifier(
    folder: Path, *, seed=0, max_length=12, gates=("ann", "bob"), routed=True, tokenizer=None, version=1
) -> pb.Manifest:
    """Embeddings, two adapted linears (or none), the mean of real tokens, a head of the owner's."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tokenizer = tokenizer or words_tokenizer()
    manifest, build = _start("classifier"), Build()
    manifest.version = version
    manifest.task.CopyFrom(pb.Task(kind="classification", labels=LABELS, pooling="mean", max_length=max_length))
    build.input("input_ids", TensorProto.INT64, ["batch", "sequence"])
    build.input("attention_mask", TensorProto.INT64, ["batch", "sequence"])
    if routed:
        _overrides(build, 2 * SLOTS)
    x = build.node("Gather", [build.const(rng.standard_normal((tokenizer.get_vocab_size(), D))), "input_ids"])
    for name in ("layers.0.up", "layers.1.up") if routed else ():
        x = build.node("Add", [x, build.node("Tanh", [molora(build, manifest, x, name, rng)])])
    real = build.node("Unsqueeze", [build.node("Cast", ["attention_mask"], to=1), build.const([2], np.int64)])
    axis = build.const([1], np.int64)
    total = build.node("ReduceSum", [build.node("Mul", [x, real]), axis], keepdims=0)
    pooled = build.node("Div", [total, build.node("ReduceSum", [real, axis], keepdims=0)])
    head = (0.3 * rng.standard_normal((len(LABELS), D))).astype(np.float32)
    build.input("head/-/head.weight", TensorProto.FLOAT, head.shape, head, manifests.GATE)
    manifest.gate.add(name="head/-/head.weight", shape=head.shape, router=-1, expert_axis=-1)
    build.node("MatMul", [pooled, build.node("Transpose", ["head/-/head.weight"], perm=[1, 0])], out="logits")
    build.output("logits", TensorProto.FLOAT, ["batch", len(LABELS)])
    _finish(folder, manifest, build, tokenizer)
    for i, name in enumerate(gates):
        write_gate(folder / "gates" / f"{name}.safetensors", manifest, seed=10 + i)
    sign(folder, manifest)
    return manifest


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def bytes_tokenizer() -> Tokenizer:
    """One token a byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    return tokenizer


def causal(
    folder: Path, *, seed=0, max_length=256, template="", says: str | None = None, layers=2, shared=False
) -> pb.Manifest:
    """Embeddings, layers of one-headed attention with a cache and an adapted linear each, and an output head.

    Args:
        folder: Of the bundle.
        seed: Of its weights.
        max_length: Tokens that it takes.
        template: A chat template; Alpaca's format when empty.
        says: When given, the model reads nothing and says these bytes over and over: after each byte comes the one
            that follows it in the text, so that no byte may be in it twice. After the last comes ``<|im_end|>``.
        layers: With attention.
        shared: Use the operator whose past and present may be one buffer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tokenizer = bytes_tokenizer()
    vocabulary = tokenizer.get_vocab_size()
    end = tokenizer.token_to_id("<|im_end|>")
    manifest, build = _start("causal"), Build()
    generation = pb.Generation(
        eos=[end], pad=tokenizer.token_to_id("<|endoftext|>"), template=bool(template), chat_template=template,
        eos_token="<|im_end|>", layers=layers, heads=1, head_dim=D, vocabulary=vocabulary,
        shared_buffer=shared,
    )  # fmt: skip
    manifest.task.CopyFrom(pb.Task(kind="causal-lm", max_length=max_length, generation=generation))
    build.input("input_ids", TensorProto.INT64, ["batch", "sequence"])
    build.input("attention_mask", TensorProto.INT64, ["batch", "total"])
    _overrides(build, layers * SLOTS)
    x = build.node("Gather", [build.const(rng.standard_normal((vocabulary, D))), "input_ids"])
    heads = build.const([1], np.int64)
    flip = {"perm": [0, 1, 3, 2]}
    for i in range(layers):
        parts = {}
        for part in ("query", "key", "value"):
            parts[part] = build.node("MatMul", [x, build.const(rng.standard_normal((D, D)) / 4)])
        if shared:
            x = build.node("Add", [x, _grouped(build, parts, i)])
            x = build.node("Add", [x, build.node("Tanh", [molora(build, manifest, x, f"layers.{i}.up", rng)])])
            continue
        parts = {part: build.node("Unsqueeze", [y, heads]) for part, y in parts.items()}  # [batch, 1, sequence, D]
        for part in ("key", "value"):
            past = f"past_key_values.{i}.{part}"
            build.input(past, TensorProto.FLOAT, ["batch", 1, "past", D])
            parts[part] = build.node("Concat", [past, parts[part]], out=f"present.{i}.{part}", axis=2)
            build.output(f"present.{i}.{part}", TensorProto.FLOAT, ["batch", 1, "total", D])
        scale = build.node("Mul", [parts["query"], build.const(D**-0.5)])
        scores = build.node("MatMul", [scale, build.node("Transpose", [parts["key"]], **flip)])
        scores = build.node("Add", [scores, _causal_mask(build, x)])
        mixed = build.node("MatMul", [build.node("Softmax", [scores], axis=-1), parts["value"]])
        x = build.node("Add", [x, build.node("Squeeze", [mixed, heads])])
        x = build.node("Add", [x, build.node("Tanh", [molora(build, manifest, x, f"layers.{i}.up", rng)])])
    logits = build.node("MatMul", [x, build.const(rng.standard_normal((D, vocabulary)))])
    if says is not None:
        table = np.zeros((vocabulary, vocabulary))
        order = [*tokenizer.encode(says, add_special_tokens=False).ids, end]
        assert len(set(order)) == len(order)
        table[:, order[0]] = 500
        for before, after in itertools.pairwise(order):
            table[before] = 0
            table[before, after] = 500
        logits = build.node("Add", [logits, build.node("Gather", [build.const(table), "input_ids"])])
    build.node("Identity", [logits], out="logits")
    build.output("logits", TensorProto.FLOAT, ["batch", "sequence", vocabulary])
    return _finish(folder, manifest, build, tokenizer)


def _grouped(build, parts, layer):
    """Attention with a cache of any length, of which only the first tokens count."""
    past = [
        build.input(f"past_key_values.{layer}.{part}", TensorProto.FLOAT, ["batch", 1, "past", D])
        for part in ("key", "value")
    ]
    one = build.const([1], np.int64)
    last = build.node("Sub", [build.node("ReduceSum", ["attention_mask", one], keepdims=0), one])
    total = build.node("Gather", [build.node("Shape", ["attention_mask"]), build.const(1, np.int64)])
    lengths = [build.node("Cast", [name], to=TensorProto.INT32) for name in (last, total)]
    present = [f"present.{layer}.{part}" for part in ("key", "value")]
    for name in present:
        build.output(name, TensorProto.FLOAT, ["batch", 1, "total", D])
    inputs = [parts["query"], parts["key"], parts["value"], *past, *lengths]
    return build.node("GroupQueryAttention", inputs, more=present, domain="com.microsoft", num_heads=1, kv_num_heads=1)


def _causal_mask(build, x):
    """0 where a token may look, ``[sequence, total]``."""
    zero, one = build.const(0, np.int64), build.const(1, np.int64)
    new = build.node("Gather", [build.node("Shape", [x]), one])
    total = build.node("Gather", [build.node("Shape", ["attention_mask"]), one])
    past = build.node("Sub", [total, new])
    rows = build.node("Unsqueeze", [build.node("Range", [past, total, one]), build.const([1], np.int64)])
    allowed = build.node("LessOrEqual", [build.node("Range", [zero, total, one]), rows])
    return build.node("Where", [allowed, build.const(0.0), build.const(-1e9)])
