"""A guest's firewall as Proxmox VE has it, as rules of nftables for the guest's port on the lab's bridge. No part of fakepve.

The meaning of options, IP sets and rules, and the order in which they count, are those of pve-firewall (PVE/Firewall.pm, 2025-12):
generate_tap_rules_direction, ruleset_create_vm_chain, generate_tap_layer2filter, and the chain PVEFW-Drop behind a policy.

Other than there, and known:
* No connections: a bridge of the kernel does not always track them. An answer is what comes back from an address and a port that
  a rule lets be asked, and opens no TCP connection; an ICMP error is one from such an address.
* REJECT drops: a bridge of the kernel cannot always reject.
* Policies that let everything pass, security groups, macros, aliases and IPv6 addresses are not known.
* The filter of hardware addresses holds for every frame. There, DHCP questions pass it.
"""

import re
import subprocess

# One jump for each port: `macs` before the bridge learns an address, `from` for what its guest sends, `to` for what it gets.
# The bridge's own address is reached by input and output.
TABLE = """
add table bridge mayfly
delete table bridge mayfly
table bridge mayfly {
    map macs { type ifname : verdict; }
    map from { type ifname : verdict; }
    map to { type ifname : verdict; }
    chain macs { type filter hook prerouting priority -300; iifname vmap @macs; }
    chain forward-from { type filter hook forward priority -200; iifname vmap @from; }
    chain forward-to { type filter hook forward priority -190; oifname vmap @to; }
    chain input { type filter hook input priority -200; iifname vmap @from; }
    chain output { type filter hook output priority -200; oifname vmap @to; }
}
"""
# Of a rule; the version of IP follows from the rest.
KNOWN = {'type', 'action', 'enable', 'comment', 'proto', 'dport', 'source', 'dest', 'ipversion'}


class Unknown(Exception):
    """The lab does not know that."""


def load(text):
    """Has the kernel take the rules, all or none of them."""
    done = subprocess.run(['nft', '-f', '-'], input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Unknown(f'nft: {done.stdout.strip()}')


# ── the file ────────────────────────────────────────────────────────────────────────────────────────────────────────


def read(text, sets=None):
    """A guest's file, in the form in which fakepve keeps a guest's firewall. `sets`: other members of IP sets, by name."""
    conf = {'options': {}, 'rules': [], 'aliases': {}, 'ipset': {}, 'ipset_comments': {}, 'groups': {}, 'group_comments': {}}
    section = None
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith('#'):
            continue
        if head := re.match(r'\[(\w+)(?:\s+(\S+))?\]', line):
            section = head[1].lower()
            if section not in ('options', 'ipset', 'rules'):
                raise Unknown(line)
            if section == 'ipset':
                members = conf['ipset'][head[2].lower()] = []
        elif section == 'options':
            name, value = re.fullmatch(r'(\w+):\s*(\S+)', line).groups()
            conf['options'][name] = int(value) if value in ('0', '1') else value
        elif section == 'ipset':
            members.append({'cidr': line.split('#')[0].strip()})
        else:
            conf['rules'].append(rule_of(line))
    for name, addresses in (sets or {}).items():
        if name not in conf['ipset']:
            raise Unknown(f'there is no IP set {name}')
        conf['ipset'][name] = [{'cidr': address} for address in addresses]
    return conf


def rule_of(line):
    line, _, comment = line.partition('#')
    words = line.removeprefix('|').split()
    rule = {'enable': int(not line.startswith('|')), 'type': words[0].lower(), 'action': words[1]}
    if comment:
        rule['comment'] = comment.strip()
    for option, value in zip(words[2::2], words[3::2], strict=True):
        rule[{'p': 'proto', 'i': 'iface'}.get(option.lstrip('-'), option.lstrip('-'))] = value
    return rule


# ── the rules ───────────────────────────────────────────────────────────────────────────────────────────────────────


def guard(port, mac, conf):
    """The rules of one guest's port: all frames between its device with the hardware address `mac` and the bridge."""
    if not conf['options'].get('enable'):
        return ''
    sent, got = list(sends(conf)), list(gets(conf))
    lines = []
    for kind, rules in (('macs', [f'ether saddr != {mac} drop']), ('from', sent), ('to', got)):
        chain = f'bridge mayfly {port}-{kind}'
        lines += [f'add chain {chain}', f'flush chain {chain}', *(f'add rule {chain} {rule}' for rule in rules),
                  f'add element bridge mayfly {kind} {{ "{port}" : jump {port}-{kind} }}']
    return '\n'.join(lines) + '\n'


def sends(conf):
    options = conf['options']
    if options.get('dhcp', 1):
        yield 'udp sport 68 udp dport 67 accept'
    if own := conf['ipset'].get('ipfilter-net0'):
        yield f'arp saddr ip != {addresses(own)} drop'
        yield f'ip saddr != {addresses(own)} drop'
    if layer2 := options.get('layer2_protocols'):
        yield f'ether type != {{ ip, ip6, {layer2.lower()} }} drop'
    yield 'ether type != { ip, ip6 } accept'
    if not options.get('radv'):
        yield 'icmpv6 type nd-router-advert drop'
    yield from neighbours(options)
    yield from chain(conf, 'out', options.get('policy_out', 'ACCEPT'))


def gets(conf):
    options = conf['options']
    if options.get('dhcp', 1):
        yield 'udp sport 67 udp dport 68 accept'
    yield 'ether type != { ip, ip6 } accept'
    yield from neighbours(options)
    yield from chain(conf, 'in', options.get('policy_in', 'DROP'))


def neighbours(options):
    if options.get('ndp', 1):
        yield 'icmpv6 type { nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert } accept'


def chain(conf, way, policy):
    if policy not in ('DROP', 'REJECT'):
        raise Unknown(f'a policy {policy}: which answers belong to what it lets pass?')
    rules = [rule for rule in conf['rules'] if rule['enable']]
    for rule in rules:
        if rule['type'] == 'group':
            raise Unknown(f'a security group, {rule["action"]}')
        if rule['type'] != way and rule['action'] == 'ACCEPT':
            yield from answers(conf, rule, way)
    for rule in rules:
        if rule['type'] == way:
            yield match(conf, rule) + (' accept' if rule['action'] == 'ACCEPT' else ' drop')
    yield 'icmp type time-exceeded accept'
    # Number 4 is "fragmentation needed".
    yield 'icmp type destination-unreachable icmp code 4 accept'
    yield 'icmpv6 type { destination-unreachable, packet-too-big, time-exceeded } accept'
    yield 'drop'


def match(conf, rule):
    if not KNOWN >= set(rule):
        raise Unknown(f'a rule like {rule}')
    words = [f'ip {end}addr {addresses_of(conf, rule[name])}' for end, name in (('s', 'source'), ('d', 'dest')) if name in rule]
    if 'dport' in rule:
        words.append(f'{rule["proto"]} dport {ports(rule)}')
    elif 'proto' in rule:
        words.append(f'meta l4proto {rule["proto"]}')
    return ' '.join(words)


def answers(conf, rule, way):
    """What comes back, that way, of what the rule lets pass the other way."""
    if rule.get('proto') not in ('tcp', 'udp') or 'dport' not in rule:
        raise Unknown(f'which answers belong to {rule}')
    # Who asks is the source of the question and the destination of the answer.
    name, end = ('dest', 's') if way == 'in' else ('source', 'd')
    peer = f'ip {end}addr {addresses_of(conf, rule[name])} ' if name in rule else ''
    opens_nothing = ' tcp flags & (syn | ack) != syn' if rule['proto'] == 'tcp' else ''
    yield f'{peer}{rule["proto"]} sport {ports(rule)}{opens_nothing} accept'
    yield f'{peer}icmp type {{ destination-unreachable, time-exceeded }} accept'


def addresses_of(conf, name):
    if re.fullmatch(r'[\d./,-]+', name):
        return f'{{ {name} }}'
    if name.removeprefix('+') not in conf['ipset']:
        raise Unknown(f'there is no IP set {name}')
    return addresses(conf['ipset'][name.removeprefix('+')])


def addresses(members):
    return f'{{ {", ".join(member["cidr"] for member in members)} }}'


def ports(rule):
    return f'{{ {rule["dport"].replace(":", "-")} }}'
