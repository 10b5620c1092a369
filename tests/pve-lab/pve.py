"""The API of the lab: fakepve with real machines behind it, and with the locks and waits that hurt on a real Proxmox VE.

fakepve's, unchanged: the 680 calls of the official schema with their parameter checks, privileges, errors and tokens; tasks and
their ids; the guest's config lock; pools; nodes that are offline; lost quorum; every answer that is not named below.

Ours, from the documents and the sources of Proxmox VE (qemu-server, pve-storage, pve-common; named where it is not plain):

* clone, start, stop, shutdown, reboot, reset, resize, destroy and the guest agent act on a virtual machine;
* settings are written as Proxmox VE writes them: drives, network devices, numbers; some need other privileges than in fakepve;
* a clone waits 1 s for its template's lock and then for its storage's turn, 10 s at most;
* a clone has its template's firewall, and it holds on the bridge (firewall.py);
* memory and space of nodes and storages are of this lab's guests, so that a choice of node can be tested;
* faults on order (orders.py).

Records only, as in fakepve: snapshots, suspend, HA, backups, firewalls of nodes, a change of the firewall of a machine that runs;
a migration changes the node's name and nothing else.
"""

import asyncio
import collections
import contextlib
import copy
import json
import pathlib
import re
import shutil
import sys
import time
import traceback

from fakepve import FakePve, schema, shapes
from fakepve.firewall import verify_rule
from fakepve.model import PveError, TaskError, lock_timeout
from fakepve.qemu import DRIVE_KEY, drives_of, join_drive, split_drive, volume_ref, with_mac
from fakepve.routing import die, split_list
from fakepve.server import USER, ok

import agent
import firewall
from machine import Image, Machine, Refused, Silent, mac_of, options_of, run, seed
from orders import Orders

MIB, GIB = 1 << 20, 1 << 30
GUEST = '/nodes/{node}/qemu/{vmid}'
# How long Proxmox VE waits for a template's lock (PVE::API2::Qemu, clone_vm) and for a storage's (PVE::Storage::Plugin).
TEMPLATE_WAIT, STORAGE_WAIT = 1, 10
# What a thin clone takes of its storage before it is written to, and what a cloud-init drive does.
THIN, SEED = MIB, 4 * MIB
# What a node uses without guests.
NODE_OWN = GIB
# What of a guest outlives a lab that keeps its state.
KEPT = ('vmid', 'name', 'node', 'config', 'pending', 'template', 'lock', 'pool', 'source')
# Settings that VM.Config.Cloudinit is for; fakepve asks for VM.Config.HWType.
CLOUDINIT = re.compile(r'ci(user|password|type|custom|upgrade)|sshkeys|nameserver|searchdomain|ipconfig\d+')


DEFAULT_NODES = [{'name': name, 'memory_mib': 16384, 'cores': 8} for name in ('pve1', 'pve2', 'pve3')]


class Lab(Orders, FakePve):
    """A cluster as the configuration describes it (lab.py)."""

    def __init__(self, config):
        super().__init__(host=config.get('address', '127.0.0.1'), port=config.get('port', 0))
        self.time_scale = config.get('time_scale', 1.0)
        self.certificate = config['cert'], config['key']
        self.bridge = config.get('bridge', 'vmbr2')
        self.delays = config.get('delays', {})
        self.network['latency'] = self.delays.get('call', 0)
        self.folder = pathlib.Path(config['run_folder']).resolve()
        self.state = self.folder / 'state.json' if config.get('keep_state') else None
        self.nodes = {node['name']: {'online': True, **node} for node in config.get('nodes', DEFAULT_NODES)}
        self.machines, self.faults, self.giving_up, self.full = {}, [], {}, {}
        self.turns = collections.defaultdict(asyncio.Lock)
        self.clones = self.most_clones = 0
        self.add_storages(config)
        self.pools = {name: set() for name in config.get('pools', [])}
        for token in config['tokens']:
            self.apitokens[token['id']] = token['secret']
            for entry in token.get('acl', [{'path': '/', 'privileges': shapes.PRIVILEGES}]):
                self.grant(token['id'], entry['path'], *entry['privileges'])
        properties = schema.load().paths[GUEST + '/config']['PUT']['parameters']['properties']
        self.numbers = {name for name, about in properties.items() if about.get('type') in ('integer', 'boolean')}

    def add_storages(self, config):
        for storage in config['storages']:
            size = storage['size_gib'] * GIB
            about = {'type': 'lvmthin', 'content': 'images,rootdir', 'vgname': 'pve', 'thinpool': 'data'} | storage
            self.storages[about.pop('name')] = about | {
                'active': 1, 'files': set(), 'volumes': {}, 'total': size, 'avail': size}

    async def open(self, config):
        """Takes up what an earlier lab left, or clears it away; makes the templates; listens."""
        kept = json.loads(self.state.read_text()) if self.state and self.state.exists() else None
        if not kept:
            shutil.rmtree(self.folder / 'machines', ignore_errors=True)
        (self.folder / 'machines').mkdir(parents=True, exist_ok=True)
        for template in config['templates']:
            rules = template.pop('firewall', None)
            await self.add_template(**template)
            if rules:
                self.add_firewall(template['vmid'], pathlib.Path(rules).read_text(), config.get('ip_sets'))
        for about in kept['guests'] if kept else []:
            # As after a loss of power: everything is there but does not run, and what held a lock holds it still.
            vm = self.add_vm(about['vmid'], about['name'])
            vars(vm).update(about)
            self.machines[vm.vmid] = Machine(vm.vmid, self.machines[vm.source].image, self.place(vm.vmid))
            self.copy_firewall(vm.source, vm.vmid)
        for name, about in kept['storages'].items() if kept else []:
            self.storages[name].update(about)
        for vm in self.vms:
            if vm.pool:
                self.pools.setdefault(vm.pool, set()).add(vm.vmid)
        await self.start(*self.certificate)

    async def close(self):
        await asyncio.gather(*(machine.stop() for machine in self.machines.values()))
        await self.stop()

    async def add_template(self, vmid, name, node, image, storage='local-lvm', config=None):
        image = Image(pathlib.Path(image))
        size = json.loads(await run('qemu-img', 'info', '--output=json', image.disk))['virtual-size']
        base = f'base-{vmid}-disk-0'
        self.storages[storage]['volumes'][base] = {'content': 'images', 'format': 'raw', 'size': size, 'vmid': vmid}
        self.storages[storage]['avail'] -= size
        settings = {
            'scsi0': f'{storage}:{base},size={size // MIB}M', 'scsihw': 'virtio-scsi-single', 'boot': 'order=scsi0',
            'net0': with_mac(f'virtio,bridge={self.bridge}'), 'memory': image.memory_mib, 'cores': 1, 'agent': 'enabled=1',
            'ostype': 'l26', 'template': 1}
        self.add_vm(vmid, name, node, config=settings | (config or {}), template=True)
        self.machines[vmid] = Machine(vmid, image)

    # ── firewall ────────────────────────────────────────────────────────────────────────────────────────────────────

    def add_firewall(self, vmid, text, sets):
        """What an administrator does with a file; what Proxmox VE would refuse of it is refused."""
        cluster, own = self.firewall_config('cluster'), self.firewall_config('vm', vmid=vmid)
        if not cluster['options'].get('enable'):
            firewall.load(firewall.TABLE)
            cluster['options']['enable'] = 1
        own.update(firewall.read(text, sets))
        for rule in own['rules']:
            verify_rule(rule, cluster, own, 'vm')
        self.vm(vmid).config['net0'] += ',firewall=1'

    def copy_firewall(self, source, new):
        """As clone_vmfw_conf does (PVE::Firewall::Helpers)."""
        self.firewall_config('vm', vmid=new).update(copy.deepcopy(self.firewall_config('vm', vmid=source)))

    def guard(self, vm):
        """The firewall holds if cluster, guest and network device all say so."""
        if self.firewall_config('cluster')['options'].get('enable') and options_of(vm.config.get('net0', '')).get('firewall') == '1':
            firewall.load(firewall.guard(f'tap{vm.vmid}', mac_of(vm.config), self.firewall_config('vm', vmid=vm.vmid)))

    def place(self, vmid):
        return self.folder / 'machines' / str(vmid)

    def save(self):
        if not self.state:
            return
        guests = [{name: getattr(vm, name) for name in KEPT} for vm in self.vms if hasattr(vm, 'source')]
        storages = {name: {key: about[key] for key in ('volumes', 'avail')} for name, about in self.storages.items()
                    if 'total' in about}
        new = self.state.with_suffix('.new')
        new.write_text(json.dumps({'guests': guests, 'storages': storages}))
        new.replace(self.state)

    # ── routes ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _register_stateful(self, router, forms):
        super()._register_stateful(router, forms)
        for form in forms:
            # The Terraform provider deletes with a slash at the end, which Proxmox VE does not mind.
            router.add_delete(form + GUEST + '/', self._stateful_handler(GUEST, self._qm_destroy))

    def _routes_lab(self):
        return [('GET', GUEST + '/feature', self._feature), ('PUT', GUEST + '/resize', self._resize),
                ('POST', GUEST + '/migrate', self._migrate), ('PUT', GUEST + '/cloudinit', self._seed_again),
                ('GET', GUEST + '/cloudinit/dump', self._seed_text)]

    async def _feature(self, v, user):
        vm = self.find(v['node'], v['vmid'])
        volumes = [volume for _, volume, _ in drives_of(vm.config, skip_cdrom=True)]
        able = {'clone': bool(volumes) and all('base-' in volume for volume in volumes), 'copy': bool(volumes),
                'snapshot': self._qm_can_snapshot(vm.config)}[v['feature']]
        return {'hasFeature': int(able), 'nodes': sorted(self.nodes) if self.on_shared(vm) else [vm.node]}

    async def _migrate(self, v, user):
        return await self.migrate(int(v['vmid']), v['target'], self.delays.get('qmigrate', 2), user)

    async def _seed_again(self, v, user):
        # Written at every start anyway.
        self.find(v['node'], v['vmid'])

    async def _seed_text(self, v, user):
        vm = self.find(v['node'], v['vmid'])
        return seed(vm.name, vm.config)[{'user': 'user-data', 'meta': 'meta-data', 'network': 'network-config'}[v['type']]]

    async def _resize(self, v, user):
        vm, disk = self.find(v['node'], v['vmid']), v['disk']
        self._check_lock(vm)
        if disk not in vm.config:
            raise die(f"disk '{disk}' does not exist")
        volume, options = split_drive(vm.config[disk])
        about = self._qm_volume(volume)
        amount, unit = re.fullmatch(r'\+?([\d.]+)([KMGT]?)', v['size']).groups()
        size = int(float(amount) * 1024 ** ' KMGT'.index(unit or ' '))
        size += about['size'] if v['size'].startswith('+') else 0
        if size < about['size']:
            raise die('shrinking disks is not supported')

        async def body():
            await self.machines[vm.vmid].resize(size)
            about['size'] = size
            vm.config[disk] = join_drive(volume, options | {'size': f'{size // GIB}G' if size % GIB == 0 else f'{size // MIB}M'})
        return await self.task(vm.node, 'resize', vm.vmid, user, body, vm=vm)

    # ── tasks ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def task(self, node, kind, tid, user, body, vm=None, **options):
        """A task of fakepve's, with the machine's part in it. `vm` of a clone is the new guest, `tid` its template's number."""
        async def whole():
            await self.pause(self.delays.get(kind, 0))
            fault = self.fault(kind)
            try:
                if fault and not fault['acted']:
                    await self.pause(fault['after'])
                    raise TaskError(fault['exitstatus'])
                note = await self.act(kind, tid, vm, body)
                if fault:
                    await self.pause(fault['after'])
                    raise TaskError(fault['exitstatus'])
                return note
            except Exception as error:
                if kind == 'qmclone' and vm.lock and vm in self.vms:
                    self.vms.remove(vm)
                if isinstance(error, TaskError):
                    raise
                # Every task must end: the one of which nothing is known is waited for without end.
                traceback.print_exc(file=sys.stderr)
                raise TaskError(str(error)) from error
            finally:
                self.save()
        if kind == 'qmclone':
            # The template that its image is of, even if it is a clone's clone.
            vm.source = getattr(self.vm(int(tid)), 'source', int(tid))
        self.save()
        return await super().task(node, kind, tid, user, whole, vm=vm, **options)

    async def act(self, kind, tid, vm, body):
        machine = self.machines.get(vm.vmid) if vm else None
        if kind == 'qmclone':
            return await self.clone(int(tid), vm, body)
        if kind == 'qmstop' and machine:
            await machine.stop()
        note = await body()
        if kind in ('qmstart', 'qmreboot'):
            await self.power_up(vm)
        elif kind == 'qmreset':
            await machine.qmp.ask('system_reset')
        elif kind == 'qmdestroy' and machine:
            self.machines.pop(vm.vmid).remove()
        return note

    async def clone(self, source, new, body):
        # The template's lock is shared by its clones, so that it is waited for and not taken.
        template = self.vm(source)
        try:
            await self.acquire(template, 'clone', TEMPLATE_WAIT)
        except TaskError:
            raise TaskError(lock_timeout(source)) from None
        self.release(template, 'clone')
        machine = Machine(new.vmid, self.machines[source].image, self.place(new.vmid))
        self.machines[new.vmid] = machine
        self.clones += 1
        self.most_clones = max(self.clones, self.most_clones)
        try:
            async with contextlib.AsyncExitStack() as turns:
                for storage in sorted({volume_ref(volume)[0] for _, volume, _ in drives_of(template.config, True)}):
                    await turns.enter_async_context(self.turn(storage, new.node))
                await self.pause(self.delays.get('allocate', 0))
                await machine.make(self.machines[source], self.full.pop(new.vmid, False))
                note = await body()
        except (PveError, TaskError, Refused, OSError) as error:
            self.machines.pop(new.vmid).remove()
            raise TaskError('clone failed: ' + str(error).removeprefix('clone failed: ')) from error
        finally:
            self.clones -= 1
        for key, volume, _ in drives_of(new.config):
            # A cloud-init drive is the clone's own. Under the template's name its end would be the end of the template's.
            if volume.endswith(f'vm-{source}-cloudinit'):
                new.config[key], _ = self._qm_new_drive(new.vmid, key, f'{volume_ref(volume)[0]}:cloudinit', None)
        self.copy_firewall(source, new.vmid)
        return note

    async def power_up(self, vm):
        def ended():
            vm.status = vm.qmpstatus = 'stopped'
            vm.stats.pop('pid', None)
        try:
            if vm.vmid not in self.machines:
                raise Refused('the lab has an image for clones of its templates only')
            machine = self.machines[vm.vmid]
            self.guard(vm)
            await machine.start(vm.name, vm.config, ended)
        except (Refused, firewall.Unknown, OSError) as error:
            ended()
            raise TaskError(f'start failed: {error}') from error
        machine.silent_until = time.monotonic() + self.delays.get('agent', 0) * self.time_scale
        vm.stats['pid'] = machine.process.pid

    async def _powerdown(self, vm, p):
        # As vm_stop does it (PVE::QemuServer): by the agent, or by the power button, which a guest that boots does not see.
        machine, force = self.machines[vm.vmid], agent.truth(p.get('forceStop', 0))
        try:
            await machine.ask_agent('guest-shutdown') if self.has_agent(vm) else await machine.press()
        except Silent:
            await machine.press()
        overruled = self.giving_up[vm.vmid] = asyncio.Event()
        await asyncio.wait({machine.watch, asyncio.ensure_future(overruled.wait())}, return_when=asyncio.FIRST_COMPLETED,
                           timeout=int(p.get('timeout') or self.shutdown_default_timeout))
        del self.giving_up[vm.vmid]
        if overruled.is_set():
            raise TaskError('interrupted by signal')
        if not machine.alive:
            return None
        if not force:
            raise TaskError('VM quit/powerdown failed - got timeout')
        await machine.stop()
        return 'VM still running - terminating now with SIGTERM'

    async def _do_stop(self, vm, user, p):
        if agent.truth(p.get('overrule-shutdown', 0)) and vm.vmid in self.giving_up:
            self.giving_up[vm.vmid].set()
        return await super()._do_stop(vm, user, p)

    async def _qm_clone(self, v, user):
        source, new = self.find(v['node'], v['vmid']), int(v['newid'])
        target = v.get('target')
        if target and target != source.node and not self.on_shared(source):
            raise die(f"can't clone VM to node '{target}' (VM uses local storage)")
        for key, value in source.config.items():
            if re.fullmatch(r'net\d+', key):
                self.check_bridge(user, value)
        if not self._qm_taken(new):
            full = v.get('full')
            self.full[new] = not source.template if full is None else bool(full)
        return await super()._qm_clone(v, user)

    # ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _config_priv(self, key):
        if CLOUDINIT.fullmatch(key):
            return 'VM.Config.Cloudinit'
        return 'VM.Config.HWType' if key == 'scsihw' else super()._config_priv(key)

    def check_privileges(self, vm, user, p):
        """What update_vm_api asks for (PVE::API2::Qemu) and fakepve does not."""
        for key in [*p, *split_list(p.get('delete'))]:
            value = str(p.get(key) or vm.config.get(key, ''))
            if DRIVE_KEY.match(key) and 'cloudinit' in value:
                self.require(user, f'/vms/{vm.vmid}', 'VM.Config.Cloudinit')
                self.require(user, f'/vms/{vm.vmid}', 'VM.Config.CDROM')
            elif re.fullmatch(r'net\d+', key) and key in p:
                self.check_bridge(user, value)

    def check_bridge(self, user, net):
        self.require(user, f"/sdn/zones/localnetwork/{options_of(net).get('bridge')}", 'SDN.Use')

    async def _apply_config(self, vm, user, p):
        self.check_privileges(vm, user, p)
        # First as it was sent, so that what is refused leaves no volume behind.
        await super()._apply_config(vm, user, p)
        for key, value in p.items():
            place = vm.pending if key in vm.pending else vm.config
            if key in place:
                try:
                    place[key] = await self.as_written(vm, key, value)
                except (PveError, TaskError) as error:
                    place.pop(key)
                    raise die(str(error)) from error
        self.save()

    async def as_written(self, vm, key, value):
        """A setting as Proxmox VE writes it into its file."""
        if DRIVE_KEY.match(key):
            async with self.turn(volume_ref(split_drive(value)[0])[0], vm.node):
                return self._qm_new_drive(vm.vmid, key, value, None)[0]
        if re.fullmatch(r'net\d+', key):
            return with_mac(value)
        number = key in self.numbers and re.fullmatch(r'-?\d+', str(value))
        return int(value) if number else value

    def _qm_new_drive(self, vmid, key, value, default):
        volume, options = split_drive(value)
        if not volume.endswith(':cloudinit'):
            return super()._qm_new_drive(vmid, key, value, default)
        storage, name = volume_ref(volume)[0], f'vm-{vmid}-cloudinit'
        about, made = self._store(storage), []
        if name not in about.setdefault('volumes', {}):
            self.take(storage, SEED)
            about['volumes'][name] = {'content': 'images', 'format': 'raw', 'size': SEED, 'vmid': vmid}
            made.append(f'{storage}:{name}')
        options.pop('format', None)
        return join_drive(f'{storage}:{name}', options | {'media': 'cdrom', 'size': '4M'}), made

    # ── storages ────────────────────────────────────────────────────────────────────────────────────────────────────

    def take(self, storage, size):
        about = self.storages[storage]
        if about['avail'] < size:
            raise die(f"unable to write to storage '{storage}': No space left on device")
        about['avail'] -= size

    def _qm_alloc(self, storage, vmid, fmt, size, linked_from=None):
        if not linked_from:
            return super()._qm_alloc(storage, vmid, fmt, size)
        volume, fmt = super()._qm_alloc(storage, vmid, fmt, THIN, linked_from)
        self._qm_volume(volume).update(size=size, taken=THIN)
        return volume, fmt

    def _qm_free(self, volume):
        about = self._qm_volume(volume)
        if about and 'taken' in about:
            about['size'] = about['taken']
        super()._qm_free(volume)

    def on_shared(self, vm):
        storages = {volume_ref(volume)[0] for _, volume, _ in drives_of(vm.config, skip_cdrom=True)}
        return all(self.storages[storage].get('shared') for storage in storages)

    @contextlib.asynccontextmanager
    async def turn(self, storage, node):
        """A storage allocates one volume at a time: on each node, or in the whole cluster if it is shared."""
        shared = self.storages[storage].get('shared') if storage in self.storages else False
        turn = self.turns[storage, None if shared else node]
        try:
            await asyncio.wait_for(turn.acquire(), STORAGE_WAIT * self.time_scale)
        except asyncio.TimeoutError:
            raise TaskError(
                f"cfs-lock 'storage-{storage}' error: got lock request timeout" if shared else
                f"can't lock file '/var/lock/pve-manager/pve-storage-{storage}' - got timeout") from None
        try:
            yield
        finally:
            turn.release()

    # ── guest agent ─────────────────────────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def has_agent(vm):
        setting = options_of(vm.config.get('agent', '0'))
        return setting.get('enabled', next(iter(setting))) == '1'

    async def _agent_call(self, match, values):
        vm = self.find(values['node'], values['vmid'])
        if not self.has_agent(vm):
            raise die('No QEMU guest agent configured')
        if vm.status != 'running' or vm.vmid not in self.machines:
            raise die(f'VM {vm.vmid} is not running')
        try:
            return await agent.call(self.machines[vm.vmid], match.template.rsplit('/', 1)[1], values)
        except Silent as error:
            raise die(str(error)) from error
        except Refused as error:
            raise die(f'Agent error: {error}') from error
        except UnicodeEncodeError as error:
            raise die('Wide character in subroutine entry') from error

    # ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _vm_usage(self, vm):
        usage = super()._vm_usage(vm)
        machine = self.machines.get(vm.vmid)
        if machine and machine.alive:
            usage['mem'] = usage['memhost'] = machine.memory
        return usage

    def node_figures(self, name):
        """By what guests are set to, not by what QEMU has touched: a choice of node can then be foretold."""
        node = self.nodes[name]
        if not node['online']:
            return {}
        used = sum(int(vm.config.get('memory', 512)) * MIB for vm in self.vms if vm.node == name and vm.status == 'running')
        return {'maxmem': node.get('memory_mib', 8192) * MIB, 'mem': NODE_OWN + used, 'maxcpu': node.get('cores', 4)}

    async def _resources(self, request):
        lines = json.loads((await super()._resources(request)).text)['data']
        user, seen = request[USER], []
        for line in lines:
            online = self.nodes[line['node']]['online']
            if line['type'] == 'node' and self.allowed(user, '/nodes/' + line['node'], 'Sys.Audit'):
                line.update(self.node_figures(line['node']))
            elif line['type'] == 'storage':
                about = self.storages[line['storage']]
                if not self._can_audit(user, line['storage']):
                    continue
                if not online:
                    line['status'] = 'unknown'
                elif 'total' in about:
                    line.update(maxdisk=about['total'], disk=about['total'] - about['avail'])
            seen.append(line)
        return ok(seen)

    async def _nodes(self, request):
        lines = json.loads((await super()._nodes(request)).text)['data']
        return ok([line | self.node_figures(line['node']) for line in lines])
