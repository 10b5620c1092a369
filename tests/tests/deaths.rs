//! Killed before and after every call that leaves it and every commit, an orchestrator converges and leaves nothing.

use anyhow::{Result, ensure};
use mayfly_postgres::Cluster;
use mayfly_tests::deaths::{self, Life, Place};
use mayfly_tests::lab::{Provider, image_folder};
use std::collections::BTreeSet;

/// So many orchestrators at once: they mostly wait.
const AT_ONCE: usize = 6;

/// Of the points on real machines, in one run of the tests.
const SOME: usize = 3;

async fn micro_guest() -> Result<Place> {
    let provider = Provider::Qemu(image_folder("MAYFLY_MICRO_GUEST")?);
    Place::here("deaths micro", &provider, "", None).await
}

/// All of them in that life, on pretended machines; where it died.
async fn deaths_in(
    life: Life,
    at_once: usize,
    server: Option<&Cluster>,
) -> Result<BTreeSet<String>> {
    let place = async || life.pretended(server).await;
    let points = deaths::points(&mut place().await?, life).await?;
    let deaths = deaths::all(place, life, points, at_once).await?;
    deaths::nothing_was_left(&deaths)?;
    let there = deaths.into_iter().filter(|death| death.ms.is_some());
    Ok(there.map(|death| death.point).collect())
}

/// At every point of every life but one that takes its time.
async fn deaths(server: Option<&Cluster>, calls: &[&str]) -> Result<()> {
    let mut died = BTreeSet::new();
    for life in Life::PRETENDED.into_iter().filter(|l| *l != Life::Stuck) {
        died.extend(deaths_in(life, AT_ONCE, server).await?);
    }
    for call in calls {
        for side in ["before", "after"] {
            let point = format!("{side} {call}#1");
            ensure!(died.contains(&point), "{point} is not in {died:?}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn at_every_point_on_pretended_machines() -> Result<()> {
    let calls = [
        "commit accept",
        "commit preparing, planned",
        "commit renumber",
        "create",
        "bootstrap",
        "agent",
        "probe",
        "commit connected, claimed",
        "commit disconnected, claimed",
        "destroy",
        "commit receipt",
        "list",
        "commit resume",
        "commit forget",
        "commit ended, no desktop",
        "drain",
        "commit words",
        "reap",
    ];
    deaths(None, &calls).await
}

#[tokio::test(flavor = "multi_thread")]
async fn at_every_point_on_a_database_that_is_shared() -> Result<()> {
    let server = tokio::task::spawn_blocking(|| Cluster::start(None)).await?;
    let calls = [
        "commit renew",
        "commit take over",
        "commit accept",
        "commit preparing, planned",
        "commit connected, claimed",
        "commit receipt",
    ];
    deaths(Some(&server), &calls).await
}

#[tokio::test]
async fn at_every_point_of_a_desktop_that_is_stuck() -> Result<()> {
    // It takes its time to be that, in which nothing is done.
    let died = deaths_in(Life::Stuck, 20, None).await?;
    for point in ["before commit ending, destroying#1", "after destroy#1"] {
        ensure!(died.contains(point), "{point} is not in {died:?}");
    }
    Ok(())
}

#[tokio::test]
async fn at_some_points_on_the_micro_guest() -> Result<()> {
    let mut place = micro_guest().await?;
    for life in [Life::Used, Life::Working] {
        let points = deaths::points(&mut place, life).await?;
        for point in deaths::some(points, SOME) {
            let death = deaths::at(&mut place, life, point).await;
            deaths::nothing_was_left(&[death])?;
        }
    }
    Ok(())
}
