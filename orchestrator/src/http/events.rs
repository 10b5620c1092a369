//! `GET /api/v1/sessions/{id}/events`: the session, whole, after every change (server-sent events, WHATWG HTML §9.2).
//!
//! Rows first, stream second: what is sent was committed, and a caller that comes back with `Last-Event-ID` gets
//! what it missed, also from another process.

use super::sessions::{Mine, not_found};
use crate::control::{Control, Refused};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName};
use axum::response::Sse;
use axum::response::sse::{Event, KeepAlive};
use futures_util::Stream;
use futures_util::stream;
use mayfly_api::{Problem, ProblemCode, SessionEvent, SessionId};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::watch;
use tracing::error;

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The session's events, first a snapshot, until its phase is final.
#[utoipa::path(
    get, path = "/api/v1/sessions/{id}/events", tag = "sessions",
    params(("id" = SessionId, Path),
           ("Last-Event-ID" = Option<u64>, Header, description = "The last `id:` seen; what came after it is sent")),
    security(("session_secret" = [])),
    responses(
        (status = 200, body = SessionEvent, content_type = "text/event-stream",
         description = "`event: session`, `id:` the event's `seq`, `data:` a SessionEvent"),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 401, body = Problem, content_type = "application/problem+json"),
        (status = 404, body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn follow(
    State(control): State<Control>,
    Mine(id): Mine,
    headers: HeaderMap,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Refused> {
    let last = headers
        .get(LAST_EVENT_ID)
        .map(|v| {
            v.to_str()
                .ok()
                .filter(|v| v.bytes().all(|b| b.is_ascii_digit()))
                .and_then(|v| v.parse::<u64>().ok())
                .ok_or_else(|| {
                    Refused::new(
                        ProblemCode::InvalidRequest,
                        "Last-Event-ID: a number that an earlier event had",
                    )
                })
        })
        .transpose()?;
    let changes = control.shared.hub.follow(id);
    let record = control.shared.store.get(id).await?.ok_or_else(not_found)?;
    let mut pending = VecDeque::new();
    // What was missed, or else a snapshot: the state as of the last event. One that says it saw the future, or all,
    // of a session gets the snapshot too, so that every stream begins with one.
    let seen = match last {
        Some(last) if last < record.seq => last,
        _ => record.seq - 1,
    };
    pending.extend(control.shared.store.events_after(id, seen).await?);
    let state = Following {
        control,
        id,
        changes,
        last: seen,
        pending,
        over: false,
    };
    let events = stream::unfold(state, |mut state| async move {
        let event = state.next().await?;
        Some((Ok(event), state))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}

struct Following {
    control: Control,
    id: SessionId,
    changes: watch::Receiver<u64>,
    last: u64,
    pending: VecDeque<SessionEvent>,
    over: bool,
}

impl Following {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.pending.pop_front() {
                self.last = event.seq;
                self.over = event.session.phase.is_final();
                return frame(&event);
            }
            if self.over {
                return None;
            }
            tokio::select! {
                () = self.control.shared.stopping.cancelled() => return None,
                _ = self.changes.changed() => {}
            }
            match self
                .control
                .shared
                .store
                .events_after(self.id, self.last)
                .await
            {
                Ok(events) => self.pending = events.into(),
                Err(error) => {
                    error!(session = %self.id, %error, "a stream of events ends early");
                    return None;
                }
            }
        }
    }
}

fn frame(event: &SessionEvent) -> Option<Event> {
    Event::default()
        .event("session")
        .id(event.seq.to_string())
        .json_data(event)
        .inspect_err(|error| error!(%error, "an event cannot be written"))
        .ok()
}
