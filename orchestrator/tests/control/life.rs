//! How sessions end: by rules, by faults, by cancel in each phase.

use crate::house::{House, PATIENCE, quick, until};
use mayfly_api::agent::ToAgent;
use mayfly_api::{
    CreateSession, EndReason, Heartbeat, Keep, ProblemCode, RdpClientState, SessionPhase, StageName,
};
use mayfly_orchestrator::config::Limits;
use mayfly_orchestrator::desktop::DesktopPhase;
use mayfly_orchestrator::provider::Provider;
use mayfly_orchestrator::provider::simulated::{Fault, SimulatedConfig};
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
        (Fault::BootHangs, StageName::Booting, ProblemCode::TimedOut),
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
        if fault == Fault::BootHangs {
            until("it boots", async || {
                let stages = house.get(&mine).await.stages;
                (stages.last().unwrap().name == StageName::Booting).then_some(())
            })
            .await;
            for _ in 0..60 {
                house
                    .client
                    .heartbeat(mine.id, &mine.secret, BEAT)
                    .await
                    .unwrap();
                house.clock.advance(Duration::from_secs(10));
            }
        }
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

#[tokio::test]
async fn what_cannot_be_made_now_is_refused_at_once() {
    let house = House::new().await;
    let request = CreateSession::default();
    let first = house.client.create(&request, "before").await.unwrap();
    house.machines.inject(Fault::Unavailable, None);
    let refused = house.client.create(&request, "after").await.unwrap_err();
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
