"""`Images`: what an image is among a model's tokens. Needs no torch."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """What an image is among tokens.

    Attributes:
        size: Pixels along each side of what the encoder takes.
        soft_tokens: Soft tokens of an image, which stand in a row and see each other.
        begin_id: Token before them.
        end_id: Token behind them.
        text_before: Text before `begin_id`.
        text_after: Text behind `end_id`.
    """

    size: int
    soft_tokens: int
    begin_id: int
    end_id: int
    text_before: str
    text_after: str
