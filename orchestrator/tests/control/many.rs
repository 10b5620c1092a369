//! Many who ask, wait and leave at once.

use crate::house::{House, quick, until};
use futures_util::future::join_all;
use mayfly_api::{CreateSession, EndReason, SessionPhase};
use mayfly_orchestrator::config::Limits;
use mayfly_orchestrator::provider::simulated::SimulatedConfig;
use mayfly_orchestrator::session::Origin;
use mayfly_orchestrator::store::Change;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn everybody_who_waits_is_told_their_place_however_many_leave() {
    let limits = Limits {
        concurrent_creates: 1,
        max_queued: 1_000,
        ..Limits::default()
    };
    let machines = SimulatedConfig {
        create_ms: 3_600_000,
        ..quick()
    };
    let house = House::with(limits, machines).await;
    let (control, request) = (&house.control, CreateSession::default());
    let asked = (0..520).map(|_| control.create(Origin::V1, &request, None));
    for created in join_all(asked).await {
        created.unwrap();
    }
    let live = async || control.shared.store.live().await.unwrap();
    until("one has a desktop", async || {
        let all = live().await;
        let making = all.iter().any(|r| r.phase == SessionPhase::Preparing);
        making.then_some(())
    })
    .await;
    let mut waiting = live().await;
    waiting.retain(|r| r.phase == SessionPhase::Queued);
    // Half of them at once, and then one from the front, behind whom everybody moves up.
    for leaving in [260, 1] {
        let left = waiting.drain(..leaving).map(|record| {
            let now = control.shared.clock.now();
            control.shared.update(record.id, move |record| {
                record.end(EndReason::Requested, now).unwrap();
                Change::Told
            })
        });
        for left in join_all(left).await {
            left.unwrap();
        }
        control.shared.dispatch.notify_one();
        let places: Vec<_> = (1..).map(Some).take(waiting.len()).collect();
        until("the others are told their places", async || {
            let all = live().await;
            let waiting = all.iter().filter(|r| r.phase == SessionPhase::Queued);
            let told: Vec<_> = waiting.map(|r| r.queue_position).collect();
            (told == places).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_worked_for_even_if_whoever_asked_for_it_went_away() {
    let limits = Limits {
        concurrent_creates: 100,
        max_desktops: 100,
        ..Limits::default()
    };
    let house = House::with(limits, quick()).await;
    let (control, request) = (&house.control, CreateSession::default());
    // Some go before anything of theirs was written, some when it was and they were not told yet.
    let mut told = 0;
    for patience in (0..60).map(|n| Duration::from_micros(200 * n)) {
        let asked = control.create(Origin::V1, &request, None);
        told += usize::from(tokio::time::timeout(patience, asked).await.is_ok());
    }
    let there = until("everybody has a desktop", async || {
        let all = control.shared.store.live().await.unwrap();
        let ready = all.iter().all(|r| r.phase == SessionPhase::Ready);
        (ready && !all.is_empty()).then_some(all.len())
    })
    .await;
    assert!(there >= told, "{there} of {told}");
}
