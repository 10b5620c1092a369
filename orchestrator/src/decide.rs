//! What to do next for one session: a pure function of what is committed, what this process saw, and the time.
//!
//! # Guarantees (property test: `decide/world.rs`)
//! * A machine that may exist belongs to a desktop whose session this function goes on working for until it is gone.
//! * A removal that does not end is given up and begun again, as one that failed.
//! * Nothing is asked of a machine whose desktop is being removed, except its removal.
//! * A person whose agent is merely silent is not thrown out: ends that rest on "nobody is connected" need fresh evidence,
//!   until [`Limits::silence_s`] has passed.

use crate::clock::{after, between, s};
use crate::config::Limits;
use crate::desktop::{Desktop, DesktopPhase};
use crate::session::{Origin, Record};
use jiff::Timestamp;
use mayfly_api::{DesktopName, EndReason, Problem, ProblemCode, SessionPhase, Setback, StageName};
use std::time::Duration;

/// Evidence older than this says nothing: the agent reports every 2 s.
const FRESH: Duration = Duration::from_secs(15);
/// A create under way when its session is cancelled gets this long to end by itself.
const CREATE_GRACE: Duration = Duration::from_secs(10);
/// A removal that has not ended by then has failed.
const REMOVAL_LIMIT: Duration = Duration::from_secs(600);
/// After so many failed removals a desktop is stuck.
const REMOVAL_ATTEMPTS: u32 = 8;
/// A stuck desktop is tried again after this, then twice as late each time, an hour at most.
const STUCK_RETRY: Duration = Duration::from_secs(60);
const STUCK_RETRY_MAX: Duration = Duration::from_secs(3_600);
/// After so many failed removals, about a day, only an administrator or another process has it tried again.
const LAST_REMOVAL: u32 = REMOVAL_ATTEMPTS + 30;
/// So many desktops are made again for one session when something was in the way or one took too long.
const REMAKES: u32 = 2;
/// A connected person is warned so many seconds before the end.
const WARNINGS_S: [u32; 2] = [300, 60];

/// A long-running operation on a machine. One at a time per session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Make and start the machine.
    Create,
    /// Wait for the create that an earlier process began, if it goes on without that process.
    Adopt,
    /// Write the bootstrap, as soon as the guest agent answers.
    Bootstrap,
    /// Ask the RDP server for its certificate until it is the announced one.
    Probe,
    /// Remove the machine.
    Destroy,
}

impl Op {
    /// As metrics and traces name it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Adopt => "adopt",
            Self::Bootstrap => "bootstrap",
            Self::Probe => "probe",
            Self::Destroy => "destroy",
        }
    }
}

/// How far *this process* came with making the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Progress {
    /// Not at all: if the desktop is half-made, an earlier process was interrupted.
    #[default]
    Untouched,
    /// The machine was started.
    Made,
    /// The bootstrap was written.
    Bootstrapped,
    /// The RDP server answered as announced.
    Proved,
}

/// What the agent announced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// Where the RDP server answers, as the provider says.
    pub address: std::net::SocketAddr,
    /// SHA-256 of its certificate.
    pub certificate_sha256: String,
}

/// The last evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// When it came.
    pub at: Timestamp,
    /// Open RDP connections.
    pub connections: u32,
}

/// Why a desktop could not be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failed {
    /// For good: another would fail likewise.
    ForGood(Problem),
    /// There was no room for it.
    NoRoom(String),
    /// Something else was in the way for a moment.
    InTheWay(String),
}

impl Failed {
    /// In words.
    #[must_use]
    pub fn reason(&self) -> &str {
        match self {
            Self::ForGood(problem) => &problem.detail,
            Self::NoRoom(why) | Self::InTheWay(why) => why,
        }
    }
}

/// What this process saw of a session's current desktop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The desktop.
    pub name: DesktopName,
    /// Since when this process looks at it.
    pub since: Timestamp,
    /// The operation under way.
    pub busy: Option<Op>,
    /// Since when.
    pub busy_since: Timestamp,
    /// What was reached.
    pub progress: Progress,
    /// What the agent announced.
    pub announced: Option<Announcement>,
    /// What went wrong while it was being made.
    pub failed: Option<Failed>,
    /// How many desktops this process had replaced for the session before.
    pub remade: u32,
    /// An earlier process's create does not go on.
    pub not_adopted: bool,
    /// A create goes on without this process, and a removal ends it first: nothing is in flight that must be waited for.
    pub followed: bool,
    /// Why its machine does not run any more.
    pub lost: Option<String>,
    /// The last evidence.
    pub evidence: Option<Evidence>,
    /// Failed removals.
    pub removals_failed: u32,
    /// When the last removal failed, and why.
    pub removal_failed: Option<(Timestamp, String)>,
    /// It was checked that nothing is left.
    pub removed: bool,
    /// How many of the warnings before the end were given.
    pub warned: usize,
}

impl Facts {
    /// Nothing seen yet.
    #[must_use]
    pub fn new(name: DesktopName, since: Timestamp) -> Self {
        Self {
            name,
            since,
            busy: None,
            busy_since: since,
            progress: Progress::Untouched,
            announced: None,
            failed: None,
            remade: 0,
            not_adopted: false,
            followed: false,
            lost: None,
            evidence: None,
            removals_failed: 0,
            removal_failed: None,
            removed: false,
            warned: 0,
        }
    }

    /// An operation begins.
    pub fn begin(&mut self, op: Op, now: Timestamp) {
        self.busy = Some(op);
        self.busy_since = now;
    }

    /// The operation under way is abandoned. A removal has failed by that.
    pub fn abandon(&mut self, now: Timestamp) {
        if self.busy.take() == Some(Op::Destroy) {
            let why = format!("it had not ended after {} s", REMOVAL_LIMIT.as_secs());
            self.done(Op::Destroy, Err(Failed::InTheWay(why)), now);
        }
    }

    /// The operation under way ended.
    pub fn done(&mut self, op: Op, result: Result<(), Failed>, now: Timestamp) {
        self.busy = None;
        match (op, result) {
            (Op::Create | Op::Adopt, Ok(())) => self.progress = Progress::Made,
            (Op::Bootstrap, Ok(())) => self.progress = Progress::Bootstrapped,
            (Op::Probe, Ok(())) => self.progress = Progress::Proved,
            (Op::Destroy, Ok(())) => self.removed = true,
            (Op::Destroy, Err(failed)) => {
                self.removals_failed += 1;
                self.removal_failed = Some((now, failed.reason().to_owned()));
            }
            (Op::Adopt, Err(_)) => self.not_adopted = true,
            (_, Err(failed)) => self.failed = Some(failed),
        }
    }
}

/// What to do next. Every action names one commit or one start; then decide again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing until then, or until something happens.
    Wait(Option<Timestamp>),
    /// Nothing, ever: the session is over.
    Stop,
    /// Commit that the machine may exist, then make it.
    Create,
    /// Start an operation.
    Start(Op),
    /// Abandon the operation under way.
    Abandon,
    /// Commit that the machine boots.
    Booting,
    /// Commit that it has its bootstrap.
    Configuring,
    /// Commit what was announced.
    Announced(Announcement),
    /// Commit that the desktop is ready.
    Proved,
    /// Commit that the session has it.
    Claim,
    /// Commit how many RDP connections there are.
    Presence(u32),
    /// Warn the person.
    Warn {
        /// Seconds to the end.
        ends_in_s: u32,
    },
    /// Commit the end.
    End(EndReason),
    /// Commit the failure.
    Fail(Problem),
    /// Commit that the half-made desktop is replaced, and why: for the person, and in words for the log.
    Remake(Setback, String),
    /// Commit that it is removed and its session waits again, since there is no room for it.
    Requeue(String),
    /// Commit that the desktop could not be removed.
    Stuck(String),
    /// Commit that nothing is left.
    Gone,
}

/// What to do next for `record`.
///
/// `facts` are about its live desktop (none yet: the first look), `since` is when this process began to look at the session.
#[must_use]
pub fn decide(
    record: &Record,
    facts: Option<&Facts>,
    limits: &Limits,
    since: Timestamp,
    now: Timestamp,
) -> Action {
    if record.phase.is_final() {
        return Action::Stop;
    }
    let desktop = record.live_desktop();
    let fresh;
    let facts = match (desktop, facts) {
        (Some(desktop), Some(facts)) if facts.name == desktop.name() => Some(facts),
        (Some(desktop), _) => {
            fresh = Facts::new(desktop.name(), since);
            Some(&fresh)
        }
        (None, _) => None,
    };
    if record.phase == SessionPhase::Ending {
        return match (desktop, facts) {
            (Some(desktop), Some(facts)) => match looked_at(record, desktop, limits, now) {
                Some(until) if facts.busy.is_none() => Action::Wait(Some(until)),
                _ => remove(desktop, facts, now),
            },
            // Cannot be: the end with no desktop is final at once.
            _ => Action::Wait(None),
        };
    }
    if now >= record.expires_at {
        return Action::End(EndReason::Expired);
    }
    let lease = lease_end(record, limits, since);
    match (desktop, facts) {
        (Some(desktop), Some(facts)) => {
            if desktop.phase() == DesktopPhase::Claimed {
                return watch(record, facts, limits, lease, now);
            }
            if lease.is_some_and(|end| now >= end) {
                return Action::End(EndReason::Abandoned);
            }
            let until = earliest(&[Some(record.expires_at), lease]);
            earlier(prepare(record, desktop, facts, limits, since, now), until)
        }
        _ => {
            if lease.is_some_and(|end| now >= end) {
                return Action::End(EndReason::Abandoned);
            }
            Action::Wait(earliest(&[Some(record.expires_at), lease]))
        }
    }
}

/// When the launcher's silence ends the session. A keep speaks for a launcher that sleeps, and nobody is blamed for
/// silence while this process was not there to hear.
fn lease_end(record: &Record, limits: &Limits, since: Timestamp) -> Option<Timestamp> {
    if record.wish.origin == Origin::Prototype || record.phase == SessionPhase::Connected {
        return None;
    }
    let heard = [
        record.heartbeat_at,
        record.keep_until,
        record.disconnected_at,
        Some(since),
    ];
    let last = heard
        .into_iter()
        .flatten()
        .fold(record.created_at, Timestamp::max);
    Some(after(last, s(limits.lease_s)))
}

fn earliest(times: &[Option<Timestamp>]) -> Option<Timestamp> {
    times.iter().flatten().min().copied()
}

/// A wait, cut short.
fn earlier(action: Action, until: Option<Timestamp>) -> Action {
    match action {
        Action::Wait(at) => Action::Wait(earliest(&[at, until])),
        other => other,
    }
}

fn remove(desktop: &Desktop, facts: &Facts, now: Timestamp) -> Action {
    if facts.removed {
        return Action::Gone;
    }
    match facts.busy {
        Some(Op::Destroy) => {
            let end = after(facts.busy_since, REMOVAL_LIMIT);
            if now < end {
                return Action::Wait(Some(end));
            }
            return Action::Abandon;
        }
        // Cut in the middle, a create may still have effects in flight: let it end, within a bound.
        Some(Op::Create) if !facts.followed => {
            let end = after(desktop.destroying_at().unwrap_or(now), CREATE_GRACE);
            if now < end {
                return Action::Wait(Some(end));
            }
            return Action::Abandon;
        }
        Some(Op::Create | Op::Adopt | Op::Bootstrap | Op::Probe) => return Action::Abandon,
        None => {}
    }
    let Some((failed_at, reason)) = &facts.removal_failed else {
        return Action::Start(Op::Destroy);
    };
    let stuck = desktop.phase() == DesktopPhase::Stuck;
    if facts.removals_failed >= REMOVAL_ATTEMPTS && !stuck {
        return Action::Stuck(reason.clone());
    }
    if stuck && facts.removals_failed >= LAST_REMOVAL {
        return Action::Wait(None);
    }
    let pause = if stuck {
        let tried = facts.removals_failed.saturating_sub(REMOVAL_ATTEMPTS);
        (STUCK_RETRY * (1 << tried.min(6))).min(STUCK_RETRY_MAX)
    } else {
        Duration::from_secs(1 << facts.removals_failed.min(4))
    };
    let retry = after(*failed_at, pause);
    if now < retry {
        return Action::Wait(Some(retry));
    }
    Action::Start(Op::Destroy)
}

/// Until when a desktop that could not be made is left for an administrator to look at ([`Limits::keep_failed_s`]).
fn looked_at(
    record: &Record,
    desktop: &Desktop,
    limits: &Limits,
    now: Timestamp,
) -> Option<Timestamp> {
    let failed = record.failure.as_ref()?.stage != StageName::Destroying;
    let end = after(desktop.destroying_at()?, s(limits.keep_failed_s));
    (failed && now < end).then_some(end)
}

fn prepare(
    record: &Record,
    desktop: &Desktop,
    facts: &Facts,
    limits: &Limits,
    since: Timestamp,
    now: Timestamp,
) -> Action {
    if record.phase == SessionPhase::Queued {
        // There was no room for it.
        return remove(desktop, facts, now);
    }
    let begun = record.placed_at().max(since);
    let timeout = after(begun, s(limits.create_timeout_s));
    if now >= timeout {
        return Action::Fail(Problem::new(
            ProblemCode::TimedOut,
            format!(
                "{} was not ready after {} s (limits.create_timeout_s)",
                facts.name, limits.create_timeout_s
            ),
        ));
    }
    if matches!(
        desktop.phase(),
        DesktopPhase::Destroying | DesktopPhase::Stuck
    ) {
        return earlier(remove(desktop, facts, now), Some(timeout));
    }
    let again = |setback, code, why: String| {
        if facts.remade < REMAKES {
            Action::Remake(setback, why)
        } else {
            Action::Fail(Problem::new(code, why))
        }
    };
    // The agent that fails has its bootstrap, even if it says so before this process has noticed.
    if facts.failed.is_some() && desktop.phase() == DesktopPhase::Booting {
        match (facts.busy, facts.progress) {
            (Some(Op::Bootstrap), _) => return Action::Wait(Some(timeout)),
            (None, Progress::Bootstrapped) => return Action::Configuring,
            _ => {}
        }
    }
    match &facts.failed {
        Some(Failed::ForGood(problem)) => return Action::Fail(problem.clone()),
        Some(Failed::NoRoom(why)) => return Action::Requeue(why.clone()),
        Some(Failed::InTheWay(why)) => {
            return again(Setback::InTheWay, ProblemCode::CreateFailed, why.clone());
        }
        None => {}
    }
    if let Some(reason) = &facts.lost {
        return Action::Fail(Problem::new(
            ProblemCode::CreateFailed,
            format!("{} stopped while it was being made: {reason}", facts.name),
        ));
    }
    let stage = limits.of_stage(record.stage());
    let stage_end = stage.map(|(limit, _)| after(record.stage_since().max(facts.since), s(limit)));
    if let (Some((limit, key)), Some(end)) = (stage, stage_end)
        && now >= end
    {
        let why = format!("{} made no progress for {limit} s ({key})", facts.name);
        return again(Setback::TookTooLong, ProblemCode::TimedOut, why);
    }
    let wait = Action::Wait(earliest(&[Some(timeout), stage_end]));
    match (desktop.phase(), facts.progress) {
        (DesktopPhase::Planned, _) => Action::Create,
        // Adopted or just proved: the certificate is known, the desktop untouched by anybody.
        (DesktopPhase::Ready, _) => Action::Claim,
        _ if facts.busy.is_some() => wait,
        // Another process began it and is no more. Its child may still make the machine; one that nobody makes is never continued.
        (DesktopPhase::Creating, Progress::Untouched) if !facts.not_adopted => {
            Action::Start(Op::Adopt)
        }
        (_, Progress::Untouched) => {
            Action::Remake(Setback::Interrupted, "it was interrupted".to_owned())
        }
        (DesktopPhase::Creating, _) => Action::Booting,
        (DesktopPhase::Booting, Progress::Made) => Action::Start(Op::Bootstrap),
        (DesktopPhase::Booting, _) => Action::Configuring,
        (DesktopPhase::Configuring, Progress::Proved) => Action::Proved,
        (DesktopPhase::Configuring, _) => match (&facts.announced, desktop.announced()) {
            (_, Some(_)) => Action::Start(Op::Probe),
            (Some(announced), None) => Action::Announced(announced.clone()),
            (None, None) => wait,
        },
        // Claimed is watched, gone is not live, the others are above.
        _ => wait,
    }
}

fn watch(
    record: &Record,
    facts: &Facts,
    limits: &Limits,
    lease: Option<Timestamp>,
    now: Timestamp,
) -> Action {
    if facts.lost.is_some() {
        return Action::End(EndReason::MachineLost);
    }
    let left_s = u32::try_from(between(now, record.expires_at).as_secs()).unwrap_or(u32::MAX);
    let due = WARNINGS_S.iter().filter(|w| left_s <= **w).count();
    if due > facts.warned {
        return Action::Warn { ends_in_s: left_s };
    }
    let next_warning = WARNINGS_S
        .get(due)
        .and_then(|w| record.expires_at.checked_sub(s(*w)).ok());
    // An agent that has reported nothing yet is not silent since before its desktop was ready.
    let listening = record.ready_at.unwrap_or(facts.since).max(facts.since);
    let heard = facts.evidence.map_or(listening, |e| e.at);
    let silence_end = after(heard, s(limits.silence_s));
    if now >= silence_end {
        return Action::End(EndReason::MachineLost);
    }
    let timers = [Some(record.expires_at), next_warning, Some(silence_end)];
    let known = record.phase == SessionPhase::Connected;
    match facts.evidence.filter(|e| now < after(e.at, FRESH)) {
        // Silent: hold it, whoever is there.
        None => Action::Wait(earliest(&timers)),
        Some(evidence) if (evidence.connections > 0) != known => {
            Action::Presence(evidence.connections)
        }
        Some(_) if known => Action::Wait(earliest(&timers)),
        Some(_) => {
            if record.ends_at.is_some_and(|end| now >= end) {
                return Action::End(match record.phase {
                    SessionPhase::Ready => EndReason::NeverConnected,
                    _ => EndReason::Idle,
                });
            }
            if lease.is_some_and(|end| now >= end) {
                return Action::End(EndReason::Abandoned);
            }
            Action::Wait(earliest(&[
                timers[0],
                timers[1],
                timers[2],
                record.ends_at,
                lease,
            ]))
        }
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod world;
