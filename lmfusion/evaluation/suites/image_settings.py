"""Options of image generation in the configuration of a suite, checked before a model is loaded."""

from typing import Any

from lmfusion.generation.options import SAMPLERS, GenerationOptions, Limits
from lmfusion.utils.config_values import short_repr

FIELDS = ("guidance_scale", "image_guidance_scale", "sampler", "num_steps", "seed")
"""Fields of a configuration that are options of `LMFusion.draw`. A suite need not have all of them."""


def sampling_options(config: Any) -> dict[str, Any]:
    """Keyword arguments of `LMFusion.draw` from the fields that `config` has."""
    return {name: getattr(config, name) for name in FIELDS if hasattr(config, name)}


def image_options(config: Any, section: str, **changes: Any) -> GenerationOptions:
    """The options of one image. changes: values that replace those of `config`.

    Raises ValueError, naming section.key, for an unknown sampler and for numbers out of range.
    """
    values = sampling_options(config) | changes
    if values["sampler"] not in SAMPLERS:
        raise ValueError(f"{section}.sampler must be one of {', '.join(SAMPLERS)}, got {short_repr(values['sampler'])}")
    try:
        options = GenerationOptions(draw_first=True, max_images=1, max_new_tokens=0, **values)
        Limits().check(options)
    except ValueError as error:
        raise ValueError(f"{section}.{error}") from error
    return options
