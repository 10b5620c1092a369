//! The store in SQL, in words that SQLite and PostgreSQL both understand: what each intent reads and writes.
//!
//! Compiled once for each of them: `super` is `sqlite` or `postgres`, and says how an intent becomes one transaction, what
//! holds others off meanwhile, and what they say differently.

use super::{
    COPIED, Connection, HIGHEST, IN_USE, NEXT, Row, SEVERAL, Sql, alone, go_on_above, hold,
    hold_all, next_number, tell, tell_all,
};
use crate::clock::ms_between;
use crate::config::Limits;
use crate::desktop::{Desktop, StoredDesktop};
use crate::failpoints::{self, around};
use crate::last_words::LONGEST;
use crate::session::{Expected, Record, Wish};
use crate::store::machines::{Locking, Machines, Reserved, Reserving};
use crate::store::pulse::{Pulse, Tally};
use crate::store::receipts::Receipts;
use crate::store::replicas::{ReplicaId, Replicas};
use crate::store::strays::{self, Look, Outcome, Place, Stray, Strays, Turn};
use crate::store::words::{DESKTOPS, Kept, Whose, Words};
use crate::store::{
    Accepted, Change, Changing, Idempotency, Numbered, Planned, Restored, Store, StoreError,
    expected,
};
use async_trait::async_trait;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use mayfly_api::{DesktopName, Removal, SessionEvent, SessionId, SessionPhase, Stage, StageName};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::Row as _;
use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

#[async_trait]
impl Store for Sql {
    async fn accept_all(
        &self,
        wishes: Vec<(Record, Option<Idempotency>)>,
        max_queued: u32,
    ) -> Result<Vec<Accepted>, StoreError> {
        let mut wishes = wishes;
        wishes
            .iter_mut()
            .for_each(|(record, _)| record.take(self.me()));
        self.commit("accept", move |db| {
            Box::pin(accept_all(db, wishes, max_queued))
        })
        .await
    }

    async fn accepted_before(&self, key: &Idempotency) -> Result<Option<Accepted>, StoreError> {
        let db = &mut *self.readers.acquire().await?;
        Ok(before(db, &[key]).await?.accepted(key))
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
        load_all(&mut tx, ids).await
    }

    async fn update(
        &self,
        id: SessionId,
        now: Timestamp,
        change: Changing,
    ) -> Result<Option<(Record, Change)>, StoreError> {
        let done = self.write(move |db| Box::pin(update(db, id, now, change)));
        let done = done.await?;
        if let Some((record, Change::Told | Change::Quiet)) = &done {
            failpoints::after(|| record.commit());
        }
        Ok(done)
    }

    async fn plan_next(
        &self,
        limits: &Limits,
        full: &[String],
        now: Timestamp,
    ) -> Result<Planned, StoreError> {
        let (most, at_once) = (limits.max_desktops, limits.concurrent_creates);
        let (me, full) = (self.me().clone(), to_json(&full)?);
        let planned = self.write(move |db| Box::pin(plan_next(db, me, [most, at_once], full, now)));
        let planned = planned.await?;
        if let Planned::Given(record) = &planned {
            failpoints::after(|| record.commit());
        }
        Ok(planned)
    }

    async fn renumber_queue(
        &self,
        after: u32,
        count: u32,
        now: Timestamp,
    ) -> Result<Numbered, StoreError> {
        self.commit("renumber", move |db| {
            Box::pin(renumber_queue(db, after, count, now))
        })
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
        let mut all = 0;
        loop {
            let part = self.commit("forget", move |db| Box::pin(forget(db, before)));
            let part = part.await?;
            all += part;
            if part < FORGOTTEN {
                return Ok(all);
            }
        }
    }

    async fn resume(
        &self,
        seen: Option<DesktopName>,
        now: Timestamp,
    ) -> Result<Option<Restored>, StoreError> {
        self.commit("resume", move |db| Box::pin(resume(db, seen, now)))
            .await
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
        self.commit("reserve", move |db| Box::pin(reserve(db, machine, clones)))
            .await
    }

    async fn cloned(&self, name: DesktopName) -> Result<(), StoreError> {
        let change = sqlx::query("UPDATE machine SET cloning = 0 WHERE number = $1");
        self.run("cloned", change.bind(number(name))).await
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
        self.commit("lock", move |db| Box::pin(under_lock(db, name, change)))
            .await
    }

    async fn unlock(&self, name: DesktopName, id: &str) -> Result<Locking, StoreError> {
        let change = sqlx::query(
            "UPDATE machine SET lock_id = NULL, lock = NULL WHERE number = $1 AND (lock_id IS NULL OR lock_id = $2)",
        );
        let change = change.bind(number(name)).bind(id.to_owned());
        self.commit("unlock", move |db| Box::pin(under_lock(db, name, change)))
            .await
    }

    async fn save(&self, name: DesktopName, id: &str, state: &[u8]) -> Result<Locking, StoreError> {
        let change =
            sqlx::query("UPDATE machine SET state = $1 WHERE number = $2 AND lock_id = $3");
        let change = change
            .bind(state.to_owned())
            .bind(number(name))
            .bind(id.to_owned());
        self.commit("save", move |db| Box::pin(under_lock(db, name, change)))
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
        self.run("release", change.bind(number(name))).await
    }
}

#[async_trait]
impl Words for Sql {
    async fn keep(&self, words: &Kept) -> Result<(), StoreError> {
        let words = words.clone();
        self.commit("words", move |db| Box::pin(keep(db, words)))
            .await
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
        self.run("receipt", change).await
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
        self.commit("sight", move |db| Box::pin(sight(db, place, look)))
            .await
    }

    async fn begin_removal(&self, stray: &Stray, now: Timestamp) -> Result<bool, StoreError> {
        let change = sqlx::query(
            "UPDATE stray SET tried_us = $4, why = NULL WHERE provider = $1 AND host = $2 AND number = $3 AND over_us IS NULL
                AND quarantined_us IS NOT NULL AND kept_us IS NULL AND tried_us IS NOT DISTINCT FROM $5",
        );
        let change = of_stray(change, stray)
            .bind(now.as_microsecond())
            .bind(us(stray.tried_at));
        Ok(self.changed("removal", change).await? > 0)
    }

    async fn removal_failed(&self, stray: &Stray, why: &str) -> Result<(), StoreError> {
        let change = sqlx::query(
            "UPDATE stray SET why = $4 WHERE provider = $1 AND host = $2 AND number = $3 AND over_us IS NULL",
        );
        self.run(
            "removal failed",
            of_stray(change, stray).bind(without_nul(why)),
        )
        .await
    }

    async fn removed(&self, stray: &Stray, now: Timestamp) -> Result<bool, StoreError> {
        let change = sqlx::query(
            "UPDATE stray SET over_us = $4, outcome = 'removed' WHERE provider = $1 AND host = $2 AND number = $3
                AND over_us IS NULL AND tried_us IS NOT NULL",
        );
        let change = of_stray(change, stray).bind(now.as_microsecond());
        Ok(self.changed("removed", change).await? > 0)
    }

    async fn keep_stray(
        &self,
        desktop: DesktopName,
        at: Option<Timestamp>,
    ) -> Result<u64, StoreError> {
        let change =
            sqlx::query("UPDATE stray SET kept_us = $1 WHERE number = $2 AND over_us IS NULL");
        self.changed("keep stray", change.bind(us(at)).bind(number(desktop)))
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
        self.changed("forget strays", change.bind(before.as_microsecond()))
            .await
    }
}

#[async_trait]
impl Pulse for Sql {
    async fn beat(&self, now: Timestamp) -> Result<(), StoreError> {
        let change = sqlx::query(
            "INSERT INTO pulse (id, at_us) VALUES (1, $1) ON CONFLICT (id) DO UPDATE SET at_us = excluded.at_us",
        );
        self.run("pulse", change.bind(now.as_microsecond())).await
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
    /// Makes an intent, between points of that name; durable when this returns.
    async fn commit<T: Send + 'static>(
        &self,
        what: &str,
        intent: impl for<'c> FnOnce(&'c mut Connection) -> BoxFuture<'c, Result<T, StoreError>>
        + Send
        + 'static,
    ) -> Result<T, StoreError> {
        around(&format!("commit {what}"), self.write(intent)).await
    }

    /// One statement, whatever it changed.
    async fn run(&self, what: &str, change: Query) -> Result<(), StoreError> {
        self.changed(what, change).await.map(drop)
    }

    /// One statement; how many rows it changed.
    async fn changed(&self, what: &str, change: Query) -> Result<u64, StoreError> {
        self.commit(what, move |db| {
            Box::pin(async move { Ok(change.execute(db).await?.rows_affected()) })
        })
        .await
    }
}

/// One statement for each table, whatever the number of wishes.
async fn accept_all(
    db: &mut Connection,
    wishes: Vec<(Record, Option<Idempotency>)>,
    max_queued: u32,
) -> Result<Vec<Accepted>, StoreError> {
    alone(db, "accept").await?;
    let keys: Vec<_> = wishes.iter().filter_map(|(_, key)| key.as_ref()).collect();
    let mut known = before(db, &keys).await?;
    let mut queued = known.queued;
    let mut rows = Vec::with_capacity(wishes.len());
    let mut accepted = Vec::with_capacity(wishes.len());
    for (mut record, key) in wishes {
        if let Some(before) = key.as_ref().and_then(|key| known.accepted(key)) {
            accepted.push(before);
            continue;
        }
        if queued >= i64::from(max_queued) {
            accepted.push(Accepted::Full);
            continue;
        }
        queued += 1;
        record.queue_position = u32::try_from(queued).ok();
        let row = NewRow::of(&record, key.as_ref())?;
        if let Some(key) = key {
            known.now(key, &record);
        }
        rows.push(row);
        accepted.push(Accepted::New(Box::new(record)));
    }
    if !rows.is_empty() {
        let rows = to_json(&rows)?;
        for insert in NEW.iter() {
            sqlx::query(sqlx::AssertSqlSafe(insert.as_str()))
                .bind(rows.clone())
                .execute(&mut *db)
                .await?;
        }
    }
    Ok(accepted)
}

/// What a new session puts into the tables.
#[derive(Serialize)]
struct NewRow {
    id: String,
    origin: String,
    template: String,
    provider: String,
    user: String,
    language: Option<String>,
    time_zone: Option<String>,
    keyboard: Option<String>,
    phase: String,
    seq: u64,
    created_us: i64,
    expires_us: i64,
    activity_us: i64,
    queue_position: Option<u32>,
    expected: String,
    owner: Option<String>,
    fence: u64,
    /// It has one.
    stage: String,
    expected_ms: Option<i64>,
    event: String,
    key: Option<String>,
    request: Option<String>,
}

impl NewRow {
    fn of(record: &Record, key: Option<&Idempotency>) -> Result<Self, StoreError> {
        let wish = &record.wish;
        let stage = record.stages.last();
        Ok(Self {
            id: record.id.to_string(),
            origin: text(&wish.origin)?,
            template: wish.template.clone(),
            provider: wish.provider.clone(),
            user: wish.user.clone(),
            language: wish.language.clone(),
            time_zone: wish.time_zone.clone(),
            keyboard: wish.keyboard.clone(),
            phase: text(&record.phase)?,
            seq: record.seq,
            created_us: record.created_at.as_microsecond(),
            expires_us: record.expires_at.as_microsecond(),
            activity_us: record.last_activity.as_microsecond(),
            queue_position: record.queue_position,
            expected: to_json(&record.expected)?,
            owner: record.owner.as_ref().map(|o| o.0.clone()),
            fence: record.fence,
            stage: text(&record.stage())?,
            expected_ms: stage.and_then(|stage| ms(stage.expected_ms)),
            event: to_json(&record.view())?,
            key: key.map(|key| key.key_sha256.clone()),
            request: key.map(|key| key.request_sha256.clone()),
        })
    }
}

/// Of [`NewRow`]s.
static NEW: LazyLock<Vec<String>> =
    LazyLock::new(|| together(&[NEW_SESSIONS, NEW_STAGES, NEW_EVENTS, NEW_KEYS]));

/// Statements with the same argument, in as few queries as the database takes.
fn together(statements: &[&str]) -> Vec<String> {
    let most = if SEVERAL { statements.len() } else { 1 };
    let queries = statements.chunks(most);
    queries.map(|query| query.join(";\n")).collect()
}

const NEW_SESSIONS: &str = concat!(
    "INSERT INTO session (id, origin, template, provider, \"user\", language, time_zone, keyboard, phase, seq,
        created_us, expires_us, activity_us, queue_position, expected, owner, fence)
     SELECT value->>'id', value->>'origin', value->>'template', value->>'provider', value->>'user', value->>'language',
        value->>'time_zone', value->>'keyboard', value->>'phase', CAST(value->>'seq' AS bigint),
        CAST(value->>'created_us' AS bigint), CAST(value->>'expires_us' AS bigint), CAST(value->>'activity_us' AS bigint),
        CAST(value->>'queue_position' AS bigint), value->>'expected', value->>'owner', CAST(value->>'fence' AS bigint)
     FROM ",
    rows!()
);
const NEW_STAGES: &str = concat!(
    "INSERT INTO stage (session_id, place, name, started_us, expected_ms)
     SELECT value->>'id', 0, value->>'stage', CAST(value->>'created_us' AS bigint), CAST(value->>'expected_ms' AS bigint)
     FROM ",
    rows!()
);
const NEW_EVENTS: &str = concat!(
    "INSERT INTO event (session_id, seq, at_us, body)
     SELECT value->>'id', CAST(value->>'seq' AS bigint), CAST(value->>'created_us' AS bigint), value->>'event' FROM ",
    rows!()
);
const NEW_KEYS: &str = concat!(
    "INSERT INTO idempotency (key_sha256, request_sha256, session_id)
     SELECT value->>'key', value->>'request', value->>'id' FROM ",
    rows!(),
    " WHERE value->>'key' IS NOT NULL"
);

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
    let was = record.clone();
    let changed = change(&mut record);
    if changed != Change::Nothing {
        failpoints::before(|| record.commit());
        save(db, &was, &mut record, changed, now).await?;
    }
    Ok(Some((record, changed)))
}

async fn plan_next(
    db: &mut Connection,
    me: ReplicaId,
    [most, at_once]: [u32; 2],
    full: String,
    now: Timestamp,
) -> Result<Planned, StoreError> {
    alone(db, "plan").await?;
    let (all, making): (i64, i64) = sqlx::query_as(
        "SELECT count(*), count(CASE WHEN phase IN ('planned', 'creating', 'booting', 'configuring', 'ready') THEN 1 END)
         FROM desktop WHERE phase <> 'gone'",
    )
    .fetch_one(&mut *db)
    .await?;
    if all >= i64::from(most) || making >= i64::from(at_once) {
        return Ok(Planned::NoPlace);
    }
    let next: Option<String> = sqlx::query_scalar(NEXT)
        .bind(full)
        .fetch_optional(&mut *db)
        .await?;
    let Some(id) = next else {
        return Ok(Planned::Nobody);
    };
    let Some(mut record) = load(db, parse(&id)?).await? else {
        return Ok(Planned::Nobody);
    };
    let name = u32::try_from(next_number(db).await?)
        .ok()
        .and_then(DesktopName::from_number)
        .ok_or(StoreError::NoNames)?;
    let was = record.clone();
    record.take(&me);
    if record.plan(name, now).is_err() {
        return Ok(Planned::Nobody);
    }
    failpoints::before(|| record.commit());
    save(db, &was, &mut record, Change::Told, now).await?;
    Ok(Planned::Given(Box::new(record)))
}

async fn renumber_queue(
    db: &mut Connection,
    after: u32,
    count: u32,
    now: Timestamp,
) -> Result<Numbered, StoreError> {
    alone(db, "renumber").await?;
    let part: Vec<(String, Option<i64>)> = sqlx::query_as(
        "SELECT id, queue_position FROM session WHERE phase = 'queued' ORDER BY created_us, id LIMIT $1 OFFSET $2",
    )
    .bind(i64::from(count))
    .bind(i64::from(after))
    .fetch_all(&mut *db)
    .await?;
    let to_the_end = part.len() < count as usize;
    let places = (i64::from(after) + 1..).zip(part);
    let moved: Vec<_> = places
        .filter(|(place, (_, told))| *told != Some(*place))
        .map(|(place, (id, _))| (id, place))
        .collect();
    if moved.is_empty() {
        return Ok(Numbered {
            told: Vec::new(),
            to_the_end,
        });
    }
    let ids: Vec<_> = moved.iter().map(|(id, _)| id.clone()).collect();
    let places: HashMap<_, _> = moved.into_iter().collect();
    hold_all(db, &to_json(&Id::of(&ids))?).await?;
    let mut moved = load_all(db, ids).await?;
    // Some may have left the queue before they were held.
    moved.retain(|record| record.phase == SessionPhase::Queued);
    for record in &mut moved {
        let place = places.get(&record.id.to_string());
        record.queue_position = place.and_then(|place| u32::try_from(*place).ok());
        record.seq += 1;
    }
    let rows: Result<Vec<_>, StoreError> = moved.iter().map(|r| Moved::of(r, now)).collect();
    let rows = to_json(&rows?)?;
    for change in MOVED.iter() {
        sqlx::query(sqlx::AssertSqlSafe(change.as_str()))
            .bind(rows.clone())
            .execute(&mut *db)
            .await?;
    }
    tell_all(db, &rows).await?;
    Ok(Numbered {
        told: moved,
        to_the_end,
    })
}

/// A session by its id, in an array for [`rows!`].
#[derive(Serialize)]
struct Id<'a> {
    id: &'a str,
}

impl<'a> Id<'a> {
    fn of(ids: &'a [String]) -> Vec<Self> {
        ids.iter().map(|id| Self { id }).collect()
    }
}

/// Another place in the queue, and its event.
#[derive(Serialize)]
struct Moved {
    id: String,
    seq: u64,
    queue_position: Option<u32>,
    at_us: i64,
    event: String,
}

impl Moved {
    fn of(record: &Record, now: Timestamp) -> Result<Self, StoreError> {
        Ok(Self {
            id: record.id.to_string(),
            seq: record.seq,
            queue_position: record.queue_position,
            at_us: now.as_microsecond(),
            event: to_json(&record.view())?,
        })
    }
}

/// Of [`Moved`]s.
static MOVED: LazyLock<Vec<String>> = LazyLock::new(|| together(&[MOVED_SESSIONS, MOVED_EVENTS]));

const MOVED_SESSIONS: &str = concat!(
    "UPDATE session SET seq = CAST(value->>'seq' AS bigint), queue_position = CAST(value->>'queue_position' AS bigint)
     FROM ",
    rows!(),
    " WHERE session.id = value->>'id'"
);
const MOVED_EVENTS: &str = concat!(
    "INSERT INTO event (session_id, seq, at_us, body)
     SELECT value->>'id', CAST(value->>'seq' AS bigint), CAST(value->>'at_us' AS bigint), value->>'event' FROM ",
    rows!()
);

/// So many sessions are forgotten by one transaction: others are made meanwhile, and it is held in memory.
const FORGOTTEN: u64 = 1_000;

async fn forget(db: &mut Connection, before: Timestamp) -> Result<u64, StoreError> {
    alone(db, "forget").await?;
    let done = sqlx::query(
        "DELETE FROM session WHERE id IN (SELECT id FROM session WHERE phase IN ('ended', 'failed') AND created_us < $1
           AND NOT EXISTS (SELECT 1 FROM desktop WHERE session_id = session.id AND phase <> 'gone') LIMIT $2)",
    )
    .bind(before.as_microsecond())
    .bind(i64::try_from(FORGOTTEN).unwrap_or(i64::MAX))
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

/// What is there when sessions come.
struct Before {
    /// So many wait.
    queued: i64,
    /// What keys were used for: the request's SHA-256, and the first event of its session.
    used: HashMap<String, (String, SessionEvent)>,
}

impl Before {
    fn accepted(&self, key: &Idempotency) -> Option<Accepted> {
        let (request, first) = self.used.get(&key.key_sha256)?;
        if *request != key.request_sha256 {
            return Some(Accepted::Mismatch);
        }
        Some(Accepted::Again(Box::new(first.clone())))
    }

    /// This one is used for a new session.
    fn now(&mut self, key: Idempotency, record: &Record) {
        let first = SessionEvent {
            seq: record.seq,
            at: record.created_at,
            session: record.view(),
        };
        self.used
            .insert(key.key_sha256, (key.request_sha256, first));
    }
}

async fn before(db: &mut Connection, keys: &[&Idempotency]) -> Result<Before, StoreError> {
    let ids: Vec<_> = keys.iter().map(|key| key.key_sha256.clone()).collect();
    let rows = sqlx::query(concat!(
        "SELECT * FROM (",
        queued!(),
        ") AS waiting LEFT JOIN (
             SELECT i.key_sha256, i.request_sha256, e.seq, e.at_us, e.body
             FROM idempotency AS i JOIN event AS e ON e.session_id = i.session_id AND e.seq = 1
             WHERE i.key_sha256 IN (SELECT value->>'id' FROM ",
        rows!(),
        ")) AS used ON TRUE"
    ))
    .bind(to_json(&Id::of(&ids))?)
    .fetch_all(&mut *db)
    .await?;
    let queued = match rows.first() {
        Some(row) => row.try_get("queued")?,
        None => 0,
    };
    let mut used = HashMap::new();
    for row in &rows {
        if let Some(key) = row.try_get("key_sha256")? {
            used.insert(key, (row.try_get("request_sha256")?, event(row)?));
        }
    }
    Ok(Before { queued, used })
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
    let desktop = desktop.as_ref().map(read_desktop).transpose()?;
    let stages = stages.iter().map(read_stage).collect::<Result<_, _>>()?;
    Ok(Some(read_session(&row, desktop, stages)?))
}

/// Sessions that there are, in that order.
async fn load_all(db: &mut Connection, ids: Vec<String>) -> Result<Vec<Record>, StoreError> {
    let wanted = to_json(&Id::of(&ids))?;
    let sessions = sqlx::query(concat!(
        "SELECT * FROM session WHERE id IN (SELECT value->>'id' FROM ",
        rows!(),
        ")"
    ));
    let desktops = sqlx::query(concat!(
        "SELECT * FROM desktop WHERE session_id IN (SELECT value->>'id' FROM ",
        rows!(),
        ") ORDER BY number"
    ));
    let stages = sqlx::query(concat!(
        "SELECT * FROM stage WHERE session_id IN (SELECT value->>'id' FROM ",
        rows!(),
        ") ORDER BY session_id, place"
    ));
    let mut of: HashMap<String, (Option<Desktop>, Vec<Stage>)> = HashMap::new();
    for row in &desktops.bind(wanted.clone()).fetch_all(&mut *db).await? {
        // The last is the one.
        of.entry(row.try_get("session_id")?).or_default().0 = Some(read_desktop(row)?);
    }
    for row in &stages.bind(wanted.clone()).fetch_all(&mut *db).await? {
        let stages = &mut of.entry(row.try_get("session_id")?).or_default().1;
        stages.push(read_stage(row)?);
    }
    let mut found = HashMap::with_capacity(ids.len());
    for row in &sessions.bind(wanted).fetch_all(&mut *db).await? {
        let id: String = row.try_get("id")?;
        let (desktop, stages) = of.remove(&id).unwrap_or_default();
        found.insert(id, read_session(row, desktop, stages)?);
    }
    Ok(ids.iter().filter_map(|id| found.remove(id)).collect())
}

fn read_session(
    row: &Row,
    desktop: Option<Desktop>,
    stages: Vec<Stage>,
) -> Result<Record, StoreError> {
    let end_reason = row.try_get::<Option<String>, _>("end_reason")?;
    let failure = row.try_get::<Option<String>, _>("failure")?;
    let queue_position: Option<i64> = row.try_get("queue_position")?;
    Ok(Record {
        id: parse(row.try_get("id")?)?,
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
        created_at: time(row, "created_us")?,
        expires_at: time(row, "expires_us")?,
        last_activity: time(row, "activity_us")?,
        heartbeat_at: maybe_time(row, "heartbeat_us")?,
        ready_at: maybe_time(row, "ready_us")?,
        disconnected_at: maybe_time(row, "disconnected_us")?,
        keep_until: maybe_time(row, "keep_us")?,
        ends_at: maybe_time(row, "ends_us")?,
        queue_position: queue_position.and_then(|p| u32::try_from(p).ok()),
        expected: json(row.try_get("expected")?)?,
        end_reason: end_reason.map(enumerated).transpose()?,
        failure: failure.as_deref().map(json).transpose()?,
        desktop,
        stages,
        owner: row.try_get::<Option<String>, _>("owner")?.map(ReplicaId),
        fence: u64::try_from(row.try_get::<i64, _>("fence")?).map_err(unreadable)?,
    })
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
        host: row.try_get::<Option<String>, _>("host")?.map(ReplicaId),
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

/// Writes a changed record, and its event if it is to be told.
async fn save(
    db: &mut Connection,
    was: &Record,
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
            keep_us = $7, ends_us = $8, queue_position = $9, end_reason = $10, failure = $11, owner = $12, fence = $13
         WHERE id = $14",
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
    .bind(record.owner.as_ref().map(|o| o.0.clone()))
    .bind(i64::try_from(record.fence).unwrap_or(i64::MAX))
    .bind(record.id.to_string())
    .execute(&mut *db)
    .await?;
    save_parts(&mut *db, was, record).await?;
    if change == Change::Told {
        append_event(&mut *db, record, now).await?;
    }
    tell(db, record.id).await
}

/// Writes the desktop and the stages, as far as they changed.
async fn save_parts(db: &mut Connection, was: &Record, record: &Record) -> Result<(), StoreError> {
    if let Some(desktop) = &record.desktop
        && was.desktop.as_ref() != Some(desktop)
    {
        let (address, certificate) = desktop.announced().unzip();
        sqlx::query(
            "INSERT INTO desktop (number, session_id, provider, phase, created_us, claimed_us, destroying_us, address,
                certificate, stuck_reason, host)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
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
        .bind(desktop.host().map(|h| h.0.clone()))
        .execute(&mut *db)
        .await?;
    }
    let kept = record.stages.iter().zip(&was.stages);
    let kept = kept.take_while(|(stage, was)| stage == was).count();
    if kept < was.stages.len() {
        sqlx::query("DELETE FROM stage WHERE session_id = $1 AND place >= $2")
            .bind(record.id.to_string())
            .bind(i64::try_from(kept).unwrap_or(i64::MAX))
            .execute(&mut *db)
            .await?;
    }
    for (place, stage) in (0_i64..).zip(&record.stages).skip(kept) {
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
