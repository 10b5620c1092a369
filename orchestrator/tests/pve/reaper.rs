//! What nobody owns of a site is removed: rows, states, locks, folders, machines; and nothing else.

use crate::fakepve::{FakePve, SECRET, TOKEN};
use async_trait::async_trait;
use mayfly_api::agent::Call;
use mayfly_api::{DesktopName, EndReason, SessionId};
use mayfly_orchestrator::agents::{Agents, AgentsConfig, Callers};
use mayfly_orchestrator::clock::Clock;
use mayfly_orchestrator::config::{Config, Limits};
use mayfly_orchestrator::control::Control;
use mayfly_orchestrator::provider::Provider;
use mayfly_orchestrator::provider::terraform::{Parts, ProxmoxConfig, Terraform, TerraformConfig};
use mayfly_orchestrator::pve::call::{self, Kind};
use mayfly_orchestrator::pve::preflight::Rest;
use mayfly_orchestrator::pve::reply::Resource;
use mayfly_orchestrator::reaper;
use mayfly_orchestrator::secret::Secrets;
use mayfly_orchestrator::session::{Expected, Origin, Record, Wish};
use mayfly_orchestrator::store::machines::{Locking, Reserved, Reserving};
use mayfly_orchestrator::store::sqlite::SqliteStore;
use mayfly_orchestrator::store::strays::Outcome;
use mayfly_orchestrator::store::{Change, Store};
use mayfly_orchestrator::telemetry::Traces;
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const FIRST: u32 = 100_000;

/// No agent calls here.
struct Nobody;

#[async_trait]
impl Callers for Nobody {
    async fn believe(&self, _: &Call) -> bool {
        false
    }
}

async fn provider(
    fake: &FakePve,
    folder: &Path,
    store: Arc<dyn Store>,
    secrets: Arc<Secrets>,
) -> Terraform {
    let token_file = folder.join("token");
    std::fs::write(&token_file, SECRET).unwrap();
    std::fs::set_permissions(&token_file, PermissionsExt::from_mode(0o600)).unwrap();
    let config = TerraformConfig {
        first_vm_id: FIRST,
        proxmox: ProxmoxConfig {
            address: fake.address(),
            token_id: TOKEN.to_owned(),
            token_file,
            ca_file: Some(fake.authority()),
            template: 9000,
            storage: "local-lvm".to_owned(),
            ..ProxmoxConfig::default()
        },
        ..TerraformConfig::default()
    };
    let listen = AgentsConfig {
        listen: Some("127.0.0.1:0".parse().unwrap()),
        ..AgentsConfig::default()
    };
    let agents = Agents::open(&listen, folder, Arc::new(Nobody)).await;
    let parts = Parts {
        orchestrator: "/proc/self/exe".into(),
        state: folder.to_owned(),
        machines: store,
        secrets,
        agents: agents.unwrap(),
        api: "http://127.0.0.1:1".to_owned(),
        rest: Rest::Nothing,
    };
    Terraform::new(config, parts).unwrap()
}

/// A desktop of a template that is not configured any more: nobody works for it.
async fn desktop(store: &dyn Store, clock: &Clock) -> (SessionId, DesktopName) {
    let wish = Wish {
        origin: Origin::V1,
        template: "former".to_owned(),
        provider: "former".to_owned(),
        user: "user".to_owned(),
        language: None,
        time_zone: None,
        keyboard: None,
    };
    let limits = Limits::default();
    let id = SessionId::new();
    let record = Record::accepted(id, wish, Expected::default(), &limits, clock.now());
    store.accept(record, None, 100).await.unwrap();
    let planned = store
        .plan_next(&limits, &[], clock.now())
        .await
        .unwrap()
        .given();
    (id, planned.unwrap().desktop.unwrap().name())
}

#[tokio::test]
async fn what_nobody_owns_of_a_site_is_removed_and_nothing_else() {
    let mut fake = FakePve::start(0.0);
    fake.add_template();
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let store = SqliteStore::open(&folder.join("db")).await.unwrap();
    let store: Arc<dyn Store> = Arc::new(store);
    let secrets = Arc::new(Secrets::open(&folder.join("key")).unwrap());
    let clock = Clock::default();
    let mut names = Vec::new();
    for _ in 0..5 {
        let (id, name) = desktop(&*store, &clock).await;
        let now = clock.now();
        let over = Box::new(move |record: &mut Record| {
            record.end(EndReason::Requested, now).unwrap();
            record.gone(name, now).unwrap();
            Change::Told
        });
        store.update(id, now, over).await.unwrap();
        names.push(name);
    }
    let [row, whole, bare, foreign, left] = names.try_into().unwrap();
    let (_, owned) = desktop(&*store, &clock).await;

    let terraform = provider(&fake, folder, store.clone(), secrets.clone()).await;
    for name in [row, whole, owned] {
        let machine = Reserved {
            name,
            node: "pve1".to_owned(),
            memory_mib: 512,
            storage: "local-lvm".to_owned(),
        };
        let reserved = store.reserve(&machine, 9).await.unwrap();
        assert_eq!(reserved, Reserving::Done);
        let locked = store.lock(name, "run", "{}").await.unwrap();
        assert_eq!(locked, Locking::Done);
        let saved = store.save(name, "run", b"{}").await.unwrap();
        assert_eq!(saved, Locking::Done);
    }
    let folder_of = |name: DesktopName| folder.join("terraform").join(name.to_string());
    for name in [whole, left, owned] {
        std::fs::create_dir(folder_of(name)).unwrap();
    }
    let mark = format!("mayfly;mayfly-{}", secrets.installation());
    for (name, tags) in [
        (whole, ""),
        (bare, &*mark),
        (foreign, "mayfly;mayfly-00000000"),
        (owned, &*mark),
    ] {
        let config = json!({"tags": tags, "memory": 512});
        let id = FIRST + name.number();
        let vm = json!([id, name, "pve1", "running", Value::Null, config]);
        fake.call("add_vm", vm);
    }
    let listed = terraform.list().await.unwrap();
    assert_eq!(listed, [row, whole, bare, left, owned]);

    let config = Config {
        state_dir: folder.to_owned(),
        limits: Limits {
            quarantine_s: 60,
            ..Limits::default()
        },
        ..Config::default()
    };
    let providers: Vec<Arc<dyn Provider>> = vec![Arc::new(terraform)];
    let (seen, traces) = (clock.clone(), Traces::default());
    let control = Control::start(config, store.clone(), secrets, seen, providers, traces).await;
    let control = control.unwrap();
    // Found, in quarantine, removed: three in one pass, and the fourth.
    for seconds in [0, 2, 60, 60] {
        clock.advance(Duration::from_secs(seconds));
        let reports = reaper::pass(&control.shared).await;
        assert_eq!(reports[0].error, None, "{reports:?}");
        assert_eq!(reports[0].failed, [], "{reports:?}");
        if seconds < 60 {
            assert!(store.state(row).await.unwrap().is_some(), "{reports:?}");
        }
    }
    control.stop(Duration::from_secs(10)).await;

    let reserved = store.reserved().await.unwrap();
    let reserved: Vec<_> = reserved.into_iter().map(|machine| machine.name).collect();
    assert_eq!(reserved, [owned]);
    assert_eq!(store.state(row).await.unwrap(), None);
    let again = store.lock(row, "another run", "{}").await.unwrap();
    assert_eq!(again, Locking::Nothing, "its lock went with it");
    assert!(!folder_of(whole).exists() && !folder_of(left).exists());
    assert!(folder_of(owned).exists());
    let (client, all) = (fake.client(), call::cluster_resources(Kind::Guests));
    let guests = client.send(&all).await.unwrap();
    let mut guests: Vec<_> = guests
        .into_iter()
        .filter_map(|line| match line {
            Resource::Qemu(guest) => Some(guest.vmid.get()),
            _ => None,
        })
        .collect();
    guests.sort_unstable();
    let [foreign, of_owned] = [foreign, owned].map(|name| FIRST + name.number());
    assert_eq!(guests, [9000, 9001, foreign, of_owned]);
    let strays = store.strays().await.unwrap();
    let outcomes: Vec<_> = strays
        .iter()
        .map(|s| (s.desktop, s.over.unwrap().1))
        .collect();
    let removed = [row, whole, bare, left].map(|name| (name, Outcome::Removed));
    assert_eq!(outcomes, removed);
    store.close().await;
}
