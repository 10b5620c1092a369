//! Which orchestrators share the store, and which of them works for which session.
//!
//! # Guarantees
//! * A session has at most one owner. Its `fence` grows with every new one, and whoever works for it commits only under the fence
//!   that it took the session with ([`Record::fence`](crate::session::Record::fence)).
//! * An owner is followed by another only once its lease is over, or it gave that up. Both are told by the database's clock alone.
//! * A desktop on the machine of one orchestrator is given to another only long after that was last seen.

use super::StoreError;
use async_trait::async_trait;
use jiff::Timestamp;
use mayfly_api::SessionId;
use std::fmt;
use std::time::Duration;
use tokio::sync::mpsc;

/// An orchestrator, by its state folder: the process that is started there next is the same one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReplicaId(pub String);

impl ReplicaId {
    /// The one that has the store for itself.
    #[must_use]
    pub fn one() -> Self {
        Self("one".to_owned())
    }
}

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What an orchestrator says of itself to those that share the store with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Which.
    pub id: ReplicaId,
    /// For people, such as its host's name.
    pub name: String,
    /// Of the key that its secrets come from ([`Secrets::installation`](crate::secret::Secrets::installation)).
    pub installation: String,
    /// It gives no places, and those who wait are to get theirs from others.
    pub draining: bool,
}

/// Something was changed by another orchestrator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// This session.
    Session(SessionId),
    /// Any of them: some may have been missed.
    Any,
}

/// See the module. A store that nobody else uses has one owner, whose lease is never over.
#[async_trait]
pub trait Replicas: Send + Sync + 'static {
    /// Who this store is opened for.
    fn me(&self) -> &ReplicaId;

    /// Whether others may use it at the same time.
    fn is_shared(&self) -> bool {
        false
    }

    /// Lives on, for so long from now.
    ///
    /// # Errors
    /// [`StoreError::Refused`] if the others have another key.
    async fn renew(&self, _: &Replica, _lease: Duration) -> Result<(), StoreError> {
        Ok(())
    }

    /// Takes the live sessions that nobody works for, and those that have a desktop of a provider in `bound` on this machine. One
    /// with such a desktop elsewhere is taken only when its host was not seen for `patience` after its lease.
    async fn take_over(
        &self,
        _bound: &[&'static str],
        _patience: Duration,
    ) -> Result<Vec<SessionId>, StoreError> {
        Ok(Vec::new())
    }

    /// The live sessions that it works for, oldest first.
    async fn mine(&self) -> Result<Vec<SessionId>, StoreError>;

    /// Gives its lease up.
    async fn leave(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// Whether another gives places: any that does not drain, and was heard within `patience` of the end of its lease.
    async fn others_give(&self, _patience: Duration) -> Result<bool, StoreError> {
        Ok(false)
    }

    /// Every one that lives.
    async fn living(&self) -> Result<Vec<Replica>, StoreError> {
        Ok(Vec::new())
    }

    /// The clock that leases are counted by, if it is not this process's.
    async fn clock(&self) -> Result<Option<Timestamp>, StoreError> {
        Ok(None)
    }

    /// What an orchestrator is called, alive or not.
    async fn called(&self, _: &ReplicaId) -> Result<Option<String>, StoreError> {
        Ok(None)
    }

    /// Says what others change, until the receiver is dropped. A hint: the rows are the truth.
    fn follow(&self, _: mpsc::Sender<Changed>) {}
}
