"""From a name or a path to a model: configuration, weights that are read on demand, tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from transom.errors import CheckpointError, ConfigError, TokenizerError
from transom.graphs.graph import Graph
from transom.graphs.trace import DECODE, trace
from transom.graphs.weight import Weight
from transom.json_object import is_file
from transom.wording import shortened
from transom.zoo.architectures import architecture, build_empty, preset, presets, tensor_shapes
from transom.zoo.checkpoints import codes, gguf, layout, safetensors
from transom.zoo.checkpoints.adapter import read_adapter
from transom.zoo.checkpoints.checkpoint import refuse_differences
from transom.zoo.checkpoints.gguf_config import read_metadata
from transom.zoo.checkpoints.gguf_header import Header, read_header
from transom.zoo.checkpoints.gguf_mmproj import open_mmproj, read_mmproj
from transom.zoo.checkpoints.gguf_tokenizer import unread_lines
from transom.zoo.checkpoints.random import random_weights
from transom.zoo.config import DecoderConfig
from transom.zoo.generation import Generation
from transom.zoo.huggingface import left_out, read_config
from transom.zoo.layers import Decoder
from transom.zoo.rope import Rope, RopeScaling
from transom.zoo.tokenizer import TOKENIZER, Tokenizer

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model that is ready to be traced, exported or run eagerly.

    Attributes:
        config: What it is.
        weights: By the names of the module's state dict; nothing is in memory until read.
        tokenizer: None if the source has none.
        source: Where it came from: a path, a hub id or "random".
        revision: Identity of the weights: a hash, or the seed.
        mmproj: The file that its encoder of images came from, if that is another one than its source.
        adapter: The folder of an adapter that is in its weights.
        rope_scaling: By what its positions are stretched past the context that it was made for, such as "yarn:4".
        quant: Scheme of the codes that stand beside its checkpoint; "none" if there are none.
        generation: How its source says that text is generated.
        left_out: In plain words, what the source holds beside the model, such as a vision tower, what it asks for that
            is not done, and how the tokenizer's ids and the rows of the embedding differ.
    """

    config: DecoderConfig
    weights: Mapping[str, Weight]
    tokenizer: Tokenizer | None
    source: str
    revision: str
    mmproj: str | None = None
    adapter: str | None = None
    rope_scaling: str | None = None
    quant: str = "none"
    generation: Generation = dataclasses.field(default_factory=Generation)
    left_out: tuple[str, ...] = ()
    _traces: dict[tuple[str, torch.dtype], Graph] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def parameters(self) -> int:
        """How many numbers the weights hold."""
        return sum(math.prod(weight.shape) for weight in self.weights.values())

    def text(self) -> Model:
        """The text decoder alone; itself, if it sees no images."""
        if self.config.text is self.config:
            return self
        names = tensor_shapes(self.config.text)
        weights = {name: self.weights[name] for name in names}
        return dataclasses.replace(self, config=self.config.text, weights=weights)

    def adapted(self, folder: Path) -> Model:
        """The model with an adapter of low rank, in peft's format, in its weights.

        Raises:
            CheckpointError: If the adapter is damaged, of a kind that is not merged, or none of this model.
        """
        shapes = {name: weight.shape for name, weight in self.weights.items()}
        adapter = read_adapter(folder, shapes)
        return dataclasses.replace(
            self,
            weights=adapter.merged(self.weights),
            revision=f"{self.revision} + {adapter.revision}",
            adapter=str(folder),
        )

    def scaled(self, rope_scaling: str) -> Model:
        """The model for a longer context, its global layers' positions stretched.

        Args:
            rope_scaling: "linear:8", "llama3:8", "yarn:4" and the like.

        Raises:
            ConfigError: If that is none, the model's positions are scaled already, or no global layer has any.
        """
        scaling, old = RopeScaling.read(rope_scaling), self.config
        config = old.scaled(scaling)
        local = any(layer.kind == "local" for layer in config.layers)
        own = any(isinstance(rope, Rope) for name, rope in vars(config).items() if name not in config.SCALED)
        others = "local layers keep theirs" if own else "local layers share them"
        line = (
            f"rope scaling {scaling}: {config.name} was made for {old.context:,} tokens; positions beyond are reached "
            f"by stretching those of global layers{f', {others}' if local else ''}. How good it is there is not "
            "proved, nor that it stays as good before: transom evaluate tells its loss by position"
        )
        return dataclasses.replace(self, config=config, rope_scaling=str(scaling), left_out=(*self.left_out, line))

    def eager(self, dtype: torch.dtype = torch.float32) -> Decoder:
        """The plain PyTorch module with all weights in memory, for inference."""
        module = build_empty(self.config)
        state = {name: weight.to(dtype).read() for name, weight in self.weights.items()}
        module.load_state_dict(state, assign=True)
        return module.eval().requires_grad_(False)

    def trace(self, *, task: str = DECODE, dtype: torch.dtype = torch.float32) -> Graph:
        """The model as a graph, traced when it is first asked for; see `graphs.trace.trace`.

        All callers get the same graph, which pipelines leave as it is: clone it before editing it.

        Raises:
            TraceError: If the module cannot be exported.
        """
        if (task, dtype) not in self._traces:
            build = architecture(self.config.architecture).build
            self._traces[task, dtype] = trace(
                functools.partial(build, self.config),
                self.weights,
                states=self.config.states,
                inputs=self.config.inputs,
                encoders=self.config.encoders,
                context=self.config.context,
                task=task,
                dtype=dtype,
            )
        return self._traces[task, dtype]


def load(
    name_or_path: str | Path,
    *,
    weights: Literal["checkpoint", "random"] = "checkpoint",
    seed: int = 0,
    images: bool = False,
    mmproj: str | Path | None = None,
    adapter: str | Path | None = None,
    rope_scaling: str | None = None,
) -> Model:
    """Open a model. Only headers, hashes and the tokenizer are read; weights follow on demand.

    Whoever reads rows of a checkpoint that are NaN or infinite meets a `CheckpointError` that names them.

    Args:
        name_or_path: A preset's name, a Hugging Face folder, a .gguf file, or "org/name" on the Hugging Face hub.
            Some presets have their weights in a package that an extra installs. Tiny presets were never trained: they
            always have random weights, and a tokenizer of bytes.
        weights: "random" takes the configuration (and tokenizer) of `name_or_path`, and draws weights.
        seed: Of random weights.
        images: Whether to open the encoder of images too, if there is one.
        mmproj: A GGUF file of the encoder of images, which belongs to the .gguf file; implies `images`.
        adapter: Folder of an adapter of low rank, in peft's format, to merge into the weights.
        rope_scaling: As `Model.scaled` takes it.

    Raises:
        ConfigError: If there is no such model, or it is one that the zoo does not hold, or `mmproj` does not belong to
            it, or its positions cannot be scaled so.
        CheckpointError: If its weights are missing or damaged, or cannot be downloaded, or `adapter` is none of it.
        TokenizerError: If its tokenizer is malformed.
    """
    if rope_scaling is not None:
        # What can be refused at once should not wait for the weights.
        RopeScaling.read(rope_scaling)
        plain = load(name_or_path, weights=weights, seed=seed, images=images, mmproj=mmproj, adapter=adapter)
        return plain.scaled(rope_scaling)
    if adapter is not None:
        return load(name_or_path, weights=weights, seed=seed, images=images, mmproj=mmproj).adapted(Path(adapter))
    # Of what is refused below, no weights are fetched.
    fetched = ["*.safetensors"] if weights == "checkpoint" and mmproj is None else []
    patterns = ["*.json", "*.jinja", "tokenizer.model", *fetched]
    config, source = _locate(name_or_path, patterns, images=images)
    encoder = None
    if mmproj is not None:
        config, encoder = _with_encoder(source, name_or_path, mmproj)
    named = presets()[config.name] if source is None else None
    encoder_missing: tuple[str, ...] = ()
    if config.images is not None and isinstance(source, Path) and weights == "checkpoint":
        if not layout.holds_encoder(safetensors.tensor_names(source)):
            config, images = config.text, False
            encoder_missing = ("images: config.json describes their encoder, and the checkpoint holds no tensor of it",)
    if named is not None and named.packaged is not None and weights == "checkpoint":
        source = read_header(named.packaged())
    tokenizer, generation = _tokenizer(config, source), _generation(config, source)
    if tokenizer is not None:
        stop_ids = tuple(sorted({*generation.stop_ids, *tokenizer.stop_ids}))
        generation = dataclasses.replace(generation, stop_ids=stop_ids)
    beside = (
        *encoder_missing,
        *(unread_lines(source) if isinstance(source, Header) else ()),
        *generation.left_out,
        *(tokenizer.left_out if tokenizer else ()),
        *_vocabulary_lines(config, tokenizer),
    )
    if weights == "random" or (named is not None and named.hub is None):
        return Model(
            config=config,
            weights=random_weights(config, seed),
            tokenizer=tokenizer,
            source="random",
            revision=f"seed {seed}",
            generation=generation,
            left_out=beside,
        )
    if source is None:
        assert named is not None
        raise CheckpointError(
            f"{config.name} comes without weights: give a checkpoint folder, a .gguf file or a hub id such as "
            f"{named.hub}, or ask for random weights (--weights random)"
        )
    if isinstance(source, Path):
        opened, revision = safetensors.open_safetensors(source, config), safetensors.revision(source)
        opened_weights, quant = codes.attach(source, _checked(opened.weights))
        beside = (*left_out(source, images=images), *beside)
    else:
        _, opened = gguf.open_gguf(source) if encoder is None else open_mmproj(encoder, source)
        revision = " + ".join(gguf.revision(file) for file in (source, encoder) if file is not None)
        opened_weights, quant = _checked(opened.weights), "none"
    return Model(
        config=config,
        weights=refuse_differences(opened_weights, opened.copies),
        tokenizer=tokenizer,
        source=str(name_or_path),
        revision=revision,
        mmproj=None if mmproj is None else str(mmproj),
        quant=quant,
        generation=generation,
        left_out=(*opened.left_out, *beside),
    )


def _checked(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    return {name: weight.refuse_nonfinite() for name, weight in weights.items()}


def resolve_config(name_or_path: str | Path, *, mmproj: str | Path | None = None) -> DecoderConfig:
    """The configuration of anything that `load` takes, without its weights.

    Raises:
        ConfigError: If there is no such model, or it is one that the zoo does not hold, or `mmproj` does not belong to
            it.
        CheckpointError: If the file is damaged or cannot be downloaded.
    """
    config, source = _locate(name_or_path, patterns=["config.json"], images=True)
    return config if mmproj is None else _with_encoder(source, name_or_path, mmproj)[0]


def _with_encoder(source: Path | Header | None, name: str | Path, mmproj: str | Path) -> tuple[DecoderConfig, Header]:
    """The configuration of a .gguf file with its mmproj file's, and the head of that."""
    if not isinstance(source, Header):
        raise ConfigError(
            f"{mmproj}: an mmproj file belongs to a .gguf file of the text decoder, and "
            f"{shortened(str(name))} is none: give that file, or leave the mmproj file out"
        )
    encoder = read_header(Path(mmproj))
    return read_mmproj(encoder, source)[0], encoder


def _locate(
    name_or_path: str | Path, patterns: list[str], *, images: bool
) -> tuple[DecoderConfig, Path | Header | None]:
    """Configuration, and the folder or the head of the GGUF file that holds the weights; None for a preset."""
    if str(name_or_path) in presets():
        config = preset(str(name_or_path))
        return config if images else config.text, None
    path = Path(name_or_path)
    try:
        is_folder = path.is_dir()
    except OSError as error:
        raise ConfigError(f"cannot look at {shortened(str(path))} ({error.strerror}): give another name") from error
    if is_folder:
        return read_config(path, images=images), path
    if path.is_file() or path.suffix == ".gguf":
        header = read_header(path)
        return read_metadata(header)[0], header
    if isinstance(name_or_path, str) and _HUB_ID.fullmatch(name_or_path):
        folder = _download(name_or_path, patterns)
        return dataclasses.replace(read_config(folder, images=images), name=name_or_path.split("/")[1]), folder
    return preset(str(name_or_path)), None


def _tokenizer(config: DecoderConfig, source: Path | Header | None) -> Tokenizer | None:
    if source is None:
        if presets()[config.name].hub is not None:
            return None
        # A model that was never trained knows no words.
        tokenizer = Tokenizer.of_bytes(config.vocab_size)
    elif isinstance(source, Header):
        if unread_lines(source):
            return None
        tokenizer = Tokenizer.from_gguf(source)
    elif any(is_file(source / name, TokenizerError) for name in (TOKENIZER, "tokenizer.model")):
        tokenizer = Tokenizer.from_folder(source)
    else:
        return None
    if tokenizer.config.template is None:
        template = architecture(config.architecture).chat
        tokenizer.config = dataclasses.replace(tokenizer.config, template=template)
    return tokenizer


def _generation(config: DecoderConfig, source: Path | Header | None) -> Generation:
    sampling = architecture(config.architecture).sampling
    if source is None:
        return Generation(sampling=sampling)
    if isinstance(source, Header):
        return Generation.from_gguf(source.path, source.metadata, sampling)
    return Generation.from_folder(source, sampling)


def _vocabulary_lines(config: DecoderConfig, tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """In plain words, how a tokenizer's ids and the rows of the embedding differ, if they do."""
    if tokenizer is None:
        return ()
    rows = config.vocab_size
    if tokenizer.largest_id >= rows:
        return (
            f"the tokenizer has ids up to {tokenizer.largest_id}, the embedding {rows} rows: "
            f"texts that become ids from {rows} on cannot be run",
        )
    if tokenizer.vocab_size < rows:
        return (f"the tokenizer names {tokenizer.vocab_size} of {rows} rows of the embedding: the others have no text",)
    return ()


def _download(hub_id: str, patterns: list[str]) -> Path:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise CheckpointError(f"fetching {hub_id} needs huggingface_hub: pip install 'transom[hub]'") from None
    try:
        return Path(hub.snapshot_download(hub_id, allow_patterns=patterns))
    # Its errors come from three HTTP libraries and share no base class.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"cannot fetch {hub_id} from the Hugging Face hub ({reason}): check the name, the network and "
            "`hf auth login`, or give a local folder"
        ) from error
