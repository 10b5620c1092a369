//! What is refused, with which code, and that nothing changes by it.

use crate::house::House;
use mayfly_api::{Problem, ProblemCode, SessionPhase, problem};
use reqwest::Method;
use reqwest::header::HeaderMap;
use secrecy::ExposeSecret;

struct Call {
    method: Method,
    path: String,
    headers: Vec<(&'static str, String)>,
    body: Option<String>,
}

#[tokio::test]
async fn bad_input_is_a_problem_with_the_right_code_and_changes_nothing() {
    use ProblemCode as C;
    let house = House::new().await;
    let (mine, _) = house.ready().await;
    let before = house.get(&mine).await;
    let bearer = format!("Bearer {}", mine.secret.expose_secret());
    let session = format!("/api/v1/sessions/{}", mine.id);

    let call = |method: Method, path: &str, body: Option<&str>| Call {
        method,
        path: path.to_owned(),
        headers: vec![("authorization", bearer.clone())],
        body: body.map(str::to_owned),
    };
    let post = |path: &str, body: &str| call(Method::POST, path, Some(body));
    let with = |mut call: Call, name: &'static str, value: &str| {
        call.headers.retain(|(n, _)| *n != name);
        call.headers.push((name, value.to_owned()));
        call
    };
    let create = |body: &str| post("/api/v1/sessions", body);
    let huge = format!("{{\"user\":\"{}\"}}", "a".repeat(70_000));
    let (heartbeat, keep) = (format!("{session}/heartbeat"), format!("{session}/keep"));

    let mut table = vec![
        (create(""), C::InvalidRequest),
        (create("{"), C::InvalidRequest),
        (create("[]"), C::InvalidRequest),
        (create("null"), C::InvalidRequest),
        (create("{} {}"), C::InvalidRequest),
        (create(r#"{"colour":"red"}"#), C::InvalidRequest),
        (create(r#"{"user":7}"#), C::InvalidRequest),
        (create(r#"{"user":"a","user":"b"}"#), C::InvalidRequest),
        (create(r#"{"template":"nope"}"#), C::InvalidRequest),
        (create(r#"{"language":"fr_FR; rm"}"#), C::InvalidRequest),
        (
            create(r#"{"time_zone":"../../etc/passwd"}"#),
            C::InvalidRequest,
        ),
        (create(r#"{"keyboard":"fr\n"}"#), C::InvalidRequest),
        (create(&huge), C::TooLarge),
        (
            with(create("{}"), "content-type", "text/plain"),
            C::UnsupportedMediaType,
        ),
        (with(create("{}"), "idempotency-key", ""), C::InvalidRequest),
        (
            with(create("{}"), "idempotency-key", &"k".repeat(256)),
            C::InvalidRequest,
        ),
        (
            with(create("{}"), "origin", "http://127.0.0.1"),
            C::Forbidden,
        ),
        (
            with(create("{}"), "host", "desktops.example.org"),
            C::Forbidden,
        ),
        (
            with(create("{}"), "host", "127.0.0.1.example.org:5000"),
            C::Forbidden,
        ),
        (
            call(Method::PUT, "/api/v1/sessions", Some("{}")),
            C::MethodNotAllowed,
        ),
        (
            call(Method::GET, "/api/v1/sessions", None),
            C::MethodNotAllowed,
        ),
        (
            call(Method::POST, &session, Some("{}")),
            C::MethodNotAllowed,
        ),
        (
            call(Method::GET, "/api/session/destroy", None),
            C::MethodNotAllowed,
        ),
        (call(Method::GET, "/", None), C::NotFound),
        (call(Method::GET, "/api/v2/sessions", None), C::NotFound),
        (call(Method::GET, "/api/v1/sessions/", None), C::NotFound),
        (call(Method::GET, "/api/v1/sessions/7", None), C::NotFound),
        (
            call(Method::GET, "/api/v1/sessions/%FF%00", None),
            C::NotFound,
        ),
        (
            call(Method::GET, &format!("{session}/../../secrets"), None),
            C::NotFound,
        ),
        (
            with(
                call(Method::GET, &session, None),
                "authorization",
                "Bearer nonsense",
            ),
            C::NotFound,
        ),
        (
            with(
                call(Method::GET, &session, None),
                "authorization",
                "Basic abc",
            ),
            C::Unauthorized,
        ),
        (
            with(
                call(Method::DELETE, &session, None),
                "authorization",
                "Bearer x",
            ),
            C::NotFound,
        ),
        (post(&heartbeat, "{}"), C::InvalidRequest),
        (post(&heartbeat, r#"["running"]"#), C::InvalidRequest),
        (
            post(&heartbeat, r#"{"client":"flying"}"#),
            C::InvalidRequest,
        ),
        (post(&keep, r#"{"seconds":-1}"#), C::InvalidRequest),
        (post(&keep, r#"{"seconds":1.5}"#), C::InvalidRequest),
        (post(&keep, r#"{"seconds":3601}"#), C::InvalidRequest),
        (
            post(&keep, r#"{"seconds":1,"forever":true}"#),
            C::InvalidRequest,
        ),
        (post("/api/session/create", "{}"), C::InvalidRequest),
        (
            post("/api/session/create", r#"{"username":"root"}"#),
            C::InvalidRequest,
        ),
        (
            post("/api/session/destroy", r#"{"session_id":"x"}"#),
            C::NotFound,
        ),
        (
            post(
                "/api/session/destroy",
                &format!("{{\"session_id\":\"{}\"}}", mine.id),
            ),
            C::NotFound,
        ),
    ];
    let long = "a".repeat(33);
    for user in [
        "",
        "root",
        "Anna",
        "-a",
        "a b",
        "anna;reboot",
        "sshd",
        &long,
        "../x",
        "é",
    ] {
        table.push((
            create(&serde_json::json!({ "user": user }).to_string()),
            C::InvalidRequest,
        ));
    }
    let mut nobody = call(Method::GET, &session, None);
    nobody.headers.clear();
    table.push((nobody, C::Unauthorized));

    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    for (call, code) in table {
        let what = format!(
            "{} {} {:?} {:?}",
            call.method, call.path, call.headers, call.body
        );
        let mut request = http.request(call.method, format!("{}{}", house.url, call.path));
        let mut headers = HeaderMap::new();
        headers.insert("content-type", "application/json".parse().unwrap());
        for (name, value) in call.headers {
            headers.insert(name, value.parse().unwrap());
        }
        request = request.headers(headers);
        if let Some(body) = call.body {
            request = request.body(body);
        }
        let answer = request
            .send()
            .await
            .unwrap_or_else(|e| panic!("{what:.300}: {e}"));
        let status = answer.status().as_u16();
        let media = answer.headers().get("content-type").cloned();
        let problem: Problem = answer
            .json()
            .await
            .unwrap_or_else(|e| panic!("{what:.300}: {e}"));
        assert_eq!(problem.code, code, "{what:.300}: {problem}");
        assert_eq!(status, problem.status);
        assert_eq!(media.unwrap(), problem::MEDIA_TYPE);
        assert!(!problem.detail.is_empty());
        assert!(!problem.detail.contains(mine.secret.expose_secret()));
    }
    assert_eq!(house.get(&mine).await, before);
    assert_eq!(before.phase, SessionPhase::Ready);
    assert_eq!(house.control.shared.store.live().await.unwrap().len(), 1);
}
