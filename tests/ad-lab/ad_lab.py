#!/usr/bin/python3
"""A real Active Directory domain for tests: Samba's AD DC in a network namespace of its own.

    ad_lab.py --passwords FILE --out FOLDER [--bridge vmbr2] [--address 10.85.0.10/24] [--gateway 10.85.0.1]

FILE is JSON, {"alice": "…", "bob": "…", "svc-mayfly": "…"}; "administrator" may be added, else nobody knows it.
FOLDER gets ca.pem, which signed the certificate of LDAPS, and shares/, what the file server shares. One JSON line on standard output says that the domain
answers. It ends at the end of standard input, at SIGTERM or SIGINT, or when whoever started it dies.

Promises:
* Nothing is left: data lives in a tmpfs, processes in a PID namespace, the address in a network namespace.
  Even SIGKILL removes them, but for FOLDER's content.
* No password is in an argument, in the environment or in a file that outlives the run.
* svc-mayfly may create and delete computers in OU=DaaS and reset their passwords. Nothing else.

Needs root, a bridge, and what NEEDS names.
"""

import argparse
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time

NEEDS = {
    "samba": "samba-ad-dc (or samba), samba-ad-provision, samba-dsdb-modules, samba-vfs-modules",
    "samba-tool": "samba-common-bin, python3-samba",
    "winbindd": "winbind",
    "openssl": "openssl",
    "ip": "iproute2",
}
HERE = "/var/lib/samba"  # a tmpfs in our mount namespace
CONF = f"{HERE}/lab/etc/smb.conf"
PORTS = (53, 88, 389, 445, 464, 636)
PEOPLE = {"alice": 3001, "bob": 3002}
SERVICE = "svc-mayfly"
COMPUTER = "bf967a86-0de6-11d0-a285-00aa003049e2"  # the class
RESET_PASSWORD = "00299570-246d-11d0-a768-00aa006e0529"


def run(*command, **options):
    """A tool that must succeed; what it says is shown only if it does not."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout}")
    return done.stdout


# -- outside: the caller's namespaces ---------------------------------------------------------------------------------


def outside(options):
    if missing := [name for name in NEEDS if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")]:
        raise SystemExit("missing: " + "; ".join(f"{name} (package {NEEDS[name]})" for name in missing))
    with open(options.passwords, encoding="utf-8") as file:
        passwords = json.load(file)
    if lacking := {*PEOPLE, SERVICE} - passwords.keys():
        raise SystemExit(f"{options.passwords} has no password for {', '.join(sorted(lacking))}")
    run("ip", "link", "show", "dev", options.bridge, "type", "bridge")
    shares = os.path.abspath(os.path.join(options.out, "shares"))
    os.makedirs(shares, exist_ok=True)
    # A file system of their own: whatever becomes of us, the caller's namespace takes it along.
    run("mount", "-t", "tmpfs", "-o", "mode=755", "mayfly-shares", shares)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    # The kernel ends the whole inner namespace with us, however we end.
    inner = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL"]
        + "unshare --net --mount --uts --ipc --pid --fork --kill-child --mount-proc".split()
        # Samba's modules belong to the distribution's own Python.
        + ["/usr/bin/python3", "-I", os.path.abspath(__file__), "--inside"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    ca = os.path.join(options.out, "ca.pem")
    link = f"ad{os.getpid()}"
    try:
        if inner.stdout.readline() != "here\n":
            raise SystemExit("the namespace could not be made")
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(inner.pid))
        run("ip", "link", "set", link, "master", options.bridge, "up")
        inner.stdin.write(json.dumps({**vars(options), "passwords": passwords, "shares": shares}) + "\n")
        inner.stdin.flush()
        ready = inner.stdout.readline()
        if not ready:
            raise SystemExit("the domain did not come up")
        ready = json.loads(ready)
        with open(ca, "w", encoding="ascii") as file:
            file.write(ready.pop("ca_pem"))
        print(json.dumps({**ready, "ca_file": os.path.abspath(ca), "shares_folder": shares}), flush=True)
        while True:
            readable, _, _ = select.select([sys.stdin, inner.stdout], [], [])
            if inner.stdout in readable:
                raise SystemExit("the domain ended by itself")
            if not os.read(0, 4096):
                return
    finally:
        inner.kill()
        inner.wait()
        subprocess.run(["ip", "link", "delete", link], stderr=subprocess.DEVNULL, check=False)
        subprocess.run(["umount", "--lazy", shares], stderr=subprocess.DEVNULL, check=False)
        os.rmdir(shares)
        if os.path.exists(ca):
            os.remove(ca)


# -- inside: a machine of its own, as far as Samba can see ------------------------------------------------------------


def inside():
    print("here", flush=True)
    options = json.loads(sys.stdin.readline())
    begun = time.monotonic()
    realm, netbios, passwords = options["realm"], options["netbios"], options["passwords"]
    name = f"dc1.{realm}"
    address = options["address"].split("/")[0]

    socket.sethostname("dc1")
    run("mount", "--make-rprivate", "/")
    for folder in (HERE, "/run/samba", "/var/cache/samba", "/var/log/samba"):
        os.makedirs(folder, exist_ok=True)
        run("mount", "-t", "tmpfs", "-o", "mode=755", "samba", folder)
    for path, content in {
        "/etc/resolv.conf": f"search {realm}\nnameserver {address}\n",
        "/etc/hosts": f"127.0.0.1 localhost\n{address} {name} dc1\n",
    }.items():
        ours = f"{HERE}/{os.path.basename(path)}"
        with open(ours, "w", encoding="ascii") as file:
            file.write(content)
        run("mount", "--bind", ours, os.path.realpath(path))
    run("ip", "link", "set", "lo", "up")
    run("ip", "address", "add", options["address"], "dev", "eth0")
    run("ip", "link", "set", "eth0", "up")
    run("ip", "route", "add", "default", "via", options["gateway"])

    # The people's accounts must reach it, whoever may enter the caller's folder.
    os.mkdir(f"{HERE}/shares")
    run("mount", "--bind", options["shares"], f"{HERE}/shares")
    certificates(name, address)
    # The distribution's own settings would come along: printers, and a say for this machine's PAM.
    with open(f"{HERE}/empty.conf", "w", encoding="ascii") as file:
        file.write("[global]\n")
    # No administrator's password is given: Samba makes a random one, which nobody reads.
    run(
        *("samba-tool", "domain", "provision", "--server-role=dc", "--use-rfc2307", "--dns-backend=SAMBA_INTERNAL"),
        f"--configfile={HERE}/empty.conf",
        *(f"--realm={realm}", f"--domain={netbios}", "--host-name=dc1", f"--host-ip={address}"),
        *(f"--targetdir={HERE}/lab", "--option=interfaces=lo eth0", "--option=bind interfaces only=yes"),
    )
    configure(options)
    os.environ["KRB5_CONFIG"] = f"{HERE}/lab/private/krb5.conf"
    ou = people(realm, netbios, passwords)
    provisioned = time.monotonic()

    samba = subprocess.Popen(
        ["samba", "--foreground", "--no-process-group", f"--configfile={CONF}"],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
    )
    deadline = time.monotonic() + 60
    for port in PORTS:
        while samba.poll() is None:
            try:
                socket.create_connection((address, port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise SystemExit(f"nothing answers on port {port}") from None
                time.sleep(0.05)
    with open(f"{HERE}/ca.pem", encoding="ascii") as file:
        ca_pem = file.read()
    print(
        json.dumps(
            {
                "realm": realm.upper(),
                "domain": realm,
                "netbios": netbios,
                "server": name,
                "address": address,
                "ldaps": f"ldaps://{name}:636",
                "base_dn": ou.split(",", 1)[1],
                "ou": ou,
                "service_account": f"{SERVICE}@{realm}",
                "service_account_dn": f"CN={SERVICE},CN=Users,{ou.split(',', 1)[1]}",
                "users": sorted(PEOPLE),
                "shares": ["partage", "home"],
                "provision_ms": round((provisioned - begun) * 1000),
                "ready_ms": round((time.monotonic() - begun) * 1000),
                "ca_pem": ca_pem,
            }
        ),
        flush=True,
    )
    # We are the first process here: what is orphaned is ours to collect.
    while samba.poll() is None:
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        time.sleep(0.5)
    raise SystemExit("samba ended")


def certificates(name, address):
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30"]
    run(
        *("openssl", "req", "-x509", *curve, "-subj", "/CN=Mayfly lab CA"),
        *("-keyout", f"{HERE}/ca.key", "-out", f"{HERE}/ca.pem"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
    )
    with open(f"{HERE}/san", "w", encoding="ascii") as file:
        file.write(f"subjectAltName=DNS:{name},IP:{address}\nextendedKeyUsage=serverAuth\n")
    run(
        *("openssl", "req", *curve, "-subj", f"/CN={name}", "-keyout", f"{HERE}/dc.key", "-out", f"{HERE}/dc.csr"),
    )
    run(
        *("openssl", "x509", "-req", "-days", "30", "-in", f"{HERE}/dc.csr", "-out", f"{HERE}/dc.pem"),
        *("-CA", f"{HERE}/ca.pem", "-CAkey", f"{HERE}/ca.key", "-CAcreateserial", "-extfile", f"{HERE}/san"),
    )
    os.chmod(f"{HERE}/dc.key", 0o600)
    os.remove(f"{HERE}/ca.key")


def configure(options):
    """Adds what provisioning has no option for."""
    with open(CONF, encoding="utf-8") as file:
        conf = file.read()
    forwarder = f"\tdns forwarder = {options['forwarder']}\n" if options["forwarder"] else ""
    lines = [line for line in conf.splitlines(keepends=True) if "dns forwarder" not in line]
    place = lines.index("[global]\n") + 1
    lines.insert(
        place,
        f"{forwarder}\ttls keyfile = {HERE}/dc.key\n\ttls certfile = {HERE}/dc.pem\n\ttls cafile = {HERE}/ca.pem\n"
        "\tserver services = s3fs, rpc, ldap, cldap, kdc, winbindd, dns\n"
        "\tserver min protocol = SMB3\n\tload printers = no\n\tdisable spoolss = yes\n",
    )
    lines.append(
        f"\n[partage]\n\tcomment = Everybody's\n\tpath = {HERE}/shares/partage\n\tread only = no\n"
        f"\n[home]\n\tcomment = Everybody has their own\n\tpath = {HERE}/shares/home/%U\n\tread only = no\n"
    )
    with open(CONF, "w", encoding="utf-8") as file:
        file.writelines(lines)
    for folder, owner, mode in [
        ("", 0, 0o755),
        ("partage", 0, 0o1777),
        ("home", 0, 0o755),
        *((f"home/{person}", number, 0o700) for person, number in PEOPLE.items()),
    ]:
        path = f"{HERE}/shares/{folder}"
        os.makedirs(path, exist_ok=True)
        os.chown(path, owner, 0)
        os.chmod(path, mode)


def people(realm, netbios, passwords):
    """Makes the accounts and the delegated OU, in the database itself: nothing listens yet. Returns the OU."""
    import ldb
    from samba.auth import system_session
    from samba.param import LoadParm
    from samba.samdb import SamDB
    from samba.sd_utils import SDUtils

    conf = LoadParm()
    conf.load(CONF)
    sam = SamDB(url=f"{HERE}/lab/private/sam.ldb", session_info=system_session(), lp=conf)
    base = str(sam.domain_dn())
    # Test passwords are the caller's business.
    sam.set_pwdProperties("0")
    sam.set_minPwdLength("1")
    sam.set_minPwdAge("0")
    # Domain Users needs a number of its own, or Samba finds no Unix group for the people.
    sam.modify_ldif(f"dn: CN=Domain Users,CN=Users,{base}\nchangetype: modify\nadd: gidNumber\ngidNumber: 3000\n")
    for person, number in PEOPLE.items():
        sam.newuser(
            person, passwords[person], uidnumber=str(number), gidnumber="3000", nisdomain=netbios.lower(),
            unixhome=f"/home/{person}", uid=person, loginshell="/bin/bash", gecos=person.capitalize(),
        )
    sam.newuser(SERVICE, passwords[SERVICE], description="May make and remove desktops' accounts in OU=DaaS")
    sam.setpassword(f"(sAMAccountName={SERVICE})", passwords[SERVICE], force_change_at_next_login=False)
    if "administrator" in passwords:
        sam.setpassword("(sAMAccountName=Administrator)", passwords["administrator"])
    ou = f"OU=DaaS,{base}"
    sam.create_ou(ou, description="Desktops that live for a session")
    sam.create_ou(f"OU=Servers,{base}", description="Where the service account has no business")
    # Else a service that we do not run adds them, some time after the start.
    sam.modify_ldif(
        f"dn: CN=DC1,OU=Domain Controllers,{base}\nchangetype: modify\nadd: servicePrincipalName\n"
        + "".join(f"servicePrincipalName: ldap/{name}\n" for name in ("dc1", f"dc1.{realm}", f"dc1.{realm}/{realm}"))
    )
    # By itself every account may join ten computers.
    sam.modify_ldif(f"dn: {base}\nchangetype: modify\nreplace: ms-DS-MachineAccountQuota\nms-DS-MachineAccountQuota: 0\n")
    sid = sam.schema_format_value(
        "objectSid",
        sam.search(base, ldb.SCOPE_SUBTREE, f"(sAMAccountName={SERVICE})", ["objectSid"])[0]["objectSid"][0],
    ).decode()
    rights = SDUtils(sam)
    rights.dacl_add_ace(ou, f"(OA;;CCDC;{COMPUTER};;{sid})")
    rights.dacl_add_ace(ou, f"(OA;CIIO;CR;{RESET_PASSWORD};{COMPUTER};{sid})")
    return ou


def main():
    if sys.argv[1:] == ["--inside"]:
        return inside()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passwords", required=True, help="JSON file of passwords")
    parser.add_argument("--out", required=True, help="folder that gets ca.pem")
    parser.add_argument("--bridge", default="vmbr2")
    parser.add_argument("--address", default="10.85.0.10/24", help="the DC's, with its prefix length")
    parser.add_argument("--gateway", default="10.85.0.1")
    parser.add_argument("--realm", default="ad.mayfly.test", help="DNS name of the domain")
    parser.add_argument("--netbios", default="MAYFLY")
    parser.add_argument("--forwarder", help="name server for every other name")
    return outside(parser.parse_args())


if __name__ == "__main__":
    main()
