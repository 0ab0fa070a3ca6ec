"""An EMULATED vLLM: `python -m tests.support.emulated_engine --name N --port P --bytes B --start-seconds S [--dies]`.

It takes its memory on every GPU it sees at once, as vLLM does, and is ready only later. Without that memory it exits
with vLLM's words. It answers with the pid of its process, so that a test sees which server answered.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

from router.lab.emulator.prepare import DIRECTORY_VARIABLE
from router.lab.emulator.vram import OutOfMemoryError, allocate
from tests.support.openai_server import delta, event, finish, usage


async def _chat(request: web.Request) -> web.StreamResponse:
    body: Any = await request.json()
    if request.app["dies"]:
        os._exit(3)
    if not body.get("stream"):
        message = {"role": "assistant", "content": str(os.getpid())}
        return web.json_response({"choices": [{"message": message, "finish_reason": "stop"}]})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for each in (delta(content=str(os.getpid())), finish("stop"), usage(1, 1), b"[DONE]"):
        await response.write(event(each))
    return response


async def _health(request: web.Request) -> web.StreamResponse:
    is_up = asyncio.get_running_loop().time() >= request.app["ready_at"]
    return web.Response(status=200 if is_up else 503)


async def _serve(given: argparse.Namespace) -> None:
    app = web.Application()
    app["ready_at"] = asyncio.get_running_loop().time() + given.start_seconds
    app["dies"] = given.dies
    app.router.add_get("/health", _health)
    app.router.add_post("/v1/chat/completions", _chat)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", given.port).start()
    await asyncio.Event().wait()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name")
    parser.add_argument("--port", type=int)
    parser.add_argument("--bytes", type=int)
    parser.add_argument("--start-seconds", type=float, default=0.0)
    parser.add_argument("--dies", action="store_true", help="on the first request")
    given = parser.parse_args()
    held: int = given.bytes
    gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    try:
        allocate(Path(os.environ[DIRECTORY_VARIABLE]), dict.fromkeys(gpus, held))
    except OutOfMemoryError as error:
        sys.stderr.write(f"ValueError: No available memory for the cache blocks: {error}\n")
        return 1
    asyncio.run(_serve(given))
    return 0


if __name__ == "__main__":
    sys.exit(main())
