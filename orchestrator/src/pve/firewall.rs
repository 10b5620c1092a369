//! Whether a template's firewall keeps its clones apart: a clone gets a copy of it (`clone_vmfw_conf` of pve-firewall).
//!
//! [`look`] asks, [`judge`] decides: a pure function of what was found. All that it says are warnings: desktops can be made, and a
//! site may keep them apart by other means.

use super::call::{self, Call};
use super::client::Client;
use super::name::{Guest, VmId};
use super::reply::{Config, FirewallOptions, FirewallRule, Policy};
use crate::provider::{Check, CheckStatus};
use serde::de::DeserializeOwned;

/// An answer, or why there is none.
pub type Seen<T> = Result<T, String>;

/// What was found of a template's firewall.
#[derive(Clone, Debug)]
pub struct Firewall {
    /// The cluster's options: without them on, no other holds.
    pub cluster: Seen<FirewallOptions>,
    /// The template's.
    pub options: Seen<FirewallOptions>,
    /// Its rules.
    pub rules: Seen<Vec<FirewallRule>>,
    /// Its settings, for the network device.
    pub config: Seen<Config>,
}

/// Asks for all that [`judge`] needs.
pub async fn look(client: &Client, template: &Guest) -> Firewall {
    async fn ask<T: DeserializeOwned>(client: &Client, call: Call<T>) -> Seen<T> {
        client.send(&call).await.map_err(|error| error.to_string())
    }
    Firewall {
        cluster: ask(client, call::cluster_firewall()).await,
        options: ask(client, call::firewall(template)).await,
        rules: ask(client, call::firewall_rules(template)).await,
        config: ask(client, call::config(template)).await,
    }
}

/// Says whether clones of this template are kept apart, and what to do.
#[must_use]
pub fn judge(template: VmId, found: &Firewall) -> Vec<Check> {
    let check = |status, detail| Check {
        name: "pve firewall".to_owned(),
        status,
        detail,
    };
    let complaints = complaints(template, found);
    if complaints.is_empty() {
        let said = format!("that of VM {template} keeps its clones apart");
        return vec![check(CheckStatus::Ok, said)];
    }
    complaints
        .into_iter()
        .map(|complaint| check(CheckStatus::Warning, complaint))
        .collect()
}

fn complaints(template: VmId, found: &Firewall) -> Vec<String> {
    // With one of these nothing else holds, so nothing else is said.
    if found.cluster.as_ref().is_ok_and(|options| !options.enable) {
        return vec![off(
            "the cluster's firewall is off, and every machine's with it",
        )];
    }
    if found.options.as_ref().is_ok_and(|options| !options.enable) {
        return vec![off(&format!(
            "the firewall of VM {template} is off, and its clones' with it"
        ))];
    }
    let mut list = Vec::new();
    if let Err(error) = &found.cluster {
        list.push(format!(
            "whether the cluster's firewall is on was not seen ({error}): look yourself, Datacenter, Firewall, Options"
        ));
    }
    let unseen = [
        found.options.as_ref().err(),
        found.rules.as_ref().err(),
        found.config.as_ref().err(),
    ];
    for error in unseen.into_iter().flatten() {
        list.push(format!(
            "whether the firewall of VM {template} keeps its clones apart was not seen ({error}): compare it with \
             docs/proxmox.md"
        ));
    }
    if let Ok(config) = &found.config
        && !config.is_behind_firewall(0)
    {
        list.push(format!(
            "net0 of VM {template} is not behind the firewall: set firewall=1 there"
        ));
    }
    if let Ok(options) = &found.options {
        if options.policy_in() == Policy::Accept {
            list.push(format!(
                "the firewall of VM {template} lets everything in (policy_in): desktops reach each other; set it to DROP"
            ));
        }
        if options.policy_out() == Policy::Accept {
            list.push(format!(
                "the firewall of VM {template} lets everything out (policy_out): a desktop can answer other desktops' \
                 DHCP, and reach Proxmox VE itself; set it to DROP, and allow what is in docs/proxmox.md"
            ));
        }
    }
    for rule in found.rules.iter().flatten().filter(|rule| rule.enable) {
        let position = rule.pos;
        if rule.kind == "group" {
            list.push(format!(
                "rule {position} of VM {template} is the security group {}, which was not looked into: its rules that let \
                 something in must name a source, and not the desktops' network",
                rule.action
            ));
        } else if rule.lets_anybody_in() {
            list.push(format!(
                "rule {position} of VM {template} lets anybody in, other desktops too: give it a source"
            ));
        }
    }
    list
}

fn off(what: &str) -> String {
    format!(
        "{what}: desktops reach each other, unless their network keeps them apart; docs/proxmox.md has the rules, and what to \
         do first"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// A firewall where all is well; tests spoil it.
    fn well() -> Value {
        json!({
            "cluster": {"enable": 1},
            "options": {"enable": 1, "policy_in": "DROP", "policy_out": "REJECT"},
            "rules": [
                {"pos": 0, "type": "in", "action": "ACCEPT", "enable": 1, "source": "+people", "proto": "tcp", "dport": "3389"},
                {"pos": 1, "type": "in", "action": "DROP", "enable": 1},
                {"pos": 2, "type": "out", "action": "ACCEPT", "enable": 1, "proto": "tcp", "dport": "443"},
                {"pos": 3, "type": "in", "action": "ACCEPT", "enable": 0},
            ],
            "config": {"net0": "virtio=BC:24:11:00:00:01,bridge=vmbr2,firewall=1"},
        })
    }

    fn said(change: impl FnOnce(&mut Value)) -> Vec<String> {
        let mut all = well();
        change(&mut all);
        fn part<T: DeserializeOwned>(all: &Value, name: &str) -> Seen<T> {
            match &all[name] {
                Value::String(error) => Err(error.clone()),
                value => Ok(serde_json::from_value(value.clone()).unwrap()),
            }
        }
        let found = Firewall {
            cluster: part(&all, "cluster"),
            options: part(&all, "options"),
            rules: part(&all, "rules"),
            config: part(&all, "config"),
        };
        let checks = judge(VmId::try_from(9000).unwrap(), &found);
        checks
            .into_iter()
            .filter(|check| {
                assert_ne!(
                    check.status,
                    CheckStatus::Error,
                    "desktops can be made: {check:?}"
                );
                check.status == CheckStatus::Warning
            })
            .map(|check| check.detail)
            .collect()
    }

    #[test]
    fn nothing_is_said_of_a_template_that_keeps_its_clones_apart() {
        assert_eq!(said(|_| ()), Vec::<String>::new());
        // What Proxmox VE does without a policy: nothing in, everything out.
        let defaults = said(|all| all["options"] = json!({"enable": 1}));
        assert_eq!(defaults.len(), 1, "{defaults:?}");
        assert!(defaults[0].contains("policy_out"), "{defaults:?}");
    }

    #[test]
    fn each_way_around_it_is_told_once() {
        type Spoil = fn(&mut Value);
        let ways: [(Spoil, &str); 11] = [
            (
                |all| all["cluster"] = json!({}),
                "the cluster's firewall is off",
            ),
            (
                |all| all["options"]["enable"] = json!(0),
                "the firewall of VM 9000 is off",
            ),
            (
                |all| all["options"] = json!({}),
                "the firewall of VM 9000 is off",
            ),
            (
                |all| all["config"]["net0"] = json!("virtio=BC:24:11:00:00:01,bridge=vmbr2"),
                "net0 of VM 9000",
            ),
            (
                |all| all["options"]["policy_in"] = json!("ACCEPT"),
                "policy_in",
            ),
            (
                |all| all["options"]["policy_out"] = json!("ACCEPT"),
                "policy_out",
            ),
            (
                |all| all["rules"][3]["enable"] = json!(1),
                "rule 3 of VM 9000 lets anybody in",
            ),
            (
                |all| all["rules"][0]["source"] = json!("0.0.0.0/0"),
                "rule 0 of VM 9000 lets anybody in",
            ),
            (
                |all| {
                    all["rules"][0] =
                        json!({"pos": 0, "type": "group", "action": "rdp", "enable": 1});
                },
                "the security group rdp",
            ),
            (
                |all| all["cluster"] = json!("give the token Sys.Audit on /"),
                "Sys.Audit on /",
            ),
            (
                |all| all["rules"] = json!("501 not implemented"),
                "501 not implemented",
            ),
        ];
        for (spoil, words) in ways {
            let said = said(spoil);
            assert_eq!(said.len(), 1, "{words}: {said:?}");
            assert!(said[0].contains(words), "{words}: {said:?}");
        }
    }
}
