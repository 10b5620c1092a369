//! The calls, each described once, as data: method, path, parameters. Nothing is sent here.
//!
//! Names, types and limits are those of Proxmox VE's description of its API; a test compares every call with it.

use super::error::Effect;
use super::name::{Guest, NodeName, PoolName, VmId};
use super::reply::{
    AgentResult, CloneFeature, Config, Done, Executed, Execution, FileContent, FirewallOptions,
    FirewallRule, Interface, LogLine, NextId, Permissions, Resource, TaskLine, TaskStatus, Version,
    VmStatus,
};
use super::upid::Upid;
use data_encoding::BASE64;
use form_urlencoded::byte_serialize;
use secrecy::{ExposeSecret, SecretString};
use std::marker::PhantomData;
use std::time::Duration;

/// How a call is sent: `GET` and `DELETE` carry parameters in the query, the others in a form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Reads.
    Get,
    /// Makes or starts.
    Post,
    /// Changes.
    Put,
    /// Removes.
    Delete,
}

impl Method {
    /// As HTTP writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Delete => "DELETE",
        }
    }
}

/// The value of a parameter.
#[derive(Clone, Debug)]
pub enum Value {
    /// A text.
    Text(String),
    /// A text that nothing may show.
    Secret(SecretString),
    /// A number.
    Number(u64),
    /// Sent as `1` or `0`.
    Flag(bool),
    /// Texts that are sent one by one under the same name.
    List(Vec<String>),
}

impl Value {
    /// As it is sent, before it is encoded for a URL; the parts of a list with NUL in between. Shows secrets.
    #[must_use]
    pub fn sent(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Secret(text) => text.expose_secret().to_owned(),
            Self::Number(number) => number.to_string(),
            Self::Flag(flag) => u8::from(*flag).to_string(),
            Self::List(texts) => texts.join("\0"),
        }
    }
}

/// A call whose successful answer is a `T`.
#[derive(Clone, Debug)]
pub struct Call<T> {
    method: Method,
    template: &'static str,
    parameters: Vec<(String, Value)>,
    effect: Effect,
    answer: PhantomData<fn() -> T>,
}

impl<T> Call<T> {
    fn new(method: Method, template: &'static str) -> Self {
        Self {
            method,
            template,
            parameters: Vec::new(),
            effect: match method {
                Method::Get => Effect::Reads,
                _ => Effect::Changes,
            },
            answer: PhantomData,
        }
    }

    fn with(mut self, name: &str, value: Value) -> Self {
        self.parameters.push((name.to_owned(), value));
        self
    }

    fn text(self, name: &str, text: &str) -> Self {
        self.with(name, Value::Text(text.to_owned()))
    }

    fn some(self, name: &str, text: Option<&str>) -> Self {
        match text {
            Some(text) => self.text(name, text),
            None => self,
        }
    }

    fn number(self, name: &str, number: impl Into<u64>) -> Self {
        self.with(name, Value::Number(number.into()))
    }

    fn on(self, name: &str) -> Self {
        self.with(name, Value::Flag(true))
    }

    fn guest(self, guest: &Guest) -> Self {
        self.text("node", guest.node.as_str())
            .number("vmid", guest.id.get())
    }

    fn task(self, upid: &Upid) -> Self {
        self.text("node", upid.node().as_str())
            .text("upid", upid.as_str())
    }

    fn settings(mut self, settings: Settings) -> Self {
        self.parameters.extend(settings.0);
        self
    }

    /// The method.
    #[must_use]
    pub fn method(&self) -> Method {
        self.method
    }

    /// The path below `/api2/json`, with `{names}` where parameters go.
    #[must_use]
    pub fn template(&self) -> &'static str {
        self.template
    }

    /// All parameters, those of the path among them.
    #[must_use]
    pub fn parameters(&self) -> &[(String, Value)] {
        &self.parameters
    }

    /// Whether it changes anything.
    #[must_use]
    pub fn effect(&self) -> Effect {
        self.effect
    }

    /// The path, ready for a URL.
    #[must_use]
    pub fn path(&self) -> String {
        self.parameters
            .iter()
            .filter(|(name, _)| self.in_path(name))
            .fold(self.template.to_owned(), |path, (name, value)| {
                path.replace(&format!("{{{name}}}"), &percent_encoded(&value.sent()))
            })
    }

    /// The parameters that are not in the path, encoded as a form or a query.
    pub(super) fn form(&self) -> String {
        let mut form = form_urlencoded::Serializer::new(String::new());
        for (name, value) in self
            .parameters
            .iter()
            .filter(|(name, _)| !self.in_path(name))
        {
            match value {
                Value::List(texts) => {
                    form.extend_pairs(texts.iter().map(|text| (name, text)));
                }
                value => {
                    form.append_pair(name, &value.sent());
                }
            }
        }
        form.finish()
    }

    /// What is in it that nothing may show.
    pub(super) fn secrets(&self) -> impl Iterator<Item = &SecretString> {
        self.parameters.iter().filter_map(|(_, value)| match value {
            Value::Secret(secret) => Some(secret),
            _ => None,
        })
    }

    fn in_path(&self, name: &str) -> bool {
        self.template
            .split('/')
            .any(|part| part.strip_prefix('{').and_then(|p| p.strip_suffix('}')) == Some(name))
    }

    /// The same for every node and machine, such as `DELETE /nodes/{node}/qemu/{vmid}`.
    pub(super) fn pattern(&self) -> String {
        format!("{} {}", self.method.as_str(), self.template)
    }

    /// `POST /nodes/pve1/qemu/100/clone`: for people.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = self.pattern();
        for (name, value) in self
            .parameters
            .iter()
            .filter(|(name, _)| self.in_path(name))
        {
            text = text.replace(&format!("{{{name}}}"), &value.sent());
        }
        text
    }
}

/// Percent-encoded, blanks as `%20`: for a part of a path, and for values that Proxmox VE wants encoded.
fn percent_encoded(text: &str) -> String {
    // Only blanks become `+`; a `+` becomes `%2B`.
    byte_serialize(text.as_bytes())
        .collect::<String>()
        .replace('+', "%20")
}

// ─── who we are and what there is ────────────────────────────────────────────────────────────────────────────────────

/// The version of the node that answers. Any token that is accepted may ask.
#[must_use]
pub fn version() -> Call<Version> {
    Call::new(Method::Get, "/version")
}

/// What the token may do on `path`, what it inherits there and by a pool included.
#[must_use]
pub fn permissions(path: &str) -> Call<Permissions> {
    Call::new(Method::Get, "/access/permissions").text("path", path)
}

/// What [`cluster_resources`] asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Guests.
    Guests,
    /// Nodes, those that are offline among them.
    Nodes,
    /// Storages, one line for each node that has it.
    Storages,
}

/// Guests, nodes or storages of the whole cluster, as far as the token may see them. Answered from what the cluster knows, so
/// that nodes that are offline delay nothing.
#[must_use]
pub fn cluster_resources(kind: Kind) -> Call<Vec<Resource>> {
    let word = match kind {
        Kind::Guests => "vm",
        Kind::Nodes => "node",
        Kind::Storages => "storage",
    };
    Call::new(Method::Get, "/cluster/resources").text("type", word)
}

/// Whether a number is free now. It reserves nothing: two who ask are told the same.
/// A number that is taken is an error with [`Cause::IdTaken`](super::Cause::IdTaken).
#[must_use]
pub fn id_is_free(id: VmId) -> Call<NextId> {
    Call::new(Method::Get, "/cluster/nextid").number("vmid", id.get())
}

// ─── a guest's life ──────────────────────────────────────────────────────────────────────────────────────────────────

/// Whether the disks of a template can be cloned as linked, and on which nodes. `VM.Audit`.
#[must_use]
pub fn clone_feature(template: &Guest) -> Call<CloneFeature> {
    Call::new(Method::Get, "/nodes/{node}/qemu/{vmid}/feature")
        .guest(template)
        .text("feature", "clone")
}

/// What [`clone_linked`] makes.
#[derive(Clone, Debug)]
pub struct NewClone {
    /// The number of the clone.
    pub id: VmId,
    /// Its name: a DNS name.
    pub name: String,
    /// The pool it is put into.
    pub pool: Option<PoolName>,
    /// The node it is made on, if not the template's: its disks must be on a storage that both have.
    pub target: Option<NodeName>,
    /// Notes.
    pub description: Option<String>,
}

/// A linked clone: its disks hold only what differs from the template's, on the same storage. A task.
///
/// `VM.Clone` on the template, `VM.Allocate` on `/vms/{id}` or the pool, `Datastore.AllocateSpace` on the storage, `SDN.Use`
/// on the bridge.
#[must_use]
pub fn clone_linked(template: &Guest, new: &NewClone) -> Call<Upid> {
    Call::new(Method::Post, "/nodes/{node}/qemu/{vmid}/clone")
        .guest(template)
        .number("newid", new.id.get())
        .text("name", &new.name)
        .with("full", Value::Flag(false))
        .some("pool", new.pool.as_ref().map(PoolName::as_str))
        .some("target", new.target.as_ref().map(NodeName::as_str))
        .some("description", new.description.as_deref())
}

/// The settings that a guest has. `VM.Audit`.
#[must_use]
pub fn config(guest: &Guest) -> Call<Config> {
    Call::new(Method::Get, "/nodes/{node}/qemu/{vmid}/config").guest(guest)
}

/// Changes settings, at once and without a task. `VM.Config.…`, one for each kind of setting.
#[must_use]
pub fn set_config(guest: &Guest, settings: Settings) -> Call<Done> {
    Call::new(Method::Put, "/nodes/{node}/qemu/{vmid}/config")
        .guest(guest)
        .settings(settings)
}

/// Settings to change.
#[derive(Clone, Debug, Default)]
pub struct Settings(Vec<(String, Value)>);

impl Settings {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn set(mut self, name: impl Into<String>, value: Value) -> Self {
        self.0.push((name.into(), value));
        self
    }

    fn text(self, name: impl Into<String>, text: impl Into<String>) -> Self {
        self.set(name, Value::Text(text.into()))
    }

    /// Processors.
    #[must_use]
    pub fn cores(self, cores: u32) -> Self {
        self.set("cores", Value::Number(cores.into()))
    }

    /// Memory.
    #[must_use]
    pub fn memory_mib(self, mib: u32) -> Self {
        self.set("memory", Value::Number(mib.into()))
    }

    /// Tags; a datacenter whose `user-tag-access` is not `free` must allow them.
    #[must_use]
    pub fn tags(self, tags: &[&str]) -> Self {
        self.text("tags", tags.join(";"))
    }

    /// Notes.
    #[must_use]
    pub fn description(self, text: &str) -> Self {
        self.text("description", text)
    }

    /// The guest has an agent.
    #[must_use]
    pub fn agent(self) -> Self {
        self.text("agent", "enabled=1")
    }

    /// A network device on this bridge, behind the firewall, with a new hardware address.
    #[must_use]
    pub fn network(self, index: u8, bridge: &str) -> Self {
        self.text(
            format!("net{index}"),
            format!("virtio,bridge={bridge},firewall=1"),
        )
    }

    /// cloud-init: this network device asks for its address.
    #[must_use]
    pub fn dhcp(self, index: u8) -> Self {
        self.text(format!("ipconfig{index}"), "ip=dhcp")
    }

    /// cloud-init: the account.
    #[must_use]
    pub fn user(self, name: &str) -> Self {
        self.text("ciuser", name)
    }

    /// cloud-init: its keys, as in `authorized_keys`. Proxmox VE wants the value percent-encoded (format `urlencoded`), and the
    /// form encodes it once more.
    #[must_use]
    pub fn ssh_keys(self, keys: &str) -> Self {
        self.text("sshkeys", percent_encoded(keys.trim()))
    }

    /// cloud-init: the first boot upgrades no packages.
    #[must_use]
    pub fn without_upgrade(self) -> Self {
        self.set("ciupgrade", Value::Flag(false))
    }

    /// cloud-init: name servers and search domain.
    #[must_use]
    pub fn dns(self, servers: &[std::net::IpAddr], search: &str) -> Self {
        let servers: Vec<String> = servers.iter().map(ToString::to_string).collect();
        self.text("nameserver", servers.join(" "))
            .text("searchdomain", search)
    }

    /// Refused unless the settings are still those with this digest ([`Config::digest`]).
    #[must_use]
    pub fn unless_changed_since(self, digest: &str) -> Self {
        self.text("digest", digest)
    }
}

/// Makes a disk larger: `size_gib` is its new size. A task; smaller sizes are refused. `VM.Config.Disk`.
#[must_use]
pub fn resize(guest: &Guest, disk: &str, size_gib: u32) -> Call<Upid> {
    Call::new(Method::Put, "/nodes/{node}/qemu/{vmid}/resize")
        .guest(guest)
        .text("disk", disk)
        .text("size", &format!("{size_gib}G"))
}

/// Starts it. A task. `VM.PowerMgmt`.
#[must_use]
pub fn start(guest: &Guest) -> Call<Upid> {
    Call::new(Method::Post, "/nodes/{node}/qemu/{vmid}/status/start").guest(guest)
}

/// Stops it at once, as pulling the plug would. A task. `VM.PowerMgmt`.
#[must_use]
pub fn stop(guest: &Guest) -> Call<Upid> {
    Call::new(Method::Post, "/nodes/{node}/qemu/{vmid}/status/stop").guest(guest)
}

/// Asks it to power off; after `patience` it is stopped. A task. `VM.PowerMgmt`.
#[must_use]
pub fn shutdown(guest: &Guest, patience: Duration) -> Call<Upid> {
    Call::new(Method::Post, "/nodes/{node}/qemu/{vmid}/status/shutdown")
        .guest(guest)
        .number("timeout", patience.as_secs())
        .on("forceStop")
}

/// Removes it with its disks, also those that its settings do not name, its jobs, firewall and permissions. A task; refused
/// while it runs. `VM.Allocate`.
#[must_use]
pub fn delete(guest: &Guest) -> Call<Upid> {
    Call::new(Method::Delete, "/nodes/{node}/qemu/{vmid}")
        .guest(guest)
        .on("purge")
        .on("destroy-unreferenced-disks")
}

/// Whether it runs, and what holds its lock. `VM.Audit`.
#[must_use]
pub fn status(guest: &Guest) -> Call<VmStatus> {
    Call::new(Method::Get, "/nodes/{node}/qemu/{vmid}/status/current").guest(guest)
}

// ─── firewalls ───────────────────────────────────────────────────────────────────────────────────────────────────────

/// Options of the cluster's firewall. `Sys.Audit` on `/`.
#[must_use]
pub fn cluster_firewall() -> Call<FirewallOptions> {
    Call::new(Method::Get, "/cluster/firewall/options")
}

/// Options of a guest's firewall. `VM.Audit`.
#[must_use]
pub fn firewall(guest: &Guest) -> Call<FirewallOptions> {
    Call::new(Method::Get, "/nodes/{node}/qemu/{vmid}/firewall/options").guest(guest)
}

/// Its rules, in the order in which they count. `VM.Audit`.
#[must_use]
pub fn firewall_rules(guest: &Guest) -> Call<Vec<FirewallRule>> {
    Call::new(Method::Get, "/nodes/{node}/qemu/{vmid}/firewall/rules").guest(guest)
}

// ─── its agent ───────────────────────────────────────────────────────────────────────────────────────────────────────
// `VM.GuestAgent.…`; before Proxmox VE 9, `VM.Monitor`.

/// Whether its agent answers; an error with [`Cause::AgentSilent`](super::Cause::AgentSilent) if not.
#[must_use]
pub fn agent_ping(guest: &Guest) -> Call<Done> {
    let mut call = Call::new(Method::Post, "/nodes/{node}/qemu/{vmid}/agent/ping").guest(guest);
    call.effect = Effect::Reads;
    call
}

/// Its network devices and their addresses, as its agent sees them; [`reply::ipv4_of`](super::reply::ipv4_of) chooses one.
#[must_use]
pub fn agent_interfaces(guest: &Guest) -> Call<AgentResult<Vec<Interface>>> {
    Call::new(
        Method::Get,
        "/nodes/{node}/qemu/{vmid}/agent/network-get-interfaces",
    )
    .guest(guest)
}

/// The longest content of [`agent_write`], in bytes: Proxmox VE takes 61440 characters of base64.
pub const LONGEST_WRITE: usize = 61_440 / 4 * 3;

/// A content that is longer than [`LONGEST_WRITE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a file of {0} bytes cannot be written through the guest agent: {LONGEST_WRITE} is the most"
)]
pub struct TooLong(pub usize);

/// Writes a file in the guest. The content is shown nowhere, and arrives as it is: it is sent as base64.
///
/// # Errors
/// If it is longer than [`LONGEST_WRITE`].
pub fn agent_write(
    guest: &Guest,
    file: &str,
    content: &SecretString,
) -> Result<Call<Done>, TooLong> {
    let content = content.expose_secret().as_bytes();
    if content.len() > LONGEST_WRITE {
        return Err(TooLong(content.len()));
    }
    let encoded = SecretString::from(BASE64.encode(content));
    Ok(
        Call::new(Method::Post, "/nodes/{node}/qemu/{vmid}/agent/file-write")
            .guest(guest)
            .text("file", file)
            .with("content", Value::Secret(encoded))
            // It is encoded already.
            .with("encode", Value::Flag(false)),
    )
}

/// Reads a file in the guest, 16 MiB of it at most.
#[must_use]
pub fn agent_read(guest: &Guest, file: &str) -> Call<FileContent> {
    Call::new(Method::Get, "/nodes/{node}/qemu/{vmid}/agent/file-read")
        .guest(guest)
        .text("file", file)
}

/// Starts a program in the guest, as root; [`agent_exec_status`] says what it said. `VM.GuestAgent.Unrestricted`.
#[must_use]
pub fn agent_exec(guest: &Guest, command: &[&str]) -> Call<Execution> {
    let command = command.iter().map(|part| (*part).to_owned()).collect();
    Call::new(Method::Post, "/nodes/{node}/qemu/{vmid}/agent/exec")
        .guest(guest)
        .with("command", Value::List(command))
}

/// Whether a program of [`agent_exec`] has ended, and what it said. The agent forgets it once that was told.
#[must_use]
pub fn agent_exec_status(guest: &Guest, pid: u64) -> Call<Executed> {
    Call::new(Method::Get, "/nodes/{node}/qemu/{vmid}/agent/exec-status")
        .guest(guest)
        .number("pid", pid)
}

// ─── tasks ───────────────────────────────────────────────────────────────────────────────────────────────────────────
// Who started a task needs no privilege for these.

/// The latest tasks of a guest on its node, the newest first, those that run among them.
#[must_use]
pub fn guest_tasks(guest: &Guest, limit: u32) -> Call<Vec<TaskLine>> {
    Call::new(Method::Get, "/nodes/{node}/tasks")
        .guest(guest)
        .text("source", "all")
        .number("limit", limit)
}

/// Whether a task runs, or how it ended.
#[must_use]
pub fn task_status(upid: &Upid) -> Call<TaskStatus> {
    Call::new(Method::Get, "/nodes/{node}/tasks/{upid}/status").task(upid)
}

/// `limit` lines of a task's log, from line `start` on.
#[must_use]
pub fn task_log(upid: &Upid, start: u32, limit: u32) -> Call<Vec<LogLine>> {
    Call::new(Method::Get, "/nodes/{node}/tasks/{upid}/log")
        .task(upid)
        .number("start", start)
        .number("limit", limit)
}

/// Ends a task. What it has done until then remains.
#[must_use]
pub fn task_stop(upid: &Upid) -> Call<Done> {
    Call::new(Method::Delete, "/nodes/{node}/tasks/{upid}").task(upid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest() -> Guest {
        Guest {
            node: "pve1".parse().unwrap(),
            id: VmId::try_from(100).unwrap(),
        }
    }

    #[test]
    fn parameters_of_the_path_are_in_the_path_and_nowhere_else() {
        let call = stop(&guest());
        assert_eq!(call.path(), "/nodes/pve1/qemu/100/status/stop");
        assert_eq!(call.form(), "");
        assert_eq!(call.describe(), "POST /nodes/pve1/qemu/100/status/stop");
        let upid = "UPID:pve1:0003C9E2:0A1B2C3D:675F0A11:qmclone:9000:a@pve!b:";
        let call = task_status(&upid.parse().unwrap());
        assert_eq!(
            call.path(),
            "/nodes/pve1/tasks/UPID%3Apve1%3A0003C9E2%3A0A1B2C3D%3A675F0A11%3Aqmclone%3A9000%3Aa%40pve%21b%3A/status"
        );
    }

    #[test]
    fn ssh_keys_are_encoded_twice() {
        let key = "ssh-ed25519 AAAA+/= me@home\n";
        let form = set_config(&guest(), Settings::new().ssh_keys(key)).form();
        assert_eq!(
            form,
            "sshkeys=ssh-ed25519%2520AAAA%252B%252F%253D%2520me%2540home"
        );
    }

    #[test]
    fn each_part_of_a_command_is_sent_on_its_own() {
        let call = agent_exec(&guest(), &["/bin/sh", "-c", "a b; c"]);
        assert_eq!(
            call.form(),
            "command=%2Fbin%2Fsh&command=-c&command=a+b%3B+c"
        );
    }

    #[test]
    fn what_is_written_into_a_guest_is_shown_nowhere() {
        let content = SecretString::from("a password: ü");
        let call = agent_write(&guest(), "/run/mayfly/bootstrap", &content).unwrap();
        let shown = format!("{call:?} {}", call.describe());
        assert!(!shown.contains("password"), "{shown}");
        assert!(!shown.contains("YSBwYXNzd29yZDog"), "{shown}");
        assert!(
            call.form()
                .contains("content=YSBwYXNzd29yZDogw7w%3D&encode=0")
        );
    }

    #[test]
    fn a_content_that_is_too_long_is_refused_before_it_is_sent() {
        let fits = SecretString::from("x".repeat(LONGEST_WRITE));
        let call = agent_write(&guest(), "/f", &fits).unwrap();
        assert_eq!(call.secrets().next().unwrap().expose_secret().len(), 61_440);
        let long = SecretString::from("x".repeat(LONGEST_WRITE + 1));
        assert_eq!(
            agent_write(&guest(), "/f", &long).unwrap_err(),
            TooLong(LONGEST_WRITE + 1)
        );
    }
}
