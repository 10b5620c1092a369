//! Two orchestrators with one PostgreSQL: one dies, the other goes on with its desktops.

use anyhow::{Context, Result, ensure};
use mayfly_api::{EndReason, SessionPhase, StageName};
use mayfly_orchestrator::store::machines::Machines as _;
use mayfly_orchestrator::store::postgres::PostgresStore;
use mayfly_orchestrator::store::replicas::ReplicaId;
use mayfly_postgres::Cluster;
use mayfly_tests::lab::{Lab, Orchestrator, Provider, image_folder, until};
use mayfly_tests::sessions::{END, Held, READY};
use mayfly_tests::site::{Site, alone, applying};
use serde_json::json;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Where the agents call the one, and the other.
const PLACES: [&str; 2] = ["10.85.0.1:5001", "10.85.0.2:5001"];
/// What one was working on goes on elsewhere within this.
const TAKEN: Duration = Duration::from_secs(45);

fn configuration(site: &Site, place: usize, store: &str) -> Result<String> {
    let listens = format!("listen = {:?}", PLACES[0]);
    let both = format!(
        "listen = {:?}\nothers = [{:?}]",
        PLACES[place],
        PLACES[1 - place]
    );
    Ok(site.configuration()?.replace(&listens, &both) + store)
}

#[test]
fn one_dies_and_the_other_goes_on_with_its_desktops() -> Result<()> {
    alone(
        "replicas::one_dies_and_the_other_goes_on_with_its_desktops",
        one_dies,
    )
}

async fn one_dies() -> Result<()> {
    let second = "ip address add 10.85.0.2/24 dev vmbr2";
    let added = Command::new("sh").args(["-c", second]).status()?;
    ensure!(added.success(), "{second}");
    let (here, all) = (
        ["10.85.0.1", "10.85.0.2"],
        ["10.85.0.1", "10.85.0.2", "10.85.0.10"],
    );
    let sets = json!({"ip_sets": {
        "people": here, "orchestrator": here, "domain": ["10.85.0.10"], "files": ["10.85.0.10"],
        "services": all, "ipfilter-net0": ["10.85.0.128/25"],
    }});
    let mut site = Site::start(&image_folder("MAYFLY_MICRO_GUEST")?, sets)?;
    // It ends with this test: what waits for the program's end is gone with its namespaces.
    let cluster = Cluster::start(None);
    let labs = [Lab::new("replica one")?, Lab::new("replica two")?];
    let database = cluster.database().await;
    PostgresStore::migrate(&database).await?;
    let password = labs[0].path("password");
    std::fs::write(&password, cluster.password())?;
    std::fs::set_permissions(&password, std::fs::Permissions::from_mode(0o600))?;
    let store = format!(
        "[store]\nurl = {:?}\npassword_file = {password:?}\n",
        cluster.url(&database)
    );
    let start = async |place: usize| {
        let provider = Provider::Terraform(configuration(&site, place, &store)?);
        let limits = "lease_s = 1800\nidle_s = 5";
        Orchestrator::start(&labs[place], &provider, limits).await
    };
    let mut one = start(0).await?;
    let used = Held::create(&one).await?;
    let desktop = used.ready(&one).await?.desktop;
    let caller = used.call(&one).await?;
    let connected = |s: &mayfly_api::Session| s.phase == SessionPhase::Connected;
    used.until(&one, "the connection is seen", END, connected)
        .await?;
    let made = Held::create(&one).await?;
    until("Terraform runs", READY, async || {
        Ok((!applying(&labs[0])?.is_empty()).then_some(()))
    })
    .await?;

    for file in ["secret.key", "agents.pem"] {
        let copy = |from: &Path, to: &Path| std::fs::copy(from.join(file), to.join(file));
        copy(&labs[0].path("state"), &labs[1].path("state"))?;
    }
    let two = start(1).await?;
    let beside = used.get(&two).await?;
    ensure!(
        connected(&beside) && beside.desktop == desktop,
        "any answers: {beside:?}"
    );
    one.crash().await?;
    let begun = made.get(&two).await?.desktop.context("a desktop")?;
    made.until(&two, "it is made anew", TAKEN, |s| s.desktop != Some(begun))
        .await?;
    let session = made.ready(&two).await?;
    let stages: Vec<_> = session.stages.iter().map(|s| s.name).collect();
    assert_eq!(stages, StageName::CREATE);
    let still = used.get(&two).await?;
    ensure!(
        connected(&still) && still.desktop == desktop,
        "nobody was cut off: {still:?}"
    );
    // Its agent calls the other by now: that nobody is connected any more is seen.
    drop(caller);
    let ended = used.ended(&two).await?;
    assert_eq!(ended.end_reason, Some(EndReason::Idle), "{ended:?}");
    made.destroyed(&two).await?;

    // What lies in its own folder is removed by itself.
    one.start_again(&labs[0]).await?;
    let db = PostgresStore::open(database, ReplicaId("test".to_owned())).await?;
    until("nothing is left", END, async || {
        let machines = site.machines()?;
        let reserved = db.reserved().await?;
        let left = labs.iter().all(|lab| lab.nothing_is_left().is_ok());
        let folders = std::fs::read_dir(labs[0].path("state/terraform"))?.flatten();
        let desktops = folders.filter(|f| f.file_name().to_string_lossy().starts_with("desktop-"));
        let clean = machines.is_empty() && reserved.is_empty() && left && desktops.count() == 0;
        Ok(clean.then_some(()))
    })
    .await?;
    Ok(())
}
