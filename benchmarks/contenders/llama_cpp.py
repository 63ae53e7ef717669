"""llama.cpp through its C API, with the GGUF file as shipped. Option `flash_attention`: on or off.

The Python class of llama-cpp-python would add its own copies of logits, so the C functions are called as
llama.cpp's own tools do. As in those tools, and unlike the bare C default, local layers keep only their window
(`swa_full=False`).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from benchmarks.contender import Contender

BATCH = 512
"""Tokens in one call, `n_batch`, and in one piece of work, `n_ubatch` (the latter is its default)."""

_CACHE_SIZE = re.compile(r"size =\s*([\d.]+) MiB \(\s*\d+ cells")


class LlamaCpp(Contender):
    """One context."""

    def prepare(self) -> None:
        from transom.zoo.architectures import packaged

        self.folder.mkdir(parents=True)
        (self.folder / "model.gguf").symlink_to(packaged("gemma3-270m"))

    def load(self) -> None:
        self._log: list[str] = []
        self._keep_log = llama_cpp.llama_log_callback(lambda level, text, data: self._log.append(text.decode()))
        llama_cpp.llama_log_set(self._keep_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        path = str(self.folder / "model.gguf").encode()
        model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = self.context, BATCH, BATCH
        settings.n_threads = settings.n_threads_batch = self.threads
        settings.flash_attn_type = int(self.options["flash_attention"])
        settings.swa_full = False
        self._llama = llama_cpp.llama_init_from_model(model, settings) if model else None
        if not self._llama:
            raise RuntimeError(f"llama.cpp cannot open {self.folder}: " + "".join(self._log[-5:]))
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        for index in range(BATCH):
            self._batch.n_seq_id[index], self._batch.seq_id[index][0] = 1, 0
        self._tokens, self._positions, self._has_logits = (
            np.ctypeslib.as_array(array, shape=(BATCH,))
            for array in (self._batch.token, self._batch.pos, self._batch.logits)
        )
        self._position = 0

    def describe(self) -> str:
        attention = "on" if self.options["flash_attention"] else "off"
        return (
            f"llama-cpp-python {llama_cpp.__version__}, GGUF Q4_K_M as shipped, caches float16 within the window "
            f"(swa_full off), flash attention {attention}, batches of {BATCH}"
        )

    def clear(self, room: int) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._llama), True)
        self._position = 0

    def run(self, ids: Sequence[int]) -> None:
        for low in range(0, len(ids), BATCH):
            part = ids[low : low + BATCH]
            self._step(part, outputs=1 if low + len(part) == len(ids) else 0)
        # Also waits for the result.
        llama_cpp.llama_get_logits(self._llama)

    def log_likelihoods(self, ids: Sequence[int]) -> list[float]:
        self.clear(len(ids))
        values: list[float] = []
        for low in range(0, len(ids), BATCH):
            part = ids[low : low + BATCH]
            self._step(part, outputs=len(part))
            pointer = llama_cpp.llama_get_logits(self._llama)
            logits: NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(len(part), self._vocab_size))
            for row, target in zip(logits, ids[low + 1 : low + 1 + len(part)], strict=False):
                top = row.max()
                total = np.exp(row - top).sum(dtype=np.float64)
                values.append(float(row[target] - top - np.log(total)))
        return values

    def cache_bytes(self) -> int | None:
        sizes = [float(size) for size in _CACHE_SIZE.findall("".join(self._log))]
        return round(sum(sizes) * 2**20) if sizes else None

    def _step(self, ids: Sequence[int], outputs: int) -> None:
        """One batch; logits of its last `outputs` tokens."""
        count: Any = len(ids)
        self._batch.n_tokens = count
        self._tokens[:count] = ids
        self._positions[:count] = np.arange(self._position, self._position + count)
        self._has_logits[:count] = np.arange(count) >= count - outputs
        if error := llama_cpp.llama_decode(self._llama, self._batch):
            raise RuntimeError(f"llama_decode gave {error} at position {self._position}")
        self._position += count


CONTENDER = LlamaCpp
