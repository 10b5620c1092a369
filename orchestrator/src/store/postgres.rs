//! The store on PostgreSQL: for several orchestrators, or for a site that has one.
//!
//! # Guarantees
//! * A change locks the rows it is about; those that count before they write (places, the queue, clones on a storage) come one at a
//!   time over all orchestrators, by an advisory lock that ends with their transaction. So at `READ COMMITTED` nothing fails because
//!   of another's change.
//! * A connection that was lost is noticed before it is used, and replaced. One that is lost in the middle of a change is told: the
//!   change was made whole or not at all, and whoever asked looks again.
//! * Orchestrators hear of each other's changes by LISTEN and NOTIFY. Whoever may have missed one is told that as well.
//! * The schema is brought up to date by `migrate` alone, under a lock: `serve` refuses an older one, so that an administrator says
//!   when. A newer one is taken, since two versions run side by side while a site is upgraded; migrations take
//!   away nothing that an older version reads or writes.

use super::replicas::{Changed, Replica, ReplicaId, Replicas};
use super::{Schema, StoreError};
use crate::failpoints::around;
use crate::secret;
use async_trait::async_trait;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use mayfly_api::SessionId;
use secrecy::ExposeSecret;
use serde::Deserialize;
use sqlx::migrate::Migrator;
use sqlx::postgres::{
    PgArguments, PgConnectOptions, PgConnection, PgListener, PgPool, PgPoolOptions, PgRow, Postgres,
};
use sqlx::{Connection as _, Transaction};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use tokio::sync::mpsc;
use tracing::debug;

/// The objects of a JSON array, one a row, as `value`.
macro_rules! rows {
    () => {
        "json_array_elements($1::json) AS rows(value)"
    };
}

/// How many sessions wait, as `queued`. One number that all change would make them wait for each other.
macro_rules! queued {
    () => {
        "SELECT count(*) AS queued FROM session WHERE phase = 'queued'"
    };
}

#[path = "sql.rs"]
#[expect(clippy::duplicate_mod, reason = "the same words on both databases")]
mod sql;

type Database = Postgres;
type Connection = PgConnection;
type Row = PgRow;
type Arguments = PgArguments;
type Sql = PostgresStore;

/// A newer version may have added some.
fn migrations() -> Migrator {
    let mut migrations = sqlx::migrate!("./migrations/postgres");
    migrations.set_ignore_missing(true);
    migrations
}

/// A query with arguments is one statement.
const SEVERAL: bool = false;

/// The session that waits longest without a desktop, of those that nobody changes now; not one of the templates in a JSON array.
/// That none of them is over is said for the index of those that are not.
const NEXT: &str = "SELECT id FROM session WHERE phase IN ('queued', 'preparing') AND phase NOT IN ('ended', 'failed')
       AND NOT EXISTS (SELECT 1 FROM desktop WHERE session_id = session.id AND phase <> 'gone')
       AND template NOT IN (SELECT json_array_elements_text($1::json))
     ORDER BY created_us, id LIMIT 1 FOR UPDATE SKIP LOCKED";

/// Whether this is a copy that was restored and is not in use yet: tables and servers have names of their own, which a dump has not.
const COPIED: &str = "SELECT identity <> (SELECT system_identifier FROM pg_control_system()) || '/' || 'lineage'::regclass::oid
     FROM lineage";

/// The copy is in use.
const IN_USE: &str = "UPDATE lineage SET identity =
     (SELECT system_identifier FROM pg_control_system()) || '/' || 'lineage'::regclass::oid";

/// The highest number ever given.
const HIGHEST: &str =
    "SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END FROM desktop_number";

/// Locks of ours among a database's advisory ones.
const LOCKS: i32 = 0x6d66_6c79;
/// A database that does not answer is told after this.
const PATIENCE: Duration = Duration::from_secs(10);
/// Whoever says nothing for so long in the middle of a change is given up by the server, so that what they hold is free: an
/// orchestrator that is stopped or cut off must not hold up those that take over from it.
const ABANDONED: &str = "5s";
/// An orchestrator uses so many connections.
const CONNECTIONS: u32 = 16;

/// `[store]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreConfig {
    /// `postgres://user@host/database`; without it the store is SQLite, in the state folder.
    pub url: String,
    /// A file of mode 0600 with the user's password. Without it `PGPASSWORD` or none.
    pub password_file: Option<PathBuf>,
}

impl StoreConfig {
    /// What is wrong with the URL, and what is allowed.
    #[must_use]
    pub fn wrong(&self) -> Option<&'static str> {
        if self.url.is_empty() {
            return None;
        }
        let scheme = ["postgres://", "postgresql://"];
        let Some(rest) = scheme.iter().find_map(|s| self.url.strip_prefix(s)) else {
            return Some("a URL such as postgres://mayfly@db.example/mayfly is needed");
        };
        let authority = rest.split(['/', '?']).next().unwrap_or_default();
        let in_user = authority
            .rsplit_once('@')
            .is_some_and(|(user, _)| user.contains(':'));
        (in_user || rest.contains("password="))
            .then_some("a password here could be seen by others: put it into a file, and name that in store.password_file")
    }

    /// Whether it is PostgreSQL.
    #[must_use]
    pub fn is_postgres(&self) -> bool {
        !self.url.is_empty()
    }

    /// Where to connect, with the password that is read now.
    ///
    /// # Errors
    /// What is wrong with the settings.
    pub fn open(&self) -> anyhow::Result<PgConnectOptions> {
        use anyhow::Context;
        let options = PgConnectOptions::from_str(&self.url).context("store.url")?;
        Ok(match &self.password_file {
            Some(file) => {
                let password = secret::from_file(file).context("store.password_file")?;
                options.password(password.expose_secret())
            }
            None => options,
        })
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct PostgresStore {
    readers: PgPool,
    me: ReplicaId,
}

impl PostgresStore {
    /// Connects to a database whose schema is up to date, for that orchestrator.
    ///
    /// # Errors
    /// [`StoreError::Database`], or [`StoreError::Old`] if it is of an older version.
    pub async fn open(options: PgConnectOptions, me: ReplicaId) -> Result<Self, StoreError> {
        let options = options
            .application_name("mayfly-orchestrator")
            .options([("idle_in_transaction_session_timeout", ABANDONED)]);
        // By itself: a pool would say of every cause only that it took too long.
        let mut db = PgConnection::connect_with(&options).await?;
        let found = version(&mut db).await?;
        db.close().await?;
        let wanted = migrations().iter().map(|m| m.version).max();
        if found < wanted {
            return Err(StoreError::Old(Schema { found, wanted }));
        }
        let readers = PgPoolOptions::new()
            .max_connections(CONNECTIONS)
            .acquire_timeout(PATIENCE)
            .connect_with(options)
            .await?;
        Ok(Self { readers, me })
    }

    /// Brings the schema up to date, one process at a time; what it was and is.
    ///
    /// # Errors
    /// [`StoreError::Database`] or [`StoreError::Migrate`].
    pub async fn migrate(options: &PgConnectOptions) -> Result<Schema, StoreError> {
        let mut db = PgConnection::connect_with(options).await?;
        let found = version(&mut db).await?;
        migrations().run(&mut db).await?;
        let wanted = version(&mut db).await?;
        db.close().await?;
        Ok(Schema { found, wanted })
    }

    /// Runs an intent as one transaction; durable when this returns.
    async fn write<T: Send + 'static>(
        &self,
        intent: impl for<'c> FnOnce(&'c mut Connection) -> BoxFuture<'c, Result<T, StoreError>>
        + Send
        + 'static,
    ) -> Result<T, StoreError> {
        let begin = "BEGIN ISOLATION LEVEL READ COMMITTED";
        let mut tx = self.readers.begin_with(begin).await?;
        let done = intent(&mut tx).await?;
        tx.commit().await?;
        Ok(done)
    }

    /// A transaction that sees one moment.
    async fn reading(&self) -> Result<Transaction<'static, Postgres>, StoreError> {
        let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
        Ok(self.readers.begin_with(begin).await?)
    }

    /// Lets go of every connection, once it is not used.
    pub async fn close(&self) {
        self.readers.close().await;
    }
}

/// The last migration that the database has.
async fn version(db: &mut Connection) -> Result<Option<i64>, StoreError> {
    let there: bool = sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations') IS NOT NULL")
        .fetch_one(&mut *db)
        .await?;
    if !there {
        return Ok(None);
    }
    Ok(
        sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations WHERE success")
            .fetch_one(db)
            .await?,
    )
}

/// Nobody else does the same until the transaction ends.
async fn alone(db: &mut Connection, what: &str) -> Result<(), StoreError> {
    sqlx::query("SELECT pg_advisory_xact_lock($1, hashtext($2))")
        .bind(LOCKS)
        .bind(what)
        .execute(db)
        .await?;
    Ok(())
}

/// Nobody else changes the session until the transaction ends.
async fn hold(db: &mut Connection, id: SessionId) -> Result<(), StoreError> {
    sqlx::query("SELECT 1 FROM session WHERE id = $1 FOR UPDATE")
        .bind(id.to_string())
        .execute(db)
        .await?;
    Ok(())
}

/// As [`hold`], of all whose `id` is in a JSON array of objects.
async fn hold_all(db: &mut Connection, ids: &str) -> Result<(), StoreError> {
    let all = concat!(
        "SELECT 1 FROM session WHERE id IN (SELECT value->>'id' FROM ",
        rows!(),
        ") ORDER BY created_us, id FOR UPDATE"
    );
    sqlx::query(all).bind(ids.to_owned()).execute(db).await?;
    Ok(())
}

/// The channel on which orchestrators tell each other what they changed: `<session>`, or nothing as a sign of life.
const CHANNEL: &str = "mayfly_changed";

/// As [`tell`], of all whose `id` is in a JSON array of objects.
async fn tell_all(db: &mut Connection, ids: &str) -> Result<(), StoreError> {
    let all = concat!("SELECT pg_notify($2, value->>'id') FROM ", rows!());
    let all = sqlx::query(all).bind(ids.to_owned()).bind(CHANNEL);
    all.execute(db).await?;
    Ok(())
}

/// Everybody who follows the session looks at it once the transaction is committed.
async fn tell(db: &mut Connection, id: SessionId) -> Result<(), StoreError> {
    sqlx::query("SELECT pg_notify($1, $2)")
        .bind(CHANNEL)
        .bind(id.to_string())
        .execute(db)
        .await?;
    Ok(())
}

/// A number that nobody has or had.
async fn next_number(db: &mut Connection) -> Result<i64, StoreError> {
    let next = sqlx::query_scalar("SELECT nextval('desktop_number')");
    Ok(next.fetch_one(db).await?)
}

/// Numbers go on above this one.
async fn go_on_above(db: &mut Connection, number: i64) -> Result<(), StoreError> {
    let set = sqlx::query("SELECT setval('desktop_number', $1)");
    set.bind(number).execute(db).await?;
    Ok(())
}

/// Now by the server's clock, as [`Replicas::renew`] counts: microseconds since 1970.
macro_rules! now {
    () => {
        "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
    };
}

const NOW: &str = concat!("SELECT ", now!());

/// A listener that hears nothing for so long has lost its connection: each orchestrator says something more often.
const SILENCE: Duration = Duration::from_secs(15);
/// So many sessions change hands in one transaction.
const AT_A_TIME: usize = 500;

#[async_trait]
impl Replicas for PostgresStore {
    fn me(&self) -> &ReplicaId {
        &self.me
    }

    fn is_shared(&self) -> bool {
        true
    }

    async fn renew(&self, replica: &Replica, lease: Duration) -> Result<(), StoreError> {
        let replica = replica.clone();
        let renewed = self.write(move |db| Box::pin(renew(db, replica, micros(lease))));
        around("commit renew", renewed).await
    }

    async fn take_over(
        &self,
        bound: &[&'static str],
        patience: Duration,
    ) -> Result<Vec<SessionId>, StoreError> {
        let bound: Vec<_> = bound.iter().map(|kind| (*kind).to_owned()).collect();
        let mut all = Vec::new();
        loop {
            let (me, bound) = (self.me.clone(), bound.clone());
            let taken = self.write(move |db| Box::pin(take_over(db, me, bound, micros(patience))));
            let taken = around("commit take over", taken).await?;
            let there_may_be_more = taken.len() == AT_A_TIME;
            all.extend(taken);
            if !there_may_be_more {
                return Ok(all);
            }
        }
    }

    async fn mine(&self) -> Result<Vec<SessionId>, StoreError> {
        let ids: Vec<String> = sqlx::query_scalar(
            "SELECT id FROM session WHERE owner = $1 AND phase NOT IN ('ended', 'failed') ORDER BY created_us, id",
        )
        .bind(&self.me.0)
        .fetch_all(&self.readers)
        .await?;
        ids.iter().map(|id| session(id)).collect()
    }

    async fn leave(&self) -> Result<(), StoreError> {
        let left = sqlx::query(concat!(
            "UPDATE replica SET until_us = left_us, draining_us = CASE WHEN draining_us = until_us THEN left_us END
             FROM (SELECT ",
            now!(),
            " - 1 AS left_us) AS moment WHERE id = $1"
        ));
        let left = left.bind(&self.me.0).execute(&self.readers);
        around("commit leave", left).await?;
        Ok(())
    }

    async fn others_give(&self, patience: Duration) -> Result<bool, StoreError> {
        let give = sqlx::query_scalar(concat!(
            "SELECT EXISTS (SELECT 1 FROM replica
             WHERE id <> $1 AND draining_us IS DISTINCT FROM until_us AND until_us + $2 >= ",
            now!(),
            ")"
        ));
        let give = give.bind(&self.me.0).bind(micros(patience));
        Ok(give.fetch_one(&self.readers).await?)
    }

    async fn living(&self) -> Result<Vec<Replica>, StoreError> {
        let rows: Vec<(String, String, String, bool)> = sqlx::query_as(concat!(
            "SELECT id, name, installation, draining_us IS NOT DISTINCT FROM until_us FROM replica WHERE until_us >= ",
            now!(),
            " ORDER BY id"
        ))
        .fetch_all(&self.readers)
        .await?;
        let replica = |(id, name, installation, draining)| Replica {
            id: ReplicaId(id),
            name,
            installation,
            draining,
        };
        Ok(rows.into_iter().map(replica).collect())
    }

    async fn clock(&self) -> Result<Option<Timestamp>, StoreError> {
        let now: i64 = sqlx::query_scalar(NOW).fetch_one(&self.readers).await?;
        Ok(Timestamp::from_microsecond(now).ok())
    }

    async fn called(&self, id: &ReplicaId) -> Result<Option<String>, StoreError> {
        let name = sqlx::query_scalar("SELECT name FROM replica WHERE id = $1").bind(&id.0);
        Ok(name.fetch_optional(&self.readers).await?)
    }

    fn follow(&self, to: mpsc::Sender<Changed>) {
        tokio::spawn(listen(self.readers.clone(), to));
    }
}

async fn renew(db: &mut Connection, replica: Replica, lease: i64) -> Result<(), StoreError> {
    let other: Option<String> = sqlx::query_scalar(
        "SELECT name FROM replica WHERE installation <> $1 AND id <> $2 LIMIT 1",
    )
    .bind(&replica.installation)
    .bind(&replica.id.0)
    .fetch_optional(&mut *db)
    .await?;
    if let Some(other) = other {
        return Err(StoreError::Refused(format!(
            "an orchestrator with another key than {other:?}: copy secret.key and agents.pem from its state folder"
        )));
    }
    let now: i64 = sqlx::query_scalar(NOW).fetch_one(&mut *db).await?;
    sqlx::query(
        "INSERT INTO replica (id, name, installation, until_us, draining_us)
         VALUES ($1, $2, $3, $4, CASE WHEN $5 THEN $4 END)
         ON CONFLICT (id) DO UPDATE SET name = excluded.name, installation = excluded.installation,
             until_us = excluded.until_us, draining_us = excluded.draining_us",
    )
    .bind(replica.id.0)
    .bind(replica.name)
    .bind(replica.installation)
    .bind(now.saturating_add(lease))
    .bind(replica.draining)
    .execute(&mut *db)
    .await?;
    sqlx::query("SELECT pg_notify($1, '')")
        .bind(CHANNEL)
        .execute(db)
        .await?;
    Ok(())
}

async fn take_over(
    db: &mut Connection,
    me: ReplicaId,
    bound: Vec<String>,
    patience: i64,
) -> Result<Vec<SessionId>, StoreError> {
    alone(db, "take over").await?;
    let now: i64 = sqlx::query_scalar(NOW).fetch_one(&mut *db).await?;
    // Held until the end: one that comes back meanwhile waits, and then finds what it lost.
    let dead: Vec<(String, i64)> =
        sqlx::query_as("SELECT id, until_us FROM replica WHERE until_us < $1 FOR UPDATE")
            .bind(now)
            .fetch_all(&mut *db)
            .await?;
    let lost: Vec<&String> = (dead.iter())
        .filter(|(_, until)| until.saturating_add(patience) < now)
        .map(|(id, _)| id)
        .collect();
    let dead: Vec<&String> = dead.iter().map(|(id, _)| id).collect();
    let ids: Vec<String> = sqlx::query_scalar(
        "SELECT s.id FROM session AS s
         LEFT JOIN desktop AS d ON d.session_id = s.id AND d.phase <> 'gone' AND d.provider = ANY($2)
         WHERE s.phase NOT IN ('ended', 'failed') AND s.owner IS DISTINCT FROM $1
           AND (d.host = $1
             OR ((s.owner IS NULL OR s.owner = ANY($3)) AND (d.host IS NULL OR d.host = ANY($4))))
         ORDER BY s.created_us, s.id LIMIT $5 FOR UPDATE OF s SKIP LOCKED",
    )
    .bind(&me.0)
    .bind(bound)
    .bind(dead)
    .bind(lost)
    .bind(i64::try_from(AT_A_TIME).unwrap_or(i64::MAX))
    .fetch_all(&mut *db)
    .await?;
    sqlx::query("UPDATE session SET owner = $1, fence = fence + 1 WHERE id = ANY($2)")
        .bind(&me.0)
        .bind(&ids)
        .execute(&mut *db)
        .await?;
    ids.iter().map(|id| session(id)).collect()
}

fn session(id: &str) -> Result<SessionId, StoreError> {
    id.parse().map_err(|_| StoreError::Unreadable {
        what: id.to_owned(),
    })
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// Passes on what is heard, as long as anybody wants it; after every pause, that something may have been missed.
async fn listen(pool: PgPool, to: mpsc::Sender<Changed>) {
    while !to.is_closed() && !pool.is_closed() {
        match hear(&pool, &to).await {
            Ok(()) => {}
            Err(error) => debug!(%error, "what others change is not heard"),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Until the connection is lost.
async fn hear(pool: &PgPool, to: &mpsc::Sender<Changed>) -> Result<(), sqlx::Error> {
    let mut listener = PgListener::connect_with(pool).await?;
    listener.listen(CHANNEL).await?;
    let mut heard = Changed::Any;
    while to.send(heard).await.is_ok() {
        heard = loop {
            let Ok(said) = tokio::time::timeout(SILENCE, listener.try_recv()).await else {
                return Ok(());
            };
            let Some(said) = said? else { return Ok(()) };
            if let Ok(id) = said.payload().parse() {
                break Changed::Session(id);
            }
        };
    }
    Ok(())
}
