"""What a test can ask of the lab, or do to it, beside what the API can: lab.py lists it. Seconds are Proxmox VE's."""

import asyncio
import base64
import collections
import re
import socket
import time


class Orders:
    """Part of `Lab`."""

    def inventory(self):
        """All that there is of guests, by what this machine shows: a guest of which nothing is left is not in it."""
        folders = {int(path.name) for path in (self.folder / 'machines').iterdir()}
        taps = {int(name[3:]) for _, name in socket.if_nameindex() if re.fullmatch(r'tap\d+', name)}
        volumes = collections.defaultdict(list)
        for storage, about in self.storages.items():
            for name, volume in about.get('volumes', {}).items():
                volumes[volume.get('vmid')].append(f'{storage}:{name}')
        alive = {vmid for vmid, machine in self.machines.items() if machine.alive}
        templates = {vm.vmid for vm in self.vms if vm.template}
        guests = {vm.vmid: vm for vm in self.vms}
        return [{
            'vmid': vmid, 'name': guests[vmid].name if vmid in guests else None,
            'node': guests[vmid].node if vmid in guests else None, 'config': vmid in guests, 'running': vmid in alive,
            'pid': self.machines[vmid].process.pid if vmid in alive else None, 'tap': vmid in taps,
            'files': sorted(str(path) for path in self.place(vmid).rglob('*') if path.is_file()), 'volumes': volumes[vmid],
        } for vmid in sorted((folders | taps | alive | set(guests) | set(volumes)) - templates)]

    def fault(self, kind):
        for fault in self.faults:
            if fault['kind'] == kind:
                fault['times'] -= 1
                if fault['times'] <= 0:
                    self.faults.remove(fault)
                return fault
        return None

    def fail_task(self, kind, exitstatus, after=0, times=1, acted=None):
        acted = exitstatus.startswith('WARNINGS') if acted is None else acted
        self.faults.append({'kind': kind, 'exitstatus': exitstatus, 'after': after, 'times': times, 'acted': acted})

    async def hold_storage(self, storage, seconds):
        shared = self.storages[storage].get('shared')
        turns = [self.turns[storage, node] for node in ([None] if shared else self.nodes)]
        for turn in turns:
            await turn.acquire()

        async def later():
            await self.pause(seconds)
            for turn in turns:
                turn.release()
        asyncio.ensure_future(later())

    def set_space(self, storage, free):
        self.storages[storage]['avail'] = free

    def silence_agent(self, vmid, seconds):
        self.machines[vmid].silent_until = time.monotonic() + seconds * self.time_scale

    async def kill_machine(self, vmid):
        self.machines[vmid].process.kill()
        await self.machines[vmid].ended(None)

    async def inside(self, vmid, *command):
        """What a command says that root runs inside."""
        machine = self.machines[vmid]
        order = {'path': command[0], 'arg': list(command[1:]), 'capture-output': True}
        started = await machine.ask_agent('guest-exec', order)
        while True:
            status = await machine.ask_agent('guest-exec-status', {'pid': started['pid']})
            if status['exited']:
                words = [base64.b64decode(status.get(name, '')).decode() for name in ('out-data', 'err-data')]
                return {'code': status.get('exitcode'), 'out': words[0], 'err': words[1]}
            await asyncio.sleep(0.1)

    async def unreachable(self, seconds):
        """Nothing listens, and what was connected is cut off. What had begun goes on."""
        for site in list(self.runner.sites):
            await site.stop()
        for connection in list(self.runner.server.connections):
            connection.transport.abort()
        running = self.runner

        async def later():
            await self.pause(seconds)
            await self.start(*self.certificate)
            await running.cleanup()
        asyncio.ensure_future(later())
