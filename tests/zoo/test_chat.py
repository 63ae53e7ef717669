from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from transom.errors import TokenizerError
from transom.zoo.architectures import architecture
from transom.zoo.chat import Message, compile_template, render_template
from transom.zoo.tokenizer import Tokenizer
from transom.zoo.tokenizer_config import TokenizerConfig


def render(messages: list[Message], add_generation_prompt: bool = True) -> str:
    template = architecture("gemma3").chat
    assert template is not None
    return render_template(template, {}, messages, add_generation_prompt)


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
    ("conversation", "message"),
    [
        (turns(), "no user message"),
        (turns(("system", "x")), "no user message"),
        (turns(("assistant", "x")), "message 1 has role 'assistant', expected 'user'"),
        (turns(("user", "x"), ("user", "y")), "message 2 has role 'user', expected 'assistant'"),
        (turns(("system", "s"), ("user", "x"), ("system", "y")), "message 3 has role 'system'"),
        (turns(("user", "x"), ("tool", "y")), "'tool'"),
    ],
)
def test_roles_out_of_turn(conversation: list[Message], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        render(conversation)


CHATML = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- set loop_messages = messages[1:] %}
{%- else %}{% set loop_messages = messages %}{%- endif %}
{% for m in loop_messages %}
    {% if m.role == 'tool' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + m.role + '\\n' }}{% generation %}{{ m.content | trim }}{% endgeneration %}{{ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set first_user_prefix = "" -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("roles must alternate user/assistant") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {{- message['content'] | trim }}{{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""
TOOLS = "{{ bos_token }}{{ messages | tojson }} {{ tools }} {{ strftime_now('%Y') | length }}{{ missing }}"
CONVERSATION = turns(("system", "Be <b>brief</b>."), ("user", " héllo\n"), ("assistant", "Hi"), ("user", "Bye"))


@pytest.mark.parametrize("template", [CHATML, GEMMA, TOOLS], ids=["chatml", "gemma", "tools"])
@pytest.mark.parametrize("prompted", [True, False])
def test_a_template_of_the_checkpoint_is_that_of_transformers(tmp_path: Path, template: str, prompted: bool) -> None:
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>"}
    ours = Tokenizer(Tokenizer.of_bytes(512)._backend, TokenizerConfig(tokens=tokens, template=template))
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = theirs.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=prompted)
    assert render_template(template, tokens, CONVERSATION, prompted) == text
    ids = theirs.apply_chat_template(CONVERSATION, add_generation_prompt=prompted)["input_ids"]
    assert ours.encode_chat(CONVERSATION, prompted) == ids
    again = Tokenizer.from_folder(tmp_path)
    assert again.config == ours.config and again.encode_chat(CONVERSATION, prompted) == ids


def test_gemmas_own_template_writes_gemmas_turns() -> None:
    backend = Tokenizer.of_bytes(512)._backend
    with_template = Tokenizer(backend, TokenizerConfig(template=GEMMA))
    with_form = Tokenizer(backend, TokenizerConfig(template=architecture("gemma3").chat))
    assert with_template.encode_chat(CONVERSATION) == with_form.encode_chat(CONVERSATION)
    with pytest.raises(TokenizerError, match=r"does not take this conversation \(roles must alternate"):
        with_template.encode_chat(turns(("assistant", "x")))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "not valid in line 1"),
        ("{% for a in messages %}" * 25 + "{% endfor %}" * 25, "not valid"),
        ("{% if a %}" * 120 + "{% endif %}" * 120, "not valid"),
        ("a\n{{ messages | nonsense }}", "not valid in line 2 .No filter named 'nonsense'"),
        ("{% include 'other' %}", "does not take this conversation"),
        ("{{ messages.pop() }}", "does not take this conversation"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "does not take this conversation"),
        ("{{ messages[0].content + 1 }}", "does not take this conversation"),
        ("{{ raise_exception('no\nsystem') }}", "does not take this conversation .no system"),
        ("{{ range(10**9) | list }}", "does not take this conversation"),
    ],
)
def test_templates_that_fail(template: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        render_template(template, {}, CONVERSATION)
    assert "\n" not in str(caught.value)


def write(folder: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"chat_template": "a\n"}}, "a\n"),
        ({"tokenizer_config.json": {"chat_template": None}}, None),
        ({"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "b"}]}}, "b"),
        ({"chat_template.json": {"chat_template": "c"}}, "c"),
        ({"chat_template.jinja": "d\r\n", "tokenizer_config.json": {"chat_template": "a"}}, "d\r\n"),
    ],
    ids=str,
)
def test_where_a_template_stands(tmp_path: Path, files: dict[str, object], template: str | None) -> None:
    config = TokenizerConfig.from_folder(write(tmp_path, files))
    assert (config.template, config.left_out) == (template, ())


def test_companions_of_a_tokenizer(tmp_path: Path) -> None:
    files = {
        "tokenizer_config.json": {
            "eos_token": {"content": "<unused0>", "lstrip": False},
            "add_bos_token": False,
            "add_eos_token": True,
            "chat_template": [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}],
        },
        "special_tokens_map.json": {"bos_token": "<start_of_turn>", "eos_token": "<eos>"},
    }
    Tokenizer.of_bytes(512).save(tmp_path)
    tokenizer = Tokenizer.from_folder(write(tmp_path, files))
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (261, (1, 262, 263))
    assert tokenizer.encode("A") == [69]
    assert tokenizer.left_out == (
        "tokenizer_config.json: add_eos_token is not applied: a prompt is there to be continued",
        "tokenizer_config.json: of the chat templates, tool_use are not kept, only the default",
    )
    absent = Tokenizer.from_folder(
        write(tmp_path, {"tokenizer_config.json": {"bos_token": "<bos>", "eos_token": "<|end|>"}})
    )
    assert absent.left_out == ("the tokenizer has no <|end|>, which its config calls the end of a text",)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": []}, "must hold a JSON object, got list"),
        ({"tokenizer_config.json": "{"}, "not readable as JSON"),
        ({"tokenizer_config.json": {"eos_token": 1}}, "eos_token is 1"),
        ({"tokenizer_config.json": {"add_bos_token": "yes"}}, "add_bos_token is 'yes', expected true or false"),
        ({"tokenizer_config.json": {"chat_template": 3}}, "neither text nor a list"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "b"}]}}, "with a 'default'"),
        ({"tokenizer_config.json": {"bos_token": "<s>"}}, "the tokenizer has no <s>"),
        ({"chat_template.json": "[1]"}, "must hold a JSON object"),
    ],
    ids=str,
)
def test_malformed_companions(tmp_path: Path, files: dict[str, object], message: str) -> None:
    Tokenizer.of_bytes(512).save(tmp_path)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_folder(write(tmp_path, files))
    assert "\n" not in str(caught.value)


def test_a_template_is_compiled_once() -> None:
    assert compile_template(CHATML) is compile_template(CHATML)
