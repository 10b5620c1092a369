//! What the control plane remembers, as operations with an intent, each one transaction.
//!
//! # Guarantees of every store
//! * What an operation returned is durable.
//! * A change and its event are committed together; events of a session are numbered 1, 2, 3, …
//! * [`Store::update`] shows the change the latest state, and no other change comes in between.
//! * A desktop's number is never handed out twice.

pub mod machines;
pub mod memory;
pub mod postgres;
pub mod pulse;
pub mod receipts;
pub mod replicas;
pub mod sqlite;
pub mod strays;
pub mod words;
mod writer;

use crate::config::Limits;
use crate::session::{Expected, Record};
use async_trait::async_trait;
use jiff::Timestamp;
use mayfly_api::{DesktopName, SessionEvent, SessionId, StageName};
use std::collections::BTreeMap;
use std::fmt;

/// The store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database refused or could not be reached.
    #[error("the database: {0}")]
    Database(#[from] sqlx::Error),
    /// Its schema could not be brought up to date.
    #[error("the database's schema: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    /// Its schema is of an older version, and others may be using it.
    #[error("the database's schema is {0}; run: mayfly-orchestrator migrate")]
    Old(Schema),
    /// A row cannot be read.
    #[error("the database holds {what}, which this version cannot read")]
    Unreadable {
        /// The value.
        what: String,
    },
    /// All 2^28 names of desktops were used.
    #[error("no desktop name is left")]
    NoNames,
    /// A change was not written, as far as the database knows.
    #[error(
        "the database did not write it: {0}; make sure that its disk has room and can be written"
    )]
    NotWritten(String),
    /// The file is not what was written.
    #[error(
        "the database is damaged: {0}; keep the file, and put a backup in its place (docs/operations.md, Backup and restore)"
    )]
    Damaged(String),
    /// It was opened only to be read, or is closed.
    #[error("the database takes no changes: it {0}")]
    TakesNone(&'static str),
    /// A change that cannot be.
    #[error("the store refuses {0}")]
    Refused(String),
}

/// What a database's schema is, and what it is to be or was made: numbers of migrations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Schema {
    /// The last migration that was found.
    pub found: Option<i64>,
    /// The one that is wanted, or was reached.
    pub wanted: Option<i64>,
}

impl fmt::Display for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = |v: Option<i64>| v.map_or_else(|| "none".to_owned(), |v| v.to_string());
        write!(f, "{}, not {}", version(self.found), version(self.wanted))
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

/// An older copy of a database was put in its place: desktops that were made since are not in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// The last desktop that the copy knew.
    pub known: DesktopName,
    /// No desktop made before has a higher number than this one.
    pub resumed: DesktopName,
    /// When it was noticed.
    pub at: Timestamp,
}

impl Restored {
    /// More desktops than a site makes between two backups.
    const GAP: u32 = 1 << 16;

    /// Noticed now, in a database that gave numbers up to `highest`.
    fn noticed(
        before: Option<Self>,
        highest: DesktopName,
        seen: Option<DesktopName>,
        now: Timestamp,
    ) -> Self {
        let above = seen.map_or(highest, |seen| seen.max(highest)).number();
        let last = DesktopName::LIMIT - 1;
        let resumed = above.saturating_add(Self::GAP).min(last);
        Self {
            // What an earlier restore left out may still be there.
            known: before.map_or(highest, |before| before.known.min(highest)),
            resumed: DesktopName::from_number(resumed).unwrap_or(highest),
            at: now,
        }
    }

    /// It may have been made after the copy, by whoever used the database that the copy replaced.
    #[must_use]
    pub fn left_out(&self, name: DesktopName) -> bool {
        self.known < name && name <= self.resumed
    }
}

/// A change of a session. It borrows nothing: whoever asked may be gone before it is made.
pub type Changing = Box<dyn FnOnce(&mut Record) -> Change + Send>;

/// See the module.
#[async_trait]
pub trait Store:
    machines::Machines
    + pulse::Pulse
    + receipts::Receipts
    + replicas::Replicas
    + strays::Strays
    + words::Words
{
    /// Takes sessions, in their order: each unless its key came before or `max_queued` sessions wait already. All of them or none.
    /// They are this orchestrator's.
    async fn accept_all(
        &self,
        wishes: Vec<(Record, Option<Idempotency>)>,
        max_queued: u32,
    ) -> Result<Vec<Accepted>, StoreError>;

    /// The same, of one.
    async fn accept(
        &self,
        record: Record,
        idempotency: Option<Idempotency>,
        max_queued: u32,
    ) -> Result<Accepted, StoreError> {
        let accepted = self.accept_all(vec![(record, idempotency)], max_queued);
        let accepted = accepted.await?.pop();
        accepted.ok_or_else(|| StoreError::Refused("to say what became of a wish".to_owned()))
    }

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
        change: Changing,
    ) -> Result<Option<(Record, Change)>, StoreError>;

    /// Gives the session that waits longest a desktop, if the limits leave a place, and makes it this orchestrator's. Sessions of the
    /// templates in `full` go on waiting.
    async fn plan_next(
        &self,
        limits: &Limits,
        full: &[String],
        now: Timestamp,
    ) -> Result<Planned, StoreError>;

    /// Numbers the queue anew behind the place `after`, the next `count` places: those there who were told another place are told theirs.
    async fn renumber_queue(
        &self,
        after: u32,
        count: u32,
        now: Timestamp,
    ) -> Result<Numbered, StoreError>;

    /// The events of a session after `seq`, in order.
    async fn events_after(&self, id: SessionId, seq: u64) -> Result<Vec<SessionEvent>, StoreError>;

    /// Medians of the last 20 sessions of that template and provider that became ready.
    async fn expected(&self, template: &str, provider: &str) -> Result<Expected, StoreError>;

    /// The desktops of which something may exist, whatever their provider.
    async fn desktops(&self) -> Result<Vec<DesktopName>, StoreError>;

    /// Forgets sessions that were over before then; how many.
    async fn forget(&self, before: Timestamp) -> Result<u64, StoreError>;

    /// Looks whether this database is a copy that was put in the place of a later one: it says so itself, or a provider shows a
    /// desktop, `seen`, with a higher number than it ever gave. Then numbers go on far above both. The last such restore.
    async fn resume(
        &self,
        seen: Option<DesktopName>,
        now: Timestamp,
    ) -> Result<Option<Restored>, StoreError>;

    /// Ends what is under way and lets go of the database.
    async fn close(&self);
}

/// Who gets the next desktop.
#[derive(Clone, Debug)]
pub enum Planned {
    /// This session, from now on.
    Given(Box<Record>),
    /// Nobody: the limits leave no place.
    NoPlace,
    /// Nobody waits who could have it.
    Nobody,
}

impl Planned {
    /// The session that was given one.
    #[must_use]
    pub fn given(self) -> Option<Record> {
        match self {
            Self::Given(record) => Some(*record),
            Self::NoPlace | Self::Nobody => None,
        }
    }
}

/// A part of the queue that was numbered anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbered {
    /// Those who have another place now, in their order.
    pub told: Vec<Record>,
    /// Nobody waits behind this part.
    pub to_the_end: bool,
}

/// Medians of how long sessions took to be ready, and of each of their stages.
fn expected(ready: Vec<u64>, stages: BTreeMap<StageName, Vec<u64>>) -> Expected {
    Expected {
        ready: median(ready),
        stages: stages
            .into_iter()
            .filter_map(|(name, runs)| Some((name, median(runs)?)))
            .collect(),
    }
}

fn median(mut values: Vec<u64>) -> Option<u64> {
    values.sort_unstable();
    values.get(values.len().saturating_sub(1) / 2).copied()
}
