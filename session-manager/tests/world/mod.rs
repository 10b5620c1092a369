//! A small world for the launcher: an orchestrator that answers over HTTP as told, and an RDP client that is a script.
#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(clippy::result_large_err, reason = "an answer is an answer")]

pub(crate) mod desk;

use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::StreamExt;
use mayfly_api::{
    Created, Credentials, DesktopName, EndReason, Heartbeat, Keep, Problem, ProblemCode,
    RdpEndpoint, Session, SessionEvent, SessionId, SessionPhase, Stage, StageName, StageProgress,
};
use std::collections::HashMap;
use std::path::{Path as FilePath, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;

/// Generous: the machine that runs the tests may be busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const PASSWORD: &str = "a-password-for-this-session";

/// What the orchestrator does with a request for a desktop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Making {
    /// Ready at once.
    Ready,
    /// It stays in preparation.
    Stuck,
    /// It fails while booting.
    Fails,
}

#[derive(Debug)]
struct Inner {
    making: Making,
    sessions: HashMap<SessionId, watch::Sender<Session>>,
    by_key: HashMap<String, SessionId>,
    beats: Vec<Heartbeat>,
    keeps: Vec<u32>,
    destroys: u32,
    refuse_destroys: bool,
}

/// The orchestrator. It stops with its last clone's runtime.
#[derive(Clone, Debug)]
pub(crate) struct Orchestrator {
    pub(crate) address: String,
    inner: Arc<Mutex<Inner>>,
}

fn secret_of(id: SessionId) -> String {
    format!("secret-of-{id}")
}

type Answer<T> = Result<T, Response>;

fn problem(code: ProblemCode, detail: &str) -> Response {
    let problem = Problem::new(code, detail);
    let status = StatusCode::from_u16(problem.status).unwrap();
    let media = [(header::CONTENT_TYPE, mayfly_api::problem::MEDIA_TYPE)];
    (status, media, serde_json::to_string(&problem).unwrap()).into_response()
}

impl Orchestrator {
    pub(crate) async fn start(making: Making) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let orchestrator = Self {
            address: format!("http://{}", listener.local_addr().unwrap()),
            inner: Arc::new(Mutex::new(Inner {
                making,
                sessions: HashMap::new(),
                by_key: HashMap::new(),
                beats: Vec::new(),
                keeps: Vec::new(),
                destroys: 0,
                refuse_destroys: false,
            })),
        };
        let one = "/api/v1/sessions/{id}";
        let app = Router::new()
            .route("/api/v1/sessions", post(create))
            .route(one, get(show).delete(destroy))
            .route(&format!("{one}/credentials"), get(credentials))
            .route(&format!("{one}/heartbeat"), post(heartbeat))
            .route(&format!("{one}/keep"), post(keep))
            .route(&format!("{one}/events"), get(events))
            .with_state(orchestrator.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        orchestrator
    }

    fn with<T>(&self, look: impl FnOnce(&mut Inner) -> T) -> T {
        look(&mut self.inner.lock().unwrap())
    }

    pub(crate) fn refuse_destroys(&self) {
        self.with(|inner| inner.refuse_destroys = true);
    }

    pub(crate) fn made(&self) -> Vec<Session> {
        self.with(|inner| {
            inner
                .sessions
                .values()
                .map(|s| s.borrow().clone())
                .collect()
        })
    }

    pub(crate) fn destroys(&self) -> u32 {
        self.with(|inner| inner.destroys)
    }

    pub(crate) fn keeps(&self) -> Vec<u32> {
        self.with(|inner| inner.keeps.clone())
    }

    /// The only session, moved on.
    pub(crate) fn move_on(&self, change: impl FnOnce(&mut Session)) {
        self.with(|inner| {
            let only = inner.sessions.values().next().unwrap();
            only.send_modify(change);
        });
    }

    pub(crate) async fn until(&self, what: &str, holds: impl Fn(&[Session]) -> bool) {
        until(what, || holds(&self.made())).await;
    }

    fn session(&self, id: SessionId, headers: &HeaderMap) -> Answer<watch::Sender<Session>> {
        let wanted = format!("Bearer {}", secret_of(id));
        let given = headers
            .get(header::AUTHORIZATION)
            .and_then(|v| v.to_str().ok());
        self.with(|inner| inner.sessions.get(&id).cloned())
            .filter(|_| given == Some(&wanted))
            .ok_or_else(|| problem(ProblemCode::NotFound, "no such session"))
    }
}

/// Waits for a state.
pub(crate) async fn until(what: &str, holds: impl Fn() -> bool) {
    let waited = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let in_time = tokio::time::timeout(PATIENCE, waited).await;
    assert!(in_time.is_ok(), "it did not happen in time: {what}");
}

fn fresh(id: SessionId, making: Making) -> Session {
    let now = jiff::Timestamp::now();
    let ready = making == Making::Ready;
    let stage = |name, duration_ms| Stage {
        name,
        started_at: now,
        duration_ms,
        expected_ms: Some(100),
        progress: (!ready && duration_ms.is_none()).then_some(StageProgress::WaitingForAddress),
    };
    Session {
        id,
        phase: if ready {
            SessionPhase::Ready
        } else {
            SessionPhase::Preparing
        },
        template: "default".into(),
        user: "user".into(),
        desktop: DesktopName::from_number(7),
        rdp: ready.then(|| RdpEndpoint {
            address: "127.77.0.7:3389".parse().unwrap(),
            certificate_sha256: "ab".repeat(32),
            user: "user".into(),
        }),
        created_at: now,
        last_activity: now,
        expires_at: now + Duration::from_secs(8 * 3600),
        ends_at: None,
        stages: vec![
            stage(StageName::Creating, Some(5)),
            stage(StageName::Booting, None),
        ],
        expected_ready_ms: Some(200),
        queue_position: None,
        failure: None,
        end_reason: None,
    }
}

async fn create(State(o): State<Orchestrator>, headers: HeaderMap) -> (StatusCode, Json<Created>) {
    let key = headers["idempotency-key"].to_str().unwrap().to_owned();
    let session = o.with(|inner| {
        let id = *inner.by_key.entry(key).or_default();
        let making = inner.making;
        let fresh = || watch::Sender::new(fresh(id, making));
        let session = inner.sessions.entry(id).or_insert_with(fresh);
        if making == Making::Fails {
            let failing = session.clone();
            tokio::spawn(async move {
                failing.send_modify(|s| {
                    s.phase = SessionPhase::Failed;
                    s.failure = Some(mayfly_api::Failure {
                        stage: StageName::Booting,
                        problem: Problem::new(ProblemCode::CreateFailed, "the image is broken."),
                    });
                });
            });
        }
        session.subscribe()
    });
    let session = session.borrow().clone();
    let secret = secret_of(session.id).into();
    (StatusCode::ACCEPTED, Json(Created { session, secret }))
}

async fn show(
    State(o): State<Orchestrator>,
    Path(id): Path<SessionId>,
    headers: HeaderMap,
) -> Answer<Json<Session>> {
    Ok(Json(o.session(id, &headers)?.borrow().clone()))
}

async fn destroy(
    State(o): State<Orchestrator>,
    Path(id): Path<SessionId>,
    headers: HeaderMap,
) -> Answer<Json<Session>> {
    let session = o.session(id, &headers)?;
    if o.with(|inner| {
        inner.destroys += 1;
        inner.refuse_destroys
    }) {
        return Err(problem(ProblemCode::Conflict, "not now"));
    }
    session.send_modify(|s| {
        s.phase = SessionPhase::Ending;
        s.end_reason = Some(EndReason::Requested);
    });
    let answer = session.borrow().clone();
    tokio::spawn(async move { session.send_modify(|s| s.phase = SessionPhase::Ended) });
    Ok(Json(answer))
}

async fn credentials(
    State(o): State<Orchestrator>,
    Path(id): Path<SessionId>,
    headers: HeaderMap,
) -> Answer<Json<Credentials>> {
    o.session(id, &headers)?;
    Ok(Json(Credentials {
        user: "user".into(),
        password: PASSWORD.into(),
    }))
}

async fn heartbeat(
    State(o): State<Orchestrator>,
    Path(id): Path<SessionId>,
    headers: HeaderMap,
    Json(beat): Json<Heartbeat>,
) -> Answer<Json<Session>> {
    let session = o.session(id, &headers)?;
    o.with(|inner| inner.beats.push(beat));
    Ok(Json(session.borrow().clone()))
}

async fn keep(
    State(o): State<Orchestrator>,
    Path(id): Path<SessionId>,
    headers: HeaderMap,
    Json(keep): Json<Keep>,
) -> Answer<Json<Session>> {
    let session = o.session(id, &headers)?;
    o.with(|inner| inner.keeps.push(keep.seconds));
    Ok(Json(session.borrow().clone()))
}

async fn events(
    State(o): State<Orchestrator>,
    Path(id): Path<SessionId>,
    headers: HeaderMap,
) -> Answer<Response> {
    let changes = o.session(id, &headers)?.subscribe();
    let frames = futures_util::stream::unfold((changes, 0_u64), |(mut changes, seq)| async move {
        if seq > 0 {
            changes.changed().await.ok()?;
        }
        let event = SessionEvent {
            seq: seq + 1,
            at: jiff::Timestamp::now(),
            session: changes.borrow_and_update().clone(),
        };
        let json = serde_json::to_string(&event).unwrap();
        let frame = format!("event: session\nid: {}\ndata: {json}\n\n", event.seq);
        Some((Ok::<_, std::convert::Infallible>(frame), (changes, seq + 1)))
    });
    let media = [(header::CONTENT_TYPE, "text/event-stream")];
    Ok((media, axum::body::Body::from_stream(frames.boxed())).into_response())
}

/// An RDP client that is a script: it writes down what it was given and ends when told.
#[derive(Debug)]
pub(crate) struct FakeClient {
    dir: tempfile::TempDir,
}

impl FakeClient {
    pub(crate) fn new() -> Self {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let here = dir.path().display();
        let script = format!(
            "#!/bin/sh\n\
             if [ \"$1\" = --version ]; then echo 'This is FreeRDP version 2.11.7 (fake)'; exit 0; fi\n\
             printf '%s\\n' \"$@\" > {here}/args\n\
             cat > {here}/stdin\n\
             echo $$ > {here}/pid.new; mv {here}/pid.new {here}/pid\n\
             while [ ! -e {here}/code ]; do sleep 0.02; done\n\
             code=$(cat {here}/code); rm {here}/code {here}/pid\n\
             exit $code\n"
        );
        let path = dir.path().join("xfreerdp");
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        Self { dir }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("xfreerdp")
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.file(name)).unwrap()
    }

    pub(crate) async fn runs(&self) -> i32 {
        until("the RDP client runs", || self.file("pid").exists()).await;
        self.read("pid").trim().parse().unwrap()
    }

    /// Ends it with this code.
    pub(crate) fn ends(&self, code: i32) {
        let fresh = self.file("code.new");
        std::fs::write(&fresh, code.to_string()).unwrap();
        std::fs::rename(fresh, self.file("code")).unwrap();
    }
}

impl Drop for FakeClient {
    fn drop(&mut self) {
        // Whoever still waits sees the folder's end as its own.
        let _ = std::fs::write(self.file("code"), "0");
        if let Ok(pid) = std::fs::read_to_string(self.file("pid"))
            && let Ok(pid) = pid.trim().parse()
        {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::killpg(pid, nix::sys::signal::Signal::SIGKILL);
        }
        // It may just have begun.
        remove(self.dir.path());
    }
}

/// Removes a folder that somebody may still write into for a moment: that would keep its own end from removing it.
pub(crate) fn remove(folder: &std::path::Path) {
    for _ in 0..200 {
        if std::fs::remove_dir_all(folder).is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub(crate) fn alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

pub(crate) fn all_files(dir: &FilePath) -> String {
    let mut all = String::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.push_str(&all_files(&path));
        } else {
            all.push_str(&String::from_utf8_lossy(&std::fs::read(&path).unwrap()));
        }
    }
    all
}
