"""What is learned of a conversation comes after exactly what generation reads there, in every shape of template."""

import pytest

from lmfusion.data.pipeline.conversations import MAX_ANSWERS, transcribe
from lmfusion.text.chat import encode_chat
from tests.lmfusion.text.templates import SHAPES, tokenizer_with


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def learned(tokenizer, messages, **variables):
    """Of each answer that is learned: the token ids before it, and its text up to the end of the turn."""
    said = [{**message, "content": (message["content"],)} for message in messages]
    found, before = [], []
    for what, is_target in transcribe(tokenizer, said, template_variables=variables):
        ids = what.tolist()
        if is_target and found and found[-1][2]:
            found[-1][1].extend(ids)
        elif is_target:
            found.append([list(before), ids, True])
        elif found:
            found[-1][2] = False
        before += ids
    return [(prompt, tokenizer.decode(ids)) for prompt, ids, _ in found]


def prompts(tokenizer, messages, **variables):
    """What generation reads before each answer, as transformers writes it."""
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    options = {"add_generation_prompt": True, "return_dict": True, **variables}
    return [list(tokenizer.apply_chat_template(messages[:i], **options)["input_ids"]) for i in places]


ENDS = {"INST": "</s>", "headers": "<|eot_id|>", "turns": "<end_of_turn>"}
PAIRS = [
    ("Draw it.", "Here it is."),
    ("Draw it.", "Here.", "And more?", "No more."),
    (" Draw it.\n", "\n\n  Here. \n", "And\n", " No more "),
    ("a</s>b", "c<|im_end|>d", "e<|eot_id|>f", "<|im_start|>g"),
]


@pytest.mark.parametrize("contents", PAIRS)
@pytest.mark.parametrize("shape", sorted(set(SHAPES) - {"dated"}))
def test_answers_come_after_what_generation_reads(shape, contents):
    tokenizer = tokenizer_with(SHAPES[shape])
    messages = turns(*contents)
    found = learned(tokenizer, messages)
    if "</s>" not in contents[0]:  # which transformers reads as the end of a turn
        assert [prompt for prompt, _ in found] == prompts(tokenizer, messages)[-len(found) :]
    ours = [encode_chat(tokenizer, messages[:i])[0] for i in range(1, len(messages), 2)]
    assert [prompt for prompt, _ in found] == ours[-len(found) :]
    end = ENDS.get(shape, "<|im_end|>")
    for (_, text), content in zip(reversed(found), reversed(contents[1::2]), strict=False):
        assert text.endswith(end) and text.removesuffix(end).strip() == content.strip()
    # Where later prompts write an answer otherwise than it was said, the last one alone is learned
    is_rewritten = shape == "opened" or (shape == "thinking" and contents[1].startswith("\n"))
    assert len(found) == (1 if is_rewritten else len(contents) // 2)


@pytest.mark.parametrize(("variables", "block"), [({}, ""), ({"enable_thinking": False}, "<think>\n\n</think>\n\n")])
def test_a_think_block_is_there_where_a_prompt_has_it(variables, block):
    tokenizer = tokenizer_with(SHAPES["thinking"])
    messages = turns("Draw it.", "Here.", "More?", "No.")
    found = learned(tokenizer, messages, **variables)
    assert found[-1] == (prompts(tokenizer, messages, **variables)[-1], "No.<|im_end|>")
    assert tokenizer.decode(found[-1][0]).endswith(f"<|im_start|>assistant\n{block}")
    assert tokenizer.decode(found[-1][0]).count("<think>") == bool(block)
    # Later prompts have the first answer without the block that it was written after: it is read, and not learned
    assert len(found) == (1 if block else 2)


def test_thoughts_that_an_answer_has_are_learned():
    tokenizer = tokenizer_with(SHAPES["thinking"])
    messages = turns("One?", "<think>\nfirst\n</think>\n\n1", "Two?", "<think>\nsecond\n</think>\n\n2")
    (prompt, said), *more = learned(tokenizer, messages)
    assert (prompt, said) == (prompts(tokenizer, messages)[-1], "<think>\nsecond\n</think>\n\n2<|im_end|>")
    assert not more and "first" not in tokenizer.decode(prompt)
    opened = tokenizer_with(SHAPES["opened"])
    (prompt, said), *more = learned(opened, messages)
    assert prompt == prompts(opened, messages)[-1] and said == "second\n</think>\n\n2<|im_end|>" and not more


def test_spaces_of_the_template_are_part_of_the_answer():
    tokenizer = tokenizer_with(SHAPES["INST"])
    assert [said for _, said in learned(tokenizer, turns("a", "b", "c", "d"))] == [" b </s>", " d </s>"]


def test_turns_that_words_end_are_learned_up_to_these():
    template = (
        "{% for m in messages %}{{ ('Human: ' if m['role'] == 'user' else 'Bot: ') + m['content'] + '\n\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}Bot: {% endif %}"
    )
    assert [said for _, said in learned(tokenizer_with(template), turns("a", "b", "c", "d"))] == ["b", "d"]


def test_what_generation_would_never_write_is_not_learned():
    tokenizer = tokenizer_with(SHAPES["ChatML"])
    greeting = [{"role": "assistant", "content": "Hello."}, *turns("Hi.", "Bye.")]
    assert [said for _, said in learned(tokenizer, greeting)] == ["Bye.<|im_end|>"]
    with pytest.raises(ValueError, match="begin it with a user message"):
        learned(tokenizer, greeting[:1])
    strict = "{% if messages[-1]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + SHAPES["ChatML"]
    begun = [{"role": "system", "content": "Be brief."}, *greeting]
    assert [said for _, said in learned(tokenizer_with(strict), begun)] == ["Bye.<|im_end|>"]


def test_long_conversations_end_with_the_last_answer_that_is_looked_at():
    tokenizer = tokenizer_with(SHAPES["ChatML"])
    found = learned(tokenizer, turns(*["x"] * (2 * MAX_ANSWERS + 8)))
    assert len(found) == MAX_ANSWERS
