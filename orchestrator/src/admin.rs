//! What only an administrator of this machine may tell the running service: to drain, what becomes of a desktop that is
//! stuck, and to look for what nobody owns.
//!
//! It goes over a socket in the state folder, which nobody but root and the service's own user can open. There is no other way in:
//! the API on loopback, which every user of the machine reaches, knows none of this.

use crate::config::Config;
use crate::control::{Control, Refused};
use crate::desktop::{DesktopPhase, NotNow};
use crate::drain::Rest;
use crate::provider::absent;
use crate::reaper::Report;
use crate::store::Change;
use crate::{list, reaper, receipt, replica};
use anyhow::{Context, bail};
use axum::extract::State;
use axum::routing::{post, put};
use axum::{Json, Router};
use http::{Method, Request, header};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use mayfly_api::{DesktopName, Problem, ProblemCode, SessionId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tracing::{info, warn};

/// Between two looks at what is left.
const LOOK: Duration = Duration::from_secs(1);

fn socket(state: &Path) -> PathBuf {
    state.join("admin.sock")
}

#[derive(Serialize, Deserialize)]
struct Draining {
    rest: Option<Rest>,
}

/// What becomes of a desktop that is stuck.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resolution {
    /// Its removal is tried again, as if for the first time.
    Retry,
    /// It is gone, if its provider does not list it any more.
    Gone,
    /// It is gone: the administrator has looked, and takes the provider's word for nothing.
    GoneAsChecked,
}

#[derive(Serialize, Deserialize)]
struct Resolve {
    desktop: DesktopName,
    how: Resolution,
}

#[derive(Serialize, Deserialize)]
struct Keeping {
    desktop: DesktopName,
    keep: bool,
}

/// Listens until the orchestrator stops.
///
/// # Errors
/// If the socket cannot be made.
pub fn listen(state: &Path) -> anyhow::Result<UnixListener> {
    let path = socket(state);
    // Whoever has the lock of the folder has the socket; one that is left is of a process that is no more.
    let _ = std::fs::remove_file(&path);
    let bound = UnixListener::bind(&path).and_then(|listener| {
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600))?;
        Ok(listener)
    });
    bound.with_context(|| {
        format!(
            "the administrator's socket {} cannot be made; set a shorter state_dir if the path is too long",
            path.display()
        )
    })
}

/// Serves until the orchestrator stops.
pub async fn serve(control: Control, listener: UnixListener) {
    let stopping = control.shared.stopping.clone();
    let router = Router::new()
        .route("/drain", put(drain))
        .route("/resolve", post(resolve))
        .route("/reap", post(reap))
        .route("/keep", post(keep))
        .with_state(control);
    tokio::select! {
        done = axum::serve(listener, router).into_future() => {
            warn!(?done, "administrators are not listened to any more");
        }
        () = stopping.cancelled() => {}
    }
}

async fn drain(
    State(control): State<Control>,
    Json(wanted): Json<Draining>,
) -> Result<Json<String>, Refused> {
    let shared = &control.shared;
    shared.drain.set(wanted.rest).map_err(|error| {
        Refused::new(ProblemCode::Internal, format!("the state folder: {error}"))
    })?;
    info!(rest = ?wanted.rest, "draining was asked for, or not any more");
    shared.dispatch.notify_one();
    if shared.store.is_shared() {
        // Whoever is answered relies on it: no place is given here any more, and the others know.
        drop(shared.giving.lock().await);
        replica::say(shared).await.map_err(|error| {
            let why =
                format!("the others that share the database were not told, say it again: {error}");
            Refused::new(ProblemCode::Internal, why)
        })?;
    }
    Ok(Json(
        match wanted.rest {
            Some(Rest::Wait) => "no new sessions are taken; those that have a desktop keep it",
            Some(Rest::End) => "no new sessions are taken, and all are ended",
            None => "sessions are taken again",
        }
        .to_owned(),
    ))
}

async fn resolve(
    State(control): State<Control>,
    Json(Resolve { desktop, how }): Json<Resolve>,
) -> Result<Json<String>, Refused> {
    let shared = &control.shared;
    let conflict = |why: String| Refused::new(ProblemCode::Conflict, why);
    let live = shared.store.live().await?;
    let of_it = |d: &crate::desktop::Desktop| d.name() == desktop;
    let record = live
        .into_iter()
        .find(|record| record.live_desktop().is_some_and(of_it))
        .ok_or_else(|| conflict(format!("{desktop} is gone, or never was")))?;
    if record.desktop_phase() != Some(DesktopPhase::Stuck) {
        let phase = record.desktop_phase();
        let why = format!("{desktop} is not stuck: {phase:?}").to_lowercase();
        return Err(conflict(why));
    }
    let id = record.id;
    if how == Resolution::Retry {
        commit(&control, id, move |record| record.retry(desktop)).await?;
        warn!(session = %id, %desktop, "an administrator has its removal tried again");
        return Ok(Json(format!("the removal of {desktop} is tried again")));
    }
    let checked = match how {
        Resolution::Gone => {
            let kind = &record.wish.provider;
            let unknown = |why: &str| {
                conflict(format!(
                    "whether {desktop} is gone cannot be asked ({why}); if you have looked yourself, add --i-have-checked"
                ))
            };
            let provider = shared.provider(kind);
            let provider = provider.ok_or_else(|| unknown("its provider is not configured"))?;
            let host = record.live_desktop().and_then(|d| d.host());
            if provider.is_bound() && host != Some(shared.store.me()) {
                return Err(unknown("it is on the machine of another orchestrator"));
            }
            let there = provider.list().await;
            let there = there.map_err(|error| unknown(&error.to_string()))?;
            if there.contains(&desktop) {
                return Err(conflict(format!(
                    "{desktop} is not gone: its provider lists it; remove what is in the way, then --retry"
                )));
            }
            absent(kind, "anything", "what the provider lists")
        }
        _ => absent(
            "an administrator's word",
            "anything",
            "wherever they looked",
        ),
    };
    receipt::keep(shared, id, desktop, vec![checked]).await?;
    let now = shared.clock.now();
    commit(&control, id, move |record| record.gone(desktop, now)).await?;
    shared.room_was_made();
    shared.dispatch.notify_one();
    warn!(session = %id, %desktop, ?how, "an administrator says that it is gone");
    Ok(Json(format!(
        "{desktop} counts as gone; should its provider list it again, it is removed"
    )))
}

async fn reap(State(control): State<Control>) -> Result<Json<Vec<Report>>, Refused> {
    info!("an administrator has the reaper look");
    // A pass goes on, whoever waits for it.
    let pass = tokio::spawn(async move { reaper::pass(&control.shared).await });
    let broke = |error| Refused::new(ProblemCode::Internal, format!("the pass broke: {error}"));
    Ok(Json(pass.await.map_err(broke)?))
}

async fn keep(
    State(control): State<Control>,
    Json(Keeping { desktop, keep }): Json<Keeping>,
) -> Result<Json<String>, Refused> {
    let shared = &control.shared;
    let at = keep.then(|| shared.clock.now());
    if shared.store.keep_stray(desktop, at).await? == 0 {
        let why = format!("{desktop} is none of those that nobody owns (mayfly-orchestrator list)");
        return Err(Refused::new(ProblemCode::Conflict, why));
    }
    warn!(event = "reaper.kept", %desktop, keep, "an administrator has it kept, or not any more");
    Ok(Json(if keep {
        format!("{desktop} is kept, until you say --off")
    } else {
        format!("{desktop} is not kept any more")
    }))
}

async fn commit(
    control: &Control,
    id: SessionId,
    verb: impl FnOnce(&mut crate::session::Record) -> Result<(), NotNow> + Send + 'static,
) -> Result<(), Refused> {
    let done = control.shared.update(id, move |record| {
        verb(record).map_or(Change::Nothing, |()| Change::Told)
    });
    match done.await? {
        Some((_, Change::Told)) => Ok(()),
        _ => Err(Refused::new(
            ProblemCode::Conflict,
            "it was resolved in the meantime",
        )),
    }
}

/// Tells the running service, and returns what it says.
async fn tell<T: DeserializeOwned>(
    config: &Config,
    path: &str,
    method: Method,
    body: Vec<u8>,
) -> anyhow::Result<T> {
    let socket = socket(&config.state_dir);
    let stream = UnixStream::connect(&socket).await.with_context(|| {
        format!(
            "{}: the service does not run here, or you are neither root nor its user",
            socket.display()
        )
    })?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "localhost")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(bytes::Bytes::from(body)))?;
    let answer = sender.send_request(request).await?;
    let success = answer.status().is_success();
    let body = answer.into_body().collect().await?.to_bytes();
    connection.abort();
    if success {
        return serde_json::from_slice(&body).context("the service's answer");
    }
    match serde_json::from_slice::<Problem>(&body) {
        Ok(problem) => bail!("{}", problem.detail),
        Err(_) => bail!("the service refused: {}", String::from_utf8_lossy(&body)),
    }
}

/// How long `drain` stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Until it is said.
    Told,
    /// Until every session is over.
    Over,
}

/// `drain`: tells the service, and says what is left.
///
/// # Errors
/// If the service cannot be told or the database not be read.
pub async fn drain_from_here(
    config: &Config,
    rest: Option<Rest>,
    until: Until,
    mut say: impl FnMut(&str),
) -> anyhow::Result<()> {
    let body = serde_json::to_vec(&Draining { rest })?;
    say(&tell::<String>(config, "/drain", Method::PUT, body).await?);
    let mut told = None;
    while rest.is_some() {
        let left = list::left(config).await?;
        if left.is_empty() {
            say("no session is left");
            break;
        }
        if told.as_ref() != Some(&left) {
            say(&format!("{} sessions are left:", left.len()));
            left.iter().for_each(|line| say(line));
            told = Some(left);
        }
        if until == Until::Told {
            break;
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// `resolve`: what the service says.
///
/// # Errors
/// If the service cannot be told, or refuses.
pub async fn resolve_from_here(
    config: &Config,
    desktop: DesktopName,
    how: Resolution,
) -> anyhow::Result<String> {
    let body = serde_json::to_vec(&Resolve { desktop, how })?;
    tell(config, "/resolve", Method::POST, body).await
}

/// `reap`: what the service did at once.
///
/// # Errors
/// If the service cannot be told.
pub async fn reap_from_here(config: &Config) -> anyhow::Result<Vec<Report>> {
    tell(config, "/reap", Method::POST, Vec::new()).await
}

/// `keep`: what the service says.
///
/// # Errors
/// If the service cannot be told, or refuses.
pub async fn keep_from_here(
    config: &Config,
    desktop: DesktopName,
    keep: bool,
) -> anyhow::Result<String> {
    let body = serde_json::to_vec(&Keeping { desktop, keep })?;
    tell(config, "/keep", Method::POST, body).await
}
