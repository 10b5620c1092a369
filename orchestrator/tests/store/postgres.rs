//! What the store on PostgreSQL promises for itself.

use crate::conformance::asked;
use jiff::Timestamp;
use mayfly_orchestrator::session::Expected;
use mayfly_orchestrator::store::postgres::PostgresStore;
use mayfly_orchestrator::store::replicas::ReplicaId;
use mayfly_orchestrator::store::{Change, Store, StoreError};
use mayfly_postgres::Cluster;
use sqlx::postgres::PgConnection;
use sqlx::{Connection, Executor};

#[tokio::test]
async fn a_schema_that_is_not_up_to_date_is_refused_with_the_command_that_helps() {
    let database = Cluster::get().database().await;
    let refused = PostgresStore::open(database.clone(), ReplicaId("a".to_owned()))
        .await
        .unwrap_err();
    assert!(matches!(refused, StoreError::Old(_)), "{refused}");
    assert!(refused.to_string().contains("mayfly-orchestrator migrate"));
    let schema = PostgresStore::migrate(&database).await.unwrap();
    assert!(schema.found.is_none() && schema.wanted.is_some());
    let again = PostgresStore::migrate(&database).await.unwrap();
    assert_eq!((again.found, again.wanted), (schema.wanted, schema.wanted));

    // A newer version made it newer: this one goes on beside that.
    let mut db = PgConnection::connect_with(&database).await.unwrap();
    let newer =
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
                 VALUES (9999, 'of a newer version', true, '', 0)";
    db.execute(newer).await.unwrap();
    PostgresStore::migrate(&database).await.unwrap();
    PostgresStore::open(database, ReplicaId("a".to_owned()))
        .await
        .unwrap()
        .close()
        .await;
}

#[tokio::test]
async fn many_bring_the_schema_up_to_date_at_once() {
    let database = Cluster::get().database().await;
    let all = (0..4).map(|_| PostgresStore::migrate(&database));
    for schema in futures_util::future::join_all(all).await {
        schema.unwrap();
    }
    PostgresStore::open(database, ReplicaId("a".to_owned()))
        .await
        .unwrap()
        .close()
        .await;
}

#[tokio::test]
async fn connections_that_are_cut_are_replaced() {
    let database = Cluster::get().database().await;
    PostgresStore::migrate(&database).await.unwrap();
    let store = PostgresStore::open(database.clone(), ReplicaId("a".to_owned()))
        .await
        .unwrap();
    let record = asked(Expected::default(), Timestamp::now());
    let id = record.id;
    store.accept(record, None, 1).await.unwrap();
    for round in 2..5 {
        let mut db = PgConnection::connect_with(&database).await.unwrap();
        let cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                   WHERE datname = current_database() AND pid <> pg_backend_pid()";
        db.execute(cut).await.unwrap();
        let told = Box::new(|_: &mut _| Change::Told);
        let done = store.update(id, Timestamp::now(), told).await.unwrap();
        assert_eq!(done.unwrap().0.seq, round);
    }
    store.close().await;
}

#[tokio::test]
async fn a_database_that_is_not_there_is_told_and_no_password_with_it() {
    let nowhere = Cluster::get().options("nowhere").password("hunter2");
    let refused = PostgresStore::open(nowhere, ReplicaId("a".to_owned()))
        .await
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("password authentication failed"),
        "{refused}"
    );
    assert!(!refused.contains("hunter2"), "{refused}");
    let nowhere = Cluster::get().options("nowhere");
    let refused = PostgresStore::open(nowhere, ReplicaId("a".to_owned()))
        .await
        .unwrap_err()
        .to_string();
    assert!(refused.contains("nowhere"), "{refused}");
}

#[tokio::test]
async fn a_dump_that_is_restored_finds_out_that_it_is_a_copy_and_only_once() {
    let cluster = Cluster::get();
    let (from, to) = (cluster.database().await, cluster.database().await);
    PostgresStore::migrate(&from).await.unwrap();
    let store = PostgresStore::open(from.clone(), ReplicaId("a".to_owned()))
        .await
        .unwrap();
    let now = Timestamp::from_second(1_800_000_000).unwrap();
    let record = asked(Expected::default(), now);
    store.accept(record.clone(), None, 1).await.unwrap();
    let limits = mayfly_orchestrator::config::Limits::default();
    let planned = store
        .plan_next(&limits, &[], now)
        .await
        .unwrap()
        .given()
        .unwrap();
    let known = planned.desktop.unwrap().name();
    assert_eq!(store.resume(Some(known), now).await.unwrap(), None);

    // As docs/operations.md says.
    let dump = cluster.run("pg_dump", &["--format=custom", "--dbname"], &from);
    cluster.feed("pg_restore", &["--no-owner", "--dbname"], &to, &dump);
    assert_eq!(store.resume(None, now).await.unwrap(), None);
    store.close().await;
    let copy = PostgresStore::open(to, ReplicaId("a".to_owned()))
        .await
        .unwrap();
    assert_eq!(copy.live().await.unwrap().len(), 1);
    let restored = copy.resume(None, now).await.unwrap();
    assert_eq!(restored.unwrap().known, known);
    let later = now + jiff::SignedDuration::from_secs(1);
    assert_eq!(copy.resume(None, later).await.unwrap(), restored);
    copy.close().await;
}
