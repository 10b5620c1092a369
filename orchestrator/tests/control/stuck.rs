//! A desktop that cannot be removed is told to an administrator, who has it tried again or says that it is gone.

use crate::house::{House, Mine, until};
use mayfly_api::{DesktopName, SessionPhase};
use mayfly_orchestrator::admin::{self, Resolution};
use mayfly_orchestrator::desktop::DesktopPhase;
use mayfly_orchestrator::list::{self, Which};
use mayfly_orchestrator::provider::Provider;
use mayfly_orchestrator::provider::simulated::Fault;
use std::time::Duration;

/// A house that listens to its administrator, with a desktop that is stuck there.
async fn stuck() -> (House, Mine, DesktopName) {
    let house = House::new().await;
    let listener = admin::listen(house.dir.path()).unwrap();
    tokio::spawn(admin::serve(house.control.clone(), listener));
    let (mine, desktop) = house.ready().await;
    house.machines.inject(Fault::DestroyFails, None);
    house.client.destroy(mine.id, &mine.secret).await.unwrap();
    until("it is stuck", async || {
        house.clock.advance(Duration::from_secs(16));
        let record = house.control.shared.store.get(mine.id).await.unwrap()?;
        (record.desktop_phase() == Some(DesktopPhase::Stuck)).then_some(())
    })
    .await;
    (house, mine, desktop)
}

async fn resolve(house: &House, desktop: DesktopName, how: Resolution) -> Result<String, String> {
    let config = &house.control.shared.config;
    let said = admin::resolve_from_here(config, desktop, how).await;
    said.map_err(|error| format!("{error:#}"))
}

#[tokio::test]
async fn it_is_listed_with_its_reason_and_tried_again_when_that_is_asked_for() {
    let (house, mine, desktop) = stuck().await;
    let config = &house.control.shared.config;
    let lines = list::lines(config, Which::Stuck).await.unwrap();
    assert_eq!(lines.len(), 1, "{lines:?}");
    let why = format!("{desktop} stuck: {desktop}: the simulated disk is busy");
    assert!(lines[0].ends_with(&why), "{lines:?}");
    let metrics = reqwest::get(format!("{}/metrics", house.url))
        .await
        .unwrap();
    let metrics = metrics.text().await.unwrap();
    assert!(metrics.contains("\nmayfly_desktops_stuck 1\n"), "{metrics}");

    house.machines.inject(Fault::None, None);
    let before = house.control.shared.store.get(mine.id).await;
    let before = before.unwrap().unwrap().seq;
    resolve(&house, desktop, Resolution::Retry).await.unwrap();
    let ended = house.reaches(&mine, SessionPhase::Ended).await;
    assert_eq!(ended.failure, None);
    let events = house.control.shared.store.events_after(mine.id, before);
    let told = events.await.unwrap();
    assert_eq!(told.len(), 2, "the retry and the end: {told:?}");
    house.nothing_is_left().await;
    let again = resolve(&house, desktop, Resolution::Retry).await;
    assert!(again.unwrap_err().contains("is gone"));
}

#[tokio::test]
async fn it_is_believed_gone_when_its_provider_says_so_or_an_administrator_does() {
    let (house, mine, desktop) = stuck().await;
    let listed = resolve(&house, desktop, Resolution::Gone).await;
    let why = listed.unwrap_err();
    assert!(why.contains("its provider lists it"), "{why}");

    resolve(&house, desktop, Resolution::GoneAsChecked)
        .await
        .unwrap();
    house.reaches(&mine, SessionPhase::Ended).await;
    let receipt = house.client.receipt(mine.id, &mine.secret).await.unwrap();
    let checked = &receipt.removals[0].checked[0];
    assert_eq!(checked.by, "an administrator's word");
    // They were wrong: what is there all the same has no owner, and is removed.
    house.machines.inject(Fault::None, None);
    assert!(house.machines.list().await.unwrap().contains(&desktop));

    let (house, mine, desktop) = stuck().await;
    let file = house.dir.path().join(format!("machines/{desktop}.json"));
    std::fs::remove_file(file).unwrap();
    resolve(&house, desktop, Resolution::Gone).await.unwrap();
    house.reaches(&mine, SessionPhase::Ended).await;
}

#[tokio::test]
async fn a_desktop_that_is_not_stuck_is_not_resolved() {
    let house = House::new().await;
    let listener = admin::listen(house.dir.path()).unwrap();
    tokio::spawn(admin::serve(house.control.clone(), listener));
    let (_, desktop) = house.ready().await;
    for how in [Resolution::Retry, Resolution::GoneAsChecked] {
        let refused = resolve(&house, desktop, how).await.unwrap_err();
        assert!(refused.contains("not stuck"), "{refused}");
    }
}
