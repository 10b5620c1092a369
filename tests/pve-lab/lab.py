"""The PVE lab: a Proxmox VE API with real virtual machines behind it, for tests. It is a lab, and not Proxmox VE.

    python lab.py CONFIG.json

The API is fakepve 0.5.0 (a test tool under the AGPL: installed by the test run, never shipped, and nothing of it is here), the
machines are QEMU under software emulation; pve.py says what of the behaviour is whose. It runs where the bridge is: in a network
namespace of the caller's, such as network.sh makes. It ends with its standard input, and its machines with it, even if it is
killed.

CONFIG.json (optional ones with their default):
    address "127.0.0.1", port 0      where to listen; with 0 the system chooses
    cert, key                        PEM files: what it shows to clients
    run_folder                       everything it writes
    keep_state false                 whether guests outlive it: not running, their locks held; else it clears the folder away
    bridge "vmbr2"                   the templates'; a guest is on that of its settings, by a device tap<vmid>
    time_scale 1.0                   real seconds of one of Proxmox VE's, for waits and delays; machines take the time they take
    nodes [{name, memory_mib, cores}]                   pve1, pve2, pve3 of 16 GiB
    storages [{name, size_gib, type "lvmthin", shared}] and any other setting of a storage
    templates [{vmid, name, node, image, storage "local-lvm", config {}, firewall}]     image: an image folder; config: further
                                     settings; firewall: a file as in /etc/pve/firewall, which turns the cluster's firewall on
    ip_sets {}                       {name: [address]}: members of the IP sets of such a file, instead of its own
    pools [name]
    tokens [{id, secret, acl [{path, privileges}]}]     without acl: may do anything
    delays {}                        seconds: of a task by its kind (qmclone, qmstart, qmstop, qmdestroy…), "allocate" on a
                                     storage, "agent" that is silent after a start, "call" before each answer

The first line on standard output is {"port": …}. Then each line on standard input is an order, answered by one line,
{"ok": …} or {"error": …}:
    {"do": [method, arguments…]}     a public method of fakepve's class FakePve, or one of the lab's:
        inventory                    [{vmid, name, node, config, running, pid, tap, files, volumes}]: all that is left of guests
        fail_task kind words [after [times [acted]]]    the next task of the kind ends with this exit status, after seconds;
                                     acted: with its deed done (as is one with "WARNINGS: 1")
        hold_config_lock vmid seconds                   (fakepve's) of a template: its clones wait 1 s and fail
        unlock vmid                  (fakepve's) what an administrator does to a guest whose lock a dead task holds
        hold_storage storage seconds                    allocations on it wait 10 s and fail
        set_space storage bytes      what is free on it
        silence_agent vmid seconds   its agent "is not running"
        kill_machine vmid            QEMU dies by itself
        inside vmid command…         runs it in the guest, through the guest agent: {code, out, err}
        set_node_offline node [true] (fakepve's) its calls are answered with 595; its machines go on
        migrate vmid node seconds    (fakepve's) as if an administrator had
        unreachable seconds          nothing listens
    {"set": [of, attribute, value]}  of "pve" or "vm 100"
    {"get": [of, attribute]}         "pve" has most_clones: so many were made at once
    {"requests": true}               every request: [method, path, body]
Seconds are Proxmox VE's; but a guest has as much real time to shut down as the call gives it.
"""

import asyncio
import inspect
import json
import sys

from pve import Lab


def thing(lab, name):
    return lab if name == 'pve' else lab.vm(int(name.split()[1]))


async def obey(lab, order):
    if 'do' in order:
        name, *arguments = order['do']
        done = getattr(lab, name)(*arguments)
        return await done if inspect.isawaitable(done) else done
    if 'set' in order:
        name, attribute, value = order['set']
        return setattr(thing(lab, name), attribute, value)
    if 'get' in order:
        name, attribute = order['get']
        return getattr(thing(lab, name), attribute)
    return [[method, path, body.decode()] for method, path, body in lab.requests]


async def main(path):
    # fakepve keeps no reference to its workers, and the event loop only weak ones: a collected task never ends.
    kept = set()

    def keep(loop, coroutine, **options):
        task = asyncio.Task(coroutine, loop=loop, **options)
        kept.add(task)
        task.add_done_callback(kept.discard)
        return task

    loop = asyncio.get_running_loop()
    loop.set_task_factory(keep)
    with open(path) as file:
        config = json.load(file)
    lab = Lab(config)
    await lab.open(config)
    print(json.dumps({'port': lab.port}), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        try:
            answer = {'ok': await obey(lab, json.loads(line))}
        except Exception as error:  # The test shows it.
            answer = {'error': repr(error)}
        print(json.dumps(answer, default=str), flush=True)
    await lab.close()


asyncio.run(main(*sys.argv[1:]))
