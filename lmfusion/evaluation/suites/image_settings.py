"""How is an image of a suite drawn? The fields of its configuration that say so, checked before a model is loaded."""

from typing import Any

from lmfusion.generation.options import SAMPLERS, GenerationOptions, Limits
from lmfusion.utils.config_values import short_repr

FIELDS = ("guidance_scale", "image_guidance_scale", "sampler", "num_steps", "seed")
"""Of a suite's configuration, which need not have all of them."""


def drawing_values(config: Any) -> dict[str, Any]:
    """The options of `LMFusion.draw` that `config` has."""
    return {name: getattr(config, name) for name in FIELDS if hasattr(config, name)}


def image_options(config: Any, section: str, **changes: Any) -> GenerationOptions:
    """The options of one image, `changes` in the place of what `config` has.

    Raises ValueError, naming section.key, for an unknown sampler and for numbers out of range.
    """
    values = drawing_values(config) | changes
    if values["sampler"] not in SAMPLERS:
        raise ValueError(
            f"{section}.sampler is {short_repr(values['sampler'])}; it must be one of {', '.join(SAMPLERS)}"
        )
    try:
        options = GenerationOptions(draw_first=True, max_images=1, max_new_tokens=0, **values)
        Limits().check(options)
    except ValueError as error:
        raise ValueError(f"{section}.{error}") from error
    return options
