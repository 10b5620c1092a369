#!/bin/sh
# The lab's network, in a network namespace of the caller's: a bridge with 10.85.0.1/24, and a DHCP server on it. What it gives is in
# 10.85.0.128/25, the desktops' network; everything else is in the other half. A machine's firewall is the lab's business (firewall.py).
#
#   unshare --net --mount --pid --fork --kill-child --mount-proc sh network.sh BRIDGE FOLDER COMMAND…
#
# Then it becomes COMMAND, and the DHCP server ends with that. FOLDER holds its leases and its log. An ordinary user adds
# --user --map-root-user to unshare.
set -eu
bridge=$1 folder=$2
shift 2
ip link set lo up
ip link add "$bridge" type bridge
ip address add 10.85.0.1/24 dev "$bridge"
ip link set "$bridge" up
# DHCP and nothing else, and at once: it does not ask first whether an address is in use (3 s). It stays the root that it is here,
# and in its group, which it may not leave where that root is an ordinary user. Leases are short: every desktop has a new address.
setpriv --pdeathsig KILL dnsmasq --keep-in-foreground --log-facility=- --conf-file=/dev/null --pid-file= --user=root --group= \
    --port=0 --interface="$bridge" --bind-interfaces --except-interface=lo --no-ping --dhcp-authoritative \
    --dhcp-range=10.85.0.130,10.85.0.250,5m --dhcp-option=option:dns-server,10.85.0.1 --dhcp-leasefile="$folder/leases" \
    >"$folder/dnsmasq.log" 2>&1 &
exec "$@"
