//! On which node a desktop is made: a pure function of what the cluster shows and what is reserved.

use crate::pve::reply::{GuestLine, NodeLine, NodeState, Power, StorageLine};
use crate::pve::{NodeName, StorageName, VmId};
use crate::store::machines::Reserved;
use mayfly_api::DesktopName;
use std::cmp::Reverse;

/// What the choice is made from.
pub(super) struct Cluster<'a> {
    /// Nodes, those that are offline among them.
    pub(super) nodes: &'a [NodeLine],
    /// Every virtual machine.
    pub(super) guests: &'a [GuestLine],
    /// The storage on each node.
    pub(super) storages: &'a [StorageLine],
    /// Machines of ours that may exist.
    pub(super) reserved: &'a [Reserved],
}

/// What is to be placed.
pub(super) struct Wanted<'a> {
    /// The node that the template is on.
    pub(super) template_node: &'a NodeName,
    /// The storage of its disks and of its clones'.
    pub(super) storage: &'a StorageName,
    /// Memory of the machine.
    pub(super) memory_mib: u32,
}

/// Why no node will do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoPlace {
    /// They are full, or offline.
    Now(String),
    /// None has what is needed; an administrator must act.
    Ever(String),
}

/// Whether it tells its memory, how much of that is free, how few machines of ours it has: the highest is chosen.
type Rank = (bool, u64, Reverse<usize>);

/// The node with the most memory to spare, and of equal ones that with the fewest of our machines.
///
/// A linked clone lies on the template's storage: on a storage that not all nodes share, only the template's node will do.
/// Memory that is reserved for machines which do not run yet counts as used. A node that tells no figures (they need
/// `Sys.Audit`) comes after those that do.
///
/// # Errors
/// Why no node will do.
pub(super) fn place(
    cluster: &Cluster<'_>,
    wanted: &Wanted<'_>,
    id: impl Fn(DesktopName) -> VmId,
) -> Result<NodeName, NoPlace> {
    let mut refusals = Vec::new();
    let mut later = false;
    let mut best: Option<(Rank, &NodeName)> = None;
    for node in cluster.nodes {
        let name = &node.node;
        if node.status != NodeState::Online {
            refusals.push(format!("{name} is offline"));
            later = true;
            continue;
        }
        let storage = cluster
            .storages
            .iter()
            .find(|s| s.node == *name && s.storage == *wanted.storage);
        match storage {
            Some(storage) if storage.shared || name == wanted.template_node => {}
            Some(_) => {
                refusals.push(format!(
                    "{name} does not share {} with the template's node",
                    wanted.storage
                ));
                continue;
            }
            None => {
                refusals.push(format!("{name} does not have {}", wanted.storage));
                continue;
            }
        }
        let ours: Vec<&Reserved> = cluster
            .reserved
            .iter()
            .filter(|r| r.node == name.as_str())
            .collect();
        let pending: u64 = ours
            .iter()
            .filter(|r| !runs(cluster.guests, id(r.name)))
            .map(|r| u64::from(r.memory_mib))
            .sum();
        let promised: u64 = ours.iter().map(|r| u64::from(r.memory_mib)).sum();
        let known = node.maxmem > 0;
        // A machine that has just booted uses a part of what it was promised.
        let free = (node.maxmem.saturating_sub(node.mem) >> 20)
            .saturating_sub(pending)
            .min((node.maxmem >> 20).saturating_sub(promised));
        if known && free < wanted.memory_mib.into() {
            refusals.push(format!("{name} has {free} MiB of memory left"));
            later = true;
            continue;
        }
        let rank: Rank = (known, free, Reverse(ours.len()));
        if best.as_ref().is_none_or(|(found, _)| rank > *found) {
            best = Some((rank, name));
        }
    }
    if let Some((_, node)) = best {
        return Ok(node.clone());
    }
    if refusals.is_empty() {
        return Err(NoPlace::Ever("the cluster shows no node".to_owned()));
    }
    let why = format!(
        "no node has room for {} MiB: {}",
        wanted.memory_mib,
        refusals.join(", ")
    );
    Err(if later {
        NoPlace::Now(why)
    } else {
        NoPlace::Ever(why)
    })
}

fn runs(guests: &[GuestLine], id: VmId) -> bool {
    guests
        .iter()
        .any(|g| g.vmid == id && g.status == Power::Running)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(name: &str, state: &str, free_gib: u64) -> NodeLine {
        serde_json::from_value(json!({
            "node": name, "status": state, "mem": (64 - free_gib) << 30, "maxmem": 64_u64 << 30, "maxcpu": 8,
        }))
        .unwrap()
    }

    fn storage(node: &str, shared: u8) -> StorageLine {
        serde_json::from_value(json!({"storage": "ceph", "node": node, "shared": shared})).unwrap()
    }

    fn reserved(number: u32, node: &str, memory_mib: u32) -> Reserved {
        Reserved {
            name: DesktopName::from_number(number).unwrap(),
            node: node.to_owned(),
            memory_mib,
            storage: "ceph".to_owned(),
        }
    }

    fn id(name: DesktopName) -> VmId {
        VmId::try_from(1000 + name.number()).unwrap()
    }

    fn choose(
        nodes: &[NodeLine],
        guests: &[GuestLine],
        storages: &[StorageLine],
        reserved: &[Reserved],
    ) -> Result<String, NoPlace> {
        let cluster = Cluster {
            nodes,
            guests,
            storages,
            reserved,
        };
        let wanted = Wanted {
            template_node: &"a".parse().unwrap(),
            storage: &"ceph".parse().unwrap(),
            memory_mib: 4096,
        };
        place(&cluster, &wanted, id).map(|node| node.to_string())
    }

    #[test]
    fn the_node_with_the_most_memory_to_spare_is_chosen() {
        let nodes = [
            node("a", "online", 8),
            node("b", "online", 16),
            node("c", "offline", 60),
        ];
        let shared = [storage("a", 1), storage("b", 1), storage("c", 1)];
        assert_eq!(choose(&nodes, &[], &shared, &[]).unwrap(), "b");
        // Three machines that are not up yet have that memory, not one that runs: its node counts it itself.
        let pending: Vec<_> = (1..=3).map(|n| reserved(n, "b", 4096)).collect();
        assert_eq!(choose(&nodes, &[], &shared, &pending).unwrap(), "a");
        let guests: Vec<GuestLine> = (1001..=1003)
            .map(|vmid| {
                serde_json::from_value(json!({"vmid": vmid, "node": "b", "status": "running"}))
                    .unwrap()
            })
            .collect();
        assert_eq!(choose(&nodes, &guests, &shared, &pending).unwrap(), "b");
    }

    #[test]
    fn of_equal_nodes_the_one_with_fewer_of_our_machines_is_chosen() {
        let nodes = [node("a", "online", 16), node("b", "online", 16)];
        let shared = [storage("a", 1), storage("b", 1)];
        let running = [reserved(1, "a", 4096)];
        let guests: Vec<GuestLine> =
            serde_json::from_value(json!([{"vmid": 1001, "node": "a", "status": "running"}]))
                .unwrap();
        assert_eq!(choose(&nodes, &guests, &shared, &running).unwrap(), "b");
    }

    #[test]
    fn a_storage_that_is_not_shared_leaves_the_template_s_node() {
        let nodes = [node("a", "online", 5), node("b", "online", 60)];
        let local = [storage("a", 0), storage("b", 0)];
        assert_eq!(choose(&nodes, &[], &local, &[]).unwrap(), "a");
    }

    #[test]
    fn without_room_every_node_s_reason_is_told() {
        let nodes = [node("a", "online", 2), node("b", "offline", 60)];
        let shared = [storage("a", 1), storage("b", 1)];
        let Err(NoPlace::Now(why)) = choose(&nodes, &[], &shared, &[]) else {
            panic!("there may be room later");
        };
        assert!(
            why.contains("a has 2048 MiB") && why.contains("b is offline"),
            "{why}"
        );
        for (nodes, storages) in [(&nodes[..1], &[][..]), (&[], &shared[..])] {
            let nowhere = choose(nodes, &[], storages, &[]);
            assert!(matches!(nowhere, Err(NoPlace::Ever(_))), "{nowhere:?}");
        }
    }
}
