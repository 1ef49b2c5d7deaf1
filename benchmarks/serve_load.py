"""Load on a running server: requests a second and time to the first image row, one client against many; and a soak.

    python -m ivr_jax.serve --checkpoint=micro &
    python benchmarks/serve_load.py --url=http://127.0.0.1:8322 --clients=16 --requests=48
    python benchmarks/serve_load.py --url=http://127.0.0.1:8322 --soak=600

The first form sends the same requests (same prompts and seeds) one after the other, then `clients` at a time, and
compares the answers of both.  The second connects, stops and vanishes at random for so many seconds, then says how many
slots are in use and how the server's memory went.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import random
import statistics
import time

import httpx2

PROMPTS = (
    "Put a red circle at b2.",
    "Put a red circle at b2. Put a blue square at a1.",
    "Put a red circle at b2. Put a blue square at a1. Swap b2 with a1.",
)


def draw(url: str, number: int) -> tuple[float, float, str]:
    """Seconds to the first row and to the end of one streamed answer, and the image it ended in."""
    body = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, "stream": True, "partial_images": 100}
    clock, first, image = time.perf_counter(), 0.0, ""
    with httpx2.stream("POST", f"{url}/v1/images/generations", json=body, timeout=600) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if line.startswith("data: "):
                event = json.loads(line[6:])
                assert "error" not in event, event
                first = first or time.perf_counter() - clock
                image = event["b64_json"]
    return first, time.perf_counter() - clock, image


def load(url: str, clients: int, requests: int) -> None:
    """Prints throughput with one client and with `clients`."""
    draw(url, 0)  # compiles, where nobody has asked before
    rates, answers = {}, {}
    for count in (1, clients):
        clock = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            found = list(pool.map(lambda number: draw(url, number), range(requests)))
        seconds = time.perf_counter() - clock
        rates[count], answers[count] = requests / seconds, [image for _, _, image in found]
        firsts, totals = ([row[i] for row in found] for i in (0, 1))
        print(f"{count:3d} clients: {rates[count]:.2f} requests/s, first row after {statistics.median(firsts):.2f} s "
              f"(median; most {max(firsts):.2f}), whole answer {statistics.median(totals):.2f} s")  # fmt: skip
    same = sum(one == many for one, many in zip(answers[1], answers[clients], strict=True))
    print(f"throughput {rates[clients] / rates[1]:.2f} times that of one client; {same} of {requests} answers the same")


def metric(url: str, name: str) -> float:
    lines = httpx2.get(f"{url}/metrics", timeout=60).text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)


def soak(url: str, seconds: float, clients: int) -> None:
    """Clients that stay, stop or vanish; prints memory every tenth of the time, and what is in use at the end."""
    until = time.monotonic() + seconds

    def wander(seed: int) -> int:
        rng, count = random.Random(seed), 0
        while time.monotonic() < until:
            body = {"messages": [{"role": "user", "content": rng.choice(PROMPTS)}], "seed": rng.randrange(1000),
                    "stream": True, "mode": rng.choice(["auto", "direct", "reflection", "multi_step"])}  # fmt: skip
            patience = rng.choice([0.05, 0.5, 1e9])
            clock = time.monotonic()
            try:
                with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
                    for _ in reply.iter_bytes():
                        if time.monotonic() - clock > patience:
                            break
            except httpx2.HTTPError:
                pass
            count += 1
        return count

    with concurrent.futures.ThreadPoolExecutor(clients + 1) as pool:
        wanderers = [pool.submit(wander, seed) for seed in range(clients)]
        while time.monotonic() < until:
            time.sleep(seconds / 10)
            memory = metric(url, "process_resident_memory_bytes") / 2**20
            print(f"{seconds - (until - time.monotonic()):6.0f} s: {memory:.0f} MiB resident", flush=True)
        asked = sum(one.result() for one in wanderers)
    time.sleep(15)
    print(f"{asked} clients came; slots in use {metric(url, 'ivr_slots_in_use'):.0f}, waiting "
          f"{metric(url, 'ivr_waiting'):.0f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8322")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--soak", type=float, default=0.0, help="seconds; 0 measures throughput instead")
    given = parser.parse_args()
    if given.soak:
        soak(given.url, given.soak, given.clients)
    else:
        load(given.url, given.clients, given.requests)


if __name__ == "__main__":
    main()
