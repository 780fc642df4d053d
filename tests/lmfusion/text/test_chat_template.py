"""Chat templates: rendered as in transformers, with variables and a date, and within limits."""

import datetime
import re
import time

import pytest

from lmfusion.text import chat_template
from lmfusion.text.chat import encode_chat
from lmfusion.text.chat_template import render
from tests.lmfusion.text.templates import DATED, SHAPES, THINKING, tokenizer_with

TURNS = [{"role": "user", "content": "hi  there"}, {"role": "assistant", "content": "yes"}]
TURNS += [{"role": "user", "content": "naïve 猫"}]


def write(template, messages=TURNS, **variables):
    tokenizer = tokenizer_with(template)
    return render(tokenizer, messages, add_generation_prompt=True, template_variables=variables)


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"enable_thinking": True, "tools": None}])
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_conversations_are_written_as_transformers_writes_them(shape, variables):
    tokenizer = tokenizer_with(SHAPES[shape])
    for opened in (True, False):
        options = {"add_generation_prompt": opened, **variables}
        ours = render(tokenizer, TURNS, add_generation_prompt=opened, template_variables=variables)
        assert ours == tokenizer.apply_chat_template(TURNS, tokenize=False, **options)
        theirs = tokenizer.apply_chat_template(TURNS, return_dict=True, **options)["input_ids"]
        assert encode_chat(tokenizer, TURNS, opened, template_variables=variables) == [list(theirs)]


def test_what_templates_use_of_jinja():
    template = (
        "{% set check_deadline = 1 %}{% for m in messages if m.role == 'user' recursive %}{% if loop.first %}a"
        "{% continue %}{% endif %}{{ m.content ~ 1 }}{% else %}x{% endfor %}{% generation %}b{% endgeneration %}"
        "{{ {'k': 'é<'} | tojson }}{% macro f(n) %}{{ n * 2 + 1 }}{% endmacro %}{{ f(2**3) }}{{ 'ab' * 2 }}"
    )
    tokenizer = tokenizer_with(template)
    assert write(template) == tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert write(template) == 'anaïve 猫1b{"k": "é<"}17abab'


def test_the_date_is_the_given_one_and_without_it_that_of_the_clock():
    assert write(DATED, today="2024-07-26").startswith("Today is 26 Jul 2024. <|im_start|>")
    now = datetime.datetime.now()
    assert write("{{ strftime_now('%Y %H') }}") in (now.strftime("%Y %H"), datetime.datetime.now().strftime("%Y %H"))
    assert write("{{ strftime_now('%H:%M:%S') }}{{ today }}", today="2024-07-26") == "00:00:002024-07-26"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ range(10**9) }}", "OverflowError: Range too big"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError"),
        ("{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "RecursionError"),
        ("{{ '%999999999999d' % 1 }}", "may be at most 10000"),
        ("{{ 'a' * 10**9 }}", "characters or items, got 1000000000"),
        ("{{ [1] * 10**9 }}", "characters or items, got 1000000000"),
        ("{{ 9 ** (9**9) }}", "an integer may have at most"),
        (
            "{% set n = namespace(x=7) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
            "an integer may have at most",
        ),
        (
            "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "a text or list",
        ),
        (
            "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "a text or list",
        ),
        ("{{ lipsum(n=10**8) }}", "'lipsum' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[9].role }}", "has no element 9"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_whatever_goes_wrong_in_a_template_is_one_clear_error(template, reason):
    with pytest.raises(ValueError, match="the chat template does not take this conversation: ") as caught:
        write(template)
    assert reason in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% for i in range(90000) %}{% set x = range(90000) | list | length %}{% endfor %}",
        "{% for i in range(90000) recursive %}{{ loop(range(90000)) if loop.depth < 9 }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{% set i = 1 %}" + "{% for m in messages %}" * 18 + "{% endfor %}" * 18,
    ],
)
def test_templates_end_in_time(template, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"it takes more than 0\.3 seconds"):
        write(template, TURNS * 3)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"messages": []}, "must not have the key 'messages', which the conversation itself sets"),
        ({"add_generation_prompt": False}, "which the conversation itself sets"),
        ({"no name": 1}, "\"enable_thinking\": false}, got the key 'no name'"),
        ({"_x": 1}, "got the key '_x'"),
        ({3: 1}, "got the key 3"),
        ({"x": {1, 2}}, "x must be a JSON value, got set"),
        ({"x": float("nan")}, "x must be a JSON value, got float"),
        ({"today": "26 Jul 2024"}, "today must be a date as YYYY-MM-DD, such as 2024-07-26, got '26 Jul 2024'"),
        ({"today": 5}, "today must be a date as YYYY-MM-DD, such as 2024-07-26, got 5"),
        (
            {"tools": ["<|im_end|>"]},
            "only the template may write, got '<|im_end|>'",
        ),
        ("enable_thinking=false", "false}, got 'enable_thinking=false'"),
    ],
)
def test_variables_that_cannot_be_are_named(variables, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        encode_chat(tokenizer_with(THINKING), TURNS, template_variables=variables)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a'.zfill(3 * 10**9) }}",
        "{{ 'a'.ljust(2 * 10**9) }}",
        "{{ 'a'.center(width) }}",
        "{{ ('\\t' * 100000).expandtabs(9999) }}",
        "{{ 'a' | center(10**9) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10**9) }}",
        "{{ ('a' * 10000000).replace('a', 'bbbbbbbbbb') }}",
        "{{ ('a' * 10000000) | replace('a', 'bbbbbbbbbb') }}",
        "{{ ('a\\n' * 5000000) | indent(1000) }}",
        "{{ ('a' * 10000000) | wordwrap(1) }}",
        "{{ ('a' * 10000).join(['b'] * 10000) }}",
        "{{ (['b'] * 10000) | join('a' * 10000) }}",
        "{{ [1] | tojson(indent=10**9) }}",
        "{{ [1] | batch(10**9, 0) | list }}",
        "{% set x = 'a' * 10000000 %}{{ x }}{{ x }}",
        "{% set x = 'a' * 10000000 %}{% for i in range(9999) %}{{ x }}{% endfor %}",
        "{% set y %}{% for i in range(9999) %}{{ 'a' * 10000 }}{% endfor %}{% endset %}",
        "{% set x = [1] * 10000000 %}{{ x + x }}",
    ],
)
def test_no_template_makes_gigabytes(template):
    start = time.process_time()
    with pytest.raises(ValueError, match=r"the chat template does not take this conversation: .*(at most)"):
        write(template, width=10**9)
    assert time.process_time() - start < 2


def test_what_templates_do_with_texts_stays():
    template = (
        "{{ '7'.zfill(3) }} {{ 'a-b'.replace('-', '+') }} {{ ', '.join(['x', 'y']) }} {{ '%5.1f|%s' % (2.5, 'z') }} "
        "{{ '{:>4}|{a}'.format(1, a=2) }} {{ 'a\nb' | indent(2) }} {{ ['x', 'y'] | join('-') }} {{ [1, 2] | tojson }} "
        "{{ 'hello' | center(9) }} {{ 'a b' | replace('a', 'c') }} {{ 7 % 4 }} {{ 'abc' | truncate(9) }}"
    )
    assert write(template) == "007 a+b x, y   2.5|z    1|2 a\n  b x-y [1, 2]   hello   c b 3 abc"
