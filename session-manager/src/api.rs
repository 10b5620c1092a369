//! What can go wrong with the orchestrator, as the core needs to know it, with words for the person.

use crate::view::Message;
use mayfly_api::ProblemCode;
use mayfly_api::client::ClientError;
use std::fmt;

/// A failed call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiTrouble {
    /// What failed, in the words of the client or the orchestrator.
    pub words: String,
    /// The sort.
    pub kind: ApiTroubleKind,
    /// Whether the same call may succeed later.
    pub retryable: bool,
    /// Whether the orchestrator may have done it all the same.
    pub certainty: Certainty,
}

/// The sort of a failed call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApiTroubleKind {
    /// Nobody answered.
    Unreachable,
    /// Somebody else answered.
    NotAnOrchestrator,
    /// The address is not one.
    InvalidAddress,
    /// The orchestrator refused.
    Problem(ProblemCode),
}

/// Whether a failed call may have had its effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Certainty {
    /// It had none.
    NotDone,
    /// It may have had it: the answer was lost.
    MayBeDone,
}

impl fmt::Display for ApiTrouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words)
    }
}

impl From<ClientError> for ApiTrouble {
    fn from(error: ClientError) -> Self {
        let (kind, certainty) = match &error {
            ClientError::Problem(problem) => {
                use ProblemCode as C;
                let maybe = matches!(problem.code, C::Internal | C::TimedOut | C::Unknown);
                let certainty = if maybe {
                    Certainty::MayBeDone
                } else {
                    Certainty::NotDone
                };
                (ApiTroubleKind::Problem(problem.code), certainty)
            }
            ClientError::Unreachable { source, .. } if source.is_connect() => {
                (ApiTroubleKind::Unreachable, Certainty::NotDone)
            }
            ClientError::Unreachable { .. } => (ApiTroubleKind::Unreachable, Certainty::MayBeDone),
            ClientError::NotAnOrchestrator { .. } => {
                (ApiTroubleKind::NotAnOrchestrator, Certainty::MayBeDone)
            }
            ClientError::InvalidAddress(_) => (ApiTroubleKind::InvalidAddress, Certainty::NotDone),
        };
        let retryable = error.is_retryable();
        let words = match error {
            // reqwest repeats the address and hides the reason ("connection refused") at the end of the causes.
            ClientError::Unreachable { url, source } => {
                let mut cause: &dyn std::error::Error = &source;
                while let Some(inner) = cause.source() {
                    cause = inner;
                }
                format!("the orchestrator at {url} cannot be reached: {cause}")
            }
            other => other.to_string(),
        };
        Self {
            words,
            kind,
            retryable,
            certainty,
        }
    }
}

impl ApiTrouble {
    /// The session does not exist any more, or was never ours.
    #[must_use]
    pub fn says_gone(&self) -> bool {
        matches!(
            self.kind,
            ApiTroubleKind::Problem(ProblemCode::NotFound | ProblemCode::Unauthorized)
        )
    }

    /// Headline and what to do, when a desktop was asked for at `address`.
    #[must_use]
    pub fn words(&self, address: &str) -> (Message, Message) {
        match &self.kind {
            ApiTroubleKind::Unreachable => (
                Message::new("error-unreachable"),
                Message::new("error-unreachable-hint").text("address", address),
            ),
            ApiTroubleKind::NotAnOrchestrator | ApiTroubleKind::InvalidAddress => (
                Message::new("error-not-an-orchestrator"),
                Message::new("error-not-an-orchestrator-hint").text("address", address),
            ),
            ApiTroubleKind::Problem(code) => (
                Message::new(match code {
                    ProblemCode::NoCapacity => "error-no-capacity",
                    ProblemCode::ProviderUnavailable => "error-provider",
                    ProblemCode::ShuttingDown => "error-shutting-down",
                    _ => "error-refused",
                }),
                Message::new("error-refused-hint").text("detail", &self.words),
            ),
        }
    }
}
