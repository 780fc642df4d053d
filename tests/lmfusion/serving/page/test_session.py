"""Tests a tab's conversation, its display, its settings and its answers without a browser."""

import asyncio

import numpy as np
import pytest
from PIL import Image

from lmfusion.generation.events import Done, ImageBegin, ImageEnd, ImagePreview, TextDelta
from lmfusion.images.png import read_settings
from lmfusion.serving.page import display
from lmfusion.serving.page.session import MAX_SESSIONS, ChatImage, Session, Sessions, Turn
from lmfusion.serving.page.settings import read_options

GREY = Image.fromarray(np.full((8, 8), 99, np.uint8))
VALUES = dict(
    max_images=1, min_images=0, draw_first=False, num_steps=5, sampler="ddim", guidance_scale=1.0, negative_prompt="",
    preview_every=1, seed=3, is_random=False, max_new_tokens=9, temperature=0.0, top_p=1.0, prompt_mode="conversation",
)  # fmt: skip


def done(reason="stop", error=""):
    return Done(reason, 1, 1, 1, 0.1, error)


def answered(session, question, *events):
    answer = session.begin(Turn("user", [question]))
    for event in events:
        session.add_event(answer, event)
    return answer


def test_events_become_a_turn_and_the_next_prompt(tmp_path):
    session = Session(tmp_path)
    events = [TextDelta("Here"), TextDelta(" it is:"), ImageBegin(0, 8, 8, 4), ImagePreview(0, 2, 4, GREY)]
    answer = answered(session, "Draw", *events, ImageEnd(0, GREY, {"seed": 5, "prompt": "Draw"}), done())
    text, image = answer.parts
    assert text == "Here it is:" and isinstance(image, ChatImage) and session.images == [image]
    assert read_settings(image.path) == {"seed": 5, "prompt": "Draw"}
    assert answer.is_finished and answer.note == ""

    answered(session, "Never answered", done("cancelled"))
    assert session.messages(Turn("user", ["And?"])) == [
        {"role": "user", "content": ["Draw"]},
        {"role": "assistant", "content": ["Here it is:", GREY]},
        {"role": "user", "content": ["And?"]},
    ]
    session.clear()
    assert session.turns == [] and session.images == [image]
    session.close()
    assert not any(tmp_path.iterdir())


def test_a_stopped_image_is_shown_but_not_in_the_prompt(tmp_path):
    session = Session(tmp_path)
    events = [TextDelta("Look"), ImageBegin(0, 8, 8, 4), ImagePreview(0, 2, 4, GREY), done("cancelled")]
    answer = answered(session, "Draw", *events)
    assert answer.model_input == ["Look"] and session.images == []
    [_, shown] = display.messages(session.turns)
    texts = [part["text"] for part in shown["content"]]
    assert "data:image/png" in texts[1] and "stopped at step 2 of 4" in texts[1] and "progress" not in texts[1]
    assert "Stopped." in texts[2]


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (done("length"), "Cut off"),
        (done("error", "out of <memory>"), "out of &lt;memory&gt;"),
        (done(), "empty answer"),
    ],
)
def test_the_page_says_how_an_answer_ended(tmp_path, event, words):
    session = Session(tmp_path)
    answered(session, "Hi", event)
    assert words in display.messages(session.turns)[1]["content"][-1]["text"]


def test_an_image_that_is_being_denoised(tmp_path):
    session = Session(tmp_path)
    answer = session.begin(Turn("user", ["Draw"]))
    assert "waiting" in display.messages(session.turns)[1]["content"][0]["text"]
    session.add_event(answer, ImageBegin(0, 512, 256, 50))
    blank = display.messages(session.turns)[1]["content"][0]["text"]
    assert "width:512px; aspect-ratio:512/256" in blank and 'value="0" max="50"' in blank
    session.add_event(answer, ImagePreview(0, 7, 50, GREY.resize((512, 256))))
    preview = display.messages(session.turns)[1]["content"][0]["text"]
    assert "data:image/jpeg" in preview and "pixelated" not in preview and 'value="7"' in preview


def shown_text(text):
    [shown] = display.messages([Turn("assistant", [text])])
    [piece] = shown["content"]
    return piece["text"]


def test_tags_are_escaped():
    text = "<img src=x onerror=alert(1)> & `a < *b*` **bold**\n```python\nif a < b:\n```\n<b>"
    code = "<code>a &#60; &#42;b&#42;</code>"
    expected = f"&lt;img src=x onerror=alert(1)> &amp; {code} **bold**\n```python\nif a < b:\n```\n&lt;b>"
    assert shown_text(text) == expected


TAG = "<form action=//evil.example><input name=q></form>"


@pytest.mark.parametrize(
    "text",
    [
        f"\\`{TAG}`",
        f"\\\\`{TAG}`",
        f"``{TAG}`",
        f"`a\n\n{TAG}`",
        f"`a\n# {TAG}`",
        f"~~~\n```\n~~~\n{TAG}\n```",
        f"~~~ `x`\n```\n~~~\n{TAG}",
        f"- ~~~\n  ```\n  ~~~\n  {TAG}",
        f"> ```\n{TAG}\n> ```",
        f"> ~~~\n> ```\n> ~~~\n> {TAG}",
        f"````\n```\n````\n{TAG}",
        f"``` `\n{TAG}\n```",
        f"    ```\n{TAG}\n    ```",
        f"\t```\n{TAG}\n```",
        f"```\r{TAG}\r```\r{TAG}",
        f"```\n```\n{TAG}",
        f"[x](`{TAG}`)",
        f"| a |\n|---|\n| `{TAG} | `",
        f"```{TAG}\n",
    ],
)
def test_no_tag_gets_through_in_what_looks_like_code(text):
    """Another Markdown parser finds no HTML elements except those that Markdown itself makes."""
    MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt
    for parser in (MarkdownIt("commonmark"), MarkdownIt("gfm-like", {"linkify": False, "html": True})):
        page = parser.render(shown_text(text))
        assert "<form" not in page and "<input" not in page, page


def test_code_is_shown_as_written():
    MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt
    page = MarkdownIt("commonmark").render(
        shown_text("Use `a<b> & *c*`:\n~~~html\n<p>`` ``` &amp;</p>\n~~~\nand ``x`y``.")
    )
    assert "<code>a&lt;b&gt; &amp; *c*</code>" in page.replace("&#60;", "&lt;").replace("&#62;", "&gt;")
    assert '<code class="language-html">&lt;p&gt;`` ``` &amp;amp;&lt;/p&gt;' in page and "<code>x`y</code>" in page


def fill(session):
    session.begin(Turn("user", ["Hi"]))
    return session


def test_a_tab_is_dropped_when_there_are_too_many(tmp_path):
    sessions = Sessions(tmp_path)
    first = fill(sessions.of("0"))
    for i in range(1, MAX_SESSIONS):
        fill(sessions.of(str(i)))
    assert sessions.of("0") is first
    sessions.of("one more")
    assert len(sessions) == MAX_SESSIONS and not first.is_closed and sessions.of("0") is first
    assert sessions.find("1") is None and sessions.find("2") is not None
    sessions.close("0")
    assert first.is_closed and sessions.of("0") is not first
    sessions.close("unknown")
    with pytest.raises(ValueError, match="must come from an open page"):
        sessions.of(None)


def test_made_up_names_do_not_displace_sessions_of_others(tmp_path):
    sessions = Sessions(tmp_path)
    friend, waiting = fill(sessions.of("friend", "10.0.0.1")), sessions.of("waiting", "10.0.0.2")
    waiting.is_busy = True
    for i in range(3 * MAX_SESSIONS):
        fill(sessions.of(f"stranger {i}", "10.0.0.9"))
    assert sessions.find("friend") is friend and sessions.find("waiting") is waiting
    assert len(sessions) == MAX_SESSIONS


def test_behind_a_proxy_empty_sessions_are_dropped_first(tmp_path):
    sessions = Sessions(tmp_path)
    friends = [fill(sessions.of(f"friend {i}", "127.0.0.1")) for i in range(9)]
    for i in range(3 * MAX_SESSIONS):
        sessions.of(f"stranger {i}", "127.0.0.1")
    assert [sessions.find(f"friend {i}") for i in range(9)] == friends


def test_a_waiting_session_is_never_dropped(tmp_path):
    sessions = Sessions(tmp_path)
    for i in range(MAX_SESSIONS):
        sessions.of(str(i)).is_busy = True
    with pytest.raises(ValueError, match="at most 256 tabs can wait"):
        sessions.of("one more")


def test_settings_become_options():
    options, prompt_mode = read_options(VALUES)
    assert (options.seed, options.sampler, options.negative_prompt, prompt_mode) == (3, "ddim", None, "conversation")
    seeds = {read_options({**VALUES, "is_random": True})[0].seed for _ in range(3)}
    assert len(seeds) == 3
    with pytest.raises(ValueError, match="Seed must be a whole number"):
        read_options({**VALUES, "seed": None})


@pytest.fixture
def actions(model, tmp_path):
    from lmfusion.generation.engine import Engine
    from lmfusion.generation.worker import EngineWorker
    from lmfusion.serving.page.actions import Actions

    worker = EngineWorker(Engine(model), max_waiting=1)
    yield Actions(worker, model, tmp_path)
    worker.close()


def all_events(actions, session, text, files=(), **changes):
    """The events of an answer."""

    async def listen():
        options, prompt_mode = read_options({**VALUES, **changes})
        return [
            event async for events in actions.answer(session, text, files, options, prompt_mode) for event in events
        ]

    return asyncio.run(listen())


def test_an_answer_fills_the_session(actions):
    session = actions.sessions.of("tab")
    events = all_events(actions, session, "Draw", min_images=1)
    assert isinstance(events[-1], Done) and any(isinstance(event, ImageEnd) for event in events)
    assert len(session.turns) == 2 and len(session.images) == 1 and not session.is_busy


@pytest.mark.parametrize(
    ("text", "files", "words"),
    [("  ", [], "must have a text or an image"), ("x", ["a.png"] * 65, "at most 64 images, got 65")],
)
def test_bad_questions(actions, text, files, words):
    session = actions.sessions.of("tab")
    with pytest.raises(ValueError, match=words):
        all_events(actions, session, text, files)
    assert session.turns == [] and not session.is_busy


def test_uploads_are_limited(actions, tmp_path, monkeypatch):
    monkeypatch.setattr("lmfusion.serving.page.actions.MAX_UPLOAD_BYTES", 10)
    path = tmp_path / "large.png"
    GREY.save(path)
    with pytest.raises(ValueError, match=r"large\.png must have at most 10 bytes, got \d+"):
        all_events(actions, actions.sessions.of("tab"), "x", [str(path)])


def test_an_upload_that_made_room_for_others(actions, tmp_path):
    with pytest.raises(ValueError, match=r"gone\.png was deleted to make room for newer uploads"):
        all_events(actions, actions.sessions.of("tab"), "x", [str(tmp_path / "gone.png")])


def test_one_answer_at_a_time_in_a_tab(actions):
    session = actions.sessions.of("tab")

    async def twice():
        options, prompt_mode = read_options({**VALUES, "max_new_tokens": 200})
        first = actions.answer(session, "one", [], options, prompt_mode)
        assert await anext(first) == []
        with pytest.raises(ValueError, match="only one answer at a time"):
            await anext(actions.answer(session, "two", [], options, prompt_mode))
        await first.aclose()

    asyncio.run(twice())
    assert not session.is_busy and len(session.turns) == 2


def test_a_full_disk_ends_the_answer(actions, monkeypatch):
    def full(*_):
        raise OSError("cannot write image-0001.png: no space left")

    monkeypatch.setattr("lmfusion.serving.page.session.save_png", full)
    session = actions.sessions.of("tab")
    all_events(actions, session, "Draw", min_images=1)
    assert "no space left" in session.turns[-1].note and session.turns[-1].is_finished
