//! The prototype's scripts go on working.

use crate::house::{House, PATIENCE, until};
use mayfly_api::{EndReason, SessionPhase};
use mayfly_orchestrator::provider::Provider;
use mayfly_orchestrator::provider::simulated::Fault;
use serde_json::{Value, json};

async fn post(house: &House, path: &str, body: &Value) -> (u16, Value) {
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let call = http.post(format!("{}{path}", house.url)).json(body);
    let answer = call.timeout(PATIENCE).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

async fn list(house: &House) -> Value {
    let url = format!("{}/api/sessions", house.url);
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    http.get(url).send().await.unwrap().json().await.unwrap()
}

#[tokio::test]
async fn create_waits_until_ready_and_destroy_until_gone() {
    let house = House::new().await;
    let (status, made) = post(&house, "/api/session/create", &json!({"username": "anna"})).await;
    assert_eq!(status, 200, "{made}");
    for key in [
        "session_id",
        "vm_name",
        "vm_ip",
        "username",
        "created_at",
        "status",
        "password",
        "last_activity",
    ] {
        assert!(made[key].is_string(), "{key}: {made}");
    }
    assert_eq!(
        (&made["username"], &made["status"]),
        (&json!("anna"), &json!("ready"))
    );
    let (_, v1) = (house.ready().await, list(&house).await);
    assert_eq!(v1["count"], 2);
    assert!(!v1.to_string().contains("password"), "{v1}");

    // No heartbeat is asked for.
    house.pass(200).await;
    assert_eq!(
        list(&house).await["sessions"][0]["session_id"],
        made["session_id"]
    );
    let body = json!({"session_id": made["session_id"]});
    let (status, gone) = post(&house, "/api/session/destroy", &body).await;
    assert_eq!((status, &gone["status"]), (200, &json!("ended")));
    let (status, _) = post(&house, "/api/session/destroy", &body).await;
    assert_eq!(status, 200, "destroying twice is no error");
}

#[tokio::test]
async fn rdp_evidence_alone_holds_it() {
    let house = House::new().await;
    let (_, made) = post(&house, "/api/session/create", &json!({"username": "anna"})).await;
    let desktop = made["vm_name"].as_str().unwrap().parse().unwrap();
    let id = made["session_id"].as_str().unwrap().parse().unwrap();
    let phase = async || house.control.shared.store.get(id).await.unwrap().unwrap();
    house.machines.set_connections(desktop, 1);
    until("connected", async || {
        (phase().await.phase == SessionPhase::Connected).then_some(())
    })
    .await;
    house.pass(400).await;
    assert_eq!(phase().await.phase, SessionPhase::Connected);
    house.machines.set_connections(desktop, 0);
    until("disconnected", async || {
        (phase().await.phase == SessionPhase::Disconnected).then_some(())
    })
    .await;
    house.pass(70).await;
    house.nothing_is_left().await;
    assert_eq!(phase().await.end_reason, Some(EndReason::Idle));
}

#[tokio::test]
async fn a_caller_that_hangs_up_cancels_nothing() {
    let house = House::new().await;
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let call = http
        .post(format!("{}/api/session/create", house.url))
        .json(&json!({"username": "anna"}))
        .send();
    let caller = tokio::spawn(call);
    until("accepted", async || {
        (list(&house).await["count"] == 1).then_some(())
    })
    .await;
    caller.abort();
    let ready = until("ready", async || {
        let all = list(&house).await;
        (all["sessions"][0]["status"] == "ready").then_some(all)
    });
    assert_eq!(ready.await["count"], 1);
}

#[tokio::test]
async fn a_desktop_that_cannot_be_made_is_a_problem_after_its_remains_are_gone() {
    let house = House::new().await;
    house.machines.inject(Fault::AgentFails, None);
    let (status, problem) = post(&house, "/api/session/create", &json!({"username": "anna"})).await;
    assert_eq!((status, &problem["code"]), (502, &json!("create-failed")));
    assert_eq!(house.machines.list().await.unwrap(), []);
}
