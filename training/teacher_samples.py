"""A teacher's samples of a text on disk, so that students can learn from them without the teacher.

A folder of safetensors files, each of some sequences: token ids int32 [n, T, U], and their counts uint16 or, where a
reading keeps probabilities, their shares float32. A file that is there is whole, so drawing goes on where it stopped.

Axes: N sequences, T tokens, U distinct tokens.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from transom.errors import TrainingError
from transom.training.divergence import Head, Sparse
from transom.training.state import digest
from transom.training.text import generator_at

CHUNK = 32
"""Sequences in a file."""

_IDENTITY = "samples.json"


class TeacherSamples:
    """Samples of every position of every sequence.

    Args:
        folder: Where; created if need be.
        teacher: Identity of its weights.
        sequences_NT: The text, int64.
        reading: Of `divergence.READINGS`.
        count: Draws a position.
        seed: Of the draws.

    Raises:
        TrainingError: If the folder holds samples of something else, or cannot be written.
    """

    def __init__(
        self, folder: Path, *, teacher: str, sequences_NT: torch.Tensor, reading: str, count: int, seed: int
    ) -> None:
        self._folder, self._sequences = folder, sequences_NT
        self._reading, self._count, self._seed = reading, count, seed
        identity = {
            "teacher": teacher,
            "text": digest(sequences_NT),
            "reading": reading,
            "samples": count,
            "seed": seed,
        }
        path = folder / _IDENTITY
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                if any(folder.iterdir()):
                    raise TrainingError(f"{folder} holds other files than a teacher's samples: choose another folder")
                path.write_text(json.dumps(identity, indent=1) + "\n")
            present = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise TrainingError(f"cannot keep a teacher's samples in {folder} ({error})") from error
        if present != identity:
            names = [name for name in identity if not isinstance(present, dict) or present.get(name) != identity[name]]
            raise TrainingError(
                f"{folder} holds samples of another {' and '.join(names)}: choose another folder, or remove it"
            )

    @property
    def missing(self) -> list[int]:
        """Files that are not there yet, by number."""
        return [file for file in range(-(-len(self._sequences) // CHUNK)) if not self._path(file).exists()]

    def draw(
        self,
        hidden: Callable[[torch.Tensor], torch.Tensor],
        head: Head,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Draw what is missing.

        Args:
            hidden: The teacher: tokens int64 [B, T] to its last hidden states [B, T, D].
            head: The teacher's.
            on_progress: Called with sequences (done, total).
        """
        for file in self.missing:
            low, high = file * CHUNK, min((file + 1) * CHUNK, len(self._sequences))
            parts = []
            for index in range(low, high):
                on_progress(index, len(self._sequences))
                with torch.no_grad():
                    states_TD = hidden(self._sequences[index][None])[0]
                    generator = generator_at(index, self._seed, states_TD.device)
                    parts.append(Sparse.draw(states_TD, head, self._count, generator, self._reading))
            self._write(file, parts)
        on_progress(len(self._sequences), len(self._sequences))

    def _write(self, file: int, parts: list[Sparse]) -> None:
        widest = max(part.ids.shape[1] for part in parts)
        ids, shares = (
            torch.stack([torch.nn.functional.pad(tensor, (0, widest - tensor.shape[1])) for tensor in tensors]).cpu()
            for tensors in zip(*((part.ids, part.shares) for part in parts), strict=True)
        )
        tensors = {"ids": ids.int()}
        if self._reading == "counts":
            tensors["counts"] = (shares * self._count).round().to(torch.uint16)
        else:
            tensors["shares"] = shares
        draft = self._folder / f".{uuid.uuid4().hex[:8]}"
        try:
            save_file(tensors, draft)
            os.replace(draft, self._path(file))
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"cannot write a teacher's samples to {self._folder} ({error})") from error
        finally:
            draft.unlink(missing_ok=True)

    def read(self, index: int) -> Sparse:
        """Samples of a sequence.

        Raises:
            TrainingError: If its file is missing or damaged.
        """
        file, place = divmod(index, CHUNK)
        try:
            with safe_open(self._path(file), framework="pt") as opened:
                ids = opened.get_slice("ids")[place].long()
                if self._reading == "counts":
                    shares = opened.get_slice("counts")[place].float() / self._count
                else:
                    shares = opened.get_slice("shares")[place]
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{self._path(file)} cannot be read ({error}): remove it to draw it again") from error
        return Sparse(ids=ids, shares=shares)

    def _path(self, file: int) -> Path:
        return self._folder / f"{file:06}.safetensors"
