//! The world around [`decide`], without time, threads and machines: several orchestrators that share a store, a provider whose effects
//! and answers come when they like, machines, agents, people. Anything may happen between any two steps of anybody.
//!
//! Real are [`decide`], the verbs of a [`Record`], [`Facts::done`] and the store's model. What stands for the tasks of worker,
//! dispatcher and reaper does what those do, one step at a time; a step is one call or one commit.

use super::*;
use crate::desktop::NotNow;
use crate::provider::ProviderError;
use crate::session::{Expected, Wish};
use crate::store::memory::MemoryStore;
use crate::store::{Accepted, Change, Store};
use futures_util::FutureExt;
use mayfly_api::SessionId;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const PROCESSES: usize = 3;
const SESSIONS: usize = 6;
/// The wall clock is set by so much at most, and is never farther off, in seconds.
const SKEW: i64 = 3_600;
/// Whoever finds nothing to wait for after so many steps never will.
const STEPS: usize = 200;

/// What happens next. Numbers choose among what there is.
#[derive(Clone, Debug)]
enum Event {
    /// Time passes, in seconds.
    Pass(u32),
    /// Somebody sets the wall clock. A process goes by what it showed when it began.
    Set(i64),
    /// A process is started again.
    Start(usize),
    /// A process that runs does something, or something happens to it.
    At(usize, Task),
    /// Something that was asked of the provider has its next effect.
    Effect(usize),
    /// What nobody waits for any more has none.
    NoEffect(usize),
    /// The provider answers.
    Answer(usize, How),
    /// For so many times 20 s every removal fails.
    Jam(usize),
    /// A machine stops.
    Die(usize),
}

#[derive(Clone, Debug)]
enum Task {
    /// Somebody asks for a desktop.
    Ask(Origin),
    /// A person or an administrator wants something of a session.
    Want(usize, Wanted),
    /// It gives a place.
    Place,
    /// Its workers take so many steps.
    Work(usize),
    /// So many times it does all there is to do, and nothing is in its way.
    Flow(usize),
    /// Its next commit fails.
    Trouble(Trouble),
    /// Its reaper takes so many steps.
    Reap(usize),
    /// It hears of a desktop's agent.
    Hear(usize, Said),
    /// It looks at a desktop's machine.
    Look(usize),
    /// It takes a session over. Whose that was does not know yet, or never wakes.
    Take(usize),
    /// It is killed.
    Kill,
}

#[derive(Clone, Copy, Debug)]
enum Wanted {
    Heartbeat,
    Keep(u32),
    End,
    /// The removal of its stuck desktop is tried again.
    Retry,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    NotWritten,
    /// It is written, and nobody is told.
    NotTold,
}

#[derive(Clone, Copy, Debug)]
enum How {
    Well,
    NotYet,
    NoCapacity,
    Busy,
    Unavailable,
    Failed,
    /// It never answers.
    Never,
    /// It says that it is done, and it is not, or not yet.
    Lie,
}

/// Other than well, as often each.
const HOW: [How; 7] = [
    How::NotYet,
    How::NoCapacity,
    How::Busy,
    How::Unavailable,
    How::Failed,
    How::Never,
    How::Lie,
];

#[derive(Clone, Copy, Debug)]
enum Said {
    Ready,
    Failed,
    /// So many connections; also what is not so.
    Evidence(u32),
}

/// One of all events. Numbers instead of strategies of their own: those cost more time than the world.
fn event() -> impl Strategy<Value = Event> {
    (0_u32..64, 0..PROCESSES, 0_usize..16, 0_u32..1_000).prop_map(|(kind, p, which, n)| {
        let times = which % 5 + 1;
        let at = |task| Event::At(p, task);
        match kind {
            0..3 => Event::Pass(n % 20),
            3 => Event::Pass(n),
            4 => Event::Set((i64::from(n) - 500) * SKEW / 500),
            5..8 => Event::Start(p),
            8..11 => Event::Effect(which),
            11 => Event::NoEffect(which),
            12..16 => Event::Answer(which, How::Well),
            16..22 => Event::Answer(which, HOW[n as usize % HOW.len()]),
            22 => Event::Jam(times),
            23 => Event::Die(which),
            24..27 => at(Task::Ask([Origin::V1, Origin::Prototype][which % 2])),
            27..29 => at(Task::Want(which, Wanted::Heartbeat)),
            29 => at(Task::Want(which, Wanted::Keep(n))),
            30 => at(Task::Want(which, Wanted::End)),
            31 => at(Task::Want(which, Wanted::Retry)),
            32..35 => at(Task::Place),
            35..45 => at(Task::Work(times)),
            45..49 => at(Task::Flow(times)),
            49 => at(Task::Trouble(
                [Trouble::NotWritten, Trouble::NotTold][which % 2],
            )),
            50..54 => at(Task::Reap(times)),
            54 => at(Task::Hear(which, Said::Ready)),
            55 => at(Task::Hear(which, Said::Failed)),
            56..59 => at(Task::Hear(which, Said::Evidence(n % 3))),
            59 => at(Task::Look(which)),
            60..62 => at(Task::Take(which)),
            _ => at(Task::Kill),
        }
    })
}

/// One orchestrator.
#[derive(Debug, Default)]
struct Process {
    runs: bool,
    /// How far its clock is off, in seconds.
    off: i64,
    workers: BTreeMap<SessionId, Worker>,
    suspects: BTreeSet<DesktopName>,
    pass: Pass,
    trouble: Option<Trouble>,
}

/// Where a worker is between two steps.
#[derive(Debug)]
struct Worker {
    /// Under which it took the session.
    fence: u64,
    since: Timestamp,
    facts: Option<Facts>,
    remade: u32,
    stuck: bool,
    next: Next,
}

#[derive(Debug)]
enum Next {
    /// It looks at the session, and decides.
    Look,
    /// It waits, until then or for something that happens.
    Wait(Option<Timestamp>),
    /// It does what it decided then.
    Act(Action, Timestamp),
    /// It has the provider make what it committed.
    Create,
}

/// Where a reaper is between two steps.
#[derive(Debug, Default)]
enum Pass {
    #[default]
    Over,
    Listed(Vec<DesktopName>),
    Condemned(Vec<DesktopName>),
}

/// Something that the provider was asked to do.
#[derive(Debug)]
struct Operation {
    op: Op,
    name: DesktopName,
    /// Who waits for the answer.
    asked_by: Option<(usize, SessionId)>,
    /// How many effects are still to come.
    left: u8,
    /// Its answer never comes.
    never: bool,
}

/// Something of it exists.
#[derive(Debug, Default)]
struct Machine {
    runs: bool,
    bootstrapped: bool,
}

/// What became of a desktop, as seen from outside.
#[derive(Debug)]
struct Story {
    session: SessionId,
    phase: DesktopPhase,
    claimed_at: Option<Timestamp>,
    /// How many times its machine was asked for.
    asked: u32,
    /// While it was being removed, the provider said that it is not there.
    checked: bool,
}

struct World {
    limits: Limits,
    /// Whether a create goes on without its process.
    followed: bool,
    now: Timestamp,
    wall: i64,
    store: MemoryStore,
    sessions: Vec<SessionId>,
    /// Who works for a session, and under which fence.
    owners: BTreeMap<SessionId, (usize, u64)>,
    processes: [Process; PROCESSES],
    operations: Vec<Operation>,
    machines: BTreeMap<DesktopName, Machine>,
    stories: BTreeMap<DesktopName, Story>,
}

/// The model of the store never waits, and never fails.
fn at_once<T, E: std::fmt::Debug>(done: impl Future<Output = Result<T, E>>) -> T {
    done.now_or_never().unwrap().unwrap()
}

fn pick<T: Copy>(of: impl Iterator<Item = T>, which: usize) -> Option<T> {
    let of: Vec<_> = of.collect();
    (!of.is_empty()).then(|| of[which % of.len()])
}

impl World {
    fn new(followed: bool, keep_failed_s: u32) -> Self {
        let mut world = Self {
            limits: Limits {
                keep_failed_s,
                silence_s: 120,
                ..Limits::default()
            },
            followed,
            now: Timestamp::from_second(1_800_000_000).unwrap(),
            wall: 0,
            store: MemoryStore::default(),
            sessions: Vec::new(),
            owners: BTreeMap::new(),
            processes: Default::default(),
            operations: Vec::new(),
            machines: BTreeMap::new(),
            stories: BTreeMap::new(),
        };
        (0..PROCESSES).for_each(|p| world.start(p));
        world
    }

    fn clock(&self, p: usize) -> Timestamp {
        let off = jiff::SignedDuration::from_secs(self.processes[p].off);
        self.now.checked_add(off).unwrap()
    }

    fn record(&self, id: SessionId) -> Record {
        at_once(self.store.get(id)).unwrap()
    }

    /// The desktop, if the row says that something of it may exist.
    fn owned(&self, name: DesktopName) -> Option<DesktopPhase> {
        let record = self.record(self.stories[&name].session);
        let live = record.live_desktop().filter(|d| d.name() == name);
        live.map(Desktop::phase)
    }

    fn happen(&mut self, event: &Event) {
        match *event {
            Event::Pass(seconds) => self.pass(s(seconds)),
            Event::Set(by) => self.wall = (self.wall + by).clamp(-SKEW, SKEW),
            Event::Start(p) => self.start(p),
            Event::Effect(which) => {
                if let Some(o) = self.operation(which, |o| o.left > 0) {
                    self.effect(o);
                }
            }
            Event::NoEffect(which) => {
                if let Some(o) = self.operation(which, |o| o.asked_by.is_none()) {
                    self.operations[o].left = 0;
                }
            }
            Event::Answer(which, how) => {
                if let Some(o) = self.operation(which, |o| self.is_waited_for(o)) {
                    self.answer(o, how);
                }
            }
            Event::Jam(times) => (0..3 * times).for_each(|_| self.jam()),
            Event::Die(which) => {
                let running = self.machines.iter().filter(|(_, m)| m.runs);
                if let Some(name) = pick(running.map(|(name, _)| *name), which) {
                    self.machines.entry(name).or_default().runs = false;
                }
            }
            Event::At(p, ref task) => {
                if self.processes[p].runs {
                    self.at(p, task);
                }
            }
        }
        self.operations
            .retain(|o| o.left > 0 || o.asked_by.is_some());
        self.check_machines();
    }

    fn at(&mut self, p: usize, task: &Task) {
        match *task {
            Task::Ask(origin) => self.ask(p, origin),
            Task::Want(which, wanted) => {
                if let Some(id) = pick(self.sessions.iter().copied(), which) {
                    self.want(p, id, wanted);
                }
            }
            Task::Place => self.place(p),
            Task::Work(steps) => {
                for _ in 0..steps {
                    self.work(p);
                }
            }
            Task::Flow(times) => {
                for _ in 0..times {
                    self.place(p);
                    self.flow(p, 1);
                }
            }
            Task::Trouble(trouble) => self.processes[p].trouble = Some(trouble),
            Task::Reap(steps) => (0..steps).for_each(|_| self.reap(p)),
            Task::Hear(which, said) => {
                if let Some(name) = pick(self.stories.keys().copied(), which) {
                    self.hear(p, name, said);
                }
            }
            Task::Look(which) => {
                if let Some(name) = pick(self.stories.keys().copied(), which) {
                    self.look(p, name);
                }
            }
            Task::Take(which) => {
                let live = self.sessions.iter().copied();
                let live = live.filter(|id| !self.record(*id).phase.is_final());
                if let Some(id) = pick(live, which) {
                    self.take(p, id);
                }
            }
            Task::Kill => {
                self.processes[p] = Process::default();
                self.forget_answers(p, |_| true);
            }
        }
    }

    fn pass(&mut self, by: Duration) {
        self.now = after(self.now, by);
        self.wake();
    }

    /// Whoever waits looks again: too early does no harm.
    fn wake(&mut self) {
        let workers = self
            .processes
            .iter_mut()
            .flat_map(|p| p.workers.values_mut());
        for worker in workers {
            if matches!(worker.next, Next::Wait(_)) {
                worker.next = Next::Look;
            }
        }
    }

    fn start(&mut self, p: usize) {
        if !self.processes[p].runs {
            (self.processes[p].runs, self.processes[p].off) = (true, self.wall);
            for record in at_once(self.store.live()) {
                self.work_for(p, record.id);
            }
        }
    }

    fn ask(&mut self, p: usize, origin: Origin) {
        if self.sessions.len() == SESSIONS {
            return;
        }
        let id = SessionId(uuid::Uuid::from_u128(self.sessions.len() as u128 + 1));
        let wish = Wish::of_somebody(origin);
        let now = self.clock(p);
        let record = Record::accepted(id, wish, Expected::default(), &self.limits, now);
        let accepted = at_once(self.store.accept(record, None, 100));
        assert!(matches!(accepted, Accepted::New(_)));
        self.sessions.push(id);
        self.take(p, id);
    }

    fn want(&mut self, p: usize, id: SessionId, wanted: Wanted) {
        let (now, limits) = (self.clock(p), self.limits.clone());
        if self.record(id).phase.is_final() {
            return;
        }
        self.update(id, now, move |record| match wanted {
            Wanted::Heartbeat => {
                record.heartbeat(now);
                Ok(())
            }
            Wanted::Keep(seconds) => record.keep(seconds, &limits, now),
            Wanted::End => record.end(EndReason::Requested, now),
            Wanted::Retry => {
                let name = record.live_desktop().ok_or(NotNow)?.name();
                record.retry(name)
            }
        });
    }

    /// Another works for it from now on, under a fence that grew.
    fn take(&mut self, p: usize, id: SessionId) {
        let (owner, fence) = self.owners.get(&id).copied().unwrap_or((p, 0));
        self.owners.insert(id, (p, fence + u64::from(owner != p)));
        self.work_for(p, id);
    }

    fn work_for(&mut self, p: usize, id: SessionId) {
        let (owner, fence) = self.owners[&id];
        let since = self.clock(p);
        if owner == p {
            let workers = &mut self.processes[p].workers;
            workers
                .entry(id)
                .or_insert_with(|| Worker::new(fence, since));
        }
    }

    fn place(&mut self, p: usize) {
        let now = self.clock(p);
        let planned = at_once(self.store.plan_next(&self.limits, &[], now));
        if let Some(record) = planned.given() {
            self.take(p, record.id);
            self.changed(record.id);
        }
    }

    /// A step of each worker. Whether one of them had anything to do.
    fn work(&mut self, p: usize) -> bool {
        let ids: Vec<_> = self.processes[p].workers.keys().copied().collect();
        let mut did = false;
        for id in ids {
            let mut worker = self.processes[p].workers.remove(&id).unwrap();
            did |= !matches!(worker.next, Next::Wait(_));
            if self.step(p, id, &mut worker) {
                self.processes[p].workers.insert(id, worker);
            } else {
                self.forget_answers(p, |session| session == id);
                // It may be this one's again.
                if !self.record(id).phase.is_final() {
                    self.work_for(p, id);
                }
            }
        }
        did
    }

    /// `false`: it is over, or another's.
    fn step(&mut self, p: usize, id: SessionId, worker: &mut Worker) -> bool {
        match std::mem::replace(&mut worker.next, Next::Look) {
            Next::Look => {
                if self.owners[&id] != (p, worker.fence) {
                    return false;
                }
                self.decide(p, id, worker)
            }
            Next::Wait(until) => {
                worker.next = Next::Wait(until);
                true
            }
            Next::Act(action, at) => {
                self.act(p, id, worker, action, at);
                true
            }
            Next::Create => {
                self.call(p, id, worker, Op::Create);
                true
            }
        }
    }

    fn decide(&mut self, p: usize, id: SessionId, worker: &mut Worker) -> bool {
        let (record, now) = (self.record(id), self.clock(p));
        match record.live_desktop() {
            None => worker.facts = None,
            Some(desktop) => {
                let name = desktop.name();
                if worker.facts.as_ref().is_none_or(|f| f.name != name) {
                    self.forget_answers(p, |session| session == id);
                    worker.facts = Some(Facts {
                        followed: self.followed,
                        remade: worker.remade,
                        ..Facts::new(name, now)
                    });
                }
                let stuck = desktop.phase() == DesktopPhase::Stuck;
                let was_stuck = std::mem::replace(&mut worker.stuck, stuck);
                let facts = worker.facts.as_mut().unwrap();
                if was_stuck && !stuck {
                    (facts.removals_failed, facts.removal_failed) = (0, None);
                }
            }
        }
        let facts = worker.facts.as_ref();
        match decide(&record, facts, &self.limits, worker.since, now) {
            Action::Stop => return false,
            Action::Wait(until) => {
                assert!(until.is_none_or(|at| at > now), "it waits for the past");
                worker.next = Next::Wait(until);
            }
            action => worker.next = Next::Act(action, now),
        }
        true
    }

    fn act(
        &mut self,
        p: usize,
        id: SessionId,
        worker: &mut Worker,
        action: Action,
        now: Timestamp,
    ) {
        match action {
            Action::Start(op) => return self.call(p, id, worker, op),
            Action::Abandon => {
                self.forget_answers(p, |session| session == id);
                return worker.facts.as_mut().unwrap().abandon(now);
            }
            Action::Warn { .. } => return worker.facts.as_mut().unwrap().warned += 1,
            _ => {}
        }
        let verb = {
            let (facts, limits) = (worker.facts.clone(), self.limits.clone());
            let (action, since) = (action.clone(), worker.since);
            move |record: &mut Record| {
                let again = || decide(record, facts.as_ref(), &limits, since, now);
                if matches!(action, Action::End(_)) && again() != action {
                    return Err(NotNow);
                }
                if let Action::End(reason) = action {
                    return record.end(reason, now);
                }
                verb(action, record, facts.ok_or(NotNow)?.name, &limits, now)
            }
        };
        let before = self.record(id);
        let committed = self.commit(p, id, worker.fence, verb);
        match (action, committed) {
            (Action::Create, Some(true)) => worker.next = Next::Create,
            (Action::Remake(..), Some(true)) => worker.remade += 1,
            (Action::End(reason), Some(true)) => self.check_end(reason, &before, worker, now),
            _ => {}
        }
    }

    /// As the worker commits; `None`: nobody knows.
    fn commit(
        &mut self,
        p: usize,
        id: SessionId,
        fence: u64,
        verb: impl FnOnce(&mut Record) -> Result<(), NotNow> + Send + 'static,
    ) -> Option<bool> {
        let trouble = self.processes[p].trouble.take();
        if trouble == Some(Trouble::NotWritten) {
            return None;
        }
        let (owner, newest) = self.owners[&id];
        let changed = self.update(id, self.clock(p), move |record| {
            if fence == newest {
                verb(record)
            } else {
                Err(NotNow)
            }
        });
        assert!(
            !changed || (owner, newest) == (p, fence),
            "an old owner's commit"
        );
        (trouble != Some(Trouble::NotTold)).then_some(changed)
    }

    fn update(
        &mut self,
        id: SessionId,
        now: Timestamp,
        verb: impl FnOnce(&mut Record) -> Result<(), NotNow> + Send + 'static,
    ) -> bool {
        let change = move |record: &mut Record| match verb(record) {
            Ok(()) => Change::Quiet,
            Err(NotNow) => Change::Nothing,
        };
        let done = at_once(self.store.update(id, now, Box::new(change)));
        let changed = done.unwrap().1 != Change::Nothing;
        if changed {
            self.changed(id);
        }
        changed
    }

    fn changed(&mut self, id: SessionId) {
        self.check_session(id);
        self.wake();
    }

    /// The provider is asked.
    fn call(&mut self, p: usize, id: SessionId, worker: &mut Worker, op: Op) {
        let now = self.clock(p);
        let facts = worker.facts.as_mut().unwrap();
        assert_eq!(facts.busy, None, "two operations at once");
        facts.begin(op, now);
        if op == Op::Create {
            let story = self.stories.get_mut(&facts.name).unwrap();
            story.asked += 1;
            assert_eq!(story.asked, 1, "{} is made twice", facts.name);
            let phase = story.phase;
            assert!(phase >= DesktopPhase::Creating, "nobody committed it");
        }
        self.operations.push(Operation {
            op,
            name: facts.name,
            asked_by: Some((p, id)),
            left: match op {
                Op::Create => 2,
                Op::Bootstrap | Op::Destroy => 1,
                Op::Adopt | Op::Probe => 0,
            },
            never: false,
        });
    }

    /// Nobody waits for those answers any more. What was asked for may still be done.
    fn forget_answers(&mut self, p: usize, of: impl Fn(SessionId) -> bool) {
        for operation in &mut self.operations {
            operation.asked_by = operation.asked_by.filter(|(by, id)| *by != p || !of(*id));
        }
    }

    fn effect(&mut self, o: usize) {
        let Operation { op, name, left, .. } = self.operations[o];
        self.operations[o].left -= 1;
        match op {
            // The first makes half of it.
            Op::Create => self.machines.entry(name).or_default().runs = left == 1,
            Op::Bootstrap => {
                if let Some(machine) = self.machines.get_mut(&name) {
                    machine.bootstrapped = machine.runs;
                }
            }
            Op::Destroy => {
                if let Some(phase) = self.owned(name) {
                    assert!(phase >= DesktopPhase::Destroying, "{name} is in use");
                }
                self.machines.remove(&name);
                self.stories.get_mut(&name).unwrap().checked = true;
                if self.followed {
                    let creates = |o: &&mut Operation| o.name == name && o.op == Op::Create;
                    for create in self.operations.iter_mut().filter(creates) {
                        create.left = 0;
                    }
                }
            }
            Op::Adopt | Op::Probe => {}
        }
    }

    /// One of the operations for which that holds.
    fn operation(&self, which: usize, holds: impl Fn(&Operation) -> bool) -> Option<usize> {
        let all = self.operations.iter().enumerate();
        pick(all.filter(|(_, o)| holds(o)).map(|(o, _)| o), which)
    }

    fn is_waited_for(&self, operation: &Operation) -> bool {
        let Some((p, id)) = operation.asked_by.filter(|_| !operation.never) else {
            return false;
        };
        self.processes[p].workers[&id].listens()
    }

    /// An answer comes to who waits for it. Who does not lie says success only of what is so.
    fn answer(&mut self, o: usize, how: How) {
        let (op, name) = (self.operations[o].op, self.operations[o].name);
        let error = match how {
            How::Well | How::Lie => None,
            How::Never => return self.operations[o].never = true,
            // Asked again by the worker.
            How::NotYet if op == Op::Bootstrap => return,
            How::NotYet => Some(ProviderError::NotYet("boots".to_owned())),
            How::NoCapacity => Some(ProviderError::NoCapacity("full".to_owned())),
            How::Busy => Some(ProviderError::Busy("locked".to_owned())),
            How::Unavailable => Some(ProviderError::Unavailable("down".to_owned())),
            How::Failed => Some(ProviderError::Failed("broke".to_owned())),
        };
        let result = match error {
            Some(error) => Err(error),
            None if matches!(how, How::Lie) => {
                self.stories.get_mut(&name).unwrap().checked |= op == Op::Destroy;
                Ok(())
            }
            None => {
                while self.operations[o].left > 0 {
                    self.effect(o);
                }
                if op == Op::Adopt && self.followed {
                    let goes_on = |c: &Operation| c.op == Op::Create && c.name == name;
                    if let Some(create) = self.operations.iter().position(goes_on) {
                        while self.operations[create].left > 0 {
                            self.effect(create);
                        }
                    }
                }
                let machine = self.machines.get(&name).filter(|m| m.runs);
                let is_so = match op {
                    Op::Create | Op::Bootstrap => machine.is_some(),
                    Op::Adopt => self.followed && machine.is_some(),
                    Op::Probe => machine.is_some_and(|m| m.bootstrapped),
                    Op::Destroy => true,
                };
                let failed = || ProviderError::Failed("it does not run".to_owned());
                is_so.then_some(()).ok_or_else(failed)
            }
        };
        let (p, id) = self.operations[o].asked_by.take().unwrap();
        let now = self.clock(p);
        let worker = self.processes[p].workers.get_mut(&id).unwrap();
        let facts = worker.facts.as_mut().unwrap();
        assert_eq!((facts.busy, facts.name), (Some(op), name));
        facts.done(op, result.map_err(Failed::from), now);
        worker.next = Next::Look;
    }

    /// The worker that waits there for something of that desktop.
    fn listener(&mut self, p: usize, name: DesktopName) -> Option<&mut Worker> {
        let id = self.stories[&name].session;
        let worker = self.processes[p].workers.get_mut(&id)?;
        let listens = worker.facts.as_ref().is_some_and(|f| f.name == name);
        (listens && worker.listens()).then_some(worker)
    }

    fn hear(&mut self, p: usize, name: DesktopName, said: Said) {
        let at = self.clock(p);
        let has_token = self.machines.get(&name).is_some_and(|m| m.bootstrapped);
        let Some(worker) = self.listener(p, name) else {
            return;
        };
        let facts = worker.facts.as_mut().unwrap();
        match said {
            Said::Ready if has_token && facts.announced.is_none() => {
                facts.announced = Some(Announcement {
                    address: "127.77.0.1:3389".parse().unwrap(),
                    certificate_sha256: "a".repeat(64),
                });
            }
            Said::Ready => {}
            Said::Failed => {
                let broke = Problem::new(ProblemCode::CreateFailed, "it broke");
                facts.failed = Some(Failed::ForGood(broke));
            }
            Said::Evidence(connections) => facts.evidence = Some(Evidence { at, connections }),
        }
        worker.next = Next::Look;
    }

    fn look(&mut self, p: usize, name: DesktopName) {
        let runs = self.machines.get(&name).is_some_and(|m| m.runs);
        let looked_at = self.owned(name) > Some(DesktopPhase::Creating);
        if let Some(worker) = self.listener(p, name).filter(|_| looked_at && !runs) {
            worker.facts.as_mut().unwrap().lost = Some("it died".to_owned());
            worker.next = Next::Look;
        }
    }

    fn jam(&mut self) {
        for o in 0..self.operations.len() {
            let operation = &self.operations[o];
            if operation.op == Op::Destroy && self.is_waited_for(operation) {
                self.answer(o, How::Failed);
            }
        }
        (0..PROCESSES).for_each(|p| while self.work(p) {});
        self.pass(s(20));
    }

    fn reap(&mut self, p: usize) {
        let process = &mut self.processes[p];
        process.pass = match std::mem::take(&mut process.pass) {
            Pass::Over => Pass::Listed(self.machines.keys().copied().collect()),
            Pass::Listed(there) => {
                let owned = at_once(self.store.desktops());
                let most = (there.len() / 5).max(3);
                let unowned = there.into_iter().filter(|n| !owned.contains(n));
                let (mut again, new): (Vec<_>, Vec<_>) =
                    unowned.partition(|n| process.suspects.contains(n));
                process.suspects = new.into_iter().collect();
                let held_back = again.split_off(again.len().min(most));
                process.suspects.extend(held_back);
                Pass::Condemned(again)
            }
            Pass::Condemned(mut names) => match names.pop() {
                None => Pass::Over,
                Some(name) => {
                    self.operations.push(Operation {
                        op: Op::Destroy,
                        name,
                        asked_by: None,
                        left: 1,
                        never: false,
                    });
                    Pass::Condemned(names)
                }
            },
        };
    }

    /// All that is wanted of a process is done, and its machines do what they should. Whether anything was.
    fn flow(&mut self, p: usize, connections: u32) -> bool {
        for name in self.stories.keys().copied().collect::<Vec<_>>() {
            if self
                .machines
                .get(&name)
                .is_some_and(|m| m.bootstrapped && m.runs)
            {
                self.hear(p, name, Said::Ready);
                self.hear(p, name, Said::Evidence(connections));
            }
            self.look(p, name);
        }
        let mut steps = 0;
        while self.work(p) {
            steps += 1;
            assert!(steps < STEPS, "it never settles: {:?}", self.processes[p]);
        }
        let mut answered = false;
        for o in 0..self.operations.len() {
            let operation = &self.operations[o];
            let asked = operation.asked_by.is_some_and(|(by, _)| by == p);
            if asked && self.is_waited_for(operation) {
                self.answer(o, How::Well);
                answered = true;
            }
        }
        self.operations
            .retain(|o| o.left > 0 || o.asked_by.is_some());
        steps > 1 || answered
    }

    /// What must be true of a session that was changed.
    fn check_session(&mut self, id: SessionId) {
        let record = self.record(id);
        let last = self.stories.keys().next_back().copied();
        if let Some(desktop) = &record.desktop {
            let name = desktop.name();
            let story = self.stories.entry(name).or_insert_with(|| {
                assert!(Some(name) > last, "a number is given again");
                Story {
                    session: id,
                    phase: DesktopPhase::Planned,
                    claimed_at: None,
                    asked: 0,
                    checked: false,
                }
            });
            assert_eq!(story.session, id, "it was another's");
            let (before, phase) = (story.phase, desktop.phase());
            let retried = (before, phase) == (DesktopPhase::Stuck, DesktopPhase::Destroying);
            assert!(
                before <= phase || retried,
                "back from {before:?} to {phase:?}"
            );
            assert!(
                phase < DesktopPhase::Gone || story.checked || story.asked == 0,
                "nobody looked whether {name} is gone"
            );
            if let Some(at) = story.claimed_at {
                assert_eq!(desktop.claimed_at(), Some(at), "claimed twice");
            }
            story.claimed_at = desktop.claimed_at();
            story.phase = phase;
            assert_eq!(
                story.claimed_at.is_some() && phase < DesktopPhase::Destroying,
                phase == DesktopPhase::Claimed
            );
        }
        let name = record.desktop.as_ref().map(Desktop::name);
        for (other, story) in self.stories.iter().filter(|(_, s)| s.session == id) {
            if Some(*other) != name {
                assert_eq!(story.phase, DesktopPhase::Gone, "two desktops at once");
                assert_eq!(story.claimed_at, None, "who had a desktop gets no other");
            }
        }
        if record.phase.is_final() {
            assert_eq!(record.live_desktop(), None, "over, with a desktop");
        }
        assert_eq!(record.phase.is_usable(), record.view().rdp.is_some());
    }

    /// Every machine that exists or may come to exist has who removes it: its session, or, if it came after it was looked for, the
    /// reaper.
    fn check_machines(&self) {
        let creates = self.operations.iter();
        let creates = creates.filter(|o| o.op == Op::Create && o.left > 0);
        let creates = creates.map(|o| &o.name);
        for name in self.machines.keys().chain(creates) {
            let story = &self.stories[name];
            assert!(
                story.phase >= DesktopPhase::Creating,
                "nobody committed {name}"
            );
            assert!(
                story.phase < DesktopPhase::Gone || story.checked,
                "nobody removes {name}"
            );
        }
    }

    /// Nobody is thrown out who is there.
    fn check_end(&self, reason: EndReason, before: &Record, worker: &Worker, now: Timestamp) {
        if reason == EndReason::Abandoned {
            let end = lease_end(before, &self.limits, worker.since);
            assert!(end.is_some_and(|end| end <= now), "its launcher spoke");
        }
        let facts = worker.facts.as_ref();
        let heard = facts.filter(|f| f.lost.is_none()).and_then(|f| f.evidence);
        let there = heard.is_some_and(|e| e.connections > 0 && now < after(e.at, FRESH));
        let ready = before.phase.is_usable();
        assert!(
            !(there && ready) || reason == EndReason::Expired,
            "{reason:?}"
        );
    }

    /// From now on nothing fails. Everybody gets a desktop or is told why not; then nobody asks for anything any more, and what was
    /// begun comes to its end.
    fn end_of_the_world(&mut self) {
        for p in 0..PROCESSES {
            self.processes[p].trouble = None;
            self.start(p);
        }
        let served = |record: &Record| record.phase.is_usable() || record.phase.is_final();
        self.until("served", true, served);
        self.until("over", false, |record| record.phase.is_final());
        for _ in 0..100 {
            if self.machines.is_empty() && self.operations.is_empty() {
                return;
            }
            self.round();
        }
        panic!(
            "it is never removed: {:?} {:?}",
            self.machines, self.operations
        );
    }

    fn until(&mut self, what: &str, heartbeats: bool, holds: impl Fn(&Record) -> bool) {
        for _ in 0..500 {
            let records = self.sessions.iter().map(|id| self.record(*id));
            let records: Vec<_> = records.filter(|record| !holds(record)).collect();
            if records.is_empty() {
                return;
            }
            let did = self.round();
            for record in records {
                if heartbeats {
                    self.want(0, record.id, Wanted::Heartbeat);
                }
                let waits = self.worker(record.id).map(|worker| &worker.next);
                if matches!(waits, Some(Next::Wait(None))) {
                    // It was tried for a day.
                    self.want(0, record.id, Wanted::Retry);
                }
            }
            let most = s(if heartbeats { 30 } else { 36_000 });
            self.pass(if did { s(1) } else { self.next().min(most) });
        }
        panic!("never {what}: {:?} {:?}", self.processes, self.operations);
    }

    /// Everybody does all there is to do; whether there was anything.
    fn round(&mut self) -> bool {
        // Late, but before the end of the world.
        for o in 0..self.operations.len() {
            while self.operations[o].asked_by.is_none() && self.operations[o].left > 0 {
                self.effect(o);
            }
        }
        let mut did = false;
        for p in 0..PROCESSES {
            self.place(p);
            did |= self.flow(p, 0);
            (0..8).for_each(|_| self.reap(p));
        }
        self.check_machines();
        did
    }

    fn worker(&self, id: SessionId) -> Option<&Worker> {
        self.processes[self.owners[&id].0].workers.get(&id)
    }

    /// How long until somebody's wait is over.
    fn next(&self) -> Duration {
        let waits = (0..PROCESSES).flat_map(|p| {
            let workers = self.processes[p].workers.values();
            workers.filter_map(move |worker| match worker.next {
                Next::Wait(until) => until.map(|until| between(self.clock(p), until)),
                _ => None,
            })
        });
        waits.min().unwrap_or(s(30)).max(s(1))
    }
}

impl Worker {
    fn new(fence: u64, since: Timestamp) -> Self {
        Self {
            fence,
            since,
            facts: None,
            remade: 0,
            stuck: false,
            next: Next::Look,
        }
    }

    /// It does nothing just now that it would finish first.
    fn listens(&self) -> bool {
        matches!(self.next, Next::Look | Next::Wait(_))
    }
}

/// What an action commits.
pub(super) fn verb(
    action: Action,
    record: &mut Record,
    name: DesktopName,
    limits: &Limits,
    now: Timestamp,
) -> Result<(), NotNow> {
    match action {
        Action::Create => record.creating(name),
        Action::Booting => record.booting(name, now),
        Action::Configuring => record.configuring(name, now),
        Action::Announced(a) => record.announced(name, a.address, a.certificate_sha256, now),
        Action::Proved => record.proved(name),
        Action::Claim => record.claim(name, limits, now),
        Action::Presence(connections) => record.presence(connections, limits, now),
        Action::End(reason) => record.end(reason, now),
        Action::Fail(problem) => record.fail(problem, now),
        Action::Remake(setback, _) => record.remake(name, setback, now),
        Action::Requeue(_) => record.requeue(name, now),
        Action::Stuck(reason) => record.stuck(name, reason),
        Action::Gone => record.gone(name, now),
        Action::Wait(_)
        | Action::Stop
        | Action::Start(_)
        | Action::Abandon
        | Action::Warn { .. } => unreachable!("{action:?}"),
    }
}

/// So many worlds; `PROPTEST_CASES` asks for more.
fn config() -> ProptestConfig {
    let mut config = ProptestConfig::default();
    config.cases = config.cases.max(2_000);
    config
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn whoever_dies_lies_or_comes_late_no_machine_is_left_and_no_desktop_is_claimed_twice(
        followed in any::<bool>(),
        keep_failed_s in prop_oneof![Just(0_u32), Just(300)],
        events in prop::collection::vec(event(), 0..300),
    ) {
        let mut world = World::new(followed, keep_failed_s);
        for event in &events {
            world.happen(event);
        }
        world.end_of_the_world();
    }
}
