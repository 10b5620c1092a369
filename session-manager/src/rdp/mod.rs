//! The person's RDP client: found, turned into a command, watched.

mod end;
mod find;
mod freerdp;
mod microsoft;
mod run;
#[cfg(windows)]
mod windows;

pub use end::{ClientEnd, end_of_freerdp};
pub use find::{Client, Flavour, find};
pub use freerdp::{Command, freerdp_command};
pub use microsoft::{MacPlan, MstscPlan, macos_plan, mstsc_plan};
pub use run::{Running, start};

use crate::view::Message;

/// Why no client could be started.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientTrouble {
    /// None is installed.
    #[error("no RDP client was found; looked for {looked_for}")]
    NotFound {
        /// The names tried.
        looked_for: String,
    },
    /// The one in the settings cannot be used.
    #[error("the RDP client {path} cannot be used: {reason}")]
    Unusable {
        /// Its path.
        path: String,
        /// Why.
        reason: String,
    },
    /// The operating system did not start it.
    #[error("the RDP client {path} could not be started: {reason}")]
    NotStarted {
        /// Its path.
        path: String,
        /// Why.
        reason: String,
    },
}

impl ClientTrouble {
    /// Headline and what to do.
    #[must_use]
    pub fn words(&self) -> (Message, Message) {
        match self {
            Self::NotFound { .. } => (
                Message::new("error-no-client"),
                Message::new(if cfg!(target_os = "macos") {
                    "error-no-client-hint-macos"
                } else {
                    "error-no-client-hint"
                }),
            ),
            Self::Unusable { path, reason } | Self::NotStarted { path, reason } => (
                Message::new("error-client-start"),
                Message::new("error-client-start-hint")
                    .text("client", path)
                    .text("reason", reason),
            ),
        }
    }
}
