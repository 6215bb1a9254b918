"""Pass on what comes to a port to another host; ``relay.py PORT HOST PORT`` prints each caller."""

from __future__ import annotations

import asyncio
import contextlib
import sys


async def copy(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65536):
            to.write(data)
            await to.drain()
    to.close()


async def main(port: int, host: str, at: int) -> None:
    async def passed_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        print(writer.get_extra_info("peername")[0], flush=True)
        far_reader, far_writer = await asyncio.open_connection(host, at)
        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

    await (await asyncio.start_server(passed_on, "0.0.0.0", port)).serve_forever()


asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
