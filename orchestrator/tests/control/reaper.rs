//! What nobody owns is found, seen again, held in quarantine, shown to an administrator and removed, by whichever process.

use crate::crash::orphan;
use crate::house::{House, PATIENCE, prompt, quick, until};
use crate::process::{PROGRAM, configured, run, serve};
use mayfly_api::{DesktopName, SessionPhase};
use mayfly_orchestrator::admin;
use mayfly_orchestrator::config::Limits;
use mayfly_orchestrator::control::Control;
use mayfly_orchestrator::list;
use mayfly_orchestrator::provider::Provider;
use mayfly_orchestrator::provider::simulated::Fault;
use mayfly_orchestrator::reaper::{self, Report};
use mayfly_orchestrator::secret::Secrets;
use mayfly_orchestrator::store::machines::Reserved;
use mayfly_orchestrator::store::strays::{Look, Outcome, Place, Stray};
use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

const HOUR: Duration = Duration::from_secs(3_600);

fn name(number: u32) -> DesktopName {
    DesktopName::from_number(number).unwrap()
}

/// A house that listens to its administrator, in which so many machines are that nobody owns, and whose quarantine is an hour.
/// Sessions last longer, whatever the clock says.
async fn with_orphans(orphans: u32) -> House {
    let limits = Limits {
        quarantine_s: 3_600,
        never_connected_s: 86_400,
        lease_s: 86_400,
        silence_s: 86_400,
        ..Limits::default()
    };
    let house = House::with(limits, quick()).await;
    let listener = admin::listen(house.dir.path()).unwrap();
    tokio::spawn(admin::serve(house.control.clone(), listener));
    house.used(orphans).await;
    for number in 1..=orphans {
        house.machines.create(&orphan(number)).await.unwrap();
    }
    house
}

async fn pass(house: &House) -> Report {
    let mut reports = reaper::pass(&house.control.shared).await;
    assert_eq!(reports.len(), 1, "{reports:?}");
    assert_eq!(reports[0].error, None);
    reports.remove(0)
}

async fn strays(house: &House) -> Vec<Stray> {
    house.control.shared.store.strays().await.unwrap()
}

/// Passes are made until all that nobody owns is in quarantine.
async fn quarantined(house: &House, orphans: usize) -> Vec<Stray> {
    until("all are in quarantine", async || {
        pass(house).await;
        let strays = strays(house).await;
        let all = strays.len() == orphans && strays.iter().all(|s| s.quarantined_at.is_some());
        all.then_some(strays)
    })
    .await
}

async fn lines(house: &House, all: bool) -> Vec<String> {
    let config = &house.control.shared.config;
    list::strays(config, all).await.unwrap()
}

async fn counted(house: &House, what: &str) -> u64 {
    counted_at(&house.url, what).await
}

async fn counted_at(url: &str, what: &str) -> u64 {
    let text = reqwest::get(format!("{url}/metrics")).await.unwrap();
    let text = text.text().await.unwrap();
    let line = format!("mayfly_reaper_{what}_total{{provider=\"simulated\"}} ");
    let value = text.lines().find_map(|l| l.strip_prefix(&line));
    value.unwrap().parse().unwrap()
}

#[tokio::test]
async fn it_is_seen_twice_and_waits_in_quarantine_where_an_administrator_sees_it() {
    let house = with_orphans(1).await;
    let (mine, owned) = house.ready().await;
    until("it is found", async || {
        pass(&house).await;
        strays(&house).await.pop()
    })
    .await;
    let stray = quarantined(&house, 1).await.remove(0);
    let apart = stray
        .quarantined_at
        .unwrap()
        .duration_since(stray.first_seen);
    assert!(apart.as_secs() >= 2, "{stray:?}");

    house.clock.advance(HOUR - Duration::from_secs(60));
    let report = pass(&house).await;
    assert_eq!(report.removed, []);
    assert_eq!(report.waiting.len(), 1, "{report:?}");
    assert_eq!(house.machines.list().await.unwrap().len(), 2, "it is there");
    let shown = lines(&house, false).await;
    assert_eq!(shown.len(), 1, "{shown:?}");
    let expected = format!("{}  quarantined   simulated  seen ", name(1));
    assert!(shown[0].starts_with(&expected), "{shown:?}");

    house.clock.advance(Duration::from_secs(60));
    pass(&house).await;
    assert_eq!(house.machines.list().await.unwrap(), [owned]);
    assert_eq!(lines(&house, false).await, Vec::<String>::new());
    let shown = lines(&house, true).await;
    assert!(
        shown[0].contains("  removed       simulated  seen "),
        "{shown:?}"
    );
    for (what, times) in [
        ("found", 1),
        ("quarantined", 1),
        ("removed", 1),
        ("released", 0),
        ("vanished", 0),
        ("failed", 0),
        ("held_back", 0),
    ] {
        assert_eq!(counted(&house, what).await, times, "{what}");
    }
    assert_eq!(house.get(&mine).await.phase, SessionPhase::Ready);

    // A week later it is forgotten.
    house.clock.advance(24 * 7 * HOUR + HOUR);
    let shared = &house.control.shared;
    let before = shared.clock.now() - jiff::SignedDuration::from_hours(24 * 7);
    assert_eq!(shared.store.forget_strays(before).await.unwrap(), 1);
}

#[tokio::test]
async fn what_is_owned_after_all_leaves_quarantine_and_stays() {
    let house = with_orphans(0).await;
    let (mine, desktop) = house.ready().await;
    // As if it had not been known, twice.
    let shared = &house.control.shared;
    let place = Place {
        provider: "simulated".to_owned(),
        host: String::new(),
    };
    for _ in 0..2 {
        let look = Look {
            at: shared.clock.now(),
            unowned: BTreeSet::from([desktop]),
            others: BTreeSet::new(),
            apart: Duration::ZERO,
        };
        shared.store.sight(&place, look).await.unwrap();
    }
    assert!(strays(&house).await[0].quarantined_at.is_some());
    house.clock.advance(2 * HOUR);
    pass(&house).await;
    let stray = strays(&house).await.remove(0);
    assert_eq!(stray.over.map(|over| over.1), Some(Outcome::Released));
    assert_eq!(counted(&house, "released").await, 1);
    assert_eq!(counted(&house, "removed").await, 0);
    assert_eq!(house.machines.list().await.unwrap(), [desktop]);
    assert!(!house.get(&mine).await.phase.is_final());
}

#[tokio::test]
async fn another_process_goes_on_where_the_first_was() {
    let mut house = with_orphans(2).await;
    let before = quarantined(&house, 2).await;
    house.machines.destroy(name(2)).await.unwrap();
    house.crash().await;
    house.clock.advance(HOUR);
    // It looks once: that is the third time.
    pass(&house).await;
    house.nothing_is_left().await;
    let after = strays(&house).await;
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(after.first_seen, before.first_seen);
        assert_eq!(after.quarantined_at, before.quarantined_at);
    }
    let outcomes: Vec<_> = after.iter().map(|s| s.over.unwrap().1).collect();
    assert_eq!(outcomes, [Outcome::Removed, Outcome::Vanished]);
}

#[tokio::test]
async fn an_administrator_looks_at_once_and_keeps_what_is_to_stay() {
    let house = with_orphans(1).await;
    let config = &house.control.shared.config;
    let reports = until("it is in quarantine", async || {
        let reports = admin::reap_from_here(config).await.unwrap();
        (!reports[0].waiting.is_empty()).then_some(reports)
    })
    .await;
    assert_eq!(reports[0].shown, 1, "{reports:?}");
    let told = reaper::told(&reports);
    assert!(told.contains("simulated: 1 shown"), "{told}");
    let until = reports[0].waiting[0].1;
    let waits = format!("in quarantine until {until:.0}: {}", name(1));
    assert!(told.contains(&waits), "{told}");

    let refused = admin::keep_from_here(config, name(2), true).await;
    let refused = format!("{:#}", refused.unwrap_err());
    assert!(
        refused.contains("none of those that nobody owns"),
        "{refused}"
    );
    admin::keep_from_here(config, name(1), true).await.unwrap();
    house.clock.advance(2 * HOUR);
    let reports = admin::reap_from_here(config).await.unwrap();
    assert_eq!(reports[0].kept, [name(1)]);
    assert!(lines(&house, false).await[0].contains("  kept          simulated  "));
    assert_eq!(house.machines.list().await.unwrap(), [name(1)]);

    admin::keep_from_here(config, name(1), false).await.unwrap();
    admin::reap_from_here(config).await.unwrap();
    house.nothing_is_left().await;
}

#[tokio::test]
async fn those_that_cannot_be_removed_hold_up_no_other_and_say_why() {
    let house = with_orphans(4).await;
    quarantined(&house, 4).await;
    // As many as one pass removes.
    house.machines.inject(Fault::DestroyFails, Some(3));
    house.clock.advance(HOUR);
    let report = pass(&house).await;
    assert_eq!(report.held_back.len(), 1, "{report:?}");
    assert_eq!(report.failed.len(), 3, "{report:?}");
    assert!(report.failed[0].1.contains("disk is busy"), "{report:?}");
    let shown = lines(&house, false).await;
    let said = shown.iter().filter(|line| line.ends_with("disk is busy"));
    assert_eq!(said.count(), 3, "{shown:?}");
    assert_eq!(counted(&house, "failed").await, 3);
    assert_eq!(counted(&house, "held_back").await, 1);
    let report = pass(&house).await;
    assert!(report.removed.contains(&name(4)), "{report:?}");
    assert_eq!(report.removed.len(), 3, "{report:?}");
    pass(&house).await;
    house.nothing_is_left().await;
}

#[tokio::test]
async fn two_that_look_at_once_remove_each_machine_once() {
    let house = with_orphans(6).await;
    let shared = &house.control.shared;
    let secrets = Secrets::open(&house.dir.path().join("secret.key")).unwrap();
    let other = Control::start(
        mayfly_orchestrator::config::Config {
            limits: prompt(),
            ..shared.config.clone()
        },
        shared.store.clone(),
        Arc::new(secrets),
        house.clock.clone(),
        vec![Arc::new(house.machines.clone())],
        mayfly_orchestrator::telemetry::Traces::default(),
    )
    .await
    .unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = tokio::spawn(mayfly_orchestrator::http::serve(other.clone(), listener));
    until("all are gone", async || {
        house.clock.advance(HOUR);
        let passes = tokio::join!(reaper::pass(shared), reaper::pass(&other.shared));
        for report in [passes.0, passes.1].concat() {
            assert_eq!((report.error, report.failed), (None, Vec::new()));
        }
        let open = strays(&house).await.into_iter().any(|s| s.over.is_none());
        (house.machines.list().await.unwrap().is_empty() && !open).then_some(())
    })
    .await;
    let removed = counted(&house, "removed").await + counted_at(&url, "removed").await;
    assert_eq!(removed, 6);
    other.stop(PATIENCE).await;
    server.abort();
}

#[tokio::test]
async fn what_terraform_made_is_told_where_nothing_can_remove_it() {
    let house = with_orphans(0).await;
    let shared = &house.control.shared;
    let machine = Reserved {
        name: name(7),
        node: "pve1".to_owned(),
        memory_mib: 512,
        storage: "ceph".to_owned(),
    };
    shared.store.reserve(&machine, 1).await.unwrap();
    let reports = reaper::pass(shared).await;
    let told = reaper::told(&reports);
    let expected = format!("{} may exist, and no template has the provider", name(7));
    assert!(told.contains(&expected), "{told}");
    assert_eq!(shared.store.reserved().await.unwrap(), [machine]);
}

#[tokio::test]
async fn killed_at_any_point_of_a_removal_it_goes_on_and_tells_how_it_ended() {
    let points = [
        "before commit sight#2",
        "after commit sight#2",
        "before commit removal",
        "after commit removal",
        "before reap",
        "after reap",
        "before commit removed",
        "after commit removed",
    ];
    let killed = points.map(async |point| {
        let dir = tempfile::tempdir().unwrap();
        let (config, url) = configured(dir.path());
        let machines = dir.path().join("state/simulated");
        std::fs::create_dir_all(&machines).unwrap();
        let file = machines.join("desktop-0000001.json");
        std::fs::write(&file, "{}").unwrap();
        let mut child = Command::new(PROGRAM)
            .args(["serve", "--config"])
            .arg(&config)
            .env("MAYFLY_DIE_AT", point)
            .env("MAYFLY_LIMITS__QUARANTINE_S", "0")
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let died = until(point, async || child.try_wait().unwrap()).await;
        assert_eq!(died.signal(), Some(9), "{point}");
        let service = serve(dir.path(), &config, &url).await;
        until("it is removed, and that is known", async || {
            if file.exists() {
                return None;
            }
            let listed = run(&["list", "--strays", "--config"], &config);
            let listed = String::from_utf8(listed.stdout).unwrap();
            let removed = listed.starts_with("desktop-0000001  removed ");
            removed.then_some(())
        })
        .await;
        drop(service);
    });
    futures_util::future::join_all(killed).await;
}
