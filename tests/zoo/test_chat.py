from __future__ import annotations

import pytest

from transom.graphs.errors import TokenizerError
from transom.zoo.chat import Message, render


def turns(*pairs: tuple[str, str]) -> list[Message]:
    return [Message(role=role, content=content) for role, content in pairs]


def test_one_question() -> None:
    expected = "<start_of_turn>user\nWho are you?<end_of_turn>\n<start_of_turn>model\n"
    assert render(turns(("user", " Who are you?\n"))) == expected


def test_system_text_opens_the_first_user_turn() -> None:
    conversation = turns(("system", "Be brief."), ("user", "Hi"), ("assistant", " Hello "), ("user", "Bye"))
    assert render(conversation, add_generation_prompt=False) == (
        "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
        "<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n"
    )


@pytest.mark.parametrize(
    ("conversation", "said"),
    [
        (turns(), "no user message"),
        (turns(("system", "x")), "no user message"),
        (turns(("assistant", "x")), "message 1 has role 'assistant', expected 'user'"),
        (turns(("user", "x"), ("user", "y")), "message 2 has role 'user', expected 'assistant'"),
        (turns(("system", "s"), ("user", "x"), ("system", "y")), "message 3 has role 'system'"),
        (turns(("user", "x"), ("tool", "y")), "'tool'"),
    ],
)
def test_roles_out_of_turn(conversation: list[Message], said: str) -> None:
    with pytest.raises(TokenizerError, match=said):
        render(conversation)
