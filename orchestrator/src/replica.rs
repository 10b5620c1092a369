//! This orchestrator among those that share its database: it says that it lives, takes up what the dead leave, and stops in time.
//!
//! # Guarantees
//! * Nobody works here once the lease may be over as the database counts it: it is counted from before it was asked for, on a clock
//!   that goes on while the machine is suspended or the process stopped, and ends [`MARGIN`] early.
//! * What an orchestrator that died was working on goes on elsewhere within [`LEASE`] and two [`RENEW`]; that of one that was
//!   stopped, within one [`RENEW`]. What it owns itself and does not work for, such as after an answer that was lost, likewise. A desktop on its own machine waits for it
//!   ([`Limits::host_lost_s`](crate::config::Limits)).

use crate::control::{Control, Shared};
use crate::store::StoreError;
use crate::store::replicas::{Changed, Replica, ReplicaId};
use data_encoding::HEXLOWER;
use rustix::time::{ClockId, clock_gettime};
use sha2::{Digest, Sha256};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

/// An orchestrator that does not renew its lease for so long is dead to the others.
pub const LEASE: Duration = Duration::from_secs(20);
/// How often it is renewed, and the others looked at.
pub const RENEW: Duration = Duration::from_secs(5);
/// Work stops so long before the lease is over.
pub const MARGIN: Duration = Duration::from_secs(4);
/// Whoever was not heard for so long after its lease serves nobody any more.
pub(crate) const GONE: Duration = Duration::from_secs(600);
/// A database that does not answer for so long is asked anew.
const PATIENCE: Duration = Duration::from_secs(4);

/// Whether this process may work, and until when.
#[derive(Debug)]
pub struct Tenure(Mutex<Term>);

#[derive(Debug)]
struct Term {
    /// Since boot.
    until: Duration,
    token: CancellationToken,
}

/// Time since boot, suspension included.
fn since_boot() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default()
}

impl Tenure {
    /// For good, until the process stops.
    #[must_use]
    pub fn forever(stopping: &CancellationToken) -> Self {
        Self(Mutex::new(Term {
            until: Duration::MAX,
            token: stopping.child_token(),
        }))
    }

    /// Not yet.
    fn none(stopping: &CancellationToken) -> Self {
        let token = stopping.child_token();
        token.cancel();
        let until = Duration::ZERO;
        Self(Mutex::new(Term { until, token }))
    }

    fn term(&self) -> MutexGuard<'_, Term> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cancelled when work must stop.
    #[must_use]
    pub fn token(&self) -> CancellationToken {
        self.term().token.clone()
    }

    /// Whether something may be begun now.
    #[must_use]
    pub fn is_held(&self) -> bool {
        let term = self.term();
        if since_boot() >= term.until {
            term.token.cancel();
        }
        !term.token.is_cancelled()
    }

    /// Until then; whether it had ended before.
    fn extend(&self, until: Duration, stopping: &CancellationToken) -> bool {
        let mut term = self.term();
        let had_ended = term.token.is_cancelled() || since_boot() >= term.until;
        term.until = until;
        if had_ended {
            term.token.cancel();
            term.token = stopping.child_token();
        }
        had_ended
    }
}

/// Whose store it is: the same after a restart, another for a copy of the state folder on another machine or at another place.
#[must_use]
pub fn id(state: &Path) -> ReplicaId {
    let machine = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let state = std::fs::canonicalize(state).unwrap_or_else(|_| state.to_owned());
    let known = Sha256::new()
        .chain_update(machine.trim())
        .chain_update([0])
        .chain_update(host_name())
        .chain_update([0])
        .chain_update(state.as_os_str().as_encoded_bytes())
        .finalize();
    ReplicaId(HEXLOWER.encode(&known[..8]))
}

/// What people call this machine.
#[must_use]
pub fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname");
    name.map_or_else(|_| "localhost".to_owned(), |name| name.trim().to_owned())
}

/// Comes to the others, if there can be any; then [`live`] is to run.
///
/// # Errors
/// [`StoreError`], such as that they have another key.
pub(crate) async fn join(
    store: &dyn crate::store::Store,
    me: &Replica,
    stopping: &CancellationToken,
) -> Result<Tenure, StoreError> {
    if !store.is_shared() {
        return Ok(Tenure::forever(stopping));
    }
    let tenure = Tenure::none(stopping);
    let asked = since_boot();
    store.renew(me, LEASE).await?;
    tenure.extend(asked + LEASE - MARGIN, stopping);
    Ok(tenure)
}

/// Says that it lives, and whether it drains; whether its lease had been over before.
///
/// # Errors
/// [`StoreError`]: the others may not know it.
pub(crate) async fn say(shared: &Shared) -> Result<bool, StoreError> {
    let said = async {
        // One after the other: what was said last is what holds.
        let _saying = shared.saying.lock().await;
        let me = Replica {
            draining: shared.drain.get().is_some(),
            ..shared.me.clone()
        };
        let asked = since_boot();
        shared.store.renew(&me, LEASE).await?;
        let until = asked + LEASE - MARGIN;
        Ok(shared.tenure.extend(until, &shared.stopping))
    };
    let in_time = timeout(PATIENCE, said).await;
    in_time.map_err(|_| sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()))?
}

/// Lives among the others until the process stops.
pub(crate) async fn live(control: Control) {
    let shared = control.shared.clone();
    if !shared.store.is_shared() {
        return;
    }
    let (changes, changed) = mpsc::channel(1024);
    shared.store.follow(changes);
    tokio::select! {
        () = shared.stopping.cancelled() => {}
        () = hear(&control, changed) => {}
        () = guard(&control) => {}
        () = renew(&control) => {}
    }
}

async fn hear(control: &Control, mut changed: mpsc::Receiver<Changed>) {
    while let Some(changed) = changed.recv().await {
        match changed {
            Changed::Session(id) => control.shared.hub.wake(id),
            Changed::Any => control.shared.hub.wake_all(),
        }
    }
    std::future::pending::<()>().await;
}

/// Stops work in time.
async fn guard(control: &Control) {
    let tenure = &control.shared.tenure;
    loop {
        let until = tenure.term().until;
        sleep(
            until
                .saturating_sub(since_boot())
                .max(Duration::from_millis(100)),
        )
        .await;
        if !tenure.token().is_cancelled() && !tenure.is_held() {
            error!(
                "the database was not reached for so long that others may take over: no work is done here until it is"
            );
        }
    }
}

async fn renew(control: &Control) {
    loop {
        match say(&control.shared).await {
            Ok(was_over) => {
                if was_over {
                    info!("the database is there again: going on with what nobody else took");
                }
                match timeout(PATIENCE, take_up(control)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => warn!(%error, "not all that is its own is worked for"),
                    Err(_) => {
                        warn!(
                            "not all that is its own is worked for: the database does not answer"
                        );
                    }
                }
            }
            Err(error) => warn!(%error, "the lease was not renewed"),
        }
        sleep(RENEW).await;
    }
}

/// Takes what the dead left, and works for all that is its own: also for what it was given, or kept, in an answer that it did not hear.
async fn take_up(control: &Control) -> Result<(), StoreError> {
    let shared = &control.shared;
    let taken = shared.take_over().await?.len();
    if taken > 0 {
        warn!(
            sessions = taken,
            "taken over from orchestrators that do not answer"
        );
        shared.metrics.taken_over(taken);
        shared.queue_moved();
    }
    for id in shared.store.mine().await? {
        control.work_for(id);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ended_is_not_held_again_but_begun_anew() {
        let stopping = CancellationToken::new();
        let tenure = Tenure::none(&stopping);
        assert!(!tenure.is_held());
        assert!(tenure.extend(since_boot() + LEASE, &stopping), "it began");
        let token = tenure.token();
        assert!(tenure.is_held());
        assert!(
            !tenure.extend(since_boot() + LEASE, &stopping),
            "it went on"
        );
        assert!(!token.is_cancelled());

        tenure.term().until = since_boot();
        assert!(!tenure.is_held());
        assert!(token.is_cancelled(), "whoever works is told");
        assert!(tenure.extend(since_boot() + LEASE, &stopping));
        assert!(tenure.is_held() && token.is_cancelled(), "and stays told");
        stopping.cancel();
        assert!(!tenure.is_held());
    }

    #[test]
    fn a_folder_is_one_replica_and_another_folder_another() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        assert_eq!(id(a.path()), id(a.path()));
        assert_ne!(id(a.path()), id(b.path()));
    }
}
