//! Reading what a caller sends: JSON objects, of bounded size, with no field that is not known.

use crate::control::Refused;
use axum::body::to_bytes;
use axum::extract::{FromRequest, Request};
use axum::http::header;
use mayfly_api::ProblemCode;
use serde::de::DeserializeOwned;

/// Largest body, in bytes.
pub(super) const LIMIT: usize = 64 * 1024;

/// A JSON object as the body.
pub(super) struct Object<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Object<T> {
    type Rejection = Refused;

    async fn from_request(request: Request, _: &S) -> Result<Self, Refused> {
        let is_json = request
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|v| v.to_str().ok())
            .and_then(|v| v.split(';').next())
            .is_some_and(|v| v.trim().eq_ignore_ascii_case("application/json"));
        if !is_json {
            return Err(Refused::new(
                ProblemCode::UnsupportedMediaType,
                "send the body as Content-Type: application/json",
            ));
        }
        let too_large = || {
            Refused::new(
                ProblemCode::TooLarge,
                format!("a body of at most {LIMIT} bytes is taken"),
            )
        };
        let announced = request
            .headers()
            .get(header::CONTENT_LENGTH)
            .and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|length| length > LIMIT as u64) {
            return Err(too_large());
        }
        let invalid = |what: String| Refused::new(ProblemCode::InvalidRequest, what);
        let bytes = to_bytes(request.into_body(), LIMIT).await.map_err(|e| {
            let mut cause: Option<&dyn std::error::Error> = Some(&e);
            while let Some(error) = cause {
                if error.is::<http_body_util::LengthLimitError>() {
                    return too_large();
                }
                cause = error.source();
            }
            invalid("the body ended too early".to_owned())
        })?;
        // serde reads a struct from an array too; the API takes objects only.
        if bytes.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'{') {
            return Err(invalid("the body must be a JSON object".to_owned()));
        }
        serde_json::from_slice(&bytes)
            .map(Self)
            .map_err(|e| invalid(format!("the body: {e}")))
    }
}
