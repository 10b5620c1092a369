//! Every call against Proxmox VE's own description of its API (`apidata.js` of pve-docs, cut to the methods around guests).
//!
//! The description is Proxmox's and under another licence than ours, so it is not in this repository: it is looked for in
//! `../shared/pve-api/methods.json` beside the project, and without it this says plainly that nothing was compared. The judge
//! itself is tested always, against a few lines of our own.

use mayfly_orchestrator::pve::call::{self, Call, Kind, NewClone, Settings, Value as Sent};
use mayfly_orchestrator::pve::{Guest, Upid, VmId};
use regex::Regex;
use secrecy::SecretString;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

/// Not among the methods around guests: an unmodified fakepve, which knows all of the description, answers it (`fake.rs`).
const ELSEWHERE: &str = "/cluster/firewall/options";

/// What is compared of a call.
struct Described {
    method: &'static str,
    template: &'static str,
    parameters: Vec<(String, Sent)>,
}

impl<T> From<Call<T>> for Described {
    fn from(call: Call<T>) -> Self {
        Self {
            method: call.method().as_str(),
            template: call.template(),
            parameters: call.parameters().to_vec(),
        }
    }
}

/// Every call with every parameter that it can have.
fn every_call() -> Vec<Described> {
    let guest = Guest {
        node: "pve1".parse().unwrap(),
        id: VmId::try_from(200).unwrap(),
    };
    let upid: Upid = "UPID:pve1:0003C9E2:0A1B2C3D:675F0A11:qmclone:9000:mayfly@pve!a:"
        .parse()
        .unwrap();
    let clone = NewClone {
        id: guest.id,
        name: "desktop-0a1b2c3".to_owned(),
        pool: Some("daas".parse().unwrap()),
        target: Some("pve2".parse().unwrap()),
        description: Some("a session's".to_owned()),
    };
    let settings = Settings::new()
        .cores(2)
        .memory_mib(4096)
        .tags(&["mayfly", "x"])
        .description("notes")
        .agent()
        .network(0, "vmbr2")
        .network(31, "vmbr2")
        .dhcp(0)
        .user("mayfly")
        .ssh_keys("ssh-ed25519 AAAA+/= me@home\nssh-rsa BBBB")
        .without_upgrade()
        .dns(
            &[
                "192.0.2.53".parse().unwrap(),
                "2001:db8::53".parse().unwrap(),
            ],
            "example.org",
        )
        .unless_changed_since("da39a3ee5e6b4b0d3255bfef95601890afd80709");
    let longest = SecretString::from("x".repeat(call::LONGEST_WRITE));
    vec![
        call::version().into(),
        call::permissions("/pool/daas").into(),
        call::cluster_resources(Kind::Guests).into(),
        call::cluster_resources(Kind::Nodes).into(),
        call::cluster_resources(Kind::Storages).into(),
        call::id_is_free(guest.id).into(),
        call::clone_feature(&guest).into(),
        call::clone_linked(&guest, &clone).into(),
        call::config(&guest).into(),
        call::set_config(&guest, settings).into(),
        call::resize(&guest, "scsi0", 32).into(),
        call::start(&guest).into(),
        call::stop(&guest).into(),
        call::shutdown(&guest, Duration::from_secs(60)).into(),
        call::delete(&guest).into(),
        call::status(&guest).into(),
        call::cluster_firewall().into(),
        call::firewall(&guest).into(),
        call::firewall_rules(&guest).into(),
        call::agent_ping(&guest).into(),
        call::agent_interfaces(&guest).into(),
        call::agent_write(&guest, "/run/mayfly/bootstrap", &longest)
            .unwrap()
            .into(),
        call::agent_read(&guest, "/etc/ssh/ssh_host_ed25519_key.pub").into(),
        call::agent_exec(&guest, &["/bin/sh", "-c", "journalctl | tail"]).into(),
        call::agent_exec_status(&guest, 4711).into(),
        call::guest_tasks(&guest, 10).into(),
        call::task_status(&upid).into(),
        call::task_log(&upid, 0, 1000).into(),
        call::task_stop(&upid).into(),
    ]
}

#[test]
fn every_call_is_as_proxmox_describes_it() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/pve-api/methods.json");
    let Ok(text) = std::fs::read_to_string(&file) else {
        // Not by `println!`, which shows nothing of a test that passes.
        let words = "SKIPPED: no call was compared with Proxmox VE's description of its API: there is no \
                     ../shared/pve-api/methods.json beside the project";
        writeln!(std::io::stdout(), "{words}").unwrap();
        return;
    };
    let methods: Vec<Value> = serde_json::from_str(&text).unwrap();
    let wrong: Vec<String> = every_call()
        .iter()
        .filter(|call| call.template != ELSEWHERE)
        .flat_map(|call| complaints(call, &methods))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_call_is_forgotten_above() {
    let source = include_str!("../../src/pve/call.rs");
    let constructors = Regex::new(r"(?m)^pub fn (\w+)\([^{]*-> (?:Result<)?Call<").unwrap();
    let written: BTreeSet<&str> = constructors
        .captures_iter(source)
        .map(|found| found.get(1).unwrap().as_str())
        .collect();
    let here = include_str!("contract.rs");
    let forgotten: Vec<_> = written
        .iter()
        .filter(|name| !here.contains(&format!("call::{name}(")))
        .collect();
    assert!(
        written.len() > 15 && forgotten.is_empty(),
        "{forgotten:?} of {written:?}"
    );
}

#[test]
fn the_judge_sees_what_is_wrong() {
    let methods = [json!({
        "method": "POST", "path": "/nodes/{node}/things/{vmid}",
        "parameters": {"properties": {
            "node": {"type": "string", "format": "pve-node"},
            "vmid": {"type": "integer", "minimum": 100, "maximum": "999"},
            "must": {"type": "string", "enum": ["a", "b"]},
            "net[n]": {"type": "string", "optional": 1, "format": {
                "model": {"type": "string", "enum": ["virtio"], "default_key": 1},
                "firewall": {"type": "boolean", "optional": 1},
            }},
            "flag": {"type": "boolean", "optional": 1},
            "size": {"type": "string", "pattern": "\\d+G", "optional": 1},
            "short": {"type": "string", "maxLength": 3, "optional": 1},
            "odd": {"type": "string", "format": "never-heard-of", "optional": 1},
            "other": {"type": "string", "optional": 1, "requires": "flag"},
        }},
    })];
    let text = |text: &str| Sent::Text(text.to_owned());
    let judged = |template, parameters: Vec<(&str, Sent)>| {
        let parameters = parameters
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
        let call = Described {
            method: "POST",
            template,
            parameters,
        };
        complaints(&call, &methods).join("\n")
    };
    let thing = "/nodes/{node}/things/{vmid}";
    let good = || {
        vec![
            ("node", text("pve1")),
            ("vmid", Sent::Number(100)),
            ("must", text("a")),
        ]
    };
    let more = |name, value| {
        let mut parameters = good();
        parameters.push((name, value));
        judged(thing, parameters)
    };
    assert_eq!(judged(thing, good()), "");
    assert_eq!(more("net0", text("virtio,firewall=1")), "");
    assert_eq!(more("size", text("32G")), "");
    for (what, complaint) in [
        (judged("/nodes/{node}", good()), "no such method"),
        (judged(thing, good()[..2].to_vec()), "must is required"),
        (more("must", text("c")), "must"),
        (more("unheard", text("x")), "unheard is no parameter"),
        (more("flag", text("yes")), "flag"),
        (more("size", text("x32G")), "size"),
        (more("short", text("four")), "short"),
        (more("odd", text("x")), "no check"),
        (more("other", text("x")), "requires flag"),
        (more("net0", text("e1000")), "model"),
        (more("net0", text("virtio,bridge=x")), "bridge"),
        (more("net0", text("firewall=1")), "model is required"),
    ] {
        assert!(what.contains(complaint), "{complaint:?}: {what:?}");
    }
    let mut low = good();
    low[1].1 = Sent::Number(99);
    assert!(judged(thing, low).contains("less than 100"));
    let mut high = good();
    high[1].1 = Sent::Number(1000);
    assert!(judged(thing, high).contains("more than 999"));
    let mut wrong = good();
    wrong[0].1 = text("-pve1");
    assert!(judged(thing, wrong).contains("pve-node"));
}

fn complaints(call: &Described, methods: &[Value]) -> Vec<String> {
    let name = format!("{} {}", call.method, call.template);
    let Some(method) = methods
        .iter()
        .find(|method| method["method"] == call.method && method["path"] == call.template)
    else {
        return vec![format!("{name}: no such method")];
    };
    let none = serde_json::Map::new();
    let known = method["parameters"]["properties"]
        .as_object()
        .unwrap_or(&none);
    let sent: BTreeMap<String, String> = call
        .parameters
        .iter()
        .map(|(name, value)| (name.clone(), value.sent()))
        .collect();
    judge_all(known, &sent)
        .into_iter()
        .map(|what| format!("{name}: {what}"))
        .collect()
}

/// All that is sent, or all parts of one value.
fn judge_all(
    known: &serde_json::Map<String, Value>,
    sent: &BTreeMap<String, String>,
) -> Vec<String> {
    let mut wrong = Vec::new();
    for (name, value) in sent {
        // `net0` is one of `net[n]`.
        let numbered = format!("{}[n]", name.trim_end_matches(|c: char| c.is_ascii_digit()));
        let Some(schema) = known.get(name).or_else(|| known.get(&numbered)) else {
            wrong.push(format!("{name} is no parameter"));
            continue;
        };
        wrong.extend(
            judge(schema, value)
                .into_iter()
                .map(|what| format!("{name}: {what}")),
        );
        if let Some(other) = schema["requires"].as_str()
            && !sent.contains_key(other)
        {
            wrong.push(format!("{name} requires {other}"));
        }
    }
    for (name, schema) in known {
        let optional =
            schema["optional"] == 1 || schema["optional"] == true || schema["optional"] == "1";
        // What stands for another is never written itself.
        if !optional && schema.get("alias").is_none() && !sent.contains_key(name) {
            wrong.push(format!("{name} is required"));
        }
    }
    wrong
}

/// A number, which the description writes as a text at times.
fn limit(schema: &Value, name: &str) -> Option<u64> {
    let value = &schema[name];
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

fn judge(schema: &Value, value: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut unless = |good: bool, what: String| {
        if !good {
            wrong.push(format!(
                "{what}: {}",
                value.chars().take(80).collect::<String>()
            ));
        }
    };
    match schema["type"].as_str() {
        Some("integer") => match value.parse::<u64>() {
            Ok(number) => {
                if let Some(least) = limit(schema, "minimum") {
                    unless(number >= least, format!("less than {least}"));
                }
                if let Some(most) = limit(schema, "maximum") {
                    unless(number <= most, format!("more than {most}"));
                }
            }
            Err(_) => unless(false, "no integer".to_owned()),
        },
        Some("boolean") => unless(matches!(value, "0" | "1"), "no boolean".to_owned()),
        Some("string") => {}
        // Of any strings, as far as is known here.
        Some("array") => unless(
            schema["items"]["type"] == "string" && schema["items"].get("format").is_none(),
            format!("no check for items {}", schema["items"]),
        ),
        other => unless(false, format!("no check for type {other:?}")),
    }
    if let Some(all) = schema["enum"].as_array() {
        unless(
            all.iter().any(|one| one == value),
            format!("none of {all:?}"),
        );
    }
    if let Some(pattern) = schema["pattern"].as_str() {
        // `(?^:…)` is how Perl writes a pattern without options.
        let pattern = format!("^(?:{})$", pattern.replace("(?^:", "(?:"));
        let good = Regex::new(&pattern).unwrap().is_match(value);
        unless(good, format!("not {pattern}"));
    }
    let length = value.chars().count() as u64;
    if let Some(most) = limit(schema, "maxLength") {
        unless(length <= most, format!("longer than {most}"));
    }
    if let Some(least) = limit(schema, "minLength") {
        unless(length >= least, format!("shorter than {least}"));
    }
    match &schema["format"] {
        Value::Null => {}
        Value::String(format) => match format_of(format, value) {
            Some(good) => unless(good, format!("not of format {format}")),
            None => unless(false, format!("no check for format {format}")),
        },
        Value::Object(parts) => wrong.extend(judge_all(parts, &parts_of(parts, value))),
        other => unless(false, format!("no check for format {other}")),
    }
    wrong
}

/// `virtio,bridge=vmbr2,firewall=1`: the part without a name is the one that the description calls its default key.
fn parts_of(parts: &serde_json::Map<String, Value>, value: &str) -> BTreeMap<String, String> {
    let default = parts
        .iter()
        .find(|(_, schema)| schema["default_key"] == 1)
        .map(|(name, _)| name.clone());
    value
        .split(',')
        .map(|part| match part.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => (default.clone().unwrap_or_default(), part.to_owned()),
        })
        .collect()
}

/// Whether a value has one of Proxmox's named formats (`PVE::JSONSchema` and the modules that register more). A format that
/// is not here fails the test: no value passes unseen.
fn format_of(format: &str, value: &str) -> Option<bool> {
    let matches = |pattern: &str| {
        Regex::new(&format!("^(?:{pattern})$"))
            .unwrap()
            .is_match(value)
    };
    let list = |one: &str| {
        let items = Regex::new(r"[\s,;]+").unwrap();
        items
            .split(value)
            .all(|item| format_of(one, item).unwrap_or(false))
    };
    Some(match format {
        "pve-node" => matches(r"[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?"),
        "pve-vmid" => matches(r"[1-9][0-9]{2,8}"),
        "pve-poolid" => matches(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+){0,2}"),
        "pve-bridge-id" | "pve-configid" => matches(r"(?i)[a-z][a-z0-9_.-]+"),
        "pve-tag" => matches(r"(?i)[a-z0-9_][a-z0-9_+.-]*"),
        "pve-tag-list" => list("pve-tag"),
        "dns-name" => matches(
            r"([a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?\.)*[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?",
        ),
        "address" => value.parse::<std::net::IpAddr>().is_ok() || format_of("dns-name", value)?,
        "address-list" => list("address"),
        "pve-qm-ipconfig" => matches("ip=dhcp"),
        "urlencoded" => matches(r"[A-Za-z0-9_.~%!*'()-]*"),
        _ => return None,
    })
}
