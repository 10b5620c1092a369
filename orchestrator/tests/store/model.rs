//! The store on SQLite and the model in memory do the same, whatever is asked of them in whatever order.

use crate::conformance::asked;
use jiff::{SignedDuration, Timestamp};
use mayfly_api::{DesktopName, EndReason, SessionId};
use mayfly_orchestrator::config::Limits;
use mayfly_orchestrator::desktop::NotNow;
use mayfly_orchestrator::session::{Expected, Record};
use mayfly_orchestrator::store::memory::MemoryStore;
use mayfly_orchestrator::store::sqlite::SqliteStore;
use mayfly_orchestrator::store::{Change, Idempotency, Store};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

/// Something that is asked of a store; what it is about is counted from the first session.
#[derive(Clone, Debug)]
enum Ask {
    Accept { wishes: Vec<(Option<u8>, u8)> },
    Plan { full: bool },
    Renumber { behind: u32, count: u32 },
    Forget,
    Resume { seen: Option<u32> },
    Change { of: usize, verb: Verb, told: bool },
}

#[derive(Clone, Copy, Debug)]
enum Verb {
    Creating,
    Ready,
    Claim,
    Requeue,
    End,
    Gone,
    Beat,
}

fn ask() -> impl Strategy<Value = Ask> {
    let verb = prop::sample::select(vec![
        Verb::Creating,
        Verb::Ready,
        Verb::Claim,
        Verb::Requeue,
        Verb::End,
        Verb::Gone,
        Verb::Beat,
    ]);
    prop_oneof![
        3 => prop::collection::vec((prop::option::of(0..3_u8), 0..2_u8), 0..4).prop_map(|wishes| Ask::Accept { wishes }),
        3 => any::<bool>().prop_map(|full| Ask::Plan { full }),
        1 => (0..3_u32, 1..4_u32).prop_map(|(behind, count)| Ask::Renumber { behind, count }),
        1 => Just(Ask::Forget),
        1 => prop::option::of(0..20_u32).prop_map(|seen| Ask::Resume { seen }),
        8 => (0..6_usize, verb, any::<bool>()).prop_map(|(of, verb, told)| Ask::Change { of, verb, told }),
    ]
}

fn apply(record: &mut Record, verb: Verb, now: Timestamp) -> Result<(), NotNow> {
    let limits = Limits::default();
    if let Verb::Beat = verb {
        record.heartbeat(now);
        return Ok(());
    }
    if let Verb::End = verb {
        return record.end(EndReason::Requested, now);
    }
    let name = record.desktop.as_ref().ok_or(NotNow)?.name();
    match verb {
        Verb::Creating => record.creating(name),
        Verb::Ready => {
            record.booting(name, now)?;
            record.configuring(name, now)?;
            record.announced(
                name,
                "127.77.0.1:3389".parse().unwrap(),
                "a".repeat(64),
                now,
            )?;
            record.proved(name)
        }
        Verb::Claim => record.claim(name, &limits, now),
        Verb::Requeue => record.requeue(name, now),
        Verb::Gone => record.gone(name, now),
        Verb::Beat | Verb::End => Ok(()),
    }
}

/// What a store answers, and what it holds afterwards, in words.
async fn answer(
    store: &dyn Store,
    ask: &Ask,
    new: &[Record],
    now: Timestamp,
    ids: &[SessionId],
) -> String {
    let limits = Limits {
        max_desktops: 3,
        concurrent_creates: 2,
        ..Limits::default()
    };
    let answered = match ask.clone() {
        Ask::Accept { wishes } => {
            let wishes = new.iter().zip(wishes).map(|(new, (key, request))| {
                let key = key.map(|key| Idempotency {
                    key_sha256: key.to_string(),
                    request_sha256: request.to_string(),
                });
                (new.clone(), key)
            });
            let accepted = store.accept_all(wishes.collect(), 4).await;
            format!("{:?}", accepted.unwrap())
        }
        Ask::Plan { full } => {
            let full = if full { vec!["t".to_owned()] } else { vec![] };
            format!("{:?}", store.plan_next(&limits, &full, now).await.unwrap())
        }
        Ask::Renumber { behind, count } => {
            let numbered = store.renumber_queue(behind, count, now).await;
            format!("{:?}", numbered.unwrap())
        }
        Ask::Forget => format!("{:?}", store.forget(now).await.unwrap()),
        Ask::Resume { seen } => {
            let seen = seen.and_then(DesktopName::from_number);
            format!("{:?}", store.resume(seen, now).await.unwrap())
        }
        Ask::Change { of, verb, told } => {
            let Some(id) = ids.get(of) else {
                return String::new();
            };
            let change = move |record: &mut Record| {
                let mut changed = record.clone();
                match apply(&mut changed, verb, now) {
                    Ok(()) => *record = changed,
                    Err(NotNow) => return Change::Nothing,
                }
                if told { Change::Told } else { Change::Quiet }
            };
            let done = store.update(*id, now, Box::new(change)).await;
            format!("{:?}", done.unwrap())
        }
    };
    let mut desktops = store.desktops().await.unwrap();
    desktops.sort();
    let mut all = format!(
        "{answered}\n{:?}\n{desktops:?}",
        store.live().await.unwrap()
    );
    for id in ids {
        let (record, events) = (store.get(*id).await, store.events_after(*id, 0).await);
        all += &format!("\n{:?} {:?}", record.unwrap(), events.unwrap());
    }
    all += &format!("\n{:?}", store.expected("t", "p").await.unwrap());
    all += &format!("\n{:?}", store.tally().await.unwrap());
    all
}

async fn same(asks: Vec<Ask>) -> Result<(), TestCaseError> {
    let folder = tempfile::tempdir().unwrap();
    let sqlite = SqliteStore::open(&folder.path().join("db")).await.unwrap();
    let memory = MemoryStore::default();
    let mut ids = Vec::new();
    let start = Timestamp::from_second(1_800_000_000).unwrap();
    for (second, ask) in (0..).zip(&asks) {
        let now = start + SignedDuration::from_secs(second);
        let many = match ask {
            Ask::Accept { wishes } => wishes.len(),
            _ => 0,
        };
        let new: Vec<_> = (0..many).map(|_| asked(Expected::default(), now)).collect();
        let on_sqlite = answer(&sqlite, ask, &new, now, &ids).await;
        let in_memory = answer(&memory, ask, &new, now, &ids).await;
        prop_assert_eq!(on_sqlite, in_memory, "asked {:?}", ask);
        ids.extend(new.iter().map(|new| new.id));
    }
    sqlite.close().await;
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn the_model_does_what_the_database_does(asks in prop::collection::vec(ask(), 1..50)) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build();
        runtime.unwrap().block_on(same(asks))?;
    }
}
