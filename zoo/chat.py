"""Conversations as one string, by the template that a checkpoint brings.

It is a Jinja program, which runs in Jinja's sandbox, with the names and filters that Hugging Face's libraries give it.
Families whose checkpoints may lack one have a form of their own; see `Architecture.chat`. Needs no torch.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict

from transom.errors import TokenizerError

if TYPE_CHECKING:
    import jinja2

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The form of conversations that several families share: turns between two special tokens, the role on a line first."""


class Message(TypedDict):
    """One turn.

    Attributes:
        role: "system" (first message only), "user" or "assistant" ("model" is the same to Gemma).
        content: Its text.
    """

    role: str
    content: str


def render_template(
    template: str, tokens: Mapping[str, str], messages: Sequence[Message], add_generation_prompt: bool = True
) -> str:
    """Write a conversation by a checkpoint's own template.

    Args:
        template: Jinja source.
        tokens: Special tokens by role, such as "bos_token", which templates may name.
        messages: The conversation; which roles may stand where, the template says.
        add_generation_prompt: Open the model's next turn at the end.

    Raises:
        TokenizerError: If the template is not valid, refuses the conversation, or fails.
    """
    compiled = compile_template(template)
    try:
        return compiled.render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **{"bos_token": "", "eos_token": "", **tokens},
        )
    # A template is a program of the checkpoint's: it may fail in any way.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TokenizerError(f"the checkpoint's chat template does not take this conversation ({reason})") from error


@functools.lru_cache(maxsize=8)
def compile_template(template: str) -> jinja2.Template:
    """Compile a chat template.

    Raises:
        TokenizerError: If it is not valid Jinja.
    """
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    try:
        return environment.from_string(template)
    # Jinja makes Python of it, which has limits and errors of its own.
    except Exception as error:
        line = getattr(error, "lineno", None)
        where = f" in line {line}" if line else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TokenizerError(f"the checkpoint's chat template is not valid{where} ({reason}): mend it") from error


def _generation_tag() -> Any:
    """The tag that marks the model's own words for training; here it is just its body."""
    import jinja2.nodes
    from jinja2.ext import Extension

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012 - Jinja reads this attribute of the class

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    return GenerationTag


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes what HTML must not hold.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(style: str) -> str:
    return datetime.datetime.now().strftime(style)
