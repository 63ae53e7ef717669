"""The real Gemma 3 270M, against Hugging Face's implementation with the same float32 weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

import transom
from tests.artifacts import THREADS
from tests.tolerances import BFLOAT16_270M, FP32_LOGITS_270M, ONNX_LOGITS_270M
from transom.backends.onnxruntime.runtime import OnnxRuntime
from transom.backends.reference.session import ReferenceSession
from transom.backends.session import Session
from transom.backends.tensorrt.builder import build_engine
from transom.backends.tensorrt.library import find_library
from transom.errors import TargetError
from transom.formats.number_format import float_format
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.passes.pipelines import pipeline
from transom.zoo.model import Model

pytestmark = pytest.mark.real

TEXT = Path(__file__).parent / "data" / "text.txt"
LENGTH, STAGE_LENGTH, CHUNK, WINDOW = 1200, 560, 256, 512
"""What a stage of the passes reads is past the window, and in no ring's second turn: that is what artifacts read."""
NEW_TOKENS = 64
LONG = 3600
FAR = sorted({*range(99, LONG, 100), 510, 511, 512, 513, 1023, 1024})
"""Positions of a long text whose logits are compared."""

ROWS = 64
"""Positions whose logits are compared at a time."""


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ids(real: Model) -> list[int]:
    assert real.tokenizer is not None
    tokens = real.tokenizer.encode(TEXT.read_text())
    assert len(tokens) >= LENGTH
    return tokens[:LENGTH]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theirs:
    """What Hugging Face's module says. Its logits stand in files, as the module and they would take gigabytes.

    Attributes:
        logits: File of the logits of every position of the text, float32 [T, V].
        text: Their greedy continuation of it.
        far: File of the logits at `FAR` of the text three times over.
        vocab_size: Length of a row.
    """

    logits: Path
    text: list[int]
    far: Path
    vocab_size: int

    def rows(self, start: int, stop: int, *, far: bool = False) -> NDArray[np.float32]:
        """Some rows of a file."""
        width, path = self.vocab_size, self.far if far else self.logits
        flat = np.fromfile(path, np.float32, count=(stop - start) * width, offset=4 * start * width)
        return flat.reshape(stop - start, width)


@pytest.fixture(scope="module")
def theirs(real: Model, ids: list[int], tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    """Hugging Face's module with our weights, each text in one forward without any cache."""
    # Eight rows at first: the table of 262,144 is ours, and drawing one at random takes a while.
    config = transformers.Gemma3TextConfig(
        vocab_size=8, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=512, max_position_embeddings=32_768,
        query_pre_attn_scalar=256, attn_implementation="eager",
    )  # fmt: skip
    module: Any = transformers.Gemma3ForCausalLM(config)
    state = {f"model.{name}": weight.read() for name, weight in real.weights.items()}
    table = torch.nn.Parameter(state.pop("model.embed_tokens.weight"))
    module.model.embed_tokens.weight = module.lm_head.weight = table
    module.config.vocab_size = len(table)
    keys = module.load_state_dict(state, assign=True, strict=False)
    assert keys.unexpected_keys == []
    assert set(keys.missing_keys) == {"model.embed_tokens.weight", "lm_head.weight"}
    module.eval().requires_grad_(False)
    folder = tmp_path_factory.mktemp("theirs")

    def write(name: str, tokens: list[int], positions: Sequence[int]) -> Path:
        states_TD = module.model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
        with (folder / name).open("wb") as file:
            for part in states_TD[list(positions)].split(ROWS):
                module.lm_head(part).numpy().tofile(file)
        return folder / name

    with torch.no_grad():
        continued = module.generate(
            torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return Theirs(
            logits=write("logits", ids, range(len(ids))),
            text=continued[0, len(ids) :].tolist(),
            far=write("far", (ids * 3)[:LONG], FAR),
            vocab_size=len(table),
        )


def parts(
    logits: Iterable[NDArray[np.float32]], theirs: Theirs
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Our logits of a text from its start, in chunks, and theirs, a few rows at a time: all at once take gigabytes."""
    low = 0
    for chunk in logits:
        for start in range(0, len(chunk), ROWS):
            ours = chunk[start : start + ROWS]
            yield ours, theirs.rows(low + start, low + start + len(ours))
        low += len(chunk)


def furthest(logits: Iterable[NDArray[np.float32]], theirs: Theirs) -> float:
    """Largest difference from their logits over all positions of a text; NaN if one is."""
    return float(np.max([np.abs(ours - expected).max() for ours, expected in parts(logits, theirs)]))


def feed(session: Session, ids: list[int]) -> Iterator[NDArray[np.float32]]:
    """Our logits of a text, a chunk at a time."""
    session.reset()
    yield from session.feed(ids, wanted="all")
    assert session.position == len(ids)


@pytest.fixture(scope="module")
def traced_270m(real: Model) -> Graph:
    return real.trace()


def test_the_plain_module(real: Model, theirs: Theirs, ids: list[int]) -> None:
    """All positions at once, as the model file writes it."""
    assert real.parameters == 268_098_176
    with torch.no_grad():
        logits_BTV, _ = real.eager()(torch.tensor([ids[:STAGE_LENGTH]]), torch.tensor(0), None)
    assert furthest([logits_BTV[0].numpy()], theirs) < FP32_LOGITS_270M


@pytest.mark.slow
def test_every_stage_of_the_passes(traced_270m: Graph, theirs: Theirs, ids: list[int]) -> None:
    """A divergence is found at the pass that made it. A pass that changed nothing left the same graph."""
    differences: dict[str, float] = {}
    digests: set[tuple[str, ...]] = set()

    def measure(name: str, graph: Graph) -> None:
        if graph.digest() in digests:
            return
        digests.add(graph.digest())
        session = ReferenceSession(graph, context=1024, chunk=CHUNK)
        differences[name] = furthest(feed(session, ids[:STAGE_LENGTH]), theirs)

    measure("as traced", traced_270m)
    pipeline("onnxruntime", chunk=CHUNK, scheme=scheme("none")).run(
        traced_270m, on_pass=lambda ran, graph: measure(ran.name, graph)
    )
    assert {name: worst for name, worst in differences.items() if not worst < ONNX_LOGITS_270M} == {}


@pytest.mark.parametrize(
    "quant",
    ["none", *(pytest.param(quant, marks=pytest.mark.large) for quant in ("int4_block32_bf16", "fp8_channel"))],
)
def test_a_tensorrt_engine(quant: str, real: Model, theirs: Theirs, ids: list[int], tmp_path: Path) -> None:
    """Compiled for two generations of GPUs without one; unquantised, the file's numbers are theirs in bfloat16."""
    transom.compile(real, target="tensorrt", quant=quant, chunk=CHUNK, out=tmp_path / "model")
    if quant == "none":
        session = transom.open(tmp_path / "model", threads=THREADS)
        shares, agree = [], []
        for ours, expected in parts(feed(session, ids), theirs):
            shares += list(np.abs(ours - expected).max(-1) / np.abs(expected).max(-1))
            agree += list(ours.argmax(-1) == expected.argmax(-1))
        assert np.median(shares) < BFLOAT16_270M and np.mean(np.array(shares) > 10 * BFLOAT16_270M) < 0.005
        assert np.mean(agree) > 0.95
        del session  # its weights, before an engine is built
    try:
        library = find_library(rtx=True)
    except TargetError as error:
        pytest.skip(str(error))
    record = build_engine(tmp_path / "model", library, compute=[89, 120])
    data = (tmp_path / "model" / "model.onnx.data").stat().st_size
    assert data < record.bytes < 1.15 * data, "one copy of the weights"


@pytest.mark.slow
def test_3000_tokens_decoded_past_the_window(real: Model, theirs: Theirs, ids: list[int], tmp_path: Path) -> None:
    """One token a call through wrapped caches."""
    transom.compile(real, target="onnxruntime", quant="none", chunk=1, context=4096, out=tmp_path / "long")
    session, tokens, low = transom.open(tmp_path / "long", threads=THREADS), (ids * 3)[:LONG], 0
    for row, position in enumerate(FAR):
        # The chunk is one token: so many calls, of which only the last wants logits.
        logits, low = session.prefill(tokens[low : position + 1]), position + 1
        (expected,) = theirs.rows(row, row + 1, far=True)
        assert np.abs(logits - expected).max() < ONNX_LOGITS_270M, position
    assert session.position == LONG


@pytest.mark.large
def test_the_residual_stream_leaves_float16(real: Model) -> None:
    """From layer 7 on, and nothing but it; the largest numbers come early in a text."""
    ranges = transom.ranges(real, tokens=64)
    over = {value.name: value.observation.largest for value in ranges.overflowing(float_format("float16"))}
    expected = {f"layers.{layer}.add{step}" for layer in range(8, 18) for step in ("", ".2")}
    assert set(over) == {"layers.7.add.2", *expected}
    assert 1.0e5 < max(over.values()) < 1.1e5


@pytest.fixture(scope="module", params=["onnxruntime", "onnx", "xla", "tvm"])
def session_270m(request: pytest.FixtureRequest, real: Model, tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("real") / request.param
    transom.compile(real, target=request.param, quant="none", chunk=CHUNK, out=folder)
    return transom.open(folder, threads=THREADS)


def test_every_position_of_a_text(session_270m: Session, theirs: Theirs, ids: list[int]) -> None:
    assert furthest(feed(session_270m, ids), theirs) < ONNX_LOGITS_270M


def test_the_greedy_text_is_theirs(session_270m: Session, theirs: Theirs, ids: list[int]) -> None:
    assert list(session_270m.generate(ids, max_new_tokens=NEW_TOKENS, stop_ids=())) == theirs.text


def test_golden_logits(session_270m: Session) -> None:
    """Of the float32 weights in the packaged file; see also llama.cpp's, which rounds activations."""
    assert session_270m.tokenizer is not None
    assert session_270m.tokenizer.encode("The capital of France is") == [2, 818, 5279, 529, 7001, 563]
    session_270m.reset()
    logits = session_270m.prefill([2, 818, 5279, 529, 7001, 563])
    best: NDArray[np.int64] = np.argsort(-logits)[:3]
    assert best.tolist() == [506, 496, 9079]
    assert np.abs(logits[best] - [19.09, 18.55, 18.27]).max() < 0.01


def test_cache_bytes_at_32k(session_270m: Session) -> None:
    """2 * K * H * 4 * (G * T + (L - G) * W), and the slack of a chunk where local layers write before they attend."""
    session_270m.reserve(32_768)
    sizes, row = session_270m.cache_bytes(), 2 * 256 * 4
    slack = CHUNK - 1 if isinstance(session_270m.runtime, OnnxRuntime) else 0
    assert sizes == {"local": row * 15 * (WINDOW + slack), "global": row * 3 * 32_768}
    textbook, all_global = row * (3 * 32_768 + 15 * WINDOW), row * 18 * 32_768
    assert abs(sum(sizes.values()) / textbook - 1) < 0.15
    assert sum(sizes.values()) < 0.2 * all_global
