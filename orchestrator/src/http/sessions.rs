//! `/api/v1/sessions`: create, look, log in, hold, end.

use super::body::Object;
use crate::control::{Control, Refused};
use crate::desktop::NotNow;
use crate::secret;
use crate::session::{Origin, Record};
use crate::store::Change;
use crate::store::words::Whose;
use axum::Json;
use axum::extract::{FromRequestParts, Path, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::IntoResponse;
use mayfly_api::{
    CreateSession, Created, Credentials, EndReason, Heartbeat, Keep, Problem, ProblemCode, Receipt,
    Session, SessionId, SessionPhase,
};
use tracing::info;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const NO_STORE: (HeaderName, &str) = (header::CACHE_CONTROL, "no-store");

/// A session whose secret the caller has shown.
pub(super) struct Mine(pub(super) SessionId);

impl FromRequestParts<Control> for Mine {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, control: &Control) -> Result<Self, Refused> {
        let shown = parts
            .headers
            .get(header::AUTHORIZATION)
            .and_then(|v| v.to_str().ok())
            .and_then(|v| v.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, secret)| secret.trim().to_owned())
            .ok_or_else(|| {
                Refused::new(
                    ProblemCode::Unauthorized,
                    "send the session's secret as Authorization: Bearer …",
                )
            })?;
        let Path(id) = Path::<String>::from_request_parts(parts, control)
            .await
            .map_err(|_| not_found())?;
        let id: SessionId = id.parse().map_err(|_| not_found())?;
        // The secret is derived from the id, so a wrong one and an unknown id take the same path and look alike.
        if !secret::same(&control.shared.secrets.session_secret(id), &shown) {
            return Err(not_found());
        }
        Ok(Self(id))
    }
}

pub(super) fn not_found() -> Refused {
    Refused::new(
        ProblemCode::NotFound,
        "there is no such session, or this is not its secret",
    )
}

fn conflict(record: &Record, what: &str) -> Refused {
    let phase = record.phase;
    Refused::new(
        ProblemCode::Conflict,
        format!("the session is {phase:?}: {what}").to_lowercase(),
    )
}

/// Asks for a desktop.
///
/// Answers as soon as the request is durable; follow the session's events from there.
#[utoipa::path(
    post, path = "/api/v1/sessions", tag = "sessions",
    params(("Idempotency-Key" = Option<String>, Header,
        description = "1 to 255 visible ASCII characters. The same key and body again give the same answer.")),
    request_body = CreateSession,
    responses(
        (status = 202, body = Created, description = "Accepted, durably",
         headers(("Location" = String, description = "The session"))),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 422, body = Problem, content_type = "application/problem+json", description = "The key came before with another body"),
        (status = 503, body = Problem, content_type = "application/problem+json", description = "Desktops cannot be made: what to do"),
        (status = 507, body = Problem, content_type = "application/problem+json", description = "Too many wait already"),
    )
)]
pub(super) async fn create(
    State(control): State<Control>,
    headers: HeaderMap,
    Object(request): Object<CreateSession>,
) -> Result<impl IntoResponse, Refused> {
    let mut keys = headers.get_all(IDEMPOTENCY_KEY).iter();
    let key = match (keys.next(), keys.next()) {
        (None, _) => None,
        (Some(key), None) => Some(
            key.to_str()
                .ok()
                .filter(|k| (1..=255).contains(&k.len()) && k.bytes().all(|b| b.is_ascii_graphic()))
                .ok_or_else(bad_key)?,
        ),
        (Some(_), Some(_)) => return Err(bad_key()),
    };
    let session = control.create(Origin::V1, &request, key).await?;
    let location = format!("/api/v1/sessions/{}", session.id);
    let secret = control.shared.secrets.session_secret(session.id);
    Ok((
        StatusCode::ACCEPTED,
        [(header::LOCATION, location)],
        [NO_STORE],
        Json(Created { session, secret }),
    ))
}

fn bad_key() -> Refused {
    Refused::new(
        ProblemCode::InvalidRequest,
        "Idempotency-Key: one, of 1 to 255 visible ASCII characters",
    )
}

async fn find(control: &Control, id: SessionId) -> Result<Record, Refused> {
    control.shared.store.get(id).await?.ok_or_else(not_found)
}

/// The session now.
#[utoipa::path(
    get, path = "/api/v1/sessions/{id}", tag = "sessions",
    params(("id" = SessionId, Path)), security(("session_secret" = [])),
    responses(
        (status = 200, body = Session),
        (status = 401, body = Problem, content_type = "application/problem+json"),
        (status = 404, body = Problem, content_type = "application/problem+json", description = "Unknown, or not yours"),
    )
)]
pub(super) async fn get(
    State(control): State<Control>,
    Mine(id): Mine,
) -> Result<Json<Session>, Refused> {
    Ok(Json(find(&control, id).await?.view()))
}

/// What logs in to the desktop.
#[utoipa::path(
    get, path = "/api/v1/sessions/{id}/credentials", tag = "sessions",
    params(("id" = SessionId, Path)), security(("session_secret" = [])),
    responses(
        (status = 200, body = Credentials),
        (status = 401, body = Problem, content_type = "application/problem+json"),
        (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 409, body = Problem, content_type = "application/problem+json", description = "Not ready yet, or over"),
    )
)]
pub(super) async fn credentials(
    State(control): State<Control>,
    Mine(id): Mine,
) -> Result<impl IntoResponse, Refused> {
    let record = find(&control, id).await?;
    if !record.phase.is_usable() {
        return Err(conflict(&record, "there is nothing to log in to"));
    }
    let password = control.shared.password_of(&record);
    let user = record.wish.user;
    Ok(([NO_STORE], Json(Credentials { user, password })))
}

/// Says that the launcher is there.
#[utoipa::path(
    post, path = "/api/v1/sessions/{id}/heartbeat", tag = "sessions",
    params(("id" = SessionId, Path)), security(("session_secret" = [])),
    request_body = Heartbeat,
    responses(
        (status = 200, body = Session),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 401, body = Problem, content_type = "application/problem+json"),
        (status = 404, body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn heartbeat(
    State(control): State<Control>,
    Mine(id): Mine,
    Object(_beat): Object<Heartbeat>,
) -> Result<Json<Session>, Refused> {
    let now = control.shared.clock.now();
    let done = control.shared.update(id, move |record| {
        // Over, or on its way: the answer says so, and nothing is held any more.
        if record.phase.is_final() || record.phase == SessionPhase::Ending {
            return Change::Nothing;
        }
        record.heartbeat(now);
        Change::Quiet
    });
    let (record, _) = done.await?.ok_or_else(not_found)?;
    Ok(Json(record.view()))
}

/// Holds the desktop without an RDP connection.
#[utoipa::path(
    post, path = "/api/v1/sessions/{id}/keep", tag = "sessions",
    params(("id" = SessionId, Path)), security(("session_secret" = [])),
    request_body = Keep,
    responses(
        (status = 200, body = Session),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 401, body = Problem, content_type = "application/problem+json"),
        (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 409, body = Problem, content_type = "application/problem+json", description = "Not ready yet, or over"),
    )
)]
pub(super) async fn keep(
    State(control): State<Control>,
    Mine(id): Mine,
    Object(keep): Object<Keep>,
) -> Result<Json<Session>, Refused> {
    /// Longest keep of one call.
    const MOST_S: u32 = 3600;
    if keep.seconds > MOST_S {
        let detail = format!("seconds = {}: 0 to {MOST_S} a call", keep.seconds);
        return Err(Refused::new(ProblemCode::InvalidRequest, detail));
    }
    let now = control.shared.clock.now();
    let shared = control.shared.clone();
    let done = control.shared.update(id, move |record| {
        let limits = shared.config.limits_of(&record.wish.template);
        match record.keep(keep.seconds, &limits, now) {
            Ok(()) => Change::Told,
            Err(NotNow) => Change::Nothing,
        }
    });
    let (record, change) = done.await?.ok_or_else(not_found)?;
    if change == Change::Nothing {
        return Err(conflict(&record, "there is no desktop to hold"));
    }
    Ok(Json(record.view()))
}

/// Ends the session and destroys its desktop, in whatever phase it is.
#[utoipa::path(
    delete, path = "/api/v1/sessions/{id}", tag = "sessions",
    params(("id" = SessionId, Path)), security(("session_secret" = [])),
    responses(
        (status = 200, body = Session, description = "It is over: its desktop is gone, checked"),
        (status = 202, body = Session, description = "It is ending"),
        (status = 401, body = Problem, content_type = "application/problem+json"),
        (status = 404, body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn destroy(
    State(control): State<Control>,
    Mine(id): Mine,
) -> Result<(StatusCode, Json<Session>), Refused> {
    let record = end(&control, id).await?;
    let status = if record.phase.is_final() {
        StatusCode::OK
    } else {
        StatusCode::ACCEPTED
    };
    Ok((status, Json(record.view())))
}

/// What was checked to be gone when the session's desktops were removed: kept for a week.
#[utoipa::path(
    get, path = "/api/v1/sessions/{id}/receipt", tag = "sessions",
    params(("id" = SessionId, Path)), security(("session_secret" = [])),
    responses(
        (status = 200, body = Receipt),
        (status = 401, body = Problem, content_type = "application/problem+json"),
        (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 409, body = Problem, content_type = "application/problem+json", description = "Not over yet"),
    )
)]
pub(super) async fn receipt(
    State(control): State<Control>,
    Mine(id): Mine,
) -> Result<Json<Receipt>, Refused> {
    let record = find(&control, id).await?;
    if !record.phase.is_final() {
        return Err(conflict(&record, "there is a receipt when it is over"));
    }
    let kept = control.shared.store.receipts(Whose::Session(id)).await?;
    Ok(Json(Receipt {
        session: id,
        removals: kept.into_iter().map(|(_, removal)| removal).collect(),
    }))
}

/// Ends a session because somebody asked for it; the same again changes nothing.
pub(super) async fn end(control: &Control, id: SessionId) -> Result<Record, Refused> {
    let now = control.shared.clock.now();
    let done = control.shared.update(id, move |record| {
        match record.end(EndReason::Requested, now) {
            Ok(()) => Change::Told,
            Err(NotNow) => Change::Nothing,
        }
    });
    let (record, change) = done.await?.ok_or_else(not_found)?;
    if change == Change::Told {
        info!(session = %id, "its end was asked for");
        control.shared.dispatch.notify_one();
    }
    Ok(record)
}

/// This document.
#[utoipa::path(get, path = "/api/v1/openapi.json", tag = "service", responses((status = 200)))]
pub(super) async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(super::document())
}
