//! The store in SQL, in words that SQLite and PostgreSQL both understand: what each intent reads and writes.
//!
//! Compiled once for each of them: `super` is `sqlite` or `postgres`, and says how an intent becomes one transaction, what
//! holds others off meanwhile, and what they say differently.

use super::{
    COPIED, Connection, HIGHEST, IN_USE, NEXT, Row, Sql, alone, go_on_above, hold, next_number,
};
use crate::clock::ms_between;
use crate::config::Limits;
use crate::desktop::{Desktop, StoredDesktop};
use crate::last_words::LONGEST;
use crate::session::{Expected, Record, Wish};
use crate::store::machines::{Locking, Machines, Reserved, Reserving};
use crate::store::pulse::{Pulse, Tally};
use crate::store::receipts::Receipts;
use crate::store::strays::{self, Look, Outcome, Place, Stray, Strays, Turn};
use crate::store::words::{DESKTOPS, Kept, Whose, Words};
use crate::store::{
    Accepted, Change, Changing, Idempotency, Restored, Store, StoreError, expected,
};
use async_trait::async_trait;
use jiff::Timestamp;
use mayfly_api::{DesktopName, Removal, SessionEvent, SessionId, SessionPhase, Stage, StageName};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::Row as _;
use std::collections::BTreeMap;

#[async_trait]
impl Store for Sql {
    async fn accept(
        &self,
        record: Record,
        idempotency: Option<Idempotency>,
        max_queued: u32,
    ) -> Result<Accepted, StoreError> {
        self.write(move |db| Box::pin(accept(db, record, idempotency, max_queued)))
            .await
    }

    async fn accepted_before(&self, key: &Idempotency) -> Result<Option<Accepted>, StoreError> {
        before(&mut *self.readers.acquire().await?, key).await
    }

    async fn get(&self, id: SessionId) -> Result<Option<Record>, StoreError> {
        load(&mut *self.reading().await?, id).await
    }

    async fn live(&self) -> Result<Vec<Record>, StoreError> {
        let mut tx = self.reading().await?;
        let ids: Vec<String> = sqlx::query_scalar(
            "SELECT id FROM session WHERE phase NOT IN ('ended', 'failed') ORDER BY created_us, id",
        )
        .fetch_all(&mut *tx)
        .await?;
        let mut records = Vec::with_capacity(ids.len());
        for id in ids {
            records.extend(load(&mut tx, parse(&id)?).await?);
        }
        Ok(records)
    }

    async fn update(
        &self,
        id: SessionId,
        now: Timestamp,
        change: Changing,
    ) -> Result<Option<(Record, Change)>, StoreError> {
        self.write(move |db| Box::pin(update(db, id, now, change)))
            .await
    }

    async fn plan_next(
        &self,
        limits: &Limits,
        full: &[String],
        now: Timestamp,
    ) -> Result<Option<Record>, StoreError> {
        let (most, at_once) = (limits.max_desktops, limits.concurrent_creates);
        let full = to_json(&full)?;
        self.write(move |db| Box::pin(plan_next(db, most, at_once, full, now)))
            .await
    }

    async fn renumber_queue(&self, now: Timestamp) -> Result<Vec<Record>, StoreError> {
        self.write(move |db| Box::pin(renumber_queue(db, now)))
            .await
    }

    async fn events_after(&self, id: SessionId, seq: u64) -> Result<Vec<SessionEvent>, StoreError> {
        let rows = sqlx::query(
            "SELECT seq, at_us, body FROM event WHERE session_id = $1 AND seq > $2 ORDER BY seq",
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
                   WHERE template = $1 AND provider = $2 AND ready_us IS NOT NULL
                   ORDER BY created_us DESC, id DESC LIMIT 20) AS s
             JOIN stage AS t ON t.session_id = s.id
             WHERE t.duration_ms IS NOT NULL",
        )
        .bind(template)
        .bind(provider)
        .fetch_all(&self.readers)
        .await?;
        let mut runs = BTreeMap::new();
        let mut stages: BTreeMap<StageName, Vec<u64>> = BTreeMap::new();
        for row in &rows {
            let ready = ms_between(time(row, "created_us")?, time(row, "ready_us")?);
            runs.insert(row.try_get::<String, _>("id")?, ready);
            stages
                .entry(enumerated(row.try_get("name")?)?)
                .or_default()
                .push(u64::try_from(row.try_get::<i64, _>("duration_ms")?).unwrap_or(0));
        }
        Ok(expected(runs.into_values().collect(), stages))
    }

    async fn desktops(&self) -> Result<Vec<DesktopName>, StoreError> {
        let numbers: Vec<i64> =
            sqlx::query_scalar("SELECT number FROM desktop WHERE phase <> 'gone'")
                .fetch_all(&self.readers)
                .await?;
        numbers.into_iter().map(desktop_name).collect()
    }

    async fn forget(&self, before: Timestamp) -> Result<u64, StoreError> {
        self.write(move |db| Box::pin(forget(db, before))).await
    }

    async fn resume(
        &self,
        seen: Option<DesktopName>,
        now: Timestamp,
    ) -> Result<Option<Restored>, StoreError> {
        self.write(move |db| Box::pin(resume(db, seen, now))).await
    }

    async fn close(&self) {
        // The store's own.
        Sql::close(self).await;
    }
}

#[async_trait]
impl Machines for Sql {
    async fn reserve(&self, machine: &Reserved, clones: u32) -> Result<Reserving, StoreError> {
        let machine = machine.clone();
        self.write(move |db| Box::pin(reserve(db, machine, clones)))
            .await
    }

    async fn cloned(&self, name: DesktopName) -> Result<(), StoreError> {
        let change = sqlx::query("UPDATE machine SET cloning = 0 WHERE number = $1");
        self.run(change.bind(number(name))).await
    }

    async fn reserved(&self) -> Result<Vec<Reserved>, StoreError> {
        let rows: Vec<(i64, String, i64, String)> =
            sqlx::query_as("SELECT number, node, memory_mib, storage FROM machine ORDER BY number")
                .fetch_all(&self.readers)
                .await?;
        rows.into_iter()
            .map(|(number, node, memory_mib, storage)| {
                Ok(Reserved {
                    name: desktop_name(number)?,
                    node,
                    memory_mib: u32::try_from(memory_mib).map_err(unreadable)?,
                    storage,
                })
            })
            .collect()
    }

    async fn lock(&self, name: DesktopName, id: &str, info: &str) -> Result<Locking, StoreError> {
        let change = sqlx::query(
            "UPDATE machine SET lock_id = $1, lock = $2 WHERE number = $3 AND (lock_id IS NULL OR lock_id = $1)",
        );
        let change = change
            .bind(id.to_owned())
            .bind(info.to_owned())
            .bind(number(name));
        self.write(move |db| Box::pin(under_lock(db, name, change)))
            .await
    }

    async fn unlock(&self, name: DesktopName, id: &str) -> Result<Locking, StoreError> {
        let change = sqlx::query(
            "UPDATE machine SET lock_id = NULL, lock = NULL WHERE number = $1 AND (lock_id IS NULL OR lock_id = $2)",
        );
        let change = change.bind(number(name)).bind(id.to_owned());
        self.write(move |db| Box::pin(under_lock(db, name, change)))
            .await
    }

    async fn save(&self, name: DesktopName, id: &str, state: &[u8]) -> Result<Locking, StoreError> {
        let change =
            sqlx::query("UPDATE machine SET state = $1 WHERE number = $2 AND lock_id = $3");
        let change = change
            .bind(state.to_owned())
            .bind(number(name))
            .bind(id.to_owned());
        self.write(move |db| Box::pin(under_lock(db, name, change)))
            .await
    }

    async fn state(&self, name: DesktopName) -> Result<Option<Vec<u8>>, StoreError> {
        let state: Option<Option<Vec<u8>>> =
            sqlx::query_scalar("SELECT state FROM machine WHERE number = $1")
                .bind(number(name))
                .fetch_optional(&self.readers)
                .await?;
        Ok(state.flatten())
    }

    async fn release(&self, name: DesktopName) -> Result<(), StoreError> {
        let change = sqlx::query("DELETE FROM machine WHERE number = $1");
        self.run(change.bind(number(name))).await
    }
}

#[async_trait]
impl Words for Sql {
    async fn keep(&self, words: &Kept) -> Result<(), StoreError> {
        let words = words.clone();
        self.write(move |db| Box::pin(keep(db, words))).await
    }

    async fn kept(&self, whose: Whose) -> Result<Vec<Kept>, StoreError> {
        let (session, desktop) = by(whose);
        let rows: Vec<(String, i64, i64, String)> = sqlx::query_as(
            "SELECT session_id, number, at_us, text FROM log WHERE session_id = $1 OR number = $2 ORDER BY number",
        )
        .bind(session)
        .bind(desktop)
        .fetch_all(&self.readers)
        .await?;
        rows.into_iter()
            .map(|(session, number, at, text)| {
                Ok(Kept {
                    session: parse(&session)?,
                    desktop: desktop_name(number)?,
                    at: moment(at)?,
                    text,
                })
            })
            .collect()
    }
}

#[async_trait]
impl Receipts for Sql {
    async fn keep_receipt(&self, session: SessionId, removal: &Removal) -> Result<(), StoreError> {
        let change = sqlx::query(
            "INSERT INTO receipt (number, session_id, body) VALUES ($1, $2, $3)
             ON CONFLICT (number) DO UPDATE SET body = excluded.body",
        );
        let change = change
            .bind(number(removal.desktop))
            .bind(session.to_string())
            .bind(to_json(removal)?);
        self.run(change).await
    }

    async fn receipts(&self, whose: Whose) -> Result<Vec<(SessionId, Removal)>, StoreError> {
        let (session, desktop) = by(whose);
        let rows: Vec<(String, String)> = sqlx::query_as(
            "SELECT session_id, body FROM receipt WHERE session_id = $1 OR number = $2 ORDER BY number",
        )
        .bind(session)
        .bind(desktop)
        .fetch_all(&self.readers)
        .await?;
        rows.into_iter()
            .map(|(session, body)| Ok((parse(&session)?, json(&body)?)))
            .collect()
    }
}

#[async_trait]
impl Strays for Sql {
    async fn sight(&self, place: &Place, look: Look) -> Result<Vec<(Turn, Stray)>, StoreError> {
        let place = place.clone();
        self.write(move |db| Box::pin(sight(db, place, look))).await
    }

    async fn begin_removal(&self, stray: &Stray, now: Timestamp) -> Result<bool, StoreError> {
        let change = sqlx::query(
            "UPDATE stray SET tried_us = $4, why = NULL WHERE provider = $1 AND host = $2 AND number = $3 AND over_us IS NULL
                AND quarantined_us IS NOT NULL AND kept_us IS NULL AND tried_us IS NOT DISTINCT FROM $5",
        );
        let change = of_stray(change, stray)
            .bind(now.as_microsecond())
            .bind(us(stray.tried_at));
        Ok(self.changed(change).await? > 0)
    }

    async fn removal_failed(&self, stray: &Stray, why: &str) -> Result<(), StoreError> {
        let change = sqlx::query(
            "UPDATE stray SET why = $4 WHERE provider = $1 AND host = $2 AND number = $3 AND over_us IS NULL",
        );
        self.run(of_stray(change, stray).bind(without_nul(why)))
            .await
    }

    async fn removed(&self, stray: &Stray, now: Timestamp) -> Result<bool, StoreError> {
        let change = sqlx::query(
            "UPDATE stray SET over_us = $4, outcome = 'removed' WHERE provider = $1 AND host = $2 AND number = $3
                AND over_us IS NULL AND tried_us IS NOT NULL",
        );
        let change = of_stray(change, stray).bind(now.as_microsecond());
        Ok(self.changed(change).await? > 0)
    }

    async fn keep_stray(
        &self,
        desktop: DesktopName,
        at: Option<Timestamp>,
    ) -> Result<u64, StoreError> {
        let change =
            sqlx::query("UPDATE stray SET kept_us = $1 WHERE number = $2 AND over_us IS NULL");
        self.changed(change.bind(us(at)).bind(number(desktop)))
            .await
    }

    async fn strays(&self) -> Result<Vec<Stray>, StoreError> {
        let all = sqlx::query("SELECT * FROM stray");
        let rows = all.fetch_all(&self.readers).await?;
        let mut strays: Vec<_> = rows.iter().map(read_stray).collect::<Result<_, _>>()?;
        // Here: databases have orders of text of their own.
        strays.sort_by(|a, b| (&a.place, a.desktop).cmp(&(&b.place, b.desktop)));
        Ok(strays)
    }

    async fn forget_strays(&self, before: Timestamp) -> Result<u64, StoreError> {
        let change = sqlx::query("DELETE FROM stray WHERE over_us < $1");
        self.changed(change.bind(before.as_microsecond())).await
    }
}

#[async_trait]
impl Pulse for Sql {
    async fn beat(&self, now: Timestamp) -> Result<(), StoreError> {
        let change = sqlx::query(
            "INSERT INTO pulse (id, at_us) VALUES (1, $1) ON CONFLICT (id) DO UPDATE SET at_us = excluded.at_us",
        );
        self.run(change.bind(now.as_microsecond())).await
    }

    async fn tally(&self) -> Result<Tally, StoreError> {
        let rows: Vec<(String, String, i64)> = sqlx::query_as(
            "SELECT 'session', phase, count(*) FROM session GROUP BY phase
             UNION ALL SELECT 'desktop', phase, count(*) FROM desktop WHERE phase <> 'gone' GROUP BY phase",
        )
        .fetch_all(&self.readers)
        .await?;
        let mut tally = Tally::default();
        for (what, phase, many) in rows {
            let of_them = if what == "session" {
                &mut tally.sessions
            } else {
                &mut tally.desktops
            };
            of_them.insert(phase, u64::try_from(many).unwrap_or(0));
        }
        Ok(tally)
    }
}

type Query = sqlx::query::Query<'static, super::Database, super::Arguments>;

impl Sql {
    /// One statement, whatever it changed.
    async fn run(&self, change: Query) -> Result<(), StoreError> {
        self.changed(change).await.map(drop)
    }

    /// One statement; how many rows it changed.
    async fn changed(&self, change: Query) -> Result<u64, StoreError> {
        self.write(move |db| Box::pin(async move { Ok(change.execute(db).await?.rows_affected()) }))
            .await
    }
}

async fn accept(
    db: &mut Connection,
    mut record: Record,
    idempotency: Option<Idempotency>,
    max_queued: u32,
) -> Result<Accepted, StoreError> {
    alone(db, "accept").await?;
    if let Some(key) = &idempotency
        && let Some(before) = before(db, key).await?
    {
        return Ok(before);
    }
    let queued: i64 = sqlx::query_scalar("SELECT count(*) FROM session WHERE phase = 'queued'")
        .fetch_one(&mut *db)
        .await?;
    if queued >= i64::from(max_queued) {
        return Ok(Accepted::Full);
    }
    record.queue_position = u32::try_from(queued + 1).ok();
    insert_session(db, &record).await?;
    save_parts(db, &record).await?;
    append_event(db, &record, record.created_at).await?;
    if let Some(key) = idempotency {
        sqlx::query(
            "INSERT INTO idempotency (key_sha256, request_sha256, session_id) VALUES ($1, $2, $3)",
        )
        .bind(key.key_sha256)
        .bind(key.request_sha256)
        .bind(record.id.to_string())
        .execute(&mut *db)
        .await?;
    }
    Ok(Accepted::New(Box::new(record)))
}

async fn update(
    db: &mut Connection,
    id: SessionId,
    now: Timestamp,
    change: Changing,
) -> Result<Option<(Record, Change)>, StoreError> {
    hold(db, id).await?;
    let Some(mut record) = load(db, id).await? else {
        return Ok(None);
    };
    let changed = change(&mut record);
    if changed != Change::Nothing {
        save(db, &mut record, changed, now).await?;
    }
    Ok(Some((record, changed)))
}

async fn plan_next(
    db: &mut Connection,
    most: u32,
    at_once: u32,
    full: String,
    now: Timestamp,
) -> Result<Option<Record>, StoreError> {
    alone(db, "plan").await?;
    let (all, making): (i64, i64) = sqlx::query_as(
        "SELECT count(*), count(CASE WHEN phase IN ('planned', 'creating', 'booting', 'configuring', 'ready') THEN 1 END)
         FROM desktop WHERE phase <> 'gone'",
    )
    .fetch_one(&mut *db)
    .await?;
    if all >= i64::from(most) || making >= i64::from(at_once) {
        return Ok(None);
    }
    let next: Option<String> = sqlx::query_scalar(NEXT)
        .bind(full)
        .fetch_optional(&mut *db)
        .await?;
    let Some(id) = next else { return Ok(None) };
    let Some(mut record) = load(db, parse(&id)?).await? else {
        return Ok(None);
    };
    let name = u32::try_from(next_number(db).await?)
        .ok()
        .and_then(DesktopName::from_number)
        .ok_or(StoreError::NoNames)?;
    if record.plan(name, now).is_err() {
        return Ok(None);
    }
    save(db, &mut record, Change::Told, now).await?;
    Ok(Some(record))
}

async fn renumber_queue(db: &mut Connection, now: Timestamp) -> Result<Vec<Record>, StoreError> {
    alone(db, "renumber").await?;
    let moved: Vec<(String, i64)> = sqlx::query_as(
        "SELECT id, place FROM (
             SELECT id, queue_position, row_number() OVER (ORDER BY created_us, id) AS place
             FROM session WHERE phase = 'queued') AS queue
         WHERE queue_position IS DISTINCT FROM place ORDER BY place",
    )
    .fetch_all(&mut *db)
    .await?;
    let mut records = Vec::with_capacity(moved.len());
    for (id, place) in moved {
        let id = parse(&id)?;
        hold(db, id).await?;
        // It may have left the queue before it was held.
        if let Some(mut record) = load(db, id).await?
            && record.phase == SessionPhase::Queued
        {
            record.queue_position = u32::try_from(place).ok();
            save(db, &mut record, Change::Told, now).await?;
            records.push(record);
        }
    }
    Ok(records)
}

async fn forget(db: &mut Connection, before: Timestamp) -> Result<u64, StoreError> {
    alone(db, "forget").await?;
    let done = sqlx::query(
        "DELETE FROM session WHERE phase IN ('ended', 'failed') AND created_us < $1
           AND NOT EXISTS (SELECT 1 FROM desktop WHERE session_id = session.id AND phase <> 'gone')",
    )
    .bind(before.as_microsecond())
    .execute(db)
    .await?;
    Ok(done.rows_affected())
}

async fn resume(
    db: &mut Connection,
    seen: Option<DesktopName>,
    now: Timestamp,
) -> Result<Option<Restored>, StoreError> {
    // Nobody gives a number meanwhile.
    alone(db, "plan").await?;
    let copied: bool = sqlx::query_scalar(COPIED).fetch_one(&mut *db).await?;
    let highest: i64 = sqlx::query_scalar(HIGHEST).fetch_one(&mut *db).await?;
    let row: Option<(i64, i64, i64)> =
        sqlx::query_as("SELECT known, resumed, at_us FROM lineage WHERE at_us IS NOT NULL")
            .fetch_optional(&mut *db)
            .await?;
    let before = match row {
        Some((known, resumed, at)) => Some(Restored {
            known: desktop_name(known)?,
            resumed: desktop_name(resumed)?,
            at: moment(at)?,
        }),
        None => None,
    };
    let highest = desktop_name(highest)?;
    if !copied && seen <= Some(highest) {
        return Ok(before);
    }
    let restored = Restored::noticed(before, highest, seen, now);
    sqlx::query("UPDATE lineage SET known = $1, resumed = $2, at_us = $3")
        .bind(number(restored.known))
        .bind(number(restored.resumed))
        .bind(now.as_microsecond())
        .execute(&mut *db)
        .await?;
    sqlx::query(IN_USE).execute(&mut *db).await?;
    go_on_above(db, number(restored.resumed)).await?;
    Ok(Some(restored))
}

async fn reserve(
    db: &mut Connection,
    machine: Reserved,
    clones: u32,
) -> Result<Reserving, StoreError> {
    alone(db, "reserve").await?;
    let cloning: i64 =
        sqlx::query_scalar("SELECT count(*) FROM machine WHERE storage = $1 AND cloning = 1")
            .bind(&machine.storage)
            .fetch_one(&mut *db)
            .await?;
    if cloning >= i64::from(clones) {
        return Ok(Reserving::Waits);
    }
    let done = sqlx::query(
        "INSERT INTO machine (number, node, memory_mib, storage, cloning) VALUES ($1, $2, $3, $4, 1) ON CONFLICT DO NOTHING",
    )
    .bind(number(machine.name))
    .bind(machine.node)
    .bind(i64::from(machine.memory_mib))
    .bind(machine.storage)
    .execute(db)
    .await?;
    Ok(if done.rows_affected() > 0 {
        Reserving::Done
    } else {
        Reserving::Taken
    })
}

/// Runs a change that only who holds the lock may make, and says why if it changed nothing.
async fn under_lock(
    db: &mut Connection,
    name: DesktopName,
    change: Query,
) -> Result<Locking, StoreError> {
    if change.execute(&mut *db).await?.rows_affected() > 0 {
        return Ok(Locking::Done);
    }
    let held: Option<Option<String>> =
        sqlx::query_scalar("SELECT lock FROM machine WHERE number = $1")
            .bind(number(name))
            .fetch_optional(db)
            .await?;
    Ok(held.flatten().map_or(Locking::Nothing, Locking::Held))
}

async fn keep(db: &mut Connection, words: Kept) -> Result<(), StoreError> {
    alone(db, "keep").await?;
    let session = words.session.to_string();
    sqlx::query(
        "INSERT INTO log (number, session_id, at_us, text) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
    )
    .bind(number(words.desktop))
    .bind(session.clone())
    .bind(words.at.as_microsecond())
    .bind(without_nul(&words.text))
    .execute(&mut *db)
    .await?;
    sqlx::query(
        "DELETE FROM log WHERE number IN (
             SELECT number FROM (
                 SELECT number, sum(octet_length(text)) OVER (ORDER BY number DESC) AS bytes
                 FROM log WHERE session_id = $1) AS of_session
             WHERE bytes > $2)
         OR number IN (SELECT number FROM log ORDER BY number DESC LIMIT 9223372036854775807 OFFSET $3)",
    )
    .bind(session)
    .bind(i64::try_from(LONGEST).unwrap_or(i64::MAX))
    .bind(i64::try_from(DESKTOPS).unwrap_or(i64::MAX))
    .execute(db)
    .await?;
    Ok(())
}

async fn sight(
    db: &mut Connection,
    place: Place,
    look: Look,
) -> Result<Vec<(Turn, Stray)>, StoreError> {
    alone(db, "sight").await?;
    let rows = sqlx::query("SELECT * FROM stray WHERE provider = $1 AND host = $2")
        .bind(place.provider.clone())
        .bind(place.host.clone())
        .fetch_all(&mut *db)
        .await?;
    let mut known = BTreeMap::new();
    for row in &rows {
        let stray = read_stray(row)?;
        known.insert(stray.desktop, stray);
    }
    let turns = strays::seen(&place, &known, &look);
    for (_, stray) in &turns {
        let change = sqlx::query(
            "INSERT INTO stray (provider, host, number, first_us, last_us, quarantined_us, kept_us, tried_us, why, over_us, outcome)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
             ON CONFLICT (provider, host, number) DO UPDATE SET first_us = excluded.first_us, last_us = excluded.last_us,
                quarantined_us = excluded.quarantined_us, kept_us = excluded.kept_us, tried_us = excluded.tried_us,
                why = excluded.why, over_us = excluded.over_us, outcome = excluded.outcome",
        );
        of_stray(change, stray)
            .bind(stray.first_seen.as_microsecond())
            .bind(stray.last_seen.as_microsecond())
            .bind(us(stray.quarantined_at))
            .bind(us(stray.kept_at))
            .bind(us(stray.tried_at))
            .bind(stray.why.clone())
            .bind(us(stray.over.map(|over| over.0)))
            .bind(stray.over.map(|over| text(&over.1)).transpose()?)
            .execute(&mut *db)
            .await?;
    }
    Ok(turns)
}

/// Binds its key, the first three parameters.
fn of_stray(change: Query, stray: &Stray) -> Query {
    change
        .bind(stray.place.provider.clone())
        .bind(stray.place.host.clone())
        .bind(number(stray.desktop))
}

fn read_stray(row: &Row) -> Result<Stray, StoreError> {
    let outcome = row.try_get::<Option<String>, _>("outcome")?;
    let outcome: Option<Outcome> = outcome.map(enumerated).transpose()?;
    Ok(Stray {
        place: Place {
            provider: row.try_get("provider")?,
            host: row.try_get("host")?,
        },
        desktop: desktop_name(row.try_get("number")?)?,
        first_seen: time(row, "first_us")?,
        last_seen: time(row, "last_us")?,
        quarantined_at: maybe_time(row, "quarantined_us")?,
        kept_at: maybe_time(row, "kept_us")?,
        tried_at: maybe_time(row, "tried_us")?,
        why: row.try_get("why")?,
        over: maybe_time(row, "over_us")?.zip(outcome),
    })
}

/// PostgreSQL's text cannot hold one.
fn without_nul(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

/// The columns by which it is asked for.
fn by(whose: Whose) -> (Option<String>, Option<i64>) {
    match whose {
        Whose::Session(id) => (Some(id.to_string()), None),
        Whose::Desktop(name) => (None, Some(number(name))),
    }
}

fn number(name: DesktopName) -> i64 {
    i64::from(name.number())
}

fn unreadable(what: impl std::fmt::Display) -> StoreError {
    StoreError::Unreadable {
        what: what.to_string(),
    }
}

fn parse<T: std::str::FromStr>(text: &str) -> Result<T, StoreError> {
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

fn moment(us: i64) -> Result<Timestamp, StoreError> {
    Timestamp::from_microsecond(us).map_err(unreadable)
}

fn time(row: &Row, column: &str) -> Result<Timestamp, StoreError> {
    moment(row.try_get(column)?)
}

fn maybe_time(row: &Row, column: &str) -> Result<Option<Timestamp>, StoreError> {
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

fn desktop_name(number: i64) -> Result<DesktopName, StoreError> {
    u32::try_from(number)
        .ok()
        .and_then(DesktopName::from_number)
        .ok_or_else(|| unreadable(number))
}

fn event(row: &Row) -> Result<SessionEvent, StoreError> {
    Ok(SessionEvent {
        seq: u64::try_from(row.try_get::<i64, _>("seq")?).map_err(unreadable)?,
        at: time(row, "at_us")?,
        session: json(row.try_get("body")?)?,
    })
}

async fn before(db: &mut Connection, key: &Idempotency) -> Result<Option<Accepted>, StoreError> {
    let row = sqlx::query(
        "SELECT i.request_sha256, e.seq, e.at_us, e.body
         FROM idempotency AS i JOIN event AS e ON e.session_id = i.session_id AND e.seq = 1
         WHERE i.key_sha256 = $1",
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

async fn load(db: &mut Connection, id: SessionId) -> Result<Option<Record>, StoreError> {
    let row = sqlx::query("SELECT * FROM session WHERE id = $1")
        .bind(id.to_string())
        .fetch_optional(&mut *db)
        .await?;
    let Some(row) = row else { return Ok(None) };
    let desktop =
        sqlx::query("SELECT * FROM desktop WHERE session_id = $1 ORDER BY number DESC LIMIT 1")
            .bind(id.to_string())
            .fetch_optional(&mut *db)
            .await?;
    let stages = sqlx::query("SELECT * FROM stage WHERE session_id = $1 ORDER BY place")
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

fn read_desktop(row: &Row) -> Result<Desktop, StoreError> {
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

fn read_stage(row: &Row) -> Result<Stage, StoreError> {
    let positive = |v: Option<i64>| v.and_then(|v| u64::try_from(v).ok());
    let progress = row.try_get::<Option<String>, _>("progress")?;
    Ok(Stage {
        name: enumerated(row.try_get("name")?)?,
        started_at: time(row, "started_us")?,
        duration_ms: positive(row.try_get("duration_ms")?),
        expected_ms: positive(row.try_get("expected_ms")?),
        progress: progress.as_deref().map(json).transpose()?,
    })
}

async fn insert_session(db: &mut Connection, record: &Record) -> Result<(), StoreError> {
    let wish = &record.wish;
    sqlx::query(
        "INSERT INTO session (id, origin, template, provider, \"user\", language, time_zone, keyboard, phase, seq,
            created_us, expires_us, activity_us, queue_position, expected)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)",
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
    db: &mut Connection,
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
        "UPDATE session SET phase = $1, seq = $2, activity_us = $3, heartbeat_us = $4, ready_us = $5, disconnected_us = $6,
            keep_us = $7, ends_us = $8, queue_position = $9, end_reason = $10, failure = $11
         WHERE id = $12",
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
async fn save_parts(db: &mut Connection, record: &Record) -> Result<(), StoreError> {
    if let Some(desktop) = &record.desktop {
        let (address, certificate) = desktop.announced().unzip();
        sqlx::query(
            "INSERT INTO desktop (number, session_id, provider, phase, created_us, claimed_us, destroying_us, address,
                certificate, stuck_reason)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
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
        .bind(desktop.stuck_reason().map(without_nul))
        .execute(&mut *db)
        .await?;
    }
    sqlx::query("DELETE FROM stage WHERE session_id = $1")
        .bind(record.id.to_string())
        .execute(&mut *db)
        .await?;
    for (place, stage) in (0_i64..).zip(&record.stages) {
        sqlx::query(
            "INSERT INTO stage (session_id, place, name, started_us, duration_ms, expected_ms, progress)
             VALUES ($1, $2, $3, $4, $5, $6, $7)",
        )
        .bind(record.id.to_string())
        .bind(place)
        .bind(text(&stage.name)?)
        .bind(stage.started_at.as_microsecond())
        .bind(ms(stage.duration_ms))
        .bind(ms(stage.expected_ms))
        .bind(stage.progress.as_ref().map(to_json).transpose()?)
        .execute(&mut *db)
        .await?;
    }
    Ok(())
}

async fn append_event(
    db: &mut Connection,
    record: &Record,
    now: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO event (session_id, seq, at_us, body) VALUES ($1, $2, $3, $4)")
        .bind(record.id.to_string())
        .bind(i64::try_from(record.seq).unwrap_or(i64::MAX))
        .bind(now.as_microsecond())
        .bind(to_json(&record.view())?)
        .execute(db)
        .await?;
    Ok(())
}
