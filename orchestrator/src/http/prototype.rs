//! The prototype's calls, for its scripts: they wait until the desktop is ready, or gone.
//!
//! A session made here has no heartbeat and no secret: RDP evidence alone holds it, and its id alone destroys it.

use super::body::Object;
use super::sessions::{end, not_found};
use crate::control::{Control, Refused};
use crate::session::{Origin, Record};
use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use jiff::Timestamp;
use mayfly_api::{CreateSession, DesktopName, Problem, ProblemCode, SessionId, SessionPhase};
use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use utoipa::ToSchema;

/// Body of `POST /api/session/create`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    /// Login name inside the desktop.
    username: String,
}

/// Body of `POST /api/session/destroy`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Unwanted {
    /// The session.
    session_id: String,
}

/// A session as the prototype showed it.
#[derive(Serialize, ToSchema)]
pub(super) struct Shown {
    session_id: SessionId,
    /// The desktop's name.
    vm_name: Option<DesktopName>,
    /// The desktop's own address.
    #[schema(value_type = Option<String>)]
    vm_ip: Option<IpAddr>,
    username: String,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    status: SessionPhase,
    #[schema(value_type = String, format = DateTime)]
    last_activity: Timestamp,
    /// Only in the answer to `create`.
    #[serde(skip_serializing_if = "Option::is_none")]
    password: Option<String>,
}

/// Answer to `GET /api/sessions`.
#[derive(Serialize, ToSchema)]
pub(super) struct All {
    sessions: Vec<Shown>,
    count: usize,
}

fn show(record: &Record) -> Shown {
    let session = record.view();
    Shown {
        session_id: session.id,
        vm_name: session.desktop,
        vm_ip: session.rdp.map(|rdp| rdp.address.ip()),
        username: session.user,
        created_at: session.created_at,
        status: session.phase,
        last_activity: session.last_activity,
        password: None,
    }
}

/// Waits for a session; a caller that hangs up stops only the waiting.
async fn wait_for(
    control: &Control,
    id: SessionId,
    reached: impl Fn(&Record) -> bool,
) -> Result<Record, Refused> {
    let mut changes = control.shared.hub.follow(id);
    loop {
        changes.mark_unchanged();
        let record = control.shared.store.get(id).await?.ok_or_else(not_found)?;
        if reached(&record) {
            return Ok(record);
        }
        tokio::select! {
            () = control.shared.stopping.cancelled() => return Err(Refused::new(
                ProblemCode::ShuttingDown,
                format!("the orchestrator stops; session {id} goes on, ask GET /api/sessions when it is back"),
            )),
            _ = changes.changed() => {}
        }
    }
}

/// Makes a desktop and waits until it is ready.
#[utoipa::path(
    post, path = "/api/session/create", tag = "prototype", request_body = Wanted,
    responses(
        (status = 200, body = Shown),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 502, body = Problem, content_type = "application/problem+json"),
        (status = 503, body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn create(
    State(control): State<Control>,
    Object(wanted): Object<Wanted>,
) -> Result<impl IntoResponse, Refused> {
    let request = CreateSession {
        user: Some(wanted.username),
        ..CreateSession::default()
    };
    // In a task of its own: a caller that hangs up now cannot leave a session that is accepted and not worked for.
    let accepting = tokio::spawn({
        let control = control.clone();
        async move { control.create(Origin::Prototype, &request, None).await }
    });
    let session = accepting.await.map_err(|_| broken())??;
    let usable_or_over =
        |r: &Record| r.phase.is_usable() || r.phase.is_final() || r.phase == SessionPhase::Ending;
    let mut record = wait_for(&control, session.id, usable_or_over).await?;
    if !record.phase.is_usable() {
        record = wait_for(&control, session.id, |r| r.phase.is_final()).await?;
        return Err(match record.failure {
            Some(failure) => failure.problem.into(),
            None => Refused::new(
                ProblemCode::Conflict,
                "the session was ended before its desktop was ready",
            ),
        });
    }
    let password = control.shared.password_of(&record);
    let shown = Shown {
        password: Some(password.expose_secret().to_owned()),
        ..show(&record)
    };
    Ok(([(header::CACHE_CONTROL, "no-store")], Json(shown)))
}

fn broken() -> Refused {
    Refused::new(
        ProblemCode::Internal,
        "the orchestrator made a mistake; its log says more",
    )
}

/// Destroys a desktop that was made here, and waits until it is gone.
#[utoipa::path(
    post, path = "/api/session/destroy", tag = "prototype", request_body = Unwanted,
    responses(
        (status = 200, body = Shown),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 404, body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn destroy(
    State(control): State<Control>,
    Object(unwanted): Object<Unwanted>,
) -> Result<Json<Shown>, Refused> {
    let id: SessionId = unwanted.session_id.parse().map_err(|_| not_here())?;
    let record = control.shared.store.get(id).await?.ok_or_else(not_here)?;
    if record.wish.origin != Origin::Prototype {
        return Err(not_here());
    }
    end(&control, id).await?;
    let record = wait_for(&control, id, |r| r.phase.is_final()).await?;
    Ok(Json(show(&record)))
}

fn not_here() -> Refused {
    Refused::new(
        ProblemCode::NotFound,
        "there is no such session here; one made by /api/v1 is ended there, with its secret",
    )
}

/// So many, and in which phases.
#[derive(Serialize, ToSchema)]
pub(super) struct Counted {
    count: u64,
    status: BTreeMap<String, u64>,
}

impl Counted {
    fn of(status: BTreeMap<String, u64>) -> Self {
        let count = status.values().sum();
        Self { count, status }
    }
}

/// Answer to `GET /api/metrics`.
#[derive(Serialize, ToSchema)]
pub(super) struct Numbers {
    /// Those that are not over.
    sessions: Counted,
    /// Desktops of which something may exist.
    vms: Counted,
}

/// Numbers, in the prototype's words; `/metrics` has more of them.
#[utoipa::path(get, path = "/api/metrics", tag = "prototype", responses((status = 200, body = Numbers)))]
pub(super) async fn metrics(State(control): State<Control>) -> Result<Json<Numbers>, Refused> {
    let mut tally = control.shared.store.tally().await?;
    tally
        .sessions
        .retain(|phase, _| !matches!(phase.as_str(), "ended" | "failed"));
    Ok(Json(Numbers {
        sessions: Counted::of(tally.sessions),
        vms: Counted::of(tally.desktops),
    }))
}

/// Every session that is not over.
#[utoipa::path(get, path = "/api/sessions", tag = "prototype", responses((status = 200, body = All)))]
pub(super) async fn list(State(control): State<Control>) -> Result<Json<All>, Refused> {
    let live = control.shared.store.live().await?;
    let sessions: Vec<_> = live.iter().map(show).collect();
    let count = sessions.len();
    Ok(Json(All { sessions, count }))
}
