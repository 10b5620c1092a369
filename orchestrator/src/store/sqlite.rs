//! The store on SQLite: one file, WAL, `synchronous=FULL` (a committed change survives a power cut), one writer.

use super::{Accepted, Change, Changing, Idempotency, Store, StoreError, unreadable};
use crate::clock::ms_between;
use crate::config::Limits;
use crate::desktop::{Desktop, StoredDesktop};
use crate::session::{Expected, Record, Wish};
use async_trait::async_trait;
use jiff::Timestamp;
use mayfly_api::{DesktopName, SessionEvent, SessionId, SessionPhase, Stage};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteRow,
    SqliteSynchronous,
};
use sqlx::{Row, Sqlite, SqliteConnection, Transaction};
use std::path::Path;
use std::time::Duration;

/// See the module.
#[derive(Clone, Debug)]
pub struct SqliteStore {
    pub(super) writer: SqlitePool,
    pub(super) readers: SqlitePool,
}

impl SqliteStore {
    /// Opens the database, makes it if needed, and brings its schema up to date.
    ///
    /// # Errors
    /// [`StoreError::Database`] or [`StoreError::Migrate`].
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(10));
        let writer = SqlitePoolOptions::new()
            .max_connections(1)
            .connect_with(options.clone())
            .await?;
        sqlx::migrate!("./migrations").run(&writer).await?;
        let readers = SqlitePoolOptions::new()
            .max_connections(4)
            .connect_with(options.read_only(true).create_if_missing(false))
            .await?;
        Ok(Self { writer, readers })
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
            writer: readers.clone(),
            readers,
        })
    }

    /// Closes every connection.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }

    pub(super) async fn begin(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        Ok(self.writer.begin_with("BEGIN IMMEDIATE").await?)
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn accept(
        &self,
        mut record: Record,
        idempotency: Option<Idempotency>,
        max_queued: u32,
    ) -> Result<Accepted, StoreError> {
        let mut tx = self.begin().await?;
        if let Some(key) = &idempotency
            && let Some(before) = before(&mut tx, key).await?
        {
            return Ok(before);
        }
        let queued: i64 = sqlx::query_scalar("SELECT count(*) FROM session WHERE phase = 'queued'")
            .fetch_one(&mut *tx)
            .await?;
        if queued >= i64::from(max_queued) {
            return Ok(Accepted::Full);
        }
        record.queue_position = u32::try_from(queued + 1).ok();
        insert_session(&mut tx, &record).await?;
        save_parts(&mut tx, &record).await?;
        append_event(&mut tx, &record, record.created_at).await?;
        if let Some(key) = idempotency {
            sqlx::query(
                "INSERT INTO idempotency (key_sha256, request_sha256, session_id) VALUES (?, ?, ?)",
            )
            .bind(key.key_sha256)
            .bind(key.request_sha256)
            .bind(record.id.to_string())
            .execute(&mut *tx)
            .await?;
        }
        tx.commit().await?;
        Ok(Accepted::New(Box::new(record)))
    }

    async fn accepted_before(&self, key: &Idempotency) -> Result<Option<Accepted>, StoreError> {
        before(&mut *self.readers.acquire().await?, key).await
    }

    async fn get(&self, id: SessionId) -> Result<Option<Record>, StoreError> {
        load(&mut *self.readers.acquire().await?, id).await
    }

    async fn live(&self) -> Result<Vec<Record>, StoreError> {
        let mut tx = self.readers.begin().await?;
        let ids = sqlx::query_scalar(
            "SELECT id FROM session WHERE phase NOT IN ('ended', 'failed') ORDER BY created_us, id",
        )
        .fetch_all(&mut *tx)
        .await?;
        load_all(&mut tx, ids).await
    }

    async fn update(
        &self,
        id: SessionId,
        now: Timestamp,
        change: Changing<'_>,
    ) -> Result<Option<(Record, Change)>, StoreError> {
        let mut tx = self.begin().await?;
        let Some(mut record) = load(&mut tx, id).await? else {
            return Ok(None);
        };
        let changed = change(&mut record);
        if changed != Change::Nothing {
            save(&mut tx, &mut record, changed, now).await?;
            tx.commit().await?;
        }
        Ok(Some((record, changed)))
    }

    async fn plan_next(
        &self,
        limits: &Limits,
        full: &[String],
        now: Timestamp,
    ) -> Result<Option<Record>, StoreError> {
        let mut tx = self.begin().await?;
        let (all, making): (i64, i64) = sqlx::query_as(
            "SELECT count(*), count(CASE WHEN phase IN ('planned', 'creating', 'booting', 'configuring', 'ready') THEN 1 END)
             FROM desktop WHERE phase <> 'gone'",
        )
        .fetch_one(&mut *tx)
        .await?;
        if all >= i64::from(limits.max_desktops) || making >= i64::from(limits.concurrent_creates) {
            return Ok(None);
        }
        let next: Option<String> = sqlx::query_scalar(
            "SELECT id FROM session WHERE phase IN ('queued', 'preparing')
               AND NOT EXISTS (SELECT 1 FROM desktop WHERE session_id = session.id AND phase <> 'gone')
               AND template NOT IN (SELECT value FROM json_each(?))
             ORDER BY created_us, id LIMIT 1",
        )
        .bind(to_json(&full)?)
        .fetch_optional(&mut *tx)
        .await?;
        let Some(id) = next else { return Ok(None) };
        let Some(mut record) = load(&mut tx, parse(&id)?).await? else {
            return Ok(None);
        };
        // The highest number ever used, whatever was deleted since.
        let last: Option<i64> =
            sqlx::query_scalar("SELECT seq FROM sqlite_sequence WHERE name = 'desktop'")
                .fetch_optional(&mut *tx)
                .await?;
        let name = u32::try_from(last.unwrap_or(0) + 1)
            .ok()
            .and_then(DesktopName::from_number)
            .ok_or(StoreError::NoNames)?;
        if record.plan(name, now).is_err() {
            return Ok(None);
        }
        save(&mut tx, &mut record, Change::Told, now).await?;
        tx.commit().await?;
        Ok(Some(record))
    }

    async fn renumber_queue(&self, now: Timestamp) -> Result<Vec<Record>, StoreError> {
        let mut tx = self.begin().await?;
        let moved: Vec<(String, i64)> = sqlx::query_as(
            "SELECT id, place FROM (
                 SELECT id, queue_position, row_number() OVER (ORDER BY created_us, id) AS place
                 FROM session WHERE phase = 'queued')
             WHERE queue_position IS NOT place ORDER BY place",
        )
        .fetch_all(&mut *tx)
        .await?;
        let mut records = Vec::with_capacity(moved.len());
        for (id, place) in moved {
            if let Some(mut record) = load(&mut tx, parse(&id)?).await? {
                record.queue_position = u32::try_from(place).ok();
                save(&mut tx, &mut record, Change::Told, now).await?;
                records.push(record);
            }
        }
        tx.commit().await?;
        Ok(records)
    }

    async fn events_after(&self, id: SessionId, seq: u64) -> Result<Vec<SessionEvent>, StoreError> {
        let rows = sqlx::query(
            "SELECT seq, at_us, body FROM event WHERE session_id = ? AND seq > ? ORDER BY seq",
        )
        .bind(id.to_string())
        .bind(i64::try_from(seq).unwrap_or(i64::MAX))
        .fetch_all(&self.readers)
        .await?;
        rows.iter().map(event).collect()
    }

    async fn expected(&self, template: &str, provider: &str) -> Result<Expected, StoreError> {
        let rows = sqlx::query(
            "SELECT s.id, s.created_us, s.ready_us, t.name, t.duration_ms
             FROM (SELECT id, created_us, ready_us FROM session
                   WHERE template = ? AND provider = ? AND ready_us IS NOT NULL
                   ORDER BY created_us DESC LIMIT 20) AS s
             JOIN stage AS t ON t.session_id = s.id
             WHERE t.duration_ms IS NOT NULL",
        )
        .bind(template)
        .bind(provider)
        .fetch_all(&self.readers)
        .await?;
        let mut runs = std::collections::BTreeMap::new();
        let mut stages: std::collections::BTreeMap<_, Vec<u64>> = std::collections::BTreeMap::new();
        for row in &rows {
            let ready = ms_between(time(row, "created_us")?, time(row, "ready_us")?);
            runs.insert(row.try_get::<String, _>("id")?, ready);
            stages
                .entry(enumerated(row.try_get("name")?)?)
                .or_default()
                .push(u64::try_from(row.try_get::<i64, _>("duration_ms")?).unwrap_or(0));
        }
        Ok(Expected {
            ready: median(runs.into_values().collect()),
            stages: stages
                .into_iter()
                .filter_map(|(name, runs)| Some((name, median(runs)?)))
                .collect(),
        })
    }

    async fn desktops(&self) -> Result<Vec<DesktopName>, StoreError> {
        let numbers: Vec<i64> =
            sqlx::query_scalar("SELECT number FROM desktop WHERE phase <> 'gone'")
                .fetch_all(&self.readers)
                .await?;
        numbers.into_iter().map(desktop_name).collect()
    }

    async fn forget(&self, before: Timestamp) -> Result<u64, StoreError> {
        let done = sqlx::query(
            "DELETE FROM session WHERE phase IN ('ended', 'failed') AND created_us < ?
               AND NOT EXISTS (SELECT 1 FROM desktop WHERE session_id = session.id AND phase <> 'gone')",
        )
        .bind(before.as_microsecond())
        .execute(&self.writer)
        .await?;
        Ok(done.rows_affected())
    }
}

fn median(mut values: Vec<u64>) -> Option<u64> {
    values.sort_unstable();
    values.get(values.len().saturating_sub(1) / 2).copied()
}

pub(super) fn parse<T: std::str::FromStr>(text: &str) -> Result<T, StoreError> {
    text.parse().map_err(|_| unreadable(text))
}

fn json<T: DeserializeOwned>(text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|_| unreadable(text))
}

fn to_json<T: Serialize>(value: &T) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(unreadable)
}

/// An enum as the wire writes it, which is also how a column holds it.
fn text<T: Serialize>(value: &T) -> Result<String, StoreError> {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(text)) => Ok(text),
        other => Err(unreadable(format!("{other:?}"))),
    }
}

fn enumerated<T: DeserializeOwned>(text: String) -> Result<T, StoreError> {
    serde_json::from_value(serde_json::Value::String(text)).map_err(unreadable)
}

pub(super) fn moment(us: i64) -> Result<Timestamp, StoreError> {
    Timestamp::from_microsecond(us).map_err(unreadable)
}

fn time(row: &SqliteRow, column: &str) -> Result<Timestamp, StoreError> {
    moment(row.try_get(column)?)
}

fn maybe_time(row: &SqliteRow, column: &str) -> Result<Option<Timestamp>, StoreError> {
    row.try_get::<Option<i64>, _>(column)?
        .map(moment)
        .transpose()
}

fn us(at: Option<Timestamp>) -> Option<i64> {
    at.map(Timestamp::as_microsecond)
}

fn ms(value: Option<u64>) -> Option<i64> {
    value.map(|v| i64::try_from(v).unwrap_or(i64::MAX))
}

pub(super) fn desktop_name(number: i64) -> Result<DesktopName, StoreError> {
    u32::try_from(number)
        .ok()
        .and_then(DesktopName::from_number)
        .ok_or_else(|| unreadable(number))
}

fn event(row: &SqliteRow) -> Result<SessionEvent, StoreError> {
    Ok(SessionEvent {
        seq: u64::try_from(row.try_get::<i64, _>("seq")?).map_err(unreadable)?,
        at: time(row, "at_us")?,
        session: json(row.try_get("body")?)?,
    })
}

async fn before(
    db: &mut SqliteConnection,
    key: &Idempotency,
) -> Result<Option<Accepted>, StoreError> {
    let row = sqlx::query(
        "SELECT i.request_sha256, e.seq, e.at_us, e.body
         FROM idempotency AS i JOIN event AS e ON e.session_id = i.session_id AND e.seq = 1
         WHERE i.key_sha256 = ?",
    )
    .bind(&key.key_sha256)
    .fetch_optional(&mut *db)
    .await?;
    let Some(row) = row else { return Ok(None) };
    if row.try_get::<String, _>("request_sha256")? != key.request_sha256 {
        return Ok(Some(Accepted::Mismatch));
    }
    Ok(Some(Accepted::Again(Box::new(event(&row)?))))
}

async fn load_all(db: &mut SqliteConnection, ids: Vec<String>) -> Result<Vec<Record>, StoreError> {
    let mut records = Vec::with_capacity(ids.len());
    for id in ids {
        records.extend(load(&mut *db, parse(&id)?).await?);
    }
    Ok(records)
}

async fn load(db: &mut SqliteConnection, id: SessionId) -> Result<Option<Record>, StoreError> {
    let row = sqlx::query("SELECT * FROM session WHERE id = ?")
        .bind(id.to_string())
        .fetch_optional(&mut *db)
        .await?;
    let Some(row) = row else { return Ok(None) };
    let desktop =
        sqlx::query("SELECT * FROM desktop WHERE session_id = ? ORDER BY number DESC LIMIT 1")
            .bind(id.to_string())
            .fetch_optional(&mut *db)
            .await?;
    let stages = sqlx::query("SELECT * FROM stage WHERE session_id = ? ORDER BY place")
        .bind(id.to_string())
        .fetch_all(&mut *db)
        .await?;
    let end_reason = row.try_get::<Option<String>, _>("end_reason")?;
    let failure = row.try_get::<Option<String>, _>("failure")?;
    let queue_position: Option<i64> = row.try_get("queue_position")?;
    Ok(Some(Record {
        id,
        wish: Wish {
            origin: enumerated(row.try_get("origin")?)?,
            template: row.try_get("template")?,
            provider: row.try_get("provider")?,
            user: row.try_get("user")?,
            language: row.try_get("language")?,
            time_zone: row.try_get("time_zone")?,
            keyboard: row.try_get("keyboard")?,
        },
        phase: enumerated(row.try_get("phase")?)?,
        seq: u64::try_from(row.try_get::<i64, _>("seq")?).map_err(unreadable)?,
        created_at: time(&row, "created_us")?,
        expires_at: time(&row, "expires_us")?,
        last_activity: time(&row, "activity_us")?,
        heartbeat_at: maybe_time(&row, "heartbeat_us")?,
        ready_at: maybe_time(&row, "ready_us")?,
        disconnected_at: maybe_time(&row, "disconnected_us")?,
        keep_until: maybe_time(&row, "keep_us")?,
        ends_at: maybe_time(&row, "ends_us")?,
        queue_position: queue_position.and_then(|p| u32::try_from(p).ok()),
        expected: json(row.try_get("expected")?)?,
        end_reason: end_reason.map(enumerated).transpose()?,
        failure: failure.as_deref().map(json).transpose()?,
        desktop: desktop.as_ref().map(read_desktop).transpose()?,
        stages: stages.iter().map(read_stage).collect::<Result<_, _>>()?,
    }))
}

fn read_desktop(row: &SqliteRow) -> Result<Desktop, StoreError> {
    let address: Option<String> = row.try_get("address")?;
    Ok(Desktop::restore(StoredDesktop {
        name: desktop_name(row.try_get("number")?)?,
        phase: enumerated(row.try_get("phase")?)?,
        created_at: time(row, "created_us")?,
        claimed_at: maybe_time(row, "claimed_us")?,
        destroying_at: maybe_time(row, "destroying_us")?,
        address: address.as_deref().map(parse).transpose()?,
        certificate_sha256: row.try_get("certificate")?,
        stuck_reason: row.try_get("stuck_reason")?,
    }))
}

fn read_stage(row: &SqliteRow) -> Result<Stage, StoreError> {
    let positive = |v: Option<i64>| v.and_then(|v| u64::try_from(v).ok());
    Ok(Stage {
        name: enumerated(row.try_get("name")?)?,
        started_at: time(row, "started_us")?,
        duration_ms: positive(row.try_get("duration_ms")?),
        expected_ms: positive(row.try_get("expected_ms")?),
    })
}

async fn insert_session(db: &mut SqliteConnection, record: &Record) -> Result<(), StoreError> {
    let wish = &record.wish;
    sqlx::query(
        "INSERT INTO session (id, origin, template, provider, user, language, time_zone, keyboard, phase, seq,
            created_us, expires_us, activity_us, queue_position, expected)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(record.id.to_string())
    .bind(text(&wish.origin)?)
    .bind(&wish.template)
    .bind(&wish.provider)
    .bind(&wish.user)
    .bind(&wish.language)
    .bind(&wish.time_zone)
    .bind(&wish.keyboard)
    .bind(text(&record.phase)?)
    .bind(i64::try_from(record.seq).unwrap_or(i64::MAX))
    .bind(record.created_at.as_microsecond())
    .bind(record.expires_at.as_microsecond())
    .bind(record.last_activity.as_microsecond())
    .bind(record.queue_position.map(i64::from))
    .bind(to_json(&record.expected)?)
    .execute(db)
    .await?;
    Ok(())
}

/// Writes a changed record, and its event if it is to be told.
async fn save(
    db: &mut SqliteConnection,
    record: &mut Record,
    change: Change,
    now: Timestamp,
) -> Result<(), StoreError> {
    if change == Change::Told {
        record.seq += 1;
    }
    let end_reason = record.end_reason.as_ref().map(text).transpose()?;
    let failure = record.failure.as_ref().map(to_json).transpose()?;
    sqlx::query(
        "UPDATE session SET phase = ?, seq = ?, activity_us = ?, heartbeat_us = ?, ready_us = ?, disconnected_us = ?,
            keep_us = ?, ends_us = ?, queue_position = ?, end_reason = ?, failure = ?
         WHERE id = ?",
    )
    .bind(text(&record.phase)?)
    .bind(i64::try_from(record.seq).unwrap_or(i64::MAX))
    .bind(record.last_activity.as_microsecond())
    .bind(us(record.heartbeat_at))
    .bind(us(record.ready_at))
    .bind(us(record.disconnected_at))
    .bind(us(record.keep_until))
    .bind(us(record.ends_at))
    .bind(record.queue_position.filter(|_| record.phase == SessionPhase::Queued).map(i64::from))
    .bind(end_reason)
    .bind(failure)
    .bind(record.id.to_string())
    .execute(&mut *db)
    .await?;
    save_parts(&mut *db, record).await?;
    if change == Change::Told {
        append_event(db, record, now).await?;
    }
    Ok(())
}

/// Writes the desktop and the stages.
async fn save_parts(db: &mut SqliteConnection, record: &Record) -> Result<(), StoreError> {
    if let Some(desktop) = &record.desktop {
        let (address, certificate) = desktop.announced().unzip();
        sqlx::query(
            "INSERT INTO desktop (number, session_id, provider, phase, created_us, claimed_us, destroying_us, address,
                certificate, stuck_reason)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
             ON CONFLICT (number) DO UPDATE SET session_id = excluded.session_id, phase = excluded.phase,
                claimed_us = excluded.claimed_us, destroying_us = excluded.destroying_us, address = excluded.address,
                certificate = excluded.certificate, stuck_reason = excluded.stuck_reason
             WHERE desktop.phase <> 'gone'",
        )
        .bind(i64::from(desktop.name().number()))
        .bind(record.id.to_string())
        .bind(&record.wish.provider)
        .bind(text(&desktop.phase())?)
        .bind(desktop.created_at().as_microsecond())
        .bind(us(desktop.claimed_at()))
        .bind(us(desktop.destroying_at()))
        .bind(address.map(|a| a.to_string()))
        .bind(certificate)
        .bind(desktop.stuck_reason())
        .execute(&mut *db)
        .await?;
    }
    sqlx::query("DELETE FROM stage WHERE session_id = ?")
        .bind(record.id.to_string())
        .execute(&mut *db)
        .await?;
    for (place, stage) in (0_i64..).zip(&record.stages) {
        sqlx::query(
            "INSERT INTO stage (session_id, place, name, started_us, duration_ms, expected_ms) VALUES (?, ?, ?, ?, ?, ?)",
        )
        .bind(record.id.to_string())
        .bind(place)
        .bind(text(&stage.name)?)
        .bind(stage.started_at.as_microsecond())
        .bind(ms(stage.duration_ms))
        .bind(ms(stage.expected_ms))
        .execute(&mut *db)
        .await?;
    }
    Ok(())
}

async fn append_event(
    db: &mut SqliteConnection,
    record: &Record,
    now: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO event (session_id, seq, at_us, body) VALUES (?, ?, ?, ?)")
        .bind(record.id.to_string())
        .bind(i64::try_from(record.seq).unwrap_or(i64::MAX))
        .bind(now.as_microsecond())
        .bind(to_json(&record.view())?)
        .execute(db)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{after, s};
    use crate::session::Origin;
    use mayfly_api::{EndReason, StageName};

    const SECOND: Duration = Duration::from_secs(1);

    fn now() -> Timestamp {
        Timestamp::from_second(1_800_000_000).unwrap()
    }

    async fn store() -> (SqliteStore, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&dir.path().join("db")).await.unwrap();
        (store, dir)
    }

    async fn accept(store: &SqliteStore, at: Timestamp) -> Record {
        let wish = Wish {
            origin: Origin::V1,
            template: "t".to_owned(),
            provider: "p".to_owned(),
            user: "user".to_owned(),
            language: Some("fr".to_owned()),
            time_zone: None,
            keyboard: None,
        };
        let expected = store.expected("t", "p").await.unwrap();
        let record = Record::accepted(SessionId::new(), wish, expected, &Limits::default(), at);
        match store.accept(record, None, 100).await.unwrap() {
            Accepted::New(record) => *record,
            other => panic!("{other:?}"),
        }
    }

    /// A session that got its desktop `after_s` seconds after it was asked for.
    async fn claimed(store: &SqliteStore, at: Timestamp, after_s: u32) -> Record {
        let limits = Limits::default();
        let id = accept(store, at).await.id;
        let planned = store.plan_next(&limits, &[], at).await.unwrap().unwrap();
        assert_eq!(planned.id, id);
        let name = planned.desktop.unwrap().name();
        let ready = after(at, s(after_s));
        let change = |r: &mut Record| {
            r.creating(name).unwrap();
            r.booting(name, at).unwrap();
            r.configuring(name, at).unwrap();
            r.announced(name, "127.77.0.1:3389".parse().unwrap(), "a".repeat(64), at)
                .unwrap();
            r.proved(name).unwrap();
            r.claim(name, &limits, ready).unwrap();
            Change::Told
        };
        let done = store.update(id, ready, Box::new(change)).await.unwrap();
        done.unwrap().0
    }

    async fn end(store: &SqliteStore, record: &Record) {
        let name = record.desktop.as_ref().unwrap().name();
        let change = |r: &mut Record| {
            r.end(EndReason::Requested, now()).unwrap();
            r.gone(name, now()).unwrap();
            Change::Told
        };
        store
            .update(record.id, now(), Box::new(change))
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn what_was_written_is_read_back() {
        let (store, _dir) = store().await;
        let record = claimed(&store, now(), 7).await;
        assert_eq!(store.get(record.id).await.unwrap(), Some(record.clone()));
        assert_eq!(store.live().await.unwrap().len(), 1);
        let events = store.events_after(record.id, 0).await.unwrap();
        let seqs: Vec<_> = events.iter().map(|e| e.seq).collect();
        assert_eq!(seqs, [1, 2, 3]);
        assert_eq!(events[2].session, record.view());
        assert_eq!(store.get(SessionId::new()).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_change_that_says_nothing_writes_nothing_and_a_quiet_one_no_event() {
        let (store, _dir) = store().await;
        let before = accept(&store, now()).await;
        for (change, seq) in [(Change::Nothing, 1), (Change::Quiet, 1), (Change::Told, 2)] {
            let at = after(now(), SECOND);
            let beat = move |r: &mut Record| {
                r.heartbeat(at);
                change
            };
            store.update(before.id, at, Box::new(beat)).await.unwrap();
            let record = store.get(before.id).await.unwrap().unwrap();
            assert_eq!(record.seq, seq);
            assert_eq!(record.heartbeat_at.is_some(), change != Change::Nothing);
        }
    }

    #[tokio::test]
    async fn places_go_to_who_waits_longest_within_the_limits() {
        let (store, _dir) = store().await;
        let limits = Limits {
            concurrent_creates: 1,
            ..Limits::default()
        };
        let first = accept(&store, now()).await;
        let second = accept(&store, after(now(), SECOND)).await;
        let planned = store.plan_next(&limits, &[], now()).await.unwrap().unwrap();
        assert_eq!(planned.id, first.id);
        assert!(
            store
                .plan_next(&limits, &[], now())
                .await
                .unwrap()
                .is_none()
        );
        let moved = store.renumber_queue(now()).await.unwrap();
        assert_eq!(moved.len(), 1);
        assert_eq!((moved[0].id, moved[0].queue_position), (second.id, Some(1)));
        assert_eq!(store.renumber_queue(now()).await.unwrap(), []);
    }

    #[tokio::test]
    async fn a_session_without_room_waits_again_and_lets_other_templates_pass() {
        let (store, _dir) = store().await;
        let limits = Limits::default();
        let first = accept(&store, now()).await;
        let planned = store.plan_next(&limits, &[], now()).await.unwrap().unwrap();
        let name = planned.desktop.unwrap().name();
        let requeue = |r: &mut Record| {
            r.creating(name).unwrap();
            r.requeue(name, now()).unwrap();
            Change::Told
        };
        store
            .update(first.id, now(), Box::new(requeue))
            .await
            .unwrap();
        let moved = store.renumber_queue(now()).await.unwrap();
        assert_eq!(moved[0].view().queue_position, Some(1));
        assert_eq!(moved[0].view().desktop, None);
        let next = async |full: &[String]| store.plan_next(&limits, full, now()).await.unwrap();
        assert!(next(&[]).await.is_none(), "its desktop is being removed");
        let gone = |r: &mut Record| {
            r.gone(name, now()).unwrap();
            Change::Told
        };
        store.update(first.id, now(), Box::new(gone)).await.unwrap();
        assert!(next(&["t".to_owned()]).await.is_none());
        let again = next(&["other".to_owned()]).await.unwrap();
        assert_eq!(again.id, first.id);
        assert_ne!(again.desktop.unwrap().name(), name);
    }

    #[tokio::test]
    async fn a_number_is_never_used_twice_even_if_its_session_was_forgotten() {
        let (store, _dir) = store().await;
        let first = claimed(&store, now(), 1).await;
        let later = after(now(), SECOND);
        assert_eq!(store.forget(later).await.unwrap(), 0, "it lives");
        end(&store, &first).await;
        assert_eq!(store.forget(later).await.unwrap(), 1);
        assert_eq!(store.get(first.id).await.unwrap(), None);
        let second = claimed(&store, now(), 1).await;
        assert!(second.desktop.unwrap().name() > first.desktop.unwrap().name());
    }

    #[tokio::test]
    async fn estimates_are_medians_of_what_was() {
        let (store, _dir) = store().await;
        for seconds in [9, 1, 5] {
            let record = claimed(&store, now(), seconds).await;
            end(&store, &record).await;
        }
        let expected = store.expected("t", "p").await.unwrap();
        assert_eq!(expected.ready, Some(5_000));
        assert_eq!(expected.stages[&StageName::Connecting], 5_000);
        assert_eq!(store.expected("t", "other").await.unwrap().ready, None);
    }

    #[tokio::test]
    async fn the_schema_refuses_what_cannot_be() {
        let (store, _dir) = store().await;
        let record = claimed(&store, now(), 1).await;
        let gone = claimed(&store, after(now(), SECOND), 1).await;
        end(&store, &gone).await;
        for statement in [
            "UPDATE desktop SET phase = 'ready' WHERE phase = 'claimed'",
            "UPDATE desktop SET phase = 'ready', claimed_us = NULL WHERE phase = 'claimed'",
            "UPDATE desktop SET claimed_us = claimed_us + 1 WHERE phase = 'claimed'",
            "UPDATE desktop SET phase = 'gone' WHERE phase = 'claimed'",
            "UPDATE desktop SET phase = 'destroying' WHERE phase = 'gone'",
            "UPDATE desktop SET session_id = (SELECT id FROM session WHERE phase = 'ended') WHERE phase = 'claimed'",
            "INSERT INTO desktop (session_id, provider, phase, created_us) SELECT session_id, 'p', 'planned', 0 FROM desktop WHERE phase = 'claimed'",
            "DELETE FROM desktop WHERE phase = 'claimed'",
            "DELETE FROM session WHERE phase = 'ready'",
            "UPDATE session SET phase = 'ended' WHERE phase = 'ready'",
            "UPDATE session SET phase = 'dancing'",
            "UPDATE session SET created_us = 'soon'",
        ] {
            let refused = sqlx::query(statement).execute(&store.writer).await;
            assert!(refused.is_err(), "{statement}");
        }
        assert_eq!(store.get(record.id).await.unwrap(), Some(record));
    }
}
