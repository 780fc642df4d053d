"""Token ids of texts: control tokens only where asked for, from any number of threads."""

from concurrent.futures import ThreadPoolExecutor

from lmfusion.generation.decoding import TextStream
from lmfusion.text.tokenization import token_ids


def test_control_tokens_are_read_or_spelled(tokenizer):
    read, spelled = (token_ids(tokenizer, ["a</s>", ""], control_tokens=control) for control in (True, False))
    assert read[0][-1] == tokenizer.eos_token_id and len(read[0]) == 2 and read[1] == []
    assert tokenizer.eos_token_id not in spelled[0] and len(spelled[0]) == 5
    assert token_ids(tokenizer, ["a"], control_tokens=True, add_special_tokens=True)[0][0] == tokenizer.bos_token_id
    assert token_ids(tokenizer, [], control_tokens=True) == []


def test_threads_do_not_change_each_others_reading(tokenizer):
    """A tokenizer remembers how it was called last."""
    text = "</s>" * 300
    expected = {control: token_ids(tokenizer, [text], control_tokens=control) for control in (True, False)}

    def read(i):
        stream = TextStream(tokenizer)  # as the engine's thread does meanwhile
        return [stream.push(token_id) for token_id in expected[False][0][:8]], token_ids(
            tokenizer, [text], control_tokens=bool(i % 2)
        )

    with ThreadPoolExecutor(4) as threads:
        for i, (written, ids) in enumerate(threads.map(read, range(300))):
            assert ids == expected[bool(i % 2)] and "".join(written) == text[:8]
