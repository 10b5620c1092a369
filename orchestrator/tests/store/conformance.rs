//! What every store promises ([`mayfly_orchestrator::store`]).

use crate::on_every_store;
use crate::place::Place;
use futures_util::future::join_all;
use jiff::Timestamp;
use mayfly_api::{
    Absence, DesktopName, EndReason, Removal, SessionId, SessionPhase, StageName, StageProgress,
};
use mayfly_orchestrator::clock::{after, between, s};
use mayfly_orchestrator::config::Limits;
use mayfly_orchestrator::last_words::LONGEST;
use mayfly_orchestrator::session::{Expected, Origin, Record, Wish};
use mayfly_orchestrator::store::machines::{Locking, Reserved, Reserving};
use mayfly_orchestrator::store::strays::{Look, Outcome, Place as At, Stray, Turn};
use mayfly_orchestrator::store::words::{DESKTOPS, Kept, Whose};
use mayfly_orchestrator::store::{Accepted, Change, Idempotency, Planned, Store};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

on_every_store!(
    what_was_written_is_read_back,
    a_change_that_says_nothing_writes_nothing_and_a_quiet_one_no_event,
    places_go_to_who_waits_longest_within_the_limits,
    those_in_front_are_told_their_places_first_and_each_once,
    who_leaves_the_queue_makes_room_there_and_who_comes_back_takes_it,
    a_session_without_room_waits_again_and_lets_other_templates_pass,
    a_number_is_never_used_twice_even_if_its_session_was_forgotten,
    estimates_are_medians_of_what_was,
    the_schema_refuses_what_cannot_be,
    a_request_that_comes_again_is_answered_as_the_first_was,
    of_wishes_that_come_together_each_is_answered_as_if_it_came_alone,
    a_request_that_comes_many_times_at_once_is_accepted_once,
    of_many_that_come_at_once_no_more_are_accepted_than_may_wait,
    places_given_out_by_many_at_once_go_to_as_many_sessions_as_the_limits_leave,
    changes_that_come_at_once_see_each_other_and_their_events_have_no_gap,
    an_intent_that_fails_among_others_takes_none_of_them_along,
    a_change_that_the_schema_refuses_leaves_nothing_of_itself,
    an_intent_whose_asker_goes_away_is_made_whole_or_not_at_all,
    a_desktop_that_it_does_not_know_says_that_it_is_an_older_copy,
    numbers_are_never_used_twice_while_many_sessions_come_and_go,
    a_state_is_saved_only_under_its_lock_and_ends_with_its_machine,
    a_storage_takes_only_so_many_clones_at_a_time,
    what_a_desktop_left_is_read_by_its_name_and_by_its_session_until_that_is_forgotten,
    a_session_keeps_the_words_of_its_latest_desktops_within_the_bound,
    of_all_desktops_the_latest_words_are_kept,
    of_a_desktop_the_last_receipt_is_kept_until_its_session_is_forgotten,
    a_beat_is_a_change_that_counts_nothing_and_what_is_there_is_counted_by_phase,
    what_nobody_owns_is_in_quarantine_from_its_second_sighting_on_and_removed_once,
    what_turns_out_to_be_owned_or_gone_leaves_and_begins_anew_if_it_is_seen_again,
    what_is_kept_is_not_removed,
    places_do_not_know_of_each_other,
    a_clock_that_was_set_back_keeps_nothing_in_quarantine,
    of_many_that_look_and_remove_at_once_one_is_told_of_each_turn,
);

const SECOND: Duration = Duration::from_secs(1);

fn now() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

/// Somebody's wish, at that time.
pub(crate) fn asked(expected: Expected, at: Timestamp) -> Record {
    let wish = Wish {
        origin: Origin::V1,
        template: "t".to_owned(),
        provider: "p".to_owned(),
        user: "user".to_owned(),
        language: Some("fr".to_owned()),
        time_zone: None,
        keyboard: None,
    };
    Record::accepted(SessionId::new(), wish, expected, &Limits::default(), at)
}

async fn accept(store: &Arc<dyn Store>, at: Timestamp) -> Record {
    let expected = store.expected("t", "p").await.unwrap();
    match store.accept(asked(expected, at), None, 100).await.unwrap() {
        Accepted::New(record) => *record,
        other => panic!("{other:?}"),
    }
}

async fn change(
    store: &Arc<dyn Store>,
    id: SessionId,
    at: Timestamp,
    change: impl FnOnce(&mut Record) -> Change + Send + 'static,
) -> Record {
    let done = store.update(id, at, Box::new(change)).await.unwrap();
    done.unwrap().0
}

/// There is no room for the desktop that it was given: it waits again.
async fn has_no_room(store: &Arc<dyn Store>, planned: Record) -> DesktopName {
    let name = planned.desktop.unwrap().name();
    change(store, planned.id, now(), move |r| {
        r.creating(name).unwrap();
        r.requeue(name, now()).unwrap();
        Change::Told
    })
    .await;
    name
}

/// The session that is given the next desktop.
async fn given(store: &Arc<dyn Store>, limits: &Limits, at: Timestamp) -> Record {
    let planned = store.plan_next(limits, &[], at).await.unwrap();
    planned.given().unwrap()
}

/// A session that got its desktop `after_s` seconds after it was asked for.
async fn claimed(store: &Arc<dyn Store>, at: Timestamp, after_s: u32) -> Record {
    let limits = Limits::default();
    let id = accept(store, at).await.id;
    let planned = given(store, &limits, at).await;
    assert_eq!(planned.id, id);
    let name = planned.desktop.unwrap().name();
    let ready = after(at, s(after_s));
    change(store, id, ready, move |r| {
        r.creating(name).unwrap();
        r.booting(name, at).unwrap();
        r.configuring(name, at).unwrap();
        r.announced(name, "127.77.0.1:3389".parse().unwrap(), "a".repeat(64), at)
            .unwrap();
        r.proved(name).unwrap();
        r.claim(name, &limits, ready).unwrap();
        Change::Told
    })
    .await
}

async fn end(store: &Arc<dyn Store>, record: &Record) {
    let name = record.desktop.as_ref().unwrap().name();
    change(store, record.id, now(), move |r| {
        r.end(EndReason::Requested, now()).unwrap();
        r.gone(name, now()).unwrap();
        Change::Told
    })
    .await;
}

async fn what_was_written_is_read_back(place: Place) {
    let store = place.open().await;
    let record = claimed(&store, now(), 7).await;
    assert_eq!(store.get(record.id).await.unwrap(), Some(record.clone()));
    assert_eq!(store.live().await.unwrap().len(), 1);
    let events = store.events_after(record.id, 0).await.unwrap();
    let seqs: Vec<_> = events.iter().map(|e| e.seq).collect();
    assert_eq!(seqs, [1, 2, 3]);
    assert_eq!(events[2].session, record.view());
    assert_eq!(store.events_after(record.id, 2).await.unwrap().len(), 1);
    assert_eq!(store.get(SessionId::new()).await.unwrap(), None);
    let nobody = Box::new(|_: &mut Record| -> Change { panic!("there is none") });
    let nobody = store.update(SessionId::new(), now(), nobody).await;
    assert!(nobody.unwrap().is_none());
    let name = record.desktop.as_ref().unwrap().name();
    assert_eq!(store.desktops().await.unwrap(), [name]);
    store.close().await;
    let again = place.open().await;
    assert_eq!(again.get(record.id).await.unwrap(), Some(record));
    again.close().await;
}

async fn a_change_that_says_nothing_writes_nothing_and_a_quiet_one_no_event(place: Place) {
    let store = place.open().await;
    let before = accept(&store, now()).await;
    for (what, seq) in [(Change::Nothing, 1), (Change::Quiet, 1), (Change::Told, 2)] {
        let at = after(now(), SECOND);
        change(&store, before.id, at, move |r| {
            r.heartbeat(at);
            what
        })
        .await;
        let record = store.get(before.id).await.unwrap().unwrap();
        assert_eq!(record.seq, seq);
        assert_eq!(record.heartbeat_at.is_some(), what != Change::Nothing);
    }
    store.close().await;
}

async fn places_go_to_who_waits_longest_within_the_limits(place: Place) {
    let store = place.open().await;
    let limits = Limits {
        concurrent_creates: 1,
        ..Limits::default()
    };
    let first = accept(&store, now()).await;
    let second = accept(&store, after(now(), SECOND)).await;
    let planned = given(&store, &limits, now()).await;
    assert_eq!(planned.id, first.id);
    let none = store.plan_next(&limits, &[], now()).await.unwrap();
    assert!(matches!(none, Planned::NoPlace), "{none:?}");
    let moved = store.renumber_queue(0, 1_000, now()).await.unwrap().told;
    assert_eq!(moved.len(), 1);
    assert_eq!((moved[0].id, moved[0].queue_position), (second.id, Some(1)));
    let none = store.renumber_queue(0, 1_000, now()).await.unwrap();
    assert_eq!((none.told, none.to_the_end), (vec![], true));
    store.close().await;
}

async fn those_in_front_are_told_their_places_first_and_each_once(place: Place) {
    let store = place.open().await;
    let mut waiting = Vec::new();
    for second in 0..6 {
        waiting.push(accept(&store, after(now(), s(second))).await);
    }
    // The first and the fourth leave.
    for left in [3, 0] {
        let left = waiting.remove(left);
        change(&store, left.id, now(), |r| {
            r.end(EndReason::Requested, now()).unwrap();
            Change::Told
        })
        .await;
    }
    let told = async |behind, count| {
        let numbered = store.renumber_queue(behind, count, now()).await.unwrap();
        for record in &numbered.told {
            let events = store.events_after(record.id, 1).await.unwrap();
            assert_eq!(events.len(), 1);
            assert_eq!(events[0].session, record.view());
            assert_eq!(store.get(record.id).await.unwrap().as_ref(), Some(record));
        }
        let told = numbered.told.into_iter().map(|r| (r.id, r.queue_position));
        (told.collect::<Vec<_>>(), numbered.to_the_end)
    };
    let ids: Vec<_> = waiting.iter().map(|r| r.id).collect();
    let behind = vec![(ids[2], Some(3)), (ids[3], Some(4))];
    assert_eq!(told(2, 9).await, (behind, true));
    assert_eq!(told(0, 1).await, (vec![(ids[0], Some(1))], false));
    assert_eq!(told(0, 3).await, (vec![(ids[1], Some(2))], false));
    assert_eq!(told(0, 9).await, (vec![], true));
    store.close().await;
}

async fn who_leaves_the_queue_makes_room_there_and_who_comes_back_takes_it(place: Place) {
    let store = place.open().await;
    let first = accept(&store, now()).await;
    accept(&store, after(now(), SECOND)).await;
    // The place of one more where two may wait.
    let room = async || {
        let record = asked(Expected::default(), after(now(), SECOND * 60));
        match store.accept(record, None, 2).await.unwrap() {
            Accepted::New(record) => record.queue_position,
            Accepted::Full => None,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(room().await, None);
    let planned = given(&store, &Limits::default(), now()).await;
    assert_eq!(planned.id, first.id);
    let name = has_no_room(&store, planned).await;
    assert_eq!(room().await, None, "it is back");
    change(&store, first.id, now(), move |r| {
        r.end(EndReason::Requested, now()).unwrap();
        Change::Told
    })
    .await;
    assert_eq!(room().await, Some(2));
    assert_eq!(room().await, None);
    // What was gone long ago counts for nobody.
    change(&store, first.id, now(), move |r| {
        r.gone(name, now()).unwrap();
        Change::Told
    })
    .await;
    assert_eq!(store.forget(after(now(), SECOND * 60)).await.unwrap(), 1);
    assert_eq!(room().await, None);
    given(&store, &Limits::default(), now()).await;
    assert_eq!(room().await, Some(2));
    store.close().await;
}

async fn a_session_without_room_waits_again_and_lets_other_templates_pass(place: Place) {
    let store = place.open().await;
    let limits = Limits::default();
    let first = accept(&store, now()).await;
    let planned = given(&store, &limits, now()).await;
    let name = has_no_room(&store, planned).await;
    let moved = store.renumber_queue(0, 1_000, now()).await.unwrap().told;
    let waits = moved[0].view();
    assert_eq!(waits.queue_position, Some(1));
    assert_eq!(waits.stages[0].progress, Some(StageProgress::NoRoom));
    assert_eq!(waits.desktop, None);
    let next = async |full: &[String]| store.plan_next(&limits, full, now()).await.unwrap().given();
    assert!(next(&[]).await.is_none(), "its desktop is being removed");
    change(&store, first.id, now(), move |r| {
        r.gone(name, now()).unwrap();
        Change::Told
    })
    .await;
    assert!(next(&["t".to_owned()]).await.is_none());
    let again = next(&["other".to_owned()]).await.unwrap();
    assert_eq!(again.id, first.id);
    assert_ne!(again.desktop.unwrap().name(), name);
    store.close().await;
}

async fn a_number_is_never_used_twice_even_if_its_session_was_forgotten(place: Place) {
    let store = place.open().await;
    let first = claimed(&store, now(), 1).await;
    let later = after(now(), SECOND);
    assert_eq!(store.forget(later).await.unwrap(), 0, "it lives");
    end(&store, &first).await;
    assert_eq!(store.forget(later).await.unwrap(), 1);
    assert_eq!(store.get(first.id).await.unwrap(), None);
    assert_eq!(store.events_after(first.id, 0).await.unwrap(), []);
    store.close().await;
    let store = place.open().await;
    let second = claimed(&store, now(), 1).await;
    assert!(second.desktop.unwrap().name() > first.desktop.unwrap().name());
    store.close().await;
}

async fn estimates_are_medians_of_what_was(place: Place) {
    let store = place.open().await;
    for seconds in [9, 1, 5] {
        let record = claimed(&store, now(), seconds).await;
        end(&store, &record).await;
    }
    let expected = store.expected("t", "p").await.unwrap();
    assert_eq!(expected.ready, Some(5_000));
    assert_eq!(expected.stages[&StageName::Connecting], 5_000);
    assert_eq!(store.expected("t", "other").await.unwrap().ready, None);
    store.close().await;
}

async fn the_schema_refuses_what_cannot_be(place: Place) {
    let store = place.open().await;
    let record = claimed(&store, now(), 1).await;
    let gone = claimed(&store, after(now(), SECOND), 1).await;
    end(&store, &gone).await;
    for statement in [
        "UPDATE desktop SET phase = 'ready' WHERE phase = 'claimed'",
        "UPDATE desktop SET phase = 'ready', claimed_us = NULL WHERE phase = 'claimed'",
        "UPDATE desktop SET claimed_us = claimed_us + 1 WHERE phase = 'claimed'",
        "UPDATE desktop SET phase = 'gone' WHERE phase = 'claimed'",
        "UPDATE desktop SET phase = 'destroying' WHERE phase = 'gone'",
        "UPDATE desktop SET number = number + 7 WHERE phase = 'claimed'",
        "UPDATE desktop SET number = 268435456",
        "UPDATE desktop SET certificate = 'short' WHERE phase = 'claimed'",
        "UPDATE desktop SET session_id = (SELECT id FROM session WHERE phase = 'ended') WHERE phase = 'claimed'",
        "INSERT INTO desktop (session_id, provider, phase, created_us) SELECT session_id, 'p', 'planned', 0 FROM desktop WHERE phase = 'claimed'",
        "DELETE FROM desktop WHERE phase = 'claimed'",
        "DELETE FROM session WHERE phase = 'ready'",
        "UPDATE session SET phase = 'ended' WHERE phase = 'ready'",
        "UPDATE session SET phase = 'dancing'",
        "UPDATE session SET created_us = 'soon'",
        "UPDATE session SET seq = 0",
        "UPDATE session SET expires_us = created_us - 1",
        "UPDATE session SET queue_position = 1 WHERE phase = 'ready'",
        "UPDATE session SET ready_us = NULL WHERE phase = 'ready'",
        "UPDATE session SET end_reason = 'boredom' WHERE phase = 'ended'",
        "UPDATE session SET expected = 'no JSON'",
        "UPDATE event SET body = '{'",
        "UPDATE stage SET duration_ms = -1",
        "UPDATE stage SET name = 'dreaming'",
        "INSERT INTO machine (number, node, memory_mib) VALUES (-1, 'n', 1)",
        "INSERT INTO machine (number, node, memory_mib) VALUES (1, 'n', 0)",
        "INSERT INTO machine (number, node, memory_mib, cloning) VALUES (1, 'n', 1, 2)",
        "INSERT INTO machine (number, node, memory_mib, lock_id) VALUES (1, 'n', 1, 'without words')",
        "INSERT INTO receipt (number, session_id, body) SELECT 1, id, '{' FROM session LIMIT 1",
        "INSERT INTO receipt (number, session_id, body) VALUES (1, 'nobody', '{}')",
        "INSERT INTO pulse (id, at_us) VALUES (2, 0)",
        "INSERT INTO stray (provider, host, number, first_us, last_us) VALUES ('p', '', -1, 0, 0)",
        "INSERT INTO stray (provider, host, number, first_us, last_us) VALUES ('p', '', 1, 1, 0)",
        "INSERT INTO stray (provider, host, number, first_us, last_us, tried_us) VALUES ('p', '', 1, 0, 0, 0)",
        "INSERT INTO stray (provider, host, number, first_us, last_us, over_us, outcome) VALUES ('p', '', 1, 0, 0, 0, 'removed')",
        "INSERT INTO stray (provider, host, number, first_us, last_us, over_us) VALUES ('p', '', 1, 0, 0, 0)",
        "INSERT INTO stray (provider, host, number, first_us, last_us, over_us, outcome) VALUES ('p', '', 1, 0, 0, 0, 'sold')",
        "INSERT INTO event (session_id, seq, at_us, body) SELECT session_id, seq, at_us, body FROM event",
        "INSERT INTO idempotency (key_sha256, request_sha256, session_id) VALUES ('k', 'r', 'nobody')",
    ] {
        assert!(place.refuses(statement).await, "{statement}");
    }
    assert_eq!(store.get(record.id).await.unwrap(), Some(record));
    store.close().await;
}

fn key(key: &str, request: &str) -> Option<Idempotency> {
    Some(Idempotency {
        key_sha256: key.to_owned(),
        request_sha256: request.to_owned(),
    })
}

async fn a_request_that_comes_again_is_answered_as_the_first_was(place: Place) {
    let store = place.open().await;
    let accept = async |key| {
        let record = asked(Expected::default(), now());
        store.accept(record, key, 1).await.unwrap()
    };
    let before = async |key: Option<_>| store.accepted_before(&key.unwrap()).await.unwrap();
    assert!(before(key("a", "r")).await.is_none());
    let Accepted::New(first) = accept(key("a", "r")).await else {
        panic!("it is new");
    };
    change(&store, first.id, now(), |_| Change::Told).await;
    for again in [
        accept(key("a", "r")).await,
        before(key("a", "r")).await.unwrap(),
    ] {
        let Accepted::Again(event) = again else {
            panic!("it is not new: {again:?}");
        };
        assert_eq!((event.seq, event.session), (1, first.view()));
    }
    let other = accept(key("a", "another request")).await;
    assert!(matches!(other, Accepted::Mismatch), "{other:?}");
    let full = accept(key("b", "r")).await;
    assert!(matches!(full, Accepted::Full), "{full:?}");
    assert!(
        before(key("b", "r")).await.is_none(),
        "a refusal is not kept"
    );
    store.close().await;
}

async fn of_wishes_that_come_together_each_is_answered_as_if_it_came_alone(place: Place) {
    let store = place.open().await;
    let new = || asked(Expected::default(), now());
    let (before, first, second) = (new(), new(), new());
    store
        .accept(before.clone(), key("a", "r"), 3)
        .await
        .unwrap();
    let wishes = vec![
        (first.clone(), key("b", "r")),
        (new(), key("a", "r")),
        (new(), key("b", "r")),
        (new(), key("b", "another request")),
        (second.clone(), None),
        (new(), key("c", "r")),
        (new(), key("a", "another request")),
    ];
    let answers = store.accept_all(wishes, 3).await.unwrap();
    let said: Vec<_> = answers
        .iter()
        .map(|answer| match answer {
            Accepted::New(record) => (Some(record.id), record.queue_position),
            Accepted::Again(event) => (Some(event.session.id), None),
            Accepted::Mismatch => (None, Some(0)),
            Accepted::Full => (None, None),
        })
        .collect();
    let expected = [
        (Some(first.id), Some(2)),
        (Some(before.id), None),
        (Some(first.id), None),
        (None, Some(0)),
        (Some(second.id), Some(3)),
        (None, None),
        (None, Some(0)),
    ];
    assert_eq!(said, expected);
    let mut live = store.live().await.unwrap();
    live.sort_by_key(|r| r.queue_position);
    let ids: Vec<_> = live.iter().map(|r| r.id).collect();
    assert_eq!(ids, [before.id, first.id, second.id]);
    for record in live {
        let events = store.events_after(record.id, 0).await.unwrap();
        assert_eq!(events.len(), 1);
        assert_eq!((events[0].seq, &events[0].session), (1, &record.view()));
    }
    assert!(store.accept_all(Vec::new(), 3).await.unwrap().is_empty());
    store.close().await;
}

/// The same from many tasks, of two processes where that can be.
async fn at_once<T: Send + 'static, F: Future<Output = T> + Send + 'static>(
    place: &Place,
    tasks: u32,
    what: impl Fn(Arc<dyn Store>, u32) -> F,
) -> Vec<T> {
    let one = place.open().await;
    let stores = [one.clone(), place.open_beside(one).await];
    let tasks = (0..tasks).map(|n| tokio::spawn(what(stores[n as usize % 2].clone(), n)));
    let done = join_all(tasks).await;
    for store in &stores {
        store.close().await;
    }
    done.into_iter().map(Result::unwrap).collect()
}

async fn a_request_that_comes_many_times_at_once_is_accepted_once(place: Place) {
    let answers = at_once(&place, 24, move |store, n| async move {
        let record = asked(Expected::default(), now());
        let key = key(&format!("key {}", n % 3), "r");
        store.accept(record, key, 100).await.unwrap()
    });
    let (mut new, mut again) = (BTreeSet::new(), BTreeSet::new());
    for answer in answers.await {
        match answer {
            Accepted::New(record) => assert!(new.insert(record.id)),
            Accepted::Again(event) => drop(again.insert(event.session.id)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(new.len(), 3, "one for each key");
    assert_eq!(new, again);
}

async fn of_many_that_come_at_once_no_more_are_accepted_than_may_wait(place: Place) {
    let answers = at_once(&place, 24, move |store, _| async move {
        let record = asked(Expected::default(), now());
        store.accept(record, None, 10).await.unwrap()
    });
    let mut places: Vec<_> = answers
        .await
        .into_iter()
        .filter_map(|answer| match answer {
            Accepted::New(record) => record.queue_position,
            Accepted::Full => None,
            other => panic!("{other:?}"),
        })
        .collect();
    places.sort_unstable();
    assert_eq!(places, (1..=10).collect::<Vec<_>>());
}

async fn places_given_out_by_many_at_once_go_to_as_many_sessions_as_the_limits_leave(place: Place) {
    let store = place.open().await;
    for n in 0..20 {
        accept(&store, after(now(), SECOND * n)).await;
    }
    store.close().await;
    let limits = Limits {
        max_desktops: 12,
        concurrent_creates: 9,
        ..Limits::default()
    };
    let planned = at_once(&place, 8, move |store, _| {
        let limits = limits.clone();
        async move {
            let mut planned = Vec::new();
            while let Some(record) = store.plan_next(&limits, &[], now()).await.unwrap().given() {
                planned.push((record.id, record.desktop.unwrap().name()));
            }
            store.renumber_queue(0, 1_000, now()).await.unwrap();
            planned
        }
    });
    let planned = planned.await.concat();
    let sessions: BTreeSet<_> = planned.iter().map(|p| p.0).collect();
    let names: BTreeSet<_> = planned.iter().map(|p| p.1).collect();
    assert_eq!((planned.len(), sessions.len(), names.len()), (9, 9, 9));
    let store = place.open().await;
    store.renumber_queue(0, 1_000, now()).await.unwrap();
    let live = store.live().await.unwrap();
    let waiting: Vec<_> = live.iter().filter_map(|r| r.queue_position).collect();
    assert_eq!(waiting, (1..=11).collect::<Vec<_>>());
    for record in live {
        let events = store.events_after(record.id, 0).await.unwrap();
        let seqs: Vec<_> = events.iter().map(|e| e.seq).collect();
        assert_eq!(seqs, (1..=record.seq).collect::<Vec<_>>());
    }
    store.close().await;
}

async fn changes_that_come_at_once_see_each_other_and_their_events_have_no_gap(place: Place) {
    let store = place.open().await;
    let ids = [
        accept(&store, now()).await.id,
        accept(&store, now()).await.id,
    ];
    store.close().await;
    at_once(&place, 16, move |store, n| async move {
        for _ in 0..10 {
            change(&store, ids[n as usize / 8], now(), |r| {
                r.touch(after(r.last_activity, SECOND));
                Change::Told
            })
            .await;
        }
    })
    .await;
    let store = place.open().await;
    for id in ids {
        let record = store.get(id).await.unwrap().unwrap();
        assert_eq!(between(now(), record.last_activity), 80 * SECOND);
        let events = store.events_after(id, 0).await.unwrap();
        let seqs: Vec<_> = events.iter().map(|e| e.seq).collect();
        assert_eq!(seqs, (1..=81).collect::<Vec<_>>());
        let activity: Vec<_> = events.iter().map(|e| e.session.last_activity).collect();
        assert!(
            activity.is_sorted(),
            "events tell of the changes in their order"
        );
    }
    store.close().await;
}

async fn an_intent_that_fails_among_others_takes_none_of_them_along(place: Place) {
    let accepted = at_once(&place, 24, move |store, n| async move {
        if n % 3 == 0 {
            // Its session does not exist.
            let words = kept(SessionId::new(), n, "words");
            assert!(store.keep(&words).await.is_err());
            return None;
        }
        Some(accept(&store, now()).await.id)
    });
    let accepted: BTreeSet<_> = accepted.await.into_iter().flatten().collect();
    let store = place.open().await;
    let live: BTreeSet<_> = store.live().await.unwrap().iter().map(|r| r.id).collect();
    assert_eq!((live.len(), live), (16, accepted));
    store.close().await;
}

async fn a_change_that_the_schema_refuses_leaves_nothing_of_itself(place: Place) {
    if matches!(place, Place::Memory(_)) {
        return;
    }
    let store = place.open().await;
    let id = accept(&store, now()).await.id;
    let planned = store.plan_next(&Limits::default(), &[], now()).await;
    let before = planned.unwrap().given().unwrap();
    let name = before.desktop.as_ref().unwrap().name();
    store.close().await;
    let accepted = at_once(&place, 16, move |store, n| async move {
        if n % 2 == 0 {
            return Some(accept(&store, now()).await.id);
        }
        // The session's row is written before its desktop's, which is refused: no certificate is that short.
        let refused = move |r: &mut Record| {
            r.touch(after(now(), SECOND));
            r.creating(name).unwrap();
            r.booting(name, now()).unwrap();
            r.configuring(name, now()).unwrap();
            let address = "127.77.0.1:3389".parse().unwrap();
            r.announced(name, address, "short".to_owned(), now())
                .unwrap();
            Change::Told
        };
        let refused = store.update(id, now(), Box::new(refused)).await;
        assert!(refused.is_err(), "{refused:?}");
        None
    });
    let accepted: Vec<_> = accepted.await.into_iter().flatten().collect();
    let store = place.open().await;
    assert_eq!(store.get(id).await.unwrap(), Some(before));
    assert_eq!(store.events_after(id, 0).await.unwrap().len(), 2);
    assert_eq!(store.live().await.unwrap().len(), accepted.len() + 1);
    store.close().await;
}

async fn an_intent_whose_asker_goes_away_is_made_whole_or_not_at_all(place: Place) {
    let store = place.open().await;
    let id = accept(&store, now()).await.id;
    for n in 0_u32..40 {
        let asked = {
            let store = store.clone();
            tokio::spawn(async move {
                change(&store, id, now(), |r| {
                    r.touch(after(r.last_activity, SECOND));
                    Change::Told
                })
                .await
            })
        };
        for _ in 0..n {
            tokio::task::yield_now().await;
        }
        asked.abort();
    }
    change(&store, id, now(), |_| Change::Told).await;
    let record = store.get(id).await.unwrap().unwrap();
    let made = between(now(), record.last_activity).as_secs();
    assert_eq!(record.seq, made + 2, "each with its event, or neither");
    let events = store.events_after(id, 0).await.unwrap();
    assert_eq!(events.len() as u64, record.seq);
    store.close().await;
}

async fn a_desktop_that_it_does_not_know_says_that_it_is_an_older_copy(place: Place) {
    let store = place.open().await;
    let name = |number| DesktopName::from_number(number).unwrap();
    assert_eq!(store.resume(None, now()).await.unwrap(), None);
    let first = claimed(&store, now(), 1).await;
    let known = first.desktop.as_ref().unwrap().name();
    assert_eq!(store.resume(Some(known), now()).await.unwrap(), None);

    let unknown = name(known.number() + 5);
    let seen = Some(unknown);
    let restored = store.resume(seen, now()).await.unwrap().unwrap();
    assert_eq!((restored.known, restored.at), (known, now()));
    assert!(!restored.left_out(known) && restored.left_out(unknown));
    let later = after(now(), SECOND);
    assert_eq!(store.resume(seen, later).await.unwrap(), Some(restored));
    store.close().await;
    let store = place.open().await;
    assert_eq!(store.resume(None, later).await.unwrap(), Some(restored));
    let second = claimed(&store, later, 1).await;
    let new = second.desktop.unwrap().name();
    assert!(new > restored.resumed && !restored.left_out(new));

    // Again, while machines that the first left out may still be there.
    let again = store.resume(Some(name(0x00ff_ffff)), later).await.unwrap();
    let again = again.unwrap();
    assert_eq!((again.known, again.at), (known, later));
    assert!(again.left_out(new) && again.left_out(name(0x00ff_ffff)));
    store.close().await;
}

async fn numbers_are_never_used_twice_while_many_sessions_come_and_go(place: Place) {
    let limits = Limits {
        max_desktops: 1_000,
        concurrent_creates: 1_000,
        ..Limits::default()
    };
    let names = at_once(&place, 8, move |store, _| {
        let limits = limits.clone();
        async move {
            let mut names = Vec::new();
            for _ in 0..5 {
                accept(&store, now()).await;
                // Perhaps another's session.
                let planned = store.plan_next(&limits, &[], now()).await.unwrap().given();
                let Some(record) = planned else { continue };
                names.push(record.desktop.as_ref().unwrap().name());
                end(&store, &record).await;
                store.forget(after(now(), SECOND)).await.unwrap();
            }
            names
        }
    });
    let names = names.await.concat();
    let different: BTreeSet<_> = names.iter().collect();
    assert_eq!(different.len(), names.len());
    let store = place.open().await;
    let left = store.live().await.unwrap();
    assert!(left.iter().all(|r| r.phase == SessionPhase::Queued));
    assert_eq!(names.len() + left.len(), 40, "each is planned, or waits");
    store.close().await;
}

async fn a_state_is_saved_only_under_its_lock_and_ends_with_its_machine(place: Place) {
    let store = place.open().await;
    let name = DesktopName::from_number(3).unwrap();
    let machine = Reserved {
        name,
        node: "pve1".to_owned(),
        memory_mib: 512,
        storage: "ceph".to_owned(),
    };
    let held = Locking::Held("{\"who\":\"a\"}".to_owned());

    assert_eq!(store.lock(name, "a", "{}").await.unwrap(), Locking::Nothing);
    let reserve = async |m: &Reserved| store.reserve(m, 2).await.unwrap();
    assert_eq!(reserve(&machine).await, Reserving::Done);
    assert_eq!(reserve(&machine).await, Reserving::Taken);
    assert_eq!(store.reserved().await.unwrap(), [machine]);

    let not_locked = store.save(name, "a", b"1").await.unwrap();
    assert_eq!(not_locked, Locking::Nothing);
    let locked = store.lock(name, "a", "{\"who\":\"a\"}").await.unwrap();
    assert_eq!(locked, Locking::Done);
    let again = store.lock(name, "a", "{\"who\":\"a\"}").await.unwrap();
    assert_eq!(again, Locking::Done, "its answer was lost");
    assert_eq!(store.lock(name, "b", "{}").await.unwrap(), held);
    assert_eq!(store.save(name, "b", b"2").await.unwrap(), held);
    assert_eq!(store.save(name, "a", b"1").await.unwrap(), Locking::Done);
    assert_eq!(store.unlock(name, "b").await.unwrap(), held);
    assert_eq!(store.unlock(name, "a").await.unwrap(), Locking::Done);
    assert_eq!(store.unlock(name, "a").await.unwrap(), Locking::Done);
    assert_eq!(store.save(name, "a", b"3").await.unwrap(), Locking::Nothing);
    assert_eq!(store.state(name).await.unwrap().unwrap(), b"1");

    store.release(name).await.unwrap();
    assert_eq!(store.state(name).await.unwrap(), None);
    assert_eq!(store.lock(name, "a", "{}").await.unwrap(), Locking::Nothing);
    store.close().await;
}

async fn a_storage_takes_only_so_many_clones_at_a_time(place: Place) {
    let store = place.open().await;
    let reserve = async |number, storage: &str| {
        let machine = Reserved {
            name: DesktopName::from_number(number).unwrap(),
            node: "pve1".to_owned(),
            memory_mib: 512,
            storage: storage.to_owned(),
        };
        store.reserve(&machine, 2).await.unwrap()
    };
    assert_eq!(reserve(1, "a").await, Reserving::Done);
    assert_eq!(reserve(2, "a").await, Reserving::Done);
    assert_eq!(reserve(3, "a").await, Reserving::Waits);
    assert_eq!(reserve(4, "b").await, Reserving::Done);
    // One is cloned, one is removed half-way.
    let name = |number| DesktopName::from_number(number).unwrap();
    store.cloned(name(1)).await.unwrap();
    assert_eq!(reserve(3, "a").await, Reserving::Done);
    assert_eq!(reserve(5, "a").await, Reserving::Waits);
    store.release(name(2)).await.unwrap();
    assert_eq!(reserve(5, "a").await, Reserving::Done);
    store.close().await;
}

fn kept(session: SessionId, number: u32, text: impl Into<String>) -> Kept {
    Kept {
        session,
        desktop: DesktopName::from_number(number).unwrap(),
        at: now(),
        text: text.into(),
    }
}

async fn what_a_desktop_left_is_read_by_its_name_and_by_its_session_until_that_is_forgotten(
    place: Place,
) {
    let store = place.open().await;
    let mine = accept(&store, now()).await.id;
    let other = accept(&store, now()).await.id;
    let all = [
        kept(mine, 1, "first"),
        kept(mine, 3, "second"),
        kept(other, 2, "another's"),
    ];
    for words in &all {
        store.keep(words).await.unwrap();
    }
    store.keep(&kept(mine, 1, "half removed")).await.unwrap();

    let of = async |whose: &str| store.kept(whose.parse().unwrap()).await.unwrap();
    assert_eq!(of(&mine.to_string()).await, all[..2]);
    assert_eq!(of("desktop-0000002").await, all[2..]);
    assert_eq!(of("desktop-0000004").await, []);

    change(&store, mine, now(), |r| {
        r.end(EndReason::Requested, now()).unwrap();
        Change::Told
    })
    .await;
    assert_eq!(store.forget(after(now(), SECOND)).await.unwrap(), 1);
    assert_eq!(store.kept(Whose::Session(mine)).await.unwrap(), []);
    assert_eq!(store.kept(Whose::Session(other)).await.unwrap().len(), 1);
    store.close().await;
}

async fn a_session_keeps_the_words_of_its_latest_desktops_within_the_bound(place: Place) {
    let store = place.open().await;
    let mine = accept(&store, now()).await.id;
    let other = accept(&store, now()).await.id;
    let longest = kept(other, 1, "x".repeat(LONGEST));
    store.keep(&longest).await.unwrap();
    // Two bytes each: it is bytes that count.
    for number in 2..6 {
        let text = "ü".repeat(LONGEST / 5);
        store.keep(&kept(mine, number, text)).await.unwrap();
    }
    let left = store.kept(Whose::Session(mine)).await.unwrap();
    let numbers: Vec<u32> = left.iter().map(|k| k.desktop.number()).collect();
    assert_eq!(numbers, [4, 5]);
    assert_eq!(store.kept(Whose::Session(other)).await.unwrap().len(), 1);
    let too_long = kept(mine, 6, "x".repeat(LONGEST + 1));
    assert!(store.keep(&too_long).await.is_err());
    store.close().await;
}

async fn of_all_desktops_the_latest_words_are_kept(place: Place) {
    let store = place.open().await;
    let first = accept(&store, now()).await.id;
    let second = accept(&store, now()).await.id;
    let last = u32::try_from(DESKTOPS).unwrap() + 1;
    for number in 1..=last {
        let session = if number < 4 { first } else { second };
        store.keep(&kept(session, number, "x")).await.unwrap();
    }
    let left = store.kept(Whose::Session(first)).await.unwrap();
    let numbers: Vec<u32> = left.iter().map(|k| k.desktop.number()).collect();
    assert_eq!(numbers, [2, 3]);
    store.close().await;
}

fn removal(number: u32, what: &str) -> Removal {
    Removal {
        desktop: DesktopName::from_number(number).unwrap(),
        by: "this program".to_owned(),
        checked: vec![Absence {
            what: what.to_owned(),
            place: "a \0 in the words of a provider".to_owned(),
            by: "a provider".to_owned(),
            checked_at: now(),
        }],
    }
}

async fn of_a_desktop_the_last_receipt_is_kept_until_its_session_is_forgotten(place: Place) {
    let store = place.open().await;
    let mine = accept(&store, now()).await.id;
    let other = accept(&store, now()).await.id;
    let all = [
        (mine, removal(1, "machine")),
        (mine, removal(3, "machine")),
        (other, removal(2, "machine")),
    ];
    store
        .keep_receipt(mine, &removal(1, "half a machine"))
        .await
        .unwrap();
    for (session, removal) in &all {
        store.keep_receipt(*session, removal).await.unwrap();
    }
    let nobodys = removal(4, "machine");
    let nobodys = store.keep_receipt(SessionId::new(), &nobodys);
    assert!(nobodys.await.is_err(), "its session does not exist");

    store.close().await;
    let store = place.open().await;
    let of = async |whose: &str| store.receipts(whose.parse().unwrap()).await.unwrap();
    assert_eq!(of(&mine.to_string()).await, all[..2]);
    assert_eq!(of("desktop-0000002").await, all[2..]);
    assert_eq!(of("desktop-0000004").await, []);

    change(&store, mine, now(), |r| {
        r.end(EndReason::Requested, now()).unwrap();
        Change::Told
    })
    .await;
    assert_eq!(store.forget(after(now(), SECOND)).await.unwrap(), 1);
    assert_eq!(of("desktop-0000001").await, []);
    assert_eq!(of(&other.to_string()).await, all[2..]);
    store.close().await;
}

async fn a_beat_is_a_change_that_counts_nothing_and_what_is_there_is_counted_by_phase(
    place: Place,
) {
    let store = place.open().await;
    store.beat(now()).await.unwrap();
    store.beat(after(now(), SECOND)).await.unwrap();
    let nothing = store.tally().await.unwrap();
    assert!(nothing.sessions.is_empty() && nothing.desktops.is_empty());
    let over = claimed(&store, now(), 1).await;
    end(&store, &over).await;
    claimed(&store, now(), 1).await;
    accept(&store, now()).await;
    accept(&store, now()).await;
    let tally = store.tally().await.unwrap();
    let counted = |of: &[(&str, u64)]| -> BTreeMap<String, u64> {
        of.iter().map(|(p, n)| ((*p).to_owned(), *n)).collect()
    };
    let sessions = counted(&[("ended", 1), ("queued", 2), ("ready", 1)]);
    assert_eq!(tally.sessions, sessions);
    assert_eq!(tally.desktops, counted(&[("claimed", 1)]));
    store.close().await;
    if !matches!(place, Place::Memory(_)) {
        assert!(store.beat(now()).await.is_err(), "it is closed");
    }
}

fn at_provider(provider: &str, host: &str) -> At {
    At {
        provider: provider.to_owned(),
        host: host.to_owned(),
    }
}

fn name(number: u32) -> DesktopName {
    DesktopName::from_number(number).unwrap()
}

/// So many seconds after the first look, these were seen that nobody owns, and these others.
async fn look(
    store: &Arc<dyn Store>,
    at: &At,
    seconds: u32,
    unowned: &[u32],
    others: &[u32],
) -> Vec<(Turn, Stray)> {
    let names = |numbers: &[u32]| numbers.iter().copied().map(name).collect();
    let look = Look {
        at: after(now(), s(seconds)),
        unowned: names(unowned),
        others: names(others),
        apart: 2 * SECOND,
    };
    store.sight(at, look).await.unwrap()
}

fn turns(seen: &[(Turn, Stray)]) -> Vec<(Turn, u32)> {
    let turn = |(turn, stray): &(Turn, Stray)| (*turn, stray.desktop.number());
    seen.iter().map(turn).collect()
}

async fn what_nobody_owns_is_in_quarantine_from_its_second_sighting_on_and_removed_once(
    place: Place,
) {
    let store = place.open().await;
    let at = at_provider("p", "");
    let first = look(&store, &at, 0, &[1, 2], &[]).await;
    assert_eq!(turns(&first), [(Turn::Found, 1), (Turn::Found, 2)]);
    let early = look(&store, &at, 1, &[1, 2], &[]).await;
    assert_eq!(turns(&early), [(Turn::Again, 1), (Turn::Again, 2)]);
    let (_, seen_once) = &early[0];
    assert_eq!(seen_once.due(SECOND, SECOND), None);
    assert!(!store.begin_removal(seen_once, now()).await.unwrap());
    store.close().await;

    // Another process goes on.
    let store = place.open().await;
    let second = look(&store, &at, 2, &[1, 2], &[]).await;
    let expected = [(Turn::Quarantined, 1), (Turn::Quarantined, 2)];
    assert_eq!(turns(&second), expected);
    let third = look(&store, &at, 3, &[1, 2], &[]).await;
    assert_eq!(turns(&third), [(Turn::Again, 1), (Turn::Again, 2)]);
    let (_, stray) = &third[0];
    assert_eq!(stray.first_seen, now());
    assert_eq!(stray.quarantined_at, Some(after(now(), 2 * SECOND)));
    assert_eq!(stray.due(SECOND, SECOND), Some(after(now(), 3 * SECOND)));

    let at_last = after(now(), 4 * SECOND);
    assert!(!store.removed(stray, at_last).await.unwrap(), "not begun");
    assert!(store.begin_removal(stray, at_last).await.unwrap());
    assert!(!store.begin_removal(stray, at_last).await.unwrap(), "twice");
    store
        .removal_failed(stray, "a \0 in its way")
        .await
        .unwrap();
    let failed = &store.strays().await.unwrap()[0];
    assert!(failed.why.as_ref().unwrap().ends_with("in its way"));
    assert_eq!(failed.due(SECOND, 9 * SECOND), stray.due(SECOND, SECOND));
    assert!(store.begin_removal(failed, at_last).await.unwrap());
    let again = &store.strays().await.unwrap()[0];
    assert_eq!((&again.why, again.tried_at), (&None, Some(at_last)));
    let free = after(at_last, 9 * SECOND);
    assert_eq!(
        again.due(SECOND, 9 * SECOND),
        Some(free),
        "somebody is at it"
    );
    assert!(store.removed(stray, at_last).await.unwrap());
    assert!(!store.removed(stray, at_last).await.unwrap(), "twice");
    let over = &store.strays().await.unwrap()[0];
    assert_eq!(over.over, Some((at_last, Outcome::Removed)));
    assert_eq!(over.due(SECOND, SECOND), None);

    let after_it = after(at_last, SECOND);
    assert_eq!(store.forget_strays(at_last).await.unwrap(), 0);
    assert_eq!(store.forget_strays(after_it).await.unwrap(), 1);
    let left = store.strays().await.unwrap();
    assert_eq!(left.len(), 1, "what is not over is not forgotten");
    assert_eq!(left[0].desktop, name(2));
    store.close().await;
}

async fn what_turns_out_to_be_owned_or_gone_leaves_and_begins_anew_if_it_is_seen_again(
    place: Place,
) {
    let store = place.open().await;
    let at = at_provider("p", "");
    look(&store, &at, 0, &[1, 2, 3, 4], &[]).await;
    let seen = look(&store, &at, 2, &[1, 2, 3, 4], &[]).await;
    for (_, stray) in &seen[2..] {
        assert!(store.begin_removal(stray, now()).await.unwrap());
    }
    store.removal_failed(&seen[3].1, "busy").await.unwrap();
    let seen = look(&store, &at, 4, &[], &[1]).await;
    let [released, vanished, removed] =
        [Outcome::Released, Outcome::Vanished, Outcome::Removed].map(Turn::Over);
    assert_eq!(
        turns(&seen),
        [(released, 1), (vanished, 2), (removed, 3), (vanished, 4)],
        "whoever removed 3 died before it could say so; 4 went by itself"
    );
    assert!(!store.begin_removal(&seen[0].1, now()).await.unwrap());
    assert_eq!(look(&store, &at, 5, &[], &[1]).await, []);

    let seen = look(&store, &at, 6, &[1], &[]).await;
    assert_eq!(turns(&seen), [(Turn::Found, 1)]);
    let again = store.strays().await.unwrap().remove(0);
    assert_eq!(again, seen[0].1);
    assert_eq!((again.quarantined_at, again.over), (None, None));
    store.close().await;
}

async fn what_is_kept_is_not_removed(place: Place) {
    let store = place.open().await;
    let at = at_provider("p", "");
    look(&store, &at, 0, &[1], &[]).await;
    assert_eq!(store.keep_stray(name(2), Some(now())).await.unwrap(), 0);
    assert_eq!(store.keep_stray(name(1), Some(now())).await.unwrap(), 1);
    let seen = look(&store, &at, 2, &[1], &[]).await;
    assert_eq!(turns(&seen), [(Turn::Quarantined, 1)]);
    let (_, kept) = &seen[0];
    assert_eq!(
        (kept.kept_at, kept.due(SECOND, SECOND)),
        (Some(now()), None)
    );
    assert!(!store.begin_removal(kept, now()).await.unwrap());
    assert_eq!(store.keep_stray(name(1), None).await.unwrap(), 1);
    assert!(store.begin_removal(kept, now()).await.unwrap());
    assert!(store.removed(kept, now()).await.unwrap());
    assert_eq!(store.keep_stray(name(1), Some(now())).await.unwrap(), 0);
    store.close().await;
}

async fn places_do_not_know_of_each_other(place: Place) {
    let store = place.open().await;
    let all = [
        at_provider("p", ""),
        at_provider("q", "one"),
        at_provider("q", "other"),
    ];
    for at in &all {
        let seen = look(&store, at, 0, &[7], &[]).await;
        assert_eq!(turns(&seen), [(Turn::Found, 7)]);
    }
    let gone = Turn::Over(Outcome::Vanished);
    assert_eq!(
        turns(&look(&store, &all[1], 2, &[], &[]).await),
        [(gone, 7)]
    );
    let strays = store.strays().await.unwrap();
    let left = strays.into_iter().filter(|stray| stray.over.is_none());
    let left: Vec<_> = left.map(|stray| stray.place).collect();
    assert_eq!(left, [all[0].clone(), all[2].clone()]);
    assert_eq!(store.keep_stray(name(7), Some(now())).await.unwrap(), 2);
    store.close().await;
}

async fn a_clock_that_was_set_back_keeps_nothing_in_quarantine(place: Place) {
    let store = place.open().await;
    let at = at_provider("p", "");
    look(&store, &at, 1_000, &[1], &[]).await;
    let seen = look(&store, &at, 1, &[1], &[]).await;
    assert_eq!(turns(&seen), [(Turn::Again, 1)], "no time has passed");
    look(&store, &at, 1_000, &[1], &[]).await;
    let seen = look(&store, &at, 3, &[1], &[]).await;
    assert_eq!(seen[0].1.quarantined_at, Some(after(now(), 3 * SECOND)));
    store.close().await;
}

async fn of_many_that_look_and_remove_at_once_one_is_told_of_each_turn(place: Place) {
    for (seconds, turn) in [(0, Turn::Found), (2, Turn::Quarantined)] {
        let told = at_once(&place, 8, move |store, _| async move {
            let at = at_provider("p", "");
            turns(&look(&store, &at, seconds, &[1, 2, 3], &[]).await)
        });
        let mut told = told.await.concat();
        told.retain(|(turn, _)| *turn != Turn::Again);
        told.sort_by_key(|(_, number)| *number);
        assert_eq!(told, [(turn, 1), (turn, 2), (turn, 3)]);
    }
    let removed = at_once(&place, 8, move |store, _| async move {
        let mut removed = Vec::new();
        for stray in store.strays().await.unwrap() {
            if store.begin_removal(&stray, now()).await.unwrap()
                && store.removed(&stray, now()).await.unwrap()
            {
                removed.push(stray.desktop.number());
            }
        }
        removed
    });
    let mut removed = removed.await.concat();
    removed.sort_unstable();
    assert_eq!(removed, [1, 2, 3]);
}
