//! The store as a model: plain maps under one lock, for property tests. Nothing of it is durable.

use super::machines::{Locking, Machines, Reserved, Reserving};
use super::pulse::{Pulse, Tally};
use super::receipts::Receipts;
use super::replicas::{ReplicaId, Replicas};
use super::strays::{self, Look, Outcome, Place, Stray, Strays, Turn};
use super::words::{DESKTOPS, Kept, Whose, Words};
use super::{
    Accepted, Change, Changing, Idempotency, Numbered, Planned, Restored, Store, StoreError,
    expected,
};
use crate::clock::ms_between;
use crate::config::Limits;
use crate::desktop::{Desktop, DesktopPhase};
use crate::last_words::LONGEST;
use crate::metrics::word;
use crate::session::{Expected, Record};
use async_trait::async_trait;
use jiff::Timestamp;
use mayfly_api::{DesktopName, Removal, SessionEvent, SessionId, SessionPhase, StageName};
use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// See the module. Clones are the same one.
#[derive(Clone, Debug)]
pub struct MemoryStore(Arc<Mutex<Model>>, ReplicaId);

impl Default for MemoryStore {
    fn default() -> Self {
        Self(Arc::default(), ReplicaId::one())
    }
}

#[derive(Debug, Default)]
struct Model {
    sessions: BTreeMap<SessionId, Record>,
    events: HashMap<SessionId, Vec<SessionEvent>>,
    /// By the key's SHA-256: the request's, and its session.
    keys: HashMap<String, (String, SessionId)>,
    /// The highest number that was handed out.
    last: u32,
    machines: BTreeMap<DesktopName, Machine>,
    words: BTreeMap<DesktopName, Kept>,
    receipts: BTreeMap<DesktopName, (SessionId, Removal)>,
    strays: BTreeMap<(Place, DesktopName), Stray>,
    restored: Option<Restored>,
}

#[derive(Debug)]
struct Machine {
    reserved: Reserved,
    is_cloned: bool,
    /// Id, and what its holder said.
    lock: Option<(String, String)>,
    state: Option<Vec<u8>>,
}

impl MemoryStore {
    fn model(&self) -> MutexGuard<'_, Model> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Model {
    fn before(&self, key: &Idempotency) -> Option<Accepted> {
        let (request, session) = self.keys.get(&key.key_sha256)?;
        if *request != key.request_sha256 {
            return Some(Accepted::Mismatch);
        }
        let first = self.events.get(session)?.first()?.clone();
        Some(Accepted::Again(Box::new(first)))
    }

    fn accept(
        &mut self,
        mut record: Record,
        idempotency: Option<Idempotency>,
        max_queued: u32,
    ) -> Accepted {
        if let Some(before) = idempotency.as_ref().and_then(|key| self.before(key)) {
            return before;
        }
        let queued = self.that(|r| r.phase == SessionPhase::Queued).len();
        let queued = u32::try_from(queued).unwrap_or(u32::MAX);
        if queued >= max_queued {
            return Accepted::Full;
        }
        record.queue_position = Some(queued + 1);
        self.sessions.insert(record.id, record.clone());
        self.append_event(&record, record.created_at);
        if let Some(key) = idempotency {
            let of = (key.request_sha256, record.id);
            self.keys.insert(key.key_sha256, of);
        }
        Accepted::New(Box::new(record))
    }

    /// Sessions for which that holds, oldest first.
    fn that(&self, holds: impl Fn(&Record) -> bool) -> Vec<Record> {
        let mut found: Vec<_> = self
            .sessions
            .values()
            .filter(|r| holds(r))
            .cloned()
            .collect();
        found.sort_by_key(|r| (r.created_at, r.id));
        found
    }

    fn desktops(&self) -> impl Iterator<Item = &Desktop> {
        self.sessions.values().filter_map(Record::live_desktop)
    }

    fn save(&mut self, record: &mut Record, change: Change, now: Timestamp) {
        if change == Change::Told {
            record.seq += 1;
            self.append_event(record, now);
        }
        self.sessions.insert(record.id, record.clone());
    }

    fn append_event(&mut self, record: &Record, at: Timestamp) {
        self.events
            .entry(record.id)
            .or_default()
            .push(SessionEvent {
                seq: record.seq,
                at,
                session: record.view(),
            });
    }

    /// The same, as it is now, if it is not over.
    fn open_stray(&mut self, stray: &Stray) -> Option<&mut Stray> {
        let key = (stray.place.clone(), stray.desktop);
        self.strays.get_mut(&key).filter(|s| s.over.is_none())
    }

    /// The machine, if nobody but `id` holds its lock.
    fn unlocked(&mut self, name: DesktopName, id: &str) -> Result<&mut Machine, Locking> {
        let machine = self.machines.get_mut(&name).ok_or(Locking::Nothing)?;
        match &machine.lock {
            Some((holder, info)) if holder != id => Err(Locking::Held(info.clone())),
            _ => Ok(machine),
        }
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn accept_all(
        &self,
        wishes: Vec<(Record, Option<Idempotency>)>,
        max_queued: u32,
    ) -> Result<Vec<Accepted>, StoreError> {
        let mut model = self.model();
        let wishes = wishes.into_iter();
        Ok(wishes
            .map(|(mut record, key)| {
                record.take(&self.1);
                model.accept(record, key, max_queued)
            })
            .collect())
    }

    async fn accepted_before(&self, key: &Idempotency) -> Result<Option<Accepted>, StoreError> {
        Ok(self.model().before(key))
    }

    async fn get(&self, id: SessionId) -> Result<Option<Record>, StoreError> {
        Ok(self.model().sessions.get(&id).cloned())
    }

    async fn live(&self) -> Result<Vec<Record>, StoreError> {
        Ok(self.model().that(|r| !r.phase.is_final()))
    }

    async fn update(
        &self,
        id: SessionId,
        now: Timestamp,
        change: Changing,
    ) -> Result<Option<(Record, Change)>, StoreError> {
        let mut model = self.model();
        let Some(mut record) = model.sessions.get(&id).cloned() else {
            return Ok(None);
        };
        let changed = change(&mut record);
        if changed != Change::Nothing {
            model.save(&mut record, changed, now);
        }
        Ok(Some((record, changed)))
    }

    async fn plan_next(
        &self,
        limits: &Limits,
        full: &[String],
        now: Timestamp,
    ) -> Result<Planned, StoreError> {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let mut model = self.model();
        let making = |d: &&Desktop| d.phase() < DesktopPhase::Claimed;
        if count(model.desktops().count()) >= limits.max_desktops
            || count(model.desktops().filter(making).count()) >= limits.concurrent_creates
        {
            return Ok(Planned::NoPlace);
        }
        let waiting = model.that(|r| r.needs_desktop() && !full.contains(&r.wish.template));
        let Some(mut record) = waiting.into_iter().next() else {
            return Ok(Planned::Nobody);
        };
        let name = DesktopName::from_number(model.last + 1).ok_or(StoreError::NoNames)?;
        record.take(&self.1);
        if record.plan(name, now).is_err() {
            return Ok(Planned::Nobody);
        }
        model.last = name.number();
        model.save(&mut record, Change::Told, now);
        Ok(Planned::Given(Box::new(record)))
    }

    async fn renumber_queue(
        &self,
        after: u32,
        count: u32,
        now: Timestamp,
    ) -> Result<Numbered, StoreError> {
        let mut model = self.model();
        let queued = model.that(|r| r.phase == SessionPhase::Queued);
        let part = (1..).zip(queued).skip(after as usize).take(count as usize);
        let part: Vec<_> = part.collect();
        let mut numbered = Numbered {
            told: Vec::new(),
            to_the_end: part.len() < count as usize,
        };
        for (place, mut record) in part {
            if record.queue_position != Some(place) {
                record.queue_position = Some(place);
                model.save(&mut record, Change::Told, now);
                numbered.told.push(record);
            }
        }
        Ok(numbered)
    }

    async fn events_after(&self, id: SessionId, seq: u64) -> Result<Vec<SessionEvent>, StoreError> {
        let model = self.model();
        let events = model.events.get(&id).into_iter().flatten();
        Ok(events.filter(|e| e.seq > seq).cloned().collect())
    }

    async fn expected(&self, template: &str, provider: &str) -> Result<Expected, StoreError> {
        let mut runs = self
            .model()
            .that(|r| r.wish.template == template && r.wish.provider == provider);
        runs.sort_by_key(|r| Reverse((r.created_at, r.id)));
        let ready = |r: &Record| r.ready_at.map(|at| ms_between(r.created_at, at));
        let runs: Vec<_> = runs
            .into_iter()
            .filter_map(|r| Some((ready(&r)?, r.stages)))
            .take(20)
            .collect();
        let mut stages: BTreeMap<StageName, Vec<u64>> = BTreeMap::new();
        for stage in runs.iter().flat_map(|(_, stages)| stages) {
            if let Some(took) = stage.duration_ms {
                stages.entry(stage.name).or_default().push(took);
            }
        }
        Ok(expected(runs.iter().map(|r| r.0).collect(), stages))
    }

    async fn desktops(&self) -> Result<Vec<DesktopName>, StoreError> {
        Ok(self.model().desktops().map(Desktop::name).collect())
    }

    async fn forget(&self, before: Timestamp) -> Result<u64, StoreError> {
        let mut model = self.model();
        let over = model
            .that(|r| r.phase.is_final() && r.created_at < before && r.live_desktop().is_none());
        for record in &over {
            model.sessions.remove(&record.id);
            model.events.remove(&record.id);
            model.keys.retain(|_, (_, session)| *session != record.id);
            model.words.retain(|_, kept| kept.session != record.id);
            model
                .receipts
                .retain(|_, (session, _)| *session != record.id);
        }
        Ok(u64::try_from(over.len()).unwrap_or(u64::MAX))
    }

    async fn resume(
        &self,
        seen: Option<DesktopName>,
        now: Timestamp,
    ) -> Result<Option<Restored>, StoreError> {
        let mut model = self.model();
        let highest = DesktopName::from_number(model.last).ok_or(StoreError::NoNames)?;
        if seen > Some(highest) {
            let restored = Restored::noticed(model.restored, highest, seen, now);
            model.last = restored.resumed.number();
            model.restored = Some(restored);
        }
        Ok(model.restored)
    }

    async fn close(&self) {}
}

#[async_trait]
impl Replicas for MemoryStore {
    fn me(&self) -> &ReplicaId {
        &self.1
    }

    async fn mine(&self) -> Result<Vec<SessionId>, StoreError> {
        let live = self.model().that(|r| !r.phase.is_final());
        Ok(live.into_iter().map(|r| r.id).collect())
    }
}

#[async_trait]
impl Machines for MemoryStore {
    async fn reserve(&self, machine: &Reserved, clones: u32) -> Result<Reserving, StoreError> {
        let mut model = self.model();
        let on_it = |m: &&Machine| m.reserved.storage == machine.storage && !m.is_cloned;
        let cloning = model.machines.values().filter(on_it).count();
        if u32::try_from(cloning).unwrap_or(u32::MAX) >= clones {
            return Ok(Reserving::Waits);
        }
        if model.machines.contains_key(&machine.name) {
            return Ok(Reserving::Taken);
        }
        let reserved = Machine {
            reserved: machine.clone(),
            is_cloned: false,
            lock: None,
            state: None,
        };
        model.machines.insert(machine.name, reserved);
        Ok(Reserving::Done)
    }

    async fn cloned(&self, name: DesktopName) -> Result<(), StoreError> {
        if let Some(machine) = self.model().machines.get_mut(&name) {
            machine.is_cloned = true;
        }
        Ok(())
    }

    async fn reserved(&self) -> Result<Vec<Reserved>, StoreError> {
        let model = self.model();
        Ok(model
            .machines
            .values()
            .map(|m| m.reserved.clone())
            .collect())
    }

    async fn lock(&self, name: DesktopName, id: &str, info: &str) -> Result<Locking, StoreError> {
        Ok(match self.model().unlocked(name, id) {
            Ok(machine) => {
                machine.lock = Some((id.to_owned(), info.to_owned()));
                Locking::Done
            }
            Err(why) => why,
        })
    }

    async fn unlock(&self, name: DesktopName, id: &str) -> Result<Locking, StoreError> {
        Ok(match self.model().unlocked(name, id) {
            Ok(machine) => {
                machine.lock = None;
                Locking::Done
            }
            Err(why) => why,
        })
    }

    async fn save(&self, name: DesktopName, id: &str, state: &[u8]) -> Result<Locking, StoreError> {
        Ok(match self.model().unlocked(name, id) {
            Ok(machine) if machine.lock.is_some() => {
                machine.state = Some(state.to_owned());
                Locking::Done
            }
            Ok(_) => Locking::Nothing,
            Err(why) => why,
        })
    }

    async fn state(&self, name: DesktopName) -> Result<Option<Vec<u8>>, StoreError> {
        let model = self.model();
        Ok(model.machines.get(&name).and_then(|m| m.state.clone()))
    }

    async fn release(&self, name: DesktopName) -> Result<(), StoreError> {
        self.model().machines.remove(&name);
        Ok(())
    }
}

#[async_trait]
impl Words for MemoryStore {
    async fn keep(&self, words: &Kept) -> Result<(), StoreError> {
        let mut model = self.model();
        if words.text.len() > LONGEST || !model.sessions.contains_key(&words.session) {
            return Err(StoreError::Refused(format!(
                "the words of {}",
                words.desktop
            )));
        }
        let first = model.words.entry(words.desktop);
        first.or_insert_with(|| words.clone());
        let (mut of_session, mut of_all) = (0, 0);
        let mut latest_first: Vec<_> = std::mem::take(&mut model.words).into_iter().collect();
        latest_first.reverse();
        latest_first.retain(|(_, kept)| {
            of_all += 1;
            let mut fits = true;
            if kept.session == words.session {
                of_session += kept.text.len();
                fits = of_session <= LONGEST;
            }
            fits && of_all <= DESKTOPS
        });
        model.words = latest_first.into_iter().collect();
        Ok(())
    }

    async fn kept(&self, whose: Whose) -> Result<Vec<Kept>, StoreError> {
        let model = self.model();
        let its = |kept: &&Kept| match whose {
            Whose::Session(id) => kept.session == id,
            Whose::Desktop(name) => kept.desktop == name,
        };
        Ok(model.words.values().filter(its).cloned().collect())
    }
}

#[async_trait]
impl Receipts for MemoryStore {
    async fn keep_receipt(&self, session: SessionId, removal: &Removal) -> Result<(), StoreError> {
        let mut model = self.model();
        let desktop = removal.desktop;
        if !model.sessions.contains_key(&session) {
            return Err(StoreError::Refused(format!("the receipt of {desktop}")));
        }
        let first = (session, removal.clone());
        let kept = model.receipts.entry(desktop).or_insert(first);
        kept.1 = removal.clone();
        Ok(())
    }

    async fn receipts(&self, whose: Whose) -> Result<Vec<(SessionId, Removal)>, StoreError> {
        let model = self.model();
        let its = |(session, removal): &&(SessionId, Removal)| match whose {
            Whose::Session(id) => *session == id,
            Whose::Desktop(name) => removal.desktop == name,
        };
        Ok(model.receipts.values().filter(its).cloned().collect())
    }
}

#[async_trait]
impl Strays for MemoryStore {
    async fn sight(&self, place: &Place, look: Look) -> Result<Vec<(Turn, Stray)>, StoreError> {
        let mut model = self.model();
        let at_it = model.strays.values().filter(|stray| stray.place == *place);
        let known = at_it.map(|stray| (stray.desktop, stray.clone())).collect();
        let turns = strays::seen(place, &known, &look);
        for (_, stray) in &turns {
            let key = (place.clone(), stray.desktop);
            model.strays.insert(key, stray.clone());
        }
        Ok(turns)
    }

    async fn begin_removal(&self, stray: &Stray, now: Timestamp) -> Result<bool, StoreError> {
        let mut model = self.model();
        let begun = model.open_stray(stray).filter(|known| {
            known.quarantined_at.is_some()
                && known.kept_at.is_none()
                && known.tried_at == stray.tried_at
        });
        Ok(begun
            .map(|known| (known.tried_at, known.why) = (Some(now), None))
            .is_some())
    }

    async fn removal_failed(&self, stray: &Stray, why: &str) -> Result<(), StoreError> {
        if let Some(known) = self.model().open_stray(stray) {
            known.why = Some(why.to_owned());
        }
        Ok(())
    }

    async fn removed(&self, stray: &Stray, now: Timestamp) -> Result<bool, StoreError> {
        let mut model = self.model();
        let tried = model.open_stray(stray).filter(|s| s.tried_at.is_some());
        let over = Some((now, Outcome::Removed));
        Ok(tried.map(|known| known.over = over).is_some())
    }

    async fn keep_stray(
        &self,
        desktop: DesktopName,
        at: Option<Timestamp>,
    ) -> Result<u64, StoreError> {
        let mut model = self.model();
        let of_it = |s: &&mut Stray| s.desktop == desktop && s.over.is_none();
        let kept = model.strays.values_mut().filter(of_it);
        Ok(kept.map(|stray| stray.kept_at = at).fold(0, |n, ()| n + 1))
    }

    async fn strays(&self) -> Result<Vec<Stray>, StoreError> {
        Ok(self.model().strays.values().cloned().collect())
    }

    async fn forget_strays(&self, before: Timestamp) -> Result<u64, StoreError> {
        let mut model = self.model();
        let all = model.strays.len();
        let is_over = |stray: &Stray| stray.over.is_some_and(|(at, _)| at < before);
        model.strays.retain(|_, stray| !is_over(stray));
        Ok(u64::try_from(all - model.strays.len()).unwrap_or(u64::MAX))
    }
}

#[async_trait]
impl Pulse for MemoryStore {
    async fn beat(&self, _: Timestamp) -> Result<(), StoreError> {
        Ok(())
    }

    async fn tally(&self) -> Result<Tally, StoreError> {
        let model = self.model();
        let mut tally = Tally::default();
        for record in model.sessions.values() {
            let phase = word(&record.phase);
            *tally.sessions.entry(phase).or_default() += 1;
        }
        for desktop in model.desktops() {
            let phase = word(&desktop.phase());
            *tally.desktops.entry(phase).or_default() += 1;
        }
        Ok(tally)
    }
}
