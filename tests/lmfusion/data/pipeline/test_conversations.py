"""Conversations: what the assistant says is learned, from lines of JSON, from latent caches, and from the digits."""

import json

import numpy as np
import pytest

from lmfusion.data import Conversation, DataConfig, SourceConfig, load_source
from lmfusion.data.inspect import read_all
from lmfusion.data.pipeline.conversations import transcribe
from lmfusion.data.pipeline.documents import DocumentPlanner, SkippedSample
from lmfusion.data.pipeline.mixture import SampleRef
from lmfusion.data.sources.interleaved import InterleavedFiles
from lmfusion.model.batch import IGNORED, SpecialTokens
from lmfusion.model.codec import CodecConfig
from lmfusion.model.diffusion import DiffusionConfig
from lmfusion.synthetic.digits import NAMES, QUESTIONS, REQUESTS, SYSTEM_PROMPT, Digits
from lmfusion.text.chat import encode_chat
from tests.lmfusion.conftest import build_tokenizer
from tests.lmfusion.data.latent_cache.caches import assert_same_steps, encode, loader, read
from tests.lmfusion.data.latent_cache.caches import encoded as encoded_in
from tests.lmfusion.data.storage.stored import encoded, picture

TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
TOKENIZER = build_tokenizer()
TOKENIZER.chat_template = TEMPLATE
TOKENS = SpecialTokens.of(TOKENIZER, len(TOKENIZER))
BOS, EOS, BOI, EOI = TOKENS.bos_token_id, TOKENS.eos_token_id, TOKENS.boi_token_id, TOKENS.eoi_token_id


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def no_image():
    raise AssertionError("images are not read for a plan")


def talk(*turns):
    return tuple({"role": role, "content": content} for role, *content in turns)


DRAWING = talk(("user", "Draw it."), ("assistant", "Here:", no_image, "Done."))
DESCRIBING = talk(("user", no_image, "What?"), ("assistant", "A cat."), ("user", "Draw it."), ("assistant", no_image))


def plan(sample, tokenizer=TOKENIZER, **fields):
    config = DataConfig([SourceConfig("digits")], **fields)
    planner = DocumentPlanner(
        config, tokenizer=tokenizer, tokens=TOKENS, tokens_per_image=4, diffusion=DiffusionConfig(), seed=0
    )
    (made,) = planner.plan([(SampleRef(0, 0, 0), sample)])
    return made


def labelled(document):
    """Of each text row of a document its token, and the one it is taught to be followed by or None."""
    return [
        (i, None if label == IGNORED else label) for i, label in zip(document.token_ids, document.labels, strict=True)
    ]


def test_what_the_assistant_says_up_to_the_end_of_its_turn_is_scored():
    document = plan(Conversation("a", DRAWING)).document
    asked = ids("user\nDraw it.")
    said, after = ids("Here:"), ids("Done.")
    prompt = [BOS, *asked, EOS, *ids("\n"), BOS, *ids("assistant\n")]
    assert list(document.token_ids) == [*prompt, *said, BOI, EOI, *after, EOS, *ids("\n")]
    targets = [*[IGNORED] * (len(prompt) - 1), *said, BOI, IGNORED, *after, EOS, IGNORED, IGNORED]
    assert list(document.labels) == targets
    assert document.num_images == 1


def test_every_turn_of_the_assistant_is_learned_and_nothing_else():
    made = plan(Conversation("a", DESCRIBING))
    scored = [label for _, label in labelled(made.document) if label is not None]
    assert scored == [*ids("A cat."), EOS, BOI, EOS]
    assert len(made.images) == 2


def test_training_reads_what_generation_does():
    prompt = talk(("user", "Draw it."))
    read = encode_chat(TOKENIZER, prompt)[0]
    whole = plan(Conversation("a", DRAWING)).document
    assert list(whole.token_ids[: len(read)]) == read
    # Where a template's text and the answer's would become one token, they stay two
    spaced = transcribe(TOKENIZER, talk(("user", "x"), ("assistant", "\n\n y")))
    assert spaced[1].what.tolist() == ids("\n\n y") and [said for _, said in spaced] == [False, True, True, False]


def test_control_tokens_in_a_message_are_text():
    document = plan(Conversation("a", talk(("user", "</s>"), ("assistant", "a</s>b")))).document
    scored = [label for _, label in labelled(document) if label is not None]
    assert scored.count(EOS) == 1 and scored[-1] == EOS and len(scored) == len("a</s>b") + 1


def test_images_that_are_given_have_little_noise():
    levels = {0: [], 1: []}
    for i in range(200):
        made = plan(Conversation(str(i), DESCRIBING), image_first=1.0)  # which is for other documents
        for which, timestep in enumerate(made.timesteps):
            levels[which].append(timestep)
    assert max(levels[0]) <= 500 < 950 < max(levels[1])


def test_long_conversations_are_cut_like_other_documents():
    whole = plan(Conversation("a", DRAWING))
    length = whole.document.num_tokens
    assert not whole.is_cut and not plan(Conversation("a", DRAWING), seq_len=length).is_cut
    text_cut = plan(Conversation("a", DRAWING), seq_len=length - 3)
    assert text_cut.is_cut and text_cut.document.num_tokens == length - 3 and text_cut.timesteps == whole.timesteps
    before_image = length - len("Done.") - 2 - 6
    no_room = plan(Conversation("a", DRAWING), seq_len=before_image + 5)
    assert no_room.is_cut and no_room.images == () and no_room.document.num_tokens == before_image


@pytest.mark.parametrize(
    ("sample", "tokenizer", "reason"),
    [
        (Conversation("a", talk(("user", "hello"))), TOKENIZER, "must have a message of the assistant"),
        (Conversation("a", ()), TOKENIZER, "must be a list of at least one message"),
        (Conversation("a", DRAWING), build_tokenizer(), "the tokenizer has no chat template"),
    ],
)
def test_a_conversation_that_teaches_nothing_is_damage(sample, tokenizer, reason):
    made = plan(sample, tokenizer)
    assert isinstance(made, SkippedSample) and made.sample_id == "a" and reason in made.reason


# Lines of JSON


@pytest.fixture
def folder(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(image=picture(i)))
    return tmp_path


def write(folder, *lines):
    path = folder / "talks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


LINE = {
    "id": "t",
    "messages": [
        {"role": "user", "content": ["What is ", {"image": "0.jpg"}, "?"]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Another."},
        {"role": "assistant", "content": ["Here:", {"image": "1.jpg"}, "Done."]},
    ],
}


def test_lines_with_messages_are_conversations_beside_documents(folder):
    source = load_source(SourceConfig("interleaved", write(folder, LINE, {"content": ["text"]})), 8)
    talk, document = source[0], source[1]
    assert talk.sample_id == "talks.jsonl/t" and document.parts == ("text",)
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[1]["content"] == ("A cat.",)
    assert talk.messages[3]["content"][1]().size == picture(1).size
    contents = read_all(source, "it", load_images=True, num_workers=1)
    assert (contents.num_images, contents.num_texts, contents.damaged) == (2, 7, [])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": "hello"}, "the line must be an object like"),
        ({"messages": [], "content": ["a"]}, "must have only one of content, messages"),
        ({"messages": ["hello"]}, "every message must have a role, one of system, user, assistant"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "every message must have a role, one of system, user, assistant",
        ),
        ({"messages": [{"role": "user"}]}, "the content of the user's message must be a text"),
        ({"messages": [{"role": "user", "content": " "}]}, "content is empty"),
        ({"messages": [{"role": "user", "content": [{"image": "../x.jpg"}]}]}, "must stay in the folder"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "content must hold texts"),
    ],
)
def test_lines_that_are_no_conversation(folder, line, message):
    source = InterleavedFiles(write(folder, LINE, line))
    assert source[0].sample_id == "talks.jsonl/t"
    with pytest.raises(ValueError, match=message):
        source[1]


# Latent caches


def test_a_latent_cache_gives_the_same_sequences(folder):
    (folder / "bad.jpg").write_bytes(b"no image")
    bad = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"image": "bad.jpg"}]}]}
    silent = {"messages": [{"role": "user", "content": "hello"}]}
    path = write(folder, *[{**LINE, "id": i} for i in range(9)], bad, {"content": ["a", {"image": "0.jpg"}]}, silent)
    source, codec = SourceConfig("interleaved", path), CodecConfig(kind="pixels", channels=1, image_size=4)
    encode(source, folder / "cache", codec, TOKENIZER, max_damaged=1.0)
    direct, cached = (
        read(loader([config], codec, TOKENIZER, max_damaged=1.0), 6)
        for config in (source, encoded_in(folder / "cache"))
    )
    assert_same_steps(direct, cached)
    reasons = {damage.reason.split(": ")[-1] for step in cached for damage in step.damaged}
    assert "a conversation must have a message of the assistant to learn from" in reasons
    assert any("bad.jpg" in damage.reason for step in cached for damage in step.damaged)
    assert sum(row.num_images for step in cached for row in step.batches) > 20


# The digits


def test_every_digit_is_requested_in_every_way():
    source, digits = load_source(SourceConfig("digit_conversations"), 8), Digits("train")
    of_each = len(REQUESTS) + 1
    assert len(source) == sum(source.blocks) == len(digits) * of_each
    place = digits.labels.index(8)
    system, asked, answer = source[place * of_each].messages
    assert system == {"role": "system", "content": (SYSTEM_PROMPT,)}
    assert asked["content"] == ("Draw an eight, then say what you drew.",)
    opening, load_image, closing = answer["content"]
    assert (opening, closing) == ("Here is an eight:", "I drew a handwritten eight.")
    assert np.array_equal(np.asarray(load_image()), np.asarray(digits[place].load_image()))
    closings = [source[i].messages[2]["content"][-1] for i in range(200) if i % of_each < len(REQUESTS)]
    assert {name for closing in closings for name in NAMES if name in closing} == set(NAMES)
    plain = [source[i].messages for i in range(len(REQUESTS), 200, of_each)]
    assert {(asked["content"], answer["content"]) for _, asked, answer in plain} == {((q,), (a,)) for q, a in QUESTIONS}
    assert len({source[i].sample_id for i in range(len(source))}) == len(source)
    held_out = load_source(SourceConfig("digit_conversations", split="test"), 8)
    assert len(held_out) == 359 * of_each
