"""Inventory of Mayfly: desktops from the orchestrator, long-lived machines from Terraform states."""

DOCUMENTATION = """
name: mayfly
short_description: Desktops of a Mayfly orchestrator, and long-lived machines of Terraform states
description:
  - Group C(ephemeral_desktop) holds the desktops of sessions that are not over, as the orchestrator lists them.
  - Group C(domain_vms) holds the machines of the Terraform states that are named.
  - Host keys are checked. A machine's key is expected in O(known_hosts) if that is set, else where SSH looks by itself.
options:
  plugin:
    description: Must be C(mayfly).
    required: true
    choices: [mayfly]
  api:
    description: Address of the orchestrator, without a path. Empty asks none.
    type: str
    default: ""
    env: [{name: MAYFLY_API}]
  token:
    description: Sent to the orchestrator as a bearer token.
    type: str
    default: ""
    env: [{name: MAYFLY_TOKEN}]
  ca_file:
    description: Authorities (PEM) that the orchestrator's certificate is checked with. Empty takes the system's.
    type: path
    env: [{name: MAYFLY_CA_FILE}]
  timeout:
    description: Seconds to wait for the orchestrator.
    type: int
    default: 10
  tfstates:
    description: Terraform state files (version 4), as paths or patterns. Relative ones start at the inventory file's folder.
    type: list
    elements: str
    default: []
  domain_vms_tag:
    description: Takes only machines with this Proxmox tag from the states. Empty takes all.
    type: str
    default: ""
  known_hosts:
    description: File that pins host keys, for every host of this inventory.
    type: path
    default: ""
extends_documentation_fragment: [constructed]
"""

EXAMPLES = """
plugin: mayfly
api: https://mayfly.example.org:5000
tfstates: [../terraform/servers/*.tfstate]
keyed_groups:
  - {key: mayfly_node, prefix: node}
"""

import glob
import ipaddress
import json
import os
from urllib.error import URLError

from ansible.errors import AnsibleParserError
from ansible.module_utils.urls import open_url
from ansible.plugins.inventory import BaseInventoryPlugin, Constructable
from ansible.utils.unsafe_proxy import wrap_var

DESKTOPS = "ephemeral_desktop"
SERVERS = "domain_vms"


class InventoryModule(BaseInventoryPlugin, Constructable):
    NAME = "mayfly"

    def verify_file(self, path):
        return super().verify_file(path) and path.endswith(("mayfly.yml", "mayfly.yaml"))

    def parse(self, inventory, loader, path, cache=True):
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        for group in (DESKTOPS, SERVERS):
            self.inventory.add_group(group)
        if api := self.get_option("api"):
            for name, variables in desktops(self._sessions(api)):
                self._add(DESKTOPS, name, variables)
        folder = os.path.dirname(os.path.abspath(path))
        for pattern in self.get_option("tfstates"):
            for file in sorted(glob.glob(os.path.join(folder, os.path.expanduser(pattern)))):
                for name, variables in machines(self._state(file), self.get_option("domain_vms_tag")):
                    self._add(SERVERS, name, variables)

    def _add(self, group, name, variables):
        if known_hosts := self.get_option("known_hosts"):
            variables["ansible_ssh_common_args"] = f"-o StrictHostKeyChecking=yes -o UserKnownHostsFile={known_hosts}"
        self.inventory.add_host(name, group=group)
        for key, value in variables.items():
            # Data from elsewhere: never a template.
            self.inventory.set_variable(name, key, wrap_var(value))
        strict = self.get_option("strict")
        self._set_composite_vars(self.get_option("compose"), variables, name, strict=strict)
        self._add_host_to_composed_groups(self.get_option("groups"), variables, name, strict=strict)
        self._add_host_to_keyed_groups(self.get_option("keyed_groups"), variables, name, strict=strict)

    def _sessions(self, api):
        url = f"{api.rstrip('/')}/api/sessions"
        token = self.get_option("token")
        try:
            answer = open_url(
                url,
                headers={"Authorization": f"Bearer {token}"} if token else {},
                ca_path=self.get_option("ca_file"),
                timeout=self.get_option("timeout"),
            )
            return json.load(answer)["sessions"]
        except (URLError, OSError, ValueError, KeyError, TypeError) as error:
            raise AnsibleParserError(f"{url} gives no list of sessions: {error}") from error

    @staticmethod
    def _state(file):
        try:
            with open(file, encoding="utf-8") as content:
                state = json.load(content)
            if state["version"] != 4:
                raise ValueError(f"its version is {state['version']}, not 4")
            return state
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AnsibleParserError(f"{file} is no Terraform state: {error}") from error


def desktops(sessions):
    """Names and variables of the sessions' desktops; one that has no address yet is left out."""
    for session in sessions:
        name, address = session.get("vm_name"), session.get("vm_ip")
        if name and address:
            variables = {"ansible_host": address, "ansible_user": "root"}
            for key in ("session_id", "username", "status", "created_at"):
                variables[f"mayfly_{key}"] = session.get(key)
            yield name, variables


def machines(state, tag=""):
    """Names and variables of a state's virtual machines, in the words of both Proxmox providers."""
    for resource in state.get("resources", []):
        if resource.get("mode") != "managed":
            continue
        for instance in resource.get("instances", []):
            values = instance.get("attributes") or {}
            if resource.get("type") == "proxmox_virtual_environment_vm":
                tags = values.get("tags") or []
                address = first_address(address for card in values.get("ipv4_addresses") or [] for address in card)
                node, number = values.get("node_name"), values.get("vm_id")
            elif resource.get("type") == "proxmox_vm_qemu":
                tags = (values.get("tags") or "").replace(",", ";").split(";")
                address = first_address([values.get("default_ipv4_address"), values.get("ssh_host")])
                node, number = values.get("target_node"), values.get("vmid")
            else:
                continue
            if values.get("template") or (tag and tag not in tags):
                continue
            variables = {"mayfly_node": node, "mayfly_vm_id": number, "mayfly_tags": [tag for tag in tags if tag]}
            if address:
                variables["ansible_host"] = address
            yield values["name"], variables


def first_address(addresses):
    """The first that is another machine's: a guest names its loopback first, and link-local ones before DHCP answered."""
    for text in addresses:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            continue
        if not address.is_loopback and not address.is_link_local:
            return text
    return None
