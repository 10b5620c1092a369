//! `/api/v1` as a launcher uses it.

use crate::house::{House, Mine, PATIENCE, until};
use futures_util::StreamExt;
use mayfly_api::{
    CreateSession, EndReason, Heartbeat, Keep, ProblemCode, RdpClientState, SessionId,
    SessionPhase, StageName,
};
use mayfly_orchestrator::config::Limits;
use mayfly_orchestrator::rdp_probe::probe;
use mayfly_orchestrator::secret;
use secrecy::{ExposeSecret, SecretString};
use std::time::Duration;

#[tokio::test]
async fn a_desktop_is_made_answers_over_rdp_and_is_destroyed() {
    let house = House::new().await;
    let mine = house.create().await;
    let early = house.client.credentials(mine.id, &mine.secret).await;
    assert_eq!(early.unwrap_err().code(), Some(ProblemCode::Conflict));

    let session = house.reaches(&mine, SessionPhase::Ready).await;
    let rdp = session.rdp.clone().unwrap();
    probe(rdp.address, &rdp.certificate_sha256, PATIENCE)
        .await
        .unwrap();
    let names: Vec<_> = session.stages.iter().map(|s| s.name).collect();
    assert_eq!(names, StageName::CREATE);
    assert!(session.stages.iter().all(|s| s.duration_ms.is_some()));
    assert!(session.ends_at.is_some());
    let credentials = house
        .client
        .credentials(mine.id, &mine.secret)
        .await
        .unwrap();
    assert_eq!(credentials.user, "user");
    assert!(credentials.password.expose_secret().len() >= 20);

    let ending = house.client.destroy(mine.id, &mine.secret).await.unwrap();
    assert_eq!(ending.phase, SessionPhase::Ending);
    assert_eq!(ending.rdp, None);
    let ended = house.reaches(&mine, SessionPhase::Ended).await;
    assert_eq!(ended.end_reason, Some(EndReason::Requested));
    assert_eq!(ended.desktop, session.desktop);
    house.nothing_is_left().await;
    let again = house.client.destroy(mine.id, &mine.secret).await.unwrap();
    assert_eq!(again, ended);
    let late = house.client.credentials(mine.id, &mine.secret).await;
    assert_eq!(late.unwrap_err().code(), Some(ProblemCode::Conflict));
    assert!(
        probe(rdp.address, &rdp.certificate_sha256, PATIENCE)
            .await
            .is_err()
    );

    let second = house.create().await;
    let second = house.get(&second).await;
    assert!(second.expected_ready_ms.is_some_and(|ms| ms >= 60));
    assert!(second.stages[0].expected_ms.is_some());
}

#[tokio::test]
async fn every_change_is_an_event_and_a_stream_can_be_resumed_anywhere() {
    let house = House::new().await;
    let (mine, _) = house.ready().await;
    house.client.destroy(mine.id, &mine.secret).await.unwrap();
    house.reaches(&mine, SessionPhase::Ended).await;

    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let read = async |last: Option<&str>| {
        let url = format!("{}/api/v1/sessions/{}/events", house.url, mine.id);
        let mut call = http.get(url).bearer_auth(mine.secret.expose_secret());
        if let Some(last) = last {
            call = call.header("Last-Event-ID", last);
        }
        let answer = call.send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    let ids = |text: &str| -> Vec<u64> {
        let ids = text.lines().filter_map(|l| l.strip_prefix("id: "));
        ids.map(|id| id.parse().unwrap()).collect()
    };
    let (status, all) = read(Some("0")).await;
    assert_eq!(status, 200);
    let last = *ids(&all).last().unwrap();
    assert_eq!(ids(&all), (1..=last).collect::<Vec<_>>());
    for seen in 1..last {
        let (_, rest) = read(Some(&seen.to_string())).await;
        assert_eq!(ids(&rest), (seen + 1..=last).collect::<Vec<_>>());
    }
    // Without an id, or with one that was the last: a snapshot, and the end.
    assert_eq!(ids(&read(None).await.1), [last]);
    assert_eq!(ids(&read(Some(&last.to_string())).await.1), [last]);
    assert_eq!(ids(&read(Some("999999")).await.1), [last]);
    for malformed in ["", "x", "-1", "1.5", "+1", "99999999999999999999999"] {
        assert_eq!(read(Some(malformed)).await.0, 400, "{malformed:?}");
    }
}

#[tokio::test]
async fn whoever_follows_sees_the_phases_in_order() {
    let house = House::new().await;
    let mine = house.create().await;
    let following = async {
        let mut phases = Vec::new();
        for event in house.all_events(&mine).await {
            if phases.last() != Some(&event.session.phase) {
                phases.push(event.session.phase);
            }
        }
        phases
    };
    let using = async {
        house.reaches(&mine, SessionPhase::Ready).await;
        house.client.destroy(mine.id, &mine.secret).await.unwrap();
    };
    let (phases, ()) = tokio::join!(following, using);
    let end = [
        SessionPhase::Preparing,
        SessionPhase::Ready,
        SessionPhase::Ending,
        SessionPhase::Ended,
    ];
    assert!(phases.ends_with(&end), "{phases:?}");
}

#[tokio::test]
async fn the_same_key_gives_the_same_answer_and_another_request_does_not() {
    let mut house = House::new().await;
    let request = CreateSession::default();
    let first = house.client.create(&request, "one-key").await.unwrap();
    let mine = Mine {
        id: first.session.id,
        secret: first.secret.clone(),
    };
    house.reaches(&mine, SessionPhase::Ready).await;
    house.crash().await;
    let again = house.client.create(&request, "one-key").await.unwrap();
    assert_eq!(again.session, first.session);
    assert!(secret::same(&again.secret, first.secret.expose_secret()));
    let other = CreateSession {
        user: Some("anna".to_owned()),
        ..CreateSession::default()
    };
    let mismatch = house.client.create(&other, "one-key").await.unwrap_err();
    assert_eq!(mismatch.code(), Some(ProblemCode::IdempotencyMismatch));
    assert_eq!(house.control.shared.store.live().await.unwrap().len(), 1);
}

#[tokio::test]
async fn another_secret_and_an_unknown_id_look_alike() {
    let house = House::new().await;
    let (mine, _) = house.ready().await;
    let (other, _) = house.ready().await;
    let foreign = house.client.get(mine.id, &other.secret).await.unwrap_err();
    let unknown = house
        .client
        .get(SessionId::new(), &other.secret)
        .await
        .unwrap_err();
    assert_eq!(foreign.code(), Some(ProblemCode::NotFound));
    assert_eq!(foreign.to_string(), unknown.to_string());
    let destroyed = house
        .client
        .destroy(mine.id, &other.secret)
        .await
        .unwrap_err();
    assert_eq!(destroyed.code(), Some(ProblemCode::NotFound));
    let none = house.client.get(mine.id, &SecretString::from("")).await;
    assert_eq!(none.unwrap_err().code(), Some(ProblemCode::Unauthorized));
    assert_eq!(house.get(&mine).await.phase, SessionPhase::Ready);
}

#[tokio::test]
async fn more_sessions_than_places_wait_in_order_and_know_their_place() {
    let limits = Limits {
        max_desktops: 1,
        max_queued: 2,
        ..Limits::default()
    };
    let house = House::with(limits, crate::house::quick()).await;
    let (first, _) = house.ready().await;
    let second = house.create().await;
    let third = house.create().await;
    assert_eq!(house.get(&second).await.queue_position, Some(1));
    assert_eq!(house.get(&third).await.queue_position, Some(2));
    let full = house
        .client
        .create(&CreateSession::default(), "k")
        .await
        .unwrap_err();
    assert_eq!(full.code(), Some(ProblemCode::NoCapacity));
    assert!(full.is_retryable());

    house.client.destroy(first.id, &first.secret).await.unwrap();
    house.reaches(&second, SessionPhase::Ready).await;
    until("the third moves up", async || {
        (house.get(&third).await.queue_position == Some(1)).then_some(())
    })
    .await;
    // Who waits can go away, at once.
    let gone = house.client.destroy(third.id, &third.secret).await.unwrap();
    assert_eq!((gone.phase, gone.desktop), (SessionPhase::Ended, None));
}

#[tokio::test]
async fn keep_and_heartbeat_answer_with_the_session() {
    let house = House::new().await;
    let mine = house.create().await;
    let keep = Keep { seconds: 600 };
    let early = house.client.keep(mine.id, &mine.secret, keep).await;
    assert_eq!(early.unwrap_err().code(), Some(ProblemCode::Conflict));
    let before = house.reaches(&mine, SessionPhase::Ready).await;
    let kept = house
        .client
        .keep(mine.id, &mine.secret, keep)
        .await
        .unwrap();
    assert!(kept.ends_at > before.ends_at, "{kept:?}");
    let too_long = Keep { seconds: 3601 };
    let refused = house.client.keep(mine.id, &mine.secret, too_long).await;
    assert_eq!(
        refused.unwrap_err().code(),
        Some(ProblemCode::InvalidRequest)
    );
    house.clock.advance(Duration::from_secs(1));
    let client = RdpClientState::Running;
    let beat = Heartbeat { client };
    let beaten = house
        .client
        .heartbeat(mine.id, &mine.secret, beat)
        .await
        .unwrap();
    assert!(beaten.last_activity > kept.last_activity);
}

#[tokio::test]
async fn an_orderly_stop_closes_streams_and_keeps_desktops() {
    let mut house = House::new().await;
    let (mine, desktop) = house.ready().await;
    let mut events = house.client.events(mine.id, &mine.secret);
    events.next().await.unwrap().unwrap();
    let stopped = tokio::time::timeout(PATIENCE, house.crash());
    stopped.await.expect("it stops although a stream is open");
    let session = house.get(&mine).await;
    assert_eq!(
        (session.phase, session.desktop),
        (SessionPhase::Ready, Some(desktop))
    );
}

#[test]
fn the_committed_openapi_document_is_the_one_that_is_served() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
    let mut served = mayfly_orchestrator::http::document()
        .to_pretty_json()
        .unwrap();
    served.push('\n');
    if std::env::var_os("MAYFLY_BLESS").is_some() {
        std::fs::write(path, &served).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        committed == served,
        "docs/openapi.json is not what is served; look at the change and run the test with MAYFLY_BLESS=1"
    );
    assert!(served.contains("\"openapi\": \"3.1.0\""));
}
