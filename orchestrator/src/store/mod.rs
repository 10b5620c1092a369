//! What the control plane remembers, as operations with an intent, each one transaction.
//!
//! # Guarantees of every store
//! * What an operation returned is durable.
//! * A change and its event are committed together; events of a session are numbered 1, 2, 3, …
//! * [`Store::update`] shows the change the latest state, and no other change comes in between.
//! * A desktop's number is never handed out twice.

pub mod machines;
pub mod pulse;
pub mod receipts;
pub mod sqlite;
pub mod words;

use crate::config::Limits;
use crate::session::{Expected, Record};
use async_trait::async_trait;
use jiff::Timestamp;
use mayfly_api::{DesktopName, SessionEvent, SessionId};

/// The store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database refused or could not be reached.
    #[error("the database: {0}")]
    Database(#[from] sqlx::Error),
    /// Its schema could not be brought up to date.
    #[error("the database's schema: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    /// A row cannot be read.
    #[error("the database holds {what}, which this version cannot read")]
    Unreadable {
        /// The value.
        what: String,
    },
    /// All 2^28 names of desktops were used.
    #[error("no desktop name is left")]
    NoNames,
}

fn unreadable(what: impl std::fmt::Display) -> StoreError {
    StoreError::Unreadable {
        what: what.to_string(),
    }
}

/// What became of a wish.
#[derive(Clone, Debug)]
pub enum Accepted {
    /// A new session.
    New(Box<Record>),
    /// The same key and request came before: the first answer's event.
    Again(Box<SessionEvent>),
    /// The same key came before with another request.
    Mismatch,
    /// Too many wait.
    Full,
}

/// A key that makes a request safe to repeat, and what it was used for, both as SHA-256.
#[derive(Clone, Debug)]
pub struct Idempotency {
    /// Of the key.
    pub key_sha256: String,
    /// Of the request.
    pub request_sha256: String,
}

/// What a change did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Something that whoever follows the session is told.
    Told,
    /// Something that nobody is told.
    Quiet,
    /// Nothing.
    Nothing,
}

/// A change of a session.
pub type Changing<'a> = Box<dyn FnOnce(&mut Record) -> Change + Send + 'a>;

/// See the module.
#[async_trait]
pub trait Store: machines::Machines + pulse::Pulse + receipts::Receipts + words::Words {
    /// Takes a session, unless its key came before or `max_queued` sessions wait already.
    async fn accept(
        &self,
        record: Record,
        idempotency: Option<Idempotency>,
        max_queued: u32,
    ) -> Result<Accepted, StoreError>;

    /// What [`Store::accept`] would find for that key.
    async fn accepted_before(&self, key: &Idempotency) -> Result<Option<Accepted>, StoreError>;

    /// A session.
    async fn get(&self, id: SessionId) -> Result<Option<Record>, StoreError>;

    /// Every session that is not over, oldest first.
    async fn live(&self) -> Result<Vec<Record>, StoreError>;

    /// Changes a session; `None` if there is none. At `now` an event is written if it is to be told.
    async fn update(
        &self,
        id: SessionId,
        now: Timestamp,
        change: Changing<'_>,
    ) -> Result<Option<(Record, Change)>, StoreError>;

    /// Gives the session that waits longest a desktop, if the limits leave a place. Sessions of the templates in `full` go on waiting.
    async fn plan_next(
        &self,
        limits: &Limits,
        full: &[String],
        now: Timestamp,
    ) -> Result<Option<Record>, StoreError>;

    /// Numbers the queue anew; the sessions whose place changed.
    async fn renumber_queue(&self, now: Timestamp) -> Result<Vec<Record>, StoreError>;

    /// The events of a session after `seq`, in order.
    async fn events_after(&self, id: SessionId, seq: u64) -> Result<Vec<SessionEvent>, StoreError>;

    /// Medians of the last 20 sessions of that template and provider that became ready.
    async fn expected(&self, template: &str, provider: &str) -> Result<Expected, StoreError>;

    /// The desktops of which something may exist, whatever their provider.
    async fn desktops(&self) -> Result<Vec<DesktopName>, StoreError>;

    /// Forgets sessions that were over before then; how many.
    async fn forget(&self, before: Timestamp) -> Result<u64, StoreError>;
}
