//! The client drives an unmodified fakepve 0.5.0. Its guests are records, nothing runs; its API checks every call against the
//! official schema, its privileges and locks, and its errors are Proxmox VE's own.

use crate::fakepve::{FakePve, SECRET, TOKEN, certificates, guest};
use mayfly_orchestrator::clock::Clock;
use mayfly_orchestrator::doctor::verdict;
use mayfly_orchestrator::provider::CheckStatus;
use mayfly_orchestrator::pve::call::{self, Kind, NewClone, Settings};
use mayfly_orchestrator::pve::preflight::{Rest, Wanted, preflight};
use mayfly_orchestrator::pve::reply::{NodeState, Power, Resource, ipv4_of};
use mayfly_orchestrator::pve::task::{Finished, Patience, Tasks, follow};
use mayfly_orchestrator::pve::{Cause, Client, Endpoint, Limits, PveError, Retry, Token, Upid};
use mayfly_orchestrator::trust::Trust;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use secrecy::SecretString;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

fn patience() -> Patience {
    Patience::of(&Clock::default(), Duration::from_secs(30))
}

async fn finish(client: &Client, upid: &Upid) -> Result<Finished, PveError> {
    follow(client, upid, &patience()).await
}

fn new_clone(id: u32) -> NewClone {
    NewClone {
        id: guest(id).id,
        name: format!("desktop-{id:07x}"),
        pool: Some("daas".parse().unwrap()),
        target: None,
        description: Some("a session's desktop".to_owned()),
    }
}

#[tokio::test]
async fn a_desktop_lives_and_nothing_of_it_is_left() {
    // Tasks take a moment, so that they are seen to run.
    let mut fake = FakePve::start(0.05);
    let template = fake.add_template();
    let client = fake.client();

    let version = client.send(&call::version()).await.unwrap();
    assert_eq!(version.major(), 9);
    let desktop = guest(200);
    let free = client.send(&call::id_is_free(desktop.id)).await.unwrap();
    assert_eq!(free.0, desktop.id);

    let upid = client
        .send(&call::clone_linked(&template, &new_clone(200)))
        .await
        .unwrap();
    assert_eq!((upid.kind(), upid.node().as_str()), ("qmclone", "pve1"));
    assert_eq!(
        finish(&client, &upid).await.unwrap(),
        Finished { warnings: 0 }
    );
    let taken = client
        .send(&call::id_is_free(desktop.id))
        .await
        .unwrap_err();
    assert_eq!(taken.retry(), Retry::OtherId, "{taken}");
    let again = client
        .send(&call::clone_linked(&template, &new_clone(200)))
        .await
        .unwrap_err();
    assert_eq!(
        (again.cause(), again.retry()),
        (Cause::IdTaken, Retry::OtherId),
        "{again}"
    );

    let before = client.send(&call::config(&desktop)).await.unwrap();
    assert!(before.get("scsi0").unwrap().contains("vm-200-disk-0"));
    let key = "ssh-ed25519 AAAA+/= mayfly@orchestrator";
    let settings = Settings::new()
        .unless_changed_since(&before.digest().unwrap())
        .cores(2)
        .memory_mib(4096)
        .tags(&["mayfly", "x"])
        .agent()
        .network(0, "vmbr2")
        .dhcp(0)
        .user("mayfly")
        .ssh_keys(key)
        .without_upgrade()
        .dns(&["192.0.2.53".parse().unwrap()], "example.org")
        .description("notes: ü & more");
    client
        .send(&call::set_config(&desktop, settings.clone()))
        .await
        .unwrap();
    let changed = client
        .send(&call::set_config(&desktop, settings))
        .await
        .unwrap_err();
    assert!(
        matches!(changed, PveError::Refused { status: 500, .. }),
        "{changed}"
    );
    let after = client.send(&call::config(&desktop)).await.unwrap();
    for (name, value) in [
        ("cores", "2"),
        ("memory", "4096"),
        ("tags", "mayfly;x"),
        ("ciupgrade", "0"),
        (
            "sshkeys",
            "ssh-ed25519%20AAAA%2B%2F%3D%20mayfly%40orchestrator",
        ),
        ("description", "notes: ü & more"),
    ] {
        assert_eq!(after.get(name).as_deref(), Some(value), "{name}");
    }
    let upid = client
        .send(&call::resize(&desktop, "scsi0", 32))
        .await
        .unwrap();
    finish(&client, &upid).await.unwrap();

    fake.set("vm 200", "start_secs", json!(10));
    let upid = client.send(&call::start(&desktop)).await.unwrap();
    let early = client.status(&upid).await.unwrap();
    assert_eq!(early.exitstatus, None, "it runs for half a second");
    finish(&client, &upid).await.unwrap();
    let status = client.send(&call::status(&desktop)).await.unwrap();
    assert_eq!((status.status, status.lock), (Power::Running, None));
    let refused = client.send(&call::delete(&desktop)).await.unwrap_err();
    assert!(refused.to_string().contains("is running"), "{refused}");

    the_agent_is_silent_then_answers(&mut fake, &client).await;

    let upid = client
        .send(&call::shutdown(&desktop, Duration::from_secs(1)))
        .await
        .unwrap();
    finish(&client, &upid).await.unwrap();
    for call in [
        call::start(&desktop),
        call::stop(&desktop),
        call::delete(&desktop),
    ] {
        let upid = client.send(&call).await.unwrap();
        finish(&client, &upid).await.unwrap();
    }
    let gone = client.send(&call::status(&desktop)).await.unwrap_err();
    assert_eq!(gone.cause(), Cause::NoSuchGuest, "{gone}");
    let left = client
        .send(&call::cluster_resources(Kind::Guests))
        .await
        .unwrap();
    assert!(
        matches!(&left[..], [Resource::Qemu(first), Resource::Qemu(second)]
            if first.vmid == template.id && first.template && second.vmid.get() == 9001),
        "{left:?}"
    );
    let storages = fake.get("pve", "storages");
    let volumes = storages["local-lvm"]["volumes"].as_object().unwrap();
    assert_eq!(volumes.keys().collect::<Vec<_>>(), ["base-9000-disk-0"]);
}

async fn the_agent_is_silent_then_answers(fake: &mut FakePve, client: &Client) {
    let desktop = guest(200);
    let silent = client.send(&call::agent_ping(&desktop)).await.unwrap_err();
    assert_eq!(
        (silent.cause(), silent.retry()),
        (Cause::AgentSilent, Retry::Again),
        "{silent}"
    );
    let mac = "bc:24:11:00:00:77";
    fake.set(
        "vm 200",
        "agent",
        json!({
            "interfaces": [
                {"name": "lo", "hardware-address": "00:00:00:00:00:00", "ip-addresses": [{"ip-address": "127.0.0.1"}]},
                {"name": "ens18", "hardware-address": mac, "ip-addresses": [{"ip-address": "192.0.2.77"}]},
            ],
            "files": {"/etc/ssh/ssh_host_ed25519_key.pub": "ssh-ed25519 AAAA\n"},
            // Bytes for characters, as Perl has them.
            "exec": {"/bin/sh -c journalctl | tail": {"out-data": "\u{c3}\u{a9}t\u{c3}\u{a9}\n"}},
        }),
    );
    client.send(&call::agent_ping(&desktop)).await.unwrap();
    let seen = client
        .send(&call::agent_interfaces(&desktop))
        .await
        .unwrap();
    assert_eq!(
        ipv4_of(&seen.result, mac),
        Some("192.0.2.77".parse().unwrap())
    );
    let read = call::agent_read(&desktop, "/etc/ssh/ssh_host_ed25519_key.pub");
    let file = client.send(&read).await.unwrap();
    assert_eq!(
        (file.content.as_str(), file.truncated),
        ("ssh-ed25519 AAAA\n", false)
    );
    let run = call::agent_exec(&desktop, &["/bin/sh", "-c", "journalctl | tail"]);
    let started = client.send(&run).await.unwrap();
    let ask = call::agent_exec_status(&desktop, started.pid);
    let ended = client.send(&ask).await.unwrap();
    assert_eq!((ended.exited, ended.output.as_str()), (true, "été\n"));
    let tasks = client.send(&call::guest_tasks(&desktop, 10)).await.unwrap();
    let told: Vec<_> = tasks
        .iter()
        .map(|task| (task.upid.kind(), task.status.as_deref()))
        .collect();
    assert!(told.contains(&("qmstart", Some("OK"))), "{told:?}");
    let content = SecretString::from("{\"password\": \"ü+/&=%\"}");
    let write = call::agent_write(&desktop, "/run/mayfly/bootstrap", &content).unwrap();
    client.send(&write).await.unwrap();
    let asked = fake.get("vm 200", "agent_requests");
    let last = asked.as_array().unwrap().last().unwrap();
    assert_eq!(last[0], "file-write");
    assert_eq!(last[1]["content"], "eyJwYXNzd29yZCI6ICLDvCsvJj0lIn0=");
    assert_eq!(last[1]["encode"], 0);
}

#[tokio::test]
async fn a_wrong_token_is_named_and_its_secret_is_not() {
    let fake = FakePve::start(0.0);
    let mut endpoint = fake.endpoint();
    endpoint.token = Token::new(TOKEN, "wrong-secret".into()).unwrap();
    let client = Client::new(&endpoint).unwrap();
    let error = client.send(&call::version()).await.unwrap_err();
    assert!(
        matches!(&error, PveError::Unauthorized { token, .. } if token == TOKEN),
        "{error}"
    );
    assert_eq!(error.retry(), Retry::Never);
    let shown = format!("{error} {error:?} {client:?} {endpoint:?}");
    assert!(!shown.contains("wrong-secret"), "{shown}");
    assert!(!format!("{:?}", fake.endpoint()).contains(SECRET));
}

#[tokio::test]
async fn only_the_certificate_that_is_trusted_is_believed() {
    let mut fake = FakePve::start(0.0);
    let mut endpoint = fake.endpoint();
    let mut with = |trust| {
        endpoint.trust = trust;
        Client::new(&endpoint).unwrap()
    };
    // Another authority's.
    let other = FakePve::start(0.0);
    let client = with(Trust::Authority(other.authority()));
    let error = client.send(&call::version()).await.unwrap_err();
    assert!(matches!(error, PveError::Certificate { .. }), "{error}");
    // None that the system knows; a machine that knows none at all says so.
    endpoint.trust = Trust::System;
    match Client::new(&endpoint) {
        Ok(client) => {
            let error = client.send(&call::version()).await.unwrap_err();
            assert!(matches!(error, PveError::Certificate { .. }), "{error}");
        }
        Err(error) => assert!(error.to_string().contains("ca-certificates"), "{error}"),
    }
    // Another fingerprint; what is shown is told, so that an administrator can compare.
    let shown = node_fingerprint(&fake);
    endpoint.trust = Trust::Fingerprint("00".repeat(32).parse().unwrap());
    let error = Client::new(&endpoint)
        .unwrap()
        .send(&call::version())
        .await
        .unwrap_err();
    assert!(error.to_string().contains(&shown), "{error} {shown}");
    assert_eq!(
        fake.requests().len(),
        0,
        "nothing was sent, the token neither"
    );

    endpoint.trust = Trust::Fingerprint(shown.parse().unwrap());
    let client = Client::new(&endpoint).unwrap();
    client.send(&call::version()).await.unwrap();
    assert_eq!(fake.requests().len(), 1);
}

fn node_fingerprint(fake: &FakePve) -> String {
    let path = fake.authority().with_file_name("node.pem");
    let der = CertificateDer::from_pem_file(path).unwrap();
    data_encoding::HEXLOWER.encode(&Sha256::digest(&der))
}

fn wanted() -> Wanted {
    Wanted {
        template: guest(9000).id,
        storage: "local-lvm".parse().unwrap(),
        pool: Some("daas".parse().unwrap()),
        network: "/sdn/zones/localnetwork/vmbr2".to_owned(),
        room: 4 << 30,
        rest: Rest::Configure,
    }
}

/// What the token needs, as an administrator gives it; without `but`.
fn grant(fake: &mut FakePve, but: &str) {
    // To see that the cluster's firewall is on.
    let mut rights = vec![("/".to_owned(), "Sys.Audit")];
    for need in mayfly_orchestrator::pve::preflight::needs(&wanted(), 9) {
        if need.any_of[0] != but {
            rights.push((need.path, need.any_of[0]));
        }
    }
    for (path, privilege) in rights {
        fake.call("grant", json!([TOKEN, path, privilege]));
    }
}

#[tokio::test]
async fn a_missing_privilege_is_named_by_the_call_and_by_the_preflight() {
    let mut fake = FakePve::start(0.0);
    let template = fake.add_template();
    grant(&mut fake, "VM.Clone");
    let client = fake.client();
    let clone = call::clone_linked(&template, &new_clone(201));
    let error = client.send(&clone).await.unwrap_err();
    assert!(
        matches!(&error, PveError::Forbidden { path: Some(path), privilege: Some(privilege), .. }
            if path == "/vms/9000" && privilege == "VM.Clone"),
        "{error}"
    );
    let checks = preflight(&client, &wanted()).await;
    assert_eq!(verdict(&checks), CheckStatus::Error);
    let missing: Vec<&str> = checks
        .iter()
        .filter(|check| check.status != CheckStatus::Ok)
        .map(|check| check.detail.as_str())
        .collect();
    assert_eq!(missing.len(), 1, "{missing:?}");
    let words = format!("{TOKEN} lacks VM.Clone on /vms/9000");
    assert!(missing[0].starts_with(&words), "{missing:?}");

    grant(&mut fake, "");
    let checks = preflight(&client, &wanted()).await;
    assert_eq!(verdict(&checks), CheckStatus::Ok, "{checks:?}");
}

#[tokio::test]
async fn the_preflight_says_when_the_firewall_does_not_keep_desktops_apart() {
    let mut fake = FakePve::start(0.0);
    let template = fake.add_template();
    let client = fake.client();
    async fn said(client: &Client) -> Vec<String> {
        let checks = preflight(client, &wanted()).await;
        assert_ne!(verdict(&checks), CheckStatus::Error, "{checks:?}");
        let bad = checks.into_iter().filter(|c| c.status != CheckStatus::Ok);
        bad.map(|check| check.detail).collect()
    }
    assert_eq!(said(&client).await, Vec::<String>::new());
    let rules = client.send(&call::firewall_rules(&template)).await.unwrap();
    assert_eq!(rules[0].source.as_deref(), Some("192.0.2.0/24"));

    fake.set_firewall(
        Some(9000),
        "rules",
        &json!([{"type": "in", "action": "ACCEPT", "enable": 1}]),
    );
    fake.set_firewall(
        Some(9000),
        "options",
        &json!({"enable": 1, "policy_in": "ACCEPT"}),
    );
    let open = said(&client).await;
    for (line, words) in open
        .iter()
        .zip(["policy_in", "policy_out", "rule 0 of VM 9000"])
    {
        assert!(line.contains(words), "{words}: {open:?}");
    }
    assert_eq!(open.len(), 3, "{open:?}");
    // As the cluster's firewall is on a new site.
    fake.set_firewall(None, "options", &json!({}));
    let off = said(&client).await;
    assert!(
        off.len() == 1 && off[0].contains("the cluster's firewall is off"),
        "{off:?}"
    );

    // What a token needs without this: it is not asked for what it may not see.
    for need in mayfly_orchestrator::pve::preflight::needs(&wanted(), 9) {
        fake.call("grant", json!([TOKEN, need.path, need.any_of[0]]));
    }
    fake.set_firewall(Some(9000), "rules", &json!([]));
    fake.set_firewall(
        Some(9000),
        "options",
        &json!({"enable": 1, "policy_out": "DROP"}),
    );
    let unseen = said(&client).await;
    assert!(
        unseen.len() == 1 && unseen[0].contains("Sys.Audit on /"),
        "{unseen:?}"
    );
}

#[tokio::test]
async fn the_preflight_names_a_wrong_token_a_missing_template_and_a_dead_api() {
    let mut fake = FakePve::start(0.0);
    let client = fake.client();
    let said = |checks: Vec<mayfly_orchestrator::provider::Check>| {
        assert_eq!(verdict(&checks), CheckStatus::Error);
        let lines: Vec<String> = checks.into_iter().map(|check| check.detail).collect();
        lines.join("\n")
    };
    let none = said(preflight(&client, &wanted()).await);
    assert!(none.contains("there is no VM 9000"), "{none}");
    fake.add_guest(9000);
    let plain = said(preflight(&client, &wanted()).await);
    assert!(plain.contains("VM 9000 on pve1 is no template"), "{plain}");

    fake.set("pve", "apitokens", json!({}));
    let wrong = said(preflight(&client, &wanted()).await);
    assert!(
        wrong.contains(&format!("the token {TOKEN} is not accepted")),
        "{wrong}"
    );

    let address = fake.address();
    drop(fake);
    let dead = said(preflight(&client, &wanted()).await);
    assert!(
        dead.contains(&address) && dead.contains("cannot be reached"),
        "{dead}"
    );
}

#[tokio::test]
async fn a_lock_is_told_apart_as_worth_another_try() {
    let mut fake = FakePve::start(0.01);
    let template = fake.add_template();
    let client = fake.client();
    let desktop = fake.add_guest(100);
    // Another task holds the guest's file.
    fake.call("hold_config_lock", json!([100, null]));
    let settings = Settings::new().cores(2);
    let call = call::set_config(&desktop, settings);
    let error = client.send(&call).await.unwrap_err();
    assert_eq!(
        (error.cause(), error.retry()),
        (Cause::Locked, Retry::Again),
        "{error}"
    );
    // A task that waits for it in vain: half of it may be done.
    let upid = client.send(&call::stop(&desktop)).await.unwrap();
    let error = finish(&client, &upid).await.unwrap_err();
    assert_eq!(
        (error.cause(), error.retry()),
        (Cause::Locked, Retry::Look),
        "{error}"
    );
    fake.call("release_config_lock", json!([100]));
    client.send(&call).await.unwrap();
    // A template under backup.
    fake.call("snapshot_lock", json!([9000, "backup"]));
    let clone = call::clone_linked(&template, &new_clone(202));
    let error = client.send(&clone).await.unwrap_err();
    assert!(
        error.to_string().contains("VM is locked (backup)"),
        "{error}"
    );
    assert_eq!(error.retry(), Retry::Again);
    fake.call("lose_quorum", json!([]));
    fake.call("unlock", json!([9000]));
    let error = client.send(&clone).await.unwrap_err();
    assert_eq!(
        (error.cause(), error.retry()),
        (Cause::NoQuorum, Retry::Again),
        "{error}"
    );
}

#[tokio::test]
async fn a_task_that_fails_is_told_with_its_log_and_one_that_goes_on_with_its_limit() {
    let mut fake = FakePve::start(0.01);
    let client = fake.client();
    let desktop = fake.add_guest(100);
    let upid = client.send(&call::stop(&desktop)).await.unwrap();
    finish(&client, &upid).await.unwrap();
    fake.set(
        "vm 100",
        "start_error",
        json!("start failed: QEMU exited with code 1"),
    );
    let upid = client.send(&call::start(&desktop)).await.unwrap();
    let error = finish(&client, &upid).await.unwrap_err();
    let said = error.to_string();
    assert!(
        said.contains("start failed: QEMU exited with code 1"),
        "{said}"
    );
    assert!(said.contains("TASK ERROR: start failed"), "its log: {said}");

    // A clone that fills the storage fails late, in its task.
    let template = fake.add_template();
    let mut storages = fake.get("pve", "storages");
    storages["local-lvm"]["avail"] = json!(1);
    fake.set("pve", "storages", storages);
    let clone = call::clone_linked(&template, &new_clone(203));
    let upid = client.send(&clone).await.unwrap();
    let error = finish(&client, &upid).await.unwrap_err();
    assert_eq!(error.cause(), Cause::NoSpace, "{error}");

    fake.set("vm 100", "start_error", json!(null));
    fake.set("vm 100", "start_secs", json!(1_000));
    let upid = client.send(&call::start(&desktop)).await.unwrap();
    let short = Patience::of(&Clock::default(), Duration::from_millis(300));
    let error = follow(&client, &upid, &short).await.unwrap_err();
    assert!(matches!(error, PveError::TaskRuns { .. }), "{error}");
    client.send(&call::task_stop(&upid)).await.unwrap();
}

#[tokio::test]
async fn a_node_that_is_offline_is_seen_and_said() {
    let mut fake = FakePve::start(0.0);
    fake.add_template();
    fake.call("add_vm", json!([300, "elsewhere", "pve2", "running"]));
    fake.call("set_node_offline", json!(["pve2"]));
    let client = fake.client();
    let nodes = client
        .send(&call::cluster_resources(Kind::Nodes))
        .await
        .unwrap();
    let states: Vec<(&str, NodeState)> = nodes
        .iter()
        .filter_map(|line| match line {
            Resource::Node(node) => Some((node.node.as_str(), node.status)),
            _ => None,
        })
        .collect();
    assert_eq!(
        states,
        [("pve1", NodeState::Online), ("pve2", NodeState::Offline)]
    );
    let guests = client
        .send(&call::cluster_resources(Kind::Guests))
        .await
        .unwrap();
    assert!(
        guests
            .iter()
            .any(|line| matches!(line, Resource::Qemu(guest)
            if guest.vmid.get() == 300 && guest.status == Power::Unknown)),
        "{guests:?}"
    );
    let mut there = guest(300);
    there.node = "pve2".parse().unwrap();
    let error = client.send(&call::stop(&there)).await.unwrap_err();
    assert!(
        matches!(error, PveError::NodeUnreachable { status: 595, .. }),
        "{error}"
    );
    assert_eq!(error.retry(), Retry::Again);
    assert!(error.to_string().contains("No route to host"), "{error}");
    let checks = preflight(&client, &wanted()).await;
    assert_eq!(verdict(&checks), CheckStatus::Warning, "{checks:?}");

    // It comes back in the middle of a task.
    fake.call("set_node_offline", json!(["pve2", false]));
    let upid = client.send(&call::stop(&there)).await.unwrap();
    fake.call("set_node_offline", json!(["pve2"]));
    let back = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        fake.call("set_node_offline", json!(["pve2", false]));
    };
    let (ended, ()) = tokio::join!(finish(&client, &upid), back);
    ended.unwrap();
}

#[tokio::test]
async fn what_a_network_does_is_bounded_and_told_apart() {
    let mut fake = FakePve::start(1.0);
    let desktop = fake.add_guest(100);
    let mut endpoint = fake.endpoint();
    endpoint.limits = Limits {
        connect: Duration::from_secs(1),
        call: Duration::from_secs(1),
    };
    let client = Client::new(&endpoint).unwrap();
    fake.call("slow_network", json!([3]));
    let error = client.send(&call::stop(&desktop)).await.unwrap_err();
    assert!(matches!(error, PveError::NoAnswer { .. }), "{error}");
    assert_eq!(error.retry(), Retry::Look);
    let error = client.send(&call::status(&desktop)).await.unwrap_err();
    assert_eq!(error.retry(), Retry::Again);
    fake.call("slow_network", json!([0]));

    fake.call("flaky_network", json!([1.0]));
    let error = client.send(&call::stop(&desktop)).await.unwrap_err();
    assert!(matches!(error, PveError::BrokenOff { .. }), "{error}");
    assert_eq!(error.retry(), Retry::Look);
    fake.call("flaky_network", json!([0.0]));

    // A proxy's page, which is no JSON.
    let page = json!(["POST", "/status/stop", 502, "<h1>Bad Gateway</h1>", true]);
    fake.call("fail", page);
    let error = client.send(&call::stop(&desktop)).await.unwrap_err();
    assert!(error.to_string().contains("502 Bad Gateway"), "{error}");
    assert_eq!(error.retry(), Retry::Look);

    // Nobody listens.
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    endpoint.address = format!("https://127.0.0.1:{port}");
    let client = Client::new(&endpoint).unwrap();
    let error = client.send(&call::stop(&desktop)).await.unwrap_err();
    assert!(matches!(error, PveError::Unreachable { .. }), "{error}");
    assert_eq!(error.retry(), Retry::Again);
}

/// A server that says `answer` to every request and ends the connection; it tells what it took.
async fn a_server_that_says(answer: &'static str) -> (Client, Arc<Mutex<Vec<String>>>) {
    let folder = tempfile::tempdir().unwrap();
    let [certificate, key] = certificates(folder.path());
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_file(certificate).unwrap()],
            PrivateKeyDer::from_pem_file(key).unwrap(),
        )
        .unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint {
        address: format!("https://{}", listener.local_addr().unwrap()),
        token: Token::new(TOKEN, SECRET.into()).unwrap(),
        trust: Trust::Authority(folder.path().join("ca.pem")),
        limits: Limits::default(),
    };
    let client = Client::new(&endpoint).unwrap();
    let taken = Arc::new(Mutex::new(Vec::new()));
    let list = taken.clone();
    tokio::spawn(async move {
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        while let Ok((stream, _)) = listener.accept().await {
            let mut lines = BufReader::new(acceptor.accept(stream).await.unwrap()).lines();
            let request = lines.next_line().await.unwrap().unwrap();
            list.lock().unwrap().push(request);
            while lines
                .next_line()
                .await
                .unwrap()
                .is_some_and(|line| !line.is_empty())
            {}
            let mut stream = lines.into_inner();
            stream.write_all(answer.as_bytes()).await.unwrap();
            stream.shutdown().await.unwrap();
        }
    });
    (client, taken)
}

#[tokio::test]
async fn what_changes_something_is_sent_once_and_what_reads_once_more() {
    let (client, taken) = a_server_that_says("").await;
    let took = || std::mem::take(&mut *taken.lock().unwrap());
    let error = client.send(&call::stop(&guest(100))).await.unwrap_err();
    assert_eq!(error.retry(), Retry::Look, "{error}");
    assert_eq!(
        took(),
        ["POST /api2/json/nodes/pve1/qemu/100/status/stop HTTP/1.1"]
    );
    let error = client.send(&call::version()).await.unwrap_err();
    assert_eq!(error.retry(), Retry::Again, "{error}");
    assert_eq!(took(), ["GET /api2/json/version HTTP/1.1"; 2]);
}

/// fakepve says everything in the body as well; Proxmox VE often has nothing there.
#[tokio::test]
async fn the_reason_phrase_alone_says_why_without_what_is_secret() {
    let (client, _) = a_server_that_says(
        "HTTP/1.1 500 can't lock file '/x' - got timeout (c2VjcmV0)\r\ncontent-length: 13\r\n\r\n{\"data\":null}",
    )
    .await;
    let write = call::agent_write(&guest(100), "/f", &SecretString::from("secret")).unwrap();
    let error = client.send(&write).await.unwrap_err();
    let said = error.to_string();
    assert!(
        said.ends_with("500 can't lock file '/x' - got timeout (…)"),
        "{said}"
    );
    assert_eq!(
        (error.cause(), error.retry()),
        (Cause::Locked, Retry::Again)
    );
}

#[tokio::test]
async fn parameters_that_are_refused_are_named_one_by_one() {
    let mut fake = FakePve::start(0.0);
    let desktop = fake.add_guest(100);
    let client = fake.client();
    let settings = Settings::new()
        .user("mayfly")
        .description(&"x".repeat(9_000));
    let error = client
        .send(&call::set_config(&desktop, settings))
        .await
        .unwrap_err();
    let PveError::Refused {
        status: 400,
        errors,
        ..
    } = &error
    else {
        panic!("{error}");
    };
    assert_eq!(
        errors.keys().collect::<Vec<_>>(),
        ["description"],
        "{error}"
    );
}
