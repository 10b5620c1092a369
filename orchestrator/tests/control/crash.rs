//! The orchestrator dies in each phase; the next one goes on, and nothing is left over.

use crate::house::{House, Mine, until};
use crate::life::slow;
use mayfly_api::{DesktopName, SessionEvent, SessionPhase, Setback, StageProgress};
use mayfly_orchestrator::config::Limits;
use mayfly_orchestrator::desktop::DesktopPhase;
use mayfly_orchestrator::provider::{DesktopSpec, Provider};
use std::time::Duration;

pub(crate) async fn in_phase(house: &House, mine: &Mine, phase: DesktopPhase) -> DesktopName {
    until(&format!("{phase:?}"), async || {
        let record = house.control.shared.store.get(mine.id).await.unwrap()?;
        let desktop = record.live_desktop()?;
        (desktop.phase() == phase).then_some(desktop.name())
    })
    .await
}

#[tokio::test]
async fn a_create_that_was_interrupted_is_made_anew_within_the_same_session() {
    for phase in [
        DesktopPhase::Creating,
        DesktopPhase::Booting,
        DesktopPhase::Configuring,
    ] {
        let mut house = House::with(Limits::default(), slow(phase)).await;
        let mine = house.create().await;
        let first = in_phase(&house, &mine, phase).await;
        house.crash().await;
        let session = house.reaches(&mine, SessionPhase::Ready).await;
        let second = session.desktop.unwrap();
        assert!(
            second.number() > first.number(),
            "{phase:?}: numbers are never used twice"
        );
        assert_eq!(house.machines.list().await.unwrap(), [second], "{phase:?}");
        assert_eq!(session.stages.len(), 5, "{session:?}");
        let events = house.control.shared.store.events_after(mine.id, 0).await;
        let because = Setback::Interrupted;
        let anew = Some(StageProgress::MadeAnew { because });
        let told = |e: &SessionEvent| e.session.stages.iter().any(|s| s.progress == anew);
        assert!(events.unwrap().iter().any(told), "{phase:?}");
        house.client.destroy(mine.id, &mine.secret).await.unwrap();
        house.reaches(&mine, SessionPhase::Ended).await;
        house.nothing_is_left().await;
    }
}

#[tokio::test]
async fn a_desktop_in_use_is_adopted_and_the_person_notices_nothing() {
    let mut house = House::new().await;
    let (mine, desktop) = house.ready().await;
    house.machines.set_connections(desktop, 1);
    let before = house.reaches(&mine, SessionPhase::Connected).await;
    house.crash().await;
    // Long away: nobody is blamed for it.
    house.clock.advance(Duration::from_secs(1_000));
    house.crash().await;
    house.pass(100).await;
    let after = house.get(&mine).await;
    assert_eq!(
        (after.phase, &after.rdp),
        (SessionPhase::Connected, &before.rdp)
    );
    house.machines.set_connections(desktop, 0);
    house.reaches(&mine, SessionPhase::Disconnected).await;
    let password = house.client.credentials(mine.id, &mine.secret).await;
    assert!(password.is_ok(), "the launcher can ask again after a crash");
}

#[tokio::test]
async fn a_removal_that_was_interrupted_goes_on() {
    let mut house = House::with(Limits::default(), slow(DesktopPhase::Destroying)).await;
    let (mine, _) = house.ready().await;
    house.client.destroy(mine.id, &mine.secret).await.unwrap();
    in_phase(&house, &mine, DesktopPhase::Destroying).await;
    house.crash().await;
    house.reaches(&mine, SessionPhase::Ended).await;
    house.nothing_is_left().await;
}

#[tokio::test]
async fn a_machine_that_nobody_owns_is_removed() {
    let mut house = House::new().await;
    house.used(1).await;
    let (mine, desktop) = house.ready().await;
    house.machines.create(&orphan(1)).await.unwrap();
    // A new process looks twice within seconds; a running one every half minute.
    house.crash().await;
    until("only the owned one is left", async || {
        (house.machines.list().await.unwrap() == [desktop]).then_some(())
    })
    .await;
    assert_eq!(house.get(&mine).await.phase, SessionPhase::Ready);
}

#[tokio::test]
async fn not_everything_that_nobody_seems_to_own_is_removed_at_once() {
    let mut house = House::new().await;
    house.used(8).await;
    let (_, desktop) = house.ready().await;
    for number in 1..=8 {
        house.machines.create(&orphan(number)).await.unwrap();
    }
    house.crash().await;
    // In the second pass of the new process; the third is half a minute away.
    until("some are removed", async || {
        (house.machines.list().await.unwrap().len() <= 6).then_some(())
    })
    .await;
    let left = house.machines.list().await.unwrap();
    assert_eq!(left.len(), 6, "three of eight, and not the owned one");
    assert!(left.contains(&desktop));
}

/// A machine that no session has.
pub(crate) fn orphan(number: u32) -> DesktopSpec {
    DesktopSpec {
        name: DesktopName::from_number(number).unwrap(),
        session: mayfly_api::SessionId::new(),
        in_domain: false,
        playbook: None,
        cpus: 1,
        memory_mib: 128,
        lifetime: Duration::from_secs(600),
    }
}
