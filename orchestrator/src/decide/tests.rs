//! What [`decide`] has a session come to, one story a test. Any order of events is in [`super::world`].

use super::*;
use crate::desktop::NotNow;
use crate::session::{Expected, Wish};
use std::collections::BTreeSet;

/// What can happen while a session lives.
#[derive(Clone, Debug)]
enum Event {
    /// Time passes.
    Pass(u32),
    /// The operation under way ends well.
    Succeed,
    /// It fails.
    OpFails,
    /// It finds no room.
    NoRoom,
    /// It finds something in the way.
    InTheWay,
    /// The agent announces its server.
    Announce,
    /// The agent reports.
    Report(u32),
    /// The orchestrator is killed and started again.
    Crash,
    /// There is a place.
    Place,
    /// Somebody ends it.
    Cancel,
    /// The launcher is there.
    Heartbeat,
    /// Somebody holds it.
    Keep(u32),
}

struct Model {
    record: Record,
    facts: Option<Facts>,
    remade: u32,
    limits: Limits,
    since: Timestamp,
    now: Timestamp,
    next_number: u32,
    /// Machines that may exist.
    machines: BTreeSet<DesktopName>,
    claimed: Option<(DesktopName, Timestamp)>,
}

impl Model {
    fn new(origin: Origin) -> Self {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let wish = Wish::of_somebody(origin);
        let limits = Limits::default();
        let id = mayfly_api::SessionId::new();
        Self {
            record: Record::accepted(id, wish, Expected::default(), &limits, now),
            facts: None,
            remade: 0,
            limits,
            since: now,
            now,
            next_number: 1,
            machines: BTreeSet::new(),
            claimed: None,
        }
    }

    fn live(&self) -> Option<DesktopName> {
        self.record.live_desktop().map(Desktop::name)
    }

    fn happen(&mut self, event: &Event) {
        match event {
            Event::Pass(seconds) => self.now = after(self.now, s(*seconds)),
            Event::Succeed => self.operation_ends(None),
            Event::OpFails => {
                let broke = Problem::new(ProblemCode::CreateFailed, "it broke");
                self.operation_ends(Some(Failed::ForGood(broke)));
            }
            Event::NoRoom => self.operation_ends(Some(Failed::NoRoom("full".to_owned()))),
            Event::InTheWay => self.operation_ends(Some(Failed::InTheWay("locked".to_owned()))),
            Event::Announce => {
                if let Some(facts) = self.facts.as_mut()
                    && facts.progress == Progress::Bootstrapped
                {
                    facts.announced = Some(Announcement {
                        address: "127.77.0.1:3389".parse().unwrap(),
                        certificate_sha256: "a".repeat(64),
                    });
                }
            }
            Event::Report(connections) => {
                if let Some(facts) = self.facts.as_mut() {
                    facts.evidence = Some(Evidence {
                        at: self.now,
                        connections: *connections,
                    });
                }
            }
            Event::Crash => {
                self.facts = None;
                self.remade = 0;
                self.since = self.now;
            }
            Event::Place => {
                if self.record.needs_desktop() {
                    let name = DesktopName::from_number(self.next_number).unwrap();
                    self.next_number += 1;
                    self.record.plan(name, self.now).unwrap();
                }
            }
            Event::Cancel => {
                let _ = self.record.end(EndReason::Requested, self.now);
            }
            Event::Heartbeat => self.record.heartbeat(self.now),
            Event::Keep(seconds) => {
                let _ = self.record.keep(*seconds, &self.limits, self.now);
            }
        }
        self.settle();
    }

    /// Time passes and the agent reports, as it does every 2 s.
    fn report_for(&mut self, seconds: u32, connections: u32) {
        for _ in 0..seconds / 10 {
            self.happen(&Event::Pass(10));
            self.happen(&Event::Report(connections));
        }
    }

    fn operation_ends(&mut self, failed: Option<Failed>) {
        let Some(facts) = self.facts.as_mut() else {
            return;
        };
        let Some(op) = facts.busy else { return };
        if (op, &failed) == (Op::Destroy, &None) {
            self.machines.remove(&facts.name);
        }
        facts.done(op, failed.map_or(Ok(()), Err), self.now);
    }

    /// Decides and does until there is nothing to do, as the worker does.
    fn settle(&mut self) {
        for _ in 0..50 {
            match self.live() {
                None => self.facts = None,
                Some(name) if self.facts.as_ref().is_none_or(|f| f.name != name) => {
                    self.facts = Some(Facts {
                        remade: self.remade,
                        ..Facts::new(name, self.now)
                    });
                }
                Some(_) => {}
            }
            let action = decide(
                &self.record,
                self.facts.as_ref(),
                &self.limits,
                self.since,
                self.now,
            );
            self.check();
            if let Action::Wait(until) = &action {
                assert!(
                    until.is_none_or(|at| at > self.now),
                    "a wait for the past: {action:?}"
                );
            }
            if matches!(action, Action::Wait(_) | Action::Stop) {
                return;
            }
            self.act(action);
            self.check();
        }
        panic!("it never settles: {:?} {:?}", self.record, self.facts);
    }

    fn act(&mut self, action: Action) {
        let (now, limits) = (self.now, self.limits.clone());
        let record = &mut self.record;
        if let Action::End(reason) = action {
            return record.end(reason, now).unwrap();
        }
        let name = record.live_desktop().unwrap().name();
        let facts = self.facts.as_mut().unwrap();
        match action {
            Action::Start(op) => {
                assert_eq!(facts.busy, None, "two operations at once");
                if op != Op::Destroy {
                    let phase = record.desktop_phase().unwrap();
                    assert!(phase < DesktopPhase::Destroying, "{op:?} in {phase:?}");
                }
                facts.begin(op, now);
            }
            Action::Abandon => facts.abandon(now),
            Action::Warn { .. } => facts.warned += 1,
            action => {
                super::world::verb(action.clone(), record, name, &limits, now).unwrap();
                match action {
                    Action::Create => {
                        facts.begin(Op::Create, now);
                        assert!(self.machines.insert(name), "made twice");
                    }
                    Action::Remake(..) => self.remade += 1,
                    _ => {}
                }
            }
        }
    }

    fn check(&self) {
        let live = self.live();
        for machine in &self.machines {
            assert_eq!(
                Some(*machine),
                live,
                "{machine} may exist and nobody will remove it"
            );
            assert!(self.record.desktop_phase() > Some(DesktopPhase::Planned));
            assert!(!self.record.phase.is_final());
        }
        if let Some((name, at)) = self.claimed {
            let desktop = self.record.desktop.as_ref().unwrap();
            assert_eq!(
                desktop.name(),
                name,
                "a session that had a desktop gets no other"
            );
            assert_eq!(desktop.claimed_at(), Some(at));
            assert!(desktop.phase() >= DesktopPhase::Claimed);
        }
        assert_eq!(
            self.record.phase.is_usable(),
            self.record.view().rdp.is_some()
        );
        let open = self
            .record
            .stages
            .iter()
            .filter(|s| s.duration_ms.is_none());
        let preparing = matches!(
            self.record.phase,
            SessionPhase::Queued | SessionPhase::Preparing | SessionPhase::Ending
        );
        assert!(open.count() <= usize::from(preparing));
    }
}

/// A session in use by nobody, just ready.
fn ready(origin: Origin) -> Model {
    let mut model = Model::new(origin);
    for event in [
        Event::Place,
        Event::Succeed,
        Event::Succeed,
        Event::Announce,
        Event::Succeed,
    ] {
        model.happen(&event);
    }
    assert_eq!(model.record.phase, SessionPhase::Ready);
    model
}

#[test]
fn sixty_seconds_after_the_last_connection_it_ends_and_not_before() {
    let mut model = ready(Origin::V1);
    model.happen(&Event::Report(1));
    model.report_for(4_000, 1);
    model.happen(&Event::Report(0));
    assert_eq!(model.record.phase, SessionPhase::Disconnected);
    model.report_for(50, 0);
    model.happen(&Event::Pass(9));
    assert_eq!(model.record.phase, SessionPhase::Disconnected);
    model.happen(&Event::Pass(1));
    assert_eq!(model.record.end_reason, Some(EndReason::Idle));
}

#[test]
fn a_keep_holds_it_until_its_cap_even_if_the_launcher_sleeps() {
    let mut model = ready(Origin::V1);
    model.happen(&Event::Report(1));
    model.happen(&Event::Report(0));
    let cap = after(model.now, s(model.limits.keep_max_s + model.limits.idle_s));
    model.happen(&Event::Keep(3_600));
    model.report_for(3_000, 0);
    model.happen(&Event::Keep(3_600));
    assert_eq!(
        model.record.ends_at,
        Some(cap),
        "renewing does not pass the cap"
    );
    model.report_for(650, 0);
    model.happen(&Event::Pass(9));
    assert_eq!(model.record.phase, SessionPhase::Disconnected);
    model.happen(&Event::Pass(1));
    assert_eq!(model.record.end_reason, Some(EndReason::Idle));
}

#[test]
fn giving_up_a_keep_leaves_the_idle_time() {
    let mut model = ready(Origin::V1);
    model.happen(&Event::Report(1));
    model.happen(&Event::Report(0));
    model.happen(&Event::Keep(3_600));
    model.happen(&Event::Pass(100));
    model.happen(&Event::Keep(0));
    assert_eq!(model.record.ends_at, Some(after(model.now, s(60))));
}

#[test]
fn a_silent_launcher_loses_its_session_but_not_a_connected_one() {
    let mut queued = Model::new(Origin::V1);
    queued.happen(&Event::Pass(90));
    assert_eq!(queued.record.end_reason, Some(EndReason::Abandoned));

    let mut connected = ready(Origin::V1);
    connected.happen(&Event::Report(1));
    connected.happen(&Event::Pass(500));
    connected.happen(&Event::Report(1));
    assert_eq!(connected.record.phase, SessionPhase::Connected);

    let mut prototype = Model::new(Origin::Prototype);
    prototype.happen(&Event::Pass(500));
    assert_eq!(prototype.record.phase, SessionPhase::Queued);
}

#[test]
fn nobody_connects_to_a_session_with_a_launcher() {
    let mut model = ready(Origin::V1);
    for _ in 0..9 {
        model.happen(&Event::Pass(30));
        model.happen(&Event::Heartbeat);
        model.happen(&Event::Report(0));
    }
    assert_eq!(model.record.phase, SessionPhase::Ready);
    model.happen(&Event::Pass(30));
    model.happen(&Event::Report(0));
    assert_eq!(model.record.end_reason, Some(EndReason::NeverConnected));
}

#[test]
fn a_silent_agent_is_no_proof_that_the_person_left() {
    let mut model = ready(Origin::V1);
    model.happen(&Event::Report(1));
    model.happen(&Event::Report(0));
    model.happen(&Event::Pass(20));
    // The machine is silent from here; the idle time passes.
    model.happen(&Event::Pass(100));
    assert_eq!(model.record.phase, SessionPhase::Disconnected);
    // The person was back all along.
    model.happen(&Event::Report(1));
    assert_eq!(model.record.phase, SessionPhase::Connected);
    model.happen(&Event::Pass(model.limits.silence_s));
    assert_eq!(model.record.end_reason, Some(EndReason::MachineLost));
}

#[test]
fn a_new_process_does_not_blame_anybody_for_the_time_it_was_away() {
    let mut model = ready(Origin::V1);
    model.happen(&Event::Report(1));
    model.now = after(model.now, s(1_000));
    model.happen(&Event::Crash);
    assert_eq!(model.record.phase, SessionPhase::Connected);
    model.happen(&Event::Report(1));
    assert_eq!(model.record.phase, SessionPhase::Connected);
}

#[test]
fn the_person_is_warned_twice_before_the_lifetime_ends() {
    let mut model = ready(Origin::V1);
    model.happen(&Event::Report(1));
    let mut warned = Vec::new();
    while !model.record.phase.is_final() && model.record.phase != SessionPhase::Ending {
        let before = model.facts.as_ref().unwrap().warned;
        model.happen(&Event::Report(1));
        model.happen(&Event::Pass(10));
        let facts = model.facts.as_ref().unwrap();
        if facts.warned > before {
            warned.push(between(model.now, model.record.expires_at).as_secs());
        }
    }
    assert_eq!(warned, [300, 60]);
    assert_eq!(model.record.end_reason, Some(EndReason::Expired));
}

#[test]
fn an_interrupted_create_is_replaced_by_another_desktop() {
    let mut model = Model::new(Origin::V1);
    model.happen(&Event::Place);
    let first = model.live().unwrap();
    model.happen(&Event::Crash);
    // Nobody makes it any more.
    model.happen(&Event::OpFails);
    assert_eq!(model.record.desktop_phase(), Some(DesktopPhase::Destroying));
    model.happen(&Event::Succeed);
    model.happen(&Event::Place);
    assert_ne!(model.live(), Some(first));
    assert_eq!(model.record.phase, SessionPhase::Preparing);
}

#[test]
fn a_create_that_goes_on_without_its_orchestrator_is_adopted() {
    let mut model = Model::new(Origin::V1);
    model.happen(&Event::Place);
    let first = model.live();
    model.happen(&Event::Crash);
    model.happen(&Event::Succeed);
    assert_eq!(model.live(), first);
    assert_eq!(model.record.desktop_phase(), Some(DesktopPhase::Booting));
}

#[test]
fn a_desktop_that_cannot_be_removed_is_stuck_with_the_reason_and_tried_again() {
    let mut model = ready(Origin::V1);
    model.happen(&Event::Cancel);
    for _ in 0..8 {
        model.happen(&Event::OpFails);
        model.happen(&Event::Pass(30));
    }
    assert_eq!(model.record.desktop_phase(), Some(DesktopPhase::Stuck));
    assert_eq!(model.record.phase, SessionPhase::Ending);
    let failure = model.record.failure.clone().unwrap();
    assert!(failure.problem.detail.contains("it broke"), "{failure:?}");
    model.happen(&Event::Pass(60));
    model.happen(&Event::Succeed);
    assert_eq!(model.record.phase, SessionPhase::Ended);
    assert_eq!(model.record.failure, None);
}

#[test]
fn a_removal_that_never_ends_has_failed_and_another_follows() {
    let mut model = ready(Origin::V1);
    model.happen(&Event::Cancel);
    model.happen(&Event::Pass(599));
    assert_eq!(model.facts.as_ref().unwrap().removals_failed, 0);
    model.happen(&Event::Pass(1));
    let facts = model.facts.as_ref().unwrap();
    assert_eq!((facts.busy, facts.removals_failed), (None, 1));
    for _ in 0..8 {
        model.happen(&Event::Pass(30));
        model.happen(&Event::Pass(600));
    }
    assert_eq!(model.record.desktop_phase(), Some(DesktopPhase::Stuck));
    let reason = model
        .record
        .desktop
        .as_ref()
        .and_then(Desktop::stuck_reason);
    assert_eq!(reason, Some("it had not ended after 600 s"));
    model.happen(&Event::Pass(60));
    model.happen(&Event::Succeed);
    assert_eq!(model.record.phase, SessionPhase::Ended);
}

#[test]
fn a_stuck_desktop_is_tried_more_and_more_rarely_and_after_a_day_no_more() {
    let mut model = ready(Origin::V1);
    model.happen(&Event::Cancel);
    for _ in 0..8 {
        model.happen(&Event::OpFails);
        model.happen(&Event::Pass(30));
    }
    let begun = model.now;
    let mut pauses = Vec::new();
    let mut last = model.now;
    while model.now < after(begun, s(3 * 86_400)) {
        if model.facts.as_ref().unwrap().busy == Some(Op::Destroy) {
            pauses.push(between(last, model.now).as_secs());
            last = model.now;
            model.happen(&Event::OpFails);
        }
        model.happen(&Event::Pass(30));
    }
    assert!(pauses.is_sorted(), "{pauses:?}");
    assert_eq!(pauses.last(), Some(&3_600));
    let tried = between(begun, last);
    assert!((s(72_000)..s(108_000)).contains(&tried), "{tried:?}");
    let name = model.live().unwrap();
    model.record.retry(name).unwrap();
    assert_eq!(model.record.desktop_phase(), Some(DesktopPhase::Destroying));
    assert_eq!(model.record.failure, None);
    assert_eq!(model.record.retry(name), Err(NotNow));
}

#[test]
fn a_desktop_that_hangs_at_a_stage_is_replaced_twice_and_then_its_session_fails() {
    let mut model = Model::new(Origin::V1);
    let mut tried = BTreeSet::new();
    for _ in 0..3 {
        model.happen(&Event::Place);
        model.happen(&Event::Succeed);
        assert_eq!(model.record.stage(), StageName::Booting);
        tried.insert(model.live());
        for _ in 0..18 {
            model.happen(&Event::Heartbeat);
            model.happen(&Event::Pass(10));
        }
        assert_eq!(model.record.desktop_phase(), Some(DesktopPhase::Destroying));
        model.happen(&Event::Succeed);
    }
    assert_eq!(tried.len(), 3);
    assert_eq!(model.record.phase, SessionPhase::Failed);
    let failure = model.record.failure.clone().unwrap();
    assert_eq!(failure.stage, StageName::Booting);
    assert_eq!(failure.problem.code, ProblemCode::TimedOut);
    assert!(failure.problem.detail.contains("booting_timeout_s"));
}

#[test]
fn what_is_in_the_way_for_a_moment_fails_nobody() {
    let mut model = Model::new(Origin::V1);
    for _ in 0..2 {
        model.happen(&Event::Place);
        model.happen(&Event::InTheWay);
        model.happen(&Event::Succeed);
        assert_eq!(model.record.phase, SessionPhase::Preparing);
    }
    model.happen(&Event::Place);
    model.happen(&Event::InTheWay);
    model.happen(&Event::Succeed);
    assert_eq!(model.record.phase, SessionPhase::Failed);
}

#[test]
fn without_room_a_session_waits_as_long_as_its_launcher_is_there() {
    let mut model = Model::new(Origin::V1);
    for _ in 0..50 {
        model.happen(&Event::Place);
        model.happen(&Event::NoRoom);
        assert_eq!(model.record.phase, SessionPhase::Queued);
        assert_eq!(model.record.stage(), StageName::Queued);
        model.happen(&Event::Succeed);
        assert_eq!(model.live(), None);
        model.happen(&Event::Heartbeat);
        model.happen(&Event::Pass(60));
    }
    model.happen(&Event::Place);
    model.happen(&Event::Succeed);
    assert_eq!(
        model.record.stage(),
        StageName::Booting,
        "waiting is no time of making"
    );
}

#[test]
fn a_desktop_that_could_not_be_made_is_left_to_look_at_if_that_is_wanted() {
    let mut model = Model::new(Origin::V1);
    model.limits.keep_failed_s = 600;
    model.happen(&Event::Place);
    model.happen(&Event::OpFails);
    assert_eq!(model.record.phase, SessionPhase::Ending);
    model.happen(&Event::Pass(599));
    model.happen(&Event::Succeed);
    assert!(model.live().is_some(), "nothing removes it yet");
    model.happen(&Event::Pass(1));
    model.happen(&Event::Succeed);
    assert_eq!(model.record.phase, SessionPhase::Failed);
    assert_eq!(model.machines, BTreeSet::new());
}

#[test]
fn what_was_down_for_a_minute_is_tried_again_soon_after_and_no_operator_is_called() {
    let mut model = ready(Origin::V1);
    model.happen(&Event::Cancel);
    for second in 0..=76 {
        model.happen(if second < 60 {
            &Event::OpFails
        } else {
            &Event::Succeed
        });
        assert_ne!(model.record.desktop_phase(), Some(DesktopPhase::Stuck));
        model.happen(&Event::Pass(1));
    }
    assert_eq!(model.record.phase, SessionPhase::Ended);
}

#[test]
fn the_time_of_making_a_desktop_is_no_silence_of_its_agent() {
    let mut model = Model::new(Origin::V1);
    model.limits.silence_s = 20;
    model.happen(&Event::Place);
    for event in [Event::Succeed, Event::Succeed, Event::Announce] {
        model.happen(&Event::Pass(20));
        model.happen(&event);
    }
    model.happen(&Event::Succeed);
    assert_eq!(model.record.phase, SessionPhase::Ready);
    model.happen(&Event::Pass(19));
    assert_eq!(model.record.phase, SessionPhase::Ready);
}

#[test]
fn an_agent_that_fails_before_its_bootstrap_was_noticed_is_told_at_its_stage() {
    let mut model = Model::new(Origin::V1);
    model.happen(&Event::Place);
    model.happen(&Event::Succeed);
    let facts = model.facts.as_mut().unwrap();
    assert_eq!(facts.busy, Some(Op::Bootstrap));
    let broke = Problem::new(ProblemCode::CreateFailed, "it broke");
    facts.failed = Some(Failed::ForGood(broke));
    model.settle();
    assert_eq!(model.record.phase, SessionPhase::Preparing);
    model.happen(&Event::Succeed);
    let failure = model.record.failure.clone().unwrap();
    assert_eq!(failure.stage, StageName::Configuring);
}
