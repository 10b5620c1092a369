"""The inventory plugin and the vault client, through Ansible's own programs.

    python3 -m unittest discover -s ansible/tests
"""

import http.server
import json
import os
import shutil
import subprocess
import tempfile
import threading
import unittest
from pathlib import Path

ANSIBLE = Path(__file__).resolve().parent.parent
SESSIONS = {
    "sessions": [
        {"session_id": "1", "vm_name": "desktop-0000001", "vm_ip": "10.85.0.21", "username": "alice", "status": "ready"},
        {"session_id": "2", "vm_name": None, "vm_ip": None, "username": "bob", "status": "queued"},
    ]
}


def vm(kind, **attributes):
    return {"mode": "managed", "type": kind, "instances": [{"attributes": attributes}]}


STATE = {
    "version": 4,
    "resources": [
        vm(
            "proxmox_virtual_environment_vm",
            name="files",
            vm_id=120,
            node_name="n1",
            tags=["domain"],
            ipv4_addresses=[["127.0.0.1"], ["169.254.3.4"], ["10.0.0.7"]],
        ),
        vm("proxmox_virtual_environment_vm", name="golden", template=True),
        vm("proxmox_vm_qemu", name="print", vmid=121, target_node="n2", tags="domain;x", default_ipv4_address="10.0.0.8"),
        vm("null_resource", id="1"),
        {"mode": "data", "type": "proxmox_virtual_environment_vm", "instances": [{"attributes": {"name": "other"}}]},
    ],
}


class Orchestrator(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        right = self.path == "/api/sessions" and self.headers["Authorization"] == "Bearer t0ken"
        self.send_response(200 if right else 401)
        self.end_headers()
        self.wfile.write(json.dumps(SESSIONS).encode() if right else b"{}")

    def log_message(self, *_):
        pass


def plain(value):
    """Ansible marks text that it will not take for a template."""
    return value["__ansible_unsafe"] if isinstance(value, dict) else value


class Case(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Orchestrator)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        self.api = f"http://127.0.0.1:{server.server_port}"

    def run_ansible(self, *command, **environment):
        return subprocess.run(
            command,
            cwd=ANSIBLE,
            capture_output=True,
            text=True,
            check=False,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self.folder),
                "LC_ALL": "C.UTF-8",
                "PYTHONDONTWRITEBYTECODE": "1",
                # The call may fail, and then must say so.
                "ANSIBLE_INVENTORY_ANY_UNPARSED_IS_FAILED": "1",
                **environment,
            },
        )

    def inventory(self, token="t0ken", **options):
        file = self.folder / "mayfly.yml"
        file.write_text(json.dumps({"plugin": "mayfly", **options}))
        return self.run_ansible("ansible-inventory", "-i", str(file), "--list", MAYFLY_TOKEN=token)

    def test_desktops_come_from_the_orchestrator(self):
        done = self.inventory(api=self.api, known_hosts="/k")
        self.assertEqual(done.returncode, 0, done.stderr)
        listed = json.loads(done.stdout)
        self.assertEqual(listed["ephemeral_desktop"]["hosts"], ["desktop-0000001"])
        variables = listed["_meta"]["hostvars"]["desktop-0000001"]
        self.assertEqual(plain(variables["ansible_host"]), "10.85.0.21")
        self.assertEqual(plain(variables["mayfly_username"]), "alice")
        self.assertIn("StrictHostKeyChecking=yes", plain(variables["ansible_ssh_common_args"]))

    def test_long_lived_machines_come_from_states(self):
        (self.folder / "a.tfstate").write_text(json.dumps(STATE))
        done = self.inventory(tfstates=["*.tfstate"], keyed_groups=[{"key": "mayfly_node", "prefix": "node"}])
        self.assertEqual(done.returncode, 0, done.stderr)
        listed = json.loads(done.stdout)
        self.assertEqual(sorted(listed["domain_vms"]["hosts"]), ["files", "print"])
        self.assertEqual(listed["node_n2"]["hosts"], ["print"])
        addresses = {name: plain(of["ansible_host"]) for name, of in listed["_meta"]["hostvars"].items()}
        self.assertEqual(addresses, {"files": "10.0.0.7", "print": "10.0.0.8"})

    def test_a_tag_chooses_among_them(self):
        (self.folder / "a.tfstate").write_text(json.dumps(STATE))
        listed = json.loads(self.inventory(tfstates=["a.tfstate"], domain_vms_tag="x").stdout)
        self.assertEqual(listed["domain_vms"]["hosts"], ["print"])

    def test_what_cannot_be_read_is_an_error_and_not_an_empty_list(self):
        (self.folder / "a.tfstate").write_text('{"version": 3}')
        for options in ({"api": self.api, "token": "wrong"}, {"tfstates": ["a.tfstate"]}):
            done = self.inventory(**options)
            self.assertNotEqual(done.returncode, 0)
            self.assertNotIn("Traceback", done.stderr)

    def test_the_site_s_own_inventory_is_whole(self):
        done = self.run_ansible("ansible-inventory", "-i", "inventory", "--list")
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_a_vault_opens_with_each_source_of_its_password(self):
        client = f"mayfly@{ANSIBLE / 'vault-client'}"
        vault = self.folder / "vault.yml"
        shutil.copy(ANSIBLE / "inventory/group_vars/all/vault.yml.example", vault)
        done = self.run_ansible("ansible-vault", "encrypt", "--vault-id", client, str(vault), MAYFLY_VAULT_PASSWORD="p w")
        self.assertEqual(done.returncode, 0, done.stderr)
        file = self.folder / ".config/mayfly/vault-mayfly"
        file.parent.mkdir(parents=True)
        file.write_text("p w\n")
        for mode, opens in ((0o600, True), (0o644, False)):
            file.chmod(mode)
            done = self.run_ansible("ansible-vault", "view", "--vault-id", client, str(vault))
            self.assertEqual("vault_ad_join_password" in done.stdout, opens, done.stderr)
            self.assertNotIn("p w", done.stderr)


if __name__ == "__main__":
    unittest.main()
