//! Whether the service is alive, and whether it is of use now.
//!
//! # Guarantees
//! * Alive: the store answers within [`PATIENCE`] and the dispatcher has worked within [`SILENCE`]. The watchdog and `/healthz` ask this:
//!   a process that does not do these will not get better by waiting.
//! * Ready: alive, the store takes a change, desktops can be made by every provider, and nobody is told to go away. `/readyz` asks this, for a load
//!   balancer as well: whatever the reason, the answer is 503, and another orchestrator is asked.

use crate::control::Control;
use crate::drain;
use crate::provider::CheckStatus;
use mayfly_api::{Problem, ProblemCode, SessionId};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// The store answers in milliseconds, unless its disk hangs.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// The dispatcher works every 5 s.
pub const SILENCE: Duration = Duration::from_secs(45);

/// When the dispatcher last worked.
#[derive(Debug)]
pub struct Vitals(Mutex<Instant>);

impl Default for Vitals {
    fn default() -> Self {
        Self(Mutex::new(Instant::now()))
    }
}

impl Vitals {
    /// The dispatcher has just worked.
    pub fn dispatched(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn silent_for(&self) -> Duration {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .elapsed()
    }
}

/// Whether the service is alive.
///
/// # Errors
/// Why it is not.
pub async fn alive(control: &Control) -> Result<(), Problem> {
    let shared = &control.shared;
    let ill = |why: String| Problem::new(ProblemCode::Internal, why);
    let silent = shared.vitals.silent_for();
    if silent > SILENCE {
        return Err(ill(format!(
            "the dispatcher has done nothing for {} s",
            silent.as_secs()
        )));
    }
    let answer = shared.store.events_after(SessionId::default(), 0);
    match timeout(PATIENCE, answer).await {
        Ok(Ok(_)) => Ok(()),
        // The words of the database may hold paths; the log has them.
        Ok(Err(error)) => {
            tracing::error!(%error, "the database does not answer");
            Err(ill("the database refuses to be read".to_owned()))
        }
        Err(_) => Err(ill("the database does not answer".to_owned())),
    }
}

/// Whether sessions would get their desktops now.
///
/// # Errors
/// Why not.
pub async fn ready(control: &Control) -> Result<(), Problem> {
    let of_use = is_of_use(control).await;
    of_use.map_err(|problem| Problem {
        status: 503,
        ..problem
    })
}

async fn is_of_use(control: &Control) -> Result<(), Problem> {
    let shared = &control.shared;
    if shared.stopping.is_cancelled() {
        let why = "the orchestrator is stopping";
        return Err(Problem::new(ProblemCode::ShuttingDown, why));
    }
    if shared.drain.get().is_some() {
        return Err(drain::problem());
    }
    if !shared.tenure.is_held() {
        let why = "the database was not reached for so long that other orchestrators may take over";
        return Err(Problem::new(ProblemCode::Internal, why));
    }
    alive(control).await?;
    let written = timeout(PATIENCE, shared.store.beat(shared.clock.now())).await;
    if !matches!(written, Ok(Ok(()))) {
        tracing::error!(?written, "the database takes no change");
        let why = "the database takes no change: is its disk full or read-only?";
        return Err(Problem::new(ProblemCode::Internal, why));
    }
    let checks = control.checks().await;
    let ill = checks.iter().filter(|c| c.status == CheckStatus::Error);
    let ill: Vec<_> = ill.map(|c| format!("{}: {}", c.name, c.detail)).collect();
    if ill.is_empty() {
        return Ok(());
    }
    let why = ill.join("; ");
    Err(Problem::new(ProblemCode::ProviderUnavailable, why))
}
