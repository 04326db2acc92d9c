"""Load on a server on this machine: latency, throughput beside a single stream, memory over time. Standard library only.

    flmm serve --addr 127.0.0.1:8080 &
    python benches/load_serve.py http://127.0.0.1:8080 --clients 32 --minutes 10

Half of the requests (--fresh) are about pictures that the server has not seen. Its prefix cache should be full soon, for
example with `--cache 64`: until then memory grows. First one client asks alone, then all at once; every client waits for its
answer before it asks again, and for Retry-After after a 429. Exit status 1 if anything but 200 and 429 was answered, or if
the medians of memory after warm-up leave ±5 % of their mean.
"""

import argparse
import asyncio
import base64
import collections
import ipaddress
import json
import pathlib
import random
import statistics
import sys
import time
import urllib.parse

PICTURES = pathlib.Path(__file__).parent.parent / "examples"
QUESTIONS = [
    "What is in the picture?",
    "Please give me a description of the image.",
    "What is in the background?",
    "Is there a dog in the picture?",
]


class Client:
    """One connection that is kept."""

    def __init__(self, host, port, key):
        self.host, self.port, self.key = host, port, key
        self.reader = self.writer = None

    async def ask(self, method, path, body=b""):
        """Status, headers and body of one request."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
        head = f"{method} {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\n"
        head += f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        self.writer.write(head.encode() + b"\r\n" + body)
        await self.writer.drain()
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        status = int(lines[0].split()[1])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        if headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int((await self.reader.readline()).strip(), 16):
                parts.append(await self.reader.readexactly(size))
                await self.reader.readexactly(2)
            await self.reader.readline()
            answer = b"".join(parts)
        else:
            answer = await self.reader.readexactly(int(headers.get("content-length", 0)))
        if headers.get("connection") == "close":
            self.close()
        return status, headers, answer

    def close(self):
        if self.writer is not None:
            self.writer.close()
            self.reader = self.writer = None


class Requests:
    """Questions about the example pictures, streamed and whole in turn."""

    def __init__(self, fresh):
        self.fresh = fresh
        self.pictures = [path.read_bytes() for path in sorted(PICTURES.glob("*.png"))]

    def next(self):
        picture = random.choice(self.pictures)
        if random.random() < self.fresh:
            # What follows the end of a PNG is not read, but makes it another file.
            picture += random.randbytes(9)
        url = "data:image/png;base64," + base64.b64encode(picture).decode()
        text = random.choice(QUESTIONS)
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 64}
        if random.random() < 0.5:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(body).encode()


def tokens(answer):
    """Tokens of an answer, streamed or whole; nothing if the stream ended in an error."""
    if answer.startswith(b"{"):
        return json.loads(answer)["usage"]["completion_tokens"]
    chunks = [line[5:] for line in answer.decode().splitlines() if line.startswith("data:")]
    if chunks[-1].strip() != "[DONE]":
        return None
    usages = [json.loads(chunk).get("usage") for chunk in chunks[:-1]]
    return next((usage["completion_tokens"] for usage in usages if usage), None)


class Tally:
    def __init__(self):
        self.statuses = collections.Counter()
        self.times = []
        self.tokens = 0
        self.broken = []


async def client(make, requests, until, tally):
    connection = make()
    while time.monotonic() < until:
        clock = time.monotonic()
        try:
            status, headers, answer = await connection.ask("POST", "/v1/chat/completions", requests.next())
        except (OSError, asyncio.IncompleteReadError) as error:
            tally.broken.append(repr(error))
            connection.close()
            await asyncio.sleep(0.1)
            continue
        tally.statuses[status] += 1
        if status == 429:
            await asyncio.sleep(float(headers["retry-after"]))
        elif status == 200:
            count = tokens(answer)
            if count is None:
                tally.broken.append(answer[-200:].decode())
            else:
                tally.tokens += count
                tally.times.append(time.monotonic() - clock)
        else:
            tally.broken.append(answer[:200].decode())
    connection.close()


async def memory(make, until):
    """Seconds since the start and resident bytes, every two seconds."""
    connection, samples, start = make(), [], time.monotonic()
    while time.monotonic() < until:
        _, _, answer = await connection.ask("GET", "/metrics")
        lines = (line.split() for line in answer.decode().splitlines())
        samples += [(time.monotonic() - start, float(line[1])) for line in lines if line[:1] == ["process_resident_memory_bytes"]]
        await asyncio.sleep(2)
    connection.close()
    return samples


async def phase(make, clients, seconds, requests):
    tally, until, clock = Tally(), time.monotonic() + seconds, time.monotonic()
    tasks = [client(make, requests, until, tally) for _ in range(clients)]
    samples, *_ = await asyncio.gather(memory(make, until), *tasks)
    return tally, samples, time.monotonic() - clock


def report(name, tally, seconds):
    times = sorted(tally.times)
    quantile = lambda share: times[min(len(times) - 1, int(share * len(times)))] if times else float("nan")
    print(
        f"{name}: {len(times)} answers in {seconds:.0f} s, {len(times) / seconds:.2f}/s, {tally.tokens / seconds:.1f} tokens/s; "
        f"p50 {quantile(0.5):.3f} s, p99 {quantile(0.99):.3f} s; statuses {dict(sorted(tally.statuses.items()))}"
    )
    for what in tally.broken[:5]:
        print(f"  broken: {what}")
    return len(times) / seconds


async def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="a loopback address")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--alone", type=float, default=30, help="seconds of the single stream before")
    parser.add_argument("--fresh", type=float, default=0.5, help="share of pictures that were not seen before")
    parser.add_argument("--key", default="")
    args = parser.parse_args()
    url = urllib.parse.urlsplit(args.url)
    if not ipaddress.ip_address(url.hostname).is_loopback:
        sys.exit("error: only a server on this machine is put under load\nhint: give an address like http://127.0.0.1:8080")
    make = lambda: Client(url.hostname, url.port or 80, args.key)
    requests = Requests(args.fresh)
    alone, _, seconds = await phase(make, 1, args.alone, requests)
    single = report("one client", alone, seconds)
    tally, samples, seconds = await phase(make, args.clients, args.minutes * 60, requests)
    many = report(f"{args.clients} clients", tally, seconds)
    print(f"throughput: {many / single:.2f} times that of a single stream" if single else "no single stream to compare with")
    flat = True
    if samples:
        # A sample may hit the buffers of a request that is being computed: medians of tenths of the time tell a trend.
        parts = [[size for at, size in samples if part <= at * 10 / seconds < part + 1] for part in range(10)]
        medians = [statistics.median(part) for part in parts if part]
        warm = medians[2:] or medians
        mean = statistics.mean(warm)
        spread = max(max(warm) - mean, mean - min(warm)) / mean
        flat = spread <= 0.05
        shown = " ".join(f"{size / 1e6:.0f}" for size in medians)
        most = max(size for _, size in samples)
        print(
            f"resident memory, MB, median of each tenth: {shown}; "
            f"after warm-up {mean / 1e6:.0f} ± {spread * 100:.1f} %; most {most / 1e6:.0f}"
        )
    bad = alone.broken + tally.broken or set(tally.statuses) - {200, 429}
    sys.exit(0 if flat and not bad else 1)


asyncio.run(main())
