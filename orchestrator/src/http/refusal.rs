//! Answers that say no.

use crate::control::Refused;
use axum::Json;
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use mayfly_api::{Problem, ProblemCode, problem};
use std::any::Any;
use tracing::error;

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        match self {
            Self::Problem(problem) => respond(problem),
            Self::Store(error) => {
                error!(%error, "a call failed");
                respond(Problem::new(
                    ProblemCode::Internal,
                    "the orchestrator's database failed; its log says more",
                ))
            }
        }
    }
}

fn respond(problem: Problem) -> Response {
    let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let unauthorized = problem.code == ProblemCode::Unauthorized;
    let mut response = (status, Json(problem)).into_response();
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static(problem::MEDIA_TYPE),
    );
    if unauthorized {
        // RFC 9110 §11.6.1: a 401 names the scheme.
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

pub(super) async fn no_such_path(uri: Uri) -> Refused {
    let path = uri.path();
    Refused::new(ProblemCode::NotFound, format!("there is nothing at {path}"))
}

pub(super) async fn no_such_method(method: Method, uri: Uri) -> Refused {
    let path = uri.path();
    Refused::new(
        ProblemCode::MethodNotAllowed,
        format!("{path} does not take {method}"),
    )
}

pub(super) fn panicked(_: Box<dyn Any + Send + 'static>) -> Response {
    // The panic's words are in the log; they may hold anything, so they are not sent.
    error!("a call panicked");
    respond(Problem::new(
        ProblemCode::Internal,
        "the orchestrator made a mistake; its log says more",
    ))
}
