//! How sessions end: by rules, by faults, by cancel in each phase.

use crate::house::{House, Mine, PATIENCE, quick, until};
use mayfly_api::agent::ToAgent;
use mayfly_api::{
    CreateSession, DesktopName, EndReason, Heartbeat, Keep, ProblemCode, RdpClientState,
    SessionEvent, SessionPhase, Setback, StageName, StageProgress,
};
use mayfly_orchestrator::config::Limits;
use mayfly_orchestrator::desktop::{Desktop, DesktopPhase};
use mayfly_orchestrator::provider::simulated::{Fault, SimulatedConfig};
use mayfly_orchestrator::provider::{MachineState, Provider};
use std::time::Duration;
use tokio::io::AsyncWriteExt;

const BEAT: Heartbeat = Heartbeat {
    client: RdpClientState::Running,
};

#[tokio::test]
async fn a_desktop_ends_sixty_seconds_after_its_last_rdp_connection() {
    let house = House::new().await;
    let (mine, desktop) = house.ready().await;
    house.machines.set_connections(desktop, 1);
    house.reaches(&mine, SessionPhase::Connected).await;
    house.pass(500).await;
    assert_eq!(house.get(&mine).await.phase, SessionPhase::Connected);
    house.machines.set_connections(desktop, 0);
    house.reaches(&mine, SessionPhase::Disconnected).await;
    house.machines.set_connections(desktop, 2);
    house.reaches(&mine, SessionPhase::Connected).await;
    house.machines.set_connections(desktop, 0);
    house.reaches(&mine, SessionPhase::Disconnected).await;
    house.pass(50).await;
    assert_eq!(house.get(&mine).await.phase, SessionPhase::Disconnected);
    house.pass(10).await;
    let ended = house.reaches(&mine, SessionPhase::Ended).await;
    assert_eq!(ended.end_reason, Some(EndReason::Idle));
    house.nothing_is_left().await;
}

#[tokio::test]
async fn a_bare_connection_is_no_evidence_of_a_person() {
    let house = House::new().await;
    let (mine, _) = house.ready().await;
    let rdp = house.get(&mine).await.rdp.unwrap();
    let mut tcp = tokio::net::TcpStream::connect(rdp.address).await.unwrap();
    tcp.write_all(&[3, 0, 0, 19, 14, 0xe0, 0, 0, 0, 0, 0, 1, 0, 8, 0, 3, 0, 0, 0])
        .await
        .unwrap();
    // Its TLS handshake never comes.
    house.pass(10).await;
    assert_eq!(house.get(&mine).await.phase, SessionPhase::Ready);
}

#[tokio::test]
async fn a_keep_holds_a_disconnected_desktop() {
    let house = House::new().await;
    let (mine, desktop) = house.ready().await;
    house.machines.set_connections(desktop, 1);
    house.reaches(&mine, SessionPhase::Connected).await;
    house.machines.set_connections(desktop, 0);
    house.reaches(&mine, SessionPhase::Disconnected).await;
    let keep = Keep { seconds: 200 };
    house
        .client
        .keep(mine.id, &mine.secret, keep)
        .await
        .unwrap();
    house.pass(240).await;
    assert_eq!(house.get(&mine).await.phase, SessionPhase::Disconnected);
    house.pass(30).await;
    let ended = house.reaches(&mine, SessionPhase::Ended).await;
    assert_eq!(ended.end_reason, Some(EndReason::Idle));
}

#[tokio::test]
async fn a_launcher_that_vanishes_before_anybody_connected_abandons_its_session() {
    let house = House::new().await;
    let (mine, _) = house.ready().await;
    house.pass(60).await;
    house
        .client
        .heartbeat(mine.id, &mine.secret, BEAT)
        .await
        .unwrap();
    house.pass(80).await;
    assert_eq!(house.get(&mine).await.phase, SessionPhase::Ready);
    house.pass(20).await;
    let ended = house.reaches(&mine, SessionPhase::Ended).await;
    assert_eq!(ended.end_reason, Some(EndReason::Abandoned));
    house.nothing_is_left().await;
}

#[tokio::test]
async fn the_lifetime_ends_a_session_in_use_after_two_warnings() {
    let limits = Limits {
        lifetime_s: 400,
        ..Limits::default()
    };
    let house = House::with(limits, quick()).await;
    let (mine, desktop) = house.ready().await;
    house.machines.set_connections(desktop, 1);
    house.reaches(&mine, SessionPhase::Connected).await;
    house.pass(380).await;
    until("two warnings", async || {
        let warnings = house.machines.warnings(desktop);
        let all = matches!(
            warnings[..],
            [
                ToAgent::Warn {
                    ends_in_s: 200..=300
                },
                ToAgent::Warn { ends_in_s: 1..=60 },
            ]
        );
        all.then_some(())
    })
    .await;
    house.pass(20).await;
    let ended = house.reaches(&mine, SessionPhase::Ended).await;
    assert_eq!(ended.end_reason, Some(EndReason::Expired));
}

#[tokio::test]
async fn a_machine_that_stops_by_itself_ends_its_session() {
    let house = House::new().await;
    let (mine, desktop) = house.ready().await;
    house.machines.power_off(desktop);
    let ended = house.reaches(&mine, SessionPhase::Ended).await;
    assert_eq!(ended.end_reason, Some(EndReason::MachineLost));
    house.nothing_is_left().await;
}

#[tokio::test]
async fn a_silent_agent_throws_nobody_out() {
    let house = House::new().await;
    let (mine, desktop) = house.ready().await;
    house.machines.set_connections(desktop, 1);
    house.reaches(&mine, SessionPhase::Connected).await;
    house.machines.silence(desktop);
    house.machines.set_connections(desktop, 0);
    house.pass(300).await;
    assert_eq!(house.get(&mine).await.phase, SessionPhase::Connected);
    house.pass(400).await;
    let ended = house.reaches(&mine, SessionPhase::Ended).await;
    assert_eq!(ended.end_reason, Some(EndReason::MachineLost));
}

#[tokio::test]
async fn what_cannot_be_made_fails_with_its_stage_after_its_remains_are_gone() {
    for (fault, stage, code) in [
        (
            Fault::CreateFails,
            StageName::Creating,
            ProblemCode::CreateFailed,
        ),
        (
            Fault::BootDies,
            StageName::Booting,
            ProblemCode::CreateFailed,
        ),
        (
            Fault::AgentFails,
            StageName::Configuring,
            ProblemCode::CreateFailed,
        ),
        (
            Fault::WrongCertificate,
            StageName::Connecting,
            ProblemCode::CreateFailed,
        ),
    ] {
        let house = House::new().await;
        house.machines.inject(fault, None);
        let mine = house.create().await;
        let failed = house.reaches(&mine, SessionPhase::Failed).await;
        assert_eq!(house.machines.list().await.unwrap(), [], "{fault:?}");
        let failure = failed.failure.unwrap();
        assert_eq!(
            (failure.stage, failure.problem.code),
            (stage, code),
            "{fault:?}"
        );
        assert_eq!(failed.end_reason, Some(EndReason::Failed));
        let last = failed.stages.last().unwrap();
        assert_eq!(last.name, StageName::Destroying);
    }
}

/// Its desktop boots, another one than `before`.
async fn boots(house: &House, mine: &Mine, before: Option<DesktopName>) -> Option<DesktopName> {
    until("it boots", async || {
        let session = house.get(mine).await;
        assert!(!session.phase.is_final(), "{session:?}");
        let boots = session.stages.last().unwrap().name == StageName::Booting;
        (boots && session.desktop != before).then_some(session.desktop)
    })
    .await
}

#[tokio::test]
async fn a_desktop_that_hangs_is_replaced_by_another() {
    let house = House::new().await;
    house.machines.inject(Fault::BootHangs, None);
    let mine = house.create().await;
    let first = boots(&house, &mine, None).await;
    house.clock.advance(Duration::from_secs(80));
    let beat = house.client.heartbeat(mine.id, &mine.secret, BEAT).await;
    beat.unwrap();
    house.clock.advance(Duration::from_secs(80));
    assert_eq!(boots(&house, &mine, None).await, first);
    let beat = house.client.heartbeat(mine.id, &mine.secret, BEAT).await;
    beat.unwrap();
    house.clock.advance(Duration::from_secs(20));
    boots(&house, &mine, first).await;
    house.machines.inject(Fault::None, None);
    house.reaches(&mine, SessionPhase::Ready).await;
    assert_eq!(house.machines.list().await.unwrap().len(), 1);
}

#[tokio::test]
async fn what_is_in_the_way_for_a_moment_is_tried_again() {
    for (times, end) in [(2, SessionPhase::Ready), (3, SessionPhase::Failed)] {
        let house = House::new().await;
        house.machines.inject(Fault::CreateBusy, Some(times));
        let mine = house.create().await;
        let session = house.reaches(&mine, end).await;
        let told = session.failure.map(|f| f.problem.detail);
        assert_eq!(
            told.is_some_and(|told| told.contains("has the lock")),
            end == SessionPhase::Failed
        );
    }
}

/// What the session's events said of the stages, each word once.
async fn told(house: &House, mine: &Mine) -> Vec<(StageName, StageProgress)> {
    let events = house.control.shared.store.events_after(mine.id, 0).await;
    let mut told = Vec::new();
    for event in events.unwrap() {
        let stages = &event.session.stages;
        let (last, over) = stages.split_last().unwrap();
        assert!(over.iter().all(|s| s.progress.is_none()), "{stages:?}");
        told.extend(last.progress.clone().map(|p| (last.name, p)));
    }
    told.dedup();
    told
}

fn task(number: u32) -> StageProgress {
    let name = format!("Task {number}");
    StageProgress::Task { number, name }
}

#[tokio::test]
async fn what_making_a_desktop_is_at_is_told_at_most_once_a_second_and_the_last_of_it_always() {
    let config = SimulatedConfig {
        create_ms: 3_500,
        ..quick()
    };
    let house = House::with(Limits::default(), config).await;
    let mine = house.create().await;
    let desktop = until("it is created", async || {
        let record = house.control.shared.store.get(mine.id).await.unwrap()?;
        let creating = record.desktop_phase() == Some(DesktopPhase::Creating);
        record
            .live_desktop()
            .filter(|_| creating)
            .map(Desktop::name)
    })
    .await;
    let news = house.machines.news();
    let tell = |progress| news.tell(desktop, Some(progress));
    until("the first word is told", async || {
        tell(StageProgress::WaitingForStorage { place: 1 });
        (!told(&house, &mine).await.is_empty()).then_some(())
    })
    .await;
    let begin = std::time::Instant::now();
    let mut number = 0;
    // Faster than anybody reads, until the machine is made.
    while house.machines.state(desktop).await.unwrap() != MachineState::Running {
        number += 1;
        tell(task(number));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let seconds = usize::try_from(begin.elapsed().as_secs()).unwrap();
    house.reaches(&mine, SessionPhase::Ready).await;
    let told = told(&house, &mine).await;
    let creating = StageName::Creating;
    let first = StageProgress::WaitingForStorage { place: 1 };
    assert_eq!(told.first(), Some(&(creating, first)));
    assert_eq!(told.last(), Some(&(creating, task(number))));
    assert!((2..=seconds + 3).contains(&told.len()), "{told:?}");
    let numbers: Vec<_> = told.iter().map(|(_, p)| p.clone()).skip(1).collect();
    let in_order = |p: &[StageProgress]| match p {
        [
            StageProgress::Task { number: a, .. },
            StageProgress::Task { number: b, .. },
        ] => a < b,
        _ => false,
    };
    assert!(numbers.windows(2).all(in_order), "{told:?}");
}

#[tokio::test]
async fn why_a_desktop_is_made_anew_is_told_until_there_is_more_to_tell() {
    let house = House::with(Limits::default(), slow(DesktopPhase::Creating)).await;
    house.machines.inject(Fault::CreateBusy, Some(1));
    let mine = house.create().await;
    let news = house.machines.news();
    until("the second one is cloned", async || {
        let record = house.control.shared.store.get(mine.id).await.unwrap()?;
        let second = record.live_desktop()?.name();
        if second.number() == 2 {
            news.tell(second, Some(StageProgress::Cloning));
        }
        let at = record.stages.last()?.progress.clone();
        (at == Some(StageProgress::Cloning)).then_some(())
    })
    .await;
    house.reaches(&mine, SessionPhase::Ready).await;
    let because = Setback::InTheWay;
    assert_eq!(
        told(&house, &mine).await,
        [
            (StageName::Queued, StageProgress::MadeAnew { because }),
            (StageName::Creating, StageProgress::MadeAnew { because }),
            (StageName::Creating, StageProgress::Cloning),
        ]
    );
}

#[tokio::test]
async fn without_room_a_session_waits_until_another_s_desktop_is_gone() {
    let house = House::new().await;
    let (first, _) = house.ready().await;
    house.machines.inject(Fault::NoRoom, None);
    let second = house.create().await;
    until(
        "it was tried, and waits again at the first place",
        async || {
            let events = house.control.shared.store.events_after(second.id, 0);
            let events = events.await.unwrap();
            let tried = |e: &SessionEvent| e.session.phase == SessionPhase::Preparing;
            let last = &events.last()?.session;
            let waits = (last.phase, last.queue_position) == (SessionPhase::Queued, Some(1))
                && last.stages[0].progress == Some(StageProgress::NoRoom);
            (waits && events.iter().any(tried)).then_some(())
        },
    )
    .await;
    until("what there was of its desktop is gone", async || {
        (house.machines.list().await.unwrap().len() == 1).then_some(())
    })
    .await;
    house.machines.inject(Fault::None, None);
    house.client.destroy(first.id, &first.secret).await.unwrap();
    house.reaches(&second, SessionPhase::Ready).await;
}

#[tokio::test]
async fn what_could_not_be_made_can_be_looked_at() {
    let limits = Limits {
        keep_failed_s: 3_600,
        ..Limits::default()
    };
    let house = House::with(limits, quick()).await;
    house.machines.inject(Fault::CreateFails, None);
    let mine = house.create().await;
    let ending = house.reaches(&mine, SessionPhase::Ending).await;
    assert!(ending.failure.is_some());
    house.clock.advance(Duration::from_secs(3_500));
    assert_eq!(house.machines.list().await.unwrap().len(), 1);
    house.clock.advance(Duration::from_secs(100));
    house.reaches(&mine, SessionPhase::Failed).await;
    house.nothing_is_left().await;
}

#[tokio::test]
async fn what_cannot_be_made_now_is_refused_at_once() {
    let house = House::new().await;
    let request = CreateSession::default();
    let first = house.client.create(&request, "before").await.unwrap();
    house.machines.inject(Fault::Unavailable, None);
    // What was found a moment ago counts for a moment.
    let refused = until("refused", async || {
        let key = mayfly_api::SessionId::new().to_string();
        house.client.create(&request, &key).await.err()
    });
    let refused = refused.await;
    assert_eq!(refused.code(), Some(ProblemCode::ProviderUnavailable));
    assert!(
        refused.to_string().contains("provider.simulated.fault"),
        "{refused}"
    );
    let again = house.client.create(&request, "before").await.unwrap();
    assert_eq!(again.session.id, first.session.id);
}

#[tokio::test]
async fn a_removal_that_fails_is_tried_again() {
    let house = House::new().await;
    let (mine, _) = house.ready().await;
    house.machines.inject(Fault::DestroyFails, Some(2));
    house.client.destroy(mine.id, &mine.secret).await.unwrap();
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        house.clock.advance(Duration::from_secs(30));
    }
    house.reaches(&mine, SessionPhase::Ended).await;
    house.nothing_is_left().await;
}

/// Slow enough that each phase can be caught.
pub(crate) fn slow(phase: DesktopPhase) -> SimulatedConfig {
    let mut config = quick();
    let long = 700;
    match phase {
        DesktopPhase::Creating => config.create_ms = long,
        DesktopPhase::Booting => config.boot_ms = long,
        DesktopPhase::Configuring => config.configure_ms = long,
        DesktopPhase::Destroying => config.destroy_ms = long,
        _ => {}
    }
    config
}

#[tokio::test]
async fn cancel_in_any_phase_is_acknowledged_at_once_and_leaves_nothing() {
    for phase in [
        DesktopPhase::Creating,
        DesktopPhase::Booting,
        DesktopPhase::Configuring,
        DesktopPhase::Claimed,
        DesktopPhase::Destroying,
    ] {
        let house = House::with(Limits::default(), slow(phase)).await;
        let mine = house.create().await;
        if phase == DesktopPhase::Destroying {
            house.reaches(&mine, SessionPhase::Ready).await;
            house.client.destroy(mine.id, &mine.secret).await.unwrap();
        }
        until(&format!("{phase:?}"), async || {
            let record = house.control.shared.store.get(mine.id).await.unwrap()?;
            (record.desktop_phase() == Some(phase)).then_some(())
        })
        .await;
        let asked = std::time::Instant::now();
        let ending = house.client.destroy(mine.id, &mine.secret).await.unwrap();
        assert_eq!(ending.phase, SessionPhase::Ending, "{phase:?}");
        assert!(asked.elapsed() < PATIENCE / 2);
        let ended = house.reaches(&mine, SessionPhase::Ended).await;
        assert_eq!(ended.end_reason, Some(EndReason::Requested));
        assert_eq!(ended.failure, None);
        assert_eq!(house.machines.list().await.unwrap(), [], "{phase:?}");
    }
}

#[tokio::test]
async fn many_sessions_at_once_do_not_hold_each_other_up() {
    let limits = Limits {
        concurrent_creates: 20,
        max_desktops: 20,
        ..Limits::default()
    };
    let house = House::with(limits, quick()).await;
    let stuck = house.create().await;
    house.machines.inject(Fault::DestroyFails, Some(1_000));
    house.reaches(&stuck, SessionPhase::Ready).await;
    house.client.destroy(stuck.id, &stuck.secret).await.unwrap();
    let all = futures_util::future::join_all((0..19).map(|_| house.ready())).await;
    assert_eq!(house.get(&stuck).await.phase, SessionPhase::Ending);
    house.machines.inject(Fault::None, None);
    for (mine, _) in all {
        house.client.destroy(mine.id, &mine.secret).await.unwrap();
    }
    house.clock.advance(Duration::from_secs(120));
    house.nothing_is_left().await;
}
