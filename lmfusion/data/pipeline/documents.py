"""Plans the document that each sample becomes in an epoch, before any image is read.

Captioned images become caption-first or image-first documents (see lmfusion.model.batch), interleaved ones

    [bos] text BOI image EOI text ... eos

with parts in their order, and conversations what the chat template makes of them (see .conversations). In these only
the assistant's messages have a loss, and images of other messages get little noise, since they are given. Which
document a sample becomes, and how noisy its images are, depends only on (seed, epoch, sample id).

Input images of a vision-language model are vision tokens among the words, without markers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lmfusion.data.config import DataConfig
from lmfusion.data.pipeline.conversations import transcribe
from lmfusion.data.pipeline.input_images import InputImageLoader
from lmfusion.data.pipeline.mixture import SampleRef
from lmfusion.data.samples import (
    CaptionedImage,
    Conversation,
    Edit,
    Interleaved,
    LoadImage,
    Sample,
    Text,
    Transcript,
    parts_of,
)
from lmfusion.model.batch import Document, SpecialTokens, caption_first_document, encode_captions, image_first_document
from lmfusion.model.diffusion import DiffusionConfig
from lmfusion.utils.randomness import generator


class SkippedSample(NamedTuple):
    """A damaged sample, which was left out."""

    sample_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A document whose images have not been read yet."""

    sample_id: str
    ref: SampleRef
    document: Document
    images: tuple[LoadImage, ...]
    timesteps: tuple[int, ...]
    """One for each image."""
    is_cut: bool
    """Whether it was cut to fit into a sequence."""
    first_image: int = 0
    """The number, in the sample, of the first of `images`: 1 for an edit without its source."""
    input_images: tuple[InputImageLoader, ...] = ()
    """Input images of a vision-language model. They are not among `images`."""


class DocumentPlanner:
    """Plans the documents of samples and tokenizes their texts.

    Raises ValueError where a sequence cannot hold a single image.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        tokenizer: Any,
        tokens: SpecialTokens,
        tokens_per_image: int,
        diffusion: DiffusionConfig,
        seed: int,
        image_token_id: int | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        """image_token_id: of a vision-language model, whose samples hold an `InputImageLoader` for every input image.
        template_variables: variables for the chat template."""
        self._config = config
        self._image_token_id = image_token_id
        self._template_variables = template_variables
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._tokens_per_image = tokens_per_image
        self._diffusion = diffusion
        self._seed = seed
        self._caption_room = config.seq_len - len(tokens.bos) - tokens_per_image - 2
        if self._caption_room < 1:
            raise ValueError(
                f"data.seq_len must be at least {config.seq_len - self._caption_room + 1} to hold an image, markers "
                f"and one token of caption, got {config.seq_len}"
            )

    def plan(self, samples: Sequence[tuple[SampleRef, Sample]]) -> list[Plan | SkippedSample]:
        """A plan of each sample, or why there is none. All texts are tokenized together, which is much faster."""
        # What each uniform decides never changes, or resumed runs would differ. Of captioned images: 0 image first,
        # 1 caption dropped, 2 which caption; from 3 on, the noise of each image.
        all_uniforms = [
            generator(self._seed, ref.epoch, sample.sample_id, "document").random(3 + _num_images(sample)).tolist()
            for ref, sample in samples
        ]
        texts = [_texts(sample, uniforms[2]) for (_, sample), uniforms in zip(samples, all_uniforms, strict=True)]
        token_ids = self._tokenize(texts)
        plans: list[Plan | SkippedSample] = []
        for (ref, sample), uniforms, ids in zip(samples, all_uniforms, token_ids, strict=True):
            if isinstance(ids, str):
                plans.append(SkippedSample(sample.sample_id, ids))
            elif isinstance(sample, CaptionedImage):
                plans.append(self._captioned(ref, sample, uniforms, ids[0]))
            elif isinstance(sample, Interleaved):
                plans.append(self._interleaved(ref, sample, uniforms, ids))
            elif isinstance(sample, Edit):
                plans.append(self._edit(ref, sample, uniforms, ids[0]))
            else:
                plans.append(self._conversation(ref, sample, uniforms))
        return plans

    def _captioned(
        self, ref: SampleRef, sample: CaptionedImage, uniforms: list[float], ids: list[int]
    ) -> Plan | SkippedSample:
        kind, drop, _, level = uniforms
        if not ids:
            return SkippedSample(sample.sample_id, "the caption is empty; write one, or leave the sample out")
        caption = ids[: self._config.max_caption_tokens]
        is_cut = len(caption) > self._caption_room
        caption = caption[: self._caption_room]
        is_image_first = kind < self._config.image_first
        if is_image_first:
            document = image_first_document(caption, self._tokens_per_image, self._tokens)
        else:
            is_dropped = drop < self._config.caption_drop
            document = caption_first_document([] if is_dropped else caption, self._tokens_per_image, self._tokens)
        timesteps = self._timesteps([level], is_image_first)
        return Plan(sample.sample_id, ref, document, (sample.load_image,), timesteps, is_cut)

    def _interleaved(
        self, ref: SampleRef, sample: Interleaved, uniforms: list[float], ids: list[list[int]]
    ) -> Plan | SkippedSample:
        document = Document().text(self._tokens.bos)
        num_first = document.num_tokens
        room = self._config.seq_len - num_first
        images: list[LoadImage] = []
        is_cut = False
        of_text = iter(ids)
        for part in sample.parts:
            if callable(part):
                is_cut = self._tokens_per_image + 2 > room
                if is_cut:
                    break
                document = document.marker(self._tokens.boi_token_id).image(self._tokens_per_image)
                document = document.marker(self._tokens.eoi_token_id)
                images.append(part)
            else:
                text = next(of_text)
                is_cut = len(text) > room
                document = document.text(text[:room])
                if is_cut:
                    break
            room = self._config.seq_len - document.num_tokens
        if document.num_tokens == num_first:
            return SkippedSample(sample.sample_id, "the document has neither text nor an image; leave it out")
        if not is_cut:
            document = document.end(self._tokens.eos_token_id)
        timesteps = self._timesteps(uniforms[3 : 3 + len(images)], uniforms[0] < self._config.image_first)
        return Plan(sample.sample_id, ref, document, tuple(images), timesteps, is_cut)

    def _edit(self, ref: SampleRef, sample: Edit, uniforms: list[float], ids: list[int]) -> Plan | SkippedSample:
        if not ids:
            return SkippedSample(sample.sample_id, "the instruction is empty; write one, or leave the sample out")
        input_images = (sample.source,) if isinstance(sample.source, InputImageLoader) else ()
        num_vision_tokens = input_images[0].num_tokens if input_images else None
        room = self._caption_room - (self._tokens_per_image + 2 if num_vision_tokens is None else num_vision_tokens)
        if room < 1:
            return SkippedSample(
                sample.sample_id,
                f"data.seq_len must be at least {self._config.seq_len - room + 1} to hold source, target and one token "
                f"of instruction, got {self._config.seq_len}",
            )
        instruction = ids[: self._config.max_caption_tokens]
        drop, (_, level) = uniforms[1], uniforms[3:]
        is_dropped = drop < 1.5 * self._config.caption_drop
        has_source = not is_dropped or drop < self._config.caption_drop
        is_cut = not is_dropped and len(instruction) > room
        document = edit_document(
            [] if is_dropped else instruction[:room],
            self._tokens_per_image,
            self._tokens,
            has_source=has_source,
            num_vision_tokens=num_vision_tokens,
        )
        target = self._timesteps([level], is_image_first=False)
        if has_source and not input_images:
            return Plan(sample.sample_id, ref, document, (sample.source, sample.target), (0, *target), is_cut)
        given = input_images if has_source else ()
        return Plan(
            sample.sample_id, ref, document, (sample.target,), target, is_cut, first_image=1, input_images=given
        )

    def _conversation(
        self, ref: SampleRef, sample: Conversation | Transcript, uniforms: list[float]
    ) -> Plan | SkippedSample:
        if isinstance(sample, Conversation):
            try:
                utterances = transcribe(
                    self._tokenizer, sample.messages, self._image_token_id, self._template_variables
                )
                sample = Transcript(sample.sample_id, utterances)
            except ValueError as error:
                return SkippedSample(sample.sample_id, str(error))
        document = Document()
        images: list[LoadImage] = []
        input_images: list[InputImageLoader] = []
        timesteps: tuple[int, ...] = ()
        is_cut = False
        for what, is_target in sample.utterances:
            room = self._config.seq_len - document.num_tokens
            if isinstance(what, InputImageLoader):
                is_cut = what.num_tokens > room
                if is_cut:
                    break
                document = document.input_image(what.num_tokens)
                input_images.append(what)
            elif callable(what):
                is_cut = self._tokens_per_image + 2 > room
                if is_cut:
                    break
                document = document.marker(self._tokens.boi_token_id, is_target).image(self._tokens_per_image)
                document = document.marker(self._tokens.eoi_token_id)
                timesteps += self._timesteps([uniforms[3 + len(images)]], not is_target)
                images.append(what)
            else:
                is_cut = len(what) > room
                document = document.text(what[:room].tolist(), is_target)
                if is_cut:
                    break
        return Plan(sample.sample_id, ref, document, tuple(images), timesteps, is_cut, input_images=tuple(input_images))

    def _timesteps(self, levels: list[float], is_image_first: bool) -> tuple[int, ...]:
        diffusion = self._diffusion
        num_timesteps = diffusion.image_first_max_timestep + 1 if is_image_first else diffusion.num_train_timesteps
        return tuple(int(level * num_timesteps) for level in levels)

    def _tokenize(self, texts: Sequence[list[Text]]) -> list[list[list[int]] | str]:
        """Of each sample the token ids of its texts, or why it has none."""
        reasons = [_invalid_text(of_sample) for of_sample in texts]
        usable = (of_sample for of_sample, reason in zip(texts, reasons, strict=True) if reason is None)
        distinct = list(dict.fromkeys(text for of_sample in usable for text in of_sample if isinstance(text, str)))
        ids_of = dict(zip(distinct, encode_captions(self._tokenizer, distinct), strict=True))
        return [
            reason or [ids_of[text] if isinstance(text, str) else text.tolist() for text in of_sample]
            for of_sample, reason in zip(texts, reasons, strict=True)
        ]


def edit_document(
    instruction_ids: Sequence[int],
    num_image_tokens: int,
    tokens: SpecialTokens,
    *,
    has_source: bool = True,
    num_vision_tokens: int | None = None,
) -> Document:
    """[bos] instruction BOI source EOI BOI target EOI eos.

    Without an instruction (dropped for guidance) only the target is learned: nothing in such a document says that an
    image follows, or that it ends. num_vision_tokens: of the source, with a vision-language model. They take the place
    of BOI source EOI.

    The instruction comes first. So it is constant with a frozen text tower, the source attends to it, and the distance
    between a patch of the target and the same patch of the source does not depend on the length of the instruction.
    """
    is_whole = has_source and len(instruction_ids) > 0
    document = Document().text(tokens.bos).text(instruction_ids, is_scored=False)
    if has_source and num_vision_tokens is not None:
        document = document.input_image(num_vision_tokens)
    elif has_source:
        document = document.marker(tokens.boi_token_id, is_scored=False).image(num_image_tokens, is_input=True)
        document = document.marker(tokens.eoi_token_id)
    document = document.marker(tokens.boi_token_id, is_scored=is_whole).image(num_image_tokens)
    document = document.marker(tokens.eoi_token_id)
    return document.end(tokens.eos_token_id) if is_whole else document


def _num_images(sample: Sample) -> int:
    return sum(callable(part) for part in parts_of(sample))


def _texts(sample: Sample, which: float) -> list[Text]:
    """The texts of an interleaved document, or the caption that this epoch picks. None of a conversation, which
    `transcribe` tokenizes."""
    if isinstance(sample, CaptionedImage):
        return [sample.captions[int(which * len(sample.captions))]] if sample.captions else [""]
    if isinstance(sample, Interleaved):
        return [part for part in sample.parts if isinstance(part, (str, np.ndarray))]
    if isinstance(sample, Edit):
        return [sample.instruction]
    return []


def _invalid_text(texts: list[Text]) -> str | None:
    """Why a tokenizer would refuse these texts."""
    for text in texts:
        if isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError as error:  # half a surrogate pair, which JSON lets through
                return f"a text is not valid Unicode: {error.reason} at character {error.start}"
    return None
