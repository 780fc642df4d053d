"""Reads images in data URLs: `data:image/png;base64,...`, as RFC 2397 defines them."""

import base64
import binascii

_SCHEME = "data:"


def is_data_url(text: str) -> bool:
    return text[: len(_SCHEME)].lower() == _SCHEME


def data_url_bytes(url: str) -> bytes:
    """The bytes in a data URL. The base64 may have line breaks and other white space between its characters.

    The media type is not checked: which format an image has is read from its bytes. Raises ValueError for anything that
    is not a data URL in base64, and for base64 that is damaged or lacks its padding.
    """
    header, comma, data = url.partition(",")
    if not (is_data_url(url) and comma and header.lower().endswith(";base64")):
        raise ValueError(f"a data URL must be like data:image/png;base64,..., got {url[:40]!r}")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters outside ASCII
        raise ValueError(f"the data URL must have valid base64: {error}") from None
