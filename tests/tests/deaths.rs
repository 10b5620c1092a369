//! Killed before and after every call that leaves it and every commit, an orchestrator converges and leaves nothing.

use anyhow::{Result, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use mayfly_tests::deaths::{self, Visitor};
use mayfly_tests::lab::{Lab, Orchestrator, Provider, image_folder};

/// So many orchestrators at once: they mostly wait.
const AT_ONCE: usize = 4;

/// Of the points on real machines, in one run of the tests.
const SOME: usize = 6;

const QUICK: Provider = Provider::SimulatedWith(
    "create_ms = 100\nboot_ms = 100\nconfigure_ms = 100\ndestroy_ms = 100\nevidence_ms = 100",
);

#[tokio::test(flavor = "multi_thread")]
async fn at_every_point_on_pretended_machines() -> Result<()> {
    let lab = Lab::new("deaths")?;
    let mut orchestrator = Orchestrator::start(&lab, &QUICK, "").await?;
    let points = deaths::points(&lab, &mut orchestrator, Visitor::Caller).await?;
    for call in [
        "create",
        "bootstrap",
        "agent",
        "probe",
        "destroy",
        "commit receipt",
        "list",
    ] {
        for side in ["before", "after"] {
            let point = format!("{side} {call}#1");
            ensure!(points.contains(&point), "{point} is not in {points:?}");
        }
    }
    let deaths = stream::iter(points).map(async |point| {
        let lab = Lab::new("deaths simulated")?;
        let mut orchestrator = Orchestrator::start(&lab, &QUICK, "").await?;
        deaths::at(&lab, &mut orchestrator, Visitor::Caller, point).await
    });
    let deaths: Vec<_> = deaths.buffer_unordered(AT_ONCE).try_collect().await?;
    println!("{}", serde_json::to_string_pretty(&deaths)?);
    let died = deaths.iter().filter(|death| death.ms.is_some()).count();
    ensure!(died >= 40, "{died} deaths");
    Ok(())
}

#[tokio::test]
async fn at_some_points_on_the_micro_guest() -> Result<()> {
    let lab = Lab::new("deaths micro")?;
    let provider = Provider::Qemu(image_folder("MAYFLY_MICRO_GUEST")?);
    let mut orchestrator = Orchestrator::start(&lab, &provider, "").await?;
    let points = deaths::points(&lab, &mut orchestrator, Visitor::Caller).await?;
    for point in deaths::some(points, SOME) {
        let death = deaths::at(&lab, &mut orchestrator, Visitor::Caller, point).await?;
        println!("{}", serde_json::to_string(&death)?);
    }
    Ok(())
}
