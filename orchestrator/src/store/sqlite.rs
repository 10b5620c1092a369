//! The store on SQLite: one file, WAL, `synchronous=FULL` (a committed change survives a power cut), one writer.
//!
//! # Guarantees
//! * Changes that wait for the disk at the same time share its flush ([`super::writer`]). What moves them from the log to their place
//!   does so beside them: they wait for the last few pages only, for a long log to begin anew.
//! * A damaged file is refused when it is opened, not used until something breaks.

use super::replicas::{ReplicaId, Replicas};
use super::writer::Writer;
use super::{Schema, Store, StoreError};
use async_trait::async_trait;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use mayfly_api::SessionId;
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::sqlite::{
    SqliteArguments, SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool,
    SqlitePoolOptions, SqliteRow, SqliteSynchronous,
};
use sqlx::{Connection as _, Sqlite, Transaction};
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::error;

/// The objects of a JSON array, one a row, as `value`.
macro_rules! rows {
    () => {
        "json_each($1)"
    };
}

/// How many sessions wait, as `queued`: their table's triggers count them.
macro_rules! queued {
    () => {
        "SELECT waiting AS queued FROM queue"
    };
}

#[path = "sql.rs"]
mod sql;

type Database = Sqlite;
type Connection = SqliteConnection;
type Row = SqliteRow;
type Arguments = SqliteArguments;
type Sql = SqliteStore;

static MIGRATIONS: Migrator = sqlx::migrate!("./migrations/sqlite");

/// Pages in the log (64 MiB) after which whoever commits moves those that nobody moved before, for the log to begin anew.
const LOG_PAGES: &str = "16384";
/// How long after a commit they are moved: a page is moved once for many commits, and still there are not many at a time.
const PAUSE: Duration = Duration::from_millis(100);

/// A query may have several statements: each is a message to the connection's thread.
const SEVERAL: bool = true;

/// The session that waits longest without a desktop; not one of the templates in a JSON array.
/// That none of them is over is said for the index of those that are not.
const NEXT: &str = "SELECT id FROM session WHERE phase IN ('queued', 'preparing') AND phase NOT IN ('ended', 'failed')
       AND NOT EXISTS (SELECT 1 FROM desktop WHERE session_id = session.id AND phase <> 'gone')
       AND template NOT IN (SELECT value FROM json_each($1))
     ORDER BY created_us, id LIMIT 1";

/// Whether this is a copy ([`SqliteStore::copy`]) that is not in use yet.
const COPIED: &str = "SELECT copied_us IS NOT NULL FROM lineage";

/// The copy is in use.
const IN_USE: &str = "UPDATE lineage SET copied_us = NULL";

/// The highest number ever given, whatever was deleted since.
const HIGHEST: &str =
    "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'desktop'), 0)";

/// See the module.
#[derive(Clone, Debug)]
pub struct SqliteStore {
    /// None: it was opened to be read.
    writer: Option<Writer>,
    mover: Option<Arc<Mover>>,
    readers: SqlitePool,
    schema: Schema,
    me: ReplicaId,
}

impl SqliteStore {
    /// Opens the database, makes it if needed, and brings its schema up to date.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Database`] or [`StoreError::Migrate`].
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .pragma("wal_autocheckpoint", LOG_PAGES)
            // What a change of more than some pages may take back would otherwise be a file, made and removed with each.
            .pragma("temp_store", "MEMORY")
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(10));
        let (db, schema) = open_writer(&options).await.map_err(damaged)?;
        let writer = Writer::start(db);
        let mover = Mover::start(
            SqliteConnection::connect_with(&options).await?,
            writer.clone(),
        );
        let readers = SqlitePoolOptions::new()
            .max_connections(4)
            .connect_with(options.read_only(true).create_if_missing(false))
            .await?;
        Ok(Self {
            writer: Some(writer),
            mover: Some(Arc::new(mover)),
            readers,
            schema,
            me: ReplicaId::one(),
        })
    }

    /// What its schema was found to be, and is.
    #[must_use]
    pub fn schema(&self) -> Schema {
        self.schema
    }

    /// Opens a database that is there, only to read it: no change is made, and the service may be using it.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn open_to_read(path: &Path) -> Result<Self, StoreError> {
        // After a crash the log must be recovered before anything can be read, which a connection that is opened read-only cannot.
        let options = SqliteConnectOptions::new()
            .filename(path)
            .pragma("query_only", "ON")
            .busy_timeout(Duration::from_secs(10));
        let readers = SqlitePoolOptions::new()
            .max_connections(1)
            .connect_with(options)
            .await?;
        Ok(Self {
            writer: None,
            mover: None,
            readers,
            schema: Schema::default(),
            me: ReplicaId::one(),
        })
    }

    /// Copies the database at `path`, which a service may be using, into a new file. Whoever uses the copy one day finds in it
    /// that it is one ([`Store::resume`](super::Store::resume)).
    ///
    /// # Errors
    /// [`StoreError::Database`]; [`StoreError::Refused`] if there is such a file, or it cannot be made.
    pub async fn copy(path: &Path, to: &Path, now: Timestamp) -> Result<(), StoreError> {
        // For nobody else to read; SQLite fills a file that is there and empty.
        File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(to)
            .map_err(|why| StoreError::Refused(format!("to copy into {}: {why}", to.display())))?;
        let copied = copy(path, to, now).await;
        if copied.is_err() {
            // Half a copy is none. That it could not be made is what matters.
            let _ = std::fs::remove_file(to);
        }
        copied
    }

    /// Makes an intent; durable when this returns.
    async fn write<T: Send + 'static>(
        &self,
        intent: impl for<'c> FnOnce(&'c mut Connection) -> BoxFuture<'c, Result<T, StoreError>>
        + Send
        + 'static,
    ) -> Result<T, StoreError> {
        match &self.writer {
            Some(writer) => writer.write(intent).await,
            None => Err(StoreError::TakesNone("was opened to be read")),
        }
    }

    /// A transaction that sees one moment.
    async fn reading(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        Ok(self.readers.begin().await?)
    }

    /// Makes what waits, and lets go of the file.
    pub async fn close(&self) {
        self.readers.close().await;
        if let Some(mover) = &self.mover {
            mover.close().await;
        }
        if let Some(writer) = &self.writer {
            writer.close().await;
        }
    }
}

/// Moves what was committed from the log into the database's file, soon after; ends with the store.
#[derive(Debug)]
struct Mover {
    closing: CancellationToken,
    task: Mutex<JoinSet<()>>,
}

impl Mover {
    fn start(mut db: SqliteConnection, writer: Writer) -> Self {
        let (closing, mut task) = (CancellationToken::new(), JoinSet::new());
        let closed = closing.clone();
        task.spawn(async move {
            let committed = async || {
                writer.committed().await;
                tokio::time::sleep(PAUSE).await;
            };
            while closed.run_until_cancelled(committed()).await.is_some() {
                let moved = sqlx::query("PRAGMA wal_checkpoint(PASSIVE)").execute(&mut db);
                if let Err(error) = moved.await {
                    // Where it is as durable. Changes that fail say so themselves; a log that only grows does not.
                    error!(%error, "what was committed stays in the database's log; make sure that its disk has room and can be written");
                }
            }
            // The last who closes leaves the whole in one file.
            let _ = db.close().await;
        });
        let task = Mutex::new(task);
        Self { closing, task }
    }

    async fn close(&self) {
        self.closing.cancel();
        let task = std::mem::take(&mut *self.task.lock().unwrap_or_else(PoisonError::into_inner));
        task.join_all().await;
    }
}

/// Copies into an empty file, and says there that it is a copy.
async fn copy(path: &Path, to: &Path, now: Timestamp) -> Result<(), StoreError> {
    let options = SqliteConnectOptions::new().busy_timeout(Duration::from_secs(10));
    let mut db = SqliteConnection::connect_with(&options.clone().filename(path)).await?;
    sqlx::query("VACUUM INTO $1")
        .bind(to.to_string_lossy().into_owned())
        .execute(&mut db)
        .await?;
    db.close().await?;
    let mut copy = SqliteConnection::connect_with(&options.filename(to)).await?;
    sqlx::query("UPDATE lineage SET copied_us = $1")
        .bind(now.as_microsecond())
        .execute(&mut copy)
        .await?;
    copy.close().await?;
    Ok(())
}

/// A connection to a database that is sound and up to date, and what was found.
async fn open_writer(
    options: &SqliteConnectOptions,
) -> Result<(SqliteConnection, Schema), StoreError> {
    let mut db = SqliteConnection::connect_with(options).await?;
    let said: Vec<String> = sqlx::query_scalar("PRAGMA quick_check(3)")
        .fetch_all(&mut db)
        .await?;
    if said != ["ok"] {
        return Err(StoreError::Damaged(said.join("; ")));
    }
    let found = version(&mut db).await?;
    MIGRATIONS.run(&mut db).await?;
    let wanted = version(&mut db).await?;
    Ok((db, Schema { found, wanted }))
}

/// What SQLite says of a file that is damaged or is none of its own, as that.
fn damaged(error: StoreError) -> StoreError {
    const CORRUPT: i32 = 11;
    const NOT_A_DATABASE: i32 = 26;
    let cause = match &error {
        StoreError::Database(cause) => Some(cause),
        StoreError::Migrate(
            MigrateError::Execute(cause) | MigrateError::ExecuteMigration(cause, _),
        ) => Some(cause),
        _ => None,
    };
    let code = cause
        .and_then(|e| e.as_database_error()?.code()?.parse::<i32>().ok())
        .map(|extended| extended & 0xff);
    match code {
        Some(CORRUPT | NOT_A_DATABASE) => StoreError::Damaged(error.to_string()),
        _ => error,
    }
}

/// The last migration that the database has.
async fn version(db: &mut Connection) -> Result<Option<i64>, StoreError> {
    let there: bool = sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = '_sqlx_migrations')",
    )
    .fetch_one(&mut *db)
    .await?;
    if !there {
        return Ok(None);
    }
    let version = sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations WHERE success");
    Ok(version.fetch_one(db).await?)
}

/// There is one writer: it is always alone.
async fn alone(_: &mut Connection, _: &str) -> Result<(), StoreError> {
    Ok(())
}

/// There is nobody else who would have to know.
async fn tell(_: &mut Connection, _: SessionId) -> Result<(), StoreError> {
    Ok(())
}

/// The same of several.
async fn tell_all(_: &mut Connection, _: &str) -> Result<(), StoreError> {
    Ok(())
}

/// There is one writer: what it reads stays as it is.
async fn hold(_: &mut Connection, _: SessionId) -> Result<(), StoreError> {
    Ok(())
}

/// As [`hold`], of all whose `id` is in a JSON array of objects.
async fn hold_all(_: &mut Connection, _: &str) -> Result<(), StoreError> {
    Ok(())
}

/// A number that nobody has or had.
async fn next_number(db: &mut Connection) -> Result<i64, StoreError> {
    let highest: i64 = sqlx::query_scalar(HIGHEST).fetch_one(db).await?;
    Ok(highest + 1)
}

/// Numbers go on above this one.
async fn go_on_above(db: &mut Connection, number: i64) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM sqlite_sequence WHERE name = 'desktop'")
        .execute(&mut *db)
        .await?;
    sqlx::query("INSERT INTO sqlite_sequence (name, seq) VALUES ('desktop', $1)")
        .bind(number)
        .execute(db)
        .await?;
    Ok(())
}

#[async_trait]
impl Replicas for SqliteStore {
    fn me(&self) -> &ReplicaId {
        &self.me
    }

    async fn mine(&self) -> Result<Vec<SessionId>, StoreError> {
        let live = self.live().await?;
        Ok(live.into_iter().map(|r| r.id).collect())
    }
}
