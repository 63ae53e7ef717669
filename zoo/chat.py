"""Gemma's chat template: a conversation as one string.

    <start_of_turn>user
    {system}

    {first question}<end_of_turn>
    <start_of_turn>model
    {answer}<end_of_turn>
    <start_of_turn>model

There is no system role: its text opens the first user turn. The beginning-of-sequence token is no part of the string;
`Tokenizer.encode` puts it in front as an id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from transom.graphs.errors import TokenizerError


class Message(TypedDict):
    """One turn.

    Attributes:
        role: "system" (first message only), "user" or "assistant" ("model" is the same).
        content: Its text.
    """

    role: str
    content: str


def render(messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """Write a conversation in the form that Gemma was tuned on.

    Args:
        messages: User and assistant in turn, user first; a system message may come before them.
        add_generation_prompt: Open the model's next turn at the end.

    Raises:
        TokenizerError: If a role is unknown or out of turn, or the conversation is empty.
    """
    turns = list(messages)
    system = turns.pop(0)["content"].strip() + "\n\n" if turns and turns[0]["role"] == "system" else ""
    if not turns:
        raise TokenizerError("the conversation has no user message: add one")
    parts = []
    for index, turn in enumerate(turns):
        role = {"user": "user", "assistant": "model", "model": "model"}.get(turn["role"])
        expected = ("user", "model")[index % 2]
        if role != expected:
            wanted = "user" if expected == "user" else "assistant"
            raise TokenizerError(
                f"message {len(messages) - len(turns) + index + 1} has role {turn['role']!r}, expected {wanted!r}: "
                "turns alternate user, assistant after an optional system message"
            )
        parts.append(f"<start_of_turn>{role}\n{system if index == 0 else ''}{turn['content'].strip()}<end_of_turn>\n")
    return "".join(parts) + ("<start_of_turn>model\n" if add_generation_prompt else "")
