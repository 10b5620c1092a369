//! What a site lacks before desktops can be made on it: each missing privilege with its path, the template, room; and a firewall
//! that keeps them apart ([`firewall`]).
//!
//! [`look`] asks, [`judge`] decides: a pure function of what was found. The privileges are those of the calls in [`super::call`],
//! as Proxmox VE's description of its API names them for each.

use super::call::{self, Kind};
use super::client::Client;
use super::error::PveError;
use super::firewall::{self, Firewall};
use super::name::{Guest, PoolName, StorageName, VmId};
use super::reply::{
    CloneFeature, GuestLine, NodeLine, NodeState, Permissions, Resource, StorageLine, Version,
};
use crate::provider::{Check, CheckStatus};

/// Since this version the guest agent has privileges of its own.
const AGENT_PRIVILEGES_SINCE: u32 = 9;
/// The oldest version that is known to have what is used.
const OLDEST: u32 = 8;

/// What desktops are to be made of.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The template.
    pub template: VmId,
    /// The storage that its disks and those of its clones are on.
    pub storage: StorageName,
    /// The pool that desktops are put into; without one the token needs its privileges on all guests.
    pub pool: Option<PoolName>,
    /// The path of the bridge's permissions: `/sdn/zones/localnetwork/vmbr2`.
    pub network: String,
    /// Room on the storage for one more desktop, in bytes.
    pub room: u64,
    /// What is left to do in a desktop that was made.
    pub rest: Rest,
}

/// What is left to do in a machine that was made of a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Nothing that needs the site.
    Nothing,
    /// Ansible configures it, once its SSH host key was read from it.
    Configure,
}

/// What was found on a site.
#[derive(Clone, Debug)]
pub struct Found {
    /// The version of the node that answered.
    pub version: Version,
    /// The id of the token.
    pub token: String,
    /// What it may do, on each of [`paths`].
    pub permissions: Permissions,
    /// What it sees of guests, nodes and storages.
    pub resources: Vec<Resource>,
    /// Whether the template can be cloned as linked; `None` if it could not be asked.
    pub clone: Option<CloneFeature>,
    /// The template's firewall; `None` without a template on a node that is up.
    pub firewall: Option<Firewall>,
}

/// A privilege that is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// Where.
    pub path: String,
    /// Any one of these.
    pub any_of: Vec<&'static str>,
    /// What for.
    pub reason: &'static str,
    /// Whether desktops can be made without it.
    pub without: CheckStatus,
}

/// Asks, and judges. Never fails: what cannot be asked is a line of the report.
pub async fn preflight(client: &Client, wanted: &Wanted) -> Vec<Check> {
    match look(client, wanted).await {
        Ok(found) => judge(wanted, &found),
        Err(error) => vec![check(
            "pve api",
            CheckStatus::Error,
            format!("{}: {error}", client.address()),
        )],
    }
}

/// Asks for all that [`judge`] needs.
///
/// # Errors
/// If the API cannot be reached, is not to be believed, does not accept the token, or answers strangely.
pub async fn look(client: &Client, wanted: &Wanted) -> Result<Found, PveError> {
    let version = client.send(&call::version()).await?;
    let mut permissions = Permissions::default();
    for path in paths(wanted) {
        permissions.extend(client.send(&call::permissions(&path)).await?);
    }
    let mut resources = Vec::new();
    for kind in [Kind::Guests, Kind::Nodes, Kind::Storages] {
        resources.extend(client.send(&call::cluster_resources(kind)).await?);
    }
    let (mut clone, mut firewall) = (None, None);
    if let Some(line) = template(wanted, &resources) {
        let place = Guest {
            node: line.node.clone(),
            id: line.vmid,
        };
        // A node that is down, a privilege that is missing: said by another line.
        clone = client.send(&call::clone_feature(&place)).await.ok();
        if online(&resources, &place.node) {
            firewall = Some(firewall::look(client, &place).await);
        }
    }
    Ok(Found {
        version,
        token: client.token().to_owned(),
        permissions,
        resources,
        clone,
        firewall,
    })
}

/// The paths that permissions are needed on.
#[must_use]
pub fn paths(wanted: &Wanted) -> Vec<String> {
    let mut paths: Vec<String> = Vec::new();
    for need in needs(wanted, AGENT_PRIVILEGES_SINCE) {
        if !paths.contains(&need.path) {
            paths.push(need.path);
        }
    }
    paths
}

/// Every privilege that making, running and removing a desktop needs, with Proxmox VE of this major version.
#[must_use]
pub fn needs(wanted: &Wanted, major: u32) -> Vec<Need> {
    let template = format!("/vms/{}", wanted.template);
    // What is put into a pool has the pool's permissions; without one, those on all guests.
    let desktops = match &wanted.pool {
        Some(pool) => format!("/pool/{pool}"),
        None => "/vms".to_owned(),
    };
    let storage = format!("/storage/{}", wanted.storage);
    let mut list = Vec::new();
    let mut need = |path: &str, any_of: &[&'static str], reason, without| {
        list.push(Need {
            path: path.to_owned(),
            any_of: any_of.to_vec(),
            reason,
            without,
        });
    };
    use CheckStatus::{Error, Warning};
    need(&template, &["VM.Audit"], "to see the template", Error);
    need(&template, &["VM.Clone"], "to clone the template", Error);
    for (privilege, reason) in [
        ("VM.Allocate", "to make and remove desktops"),
        ("VM.Audit", "to see desktops"),
        ("VM.PowerMgmt", "to start and stop desktops"),
        ("VM.Config.Cloudinit", "to set up cloud-init"),
        ("VM.Config.Options", "to set tags, notes and the agent"),
        ("VM.Config.Network", "to set the network"),
        ("VM.Config.CPU", "to set processors"),
        ("VM.Config.Memory", "to set memory"),
        ("VM.Config.Disk", "to enlarge the disk"),
        ("VM.Config.CDROM", "to attach the cloud-init drive"),
        ("VM.Config.HWType", "to set what Terraform's provider sets"),
    ] {
        need(&desktops, &[privilege], reason, Error);
    }
    if major >= AGENT_PRIVILEGES_SINCE {
        for (privilege, reason) in [
            ("VM.GuestAgent.Audit", "to learn a desktop's address"),
            ("VM.GuestAgent.FileWrite", "to write a desktop's bootstrap"),
        ] {
            need(
                &desktops,
                &[privilege, "VM.GuestAgent.Unrestricted"],
                reason,
                Error,
            );
        }
        if wanted.rest == Rest::Configure {
            let either = ["VM.GuestAgent.FileRead", "VM.GuestAgent.Unrestricted"];
            let reason = "to read the SSH host key of a desktop that Ansible configures";
            need(&desktops, &either, reason, Error);
        }
        need(
            &desktops,
            &["VM.GuestAgent.Unrestricted"],
            "to keep the journal of a desktop that failed",
            Warning,
        );
    } else {
        need(
            &desktops,
            &["VM.Monitor"],
            "to talk to a desktop's guest agent",
            Error,
        );
    }
    need(
        &storage,
        &["Datastore.AllocateSpace"],
        "to make disks",
        Error,
    );
    need(
        &storage,
        &["Datastore.Audit"],
        "to see the storage and how full it is",
        Error,
    );
    if wanted.pool.is_some() {
        need(&desktops, &["Pool.Audit"], "to see the pool", Error);
    }
    need(&wanted.network, &["SDN.Use"], "to use the bridge", Error);
    need(
        "/nodes",
        &["Sys.Audit"],
        "to see how busy nodes are",
        Warning,
    );
    list
}

/// Says what is well and what is not, and what to do.
#[must_use]
pub fn judge(wanted: &Wanted, found: &Found) -> Vec<Check> {
    let mut checks = vec![judge_version(&found.version)];
    checks.extend(judge_permissions(wanted, found));
    checks.extend(judge_nodes(&found.resources));
    checks.push(judge_template(wanted, found));
    if let Some(firewall) = &found.firewall {
        checks.extend(firewall::judge(wanted.template, firewall));
    }
    checks.push(judge_storage(wanted, &found.resources));
    checks
}

fn judge_version(version: &Version) -> Check {
    let shown = &version.version;
    if version.major() >= OLDEST {
        return check("pve api", CheckStatus::Ok, format!("Proxmox VE {shown}"));
    }
    check(
        "pve api",
        CheckStatus::Warning,
        format!("Proxmox VE {shown}: older than {OLDEST}, which nobody tested"),
    )
}

fn judge_permissions(wanted: &Wanted, found: &Found) -> Vec<Check> {
    let token = &found.token;
    let needs = needs(wanted, found.version.major());
    let missing: Vec<Check> = needs
        .iter()
        .filter(|need| {
            !need
                .any_of
                .iter()
                .any(|privilege| found.permissions.hold(&need.path, privilege))
        })
        .map(|need| {
            let privilege = need.any_of[0];
            let Need { path, reason, .. } = need;
            check(
                "pve privileges",
                need.without,
                format!(
                    "{token} lacks {privilege} on {path} ({reason}): give the token and its user a role with it, \
                     `pveum acl modify {path} --tokens '{token}' --roles …`"
                ),
            )
        })
        .collect();
    if missing.is_empty() {
        let said = format!("{token} has all {} that are needed", needs.len());
        return vec![check("pve privileges", CheckStatus::Ok, said)];
    }
    missing
}

fn judge_nodes(resources: &[Resource]) -> Vec<Check> {
    let nodes: Vec<&NodeLine> = resources
        .iter()
        .filter_map(|resource| match resource {
            Resource::Node(node) => Some(node),
            _ => None,
        })
        .collect();
    let named = |online: bool| {
        let chosen = nodes
            .iter()
            .filter(|node| (node.status == NodeState::Online) == online);
        chosen
            .map(|node| node.node.to_string())
            .collect::<Vec<_>>()
            .join(", ")
    };
    let (up, down) = (named(true), named(false));
    let one = match (up.is_empty(), down.is_empty()) {
        (true, _) => (
            CheckStatus::Error,
            "no node is online, as far as the token may see".to_owned(),
        ),
        (false, true) => (CheckStatus::Ok, format!("online: {up}")),
        (false, false) => (
            CheckStatus::Warning,
            format!("online: {up}; not online: {down}, where no desktop can be made or removed"),
        ),
    };
    vec![check("pve nodes", one.0, one.1)]
}

fn template<'a>(wanted: &Wanted, resources: &'a [Resource]) -> Option<&'a GuestLine> {
    resources.iter().find_map(|resource| match resource {
        Resource::Qemu(line) if line.vmid == wanted.template => Some(line),
        _ => None,
    })
}

fn online(resources: &[Resource], name: &super::NodeName) -> bool {
    resources.iter().any(|resource| {
        matches!(resource, Resource::Node(node) if node.node == *name && node.status == NodeState::Online)
    })
}

fn judge_template(wanted: &Wanted, found: &Found) -> Check {
    let id = wanted.template;
    let error = |what: String| check("pve template", CheckStatus::Error, what);
    let Some(line) = template(wanted, &found.resources) else {
        return error(format!(
            "there is no VM {id}, or the token may not see it (VM.Audit on /vms/{id}): make the template, or name another"
        ));
    };
    let node = &line.node;
    if !line.template {
        return error(format!(
            "VM {id} on {node} is no template: stop it and run `qm template {id}` there, or name another"
        ));
    }
    if !online(&found.resources, node) {
        return error(format!("VM {id} is on {node}, which is not online"));
    }
    match &found.clone {
        Some(feature) if !feature.possible => error(format!(
            "the disks of VM {id} cannot be cloned as linked: put them on a storage that can (LVM-thin, ZFS, Ceph, or \
             qcow2 in a folder)"
        )),
        _ => check(
            "pve template",
            CheckStatus::Ok,
            format!(
                "{} (VM {id}) on {node}",
                line.name.as_deref().unwrap_or("no name")
            ),
        ),
    }
}

fn judge_storage(wanted: &Wanted, resources: &[Resource]) -> Check {
    let name = &wanted.storage;
    let say = |status, what: String| check("pve storage", status, what);
    let all: Vec<&StorageLine> = resources
        .iter()
        .filter_map(|resource| match resource {
            Resource::Storage(line) if line.storage == *name => Some(line),
            _ => None,
        })
        .collect();
    // Of a storage that each node has for itself, the one beside the template is meant: linked clones are made there.
    let node = template(wanted, resources).map(|line| &line.node);
    let usable = all
        .iter()
        .filter(|line| line.shared || node.is_none_or(|node| *node == line.node))
        .find(|line| online(resources, &line.node));
    let Some(line) = usable else {
        let what = match (all.is_empty(), node) {
            (true, _) => format!(
                "there is no storage {name}, or the token may not see it (Datastore.Audit on /storage/{name})"
            ),
            (false, Some(node)) => {
                format!("storage {name} is not on {node}, where the template is, or {node} is down")
            }
            (false, None) => format!("storage {name} is on no node that is online"),
        };
        return say(CheckStatus::Error, what);
    };
    if line.status != "available" {
        return say(
            CheckStatus::Error,
            format!("storage {name} on {} is {}", line.node, line.status),
        );
    }
    if !line.content.split(',').any(|kind| kind.trim() == "images") {
        return say(
            CheckStatus::Error,
            format!(
                "storage {name} takes no disks: add `images` to its content, `pvesm set {name} --content {},images`",
                line.content
            ),
        );
    }
    if line.maxdisk == 0 {
        return say(
            CheckStatus::Warning,
            format!("how full storage {name} is cannot be seen"),
        );
    }
    let free = line.maxdisk.saturating_sub(line.disk);
    let said = format!(
        "storage {name} on {}: {} of {} free",
        line.node,
        gib(free),
        gib(line.maxdisk)
    );
    if free < wanted.room {
        return say(
            CheckStatus::Error,
            format!(
                "{said}, a desktop needs {}: remove something, or enlarge it",
                gib(wanted.room)
            ),
        );
    }
    say(CheckStatus::Ok, said)
}

fn gib(bytes: u64) -> String {
    let tenths = bytes / ((1 << 30) / 10);
    format!("{}.{} GiB", tenths / 10, tenths % 10)
}

fn check(name: &str, status: CheckStatus, detail: String) -> Check {
    Check {
        name: name.to_owned(),
        status,
        detail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::verdict;
    use serde_json::{Value, json};

    fn wanted() -> Wanted {
        Wanted {
            template: VmId::try_from(9000).unwrap(),
            storage: "local-lvm".parse().unwrap(),
            pool: Some("daas".parse().unwrap()),
            network: "/sdn/zones/localnetwork/vmbr2".to_owned(),
            room: 4 << 30,
            rest: Rest::Configure,
        }
    }

    /// A site where all is well; tests spoil it.
    fn site() -> (Value, Value) {
        let all = |names: &[&str]| -> Value {
            names.iter().map(|n| ((*n).to_owned(), json!(1))).collect()
        };
        let permissions = json!({
            "/vms/9000": all(&["VM.Audit", "VM.Clone"]),
            "/pool/daas": all(&[
                "VM.Allocate", "VM.Audit", "VM.PowerMgmt", "VM.Config.Cloudinit", "VM.Config.Options",
                "VM.Config.Network", "VM.Config.CPU", "VM.Config.Memory", "VM.Config.Disk",
                "VM.Config.CDROM", "VM.Config.HWType", "Pool.Audit",
                "VM.GuestAgent.Audit", "VM.GuestAgent.FileWrite", "VM.GuestAgent.FileRead",
                "VM.GuestAgent.Unrestricted",
            ]),
            "/storage/local-lvm": all(&["Datastore.AllocateSpace", "Datastore.Audit"]),
            "/sdn": all(&["SDN.Use"]),
            "/nodes": all(&["Sys.Audit"]),
        });
        let resources = json!([
            {"type": "qemu", "vmid": 9000, "node": "pve1", "name": "debian", "template": 1, "status": "stopped"},
            {"type": "node", "node": "pve1", "status": "online", "mem": 1, "maxmem": 2},
            {"type": "storage", "node": "pve1", "storage": "local-lvm", "status": "available",
             "content": "images,rootdir", "disk": 10_u64 << 30, "maxdisk": 100_u64 << 30},
            {"type": "storage", "node": "pve2", "storage": "local-lvm", "status": "unknown", "content": "images"},
        ]);
        (permissions, resources)
    }

    fn judged(version: &str, permissions: Value, resources: Value, clone: Value) -> Vec<Check> {
        let found = Found {
            version: serde_json::from_value(json!({"version": version, "release": "x"})).unwrap(),
            token: "mayfly@pve!a".to_owned(),
            permissions: serde_json::from_value(permissions).unwrap(),
            resources: serde_json::from_value(resources).unwrap(),
            clone: serde_json::from_value(clone).unwrap(),
            // `firewall.rs` has its tests.
            firewall: None,
        };
        judge(&wanted(), &found)
    }

    /// What is not well.
    fn complaints(checks: &[Check]) -> Vec<&str> {
        checks
            .iter()
            .filter(|check| check.status != CheckStatus::Ok)
            .map(|check| check.detail.as_str())
            .collect()
    }

    const YES: fn() -> Value = || json!({"hasFeature": 1});

    #[test]
    fn nothing_is_said_of_a_site_where_all_is_well() {
        let (permissions, resources) = site();
        let checks = judged("9.1.2", permissions, resources, YES());
        assert_eq!(complaints(&checks), Vec::<&str>::new());
        assert_eq!(checks.len(), 5);
        let storage = &checks[4].detail;
        assert_eq!(
            storage,
            "storage local-lvm on pve1: 90.0 GiB of 100.0 GiB free"
        );
    }

    #[test]
    fn each_missing_privilege_is_named_with_its_path() {
        let (permissions, resources) = site();
        let paths: Vec<(String, Vec<String>)> = permissions
            .as_object()
            .unwrap()
            .iter()
            .map(|(path, all)| {
                (
                    path.clone(),
                    all.as_object().unwrap().keys().cloned().collect(),
                )
            })
            .collect();
        for (path, privileges) in paths {
            for privilege in privileges {
                let mut less = permissions.clone();
                less[&path].as_object_mut().unwrap().remove(&privilege);
                let other = "VM.GuestAgent.Unrestricted";
                let stands_for = privilege.starts_with("VM.GuestAgent.") && privilege != other;
                if stands_for {
                    let checks = judged("9.1.2", less.clone(), resources.clone(), YES());
                    assert_eq!(complaints(&checks), Vec::<&str>::new());
                    less[&path].as_object_mut().unwrap().remove(other);
                }
                let checks = judged("9.1.2", less, resources.clone(), YES());
                let said = complaints(&checks);
                assert_eq!(said.len(), 1 + usize::from(stands_for), "{said:?}");
                let place = if path == "/sdn" {
                    "/sdn/zones/localnetwork/vmbr2"
                } else {
                    &path
                };
                let words = format!("mayfly@pve!a lacks {privilege} on {place} (");
                assert!(said.iter().any(|s| s.starts_with(&words)), "{said:?}");
            }
        }
    }

    #[test]
    fn before_version_9_the_agent_needs_another_privilege() {
        let (mut permissions, resources) = site();
        let said = |permissions: &Value| {
            let checks = judged("8.4.1", permissions.clone(), resources.clone(), YES());
            complaints(&checks).join("\n")
        };
        assert!(said(&permissions).contains("lacks VM.Monitor on /pool/daas"));
        permissions["/pool/daas"]["VM.Monitor"] = json!(1);
        assert_eq!(said(&permissions), "");
        // Figures of nodes are missed, and desktops can be made.
        permissions["/nodes"] = json!({});
        let checks = judged("8.4.1", permissions, resources.clone(), YES());
        assert_eq!(verdict(&checks), CheckStatus::Warning);
    }

    #[test]
    fn files_are_read_only_where_ansible_configures_desktops() {
        let rest = Rest::Nothing;
        let needs = needs(&Wanted { rest, ..wanted() }, 9);
        let reads = |need: &Need| need.any_of.contains(&"VM.GuestAgent.FileRead");
        assert!(!needs.iter().any(reads));
    }

    #[test]
    fn without_a_pool_the_privileges_are_needed_on_all_guests() {
        let needs = needs(
            &Wanted {
                pool: None,
                ..wanted()
            },
            9,
        );
        assert!(
            needs
                .iter()
                .any(|need| need.path == "/vms" && need.any_of == ["VM.Allocate"])
        );
        assert!(needs.iter().all(|need| !need.path.starts_with("/pool")));
    }

    #[test]
    fn a_template_that_cannot_be_cloned_is_told_from_one_that_is_not_there() {
        let (permissions, resources) = site();
        let said = |resources: &Value, clone: Value| {
            let checks = judged("9.1.2", permissions.clone(), resources.clone(), clone);
            assert_eq!(verdict(&checks), CheckStatus::Error);
            complaints(&checks).join("\n")
        };
        let mut none = resources.clone();
        none[0]["vmid"] = json!(9001);
        assert!(
            said(&none, json!(null)).contains("there is no VM 9000, or the token may not see it")
        );
        let mut plain = resources.clone();
        plain[0]["template"] = json!(0);
        assert!(said(&plain, YES()).contains("VM 9000 on pve1 is no template"));
        let mut down = resources.clone();
        down[1]["status"] = json!("offline");
        assert!(said(&down, json!(null)).contains("on pve1, which is not online"));
        assert!(said(&resources, json!({"hasFeature": 0})).contains("cannot be cloned as linked"));
    }

    #[test]
    fn a_storage_without_room_is_told_with_its_numbers() {
        let (permissions, resources) = site();
        let said = |change: fn(&mut Value)| {
            let mut resources = resources.clone();
            change(&mut resources[2]);
            let checks = judged("9.1.2", permissions.clone(), resources, YES());
            complaints(&checks).join("\n")
        };
        let full = said(|storage| storage["disk"] = json!(99_u64 << 30));
        assert!(
            full.contains("1.0 GiB of 100.0 GiB free, a desktop needs 4.0 GiB"),
            "{full}"
        );
        let unseen = said(|storage| storage["maxdisk"] = json!(0));
        assert!(unseen.contains("cannot be seen"), "{unseen}");
        let other = said(|storage| storage["content"] = json!("iso,vztmpl"));
        assert!(other.contains("takes no disks"), "{other}");
        let down = said(|storage| storage["status"] = json!("unknown"));
        assert!(
            down.contains("storage local-lvm on pve1 is unknown"),
            "{down}"
        );
        let elsewhere = said(|storage| storage["node"] = json!("pve2"));
        assert!(
            elsewhere.contains("is not on pve1, where the template is"),
            "{elsewhere}"
        );
        let none = said(|storage| storage["storage"] = json!("other"));
        assert!(none.contains("is not on pve1"), "{none}");
    }

    #[test]
    fn a_node_that_is_offline_is_a_warning_while_others_are_up() {
        let (permissions, mut resources) = site();
        let offline = json!({"type": "node", "node": "pve2", "status": "offline"});
        resources.as_array_mut().unwrap().push(offline);
        let checks = judged("9.1.2", permissions, resources, YES());
        assert_eq!(verdict(&checks), CheckStatus::Warning);
        assert!(complaints(&checks)[0].contains("not online: pve2"));
    }
}
