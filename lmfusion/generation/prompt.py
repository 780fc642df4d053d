"""Prompts: text, images, a mix of both, or a conversation, encoded into token ids and pixels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from lmfusion.conversion.model_limits import sliding_window
from lmfusion.images.preprocessing import to_tensor
from lmfusion.model.batch import Document, SpecialTokens, encode_caption
from lmfusion.model.vision import VisionInput
from lmfusion.text.chat import ChatMessage, InputImage, encode_chat
from lmfusion.text.tokenization import token_ids

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

Part = str | Path | Image.Image | np.ndarray | VisionInput
PromptLike = str | Sequence[Part] | Sequence[ChatMessage]
"""A text; a list of texts and images (a Path is an image, a str never is); or messages as in `lmfusion.text.chat`."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """An encoded prompt."""

    parts: tuple[list[int] | Tensor | VisionInput, ...]
    """In order: token ids; images for the image tower, as pixels [channels, H, W] in [-1, 1]; and images for a vision
    encoder."""
    text: str
    """Its words, to be saved with the images made from it."""

    @property
    def images(self) -> list[Tensor | VisionInput]:
        return [part for part in self.parts if not isinstance(part, list)]

    @property
    def num_images(self) -> int:
        return len(self.images)

    def num_image_tokens(self, tokens_per_image: int) -> int:
        """Tokens of its images, with BOI and EOI. tokens_per_image: those of an image in the image tower."""
        return sum(
            image.num_tokens if isinstance(image, VisionInput) else tokens_per_image + 2 for image in self.images
        )

    def document(self, tokens_per_image: int, tokens: SpecialTokens) -> Document:
        """Its tokens: text as it is, images between BOI and EOI, images of a vision encoder without these."""
        document = Document()
        for part in self.parts:
            if isinstance(part, VisionInput):
                document = document.input_image(part.num_tokens)
            elif isinstance(part, Tensor):
                document = document.marker(tokens.boi_token_id).image(tokens_per_image).marker(tokens.eoi_token_id)
            else:
                document = document.text(part)
        return document


def encode_prompt(
    model: "LMFusion",
    prompt: PromptLike,
    chat: bool = False,
    template_variables: Mapping[str, Any] | None = None,
) -> Prompt:
    """`prompt` in the model's tokens and pixels.

    A single text is tokenized as by the base LLM. In a list, texts are stripped, as captions are in training, and bos
    comes first; images are cropped to the middle and resized to the codec's size. Messages are written with the
    tokenizer's chat template, as is with `chat` a single text or list, which is then the user's turn. The model's
    system prompt comes first, if it has one and the conversation has none. template_variables: values that the template
    reads by name, over those saved with the model. A vision-language model encodes images at their own size with its
    vision encoder, except those of the assistant in messages, which it has generated itself.

    Raises ValueError for an empty prompt, a part that is neither text nor image, a damaged or huge image, a
    conversation without a chat template in the tokenizer, or template variables without a conversation; OSError for a
    file that cannot be opened.
    """
    tokenizer = require_tokenizer(model)
    is_conversation = isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    if template_variables and not (is_conversation or chat):
        raise ValueError("template_variables need a conversation; set chat=True, give messages, or leave them out")
    if isinstance(prompt, str) and not chat:
        [ids] = token_ids(tokenizer, [prompt], control_tokens=True, add_special_tokens=True)
        if not ids or not prompt:
            raise ValueError("a prompt must not be empty; write something to continue")
        if model.vision is not None and model.vision.image_token_id in ids:
            raise ValueError(
                "a text alone must not hold the model's image token; give a list of texts and images, or messages"
            )
        return Prompt((ids,), prompt)
    if not isinstance(prompt, (str, Sequence)) or isinstance(prompt, (bytes, Mapping)):
        raise ValueError(
            f"a prompt must be a text, a list of texts and images, or a list of messages, got {prompt!r:.80}"
        )
    if len(prompt) == 0:
        raise ValueError("a prompt must not be empty; write something to continue")
    if is_conversation or chat:
        messages: Sequence[Any] = prompt if is_conversation else [{"role": "user", "content": prompt}]
        return _conversation(model, messages, template_variables or {})
    bos = SpecialTokens.of(tokenizer, model.boi_token_id).bos
    parts = [encode_caption(tokenizer, part) if isinstance(part, str) else _input_image(model, part) for part in prompt]
    return Prompt((bos, *parts) if bos else tuple(parts), _words(prompt))


def _conversation(model: "LMFusion", messages: Sequence[Any], template_variables: Mapping[str, Any]) -> Prompt:
    tokenizer = require_tokenizer(model)
    system = model.config.chat_system_prompt
    has_system = isinstance(messages[0], Mapping) and messages[0].get("role") == "system"
    if system is not None and not has_system:
        messages = [{"role": "system", "content": system}, *messages]
    image_token_id = None if model.vision is None else model.vision.image_token_id
    variables = {**model.config.template_variables, **template_variables}
    parts = [
        part
        if isinstance(part, list)
        else _input_image(model, part.image)
        if isinstance(part, InputImage)
        else _pixels(model, part)
        for part in encode_chat(tokenizer, messages, image_token_id=image_token_id, template_variables=variables)
    ]
    content = messages[-1]["content"]
    return Prompt(tuple(parts), _words(content if isinstance(content, (list, tuple)) else [content]))


def _words(parts: Sequence[Any]) -> str:
    """The texts among the parts of a prompt or message."""
    texts = (part.get("text", "") if isinstance(part, Mapping) else part for part in parts)
    return " ".join(text.strip() for text in texts if isinstance(text, str) and text.strip())


def _input_image(model: "LMFusion", image: Any) -> Tensor | VisionInput:
    """An image that is given to the model: for its vision encoder if it has one, else for the image tower."""
    if model.vision is None or isinstance(image, VisionInput):
        return image if isinstance(image, VisionInput) else _pixels(model, image)
    return model.vision.prepare(_checked(image))


def _pixels(model: "LMFusion", image: Any) -> Tensor:
    """An image for the image tower."""
    config = model.codec.config
    return to_tensor(_checked(image), config.image_size, config.channels)


def _checked(image: Any) -> Path | Image.Image | np.ndarray:
    if not isinstance(image, (Path, Image.Image, np.ndarray)):
        raise ValueError(
            "a part of a prompt must be a text or an image (a pathlib.Path, a Pillow image or an array), "
            f"got {image!r:.80}"
        )
    return image


def require_tokenizer(model: "LMFusion") -> Any:
    """The model's tokenizer. Raises ValueError if it has none."""
    if model.tokenizer is None:
        raise ValueError("the model must have a tokenizer; adapt it from a checkpoint with one, or set model.tokenizer")
    return model.tokenizer


def context_limit(model: "LMFusion") -> int | None:
    """Most tokens of a document: the LLM's positions, or its attention window if smaller. None: no limit is known."""
    text_config = model.config.text_config
    limits = (getattr(text_config, "max_position_embeddings", None), sliding_window(text_config))
    return min((limit for limit in limits if limit is not None), default=None)


def end_token_ids(model: "LMFusion") -> set[int]:
    """Tokens that end a document: those of the LLM's configuration, and its tokenizer's eos."""
    configured = getattr(model.config.text_config, "eos_token_id", None)
    ids = set(configured) if isinstance(configured, (list, tuple)) else {configured}
    if model.tokenizer is not None:
        ids.add(model.tokenizer.eos_token_id)
    return {token_id for token_id in ids if token_id is not None}
