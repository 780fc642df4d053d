"""The clients of the load test: the requests they send, how they behave, and what they log."""

import asyncio
import base64
import collections
import io
import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

MESSAGES = ("Draw a seven, then say what you drew.", "Hello!", "What is this?", "Once upon a time", "A picture, please")
SHARES = {"text": 5, "images": 4, "upload": 3, "edit": 2, "hang up": 3, "refused": 3}
"""How often each kind of request is sent, relative to the sum."""


@dataclass(frozen=True)
class PoolRequest:
    """A request of the pool."""

    kind: str
    body: dict[str, Any]
    status: int = 200


Part = str | np.ndarray
"""A part of an answer: a text, or pixels."""


@dataclass
class Log:
    """The observations of all clients."""

    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    """By "kind status"."""
    seconds: dict[str, list[float]] = field(default_factory=lambda: collections.defaultdict(list))
    first_seconds: list[float] = field(default_factory=list)
    answers: dict[int, list[tuple[list[Part], str]]] = field(default_factory=lambda: collections.defaultdict(list))
    """Parts and finish_reason, by index in the pool."""
    problems: list[str] = field(default_factory=list)
    num_previews: int = 0
    num_hung_up: int = 0


# --- requests ---


def build_pool(num_each: int, image_size: int) -> list[PoolRequest]:
    """Requests of every kind; the same ones in every run."""
    rng = random.Random(0)
    pool = []
    for i, (kind, _) in itertools.product(range(num_each), SHARES.items()):
        text = rng.choice(MESSAGES)
        body: dict[str, Any] = {"seed": i, "temperature": rng.choice([0.0, 0.8, 1.2]), "top_p": 0.95}
        images = {
            "max_tokens": rng.randint(4, 16),
            "num_steps": rng.randint(2, 12),
            "sampler": rng.choice(["ddpm", "ddim", "dpm-solver"]),
            "guidance_scale": rng.choice([1.0, 1.55, 3.0]),
        }
        content: Any = text
        if kind in ("upload", "edit"):
            content = [{"type": "image_url", "image_url": {"url": _picture(i, image_size)}}, _text_part(text)]
        if kind in ("text", "upload"):
            body |= {"max_tokens": rng.randint(4, 48), "max_images": 0}
        elif kind == "edit":
            body |= images | {"draw_first": True, "max_images": 1, "image_guidance_scale": 1.3}
        else:
            body |= images | {"min_images": (n := 1 + i % 2), "max_images": n}
        if kind in ("hang up", "images", "edit"):
            body["preview_every"] = rng.randint(1, 3)
        if kind == "hang up":
            body["num_steps"] = 60
        body["stream"] = kind == "hang up" or i % 2 == 0
        body["messages"] = [{"role": "user", "content": content}]
        pool.append(_refused(i, body) if kind == "refused" else PoolRequest(kind, body))
    return pool


def _refused(i: int, body: dict[str, Any]) -> PoolRequest:
    faults: list[tuple[int, dict[str, Any]]] = [
        (400, {"temperature": -1}),
        (400, {"steps": 3}),
        (400, {"sampler": "euler"}),
        (400, {"messages": []}),
        (400, {"messages": _user({"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}})}),
        (400, {"messages": _user({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}})}),
        (400, {"max_tokens": 10**9}),
        (404, {"model": "another"}),
        (413, {"user": "x" * 1_500_000}),
    ]
    status, fault = faults[i % len(faults)]
    return PoolRequest("refused", body | fault, status)


def _user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _picture(seed: int, size: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


# --- clients ---


async def run_client(
    http: httpx.AsyncClient, number: int, pool: Sequence[PoolRequest], end: float, log: Log, start: float
) -> None:
    """Send requests of the pool, one after the other, until `end`."""
    rng = random.Random(number)
    indices = {kind: [i for i, request in enumerate(pool) if request.kind == kind] for kind in SHARES}
    await asyncio.sleep(rng.uniform(0, start))
    while time.monotonic() < end:
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        index = rng.choice(indices[kind])
        request = pool[index]
        began = time.monotonic()
        try:
            status = await _send(http, index, request, log, rng)
        except Exception as error:  # any error is a finding
            log.problems.append(f"{kind}: {type(error).__name__}: {error}")
            await asyncio.sleep(0.2)
            continue
        log.statuses[f"{kind} {status}"] += 1
        if status == 429:
            await asyncio.sleep(rng.uniform(0.5, 1.5))
        elif status != request.status:
            log.problems.append(f"{kind}: status {status} instead of {request.status}")
        else:
            log.seconds[kind].append(time.monotonic() - began)


async def _send(http: httpx.AsyncClient, index: int, request: PoolRequest, log: Log, rng: random.Random) -> int:
    """Send one request and log its answer. Returns the status."""
    began = time.monotonic()
    async with http.stream("POST", "/v1/chat/completions", json=request.body) as response:
        if response.status_code != 200:
            error = json.loads(await response.aread())["error"]
            if not error["message"]:
                log.problems.append(f"{request.kind}: an error without a message")
            if response.status_code == 429 and "retry-after" not in response.headers:
                log.problems.append("a 429 without Retry-After")
            return response.status_code
        if not request.body["stream"]:
            log.answers[index].append(read_whole(json.loads(await response.aread())))
            return 200
        chunks = []
        left = rng.randint(1, 40) if request.kind == "hang up" else None
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if len(chunks) == 1:  # the first chunk only has the role
                log.first_seconds.append(time.monotonic() - began)
            chunks.append(line.removeprefix("data: "))
            log.num_previews += '"event":"preview"' in line
            if left is not None and len(chunks) == left:
                log.num_hung_up += 1
                return 200
    log.answers[index].append(read_stream(chunks))
    return 200


def read_whole(body: dict[str, Any]) -> tuple[list[Part], str]:
    """Parts and finish_reason of a chat.completion."""
    choice = body["choices"][0]
    parts = [
        part["text"] if part["type"] == "text" else read_image(part["image_url"]["url"])
        for part in choice["message"]["parts"]
    ]
    return parts, choice["finish_reason"]


def read_stream(chunks: Sequence[str]) -> tuple[list[Part], str]:
    """Parts and finish_reason of a streamed answer. Raises ValueError if the stream breaks off or has an error."""
    if not chunks or chunks[-1] != "[DONE]":
        raise ValueError(f"the stream broke off after {len(chunks)} chunks")
    parts: list[Part] = []
    reason = ""
    for chunk in map(json.loads, chunks[:-1]):
        if "error" in chunk:
            raise ValueError(f"the stream has an error: {chunk['error']['message']}")
        choice = chunk["choices"][0]
        reason = choice["finish_reason"] or reason
        text, image = choice["delta"].get("content"), choice["delta"].get("image", {})
        if text and parts and isinstance(parts[-1], str):
            parts[-1] += text
        elif text:
            parts.append(text)
        elif image.get("event") == "end":
            parts.append(read_image(image["url"]))
    return parts, reason


def read_image(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
