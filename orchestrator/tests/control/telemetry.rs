//! Traces, as a collector gets them: one tree for each session, whatever becomes of the orchestrator and of the collector.

use crate::house::{House, PATIENCE, quick, until};
use crate::process::{PROGRAM, configured};
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use mayfly_api::{SessionId, SessionPhase};
use mayfly_orchestrator::config::Limits;
use mayfly_orchestrator::provider::simulated::Fault;
use mayfly_orchestrator::telemetry::{TelemetryConfig, Traces};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::{Span, status::StatusCode as SpanStatus};
use prost::Message;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpSocket};

/// What arrived.
#[derive(Clone, Default)]
struct Collector {
    exports: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
    bodies: Arc<Mutex<Vec<u8>>>,
    keys: Arc<Mutex<Vec<String>>>,
}

impl Collector {
    async fn open() -> (Self, String) {
        Self::open_at(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    fn open_at(listener: TcpListener) -> (Self, String) {
        let collector = Self::default();
        let take = async |State(this): State<Self>, headers: HeaderMap, body: Bytes| {
            let key = headers.get("x-key").map(|v| v.to_str().unwrap().to_owned());
            this.keys.lock().unwrap().extend(key);
            this.bodies.lock().unwrap().extend(&body);
            let export = ExportTraceServiceRequest::decode(body).unwrap();
            this.exports.lock().unwrap().push(export);
            StatusCode::OK
        };
        let router = Router::new()
            .route("/v1/traces", post(take))
            .with_state(collector.clone());
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        (collector, url)
    }

    fn spans(&self) -> Vec<Span> {
        let exports = self.exports.lock().unwrap();
        let resources = exports.iter().flat_map(|e| &e.resource_spans);
        let scopes = resources.flat_map(|r| &r.scope_spans);
        scopes.flat_map(|s| s.spans.clone()).collect()
    }

    /// The spans of a session's trace.
    fn of(&self, session: SessionId) -> Vec<Span> {
        let trace = session.0.as_bytes();
        let all = self.spans().into_iter();
        all.filter(|s| s.trace_id == trace).collect()
    }

    async fn named(&self, session: SessionId, name: &str) -> Span {
        until(name, async || {
            self.of(session).into_iter().find(|s| s.name == name)
        })
        .await
    }
}

fn config(endpoint: &str) -> TelemetryConfig {
    TelemetryConfig {
        otlp_endpoint: endpoint.to_owned(),
        ..TelemetryConfig::default()
    }
}

async fn traced(endpoint: &str) -> House {
    let traces = Traces::open(&config(endpoint), "here").unwrap();
    House::traced(Limits::default(), quick(), traces).await
}

fn word<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a str> {
    let found = attributes.iter().find(|a| a.key == key)?;
    match found.value.as_ref()?.value.as_ref()? {
        Value::StringValue(word) => Some(word),
        _ => None,
    }
}

fn failed(span: &Span) -> bool {
    let status = span.status.as_ref();
    status.is_some_and(|s| s.code() == SpanStatus::Error)
}

#[tokio::test]
async fn a_session_is_one_tree_also_over_a_restart() {
    let (collector, url) = Collector::open().await;
    let mut house = traced(&url).await;
    let (mine, desktop) = house.ready().await;
    house.traces.close(PATIENCE).await;
    house.traces = Traces::open(&config(&url), "here").unwrap();
    house.crash().await;
    house.client.destroy(mine.id, &mine.secret).await.unwrap();
    house.reaches(&mine, SessionPhase::Ended).await;
    house.traces.close(PATIENCE).await;

    let root = collector.named(mine.id, "session").await;
    assert!(root.parent_span_id.is_empty() && !failed(&root), "{root:?}");
    let id = mine.id.to_string();
    for (key, value) in [
        ("mayfly.session", &*id),
        ("mayfly.template", "pretended"),
        ("mayfly.provider", "simulated"),
        ("mayfly.end_reason", "requested"),
    ] {
        assert_eq!(word(&root.attributes, key), Some(value), "{root:?}");
    }
    let stages: Vec<_> = root.events.iter().map(|e| &*e.name).collect();
    let (first, last) = (stages.first(), stages.last());
    assert_eq!((first, last), (Some(&"queued"), Some(&"destroying")));
    let spans = collector.of(mine.id);
    let mut names: Vec<_> = spans.iter().map(|s| &*s.name).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "DELETE /api/v1/sessions/{id}",
            "POST /api/v1/sessions",
            "bootstrap",
            "create",
            "destroy",
            "probe",
            "session"
        ]
    );
    for span in spans.iter().filter(|s| s.name != "session") {
        assert_eq!(span.parent_span_id, root.span_id, "{span:?}");
        assert!(!failed(span), "{span:?}");
        assert!(
            span.start_time_unix_nano <= span.end_time_unix_nano,
            "{span:?}"
        );
        // A request is there before its session.
        let of_it = span.start_time_unix_nano >= root.start_time_unix_nano;
        assert!(of_it || span.name.starts_with("POST"), "{span:?}");
        if !span.name.contains(' ') {
            let name = word(&span.attributes, "mayfly.desktop");
            assert_eq!(name, Some(&*desktop.to_string()));
        }
    }
    let exports = collector.exports.lock().unwrap();
    let resource = exports[0].resource_spans[0].resource.as_ref().unwrap();
    let of = |key| word(&resource.attributes, key);
    assert_eq!(of("service.name"), Some("mayfly-orchestrator"));
    assert_eq!(of("service.version"), Some(env!("CARGO_PKG_VERSION")));
    assert_eq!(of("service.instance.id"), Some("here"));
    let bodies = String::from_utf8_lossy(&collector.bodies.lock().unwrap()).into_owned();
    assert!(bodies.contains(&id), "the search can find something");
    for secret in house.control.shared.secrets.of(mine.id, desktop) {
        use secrecy::ExposeSecret;
        assert!(
            !bodies.contains(secret.expose_secret()),
            "a secret was sent"
        );
    }
}

#[tokio::test]
async fn what_fails_is_an_error_with_its_reason() {
    let (collector, url) = Collector::open().await;
    let house = traced(&url).await;
    house.machines.inject(Fault::CreateFails, None);
    let mine = house.create().await;
    house.reaches(&mine, SessionPhase::Failed).await;
    house.nothing_is_left().await;
    house.traces.close(PATIENCE).await;
    let root = collector.named(mine.id, "session").await;
    let create = collector.named(mine.id, "create").await;
    for span in [&root, &create] {
        assert!(failed(span), "{span:?}");
        assert!(
            !span.status.as_ref().unwrap().message.is_empty(),
            "{span:?}"
        );
    }
    assert_eq!(create.parent_span_id, root.span_id);
}

#[tokio::test]
async fn a_caller_s_trace_is_gone_on_with_if_it_is_one() {
    let (collector, url) = Collector::open().await;
    let house = traced(&url).await;
    let ask = async |path: &str, parent: &str| {
        let asked = reqwest::Client::new().get(format!("{}{path}", house.url));
        let answer = asked.header("traceparent", parent).send().await.unwrap();
        answer.status().as_u16()
    };
    let (trace, parent) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
    ask("/healthz", &format!("00-{trace}-{parent}-01")).await;
    ask("/readyz", &format!("00-{trace}-{parent}-00")).await;
    ask("/metrics", "00-not-a-trace").await;
    house.traces.close(PATIENCE).await;
    let spans = collector.spans();
    let hex = |bytes: &[u8]| data_encoding::HEXLOWER.encode(bytes);
    let told: Vec<_> = spans
        .iter()
        .map(|s| (&*s.name, hex(&s.trace_id), hex(&s.parent_span_id)))
        .collect();
    let expected = ("GET /healthz", trace.to_owned(), parent.to_owned());
    assert_eq!(told, [expected]);
}

#[tokio::test]
async fn without_a_collector_sessions_go_on_and_with_one_again_they_are_told() {
    // A port of our own on which nobody listens yet.
    let place = TcpSocket::new_v4().unwrap();
    place.bind(([127, 0, 0, 1], 0).into()).unwrap();
    let house = traced(&format!("http://{}", place.local_addr().unwrap())).await;
    let (mine, _) = house.ready().await;
    house.client.destroy(mine.id, &mine.secret).await.unwrap();
    house.reaches(&mine, SessionPhase::Ended).await;
    // Spans leave every two seconds: by now some have failed to.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (collector, _) = Collector::open_at(place.listen(16).unwrap());
    let (again, _) = house.ready().await;
    collector.named(again.id, "probe").await;
    house.client.destroy(again.id, &again.secret).await.unwrap();
    house.nothing_is_left().await;
}

#[tokio::test]
async fn a_collector_that_never_answers_holds_up_no_stop() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let house = traced(&format!("http://{}", silent.local_addr().unwrap())).await;
    let (mine, _) = house.ready().await;
    house.client.destroy(mine.id, &mine.secret).await.unwrap();
    house.reaches(&mine, SessionPhase::Ended).await;
    house.nothing_is_left().await;
    let begun = Instant::now();
    house.traces.close(Duration::from_millis(100)).await;
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn the_program_shows_headers_of_a_private_file_to_the_collector_alone() {
    let (collector, url) = Collector::open().await;
    let dir = tempfile::tempdir().unwrap();
    let (file, api) = configured(dir.path());
    let headers = dir.path().join("headers");
    std::fs::write(&headers, "X-Key: 5a7c-secret\n").unwrap();
    let text = std::fs::read_to_string(&file).unwrap();
    let telemetry = |endpoint: &str| {
        let section =
            format!("[telemetry]\notlp_endpoint = {endpoint:?}\nheaders_file = {headers:?}\n");
        std::fs::write(&file, format!("{text}{section}")).unwrap();
    };
    let run = async |command: &str| {
        let mut program = Command::new(PROGRAM);
        program.arg(command).arg("--config").arg(&file);
        let done = tokio::task::spawn_blocking(move || program.output().unwrap());
        let done = done.await.unwrap();
        let said = [done.stdout, done.stderr].concat();
        (done.status.success(), String::from_utf8(said).unwrap())
    };
    telemetry(&url);
    std::fs::set_permissions(&headers, PermissionsExt::from_mode(0o644)).unwrap();
    for command in ["doctor", "serve"] {
        let (success, said) = run(command).await;
        assert!(!success && said.contains("chmod 600"), "{said}");
        assert!(said.contains("telemetry"), "{said}");
    }
    std::fs::set_permissions(&headers, PermissionsExt::from_mode(0o600)).unwrap();
    let (success, said) = run("doctor").await;
    assert!(success && said.contains("takes traces"), "{said}");

    let mut service = crate::process::serve(dir.path(), &file, &api).await;
    let request = mayfly_api::CreateSession::default();
    let created = service.client.create(&request, "key").await.unwrap();
    until("ready", async || {
        let get = service.client.get(created.session.id, &created.secret);
        (get.await.unwrap().phase == SessionPhase::Ready).then_some(())
    })
    .await;
    let pid = nix::unistd::Pid::from_raw(service.child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    until("it has stopped", async || service.child.try_wait().unwrap()).await;
    // What was waiting was sent before.
    let spans = collector.of(created.session.id);
    assert!(spans.iter().any(|s| s.name == "probe"), "{spans:?}");
    let keys = collector.keys.lock().unwrap().clone();
    assert!(!keys.is_empty() && keys.iter().all(|k| k == "5a7c-secret"));
    let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
    assert!(log.contains(&created.session.id.to_string()));
    // The whole of it: a few hex digits are in any key that TLS writes down.
    assert!(!log.contains("5a7c-secret"), "the header was written down");

    telemetry("127.0.0.1:4318");
    for command in ["doctor", "serve"] {
        let (success, said) = run(command).await;
        assert!(
            !success && said.contains("telemetry.otlp_endpoint"),
            "{said}"
        );
    }
    telemetry("http://127.0.0.1:9");
    let (success, said) = run("doctor").await;
    assert!(
        success && said.contains("desktops do not need it"),
        "{said}"
    );
}
