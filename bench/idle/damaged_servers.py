"""Servers with a loaded model whose file is damaged: `/api/show` answers 500, as Ollama does.

`python -m bench.idle.damaged_servers PORT …`: one server on each port, in one process.
"""

from __future__ import annotations

import asyncio
import json
import sys

_MODEL = {"name": "damaged:latest", "model": "damaged:latest", "digest": "d" * 64, "size": 2**31, "size_vram": 2**31}
_ANSWERS = {
    "/api/version": (200, {"version": "0.34.0"}),
    "/api/tags": (200, {"models": [_MODEL]}),
    "/api/ps": (200, {"models": [{**_MODEL, "context_length": 4096}]}),
    "/api/show": (500, {"error": "unable to read the model's file"}),
}


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            length = next((int(line[15:]) for line in lines if line.lower().startswith("content-length:")), 0)
            await reader.readexactly(length)
            status, document = _ANSWERS.get(lines[0].split(" ")[1], (404, {"error": "not found"}))
            body = json.dumps(document).encode()
            writer.write(b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                         % (status, len(body), body))  # fmt: skip
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def _main() -> None:
    servers = [await asyncio.start_server(_serve, "127.0.0.1", int(port)) for port in sys.argv[1:]]
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    asyncio.run(_main())
