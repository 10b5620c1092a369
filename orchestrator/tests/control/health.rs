//! What the service says of itself: numbers for Prometheus and for scripts, whether it is alive and of use.

use crate::house::{House, until};
use axum::body::Body;
use axum::http::{Request, StatusCode};
use mayfly_api::SessionPhase;
use mayfly_orchestrator::config::Limits;
use mayfly_orchestrator::drain::Rest;
use mayfly_orchestrator::http;
use mayfly_orchestrator::provider::simulated::Fault;
use std::collections::BTreeSet;
use std::time::Duration;
use tower::ServiceExt;

async fn get(house: &House, path: &str) -> (u16, String) {
    let answer = reqwest::get(format!("{}{path}", house.url)).await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

/// The value of that line of `/metrics`.
async fn value(house: &House, line: &str) -> Option<f64> {
    let (status, text) = get(house, "/metrics").await;
    assert_eq!(status, 200);
    let mut lines = text.lines();
    let value = lines.find_map(|l| l.strip_prefix(line)?.strip_prefix(' '))?;
    value.parse().ok()
}

#[tokio::test]
async fn what_happens_is_counted() {
    let limits = Limits {
        concurrent_creates: 1,
        max_desktops: 1,
        ..Limits::default()
    };
    let house = House::with(limits, crate::house::quick()).await;
    let ready = "mayfly_ready_seconds_count{provider=\"simulated\"}";
    assert_eq!(value(&house, ready).await, Some(0.0));
    let (mine, _) = house.ready().await;
    let waits = house.create().await;
    for (line, expected) in [
        ("mayfly_sessions{phase=\"ready\"}", 1.0),
        ("mayfly_sessions{phase=\"queued\"}", 1.0),
        ("mayfly_queue_depth", 1.0),
        ("mayfly_desktops{phase=\"claimed\"}", 1.0),
        ("mayfly_desktops{phase=\"stuck\"}", 0.0),
        ("mayfly_desktops_stuck", 0.0),
        (ready, 1.0),
        (
            "mayfly_stage_seconds_count{provider=\"simulated\",stage=\"booting\"}",
            1.0,
        ),
        (
            "mayfly_http_requests_total{method=\"POST\",route=\"/api/v1/sessions\",status=\"202\"}",
            2.0,
        ),
        ("mayfly_store_seconds_count{operation=\"accept\"}", 2.0),
    ] {
        assert_eq!(value(&house, line).await, Some(expected), "{line}");
    }
    let (_, numbers) = get(&house, "/api/metrics").await;
    let numbers: serde_json::Value = serde_json::from_str(&numbers).unwrap();
    assert_eq!(numbers["sessions"]["count"], 2);
    assert_eq!(numbers["sessions"]["status"]["queued"], 1);
    assert_eq!(numbers["vms"]["count"], 1);

    // A path that a caller makes up is no label.
    get(&house, "/api/v1/nothing/here").await;
    let (_, text) = get(&house, "/metrics").await;
    assert!(!text.contains("nothing"), "{text}");
    let none = "mayfly_http_requests_total{method=\"GET\",route=\"none\",status=\"404\"}";
    assert_eq!(value(&house, none).await, Some(1.0));

    house.machines.inject(Fault::DestroyFails, Some(1));
    house.client.destroy(waits.id, &waits.secret).await.unwrap();
    house.client.destroy(mine.id, &mine.secret).await.unwrap();
    let errors = "mayfly_provider_errors_total{provider=\"simulated\",operation=\"destroy\"}";
    until("the failed removal is counted", async || {
        (value(&house, errors).await == Some(1.0)).then_some(())
    })
    .await;
    house.clock.advance(Duration::from_secs(5));
    house.reaches(&mine, SessionPhase::Ended).await;
    for (line, expected) in [
        ("mayfly_sessions_ended_total{reason=\"requested\"}", 2.0),
        (
            "mayfly_stage_seconds_count{provider=\"simulated\",stage=\"destroying\"}",
            1.0,
        ),
    ] {
        assert_eq!(value(&house, line).await, Some(expected), "{line}");
    }
    house.nothing_is_left().await;
}

#[tokio::test]
async fn the_dashboard_shows_only_what_is_exported() {
    let house = House::new().await;
    let (mine, _) = house.ready().await;
    house.client.destroy(mine.id, &mine.secret).await.unwrap();
    house.reaches(&mine, SessionPhase::Ended).await;
    let (_, exported) = get(&house, "/metrics").await;
    let series: BTreeSet<_> = exported
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split(['{', ' ']).next())
        .collect();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/grafana.json");
    let dashboard = std::fs::read_to_string(path).unwrap();
    let dashboard: serde_json::Value = serde_json::from_str(&dashboard).unwrap();
    let mut shown = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().unwrap() {
            let query = target["expr"].as_str().unwrap();
            let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            shown.extend(words.filter(|w| w.starts_with("mayfly_")));
        }
    }
    assert!(shown.len() >= 10, "{shown:?}");
    let missing: Vec<_> = shown.difference(&series).collect();
    assert!(missing.is_empty(), "{missing:?} is not in {series:?}");
}

#[tokio::test]
async fn what_cannot_make_desktops_is_alive_and_not_ready() {
    let house = House::new().await;
    assert_eq!(get(&house, "/healthz").await, (200, "ok\n".to_owned()));
    assert_eq!(get(&house, "/readyz").await, (200, "ready\n".to_owned()));

    house.machines.inject(Fault::Unavailable, None);
    let (status, why) = get(&house, "/readyz").await;
    assert_eq!(status, 503);
    assert!(why.contains("provider.simulated.fault"), "{why}");
    assert_eq!(get(&house, "/healthz").await.0, 200);
    house.machines.inject(Fault::None, None);

    house.refuse_changes().await;
    let (status, why) = get(&house, "/readyz").await;
    assert_eq!(status, 503);
    assert!(why.contains("takes no change"), "{why}");
    assert_eq!(get(&house, "/healthz").await.0, 200);

    house.lose_the_store().await;
    let (status, why) = get(&house, "/healthz").await;
    assert_eq!(status, 500);
    assert!(why.contains("database"), "{why}");
    let (status, why) = get(&house, "/readyz").await;
    assert_eq!(status, 503);
    assert!(why.contains("database"), "{why}");
}

#[tokio::test]
async fn a_load_balancer_sends_nobody_to_one_that_drains_or_stops() {
    let house = House::new().await;
    // Without its listener, which is closed first: a balancer may hold a connection.
    let ready = async || {
        let asked = Request::get("/readyz").header("host", "localhost");
        let asked = asked.body(Body::empty()).unwrap();
        let answer = http::router(house.control.clone()).oneshot(asked).await;
        answer.unwrap().status()
    };
    assert_eq!(ready().await, StatusCode::OK);
    let drain = &house.control.shared.drain;
    drain.set(Some(Rest::Wait)).unwrap();
    assert_eq!(ready().await, StatusCode::SERVICE_UNAVAILABLE);
    drain.set(None).unwrap();
    assert_eq!(ready().await, StatusCode::OK);
    house.control.stop(Duration::ZERO).await;
    assert_eq!(ready().await, StatusCode::SERVICE_UNAVAILABLE);
}
