"""What a terminal shows of answers while they are generated, event by event, and which files exist when."""

import io
import os
import pty
import termios

import numpy as np
from PIL import Image

from lmfusion.cli.progress import CommandRequest, ProgressDisplay
from lmfusion.generation.events import Done, ImageBegin, ImageEnd, ImagePreview, TextDelta
from lmfusion.generation.options import GenerationOptions
from lmfusion.images.png import read_settings

DRAWING = GenerationOptions(draw_first=True, max_images=1, max_new_tokens=0, num_steps=4)
MIXED = GenerationOptions(max_images=4)
PICTURE = Image.fromarray(np.full((8, 8), 7, np.uint8))


def screen_of(folder, *requests, keep_previews=False, verbose=False):
    return ProgressDisplay(requests, folder, keep_previews=keep_previews, verbose=verbose)


def chat(prompt="hello", index=0):
    return CommandRequest(prompt, (), True, index, MIXED)


def drawing(prompt="a seven", index=0):
    return CommandRequest(prompt, (), False, index, DRAWING)


def done(reason="stop", error=""):
    return Done(reason, num_prompt_tokens=3, num_new_tokens=2, num_images=1, seconds=0.5, error=error)


BEGIN = ImageBegin(0, 8, 8, 4)
END = ImageEnd(0, PICTURE, {"seed": 5})


def test_text_and_image_appear_at_once(tmp_path, capsys):
    screen = screen_of(tmp_path, chat())
    shown = []
    for event in (
        TextDelta("\n Here"),
        TextDelta(" it is: "),
        BEGIN,
        END,
        TextDelta("\nA"),
        TextDelta(" seven. "),
        done(),
    ):
        screen.show(0, event)
        shown.append(capsys.readouterr().out)
    path = tmp_path / "0000.png"
    assert shown == ["Here", " it is:", "\n", f"{path}\n", "A", " seven.", "\n"]
    assert screen.saved == [path]
    expected = {"seed": 5, "prompt": "hello", "prompt_images": [], "chat": True, "index": 0, "image": 0}
    assert read_settings(path) == expected


def test_a_text_that_goes_on_keeps_its_white_space(tmp_path, capsys):
    screen = screen_of(tmp_path, CommandRequest("The sky", (), False, 0, GenerationOptions()))
    for event in (TextDelta(" is  "), TextDelta(" blue\n"), done()):
        screen.show(0, event)
    assert capsys.readouterr().out == "The sky is   blue\n"


def test_answers_come_in_the_order_of_the_prompts_and_files_as_they_are_finished(tmp_path, capsys):
    screen = screen_of(tmp_path, chat("one", 0), chat("two", 1))
    screen.show(1, BEGIN)
    screen.show(1, END)
    assert read_settings(tmp_path / "0000.png")["prompt"] == "two"
    screen.show(0, TextDelta("a\nb"))
    assert capsys.readouterr().out == "a\n"  # what the second has is held back, and half a line
    screen.show(1, TextDelta("c"))
    screen.show(1, done())
    screen.show(0, done())
    assert capsys.readouterr().out == f"b\n{tmp_path / '0000.png'}\nc\n"


def test_closing_shows_what_was_held_back(tmp_path, capsys):
    screen = screen_of(tmp_path, drawing("one", 0), drawing("two", 1))
    for event in (BEGIN, END, done()):
        screen.show(1, event)
    screen.show(0, BEGIN)
    screen.close()
    assert capsys.readouterr().out == f"{tmp_path / '0000.png'}\ttwo\n"


def test_a_folder_with_images_is_continued(tmp_path, capsys):
    (tmp_path / "0006.png").write_bytes(b"old")
    (tmp_path / "0008.png.partial").write_bytes(b"of another process")
    (tmp_path / "notes.png").write_bytes(b"")
    screen = screen_of(tmp_path, drawing(), drawing())
    for i in (0, 1):
        screen.show(i, BEGIN)
    (tmp_path / "0009.png").write_bytes(b"of another process")  # in the meantime
    for i in (0, 1):
        screen.show(i, END)
        screen.show(i, done())
    assert [path.name for path in screen.saved] == ["0011.png", "0010.png"]
    assert (tmp_path / "0006.png").read_bytes() == b"old"
    assert (tmp_path / "0009.png").read_bytes() == b"of another process"


def test_previews_are_kept_where_asked_for(tmp_path):
    for keep in (False, True):
        screen = screen_of(tmp_path, drawing(), keep_previews=keep)
        for event in (BEGIN, ImagePreview(0, 2, 4, PICTURE), END, done()):
            screen.show(0, event)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.png", "0001.png", "0001.step0002.png"]
    assert read_settings(tmp_path / "0001.step0002.png")["step"] == 2


def test_a_failed_answer_is_named_and_the_others_go_on(tmp_path, capsys):
    screen = screen_of(tmp_path, chat("one"), chat("two"), verbose=True)
    screen.show(0, TextDelta("so far"))
    screen.show(0, done("error", "not enough memory"))
    screen.show(1, TextDelta("fine"))
    screen.show(1, done())
    out, err = capsys.readouterr()
    assert out == "so far\nfine\n" and screen.num_failed == 1
    assert "not enough memory (prompt: 'one')" in err
    assert "stop: 3 prompt tokens, 2 text tokens, 1 images, 0.50 s" in err


def test_a_terminal_has_a_bar_for_each_image(tmp_path, monkeypatch):
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    os.set_blocking(leader, False)
    with os.fdopen(follower, "w") as terminal, os.fdopen(leader, "rb") as reader:
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setattr("sys.stdout", io.StringIO())
        monkeypatch.setattr("tqdm.std.tqdm.mininterval", 0, raising=False)
        screen = screen_of(tmp_path, chat("one"), chat("two"))
        for i in (0, 1):
            screen.show(i, BEGIN)
        screen.show(0, ImagePreview(0, 2, 4, PICTURE))
        assert "0000.png:   0%" in (seen := reader.read().decode()) and "0001.png:   0%" in seen
        screen.show(1, END)
        assert reader.read().endswith(b"\r")  # where the next line of text begins
        screen.show(0, ImagePreview(0, 3, 4, PICTURE))
        reader.read()
        screen.close()
        assert "png" not in reader.read().decode().rpartition("\r")[2]  # bars are taken away


def test_a_file_has_no_bar(tmp_path, capsys):
    screen = screen_of(tmp_path, drawing())
    for event in (BEGIN, ImagePreview(0, 2, 4, PICTURE), END, done()):
        screen.show(0, event)
    assert capsys.readouterr().err == ""
