"""Hugging Face transformers, eager PyTorch in float32. Option `attention`: "sdpa", its default, or "eager"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers

from benchmarks.contender import Contender

ROWS = 256
"""Positions whose logits are computed at once for the perplexity."""


class TransformersEager(Contender):
    """`Gemma3ForCausalLM` with its own cache."""

    def prepare(self) -> None:
        import transom
        from transom.zoo.checkpoints.random import write_checkpoint

        model = transom.load(self.model)
        write_checkpoint(self.folder, model.config, model.weights, dtype=torch.float32)

    def load(self) -> None:
        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(False)
        transformers.utils.logging.disable_progress_bar()
        self._model = transformers.Gemma3ForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation=self.options["attention"], local_files_only=True
        ).eval()

    def describe(self) -> str:
        return (
            f"transformers {transformers.__version__} on torch {torch.__version__}, float32, "
            f"attention {self.options['attention']}, whole prompt at once"
        )

    def clear(self, room: int) -> None:
        self._cache = transformers.DynamicCache(config=self._model.config)

    def run(self, ids: Sequence[int]) -> None:
        self._model(torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def log_likelihoods(self, ids: Sequence[int]) -> list[float]:
        hidden_TD = self._model.model(torch.tensor([ids])).last_hidden_state[0, :-1]
        targets_T1 = torch.tensor(ids[1:])[:, None]
        values: list[float] = []
        for rows_TD, labels_T1 in zip(torch.split(hidden_TD, ROWS), torch.split(targets_T1, ROWS), strict=True):
            logits_TV = self._model.lm_head(rows_TD)
            values += logits_TV.log_softmax(-1).gather(1, labels_T1)[:, 0].tolist()
        return values

    def cache_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)


CONTENDER = TransformersEager
