//! Traces, for those who want them: one for each session, sent to an OpenTelemetry collector (OTLP over HTTP).
//!
//! # Guarantees
//! * Without an endpoint there is nothing of it: no thread, no connection, no span.
//! * The id of a session's trace is the session's id, and that of its root span follows from it: whoever works for the session later, after a
//!   restart or on another host, goes on with the same trace.
//! * Nobody waits for a collector. What it does not take in time is dropped, and that is said in the log now and then.
//! * Spans hold ids, names of the catalogue and the words that the log has: no secret, no address, nothing of a person.

use crate::clock::Clock;
use crate::decide::{Failed, Op};
use crate::metrics::word;
use crate::provider::{Check, CheckStatus};
use crate::secret;
use crate::session::Record;
use crate::trust::Trust;
use anyhow::{Context as _, bail, ensure};
use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use jiff::Timestamp;
use mayfly_api::{DesktopName, SessionId, SessionPhase};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{
    Event, Link, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId,
    TraceState,
};
use opentelemetry::{Context, InstrumentationScope, KeyValue};
use opentelemetry_http::{HeaderExtractor, HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, IdGenerator, RandomIdGenerator, SpanData, SpanLinks,
    SpanProcessor,
};
use secrecy::ExposeSecret;
use serde::Deserialize;
use std::borrow::Cow;
use std::fmt::Display;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tokio::runtime::Handle;
use tracing::{info, warn};

/// Where OTLP over HTTP takes traces, below the endpoint.
const PATH: &str = "/v1/traces";
/// An export that is not answered by then has failed.
const LIMIT: Duration = Duration::from_secs(10);
/// Spans wait so long for others to be sent with.
const DELAY: Duration = Duration::from_secs(2);
/// So many wait at most; more are dropped.
const QUEUE: usize = 8_192;
/// Longest answer of a collector that is read.
const LARGEST_ANSWER: usize = 64 << 10;
/// A collector that fails is spoken of this often.
const QUIET: Duration = Duration::from_secs(600);

/// `[telemetry]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// Where traces are sent: `http://host:4318`. Without it there are none.
    pub otlp_endpoint: String,
    /// A file of mode 0600 with what a collector wants to see, such as `Authorization: Bearer …`: a header in each line.
    pub headers_file: Option<PathBuf>,
    /// The authority of an `https` endpoint, if it is not one of the system's.
    pub ca_file: Option<PathBuf>,
}

impl TelemetryConfig {
    /// Whether traces are wanted.
    #[must_use]
    pub fn is_on(&self) -> bool {
        !self.otlp_endpoint.is_empty()
    }

    /// What is wrong with the endpoint, if anything.
    #[must_use]
    pub fn wrong(&self) -> Option<&'static str> {
        if !self.is_on() {
            return None;
        }
        let uri: Option<Uri> = self.otlp_endpoint.parse().ok();
        let Some(uri) = uri.filter(|u| {
            matches!(u.scheme_str(), Some("http" | "https"))
                && u.host().is_some()
                && u.query().is_none()
        }) else {
            return Some(
                "the URL of a collector is needed that takes OTLP over HTTP, such as http://127.0.0.1:4318",
            );
        };
        let user = uri.authority().is_some_and(|a| a.as_str().contains('@'));
        user.then_some("a user or password here could be seen by others: put the header into a file, and name that in telemetry.headers_file")
    }

    /// What each export carries beside the spans; marked, so that nothing shows it.
    fn headers(&self) -> anyhow::Result<HeaderMap> {
        let mut headers = HeaderMap::new();
        let Some(file) = &self.headers_file else {
            return Ok(headers);
        };
        let text = secret::from_file(file)?;
        for (number, line) in (1..).zip(text.expose_secret().lines()) {
            if line.trim().is_empty() {
                continue;
            }
            let header = line.split_once(':').and_then(|(name, value)| {
                let name: HeaderName = name.trim().parse().ok()?;
                let value: HeaderValue = value.trim().parse().ok()?;
                Some((name, value))
            });
            let Some((name, mut value)) = header else {
                bail!(
                    "line {number} of {} is no header, such as Authorization: Bearer …",
                    file.display()
                );
            };
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        Ok(headers)
    }

    fn wire(&self) -> anyhow::Result<Wire> {
        ensure!(
            self.wrong().is_none(),
            "telemetry.otlp_endpoint: {}",
            self.wrong().unwrap_or_default()
        );
        let headers = self.headers().context("telemetry.headers_file")?;
        let trust = self.ca_file.clone().map_or(Trust::System, Trust::Authority);
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(LIMIT));
        let tls = if self.otlp_endpoint.starts_with("https") {
            trust.tls().context("telemetry.ca_file")?.0
        } else {
            // Nobody is believed who is not asked.
            let nobody = rustls::RootCertStore::empty();
            let ring = Arc::new(rustls::crypto::ring::default_provider());
            rustls::ClientConfig::builder_with_provider(ring)
                .with_safe_default_protocol_versions()?
                .with_root_certificates(nobody)
                .with_no_client_auth()
        };
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        Ok(Wire {
            http: Client::builder(TokioExecutor::new()).build(connector),
            headers,
            runtime: Handle::current(),
            endpoint: self.otlp_endpoint.clone(),
            complained: Mutex::default(),
        })
    }

    fn url(&self) -> String {
        format!("{}{PATH}", self.otlp_endpoint.trim_end_matches('/'))
    }

    /// What `doctor` says of it: a collector that is not there is no reason not to start.
    pub async fn check(&self) -> Check {
        let (status, detail) = match self.wire() {
            Err(error) => (CheckStatus::Error, format!("{error:#}")),
            Ok(wire) => match wire.take(self.url()).await {
                Ok(()) => (CheckStatus::Ok, format!("{} takes traces", wire.endpoint)),
                Err(why) => {
                    let detail = format!("{}: {why}; desktops do not need it", wire.endpoint);
                    (CheckStatus::Warning, detail)
                }
            },
        };
        Check {
            name: "telemetry".to_owned(),
            status,
            detail,
        }
    }
}

/// How spans reach the collector. The exporter waits on a thread of its own; the connections are of the runtime.
#[derive(Debug)]
struct Wire {
    http: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    headers: HeaderMap,
    runtime: Handle,
    endpoint: String,
    /// When the log last spoke of a failure, until an export succeeds.
    complained: Mutex<Option<Instant>>,
}

impl Wire {
    async fn exchange(&self, mut request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        request.headers_mut().extend(self.headers.clone());
        let http = self.http.clone();
        // All of it there: on the exporter's thread there is no timer.
        let exchange = self.runtime.spawn(async move {
            let exchange = async {
                let sent = http.request(request.map(Full::new));
                let (parts, body) = sent.await?.into_parts();
                let body = Limited::new(body, LARGEST_ANSWER).collect().await?;
                Ok(Response::from_parts(parts, body.to_bytes()))
            };
            tokio::time::timeout(LIMIT, exchange).await
        });
        exchange.await??
    }

    /// An export of nothing.
    async fn take(&self, url: String) -> Result<(), String> {
        let nothing = Request::post(url)
            .header(http::header::CONTENT_TYPE, "application/x-protobuf")
            .body(Bytes::new())
            .map_err(|e| e.to_string())?;
        match self.exchange(nothing).await {
            Ok(answer) if answer.status().is_success() => Ok(()),
            Ok(answer) => Err(refused(answer.status())),
            Err(error) => Err(causes(&*error)),
        }
    }

    fn note(&self, failure: Option<String>) {
        let mut last = self
            .complained
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match failure {
            None if last.take().is_some() => {
                info!(endpoint = self.endpoint, "traces are taken again");
            }
            None => {}
            Some(why) if last.is_none_or(|at| at.elapsed() >= QUIET) => {
                *last = Some(Instant::now());
                warn!(
                    endpoint = self.endpoint,
                    why,
                    "traces are not taken, and some will be missing; sessions go on without them"
                );
            }
            Some(_) => {}
        }
    }
}

fn refused(status: StatusCode) -> String {
    format!("it answers {status}")
}

fn causes(error: &(dyn std::error::Error + 'static)) -> String {
    let all = std::iter::successors(Some(error), |e| e.source());
    all.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[async_trait]
impl HttpClient for Wire {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let answer = self.exchange(request).await;
        self.note(match &answer {
            Ok(answer) if answer.status().is_success() => None,
            Ok(answer) => Some(refused(answer.status())),
            Err(error) => Some(causes(&**error)),
        });
        answer
    }
}

/// Where spans go: to a collector, or nowhere. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Traces(Option<Arc<Exporting>>);

#[derive(Debug)]
struct Exporting {
    spans: BatchSpanProcessor,
    scope: InstrumentationScope,
}

impl Traces {
    /// To the collector that is configured, if one is, from the orchestrator called `instance`.
    ///
    /// # Errors
    /// If the endpoint or a file cannot be used. A collector that does not answer is no error.
    pub fn open(config: &TelemetryConfig, instance: &str) -> anyhow::Result<Self> {
        if !config.is_on() {
            return Ok(Self::default());
        }
        let exporter = SpanExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(config.url())
            .with_timeout(LIMIT)
            .with_http_client(config.wire()?)
            .build()
            .context("telemetry")?;
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUE)
            .with_scheduled_delay(DELAY)
            .build();
        let mut spans = BatchSpanProcessor::builder(exporter)
            .with_batch_config(batches)
            .build();
        let resource = Resource::builder()
            .with_attributes([
                KeyValue::new("service.name", env!("CARGO_PKG_NAME")),
                KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
                KeyValue::new("service.instance.id", instance.to_owned()),
                KeyValue::new("host.name", crate::replica::host_name()),
            ])
            .build();
        spans.set_resource(&resource);
        let scope = InstrumentationScope::builder(env!("CARGO_PKG_NAME"))
            .with_version(env!("CARGO_PKG_VERSION"))
            .build();
        Ok(Self(Some(Arc::new(Exporting { spans, scope }))))
    }

    /// Sends what waits, for as long as `patience`. Later spans are dropped.
    pub async fn close(&self, patience: Duration) {
        let Some(exporting) = self.0.clone() else {
            return;
        };
        let closed =
            tokio::task::spawn_blocking(move || exporting.spans.shutdown_with_timeout(patience));
        if !matches!(closed.await, Ok(Ok(()))) {
            warn!("the last traces were not taken in time and are dropped");
        }
    }

    fn begin(
        &self,
        name: impl Into<Cow<'static, str>>,
        kind: SpanKind,
        parent: &SpanContext,
        clock: &Clock,
    ) -> Option<Open> {
        let exporting = self.0.clone()?;
        let begun = clock.now();
        Some(Open {
            exporting,
            clock: clock.clone(),
            span: Some(span(
                name.into(),
                kind,
                child_of(parent),
                parent.span_id(),
                begun,
            )),
        })
    }

    /// A session is over: its root span, with its stages.
    pub(crate) fn over(&self, record: &Record, now: Timestamp) {
        let Some(exporting) = self.0.clone().filter(|_| record.phase.is_final()) else {
            return;
        };
        let (name, root) = ("session".into(), root_of(record.id));
        let none = SpanId::INVALID;
        let mut whole = span(name, SpanKind::Internal, root, none, record.created_at);
        whole.end_time = wall(now);
        whole.attributes = vec![
            KeyValue::new("mayfly.session", record.id.to_string()),
            KeyValue::new("mayfly.template", record.wish.template.clone()),
            KeyValue::new("mayfly.provider", record.wish.provider.clone()),
        ];
        if let Some(reason) = &record.end_reason {
            whole
                .attributes
                .push(KeyValue::new("mayfly.end_reason", word(reason)));
        }
        whole.events.events = record
            .stages
            .iter()
            .map(|stage| Event::new(word(&stage.name), wall(stage.started_at), Vec::new(), 0))
            .collect();
        if record.phase == SessionPhase::Failed {
            let failure = record.failure.as_ref();
            let why = failure.map(|f| f.problem.detail.clone());
            whole.status = Status::error(why.unwrap_or_default());
        }
        exporting.emit(whole);
    }

    /// An operation of a session's worker, with the calls that are made for it.
    pub(crate) async fn operation(
        &self,
        clock: &Clock,
        session: SessionId,
        desktop: DesktopName,
        provider: &'static str,
        op: Op,
        work: impl Future<Output = (Op, Result<(), Failed>)>,
    ) -> (Op, Result<(), Failed>) {
        let kind = SpanKind::Internal;
        let Some(mut open) = self.begin(op.as_str(), kind, &root_of(session), clock) else {
            return work.await;
        };
        open.has("mayfly.session", session.to_string());
        open.has("mayfly.desktop", desktop.to_string());
        open.has("mayfly.provider", provider);
        let current = Current {
            traces: self.clone(),
            clock: clock.clone(),
            parent: open.context(),
        };
        let done = CURRENT.scope(current, work).await;
        open.end(
            done.1
                .as_ref()
                .err()
                .map(|failed| failed.reason().to_owned()),
        );
        done
    }

    /// A request came: what its answer is told to. Only those that change something are in a session's trace; whatever else is asked,
    /// and asked again, has a span if its caller has one.
    pub(crate) fn arrived<B>(&self, request: &Request<B>, clock: &Clock) -> Option<Arrived> {
        self.0.as_ref()?;
        let headers = HeaderExtractor(request.headers());
        let caller = TraceContextPropagator::new().extract_with_context(&Context::new(), &headers);
        let caller = caller.span().span_context().clone();
        let changes = matches!(*request.method(), Method::POST | Method::DELETE)
            && !request.uri().path().ends_with("/heartbeat");
        let wanted = if caller.is_valid() {
            caller.is_sampled()
        } else {
            changes
        };
        wanted.then(|| Arrived {
            traces: self.clone(),
            clock: clock.clone(),
            at: clock.now(),
            caller: Some(caller).filter(SpanContext::is_valid),
            subject: session_in(request.uri().path()),
        })
    }
}

/// A call for the operation that this is part of, if it is part of one: `create` calls Proxmox VE, a domain.
pub(crate) async fn call<T, E: Display>(
    name: impl Into<Cow<'static, str>>,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let open = CURRENT.try_with(|current| {
        let (parent, clock) = (&current.parent, &current.clock);
        current.traces.begin(name, SpanKind::Client, parent, clock)
    });
    let outcome = work.await;
    if let Ok(Some(open)) = open {
        open.end(outcome.as_ref().err().map(ToString::to_string));
    }
    outcome
}

/// The operation that is under way in this task.
struct Current {
    traces: Traces,
    clock: Clock,
    parent: SpanContext,
}

tokio::task_local! {
    static CURRENT: Current;
}

/// A request that was not answered yet.
pub(crate) struct Arrived {
    traces: Traces,
    clock: Clock,
    at: Timestamp,
    caller: Option<SpanContext>,
    subject: Option<SessionId>,
}

impl Arrived {
    /// It was answered. The route is a pattern, never a path that a caller chose.
    pub(crate) fn answered<B>(self, method: &str, route: &str, answer: &Response<B>) {
        let status = answer.status();
        let made = answer.headers().get(http::header::LOCATION);
        let made = made.and_then(|l| session_in(l.to_str().ok()?));
        // Whoever has not shown its secret says nothing about a session.
        let shown = !matches!(status, StatusCode::UNAUTHORIZED | StatusCode::NOT_FOUND);
        let subject = self.subject.or(made).filter(|_| shown);
        let root = subject.map(root_of);
        let Some(parent) = self.caller.clone().or(root.clone()) else {
            return;
        };
        let name = format!("{method} {route}");
        let Some(mut open) = self
            .traces
            .begin(name, SpanKind::Server, &parent, &self.clock)
        else {
            return;
        };
        open.has("http.request.method", method.to_owned());
        open.has("http.route", route.to_owned());
        open.has("http.response.status_code", i64::from(status.as_u16()));
        if let Some(subject) = subject {
            open.has("mayfly.session", subject.to_string());
        }
        if let Some(span) = &mut open.span {
            span.start_time = wall(self.at);
            span.parent_span_is_remote = self.caller.is_some();
            if let Some(root) = root.filter(|_| self.caller.is_some()) {
                span.links.links.push(Link::new(root, Vec::new(), 0));
            }
        }
        open.end(status.is_server_error().then(|| status.to_string()));
    }
}

/// A span that has begun. One that is dropped was broken off.
struct Open {
    exporting: Arc<Exporting>,
    clock: Clock,
    span: Option<SpanData>,
}

impl Open {
    fn context(&self) -> SpanContext {
        let span = self.span.as_ref();
        span.map_or(SpanContext::NONE, |s| s.span_context.clone())
    }

    fn has(&mut self, name: &'static str, value: impl Into<opentelemetry::Value>) {
        if let Some(span) = &mut self.span {
            span.attributes.push(KeyValue::new(name, value));
        }
    }

    fn end(mut self, failure: Option<String>) {
        self.finish(failure);
    }

    fn finish(&mut self, failure: Option<String>) {
        if let Some(mut span) = self.span.take() {
            span.end_time = wall(self.clock.now());
            if let Some(why) = failure {
                span.status = Status::error(why);
            }
            self.exporting.emit(span);
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.finish(Some("broken off".to_owned()));
    }
}

impl Exporting {
    fn emit(&self, mut span: SpanData) {
        span.instrumentation_scope = self.scope.clone();
        // A full queue drops it; nothing here waits.
        self.spans.on_end(span);
    }
}

fn span(
    name: Cow<'static, str>,
    span_kind: SpanKind,
    span_context: SpanContext,
    parent_span_id: SpanId,
    begun: Timestamp,
) -> SpanData {
    SpanData {
        span_context,
        parent_span_id,
        parent_span_is_remote: false,
        span_kind,
        name,
        start_time: wall(begun),
        end_time: SystemTime::UNIX_EPOCH,
        attributes: Vec::new(),
        dropped_attributes_count: 0,
        events: opentelemetry_sdk::trace::SpanEvents::default(),
        links: SpanLinks::default(),
        status: Status::Unset,
        instrumentation_scope: InstrumentationScope::default(),
    }
}

/// As spans write times.
fn wall(at: Timestamp) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::try_from(at.as_duration()).unwrap_or_default()
}

/// The root span of a session: 16 bytes name the trace, the last 8 of them, of which 62 bits are random, the span.
fn root_of(session: SessionId) -> SpanContext {
    let bytes = session.0.into_bytes();
    let (_, last) = bytes.split_at(8);
    SpanContext::new(
        TraceId::from_bytes(bytes),
        SpanId::from_bytes(last.try_into().unwrap_or_default()),
        TraceFlags::SAMPLED,
        false,
        TraceState::NONE,
    )
}

fn child_of(parent: &SpanContext) -> SpanContext {
    SpanContext::new(
        parent.trace_id(),
        RandomIdGenerator::default().new_span_id(),
        TraceFlags::SAMPLED,
        false,
        parent.trace_state().clone(),
    )
}

/// The session that a path of the API is about.
fn session_in(path: &str) -> Option<SessionId> {
    let rest = path.strip_prefix("/api/v1/sessions/")?;
    rest.split('/').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry_sdk::error::OTelSdkResult;

    /// What was exported.
    #[derive(Clone, Debug, Default)]
    struct Kept(Arc<Mutex<Vec<SpanData>>>);

    impl opentelemetry_sdk::trace::SpanExporter for Kept {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.0.lock().unwrap().extend(batch);
            Ok(())
        }
    }

    impl Kept {
        fn traces(&self) -> Traces {
            let spans = BatchSpanProcessor::builder(self.clone()).build();
            let scope = InstrumentationScope::default();
            Traces(Some(Arc::new(Exporting { spans, scope })))
        }
    }

    #[tokio::test]
    async fn calls_are_part_of_their_operation_and_one_that_is_dropped_is_told() {
        let (kept, clock, session) = (Kept::default(), Clock::default(), SessionId::new());
        let (traces, name) = (kept.traces(), "desktop-0000001".parse().unwrap());
        let work = async {
            let refused = call("GET /version", async { Err::<(), _>("no such token") });
            assert!(refused.await.is_err());
            (Op::Create, Ok(()))
        };
        let whole = traces.operation(&clock, session, name, "simulated", Op::Create, work);
        whole.await.1.unwrap();
        let never = std::future::pending();
        let dropped = traces.operation(&clock, session, name, "simulated", Op::Destroy, never);
        let limited = tokio::time::timeout(Duration::from_millis(10), dropped);
        assert!(limited.await.is_err());
        // Of no operation: it has no span.
        call("GET /nodes", async { Ok::<_, String>(()) })
            .await
            .unwrap();
        traces.close(Duration::from_secs(60)).await;

        let spans = kept.0.lock().unwrap();
        let [called, create, destroy] = &spans[..] else {
            panic!("{spans:?}");
        };
        assert_eq!((&*called.name, &*create.name), ("GET /version", "create"));
        assert_eq!(called.parent_span_id, create.span_context.span_id());
        assert_eq!(called.status, Status::error("no such token"));
        assert_eq!(create.status, Status::Unset);
        assert_eq!(destroy.status, Status::error("broken off"));
        let root = root_of(session);
        for span in [called, create, destroy] {
            assert_eq!(span.span_context.trace_id(), root.trace_id());
        }
        for span in [create, destroy] {
            assert_eq!(span.parent_span_id, root.span_id());
        }
    }

    #[test]
    fn an_endpoint_is_an_address_without_secrets() {
        let wrong = |endpoint: &str| {
            let config = TelemetryConfig {
                otlp_endpoint: endpoint.to_owned(),
                ..TelemetryConfig::default()
            };
            config.wrong()
        };
        for fine in ["", "http://127.0.0.1:4318", "https://tempo.example/otlp/"] {
            assert_eq!(wrong(fine), None, "{fine}");
        }
        for (endpoint, said) in [
            ("localhost:4318", "URL"),
            ("ftp://a.example", "URL"),
            ("http://a.example/?key=1", "URL"),
            ("http://me:secret@a.example", "headers_file"),
        ] {
            assert!(wrong(endpoint).unwrap().contains(said), "{endpoint}");
        }
    }
}
