"""A picture of the server's live page while a mixed load runs: docs/serve.png.

python -m bench.serve_page
"""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.workloads import load_workload
from effinfer.models import recursive_demo_path
from effinfer.serve import ServedModel, ServeSettings
from tests.serve.browser import Browser
from tests.serve.running import RunningServer

OUT = Path(__file__).parents[1] / "docs" / "serve.png"
PROMPT = "The :mod:`json` module encodes Python objects as text."
SECONDS = 45


def main() -> None:
    settings = ServeSettings(model_name="demo-recursive")
    served = ServedModel(recursive_demo_path(), mode="exit", max_slots=12, threads=1)
    requests = itertools.cycle(load_workload("mixed"))
    over = threading.Event()
    with RunningServer(served.app(settings), settings) as server, ThreadPoolExecutor(18) as pool:

        def client() -> None:
            while not over.is_set():
                shape = next(requests)
                prompt = (PROMPT * 8)[: 2 * shape.prompt]
                server.complete(prompt, max_tokens=shape.output)

        for _ in range(18):
            pool.submit(client)
        with tempfile.TemporaryDirectory() as profile, Browser(profile) as browser:
            browser.open(server.url)
            browser.until("model !== null")
            time.sleep(SECONDS - 5)  # the curve over some time
            browser.evaluate("$('go').click()")
            time.sleep(5)
            browser.screenshot(OUT)
        over.set()
    print(OUT)


if __name__ == "__main__":
    main()
