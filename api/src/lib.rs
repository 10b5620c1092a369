//! What the orchestrator, the launcher and the agent say to each other, and nothing else.
//!
//! The orchestrator and the session manager never import each other: they meet here.
//! The crate has no I/O of its own; the feature `client` adds the typed HTTP client.

pub mod agent;
#[cfg(feature = "client")]
pub mod client;
pub mod id;
#[cfg(feature = "pinned")]
pub mod pinned;
pub mod problem;
pub mod receipt;
pub mod session;

pub use id::{DesktopName, SessionId};
pub use problem::{Problem, ProblemCode};
pub use receipt::{Absence, Receipt, Removal};
pub use session::{
    CreateSession, Created, Credentials, EndReason, Failure, Heartbeat, Keep, RdpClientState,
    RdpEndpoint, Session, SessionEvent, SessionPhase, Setback, Stage, StageName, StageProgress,
};
