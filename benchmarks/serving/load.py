"""Load test of `lmfusion serve`: many clients at once, for minutes, some of which misbehave; every answer is checked.

    python -m benchmarks.serving.load                                  50 clients for 120 s on a tiny random model
    python -m benchmarks.serving.load --clients 8 --seconds 10
    python -m benchmarks.serving.load --model runs/demo/run/model --output runs/serve_load.json

Starts the server as its own process on the loopback device, and ends it. Clients choose from a pool of requests: text,
text with forced images, questions about and edits of an uploaded image, whole or streamed with previews. Some hang up
in the middle of an answer or image, some send requests that must be refused. The queue is short on purpose. Checks:

    errors    none except 429, and bad requests get their status
    memory    resident memory of the server in the last quarter of the time is within 3 % of the second quarter
    results   every finished answer equals the answer to the same request sent alone afterwards: texts exactly, images
              exactly or at most 1/255 apart (both are counted)
    leaks     at the end no request runs or waits, and no cache slot is in use
    end       SIGTERM ends the server with exit code 0

Prints a table, writes it as JSON (--output), and exits with 1 if a check failed.
"""

import argparse
import asyncio
import collections
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.serving.clients import Log, Part, PoolRequest, build_pool, read_whole, run_client

ROOT = Path(__file__).resolve().parents[2]
MAX_CLIENTS, MAX_SECONDS = 200, 1800
MAX_BATCH, MAX_WAITING = 24, 16
"""Of the server. Together fewer than 50, so that the queue is full now and then."""
MAX_GROWTH = 0.03
START_SECONDS, REQUEST_SECONDS = 180, 120


@contextmanager
def served(model: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server's process and its URL. The server is killed at the end."""
    command = [sys.executable, "-m", "lmfusion", "serve", str(model), "--port", "0", "--name", "loaded"]
    command += ["--max-batch", str(MAX_BATCH), "--max-waiting", str(MAX_WAITING), "--max-body-mb", "1"]
    command += ["--dtype", "float32"]  # so that a batch gives the same tokens as a single request
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            yield process, _wait_for_url(process)
        except BaseException:
            errors.seek(0)
            print(errors.read()[-4000:], file=sys.stderr)
            raise
        finally:
            process.kill()
            process.wait()


def _wait_for_url(process: subprocess.Popen[str]) -> str:
    """The URL that the server prints. Raises RuntimeError if it ends instead."""
    assert process.stdout is not None
    watch = time.monotonic()
    for line in process.stdout:
        if found := re.search(r"http://\S+", line):
            return found[0]
        if time.monotonic() - watch > START_SECONDS:
            break
    raise RuntimeError("the server did not start")


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS:"))) / 1024


async def sample_memory(pid: int, seconds: float, samples: list[float]) -> None:
    """Sample every 5 seconds, or twenty times if the test is shorter than that."""
    while True:
        samples.append(resident_mib(pid))
        await asyncio.sleep(min(5.0, seconds / 20))


def read_metrics(text: str) -> dict[str, float]:
    rows = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name.removeprefix("lmfusion_"): float(value) for name, value in rows}


@dataclass
class Equality:
    """How many finished answers equal the answer to the same request alone."""

    num_answers: int = 0
    num_texts: int = 0
    num_images: int = 0
    num_close_images: int = 0
    """Images that differ, by at most 1/255 in every pixel."""
    num_different: int = 0


def compare(answers: Sequence[tuple[list[Part], str]], alone: tuple[list[Part], str], counts: Equality) -> None:
    """Compare each of `answers` to one request with the answer that it got alone."""
    for parts, reason in answers:
        counts.num_answers += 1
        same = reason == alone[1] and len(parts) == len(alone[0])
        for part, other in zip(parts, alone[0], strict=False):
            if isinstance(part, str) or isinstance(other, str):
                same &= isinstance(part, str) and isinstance(other, str) and part == other
                counts.num_texts += 1
                continue
            counts.num_images += 1
            apart = np.abs(part.astype(int) - other.astype(int)).max() if part.shape == other.shape else 255
            counts.num_close_images += int(apart == 1)
            same &= bool(apart <= 1)
        counts.num_different += not same


def growth_of(samples: Sequence[float]) -> float:
    """The relative growth from the second to the last quarter."""
    quarter = len(samples) // 4
    return statistics.mean(samples[-quarter:]) / statistics.mean(samples[quarter : 2 * quarter]) - 1


async def load(
    url: str, pid: int, pool: Sequence[PoolRequest], num_clients: int, seconds: float
) -> tuple[Log, list[float], Equality, dict[str, float], dict[str, float]]:
    """Run all clients, then send every answered request again alone."""
    log, samples, equality = Log(), [], Equality()
    limits = httpx.Limits(max_connections=num_clients + 2, max_keepalive_connections=num_clients)
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_SECONDS, limits=limits, trust_env=False) as http:
        end = time.monotonic() + seconds
        memory = asyncio.create_task(sample_memory(pid, seconds, samples))
        await asyncio.gather(*(run_client(http, i, pool, end, log, min(1.0, seconds / 10)) for i in range(num_clients)))
        memory.cancel()
        after = read_metrics((await http.get("/metrics")).text)
        for index, answers in sorted(log.answers.items()):
            response = await http.post("/v1/chat/completions", json=pool[index].body | {"stream": False})
            response.raise_for_status()
            compare(answers, read_whole(response.json()), equality)
        await asyncio.sleep(0.2)
        final = read_metrics((await http.get("/metrics")).text)
    return log, samples, equality, after, final


def run(model: Path, num_clients: int, seconds: float, image_size: int) -> dict[str, Any]:
    """The results as one JSON object; "failed" lists the checks that failed."""
    pool = build_pool(40, image_size)
    with served(model) as (process, url):
        log, samples, equality, after, final = asyncio.run(load(url, process.pid, pool, num_clients, seconds))
        process.send_signal(signal.SIGTERM)
        try:
            exit_code: int | None = process.wait(60)
        except subprocess.TimeoutExpired:
            exit_code = None
    leaks = {name: final[name] for name in ("requests_running", "requests_waiting", "cache_slots_used")}
    growth = growth_of(samples)
    checks = {
        "errors": not log.problems,
        "memory": growth <= MAX_GROWTH,
        "results": equality.num_different == 0 and equality.num_answers > 0,
        "leaks": not any(leaks.values()) and final["engine_up"] == 1,
        "end": exit_code == 0,
    }
    return {
        "clients": num_clients,
        "seconds": seconds,
        "statuses": dict(sorted(log.statuses.items())),
        "hung_up": log.num_hung_up,
        "previews": log.num_previews,
        "latency_s": {kind: quantiles(values) for kind, values in sorted(log.seconds.items())},
        "first_event_s": quantiles(log.first_seconds),
        "tokens_per_s": round(after["new_tokens_total"] / seconds, 1),
        "images_per_s": round(after["images_total"] / seconds, 2),
        "denoise_steps_per_s": round(after["denoise_steps_total"] / seconds, 1),
        "memory_mib": [round(sample, 1) for sample in samples],
        "memory_growth": round(growth, 4),
        "equality": vars(equality),
        "leaks": leaks,
        "exit_code": exit_code,
        "problems": collections.Counter(log.problems).most_common(20),
        "failed": [name for name, passed in checks.items() if not passed],
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    if not values:
        return {}
    ordered = sorted(values)
    return {name: round(ordered[int(share * (len(ordered) - 1))], 3) for name, share in (("p50", 0.5), ("p95", 0.95))}


def table(found: dict[str, Any]) -> str:
    equality, rows = found["equality"], found["statuses"].items()
    lines = [f"{found['clients']} clients, {found['seconds']:.0f} s", ""]
    lines += [f"  {name:16} {number:7}" for name, number in rows]
    lines += ["", f"  hung up          {found['hung_up']:7}", f"  previews         {found['previews']:7}", ""]
    for kind, times in (*found["latency_s"].items(), ("first event", found["first_event_s"])):
        lines.append(f"  {kind:16} " + "  ".join(f"{name} {value:.3f} s" for name, value in times.items()))
    lines += ["", f"  {found['tokens_per_s']} tokens/s, {found['images_per_s']} images/s"]
    low, high = min(found["memory_mib"]), max(found["memory_mib"])
    lines.append(f"  memory {low:.0f} to {high:.0f} MiB, last quarter {found['memory_growth']:+.2%} of the second")
    lines.append(
        f"  {equality['num_answers']} answers compared with the same request alone: {equality['num_texts']} texts and "
        f"{equality['num_images']} images, {equality['num_close_images']} of them 1/255 apart; "
        f"{equality['num_different']} answers differ"
    )
    lines += [f"  {number} x {problem}" for problem, number in found["problems"]]
    lines += ["", f"FAILED: {', '.join(found['failed'])}" if found["failed"] else "all checks passed"]
    return "\n".join(lines)


def build_model(folder: Path) -> Path:
    """Save a tiny random model in `folder`: 2 layers, width 32, images of 8 x 8 pixels. A step takes about 1 ms."""
    import torch

    from benchmarks.harness.tiny_model import build_tokenizer, save_llama
    from lmfusion.model.modeling import LMFusion

    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    save_llama(folder / "llm", tokenizer)
    image = {"hidden_size": 16, "patch_coder": {"kind": "linear"}}
    model = LMFusion.from_llm(folder / "llm", image, codec={"kind": "pixels", "channels": 1, "image_size": 8})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # parameters that start at zero must have an effect
        for parameter in model.image.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder / "model", parts="all")
    return folder / "model"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a chat model (default: a tiny random one)")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--image-size", type=int, default=8, help="pixels per side of the images sent (default: 8)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    if not 1 <= args.clients <= MAX_CLIENTS or not 2 <= args.seconds <= MAX_SECONDS:
        parser.error(
            f"--clients must be 1 to {MAX_CLIENTS} and --seconds 2 to {MAX_SECONDS}, "
            f"got {args.clients} and {args.seconds:g}"
        )
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(Path(folder)) if args.model is None else args.model
        found = run(model, args.clients, args.seconds, args.image_size)
    print(table(found))
    if args.output is not None:
        from benchmarks.harness.machine import benchmark_device, describe

        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({**describe(benchmark_device()), **found}, indent=1) + "\n")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
