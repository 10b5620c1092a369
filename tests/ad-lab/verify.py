#!/usr/bin/python3
"""Converge, idempotence and verification of the role ad-join, on a real desktop in a real domain.

    verify.py --image FOLDER [--work FOLDER] [--report FILE]

FOLDER is a desktop image as `mayfly-orchestrator image build` makes it. One machine is booted from it beside the lab's
domain (ad_lab.py), in namespaces of their own. Its host key is read through the guest agent and pinned; Ansible comes
over SSH. Every check is a line; the exit code says whether all passed. Needs root, and the packages qemu-system-x86,
qemu-utils, dnsmasq-base, nftables, ldap-utils, openssh-client, ansible, and what ad_lab.py needs.
"""

import argparse
import base64
import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ANSIBLE = HERE.parent.parent / "ansible"
NAME = f"desktop-{secrets.token_hex(4)[:7]}"
PARAMETERS = "/run/mayfly/ad-join.json"


def run(*command, stdin="", ok=(0,), **options):
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, **options)
    if ok and done.returncode not in ok:
        raise SystemExit(f"{' '.join(map(str, command))} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return done


class Report:
    """Every check with what was seen and how long it took."""

    def __init__(self):
        self.checks, self.begun = [], time.monotonic()

    def check(self, what, passed, seen=""):
        ms, self.begun = round((time.monotonic() - self.begun) * 1000), time.monotonic()
        self.checks.append({"check": what, "passed": bool(passed), "seen": str(seen), "ms": ms})
        print(f"{'ok  ' if passed else 'FAIL'} {ms:>6} ms  {what}: {seen}", flush=True)

    def passed(self):
        return all(check["passed"] for check in self.checks)


# -- the machine ------------------------------------------------------------------------------------------------------


class GuestAgent:
    """QEMU's guest agent: the channel that needs no network, and so can be trusted with keys."""

    def __init__(self, path):
        self.path = path

    def ask(self, command, timeout=20, **arguments):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(self.path)
            stream = connection.makefile("rw", encoding="utf-8")
            number = secrets.randbelow(1 << 30)
            for request in ({"execute": "guest-sync", "arguments": {"id": number}}, {"execute": command, "arguments": arguments}):
                stream.write(json.dumps(request) + "\n")
                stream.flush()
                while True:
                    answer = json.loads(stream.readline().lstrip("\xff"))
                    # Answers to somebody who gave up before us.
                    if request["execute"] != "guest-sync" or answer.get("return") == number:
                        break
            if "error" in answer:
                raise OSError(f"{command}: {answer['error']['desc']}")
            return answer["return"]

    def wait(self, seconds):
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self.ask("guest-ping", timeout=3)
            except (OSError, ValueError):
                if time.monotonic() > deadline:
                    raise SystemExit("the guest agent does not answer") from None
                time.sleep(0.5)

    def shell(self, script):
        pid = self.ask(
            "guest-exec", path="/bin/sh", arg=["-ec", "eval \"$(cat)\""], **{"input-data": base64.b64encode(script.encode()).decode()},
            **{"capture-output": True},
        )["pid"]  # fmt: skip
        while not (state := self.ask("guest-exec-status", pid=pid))["exited"]:
            time.sleep(0.1)
        out = base64.b64decode(state.get("out-data", "")).decode()
        if state["exitcode"]:
            raise SystemExit(f"in the guest: {out}{base64.b64decode(state.get('err-data', '')).decode()}")
        return out


class Desktop:
    def __init__(self, image, work, stack):
        described = json.loads((image / "image.json").read_text())
        self.work, disk, self.key = work, work / "disk.qcow2", work / "id"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(image / described["disk"]), str(disk))
        run("ip", "tuntap", "add", "tap0", "mode", "tap")
        run("ip", "link", "set", "tap0", "master", "vmbr2", "up")
        qga = str(work / "qga.sock")
        self.qemu = subprocess.Popen(
            ["qemu-system-x86_64", "-accel", "tcg,thread=multi,tb-size=256", "-machine", "q35", "-cpu", "max", "-smp", "2"]
            + ["-m", str(described["memory_mib"]), "-display", "none", "-nodefaults", "-no-user-config", "-no-reboot"]
            + ["-kernel", str(image / described["kernel"]), "-initrd", str(image / described["initrd"])]
            + ["-append", described["cmdline"], "-drive", f"if=none,id=disk0,format=qcow2,cache=unsafe,file={disk}"]
            + ["-device", "virtio-blk-pci,drive=disk0", "-netdev", "tap,id=net0,ifname=tap0,script=no,downscript=no"]
            + ["-device", "virtio-net-pci,netdev=net0,romfile=,mac=52:54:00:00:00:01", "-device", "virtio-rng-pci"]
            + ["-device", "virtio-serial-pci", "-chardev", f"socket,id=qga,server=on,wait=off,path={qga}"]
            + ["-device", "virtserialport,chardev=qga,name=org.qemu.guest_agent.0"]
            + ["-chardev", f"file,id=console,path={work / 'console.log'}", "-serial", "chardev:console"],
            stdin=subprocess.DEVNULL,
        )
        stack.callback(self.qemu.wait)
        stack.callback(self.qemu.kill)
        self.agent = GuestAgent(qga)
        self.agent.wait(180)

    def admit(self):
        """Lets us in by SSH, and learns which machine it is, by the guest agent alone."""
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        key = self.agent.shell(
            f"""
            hostnamectl set-hostname {NAME} || {{ echo {NAME} >/etc/hostname; hostname {NAME}; }}
            sed -i 's/^127.0.1.1.*/127.0.1.1 {NAME}/' /etc/hosts
            install -d -m 700 /root/.ssh
            echo '{(self.work / "id.pub").read_text().strip()}' >/root/.ssh/authorized_keys
            [ -e /etc/ssh/ssh_host_ed25519_key ] || ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
            systemctl start ssh.service
            cat /etc/ssh/ssh_host_ed25519_key.pub"""
        )
        deadline = time.monotonic() + 60
        while not (found := re.search(r"10\.85\.0\.\d+", self.agent.shell("ip -4 -o addr show scope global || true"))):
            if time.monotonic() > deadline:
                raise SystemExit("the machine got no address")
            time.sleep(0.5)
        self.address = found[0]
        (self.work / "known_hosts").write_text(f"{self.address} {' '.join(key.split()[:2])}\n")

    def ssh_options(self, known_hosts="known_hosts"):
        return [
            *("-o", "StrictHostKeyChecking=yes", "-o", f"UserKnownHostsFile={self.work / known_hosts}"),
            *("-o", "GlobalKnownHostsFile=/dev/null", "-o", "IdentitiesOnly=yes", "-o", "HostKeyAlgorithms=ssh-ed25519"),
            # A machine that died says nothing any more.
            *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=8"),
            *("-o", "ControlMaster=auto", "-o", "ControlPersist=60", "-o", f"ControlPath={self.work / known_hosts}.mux", "-o", "BatchMode=yes", "-i", str(self.key)),
        ]

    def ssh(self, command, stdin="", ok=(0,), known_hosts="known_hosts"):
        return run("ssh", *self.ssh_options(known_hosts), f"root@{self.address}", command, stdin=stdin, ok=ok)

    def login(self, user, password, service="xrdp-sesman"):
        """A login through PAM, outside of any session of SSH; the pipe keeps it open."""
        process = subprocess.Popen(
            ["ssh", *self.ssh_options(), f"root@{self.address}"]
            + [f"exec systemd-run --quiet --pipe --collect python3 /run/pam_login.py {service} {user}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        process.stdin.write(password + "\n")
        process.stdin.flush()
        return process, process.stdout.readline().strip()

    def logout(self, process):
        process.stdin.close()
        said = process.stdout.read().strip()
        process.wait()
        return said

    def shares(self):
        return self.ssh("findmnt -rn -t cifs -o TARGET,SOURCE", ok=(0, 1)).stdout.split("\n")[:-1]


# -- the domain -------------------------------------------------------------------------------------------------------


class Domain:
    def __init__(self, work, stack):
        self.passwords = {name: secrets.token_urlsafe(12) for name in ("alice", "bob", "svc-mayfly")}
        self.work = work
        for name, content in {"passwords.json": json.dumps(self.passwords), "svc": self.passwords["svc-mayfly"]}.items():
            (work / name).touch(0o600)
            (work / name).write_text(content)
        lab = subprocess.Popen(
            [sys.executable, str(HERE / "ad_lab.py"), "--passwords", str(work / "passwords.json"), "--out", str(work / "ad")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(lab.wait)
        stack.callback(lab.stdin.close)
        line = lab.stdout.readline()
        if not line:
            raise SystemExit("the domain did not come up")
        self.ready = json.loads(line)
        hosts = work / "hosts"
        hosts.write_text(f"127.0.0.1 localhost\n{self.ready['address']} {self.ready['server']}\n")
        run("mount", "--bind", str(hosts), "/etc/hosts")
        self.shares = Path(self.ready["shares_folder"])

    def ldap(self, tool, *arguments, stdin="", ok=(0,)):
        """As the service account, over LDAPS."""
        return run(
            tool, "-H", self.ready["ldaps"], "-x", "-D", self.ready["service_account"], "-y", str(self.work / "svc"), *arguments,
            stdin=stdin, ok=ok, env={**os.environ, "LDAPTLS_CACERT": self.ready["ca_file"], "LDAPTLS_REQCERT": "hard"},
        )  # fmt: skip

    def computer(self, name, unit, password):
        """What an account is preset with."""
        fqdn = f"{name}.{self.ready['domain']}"
        return (
            f"dn: CN={name},{unit}\nobjectClass: computer\nsAMAccountName: {name.upper()}$\nuserAccountControl: 4096\n"
            f"dNSHostName: {fqdn}\n"
            + "".join(f"servicePrincipalName: {kind}/{of}\n" for kind in ("host", "RestrictedKrbHost") for of in (fqdn, name.upper()))
            + f"msDS-SupportedEncryptionTypes: 24\nunicodePwd:: {secret(password)}\n"
        )


def secret(password):
    return base64.b64encode(f'"{password}"'.encode("utf-16-le")).decode()


# -- checks -----------------------------------------------------------------------------------------------------------


def delegation(domain, report):
    """What the orchestrator's account may do, and what it may not."""
    ou, base = domain.ready["ou"], domain.ready["base_dn"]
    dn = f"CN=desktop-fffffff,{ou}"
    domain.ldap("ldapadd", stdin=domain.computer("desktop-fffffff", ou, secrets.token_urlsafe(16)))
    reset = f"changetype: modify\nreplace: unicodePwd\nunicodePwd:: {secret('Another-0ne')}\n"
    domain.ldap("ldapmodify", stdin=f"dn: {dn}\n{reset}")
    refused = {
        "make a user in the unit": ("ldapadd", f"dn: CN=eve,{ou}\nobjectClass: user\nsAMAccountName: eve\n"),
        "make a unit in the unit": ("ldapadd", f"dn: OU=x,{ou}\nobjectClass: organizationalUnit\n"),
        "make a computer in another unit": ("ldapadd", domain.computer("desktop-eeeeeee", f"OU=Servers,{base}", "Another-0ne")),
        "make a computer among all computers": ("ldapadd", domain.computer("desktop-eeeeeee", f"CN=Computers,{base}", "Another-0ne")),
        "reset a user's password": ("ldapmodify", f"dn: CN=alice,CN=Users,{base}\n{reset}"),
        "delete a user": ("ldapmodify", f"dn: CN=alice,CN=Users,{base}\nchangetype: delete\n"),
        "join an administrators' group": (
            "ldapmodify",
            f"dn: CN=Domain Admins,CN=Users,{base}\nchangetype: modify\nadd: member\nmember: {domain.ready['service_account_dn']}\n",
        ),
        "trust a computer for delegation": (
            "ldapmodify",
            f"dn: {dn}\nchangetype: modify\nreplace: userAccountControl\nuserAccountControl: {0x1000 | 0x80000}\n",
        ),
    }
    for what, (tool, ldif) in refused.items():
        done = domain.ldap(tool, stdin=ldif, ok=())
        report.check(f"the service account cannot {what}", done.returncode == 50, f"LDAP code {done.returncode}")
    domain.ldap("ldapdelete", dn)
    report.check("the service account makes, resets and deletes a computer in its unit", True)


def local_first(desktop, report):
    """The same image without a domain."""
    units = desktop.ssh("systemctl list-units --all --plain --no-legend 'sssd*' | grep -v inactive; systemctl is-active sssd", ok=(3,))
    report.check("SSSD does not run before the join", units.stdout.strip() == "inactive", units.stdout.split())
    password = secrets.token_urlsafe(9)
    desktop.ssh("useradd -m -s /bin/bash carol && chpasswd", stdin=f"carol:{password}\n")
    login, said = desktop.login("carol", password)
    report.check("a local person logs in before the join", said.startswith("open /run/user/"), said)
    desktop.logout(login)
    return password


def refusals(desktop, domain, otp, report):
    """Each thing that goes wrong has its own word."""

    def attempt(secret, **changes):
        given = {"domain": domain.ready["domain"], "servers": [domain.ready["server"]], "users": ["alice"], **changes}
        desktop.ssh("umask 077; cat >/run/mayfly/try.json", stdin=json.dumps(given))
        return json.loads(desktop.ssh("/usr/lib/mayfly/ad-join join --parameters /run/mayfly/try.json", stdin=secret, ok=(0, 1)).stdout)

    for what, code, secret_given, changes in (
        ("nobody named", "parameters", otp, {"users": []}),
        ("an injected line", "parameters", otp, {"users": ["alice\naccess_provider=permit"]}),
        ("a name that is a local account", "local_account", otp, {"users": ["carol"]}),
        ("a wrong one-time password", "secret", "wrong", {}),
        ("an account that was not preset", "no_account", otp, {"host_name": "desktop-0000000"}),
        ("a server that is not there", "unreachable", otp, {"servers": ["dc9.ad.mayfly.test"]}),
    ):
        said = attempt(secret_given, **changes)
        report.check(f"{what} is refused", said.get("error") == code, said)
    desktop.ssh("date -s '+2 hours'")
    said = attempt(otp)
    desktop.ssh("date -s '-2 hours'")
    report.check("a clock two hours off is refused", said.get("error") == "clock", said)


def converge(desktop, domain, otp, report):
    hosts = {"ephemeral_desktop": {"hosts": {NAME: {"ansible_host": desktop.address, "ansible_user": "root"}}}}
    (desktop.work / "inventory.json").write_text(json.dumps(hosts))
    server = domain.ready["server"]
    variables = desktop.work / "vars.json"
    variables.touch(0o600)
    variables.write_text(
        json.dumps(
            {
                "ad_join_domain": domain.ready["domain"],
                "ad_join_servers": [server],
                "ad_join_users": ["alice"],
                "ad_join_host_name": NAME,
                "ad_join_secret": otp,
                "ad_join_shares": [
                    {"server": server, "share": "home", "mount": "/home/{user}"},
                    {"server": server, "share": "partage", "mount": "Partage"},
                ],
            }
        )
    )

    def play(*extra):
        done = run(
            "ansible-playbook", "-i", str(desktop.work / "inventory.json"), "deploy-desktop.yml", "-e", f"@{variables}", *extra,
            cwd=ANSIBLE, ok=(),
            env={
                **os.environ,
                "ANSIBLE_CONFIG": str(ANSIBLE / "ansible.cfg"),
                "ANSIBLE_HOST_KEY_CHECKING": "true",
                "ANSIBLE_SSH_ARGS": " ".join(desktop.ssh_options()),
                "ANSIBLE_LOCAL_TEMP": str(desktop.work / "ansible"),
                "ANSIBLE_NOCOLOR": "1",
                "LC_ALL": "C.UTF-8",
            },
        )  # fmt: skip
        recap = dict(re.findall(r"(\w+)=(\d+)", done.stdout.rsplit("PLAY RECAP", 1)[-1]))
        if done.returncode:
            print(done.stdout, done.stderr, file=sys.stderr)
        return recap, done.stdout + done.stderr

    recap, _ = play("--check")
    report.check("check mode says that it would change the machine", recap.get("failed") == "0" and recap["changed"] != "0", recap)
    report.check("and leaves it alone", not desktop.ssh("ls /etc/krb5.keytab", ok=()).stdout)
    recap, said = play("-vvv")
    report.check("Ansible joins the machine", recap.get("failed") == "0" and recap["changed"] != "0", recap)
    report.check("what Ansible says at -vvv holds no secret", otp not in said)
    recap, _ = play()
    report.check("a second run changes nothing", recap.get("failed") == "0" and recap.get("changed") == "0", recap)
    said = json.loads(desktop.ssh(f"rm /etc/krb5.keytab; /usr/lib/mayfly/ad-join join --parameters {PARAMETERS}", stdin=otp, ok=(1,)).stdout)
    report.check("the one-time password works once", said.get("error") == "secret", said)


def membership(desktop, domain, report):
    passwords = domain.passwords
    desktop.ssh("cat >/run/pam_login.py", stdin=(HERE / "pam_login.py").read_text())
    seen = desktop.ssh("id alice").stdout.strip()
    report.check("the machine knows alice", "uid=" in seen and int(re.search(r"uid=(\d+)", seen)[1]) >= 200000, seen)
    for user, password, step in (
        ("bob", passwords["bob"], "acct_mgmt"),
        ("alice", "wrong", "authenticate"),
        ("carol", "wrong", "authenticate"),
    ):
        login, said = desktop.login(user, password)
        desktop.logout(login)
        report.check(f"{user} is refused ({step})", said.startswith(f"{step}:"), said)

    login, said = desktop.login("alice", passwords["alice"])
    report.check("alice logs in", said.startswith("open /run/user/"), said)
    shares = desktop.shares()
    report.check("both shares are mounted", [line.split()[0] for line in shares] == ["/home/alice", "/home/alice/Partage"], shares)
    seen = desktop.ssh("systemctl is-active user@$(id -u alice).service", ok=()).stdout.strip()
    report.check("her services run", seen == "active", seen)
    desktop.ssh("cd /home/alice/Partage && runuser -u alice -- sh -c 'echo hello >note; ln -s note link; echo home >~alice/bookmark'")
    note = domain.shares / "partage" / "note"
    report.check("a file of hers is on the server", note.read_text() == "hello\n" and note.stat().st_uid == 3001, note.stat().st_uid)
    denied = desktop.ssh("runuser -u carol -- cat /home/alice/Partage/note", ok=()).returncode
    report.check("another local person cannot read it", denied != 0, f"exit code {denied}")
    # A program that stays in the share with a file that it has not written out.
    stay = "exec 3>dirty; echo unsaved >&3; exec sleep 600"
    desktop.ssh(f"cd /home/alice/Partage && systemd-run --quiet --uid=alice --working-directory=/home/alice/Partage sh -c '{stay}' && sleep 1")
    begun = time.monotonic()
    said = desktop.logout(login)
    took = round(time.monotonic() - begun, 1)
    report.check("logout unmounts, whoever is still in there", said == "closed" and not desktop.shares(), f"{took} s, {desktop.shares()}")
    report.check("and nothing is lost", (domain.shares / "partage" / "dirty").read_text() == "unsaved\n")

    login, said = desktop.login("alice", passwords["alice"])
    seen = desktop.ssh("cat /home/alice/bookmark", ok=()).stdout
    report.check("her home comes back with its bookmark", seen == "home\n", said)
    desktop.ssh(f"systemd-run --quiet --uid=alice --working-directory=/home/alice sh -c '{stay}' && sleep 1")
    said = json.loads(desktop.ssh("/usr/lib/mayfly/ad-join end --seconds 5").stdout)
    report.check("`end` unmounts before a hard stop", said["clean"] and not desktop.shares(), said)
    report.check("and nothing is lost", (domain.shares / "home" / "alice" / "dirty").read_text() == "unsaved\n")
    desktop.logout(login)


def share_down(desktop, domain, report):
    run("nft", "-f", "-", stdin="table bridge mayfly_down { chain c { type filter hook forward priority 1; tcp dport {139, 445} drop; }; }")
    begun = time.monotonic()
    login, said = desktop.login("alice", domain.passwords["alice"])
    took = round(time.monotonic() - begun, 1)
    report.check("a file server that is down keeps nobody out", said.startswith("open"), f"{said} after {took} s")
    run("nft", "delete", "table", "bridge", "mayfly_down")
    desktop.logout(login)


def local_beside(desktop, password, report):
    """A local account that is named comes in beside the domain's."""
    given = json.loads(desktop.ssh(f"cat {PARAMETERS}").stdout)
    desktop.ssh("cat >/run/mayfly/beside.json", stdin=json.dumps({**given, "local_user": "carol"}))
    desktop.ssh("/usr/lib/mayfly/ad-join join --parameters /run/mayfly/beside.json")
    for user, secret_given, opens in (("carol", password, True), ("carol", "wrong", False), ("bob", password, False)):
        login, said = desktop.login(user, secret_given)
        desktop.logout(login)
        report.check(f"beside the domain, {user} is {'let in' if opens else 'refused'}", said.startswith("open") == opens, said)


def administrators(desktop, domain, report):
    """The ways for machines that live for years: an account that may join, every service of the machine."""
    secret_given = domain.passwords["svc-mayfly"]
    for method in ("adcli", "realm"):
        given = {
            "domain": domain.ready["domain"], "host_name": f"server-{method}", "method": method, "join_as": "svc-mayfly",
            "ou": domain.ready["ou"], "groups": ["domain users"], "pam": "system",
        }  # fmt: skip
        if method == "realm":
            # realmd knows no other name than the machine's own.
            given["host_name"] = NAME
        desktop.ssh("rm -f /etc/krb5.keytab; cat >/run/mayfly/server.json", stdin=json.dumps(given))
        join = "/usr/lib/mayfly/ad-join join --parameters /run/mayfly/server.json"
        said = json.loads(desktop.ssh(join, stdin=secret_given, ok=(0, 1)).stdout)
        report.check(f"{method} joins with an account that may", said.get("changed"), said)
        said = json.loads(desktop.ssh(join, ok=(0, 1)).stdout)
        report.check("and again changes nothing", said.get("changed") is False, said)
        account = domain.ldap("ldapsearch", "-LLL", "-b", domain.ready["ou"], f"(sAMAccountName={given['host_name']}$)", "dn").stdout
        report.check("its account is in the unit", account.strip(), account.strip())
    for user, opens in (("bob", True), ("alice", True)):
        login, said = desktop.login(user, domain.passwords[user], "login")
        desktop.logout(login)
        report.check(f"{user} logs in on the console of a server", said.startswith("open") == opens, said)


def nothing_secret(desktop, domain, otp, report):
    words = "\n".join([otp, *domain.passwords.values()]) + "\n"
    desktop.ssh("umask 077; cat >/run/words", stdin=words)
    seen = desktop.ssh("journalctl -b --no-pager >/run/journal; grep -rlIFs -f /run/words /etc /root /home /tmp /var/log /var/lib/sss /run | grep -vx /run/words", ok=()).stdout
    report.check("no secret is in a file or in the journal", not seen, seen.split())


def traffic(domain, desktop):
    """Counts, on the bridge, what the desktop asks of the domain controller."""
    run("nft", "-f", "-", stdin=f"""
        table bridge mayfly_test {{
            set asked {{ type inet_proto . inet_service; flags dynamic; }}
            chain forward {{
                type filter hook forward priority 0;
                ip saddr {desktop.address} ip daddr {domain.ready['address']} update @asked {{ ip protocol . th dport }}
            }}
        }}""")  # fmt: skip


def asked(report):
    seen = json.loads(run("nft", "-j", "list", "set", "bridge", "mayfly_test", "asked").stdout)["nftables"][1]["set"]
    ports = sorted("/".join(map(str, reversed(entry["concat"]))) for entry in seen.get("elem", []))
    known = {"53/udp", "53/tcp", "88/tcp", "389/tcp", "389/udp", "445/tcp", "464/tcp"}
    report.check("the domain controller was asked on these ports alone", ports and set(ports) <= known, ports)


def inside(options):
    report = Report()
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mayfly-ad-", dir=options.work)))
        run("mount", "--make-rprivate", "/")
        for command in (
            "link set lo up",
            "link add vmbr2 type bridge",
            "address add 10.85.0.1/24 dev vmbr2",
            "link set vmbr2 up",
        ):
            run("ip", *command.split())
        domain = Domain(work, stack)
        report.check("the domain answers", True, f"{domain.ready['ready_ms']} ms, of it {domain.ready['provision_ms']} ms to provision")
        delegation(domain, report)
        dhcp = subprocess.Popen(
            ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--interface=vmbr2", "--bind-interfaces"]
            + ["--user=root", "--dhcp-range=10.85.0.50,10.85.0.99,1h", f"--dhcp-option=6,{domain.ready['address']}"]
            + [f"--dhcp-leasefile={work / 'leases'}", f"--pid-file={work / 'dnsmasq.pid'}", "--log-facility=/dev/null"]
        )
        stack.callback(dhcp.wait)
        stack.callback(dhcp.kill)
        desktop = Desktop(options.image, work, stack)
        desktop.admit()
        report.check("the machine is up, its host key pinned", True, desktop.address)
        other = work / "other"
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other))
        (work / "wrong_hosts").write_text(f"{desktop.address} {(work / 'other.pub').read_text()}")
        refused = desktop.ssh("true", ok=(), known_hosts="wrong_hosts")
        report.check("a machine with another host key is refused", "Host key verification failed" in refused.stderr, refused.returncode)
        try:
            traffic(domain, desktop)
            desktop.ssh("cat >/run/pam_login.py", stdin=(HERE / "pam_login.py").read_text())
            carols = local_first(desktop, report)
            otp = secrets.token_urlsafe(24)
            domain.ldap("ldapadd", stdin=domain.computer(NAME, domain.ready["ou"], otp))
            refusals(desktop, domain, otp, report)
            converge(desktop, domain, otp, report)
            # The join above took the keytab away to try its password again.
            again = secrets.token_urlsafe(24)
            domain.ldap("ldapmodify", stdin=f"dn: CN={NAME},{domain.ready['ou']}\nchangetype: modify\nreplace: unicodePwd\nunicodePwd:: {secret(again)}\n")
            said = json.loads(desktop.ssh(f"/usr/lib/mayfly/ad-join join --parameters {PARAMETERS}", stdin=again, ok=(0, 1)).stdout)
            report.check("the program alone joins, as the agent will call it", said.get("changed"), said)
            membership(desktop, domain, report)
            asked(report)
            share_down(desktop, domain, report)
            local_beside(desktop, carols, report)
            domain.ldap("ldapdelete", f"CN={NAME},{domain.ready['ou']}")
            said = json.loads(desktop.ssh(f"/usr/lib/mayfly/ad-join join --parameters {PARAMETERS}", stdin="", ok=(0, 1)).stdout)
            report.check("without its account the machine is no member any more", said.get("error") == "parameters", said)
            administrators(desktop, domain, report)
            nothing_secret(desktop, domain, otp, report)
        finally:
            if options.report:
                options.report.write_text(json.dumps(report.checks, indent=1))
            if not report.passed() or sys.exc_info()[0]:
                print(desktop.agent.shell("journalctl -b --no-pager -o short-monotonic")[-20000:], file=sys.stderr)
    return 0 if report.passed() else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", required=True, type=lambda text: Path(text).resolve(), help="folder of a desktop image")
    parser.add_argument("--work", help="folder for the machine's disk")
    parser.add_argument("--report", type=lambda text: Path(text).resolve(), help="file that gets every check as JSON")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return inside(options)
    os.execvp("unshare", "unshare --net --mount --pid --fork --kill-child --mount-proc".split() + [sys.executable, *sys.argv, "--inside"])


if __name__ == "__main__":
    sys.exit(main())
