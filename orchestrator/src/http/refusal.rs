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
    let code = problem.code;
    let mut response = (status, Json(problem)).into_response();
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static(problem::MEDIA_TYPE),
    );
    if code == ProblemCode::Unauthorized {
        // RFC 9110 §11.6.1: a 401 names the scheme.
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    let later = match code {
        // Nobody knows when it ends; a minute does not hurt.
        ProblemCode::Draining => Some("60"),
        ProblemCode::NoCapacity | ProblemCode::ShuttingDown => Some("10"),
        ProblemCode::Overloaded => Some("1"),
        _ => None,
    };
    if let Some(seconds) = later {
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static(seconds));
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

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::{Body, to_bytes};
    use axum::http::Request;
    use axum::{Router, routing};
    use tower::ServiceExt;
    use tower_http::catch_panic::CatchPanicLayer;

    #[tokio::test]
    async fn a_panic_is_a_problem_that_does_not_repeat_its_words() {
        async fn broken() -> &'static str {
            panic!("a secret")
        }
        let app = Router::new()
            .route("/", routing::get(broken))
            .layer(CatchPanicLayer::custom(panicked));
        let answer = app.oneshot(Request::new(Body::empty())).await.unwrap();
        assert_eq!(answer.status(), 500);
        assert_eq!(answer.headers()["content-type"], problem::MEDIA_TYPE);
        let body = to_bytes(answer.into_body(), 4096).await.unwrap();
        let told: Problem = serde_json::from_slice(&body).unwrap();
        assert_eq!(told.code, ProblemCode::Internal);
        assert!(!String::from_utf8_lossy(&body).contains("secret"));
    }
}
