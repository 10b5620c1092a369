"""One machine of the lab: its disk, its cloud-init drive, its QEMU process, and the two lines to it, QMP and the guest agent.

It is given a guest's settings as Proxmox VE writes them, and knows nothing else of Proxmox VE. Promises:

* All of a machine is in its folder, but for its tap device, which lives as long as QEMU does.
* QEMU ends with the lab, however the lab ends.
* The image is never written.
"""

import asyncio
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.parse

# Software emulation on a machine that others need too, whatever the settings ask for.
MOST_CORES = 2
# Translated code, outside of the guest's memory. Without a limit three guests take more than their memory together.
TRANSLATION_MIB = 128
# A file that the guest agent reads comes as one line.
LONGEST_LINE = 64 << 20
# Seconds: for QEMU to answer after its start, to end after `quit`, and for the guest agent to show that it is there.
START_PATIENCE, STOP_PATIENCE, AGENT_PATIENCE = 60, 10, 3
# For an agent's command: a guest under emulation that boots has little time for it.
COMMAND_PATIENCE = 30
# The guest is gone before the agent could say that it goes.
WITHOUT_ANSWER = {f'guest-{command}' for command in ('shutdown', 'suspend-disk', 'suspend-ram', 'suspend-hybrid')}
# linux/if_tun.h
TUNSETIFF, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x400454CA, 0x0002, 0x1000, 0x4000


class Refused(Exception):
    """QEMU or the guest agent says no, in its words."""


class Silent(Exception):
    """The guest agent is not there, or does not answer in time."""


class Image:
    """An image folder, as `mayfly-orchestrator image build` leaves it."""

    def __init__(self, folder):
        about = json.loads((folder / 'image.json').read_text())
        if about['format'] != 1:
            raise ValueError(f'{folder} has format {about["format"]}; the lab knows format 1')
        self.kernel, self.initrd, self.disk = (folder.resolve() / about[name] for name in ('kernel', 'initrd', 'disk'))
        self.command_line, self.memory_mib = about['cmdline'], about['memory_mib']


class Line:
    """JSON objects, one a line, over a pair of sockets of which QEMU holds the other end: no path, so nothing to clear away."""

    numbers = itertools.count(1)

    def __init__(self):
        self.ours, self.theirs = socket.socketpair()
        self.turn = asyncio.Lock()

    async def open(self):
        self.theirs.close()
        self.reader, self.writer = await asyncio.open_unix_connection(sock=self.ours, limit=LONGEST_LINE)

    def send(self, command, arguments=None, prefix=b''):
        order = {'execute': command} | ({'arguments': arguments} if arguments else {})
        self.writer.write(prefix + json.dumps(order).encode() + b'\n')

    async def answer(self):
        while line := await self.reader.readline():
            # The guest agent marks the answer to a sync with 0xFF; QEMU greets and tells events in between.
            said = json.loads(line.lstrip(b'\xff'))
            if 'error' in said:
                raise Refused(said['error']['desc'])
            if 'return' in said:
                return said['return']
        raise Refused('QEMU has ended')

    async def ask(self, command, **arguments):
        async with self.turn:
            self.send(command, arguments)
            return await self.answer()

    async def sync(self):
        """After this the next answer belongs to the next command: one may have come late, or been asked before a reboot."""
        number = next(self.numbers)
        self.send('guest-sync-delimited', {'id': number}, prefix=b'\xff')
        while True:
            try:
                if await self.answer() == number:
                    return
            except Refused:
                if self.reader.at_eof():
                    raise


class Machine:
    """A guest with a disk. A template is one without a folder, which never starts."""

    def __init__(self, vmid, image, folder=None):
        self.vmid, self.image, self.folder = vmid, image, folder
        self.disk = folder / 'disk.qcow2' if folder else image.disk
        self.process = self.watch = None
        self.silent_until = 0.0

    @property
    def alive(self):
        return self.process is not None and self.process.returncode is None

    @property
    def memory(self):
        """Bytes that it takes of this machine."""
        try:
            with open(f'/proc/{self.process.pid}/statm') as file:
                return int(file.read().split()[1]) * os.sysconf('SC_PAGESIZE')
        except (AttributeError, OSError):
            return 0

    # ── disk ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def make(self, source, full):
        """Makes the disk from another machine's: on top of it, or a copy."""
        self.folder.mkdir(parents=True)
        if full:
            await run('qemu-img', 'convert', '-O', 'qcow2', source.disk, self.disk)
        else:
            await run('qemu-img', 'create', '-q', '-f', 'qcow2', '-F', 'qcow2', '-b', source.disk, self.disk)

    async def resize(self, size):
        if self.alive:
            await self.qmp.ask('block_resize', device='disk0', size=size)
        else:
            await run('qemu-img', 'resize', '-q', self.disk, str(size))

    def remove(self):
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    # ── power ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self, name, config, ended):
        """Starts QEMU and waits until it answers; calls `ended` whenever it has ended."""
        self.qmp, self.agent = Line(), Line()
        mac = mac_of(config)
        nic = tap(f'tap{self.vmid}', options_of(config['net0']).get('bridge')) if mac else None
        if has_seed(config):
            folder = self.folder / 'seed'
            folder.mkdir(exist_ok=True)
            for file, text in seed(name, config).items():
                (folder / file).write_text(text)
        held = [self.qmp.theirs.fileno(), self.agent.theirs.fileno()] + ([nic] if mac else [])
        command = self.command(name, config, *held)
        try:
            with open(self.folder / 'qemu.log', 'wb') as log:
                # The kernel kills it when this process dies, which no code of ours could promise.
                self.process = await asyncio.create_subprocess_exec(
                    'setpriv', '--pdeathsig', 'KILL', *command, cwd=self.folder, pass_fds=held,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        finally:
            if mac:
                os.close(nic)
        await self.qmp.open()
        await self.agent.open()
        self.watch = asyncio.ensure_future(self.wait(ended))
        try:
            await asyncio.wait_for(self.qmp.ask('qmp_capabilities'), START_PATIENCE)
        except (Refused, OSError, asyncio.TimeoutError) as error:
            await self.stop()
            words = (self.folder / 'qemu.log').read_text().strip().splitlines()
            raise Refused(words[-1] if words else str(error)) from error

    async def wait(self, ended):
        await self.process.wait()
        self.qmp.writer.close()
        self.agent.writer.close()
        ended()

    async def ended(self, patience):
        """Whether it ends in time."""
        done, _ = await asyncio.wait({self.watch}, timeout=patience)
        return bool(done)

    async def stop(self):
        if not self.alive:
            return
        try:
            self.qmp.send('quit')
        except OSError:
            pass
        if not await self.ended(STOP_PATIENCE) and self.alive:
            self.process.kill()
            await self.ended(None)

    async def press(self):
        """Presses the power button."""
        await self.qmp.ask('system_powerdown')

    def command(self, name, config, qmp, agent, nic=None):
        """QEMU's command line, as like as can be to that of the orchestrator's own provider. The last three are open files."""
        words = self.image.command_line.split()
        if has_seed(config):
            # Images for our own provider say so; here there is something to find.
            words = [word for word in words if word != 'cloud-init=disabled']
        memory = min(int(config.get('memory', 512)), self.image.memory_mib)
        options = {
            'name': name, 'machine': 'q35', 'cpu': 'max', 'accel': f'tcg,thread=multi,tb-size={TRANSLATION_MIB}',
            'smp': str(min(int(config.get('cores', 1)), MOST_CORES)), 'm': str(memory), 'rtc': 'base=utc', 'display': 'none',
            'sandbox': 'on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny',
            'kernel': str(self.image.kernel), 'initrd': str(self.image.initrd),
            # The kernel's check of the timer fails on a busy machine without KVM.
            'append': ' '.join([*words, 'no_timer_check']), 'serial': 'file:console.log',
        }
        devices = [
            ('drive', 'if=none,id=disk0,format=qcow2,cache=unsafe,discard=unmap,file=disk.qcow2'),
            ('device', 'virtio-blk-pci,drive=disk0'), ('device', 'virtio-rng-pci'), ('device', 'virtio-serial-pci'),
            ('chardev', f'socket,id=qga,fd={agent}'), ('device', 'virtserialport,chardev=qga,name=org.qemu.guest_agent.0'),
            ('chardev', f'socket,id=qmp,fd={qmp}'), ('mon', 'chardev=qmp,mode=control'),
        ]
        if nic is not None:
            devices += [('netdev', f'tap,id=net0,fd={nic}'),
                        ('device', f'virtio-net-pci,netdev=net0,romfile=,mac={mac_of(config)}')]
        if has_seed(config):
            # A folder as a FAT drive, which needs no program that writes one. Proxmox VE's is an ISO; the label counts.
            devices += [('blockdev', 'driver=vvfat,node-name=seed,dir=seed,label=cidata,read-only=on'),
                        ('device', 'virtio-blk-pci,drive=seed')]
        line = [word for option, value in [*options.items(), *devices] for word in (f'-{option}', value)]
        return ['qemu-system-x86_64', *line, '-nodefaults', '-no-user-config']

    # ── guest agent ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def agent_listens(self):
        """Whether something in the guest holds the agent's port open."""
        if not self.alive or time.monotonic() < self.silent_until:
            return False
        try:
            ports = await self.qmp.ask('query-chardev')
        except (Refused, OSError):
            return False
        return any(port['label'] == 'qga' and port['frontend-open'] for port in ports)

    async def ask_agent(self, command, arguments=None):
        if not await self.agent_listens():
            raise Silent('QEMU guest agent is not running')
        async with self.agent.turn:
            try:
                await asyncio.wait_for(self.agent.sync(), AGENT_PATIENCE)
            except (asyncio.TimeoutError, Refused, OSError) as error:
                raise Silent('QEMU guest agent is not running') from error
            self.agent.send(command, arguments)
            if command in WITHOUT_ANSWER:
                return {}
            try:
                return await asyncio.wait_for(self.agent.answer(), COMMAND_PATIENCE)
            except asyncio.TimeoutError as error:
                raise Silent(f"VM {self.vmid} qmp command '{command}' failed - got timeout") from error


# ── settings of Proxmox VE ──────────────────────────────────────────────────────────────────────────────────────────


def options_of(text):
    """`a=1,b=2` as a dictionary."""
    return dict(part.partition('=')[::2] for part in str(text).split(','))


def mac_of(config):
    """The hardware address of net0: `virtio=BC:24:11:…,bridge=vmbr2`."""
    return next((value for value in options_of(config.get('net0', '')).values() if value.count(':') == 5), None)


def has_seed(config):
    """Whether it has a cloud-init drive, by the name of its volume."""
    return any('-cloudinit' in str(value) for value in config.values())


def seed(name, config):
    """The files of the cloud-init drive (NoCloud), from what Proxmox VE makes it from. JSON is YAML."""
    domain = config.get('searchdomain')
    user = {
        'hostname': name, 'manage_etc_hosts': True, 'fqdn': f'{name}.{domain}' if domain else name,
        'chpasswd': {'expire': False}, 'users': ['default'], 'package_upgrade': bool(int(config.get('ciupgrade', 1))),
    }
    if config.get('ciuser'):
        user['user'] = config['ciuser']
    if config.get('cipassword'):
        user['password'] = config['cipassword']
    if config.get('sshkeys'):
        user['ssh_authorized_keys'] = urllib.parse.unquote(config['sshkeys']).split('\n')
    address = options_of(config.get('ipconfig0', ''))
    subnet = {'type': 'dhcp4'} if address.get('ip', 'dhcp') == 'dhcp' else {
        'type': 'static', 'address': address['ip'], 'gateway': address.get('gw')}
    network = {'version': 1, 'config': [
        {'type': 'physical', 'name': 'eth0', 'mac_address': (mac_of(config) or '').lower(), 'subnets': [subnet]}]}
    if config.get('nameserver'):
        network['config'].append({'type': 'nameserver', 'address': config['nameserver'].split(),
                                  'search': [domain] if domain else []})
    texts = {'user-data': '#cloud-config\n' + json.dumps(user, indent=1), 'network-config': json.dumps(network, indent=1)}
    # Another content is another instance: cloud-init then configures anew.
    instance = hashlib.sha1(''.join(texts.values()).encode()).hexdigest()
    return texts | {'meta-data': json.dumps({'instance-id': instance})}


# ── this machine ────────────────────────────────────────────────────────────────────────────────────────────────────


def tap(name, bridge):
    """A tap device on the bridge. It is gone when the last process that holds it has ended."""
    if bridge not in [name for _, name in socket.if_nameindex()]:
        raise Refused(f"bridge '{bridge}' does not exist")
    device = os.open('/dev/net/tun', os.O_RDWR)
    try:
        fcntl.ioctl(device, TUNSETIFF, struct.pack('16sH22x', name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        subprocess.run(['ip', 'link', 'set', name, 'master', bridge, 'up'], check=True)
    except BaseException:
        os.close(device)
        raise
    return device


async def run(*command):
    process = await asyncio.create_subprocess_exec(*map(str, command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    words, _ = await process.communicate()
    if process.returncode:
        raise Refused(f'{command[0]}: {words.decode().strip()}')
    return words.decode()
