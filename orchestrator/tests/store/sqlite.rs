//! What the store on SQLite promises for itself.

use crate::conformance::asked;
use futures_util::future::join_all;
use jiff::Timestamp;
use mayfly_api::DesktopName;
use mayfly_orchestrator::session::Expected;
use mayfly_orchestrator::store::machines::{Locking, Machines, Reserved};
use mayfly_orchestrator::store::sqlite::SqliteStore;
use mayfly_orchestrator::store::words::{Kept, Words};
use mayfly_orchestrator::store::{Accepted, Change, Store, StoreError};
use sqlx::Connection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// How often the log was written to the end of a commit: every commit ends with a frame that says the database's size.
fn commits(database: &Path) -> usize {
    let log = std::fs::read(database.with_extension("db-wal")).unwrap();
    let (header, frame) = (32, 24 + 4_096);
    let frames = log[header..].chunks_exact(frame);
    frames.filter(|f| f[4..8] != [0; 4]).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_that_wait_at_the_same_time_share_a_commit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mayfly.db");
    let store = SqliteStore::open(&path).await.unwrap();
    // While somebody reads what is in the log, it does not begin anew: all commits can be counted.
    let options = SqliteConnectOptions::new().filename(&path);
    let mut reader = SqliteConnection::connect_with(&options).await.unwrap();
    let mut reading = reader.begin().await.unwrap();
    sqlx::query("SELECT * FROM session")
        .fetch_all(&mut *reading)
        .await
        .unwrap();
    let before = commits(&path);
    let sessions = (0..100).map(|_| {
        let record = asked(Expected::default(), Timestamp::now());
        store.accept(record, None, 1_000)
    });
    for accepted in join_all(sessions).await {
        assert!(matches!(accepted, Ok(Accepted::New(_))), "{accepted:?}");
    }
    let commits = commits(&path) - before;
    assert!(
        (1..=50).contains(&commits),
        "100 sessions in {commits} commits"
    );
    assert_eq!(store.live().await.unwrap().len(), 100);
    drop(reading);
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_begins_anew_while_changes_never_end() {
    const STATE: usize = 1 << 20;
    const BOUND: usize = 480 << 20;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mayfly.db");
    let store = SqliteStore::open(&path).await.unwrap();
    let machine = |name| Reserved {
        name,
        node: "node".to_owned(),
        memory_mib: 1,
        storage: "storage".to_owned(),
    };
    let names: Vec<_> = (0..4).filter_map(DesktopName::from_number).collect();
    for name in &names {
        store.reserve(&machine(*name), 9).await.unwrap();
        store.lock(*name, "id", "{}").await.unwrap();
    }
    // There is always one that waits to be written.
    let (written, anew) = (AtomicUsize::new(0), AtomicBool::new(false));
    join_all(names.iter().map(async |name| {
        while !anew.load(Ordering::Relaxed) {
            let before = written.fetch_add(STATE, Ordering::Relaxed);
            assert!(before < BOUND, "the log has most of what was ever written");
            // What is there already is not written again.
            let state = before.to_be_bytes().repeat(STATE / size_of::<usize>());
            let saved = store.save(*name, "id", &state).await.unwrap();
            assert_eq!(saved, Locking::Done);
            let log = std::fs::metadata(path.with_extension("db-wal")).unwrap();
            if before > 2 * usize::try_from(log.len()).unwrap() {
                anew.store(true, Ordering::Relaxed);
            }
        }
    }))
    .await;
    store.close().await;
}

#[tokio::test]
async fn a_change_that_breaks_is_told_and_the_next_ones_are_made() {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(&folder.path().join("db")).await.unwrap();
    let record = asked(Expected::default(), Timestamp::now());
    let id = record.id;
    store.accept(record, None, 1).await.unwrap();
    let now = Timestamp::now();
    let breaks = store
        .update(id, now, Box::new(|_| panic!("on purpose")))
        .await;
    assert!(matches!(breaks, Err(StoreError::Refused(_))), "{breaks:?}");
    let next = store.update(id, now, Box::new(|_| Change::Told)).await;
    assert_eq!(next.unwrap().unwrap().0.seq, 2);
    store.close().await;
    let closed = store.update(id, now, Box::new(|_| Change::Told)).await;
    assert!(
        matches!(closed, Err(StoreError::TakesNone(_))),
        "{closed:?}"
    );
}

#[tokio::test]
async fn opened_to_be_read_it_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let store = SqliteStore::open(&path).await.unwrap();
    let record = asked(Expected::default(), Timestamp::now());
    let words = Kept {
        session: record.id,
        desktop: DesktopName::from_number(1).unwrap(),
        at: Timestamp::from_second(1_800_000_000).unwrap(),
        text: "words".to_owned(),
    };
    store.accept(record, None, 1).await.unwrap();
    store.keep(&words).await.unwrap();
    let reader = SqliteStore::open_to_read(&path).await.unwrap();
    let whose = "desktop-0000001".parse().unwrap();
    assert!(reader.keep(&words).await.is_err());
    assert_eq!(reader.kept(whose).await.unwrap(), [words]);
    reader.close().await;
    store.close().await;
}

#[tokio::test]
async fn a_copy_finds_out_that_it_is_one_and_only_once() {
    let folder = tempfile::tempdir().unwrap();
    let (path, copy) = (folder.path().join("db"), folder.path().join("copy"));
    let store = SqliteStore::open(&path).await.unwrap();
    let now = Timestamp::from_second(1_800_000_000).unwrap();
    SqliteStore::copy(&path, &copy, now).await.unwrap();
    assert_eq!(store.resume(None, now).await.unwrap(), None);
    let store = SqliteStore::open(&copy).await.unwrap();
    let restored = store.resume(None, now).await.unwrap();
    assert!(restored.is_some());
    let later = now + jiff::SignedDuration::from_secs(1);
    assert_eq!(store.resume(None, later).await.unwrap(), restored);
}

#[tokio::test]
async fn a_database_of_the_first_versions_is_brought_up_to_date_with_what_is_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let options = SqliteConnectOptions::new()
        .filename(&path)
        .create_if_missing(true);
    let mut db = SqliteConnection::connect_with(&options).await.unwrap();
    let migrations = sqlx::migrate!("./migrations/sqlite");
    migrations.run_to(4, &mut db).await.unwrap();
    // What a database of theirs says of itself.
    let sums: Vec<(i64, String)> = sqlx::query_as(
        "SELECT version, substr(lower(hex(checksum)), 1, 8) FROM _sqlx_migrations ORDER BY version",
    )
    .fetch_all(&mut db)
    .await
    .unwrap();
    let sums: Vec<_> = sums.iter().map(|(v, sum)| (*v, &**sum)).collect();
    assert_eq!(sums, SUMS);
    let insert = "INSERT INTO session (id, origin, template, provider, user, phase, seq, created_us, expires_us, activity_us, expected)
        VALUES ('s_0000000000000000000000000', 'v1', 't', 'p', 'u', 'queued', 1, 0, 1, 0, '{\"stages\":{},\"ready\":null}');
        INSERT INTO desktop (number, session_id, provider, phase, created_us, destroying_us)
        VALUES (41, 's_0000000000000000000000000', 'p', 'gone', 0, 0)";
    sqlx::raw_sql(insert).execute(&mut db).await.unwrap();
    db.close().await.unwrap();

    let store = SqliteStore::open(&path).await.unwrap();
    let schema = store.schema();
    assert!(schema.found == Some(4) && schema.wanted > schema.found);
    let seen = DesktopName::from_number(41);
    assert_eq!(store.resume(seen, Timestamp::now()).await.unwrap(), None);
    let another = asked(Expected::default(), Timestamp::now());
    let full = store.accept(another, None, 1).await.unwrap();
    assert!(matches!(full, Accepted::Full), "one waits: {full:?}");
    store.close().await;
}

/// How the checksums of the first migrations begin: SHA-384 of their files. A file that was changed would be refused everywhere.
const SUMS: [(i64, &str); 4] = [
    (1, "098ff637"),
    (2, "3430ad1d"),
    (3, "68438126"),
    (4, "b7dfd2b4"),
];
