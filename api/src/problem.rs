//! Errors on the wire: RFC 9457 problem documents with stable codes.

use serde::{Deserialize, Serialize};

/// Media type of a problem document (RFC 9457 §3).
pub const MEDIA_TYPE: &str = "application/problem+json";

/// A stable, machine-readable reason. Programs switch on this, never on the words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum ProblemCode {
    /// The request is not valid: wrong JSON, an unknown field, a value out of range.
    InvalidRequest,
    /// No secret, or not this session's.
    Unauthorized,
    /// The request comes from a web page or names a foreign host.
    Forbidden,
    /// No such thing, or not yours.
    NotFound,
    /// The path exists, the method does not.
    MethodNotAllowed,
    /// Not in this phase.
    Conflict,
    /// The body is larger than the limit.
    TooLarge,
    /// The body is not `application/json`.
    UnsupportedMediaType,
    /// The same `Idempotency-Key` came with another request.
    IdempotencyMismatch,
    /// No room for another desktop now.
    NoCapacity,
    /// The orchestrator cannot make desktops: image, emulator or disk is missing.
    ProviderUnavailable,
    /// The desktop could not be made.
    CreateFailed,
    /// A time limit passed.
    TimedOut,
    /// The orchestrator is stopping.
    ShuttingDown,
    /// An administrator has the orchestrator give out no new desktops.
    Draining,
    /// More requests at once than the orchestrator can take.
    Overloaded,
    /// A fault in the orchestrator.
    Internal,
    /// A code that this version does not know.
    #[serde(other)]
    Unknown,
}

/// An error, as `application/problem+json` carries it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[error("{title}: {detail}")]
pub struct Problem {
    /// `urn:mayfly:problem:` and the code.
    #[serde(rename = "type")]
    pub kind: String,
    /// A few words, the same for every problem with this code.
    pub title: String,
    /// The HTTP status code.
    pub status: u16,
    /// What failed, on what, and what to do.
    pub detail: String,
    /// The stable code.
    pub code: ProblemCode,
    /// Whether the same request may succeed later.
    pub retryable: bool,
}

impl Problem {
    /// A problem with the title, status and `retryable` of its code.
    #[must_use]
    pub fn new(code: ProblemCode, detail: impl Into<String>) -> Self {
        use ProblemCode as C;
        let (status, title, retryable) = match code {
            C::InvalidRequest => (400, "The request is not valid", false),
            C::Unauthorized => (401, "The session's secret is missing or wrong", false),
            C::Forbidden => (403, "Not allowed from here", false),
            C::NotFound => (404, "Not found", false),
            C::MethodNotAllowed => (405, "The method is not allowed", false),
            C::Conflict => (409, "Not possible in this phase", false),
            C::TooLarge => (413, "The body is too large", false),
            C::UnsupportedMediaType => (415, "The body must be JSON", false),
            C::IdempotencyMismatch => (
                422,
                "The Idempotency-Key was used for another request",
                false,
            ),
            C::NoCapacity => (507, "No room for another desktop", true),
            C::ProviderUnavailable => (503, "Desktops cannot be made now", true),
            C::CreateFailed => (502, "The desktop could not be made", true),
            C::TimedOut => (504, "It took too long", true),
            C::Draining => (503, "No new desktops are given out", true),
            C::Overloaded => (503, "Too many requests at once", true),
            C::ShuttingDown => (503, "The orchestrator is stopping", true),
            C::Internal | C::Unknown => (500, "The orchestrator failed", true),
        };
        let slug = serde_json::to_value(code)
            .ok()
            .and_then(|v| v.as_str().map(str::to_owned))
            .unwrap_or_default();
        Self {
            kind: format!("urn:mayfly:problem:{slug}"),
            title: title.to_owned(),
            status,
            detail: detail.into(),
            code,
            retryable,
        }
    }
}
