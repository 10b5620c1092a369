#!/usr/bin/python3
"""An SSH server for tests, as this user: it runs what it is told to run, and ends with its standard input.

    ssh_server.py FOLDER ADDRESS    FOLDER has `host_key` and `authorized_keys`; says its port
"""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE

import asyncssh


async def run(process):
    child = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        process.command,
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        start_new_session=True,
    )
    said = asyncio.ensure_future(copy(process.stdin, child.stdin))
    heard = asyncio.gather(copy(child.stdout, process.stdout), copy(child.stderr, process.stderr), child.wait())
    hung_up = asyncio.ensure_future(process.channel.wait_closed())
    await asyncio.wait({heard, hung_up}, return_when=asyncio.FIRST_COMPLETED)
    said.cancel()
    if heard.done():
        # Before the end of its output is sent: OpenSSH closes the channel then.
        process.exit(child.returncode)
    else:
        # What runs for a connection ends with it.
        os.killpg(child.pid, signal.SIGKILL)


async def copy(reader, writer):
    try:
        while piece := await reader.read(1 << 16):
            writer.write(piece)
            await writer.drain()
        if isinstance(writer, asyncio.StreamWriter):
            writer.close()
    except (BrokenPipeError, ConnectionResetError):
        pass


async def main(folder, address):
    server = await asyncssh.listen(
        address,
        0,
        server_host_keys=[f"{folder}/host_key"],
        authorized_client_keys=f"{folder}/authorized_keys",
        process_factory=run,
        encoding=None,
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)
    # Without waiting for anything.
    os._exit(0)


asyncio.run(main(*sys.argv[1:]))
