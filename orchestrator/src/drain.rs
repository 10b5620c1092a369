//! Draining: no new sessions, until those that there are have ended. For a shutdown, or before Mayfly is removed from a machine.
//!
//! # Guarantees
//! * It is written down before it counts, so a service that is started again goes on draining, until it is told to stop that.
//! * A session that has its desktop, or whose desktop is being made, keeps it; one that waits in the queue is told, unless another
//!   orchestrator that shares the database, and does not drain, gives it a place. One that was not heard for some minutes is not waited for.
//! * Whoever shares the database knows before an administrator is answered, and no place is given any more.

use crate::control::Shared;
use crate::desktop::NotNow;
use crate::failpoints;
use crate::replica;
use crate::session::Record;
use crate::store::{Change, Store, StoreError};
use mayfly_api::{EndReason, Problem, ProblemCode, SessionPhase};
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tracing::info;

/// What becomes of the sessions that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rest {
    /// They go on until they end by themselves.
    Wait,
    /// They are ended now.
    End,
}

/// Whether the service drains.
#[derive(Debug)]
pub struct Drain {
    file: PathBuf,
    now: Mutex<Option<Rest>>,
}

impl Drain {
    /// As it was left in that folder.
    #[must_use]
    pub fn open(folder: &Path) -> Self {
        let file = folder.join("drain");
        // A word that cannot be read is still a word to drain.
        let now = std::fs::read_to_string(&file).ok().map(|word| {
            if word.trim() == "end" {
                Rest::End
            } else {
                Rest::Wait
            }
        });
        Self {
            file,
            now: Mutex::new(now),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Rest>> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it drains.
    #[must_use]
    pub fn get(&self) -> Option<Rest> {
        *self.lock()
    }

    /// Drains from now on, or does not.
    ///
    /// # Errors
    /// If that cannot be written down; then nothing changes.
    pub fn set(&self, rest: Option<Rest>) -> std::io::Result<()> {
        let mut now = self.lock();
        failpoints::between(
            || "drain".to_owned(),
            || match rest {
                Some(Rest::Wait) => std::fs::write(&self.file, "wait\n"),
                Some(Rest::End) => std::fs::write(&self.file, "end\n"),
                None => match std::fs::remove_file(&self.file) {
                    Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
                    _ => Ok(()),
                },
            },
        )?;
        *now = rest;
        Ok(())
    }
}

/// The live sessions that are this orchestrator's to see to the end, the oldest first. Others that share the database look after their
/// own, and give desktops to those who wait for one, unless they drain as well.
///
/// # Errors
/// See [`StoreError`].
pub async fn left(store: &dyn Store) -> Result<Vec<Record>, StoreError> {
    let mut live = store.live().await?;
    if store.is_shared() {
        let others_give = store.others_give(replica::GONE).await?;
        live.retain(|record| {
            if record.needs_desktop() {
                !others_give
            } else {
                record.owner.as_ref() == Some(store.me())
            }
        });
    }
    Ok(live)
}

/// What whoever asks for a desktop, or waits for one, is told.
#[must_use]
pub fn problem() -> Problem {
    Problem::new(
        ProblemCode::Draining,
        "an administrator has the orchestrator give out no new desktops for now; ask again later",
    )
}

/// Tells the sessions that wait, and ends the others if that is wanted.
///
/// # Errors
/// See [`StoreError`].
pub async fn work(shared: &Shared, rest: Rest) -> Result<(), StoreError> {
    let now = shared.clock.now();
    let shared_store = shared.store.is_shared();
    // One that has the database for itself goes on with what it has begun.
    let waits = move |record: &Record| match shared_store {
        true => record.needs_desktop(),
        false => record.phase == SessionPhase::Queued,
    };
    for record in left(&*shared.store).await? {
        let waited = waits(&record);
        if !waited && rest == Rest::Wait {
            continue;
        }
        let done = shared.update(record.id, move |record| {
            // It may have got a desktop meanwhile.
            let changed = match waits(record) {
                true => record.fail(problem(), now),
                false if waited => Err(NotNow),
                false => record.end(EndReason::Requested, now),
            };
            changed.map_or(Change::Nothing, |()| Change::Told)
        });
        if let Some((_, Change::Told)) = done.await? {
            info!(session = %record.id, "ends, since no desktops are given out any more");
        }
    }
    Ok(())
}
