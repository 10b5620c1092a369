//! What whoever looks after the service asks: is it alive, is it of use, what does it count.

use crate::control::{Control, Refused, Shared};
use crate::{metrics, vitals};
use axum::extract::{MatchedPath, Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use mayfly_api::{Problem, ProblemCode};
use std::sync::Arc;

/// Is the orchestrator alive? Its database answers and its dispatcher works.
#[utoipa::path(get, path = "/healthz", tag = "service",
    responses((status = 200, body = String, content_type = "text/plain"),
              (status = 500, body = Problem, content_type = "application/problem+json")))]
pub(super) async fn healthz(State(control): State<Control>) -> Result<&'static str, Refused> {
    vitals::alive(&control).await?;
    Ok("ok\n")
}

/// Would a session get its desktop now? Alive, its database takes changes, and no provider says that it cannot make any.
#[utoipa::path(get, path = "/readyz", tag = "service",
    responses((status = 200, body = String, content_type = "text/plain"),
              (status = 503, body = Problem, content_type = "application/problem+json")))]
pub(super) async fn readyz(State(control): State<Control>) -> Result<&'static str, Refused> {
    vitals::ready(&control).await?;
    Ok("ready\n")
}

/// Numbers for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "service",
    responses((status = 200, body = String, content_type = "text/plain"),
              (status = 500, body = Problem, content_type = "application/problem+json")))]
pub(super) async fn metrics(State(control): State<Control>) -> Result<impl IntoResponse, Refused> {
    let shared = &control.shared;
    let tally = shared.store.tally().await?;
    let text = shared.metrics.show(&tally, shared.drain.get());
    let text = text.map_err(|error| Refused::new(ProblemCode::Internal, error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, metrics::MEDIA_TYPE)], text))
}

/// Counts the answer to a request, and traces it. What is not a route of ours is one route: callers must not make labels.
pub(super) async fn count(
    State(shared): State<Arc<Shared>>,
    request: Request,
    next: Next,
) -> Response {
    let route = request.extensions().get::<MatchedPath>().cloned();
    let method = match request.method().as_str() {
        known @ ("GET" | "POST" | "DELETE" | "PUT" | "HEAD" | "OPTIONS" | "PATCH") => known,
        _ => "other",
    }
    .to_owned();
    let arrived = shared.traces.arrived(&request, &shared.clock);
    let response = next.run(request).await;
    let route = route.as_ref().map_or("none", MatchedPath::as_str);
    if let Some(arrived) = arrived {
        arrived.answered(&method, route, &response);
    }
    let status = response.status().as_u16();
    shared.metrics.answered(&method, route, status);
    response
}
