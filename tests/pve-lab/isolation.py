"""Shows with packets that a desktop's firewall lets flow what the table in the documentation lists, and nothing else.

    unshare --net … network.sh BRIDGE FOLDER python3 isolation.py BRIDGE TABLE.md DESKTOP.fw

Each side of the table is a network namespace with a port on the bridge (the orchestrator is the bridge's own address), two of them
desktops behind the rules of DESKTOP.fw. First every line of the table, with real connections. Then all that no line allows, as frames
made by hand: what a desktop may not send or get, spoofed addresses, IPv6, raw frames, every port of the other desktop.
Last the same frames again without the rules: then each must arrive, so that none was stopped by anything else.

Nothing is waited for in vain. This process has one processor, whose queue of frames keeps their order: what did not arrive before an
allowed frame that was sent later does not arrive.
"""

import ctypes
import ipaddress
import itertools
import os
import pathlib
import re
import select
import selectors
import socket
import struct
import subprocess
import sys
import threading

import firewall

# Seconds for what must come.
PATIENCE = 60
# linux/if_ether.h, if_packet.h, sched.h
ETH_ALL, SOL_PACKET, IGNORE_OUTGOING, NEWNET = 3, 263, 23, 0x40000000
# Frames that a socket's buffer surely holds.
MANY = 50
IPV4, ARP, IPV6 = 0x0800, 0x0806, 0x86DD
ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
SYN, ACK = 2, 16
NOBODY, EVERYBODY = '02:85:00:00:00:99', 'ff:ff:ff:ff:ff:ff'
# By the words of the table, but for two that are in no line of it.
ADDRESSES = {
    'orchestrator': '10.85.0.1', 'person': '10.85.0.2', 'Proxmox VE': '10.85.0.3', 'file servers': '10.85.0.4',
    'name and time servers': '10.85.0.5', 'domain controllers': '10.85.0.10', 'desktop': '10.85.0.130',
    'other desktop': '10.85.0.131', 'stranger': '10.85.0.6'}
DESKTOPS = {'desktop': 'tap1', 'other desktop': 'tap2'}
SETS = {'people': 'person', 'orchestrator': 'orchestrator', 'domain': 'domain controllers', 'files': 'file servers',
        'services': 'name and time servers'}
DESKTOP_NETWORK = '10.85.0.128/25'
libc = ctypes.CDLL(None, use_errno=True)


def must(result):
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def ip(*words):
    subprocess.run(['ip', *words], check=True)


class Side:
    """One side of the table. Sockets that are made `with` it are in its namespace."""

    home = None

    def __init__(self, name, bridge):
        self.name, self.address = name, ADDRESSES[name]
        if name == 'orchestrator':
            self.space, self.device = Side.home, bridge
        else:
            must(libc.unshare(NEWNET))
            self.space, self.device = os.open('/proc/thread-self/ns/net', os.O_RDONLY), 'eth0'
            # Something that has a number, by which `ip` knows the namespace.
            self.holder = subprocess.Popen(['cat'], stdin=subprocess.PIPE)
            must(libc.setns(Side.home, NEWNET))
            port = DESKTOPS.get(name) or f'side{ADDRESSES[name].rsplit(".", 1)[1]}'
            ip('link', 'add', port, 'type', 'veth', 'peer', 'name', 'eth0', 'address',
               f'02:85:00:00:00:{int(self.address.rsplit(".", 1)[1]):02x}', 'netns', str(self.holder.pid))
            ip('link', 'set', port, 'master', bridge, 'up')
            with self:
                ip('link', 'set', 'lo', 'up')
                ip('address', 'add', f'{self.address}/24', 'dev', 'eth0')
                ip('link', 'set', 'eth0', 'up')
        with self:
            self.wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_ALL))
            self.wire.setsockopt(SOL_PACKET, IGNORE_OUTGOING, 1)
            self.wire.bind((self.device, ETH_ALL))

    def __enter__(self):
        must(libc.setns(self.space, NEWNET))

    def __exit__(self, *_):
        must(libc.setns(Side.home, NEWNET))

    @property
    def mac(self):
        return self.wire.getsockname()[4].hex(':')

    def arrived(self, patience=0):
        """The marks of all that has arrived, waiting so long for the first."""
        marks = set()
        while select.select([self.wire], [], [], 0 if marks else patience)[0]:
            marks.update(MARK.findall(self.wire.recv(65536)))
        return marks


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────


def lines_of(text):
    """(from, to, protocol, port) of each line of the documentation's table."""
    table = re.search(r'^\| From \| To \| TCP \| UDP \|.*?(?=^[^|])', text, re.S | re.M)
    for line in table[0].splitlines()[2:]:
        origin, to, tcp, udp, _ = (cell.strip() for cell in line.strip('|').split('|'))
        for protocol, ports in (('tcp', tcp), ('udp', udp)):
            for port in re.findall(r'\d+', ports):
                yield origin, to, protocol, int(port)


def serve(sides, lines):
    """Echoes on every port of the table, at every side."""
    selector = selectors.DefaultSelector()
    for side, (protocol, port) in itertools.product(sides.values(), {line[2:] for line in lines}):
        with side:
            kind = socket.SOCK_STREAM if protocol == 'tcp' else socket.SOCK_DGRAM
            listener = socket.socket(socket.AF_INET, kind)
            listener.bind((side.address, port))
        if protocol == 'tcp':
            listener.listen(100)
        selector.register(listener, selectors.EVENT_READ, protocol)

    def run():
        while True:
            for key, _ in selector.select():
                if key.data == 'udp':
                    words, peer = key.fileobj.recvfrom(2048)
                    key.fileobj.sendto(words, peer)
                elif key.data == 'tcp':
                    selector.register(key.fileobj.accept()[0], selectors.EVENT_READ, 'connection')
                elif words := key.fileobj.recv(2048):
                    key.fileobj.send(words)
                else:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
    threading.Thread(target=run, daemon=True).start()


def converse(origin, to, protocol, port):
    with origin:
        asking = socket.socket(socket.AF_INET, socket.SOCK_STREAM if protocol == 'tcp' else socket.SOCK_DGRAM)
    with asking:
        asking.settimeout(PATIENCE)
        try:
            asking.connect((to.address, port))
            asking.send(b'question')
            if asking.recv(100) != b'question':
                raise OSError('another answer')
        except OSError as error:
            raise SystemExit(f'{origin.name} does not reach {to.name} at {protocol} {port}: {error}') from error


# ── frames ──────────────────────────────────────────────────────────────────────────────────────────────────────────

MARK = re.compile(rb'mark=(\d+);')
marks = itertools.count(1)


def packed(mac):
    return bytes.fromhex(mac.replace(':', ''))


def ethernet(source, to, kind, content):
    return packed(to) + packed(source) + struct.pack('!H', kind) + content


def checksum(content):
    total = sum(struct.unpack(f'!{len(content) // 2}H', content))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def ipv4(source, to, protocol, content):
    head = struct.pack('!BBHHHBBH4s4s', 0x45, 0, 20 + len(content), 0, 0, 64, protocol, 0,
                       socket.inet_aton(source), socket.inet_aton(to))
    return head[:10] + struct.pack('!H', checksum(head)) + head[12:] + content


def ipv6(source, to, protocol, content):
    return struct.pack('!IHBB16s16s', 6 << 28, len(content), protocol, 255, ipaddress.ip_address(source).packed,
                       ipaddress.ip_address(to).packed) + content


def mark():
    """By which a frame is known where it arrives."""
    return b'mark=%d;' % next(marks)


# Checksums of these are not right, and nobody on the way looks at them.
def tcp(source, to, flags):
    return struct.pack('!HHIIBBHHH', source, to, 1, 0, 5 << 4, flags, 1024, 0, 0) + mark()


def udp(source, to):
    content = mark()
    return struct.pack('!HHHH', source, to, 8 + len(content), 0) + content


def icmp(kind, code):
    return struct.pack('!BBHI', kind, code, 0, 0) + mark()


def arp(mac, address):
    # "I am that address"; the mark is where short frames have padding.
    return struct.pack('!HHBBH6s4s6s4s', 1, IPV4, 6, 4, 2, packed(mac), socket.inet_aton(address), packed(EVERYBODY),
                       socket.inet_aton(address)) + mark()


def link_local(mac):
    first, *rest = packed(mac)
    return str(ipaddress.IPv6Address(b'\xfe\x80' + bytes(6) + bytes([first ^ 2, *rest[:2], 0xFF, 0xFE, *rest[2:]])))


def forbidden(macs, lines):
    """(what it is, origin, to whom, frame) for all that the rules must stop."""
    allowed = set(lines)

    def frame(what, origin, to, protocol, content, **other):
        packet = ipv4(other.get('source', ADDRESSES[origin]), other.get('address', ADDRESSES[to]), protocol, content)
        return what, origin, to, ethernet(other.get('mac', macs[origin]), other.get('to_mac', macs[to]), IPV4, packet)

    # Every port of the table that no line allows, in each direction; and from that port: what answers no question.
    for origin, to in itertools.permutations(ADDRESSES, 2):
        if not {origin, to} & set(DESKTOPS):
            continue
        # The table is about one desktop.
        row = (origin, to) if {origin, to} == set(DESKTOPS) else tuple(name.removeprefix('other ') for name in (origin, to))
        for protocol, port in sorted({line[2:] for line in lines} | {('tcp', 4444), ('udp', 4444)}):
            asked, answered = (*row, protocol, port) in allowed, (*row[::-1], protocol, port) in allowed
            if protocol == 'udp':
                if not asked:
                    yield frame(f'udp {port}', origin, to, UDP, udp(40000, port))
                if not answered:
                    yield frame(f'udp from {port}', origin, to, UDP, udp(port, 40000))
                continue
            if not asked:
                yield frame(f'tcp {port}', origin, to, TCP, tcp(40000, port, SYN))
            yield frame(f'tcp from {port}', origin, to, TCP, tcp(port, 40000, SYN))
            if not asked and not answered:
                yield frame(f'tcp {port}, opening nothing', origin, to, TCP, tcp(port, port, ACK))
        yield frame('ping', origin, to, ICMP, icmp(8, 0))

    a, b = DESKTOPS
    for kind, code in ((3, 4), (3, 1), (5, 1), (11, 0), (13, 0)):
        yield frame(f'ICMP {kind}/{code}', a, b, ICMP, icmp(kind, code))
    for number in (2, 41, 47, 50, 132):
        yield frame(f'IP protocol {number}', a, b, number, mark())
    # As if somebody else had sent it, who may.
    for mac in (macs[a], NOBODY):
        for name, protocol, make in (
                ('person', TCP, lambda: tcp(40000, 3389, SYN)), ('orchestrator', TCP, lambda: tcp(40000, 22, SYN)),
                ('domain controllers', UDP, lambda: udp(53, 40000)), ('domain controllers', TCP, lambda: tcp(88, 40000, ACK)),
                ('domain controllers', ICMP, lambda: icmp(3, 1))):
            yield frame(f'as {name}, by {mac}', a, b, protocol, make(), source=ADDRESSES[name], mac=mac)
    yield frame('as a third desktop', a, b, TCP, tcp(40000, 3389, SYN), source='10.85.0.140')
    yield frame('by another hardware address', a, 'orchestrator', TCP, tcp(40000, 5001, SYN), mac=NOBODY)
    yield frame('as nobody', a, 'orchestrator', TCP, tcp(40000, 5001, SYN), source='10.85.0.7')
    yield 'ARP for the domain controller', a, b, ethernet(macs[a], EVERYBODY, ARP, arp(macs[a], ADDRESSES['domain controllers']))
    # To everybody.
    yield frame('an answer of DHCP', a, b, UDP, udp(67, 68), to_mac=EVERYBODY, address='255.255.255.255')
    yield frame('an answer of DHCP, to it alone', a, b, UDP, udp(67, 68))
    for port in (137, 5353, 5355):
        yield frame(f'udp {port} to everybody', a, b, UDP, udp(port, port), to_mac=EVERYBODY, address='10.85.0.255')
        yield frame(f'udp {port} to a group', a, b, UDP, udp(port, port), to_mac='01:00:5e:00:00:fb', address='224.0.0.251')
    # IPv6, and no IP at all.
    here, there = link_local(macs[a]), link_local(macs[b])
    for to, mac in ((there, macs[b]), ('ff02::1', '33:33:00:00:00:01')):
        for what, protocol, content in (
                ('tcp', TCP, tcp(40000, 3389, SYN)), ('udp', UDP, udp(40000, 4444)), ('ping', ICMPV6, icmp(128, 0)),
                ('too big', ICMPV6, icmp(2, 0)), ('neighbour', ICMPV6, icmp(135, 0)), ('router', ICMPV6, icmp(134, 0))):
            yield f'IPv6 {what} to {to}', a, b, ethernet(macs[a], mac, IPV6, ipv6(here, to, protocol, content))
    for kind in (0x88B5, 0x88A8, 0x8100, 0x8863, 0x8137):
        for mac in (macs[b], EVERYBODY):
            # Of two of these it is an IP packet with a tag of a VLAN.
            content = struct.pack('!HH', 0, IPV4) + ipv4(ADDRESSES[a], ADDRESSES[b], TCP, tcp(40000, 3389, SYN))
            yield f'raw {kind:04x} to {mac}', a, b, ethernet(macs[a], mac, kind, content)


def every_port(macs):
    a, b = DESKTOPS
    for port in range(65536):
        for name, protocol, content in (('tcp', TCP, tcp(40000, port, SYN)), ('udp', UDP, udp(40000, port))):
            packet = ipv4(ADDRESSES[a], ADDRESSES[b], protocol, content)
            yield f'{name} {port}', a, b, ethernet(macs[a], macs[b], IPV4, packet)


def send(sides, frames):
    """Sends them: those that arrived, and those that did not."""
    seen = {name: set() for name in sides}
    for number, (_, origin, _, frame) in enumerate(frames):
        sides[origin].wire.send(frame)
        if number % MANY == 0:
            for name, side in sides.items():
                seen[name] |= side.arrived()
    for name, side in sides.items():
        # Last, what a person may send to anybody, a desktop too; and to the person, anybody who is no desktop.
        origin = sides['Proxmox VE' if name == 'person' else 'person']
        content = ipv4(origin.address, side.address, TCP, tcp(40000, 3389, SYN))
        origin.wire.send(ethernet(origin.mac, side.mac, IPV4, content))
        while not MARK.findall(content)[0] in seen[name]:
            came = side.arrived(PATIENCE)
            if not came:
                raise SystemExit(f'{name}: the last frame did not arrive')
            seen[name] |= came
    did = [MARK.findall(frame)[0] in seen[to] for _, _, to, frame in frames]
    return list(itertools.compress(frames, did)), [frame for frame, arrived in zip(frames, did) if not arrived]


def shown(frames):
    return '\n'.join(f'  {what}, from {origin} to {to}' for what, origin, to, _ in frames)


def main(bridge, table, rules):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    Side.home = os.open('/proc/thread-self/ns/net', os.O_RDONLY)
    # A bridge that answers multicast questions would keep what it believes nobody listens to.
    ip('link', 'set', bridge, 'type', 'bridge', 'mcast_snooping', '0')
    sides = {name: Side(name, bridge) for name in ADDRESSES}
    sets = {name: [ADDRESSES[side]] for name, side in SETS.items()} | {'ipfilter-net0': [DESKTOP_NETWORK]}
    conf = firewall.read(pathlib.Path(rules).read_text(), sets)
    lines = list(lines_of(pathlib.Path(table).read_text()))
    serve(sides, lines)
    firewall.load(firewall.TABLE)
    for name, port in DESKTOPS.items():
        firewall.load(firewall.guard(port, sides[name].mac, conf))

    for origin, to, protocol, port in lines:
        converse(sides[origin], sides[to], protocol, port)
    print(f'{len(lines)} ports of the table work')
    # The bridge has the lowest of its ports', so that they are asked for now.
    macs = {name: side.mac for name, side in sides.items()}
    for what, frames in (('frames that no line allows', list(forbidden(macs, lines))),
                         ('frames, one to each port of the other desktop,', list(every_port(macs)))):
        arrived, _ = send(sides, frames)
        if arrived:
            raise SystemExit('what no line allows arrived:\n' + shown(arrived))
        print(f'{len(frames)} {what} were stopped')
    firewall.load('delete table bridge mayfly')
    _, stopped = send(sides, list(forbidden(macs, lines)))
    if stopped:
        raise SystemExit('not stopped by the rules:\n' + shown(stopped))
    print('without the rules each of them arrives')


main(*sys.argv[1:])
