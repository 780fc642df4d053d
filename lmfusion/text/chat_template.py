"""Renders conversations with the tokenizer's chat template, for a given day and in bounded time.

Templates come with models, so they are not trusted. They run in transformers' sandbox; in addition, loops, macros,
powers, and repeated or joined texts are limited here. Every failure is a ValueError.

Template variables are JSON values that a template reads by name, such as `enable_thinking`. One of them is special:
`today` (YYYY-MM-DD) is the date that `strftime_now` in a template returns. Without it, that is the current date.
"""

import datetime
import functools
import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.sandbox import SandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template

from lmfusion.text import template_limits

MAX_SECONDS = 10.0
"""Time limit for one conversation."""
TODAY = "today"
RESERVED = ("messages", "add_generation_prompt", "continue_final_message", "strftime_now")
"""Names that `render` sets itself."""

_EXPECTED = 'names with JSON values, such as {"enable_thinking": false}'


def check_template_variables(values: Any, name: str = "template_variables") -> None:
    """Raises ValueError, naming the variable, unless `values` maps names to JSON values and `today` is a date."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be {_EXPECTED}, got {values!r:.80}")
    for key, value in values.items():
        if not isinstance(key, str) or not key.isidentifier() or key.startswith("_"):
            raise ValueError(f"{name} must be {_EXPECTED}, got the key {key!r:.80}")
        if key in RESERVED:
            raise ValueError(f"{name} must not have the key {key!r}, which the conversation itself sets; leave it out")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{name}.{key} must be a JSON value, got {type(value).__name__}: {error}") from None
    if TODAY in values:
        check_date(values[TODAY], f"{name}.{TODAY}")


def check_date(value: Any, name: str) -> None:
    """Raises ValueError unless `value` is a date as YYYY-MM-DD."""
    try:
        datetime.datetime.strptime(value, "%Y-%m-%d")
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a date as YYYY-MM-DD, such as 2024-07-26, got {value!r:.80}") from None


def uses_date(tokenizer: Any) -> bool:
    """Whether this tokenizer's template may depend on the date."""
    template = getattr(tokenizer, "chat_template", None)
    return "strftime_now" in (json.dumps(template) if isinstance(template, Mapping) else template or "")


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    template_variables: Mapping[str, Any],
) -> str:
    """`messages` as text, written by the tokenizer's chat template.

    Raises ValueError where the template refuses them, fails, takes too long, or makes too much text.
    """
    context = {
        "tools": None,
        "documents": None,
        **tokenizer.special_tokens_map,
        "strftime_now": functools.partial(_strftime, template_variables.get(TODAY)),
        **template_variables,
        "messages": list(messages),
        "add_generation_prompt": add_generation_prompt,
    }
    _clock.deadline = time.monotonic() + MAX_SECONDS
    try:
        return _compiled(tokenizer.get_chat_template()).render(context)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template does not take this conversation: {error}") from error
    except Exception as error:  # a template can raise whatever Python can
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"the chat template does not take this conversation: {reason:.500}") from error


def check_deadline() -> None:
    """Called by templates in every iteration of a loop and call of a macro. Raises TemplateError past the deadline."""
    if time.monotonic() > _clock.deadline:
        raise TemplateError(f"it takes more than {MAX_SECONDS:g} seconds")


def checked_text(text: str) -> str:
    """Called by templates with what `~` joins. Raises TemplateError for more than MAX_CHARS characters."""
    template_limits.check_chars(len(text))
    return text


_clock = threading.local()


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    """The template in transformers' environment, with our limits."""
    # transformers returns a compiled template, not its environment. Take the environment from an empty template:
    # compiling the real one evaluates its constants, which must happen within our limits.
    environment: SandboxedEnvironment = _compile_jinja_template("").environment.overlay()
    template_limits.limit(environment)
    names = {name: value for name, value in environment.globals.items() if name != "lipsum"}  # it loops by itself
    guarded = _Guard().visit(environment.parse(source))
    return Template.from_code(environment, environment.compile(guarded), names)


class _Guard(NodeTransformer):
    """Puts calls of the limits into a template."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 (jinja2's name)
        return self._timed(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:  # noqa: N802
        return self._timed(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:  # noqa: N802
        self.generic_visit(node)
        return _call("checked_text", [node])

    def _timed(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("check_deadline", []), lineno=node.lineno))
        return node


def _call(name: str, args: list[nodes.Expr]) -> nodes.Call:
    """A call of a function in this module, by a name that templates cannot use themselves."""
    return nodes.Call(nodes.ImportedName(f"{__name__}.{name}"), args, [], None, None)


def _strftime(today: str | None, form: str) -> str:
    moment = datetime.datetime.now() if today is None else datetime.datetime.fromisoformat(today)
    return moment.strftime(form)
