"""`transformers serve` with a cache of kvplug, asked by an OpenAI client.

`kvplug run --cache int4 -- transformers serve MODEL` gives every request that names no cache
`int4`; a request may name another in its `generation_config`. What cannot be is answered by 400
and the reason. The server listens on this machine only, answers four requests, and is stopped.
Printed: the command, the answers, and what the server said of kvplug.

    python examples/serve_openai.py [--tiny] [--model ID] [--cache int4] [--port 8123]
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai
from common import folder, options

ASKED = [{"role": "user", "content": "What is the capital of France?"}]
NAMES = (None, "window(length=64)", "kvplug:static", "imt4")  # the last is misspelt


def wait(client: openai.OpenAI, server: subprocess.Popen, seconds: int = 300) -> None:
    """Until the server answers; RuntimeError where it does not."""
    for _ in range(seconds):
        try:
            client.models.list()
        except openai.APIConnectionError:
            if server.poll() is not None:
                break
            time.sleep(1)
        else:
            return
    raise RuntimeError("the server did not start")


def ask(client: openai.OpenAI, model: str, cache: str | None, streamed: bool) -> str:
    """One answer, or what the server said instead."""
    config = {"max_new_tokens": 20, "do_sample": False, "cache_implementation": cache}
    given = {"generation_config": json.dumps(config)} if cache else {"temperature": 0.0}
    request = {"model": model, "messages": ASKED, "max_tokens": 20, "extra_body": given}
    try:
        if not streamed:
            return client.chat.completions.create(**request).choices[0].message.content
        chunks = client.chat.completions.create(**request, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    except openai.APIStatusError as e:
        return f"{e.status_code} {e.body['message'] if e.body else e.message}"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--cache", default="int4", help="of requests that name none")
    parser.add_argument("--port", type=int, default=8123)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model, log = folder(args, scratch), Path(scratch) / "log"
        command = ["transformers", "serve", model, "--host", "127.0.0.1", "--port", str(args.port)]
        start = [sys.executable, "-m", "kvplug", "run", "--cache", args.cache, "--", *command]
        with log.open("w") as file:
            server = subprocess.Popen(
                start, stdout=file, stderr=file, env=os.environ | {"HF_HUB_OFFLINE": "1"}
            )
        url = f"http://127.0.0.1:{args.port}/v1"
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
        try:
            wait(client, server)
            for name in NAMES:
                answer = ask(client, model, name, streamed=name is None)
                print(f"{name or 'no cache named':<20} {answer!r}")
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)
            said = [line for line in log.read_text().splitlines() if "kvplug run" in line]
            print("\n".join(said).replace(model, "MODEL"))


if __name__ == "__main__":
    main()
