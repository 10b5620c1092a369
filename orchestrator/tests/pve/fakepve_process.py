"""Serves an unmodified fakepve and does to it what a test says, one JSON line at a time.

    python fakepve_process.py CERT KEY TIME_SCALE

On standard input: {"do": ["name", arguments…]} calls a method of the documented class FakePve, {"set": ["vm 100", "name",
value]} sets a documented attribute (of "pve" or of a guest), {"update": ["name", [arguments…], {…}]} changes the dictionary
that a documented method returns, {"get": ["vm 100", "name"]} and {"requests": true} ask. Each is answered by one line. It ends with its
standard input, so that nothing is left of a test that died.

fakepve is a test tool under the AGPL: installed by the test run, never shipped, and nothing of it is here.
"""

import asyncio
import inspect
import json
import sys

from fakepve import FakePve


def thing(pve, name):
    return pve if name == 'pve' else pve.vm(int(name.split()[1]))


async def obey(pve, order):
    if 'do' in order:
        name, *arguments = order['do']
        done = getattr(pve, name)(*arguments)
        if inspect.isawaitable(done):
            await done
        return None
    if 'set' in order:
        name, attribute, value = order['set']
        setattr(thing(pve, name), attribute, value)
        return None
    if 'update' in order:
        name, arguments, values = order['update']
        return getattr(pve, name)(*arguments).update(values)
    if 'get' in order:
        name, attribute = order['get']
        return getattr(thing(pve, name), attribute)
    return [[method, path, body.decode()] for method, path, body in pve.requests]


async def main(cert, key, scale):
    # fakepve keeps no reference to its workers, and the event loop only weak ones: a collected task never ends.
    kept = set()

    def keep(loop, coroutine, **options):
        task = asyncio.Task(coroutine, loop=loop, **options)
        kept.add(task)
        task.add_done_callback(kept.discard)
        return task

    loop = asyncio.get_running_loop()
    loop.set_task_factory(keep)
    pve = FakePve(host='127.0.0.1', port=0)
    pve.time_scale = float(scale)
    await pve.start(cert, key)
    print(pve.port, flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        try:
            answer = {'ok': await obey(pve, json.loads(line))}
        except Exception as error:  # The test shows it.
            answer = {'error': repr(error)}
        print(json.dumps(answer), flush=True)
    await pve.stop()


asyncio.run(main(*sys.argv[1:]))
