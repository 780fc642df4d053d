"""The words of a caption are those of the COCO evaluation, compared with Stanford's tokenizer if there is Java."""

import os
import shutil
from pathlib import Path

import pytest

from lmfusion.evaluation.metrics.ptb_tokenizer import tokenize

CAPTIONS = {
    "A man's dog doesn't like the children's t-shirts.": "a man 's dog does n't like the children 's t-shirts",
    "the dogs' bowls; the boys' and girls' rooms": "the dogs bowls the boys and girls rooms",
    "I can't, won't, cannot, gonna, wanna, gotta, 'tis": "i ca n't wo n't can not gon na wan na got ta 't is",
    "They're here, we've won, she'll go, I'd stay, I'm in": "they 're here we 've won she 'll go i 'd stay i 'm in",
    "O'Neil's rock 'n' roll, ma'am, at 5 o'clock": "o'neil 's rock 'n' roll ma'am at 5 o'clock",
    "A half-eaten, two-tiered mother-in-law's cake": "a half-eaten two-tiered mother-in-law 's cake",
    "half- eaten - and double--dash": "half eaten and double dash",
    "a black-and-white/red cat and/or dog, cat/dog": "a black-and-white/red cat and/or dog cat/dog",
    "1,000 apples, 3.5 oranges, 1/2 cup and 10-15 people": "1,000 apples 3.5 oranges 1/2 cup and 10-15 people",
    "At 12:30 pm or 5:00pm on the 2nd, 8am": "at 12:30 pm or 5:00 pm on the 2nd 8am",
    "In the '90s, a 1950's diner; 7-eleven and a 747.": "in the '90s a 1950 's diner 7-eleven and a 747",
    "It costs $5.00, £3, €4 or 10% off; a #12 jersey": "it costs $ 5.00 # 3 $ 4 or 10 % off a # 12 jersey",
    "He said \"hello there\" to the 'old' man": "he said hello there to the old man",
    "“curly” quotes and ‘single’ ones, it’s here": "curly quotes and single ones it 's here",
    "a sign that says 'stop' or \"one way.\"": "a sign that says stop or one way",
    "an en–dash, an em—dash, and more…": "an en dash an em dash and more",
    "A café with naïve décor — très chic": "a café with naïve décor très chic",
    "emoji 😀 and ❤️ and 日本語, ½ cup, 5°": "emoji and ❤ and 日本語 1/2 cup 5 °",
    "Mr. Smith and Dr. Jones on Main St. at 5 p.m. today": "mr. smith and dr. jones on main st. at 5 p.m. today",
    "the U.S. flag, vs. no. 5, e.g. a T.V. and TVs": "the u.s. flag vs. no. 5 e.g. a t.v. and tvs",
    "He says no. She is ill. A pile of wash.": "he says no she is ill a pile of wash",
    "A man (left) and [right] woman": "a man -lrb- left -rrb- and -lsb- right -rsb- woman",
    "wow!! no?! really? yes!": "wow !! no ?! really yes",
    "next to a bus.The bus; a dog,cat and mouse": "next to a bus.the bus a dog cat and mouse",
    "http://www.example.com/x or mail a@b.com @home #fun": "http://www.example.com/x or mail a@b.com @home #fun",
    "red, white, & blue; a B&B": "red white & blue a b&b",
    "  many   spaces\tand tabs ": "many spaces and tabs",
    "a surfer rides a wave .": "a surfer rides a wave",
    "colour grey theatre": "colour grey theatre",
}


@pytest.mark.parametrize("caption", CAPTIONS)
def test_words(caption):
    assert tokenize(caption) == CAPTIONS[caption].split()


def test_equal_to_stanfords_tokenizer():
    ptbtokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    if shutil.which("java") is None:
        pytest.skip("Stanford's tokenizer needs Java: apt-get install default-jre-headless")
    if not os.access(Path(ptbtokenizer.__file__).parent, os.W_OK):
        pytest.skip("pycocoevalcap keeps its temporary files beside its code, where this user may not write")
    captions = list(CAPTIONS)
    found = ptbtokenizer.PTBTokenizer().tokenize({i: [{"caption": caption}] for i, caption in enumerate(captions)})
    assert {captions[i]: line.split() for i, [line] in found.items()} == {c: tokenize(c) for c in captions}


@pytest.mark.parametrize("caption", ["", " ", "...", "😀"])
def test_a_caption_may_have_no_words(caption):
    assert tokenize(caption) == []
