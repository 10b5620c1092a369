//! What orchestrators that share a PostgreSQL are promised.

use crate::conformance::asked;
use jiff::Timestamp;
use mayfly_api::{EndReason, SessionId};
use mayfly_orchestrator::config::Limits;
use mayfly_orchestrator::session::Expected;
use mayfly_orchestrator::store::postgres::PostgresStore;
use mayfly_orchestrator::store::replicas::{Changed, Replica, ReplicaId, Replicas};
use mayfly_orchestrator::store::{Change, Store, StoreError};
use mayfly_postgres::Cluster;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{Connection, Executor};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;

const LONG: Duration = Duration::from_secs(3_600);
const OVER: Duration = Duration::ZERO;
const PATIENCE: Duration = Duration::from_secs(60);

async fn database() -> PgConnectOptions {
    let options = Cluster::get().database().await;
    PostgresStore::migrate(&options).await.unwrap();
    options
}

async fn open(database: &PgConnectOptions, id: &str) -> PostgresStore {
    let id = ReplicaId(id.to_owned());
    PostgresStore::open(database.clone(), id).await.unwrap()
}

fn replica(store: &PostgresStore, installation: &str) -> Replica {
    Replica {
        id: store.me().clone(),
        name: format!("host {}", store.me()),
        installation: installation.to_owned(),
        draining: false,
    }
}

async fn lives(store: &PostgresStore, lease: Duration) {
    store.renew(&replica(store, "key"), lease).await.unwrap();
}

async fn accept(store: &PostgresStore) -> SessionId {
    let record = asked(Expected::default(), Timestamp::now());
    let id = record.id;
    store.accept(record, None, 100).await.unwrap();
    id
}

async fn owned(store: &PostgresStore, id: SessionId) -> (String, u64) {
    let record = store.get(id).await.unwrap().unwrap();
    (record.owner.unwrap().0, record.fence)
}

#[tokio::test]
async fn what_the_living_work_for_is_left_to_them_and_what_the_dead_left_is_taken_once() {
    let database = database().await;
    let (a, b, c) = (
        open(&database, "a").await,
        open(&database, "b").await,
        open(&database, "c").await,
    );
    for store in [&a, &b, &c] {
        lives(store, LONG).await;
    }
    let mut ids = Vec::new();
    for _ in 0..20 {
        ids.push(accept(&a).await);
    }
    assert_eq!(owned(&b, ids[0]).await, ("a".to_owned(), 1));
    assert_eq!(a.mine().await.unwrap(), ids);
    assert!(b.take_over(&[], OVER).await.unwrap().is_empty());

    let over = accept(&a).await;
    let end = Box::new(|record: &mut _| {
        mayfly_orchestrator::session::Record::end(record, EndReason::Requested, Timestamp::now())
            .map_or(Change::Nothing, |()| Change::Told)
    });
    a.update(over, Timestamp::now(), end).await.unwrap();
    a.leave().await.unwrap();
    assert_eq!(c.living().await.unwrap().len(), 2);
    let (by_b, by_c) = tokio::join!(b.take_over(&[], OVER), c.take_over(&[], OVER));
    let mut taken = [by_b.unwrap(), by_c.unwrap()].concat();
    taken.sort_unstable();
    let mut expected = ids.clone();
    expected.sort_unstable();
    assert_eq!(taken, expected, "each once, and none that is over");
    for id in &ids {
        assert_eq!(owned(&a, *id).await.1, 2, "a new fence");
    }
    assert!(a.mine().await.unwrap().is_empty());
    lives(&a, LONG).await;
    assert!(a.take_over(&[], OVER).await.unwrap().is_empty());
}

#[tokio::test]
async fn however_many_the_dead_left_they_are_taken_at_once() {
    const MANY: u32 = 1_100;
    let database = database().await;
    let (a, b) = (open(&database, "a").await, open(&database, "b").await);
    lives(&a, OVER).await;
    let asked = |_| (asked(Expected::default(), Timestamp::now()), None);
    let wishes = (0..MANY).map(asked).collect();
    a.accept_all(wishes, MANY).await.unwrap();
    let taken = b.take_over(&[], OVER).await.unwrap();
    assert_eq!(taken.len(), MANY as usize);
    assert_eq!(b.mine().await.unwrap().len(), MANY as usize);
}

#[tokio::test]
async fn one_that_comes_back_while_it_is_taken_over_keeps_all_or_nothing() {
    let database = database().await;
    let (a, b) = (open(&database, "a").await, open(&database, "b").await);
    lives(&b, LONG).await;
    for _ in 0..30 {
        lives(&a, OVER).await;
        let id = accept(&a).await;
        let back = async {
            lives(&a, LONG).await;
            a.mine().await.unwrap()
        };
        let (mine, taken) = tokio::join!(back, b.take_over(&[], OVER));
        let taken = taken.unwrap();
        assert_ne!(
            mine.contains(&id),
            taken.contains(&id),
            "one of them works for it"
        );
    }
}

#[tokio::test]
async fn who_gives_a_place_works_for_it_and_what_the_other_says_late_carries_an_old_fence() {
    let database = database().await;
    let (a, b) = (open(&database, "a").await, open(&database, "b").await);
    lives(&a, LONG).await;
    lives(&b, LONG).await;
    let first = accept(&a).await;
    let limits = Limits::default();
    let planned = b
        .plan_next(&limits, &[], Timestamp::now())
        .await
        .unwrap()
        .given();
    let planned = planned.unwrap();
    assert_eq!((planned.id, planned.fence), (first, 2));
    assert_eq!(planned.owner.as_ref(), Some(b.me()));
    assert_eq!(planned.desktop.unwrap().host(), Some(b.me()));

    let mut db = PgConnection::connect_with(&database).await.unwrap();
    for impossible in [
        "UPDATE session SET fence = fence - 1",
        "UPDATE session SET owner = 'c'",
    ] {
        assert!(db.execute(impossible).await.is_err(), "{impossible}");
    }
}

#[tokio::test]
async fn a_desktop_on_a_machine_waits_for_its_host_and_goes_back_to_it() {
    let database = database().await;
    let (a, b) = (open(&database, "a").await, open(&database, "b").await);
    lives(&a, LONG).await;
    lives(&b, LONG).await;
    let id = accept(&a).await;
    let limits = Limits::default();
    a.plan_next(&limits, &[], Timestamp::now()).await.unwrap();
    a.leave().await.unwrap();
    assert!(b.take_over(&["p"], LONG).await.unwrap().is_empty());
    assert_eq!(owned(&b, id).await.0, "a", "its host may come back");
    // Of a provider that everybody reaches.
    let taken = b.take_over(&["another"], LONG).await.unwrap();
    assert_eq!(taken, [id]);
    lives(&a, LONG).await;
    let back = a.take_over(&["p"], LONG).await.unwrap();
    assert_eq!((back, owned(&a, id).await.1), (vec![id], 3));

    a.leave().await.unwrap();
    assert_eq!(b.take_over(&["p"], OVER).await.unwrap(), [id], "it is lost");
    let name = b.called(a.me()).await.unwrap();
    assert_eq!(name.as_deref(), Some("host a"));
    assert!(
        b.called(&ReplicaId("c".to_owned()))
            .await
            .unwrap()
            .is_none()
    );
}

#[tokio::test]
async fn one_with_another_key_is_told_what_to_copy() {
    let database = database().await;
    let (a, b) = (open(&database, "a").await, open(&database, "b").await);
    lives(&a, OVER).await;
    let refused = b.renew(&replica(&b, "another"), LONG).await.unwrap_err();
    assert!(matches!(refused, StoreError::Refused(_)));
    let said = refused.to_string();
    assert!(
        said.contains("host a") && said.contains("secret.key"),
        "{said}"
    );
    assert!(a.living().await.unwrap().is_empty());
}

#[tokio::test]
async fn changes_are_heard_and_what_may_have_been_missed_is_told() {
    let database = database().await;
    let (a, b) = (open(&database, "a").await, open(&database, "b").await);
    let (to, mut heard) = mpsc::channel(100);
    b.follow(to);
    let next = async |heard: &mut mpsc::Receiver<Changed>| {
        timeout(PATIENCE, heard.recv()).await.unwrap().unwrap()
    };
    assert_eq!(next(&mut heard).await, Changed::Any, "it begins");
    let id = accept(&a).await;
    let told = |_: &mut _| Change::Told;
    a.update(id, Timestamp::now(), Box::new(told))
        .await
        .unwrap();
    assert_eq!(next(&mut heard).await, Changed::Session(id));
    let mut db = PgConnection::connect_with(&database).await.unwrap();
    let cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
               WHERE datname = current_database() AND pid <> pg_backend_pid()";
    db.execute(cut).await.unwrap();
    assert_eq!(next(&mut heard).await, Changed::Any, "it was not listening");
    a.update(id, Timestamp::now(), Box::new(told))
        .await
        .unwrap();
    assert_eq!(next(&mut heard).await, Changed::Session(id));
}

#[tokio::test]
async fn whoever_drains_gives_no_places_as_the_others_know() {
    let database = database().await;
    let (a, b) = (open(&database, "a").await, open(&database, "b").await);
    let says = async |draining| {
        let one = replica(&a, "key");
        a.renew(&Replica { draining, ..one }, LONG).await.unwrap();
    };
    let known = async || {
        let living = b.living().await.unwrap();
        let drain = living.iter().any(|one| one.draining);
        (drain, b.others_give(LONG).await.unwrap())
    };
    lives(&b, LONG).await;
    assert_eq!(known().await, (false, false), "there is no other");
    says(true).await;
    assert_eq!(known().await, (true, false));
    says(false).await;
    assert_eq!(known().await, (false, true));

    // Stopped while it gives places, it is believed to come back, for a while.
    a.leave().await.unwrap();
    assert_eq!(known().await, (false, true));
    assert!(!b.others_give(OVER).await.unwrap());
    // While it drains, it is not; until one of an older version is started in its place, which says nothing of that.
    says(true).await;
    a.leave().await.unwrap();
    assert_eq!(known().await, (false, false));
    let mut db = PgConnection::connect_with(&database).await.unwrap();
    let older = "UPDATE replica SET until_us = until_us + 3600000000 WHERE id = 'a'";
    db.execute(older).await.unwrap();
    assert_eq!(known().await, (false, true));
}
