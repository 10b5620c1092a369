//! Killed before and after every call that leaves it and every commit, an orchestrator converges and leaves nothing.

use anyhow::{Result, ensure};
use mayfly_postgres::Cluster;
use mayfly_tests::deaths::{self, Life, Place};
use mayfly_tests::lab::{Provider, image_folder};
use std::collections::BTreeSet;
use std::convert::identity;

/// So many orchestrators at once: they mostly wait.
const AT_ONCE: usize = 6;

/// Of the points on real machines, in one run of the tests.
const SOME: usize = 3;

async fn micro_guest() -> Result<Place> {
    let provider = Provider::Qemu(image_folder("MAYFLY_MICRO_GUEST")?);
    Place::here("deaths micro", &provider, "", None).await
}

/// Those points of that life, of all that it passes, on pretended machines; where it died.
async fn deaths_in(
    life: Life,
    server: Option<&Cluster>,
    at_once: usize,
    which: impl FnOnce(Vec<String>) -> Vec<String>,
) -> Result<BTreeSet<String>> {
    let place = async || life.pretended(server).await;
    let points = deaths::points(&mut place().await?, life).await?;
    let deaths = deaths::all(place, life, which(points), at_once).await?;
    deaths::nothing_was_left(&deaths)?;
    let there = deaths.into_iter().filter(|death| death.ms.is_some());
    Ok(there.map(|death| death.point).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn at_every_point_on_pretended_machines() -> Result<()> {
    let mut died = BTreeSet::new();
    for life in Life::PRETENDED.into_iter().filter(|l| *l != Life::Stuck) {
        died.extend(deaths_in(life, None, AT_ONCE, identity).await?);
    }
    for call in [
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
    ] {
        for side in ["before", "after"] {
            let point = format!("{side} {call}#1");
            ensure!(died.contains(&point), "{point} is not in {died:?}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn at_every_point_of_a_lease_and_some_others_on_postgresql() -> Result<()> {
    let server = tokio::task::spawn_blocking(|| Cluster::start(None)).await?;
    let server = Some(&server);
    let died = deaths_in(Life::Used, server, AT_ONCE, |points| {
        let lease = |point: &String| ["renew", "take over"].iter().any(|of| point.contains(of));
        let (mut lease, others): (Vec<_>, Vec<_>) = points.into_iter().partition(lease);
        lease.extend(deaths::some(others, 2 * AT_ONCE));
        lease
    });
    let died = died.await?;
    for point in ["after commit renew#1", "before commit take over#1"] {
        ensure!(died.contains(point), "{point} is not in {died:?}");
    }
    deaths_in(Life::Drained, server, AT_ONCE, identity).await?;
    let died = deaths_in(Life::Stopped, server, AT_ONCE, identity).await?;
    ensure!(died.len() == 2, "it gives back its lease once: {died:?}");
    Ok(())
}

#[tokio::test]
async fn at_every_point_of_a_desktop_that_is_stuck() -> Result<()> {
    // It takes its time to be that, in which nothing is done.
    let died = deaths_in(Life::Stuck, None, 20, identity).await?;
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
