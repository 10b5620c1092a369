//! What a desktop that failed leaves to read is kept before it is removed, and keeps nothing from being removed.

use crate::house::{House, Mine, quick, until};
use mayfly_api::{EndReason, SessionPhase};
use mayfly_orchestrator::config::Limits;
use mayfly_orchestrator::last_words::COLLECT;
use mayfly_orchestrator::provider::simulated::Fault;
use mayfly_orchestrator::store::words::{Kept, Whose};
use secrecy::ExposeSecret;
use std::time::Duration;

async fn kept(house: &House, mine: &Mine) -> Vec<Kept> {
    let whose = Whose::Session(mine.id);
    house.control.shared.store.kept(whose).await.unwrap()
}

#[tokio::test]
async fn a_desktop_that_could_not_be_made_leaves_its_words() {
    for fault in [
        Fault::CreateFails,
        Fault::BootDies,
        Fault::AgentFails,
        Fault::WrongCertificate,
    ] {
        let house = House::new().await;
        house.machines.inject(fault, None);
        let mine = house.create().await;
        let failed = house.reaches(&mine, SessionPhase::Failed).await;
        let kept = kept(&house, &mine).await;
        assert_eq!(kept.len(), 1, "{fault:?}");
        assert_eq!(Some(kept[0].desktop), failed.desktop);
        let console = format!("==== console ====\n{} is only", kept[0].desktop);
        assert!(kept[0].text.starts_with(&console), "{}", kept[0].text);
        house.nothing_is_left().await;
    }
}

#[tokio::test]
async fn a_machine_that_is_lost_in_use_leaves_its_words_without_its_password() {
    let house = House::new().await;
    let (mine, desktop) = house.ready().await;
    let credentials = house.client.credentials(mine.id, &mine.secret);
    let password = credentials.await.unwrap().password;
    house.machines.power_off(desktop);
    let ended = house.reaches(&mine, SessionPhase::Ended).await;
    assert_eq!(ended.end_reason, Some(EndReason::MachineLost));
    let kept = kept(&house, &mine).await;
    let text = &kept[0].text;
    assert!(text.contains("root may come in with …"), "{text}");
    assert!(!text.contains(password.expose_secret()), "{text}");
    house.nothing_is_left().await;
}

#[tokio::test]
async fn a_desktop_that_ends_in_order_leaves_none() {
    let house = House::with(
        Limits {
            idle_s: 20,
            ..Limits::default()
        },
        quick(),
    )
    .await;
    let (asked, _) = house.ready().await;
    house.client.destroy(asked.id, &asked.secret).await.unwrap();
    house.reaches(&asked, SessionPhase::Ended).await;
    let (left, desktop) = house.ready().await;
    house.machines.set_connections(desktop, 1);
    house.reaches(&left, SessionPhase::Connected).await;
    house.machines.set_connections(desktop, 0);
    house.reaches(&left, SessionPhase::Disconnected).await;
    house.pass(30).await;
    house.reaches(&left, SessionPhase::Ended).await;
    let cancelled = house.create().await;
    house
        .client
        .destroy(cancelled.id, &cancelled.secret)
        .await
        .unwrap();
    house.reaches(&cancelled, SessionPhase::Ended).await;
    for mine in [&asked, &left, &cancelled] {
        assert_eq!(kept(&house, mine).await, []);
    }
}

#[tokio::test]
async fn words_that_never_come_delay_a_removal_and_do_not_prevent_it() {
    let house = House::new().await;
    let (mine, desktop) = house.ready().await;
    house.machines.inject(Fault::WordsHang, None);
    house.machines.power_off(desktop);
    house.reaches(&mine, SessionPhase::Ending).await;
    until("it is removed all the same", async || {
        house.clock.advance(COLLECT / 5);
        tokio::time::sleep(Duration::from_millis(50)).await;
        let session = house.get(&mine).await;
        session.phase.is_final().then_some(())
    })
    .await;
    assert_eq!(kept(&house, &mine).await, []);
    house.nothing_is_left().await;
}
