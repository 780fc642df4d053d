"""A fake engine without a model: one letter of the prompt per step, an image for "#", and failures on demand."""

import threading
from dataclasses import dataclass

from PIL import Image

from lmfusion.generation.events import Done, ImageBegin, ImageEnd, ImagePreview, TextDelta

NUM_STEPS = 3


@dataclass
class Running:
    letters: list[str]
    num_prompt_tokens: int
    step: int = 0
    num_new_tokens: int = 0
    num_images: int = 0


class FakeEngine:
    """Prompts are strings. "!" fails at submission, "?" fails in a step, "*" makes the whole step fail, "." waits
    without an event, "_" is lost.

    gate: steps wait for it; `hold()` closes it.
    """

    def __init__(self, max_batch=4):
        self.max_batch = max_batch
        self.num_slots = 100
        self.requests = {}
        self.cancelled = []
        self.num_steps = 0
        self.max_running = 0
        self.gate = threading.Event()
        self.gate.set()
        self.threads = set()
        self._next = 0

    @property
    def running_ids(self):
        return list(self.requests)[: self.max_batch]

    @property
    def num_running(self):
        return len(self.running_ids)

    @property
    def num_waiting(self):
        return len(self.requests) - self.num_running

    @property
    def num_slots_used(self):
        return 10 * self.num_running

    def submit(self, prompt, options, *, index=0):
        self.threads.add(threading.get_ident())
        if "!" in prompt:
            raise ValueError("the prompt is too long; shorten it")
        self._next += 1
        self.requests[self._next] = Running(list(prompt), len(prompt))
        return self._next

    def cancel(self, request_id):
        self.threads.add(threading.get_ident())
        if self.requests.pop(request_id, None):
            self.cancelled.append(request_id)

    def step(self):
        self.gate.wait(10)
        self.threads.add(threading.get_ident())
        self.num_steps += 1
        self.max_running = max(self.max_running, self.num_running)
        events = [(request_id, Done("cancelled", 1, 2, 0, 0.1)) for request_id in self.cancelled]
        self.cancelled.clear()
        for request_id, request in list(self.requests.items())[: self.max_batch]:
            events += [(request_id, event) for event in self._advance(request_id, request)]
        return events

    def _advance(self, request_id, request):
        letter = request.letters[0] if request.letters else ""
        match letter:
            case "*":
                raise RuntimeError("the device is gone")
            case "?":
                del self.requests[request_id]
                yield self._done("error", request, "no such thing")
            case "_":
                del self.requests[request_id]
            case ".":
                pass
            case "#":
                yield from self._draw(request)
            case "":
                del self.requests[request_id]
                yield self._done("stop", request)
            case _:
                request.letters.pop(0)
                request.num_new_tokens += 1
                yield TextDelta(letter)

    def _draw(self, request):
        if request.step == 0:
            yield ImageBegin(request.num_images, 8, 8, NUM_STEPS)
        request.step += 1
        image = Image.new("L", (8, 8), 10 * request.step)
        yield ImagePreview(request.num_images, request.step, NUM_STEPS, image)
        if request.step == NUM_STEPS:
            yield ImageEnd(request.num_images, image, {"num_steps": NUM_STEPS})
            request.letters.pop(0)
            request.step = 0
            request.num_images += 1

    @staticmethod
    def _done(reason, request, error=""):
        return Done(reason, request.num_prompt_tokens, request.num_new_tokens, request.num_images, 0.1, error)
