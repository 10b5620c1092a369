//! What Proxmox VE answers, as far as it is used. It is written in Perl: numbers come as texts at times, and truth as `1`, `"1"` or
//! `true`. What is not known is left out, so that a newer version may say more.

use super::name::{NodeName, PoolName, StorageName, VmId};
use super::upid::Upid;
use serde::de::{Error, IgnoredAny};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

/// Nothing that is of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done;

impl<'de> Deserialize<'de> for Done {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(from).map(|_| Self)
    }
}

/// `GET /version`
#[derive(Clone, Debug, Deserialize)]
pub struct Version {
    /// `9.1.2`
    pub version: String,
    /// `9.1`
    pub release: String,
}

impl Version {
    /// `9`; zero if it cannot be read.
    #[must_use]
    pub fn major(&self) -> u32 {
        let digits = self.version.split('.').next().unwrap_or_default();
        digits.parse().unwrap_or(0)
    }
}

/// `GET /access/permissions`: path, then privilege, then whether it holds below that path as well.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Permissions(BTreeMap<String, BTreeMap<String, bool>>);

impl<'de> Deserialize<'de> for Permissions {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let map = BTreeMap::<String, BTreeMap<String, Flag>>::deserialize(from)?;
        let plain = |privileges: BTreeMap<String, Flag>| {
            privileges
                .into_iter()
                .map(|(name, flag)| (name, flag.0))
                .collect()
        };
        Ok(Self(
            map.into_iter()
                .map(|(path, privileges)| (path, plain(privileges)))
                .collect(),
        ))
    }
}

impl Permissions {
    /// Adds what another answer says.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Whether `privilege` is held on `path`. The nearest path that is named decides: permissions of a deeper path replace those of
    /// the ones above (pveum(1), "Inheritance").
    #[must_use]
    pub fn hold(&self, path: &str, privilege: &str) -> bool {
        if let Some(here) = self.0.get(path) {
            return here.contains_key(privilege);
        }
        let mut above = path;
        while above != "/" {
            above = match above.rsplit_once('/') {
                Some(("", _)) | None => "/",
                Some((parent, _)) => parent,
            };
            if let Some(privileges) = self.0.get(above) {
                return privileges.get(privilege) == Some(&true);
            }
        }
        false
    }
}

/// A line of `GET /cluster/resources`.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Resource {
    /// A virtual machine.
    Qemu(GuestLine),
    /// A node.
    Node(NodeLine),
    /// A storage on one node.
    Storage(StorageLine),
    /// Containers, networks, and what is yet to come.
    #[serde(other)]
    Other,
}

/// A virtual machine.
#[derive(Clone, Debug, Deserialize)]
pub struct GuestLine {
    /// Its number.
    #[serde(deserialize_with = "vm_id")]
    pub vmid: VmId,
    /// Where it is.
    pub node: NodeName,
    /// Its name; none if its node is offline and nobody remembers.
    pub name: Option<String>,
    /// Whether it runs; [`Power::Unknown`] on a node that is offline.
    #[serde(default)]
    pub status: Power,
    /// Whether it is a template.
    #[serde(default, deserialize_with = "flag")]
    pub template: bool,
    /// Its pool.
    pub pool: Option<PoolName>,
    /// What holds its lock: `clone`, `backup`, `migrate` and so on.
    pub lock: Option<String>,
    /// Its tags, with `;` between them.
    #[serde(default)]
    tags: String,
}

impl GuestLine {
    /// Its tags.
    pub fn tags(&self) -> impl Iterator<Item = &str> {
        self.tags
            .split([';', ',', ' '])
            .filter(|tag| !tag.is_empty())
    }
}

/// A node. Its figures are zero without `Sys.Audit` on it.
#[derive(Clone, Debug, Deserialize)]
pub struct NodeLine {
    /// Its name.
    pub node: NodeName,
    /// Whether it is up.
    #[serde(default)]
    pub status: NodeState,
    /// Memory in use, in bytes.
    #[serde(default, deserialize_with = "number")]
    pub mem: u64,
    /// Memory in all, in bytes.
    #[serde(default, deserialize_with = "number")]
    pub maxmem: u64,
    /// Processors.
    #[serde(default, deserialize_with = "number")]
    pub maxcpu: u64,
}

/// Whether a node is up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// It is.
    Online,
    /// It is not.
    Offline,
    /// Not known, such as right after a start.
    #[default]
    #[serde(other)]
    Unknown,
}

/// A storage on one node.
#[derive(Clone, Debug, Deserialize)]
pub struct StorageLine {
    /// Its name.
    pub storage: StorageName,
    /// The node.
    pub node: NodeName,
    /// `available`, or `unknown` if it or its node is down.
    #[serde(default)]
    pub status: String,
    /// What it may hold, with commas: `images`, `rootdir`, `iso` and so on.
    #[serde(default)]
    pub content: String,
    /// Whether all nodes see the same.
    #[serde(default, deserialize_with = "flag")]
    pub shared: bool,
    /// In use, in bytes.
    #[serde(default, deserialize_with = "number")]
    pub disk: u64,
    /// In all, in bytes; zero if it is not known.
    #[serde(default, deserialize_with = "number")]
    pub maxdisk: u64,
}

/// Whether a guest runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Power {
    /// It runs, or is paused.
    Running,
    /// It does not.
    Stopped,
    /// Its node does not say.
    #[default]
    #[serde(other)]
    Unknown,
}

/// `GET /cluster/nextid`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextId(pub VmId);

impl<'de> Deserialize<'de> for NextId {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        vm_id(from).map(Self)
    }
}

/// `GET …/feature?feature=clone`
#[derive(Clone, Debug, Deserialize)]
pub struct CloneFeature {
    /// Whether it can be done.
    #[serde(rename = "hasFeature", default, deserialize_with = "flag")]
    pub possible: bool,
    /// On which nodes.
    #[serde(default)]
    pub nodes: Vec<NodeName>,
}

/// `GET …/config`
#[derive(Clone, Debug, Deserialize)]
pub struct Config(BTreeMap<String, Value>);

impl Config {
    /// A setting, as a text.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<String> {
        self.0.get(name).map(|value| match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        })
    }

    /// For [`Settings::unless_changed_since`](super::call::Settings::unless_changed_since).
    #[must_use]
    pub fn digest(&self) -> Option<String> {
        self.get("digest")
    }

    /// Hardware address of a network device, in lower case: from `virtio=BC:24:11:…,bridge=vmbr2`.
    #[must_use]
    pub fn mac(&self, index: u8) -> Option<String> {
        let device = self.get(&format!("net{index}"))?;
        device
            .split(',')
            .filter_map(|part| part.split_once('='))
            .find(|(_, value)| is_mac(value))
            .map(|(_, mac)| mac.to_ascii_lowercase())
    }

    /// Whether the firewall's rules hold for a network device.
    #[must_use]
    pub fn is_behind_firewall(&self, index: u8) -> bool {
        self.get(&format!("net{index}"))
            .is_some_and(|device| device.split(',').any(|part| part == "firewall=1"))
    }
}

/// `GET …/firewall/options`, of the cluster or of a guest.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct FirewallOptions {
    /// Whether it is on; the cluster's may be a number above 1.
    #[serde(default, deserialize_with = "flag")]
    pub enable: bool,
    policy_in: Option<Policy>,
    policy_out: Option<Policy>,
}

impl FirewallOptions {
    /// What happens to what no rule of a guest names, on its way in; without a setting it is dropped, as
    /// `generate_tap_rules_direction` does (pve-firewall, `PVE/Firewall.pm`).
    #[must_use]
    pub fn policy_in(&self) -> Policy {
        self.policy_in.unwrap_or(Policy::Drop)
    }

    /// The same on its way out; without a setting it passes.
    #[must_use]
    pub fn policy_out(&self) -> Policy {
        self.policy_out.unwrap_or(Policy::Accept)
    }
}

/// What happens to what no rule names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Policy {
    /// It passes.
    Accept,
    /// It does not, and the sender is told.
    Reject,
    /// It does not.
    Drop,
}

/// A line of `GET …/firewall/rules`.
#[derive(Clone, Debug, Deserialize)]
pub struct FirewallRule {
    /// Its place.
    #[serde(default, deserialize_with = "number")]
    pub pos: u64,
    /// `in`, `out`, or `group`: a security group's rules.
    #[serde(rename = "type")]
    pub kind: String,
    /// `ACCEPT`, `DROP` or `REJECT`; the name of a group.
    pub action: String,
    /// Whether it counts.
    #[serde(default, deserialize_with = "flag")]
    pub enable: bool,
    /// Whom it is about, on the way in: addresses, `+` and the name of an IP set, or an alias. Everybody without one.
    pub source: Option<String>,
}

impl FirewallRule {
    /// Whether it lets in what anybody sends, to some port at least.
    #[must_use]
    pub fn lets_anybody_in(&self) -> bool {
        let anybody = |source: &str| {
            source
                .split(',')
                .any(|address| address.trim().ends_with("/0"))
        };
        self.kind == "in" && self.action == "ACCEPT" && self.source.as_deref().is_none_or(anybody)
    }
}

fn is_mac(text: &str) -> bool {
    text.len() == 17
        && text.split(':').count() == 6
        && text
            .split(':')
            .all(|byte| byte.len() == 2 && byte.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// `GET …/status/current`
#[derive(Clone, Debug, Deserialize)]
pub struct VmStatus {
    /// Whether it runs.
    pub status: Power,
    /// Its name.
    pub name: Option<String>,
    /// What holds its lock.
    pub lock: Option<String>,
    /// Whether its settings say that it has an agent.
    #[serde(default, deserialize_with = "flag")]
    pub agent: bool,
    /// Seconds since it started.
    #[serde(default, deserialize_with = "number")]
    pub uptime: u64,
}

/// What the agent says, in its envelope.
#[derive(Clone, Debug, Deserialize)]
pub struct AgentResult<T> {
    /// What it says.
    pub result: T,
}

/// A network device as the agent sees it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Interface {
    /// Its name in the guest.
    pub name: String,
    /// Its hardware address.
    pub hardware_address: Option<String>,
    /// Its addresses; none before DHCP.
    #[serde(default)]
    pub ip_addresses: Vec<Address>,
}

/// An address of an [`Interface`].
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Address {
    /// The address.
    pub ip_address: String,
}

/// The address of the device with this hardware address: neither loopback nor link-local, so `None` until DHCP gave one.
#[must_use]
pub fn ipv4_of(interfaces: &[Interface], mac: &str) -> Option<Ipv4Addr> {
    interfaces
        .iter()
        .filter(|interface| {
            let own = interface.hardware_address.as_deref();
            own.is_some_and(|own| own.eq_ignore_ascii_case(mac))
        })
        .flat_map(|interface| &interface.ip_addresses)
        .filter_map(|address| address.ip_address.parse::<Ipv4Addr>().ok())
        .find(|ip| !ip.is_loopback() && !ip.is_link_local() && !ip.is_unspecified())
}

/// `GET …/agent/file-read`
#[derive(Clone, Deserialize)]
pub struct FileContent {
    /// What is in it.
    pub content: String,
    /// Whether there is more.
    #[serde(default, deserialize_with = "flag")]
    pub truncated: bool,
}

// What is in a guest's file may be secret.
impl std::fmt::Debug for FileContent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileContent")
            .field("length", &self.content.len())
            .field("truncated", &self.truncated)
            .finish()
    }
}

/// `POST …/agent/exec`
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Execution {
    /// The number of the process in the guest.
    #[serde(deserialize_with = "number")]
    pub pid: u64,
}

/// `GET …/agent/exec-status`
#[derive(Clone, Deserialize)]
pub struct Executed {
    /// Whether it has ended.
    #[serde(default, deserialize_with = "flag")]
    pub exited: bool,
    /// Its standard output, complete once it has ended.
    #[serde(rename = "out-data", default, deserialize_with = "bytes")]
    pub output: String,
}

// What a program in a guest says may be secret.
impl std::fmt::Debug for Executed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Executed")
            .field("exited", &self.exited)
            .field("length", &self.output.len())
            .finish()
    }
}

/// A line of `GET /nodes/{node}/tasks`
#[derive(Clone, Debug, Deserialize)]
pub struct TaskLine {
    /// Its id.
    pub upid: Upid,
    /// Who started it.
    pub user: String,
    /// When it began, in seconds since 1970.
    #[serde(deserialize_with = "number")]
    pub starttime: u64,
    /// `OK`, `WARNINGS: 2`, or what went wrong. None while it runs.
    pub status: Option<String>,
}

/// `GET …/tasks/{upid}/status`
#[derive(Clone, Debug, Deserialize)]
pub struct TaskStatus {
    /// Whether it runs.
    pub status: TaskState,
    /// `OK`, `WARNINGS: 2`, or what went wrong. None while it runs.
    pub exitstatus: Option<String>,
}

/// Whether a task runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskState {
    /// It does.
    Running,
    /// It has ended.
    Stopped,
}

/// A line of `GET …/tasks/{upid}/log`.
#[derive(Clone, Debug, Deserialize)]
pub struct LogLine {
    /// The line.
    #[serde(rename = "t", default)]
    pub text: String,
}

// ─── what Perl makes of numbers and truth ────────────────────────────────────────────────────────────────────────────

struct Flag(bool);

impl<'de> Deserialize<'de> for Flag {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        flag(from).map(Self)
    }
}

fn flag<'de, D: Deserializer<'de>>(from: D) -> Result<bool, D::Error> {
    match Value::deserialize(from)? {
        Value::Null => Ok(false),
        Value::Bool(flag) => Ok(flag),
        Value::Number(number) => Ok(number.as_f64() != Some(0.0)),
        Value::String(text) => Ok(!matches!(text.as_str(), "" | "0" | "false" | "no" | "off")),
        other => Err(D::Error::custom(format!(
            "{other} is neither true nor false"
        ))),
    }
}

fn number<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    let value = Value::deserialize(from)?;
    let wrong = || D::Error::custom(format!("{value} is no number"));
    match &value {
        Value::Null => Ok(0),
        Value::Number(number) => number
            .as_u64()
            // Not negative, so that nothing is lost but a fraction.
            .or_else(|| number.as_f64().filter(|n| *n >= 0.0).map(|n| n as u64))
            .ok_or_else(wrong),
        Value::String(text) => text.parse().map_err(|_| wrong()),
        _ => Err(wrong()),
    }
}

/// A text of the guest: Perl takes its bytes for characters, so what is beyond ASCII arrives as Latin-1.
fn bytes<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let text = String::deserialize(from)?;
    let bytes: Result<Vec<u8>, _> = text.chars().map(u8::try_from).collect();
    Ok(bytes.map_or(text, |bytes| String::from_utf8_lossy(&bytes).into_owned()))
}

fn vm_id<'de, D: Deserializer<'de>>(from: D) -> Result<VmId, D::Error> {
    let number = number(from)?;
    u32::try_from(number)
        .map_err(D::Error::custom)
        .and_then(|number| VmId::try_from(number).map_err(D::Error::custom))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn truth_and_numbers_are_read_in_all_their_forms() {
        for (sent, possible) in [
            (json!({"hasFeature": 1}), true),
            (json!({"hasFeature": "1"}), true),
            (json!({"hasFeature": true}), true),
            (json!({"hasFeature": 0}), false),
            (json!({"hasFeature": ""}), false),
            (json!({"hasFeature": null}), false),
            (json!({}), false),
        ] {
            let read: CloneFeature = serde_json::from_value(sent.clone()).unwrap();
            assert_eq!(read.possible, possible, "{sent}");
        }
        for sent in [json!(101), json!("101")] {
            let read: NextId = serde_json::from_value(sent).unwrap();
            assert_eq!(read.0.get(), 101);
        }
    }

    #[test]
    fn what_a_program_said_is_read_as_utf_8() {
        let read = |output: &str| {
            let sent = json!({"exited": 1, "exitcode": 0, "out-data": output});
            let read: Executed = serde_json::from_value(sent).unwrap();
            assert!(read.exited);
            read.output
        };
        assert_eq!(read("a \u{c3}\u{a9}t\u{c3}\u{a9}\n"), "a été\n");
        assert_eq!(read("\u{ff}"), "\u{fffd}");
        assert_eq!(read("œ"), "œ", "nothing to undo");
        let runs: Executed = serde_json::from_value(json!({"exited": 0})).unwrap();
        assert!(!runs.exited && runs.output.is_empty());
    }

    #[test]
    fn resources_of_every_kind_are_read_and_unknown_ones_passed_over() {
        let lines: Vec<Resource> = serde_json::from_value(json!([
            {"type": "qemu", "id": "qemu/100", "vmid": "100", "node": "pve1", "status": "running",
             "name": "desktop-0a1b2c3", "tags": "mayfly;x", "template": 0, "pool": "daas"},
            {"type": "qemu", "id": "qemu/101", "vmid": 101, "node": "pve2", "status": "unknown"},
            {"type": "node", "id": "node/pve2", "node": "pve2", "status": "offline"},
            {"type": "node", "node": "pve1", "status": "online", "mem": 2.5e9, "maxmem": 8_000_000_000_u64},
            {"type": "storage", "node": "pve1", "storage": "local-lvm", "status": "available", "shared": 0,
             "content": "images,rootdir", "disk": 1, "maxdisk": "10"},
            {"type": "lxc", "vmid": 102, "node": "pve1"},
            {"type": "sdn", "sdn": "localnetwork", "node": "pve1"},
            {"type": "yet-to-come"},
        ]))
        .unwrap();
        let [
            Resource::Qemu(first),
            Resource::Qemu(second),
            Resource::Node(off),
            Resource::Node(on),
            Resource::Storage(storage),
            Resource::Other,
            Resource::Other,
            Resource::Other,
        ] = &lines[..]
        else {
            panic!("{lines:?}");
        };
        assert_eq!(first.tags().collect::<Vec<_>>(), ["mayfly", "x"]);
        assert_eq!(first.status, Power::Running);
        assert_eq!(
            (second.status, second.name.as_ref()),
            (Power::Unknown, None)
        );
        assert_eq!((off.status, off.maxmem), (NodeState::Offline, 0));
        assert_eq!((on.status, on.mem), (NodeState::Online, 2_500_000_000));
        assert_eq!((storage.shared, storage.maxdisk), (false, 10));
    }

    #[test]
    fn the_nearest_path_decides_what_may_be_done() {
        let held: Permissions = serde_json::from_value(json!({
            "/": {"Sys.Audit": 1},
            "/vms": {"VM.Audit": 1, "VM.Clone": 0},
            "/vms/100": {"VM.Allocate": 0},
        }))
        .unwrap();
        assert!(held.hold("/nodes/pve1", "Sys.Audit"));
        assert!(held.hold("/vms/101", "VM.Audit"));
        assert!(held.hold("/vms", "VM.Clone"));
        assert!(!held.hold("/vms/101", "VM.Clone"), "it does not propagate");
        assert!(held.hold("/vms/100", "VM.Allocate"));
        assert!(!held.hold("/vms/100", "VM.Audit"), "replaced there");
        assert!(!Permissions::default().hold("/", "Sys.Audit"));
    }

    #[test]
    fn the_address_is_that_of_our_device_once_dhcp_gave_one() {
        let seen = |addresses: Value| -> Vec<Interface> {
            serde_json::from_value(json!([
                {"name": "lo", "hardware-address": "00:00:00:00:00:00",
                 "ip-addresses": [{"ip-address": "127.0.0.1", "ip-address-type": "ipv4", "prefix": 8}]},
                {"name": "docker0", "hardware-address": "02:42:00:00:00:01",
                 "ip-addresses": [{"ip-address": "172.17.0.1", "ip-address-type": "ipv4", "prefix": 16}]},
                {"name": "ens18", "hardware-address": "bc:24:11:aa:bb:cc", "ip-addresses": addresses},
                {"name": "sit0"},
            ]))
            .unwrap()
        };
        let mac = "BC:24:11:AA:BB:CC";
        assert_eq!(ipv4_of(&seen(json!([])), mac), None);
        let early = json!([{"ip-address": "fe80::1"}, {"ip-address": "169.254.1.1"}]);
        assert_eq!(ipv4_of(&seen(early), mac), None);
        let ready = json!([{"ip-address": "fe80::1"}, {"ip-address": "192.0.2.7"}]);
        assert_eq!(
            ipv4_of(&seen(ready), mac),
            Some(Ipv4Addr::new(192, 0, 2, 7))
        );
    }

    #[test]
    fn the_hardware_address_is_read_from_the_settings() {
        let config: Config = serde_json::from_value(json!({
            "net0": "virtio=BC:24:11:AA:BB:CC,bridge=vmbr2,firewall=1", "net1": "virtio,bridge=vmbr2",
            "cores": 2, "digest": "abc",
        }))
        .unwrap();
        assert_eq!(config.mac(0).as_deref(), Some("bc:24:11:aa:bb:cc"));
        assert_eq!(config.mac(1), None);
        assert_eq!(config.get("cores").as_deref(), Some("2"));
        assert_eq!(config.digest().as_deref(), Some("abc"));
    }
}
