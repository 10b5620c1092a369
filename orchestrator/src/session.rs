//! A session with its desktop and stages: the unit of work, of one transaction, and of one worker.
//!
//! # Guarantees
//! Every change of a session is one of the verbs here. They are pure, so property tests run the very code that the
//! service runs; a verb that comes at the wrong time changes nothing and says [`NotNow`].

use crate::clock::{after, ms_between, s};
use crate::config::Limits;
use crate::desktop::{Desktop, DesktopPhase, NotNow};
use crate::store::replicas::ReplicaId;
use jiff::Timestamp;
use mayfly_api::{
    DesktopName, EndReason, Failure, Problem, RdpEndpoint, Session, SessionId, SessionPhase,
    Setback, Stage, StageName, StageProgress,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

/// How a session was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// `/api/v1`: a launcher holds a secret and sends heartbeats.
    V1,
    /// `/api/session/create`: RDP evidence alone holds it.
    Prototype,
}

/// How long things took before, in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expected {
    /// Median of each stage.
    pub stages: BTreeMap<StageName, u64>,
    /// Median from request to ready.
    pub ready: Option<u64>,
}

/// What a person asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// How it was asked for.
    pub origin: Origin,
    /// Catalogue entry.
    pub template: String,
    /// Its provider.
    pub provider: String,
    /// Login name.
    pub user: String,
    /// BCP 47 tag.
    pub language: Option<String>,
    /// IANA time zone.
    pub time_zone: Option<String>,
    /// XKB layout.
    pub keyboard: Option<String>,
}

#[cfg(test)]
impl Wish {
    /// What tests ask for.
    pub(crate) fn of_somebody(origin: Origin) -> Self {
        Self {
            origin,
            template: "t".to_owned(),
            provider: "p".to_owned(),
            user: "user".to_owned(),
            language: None,
            time_zone: None,
            keyboard: None,
        }
    }
}

/// One session with everything that belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its id.
    pub id: SessionId,
    /// What was asked for.
    pub wish: Wish,
    /// Where it stands.
    pub phase: SessionPhase,
    /// Number of its last event.
    pub seq: u64,
    /// When it was accepted.
    pub created_at: Timestamp,
    /// When it ends at the latest.
    pub expires_at: Timestamp,
    /// Last sign of a person.
    pub last_activity: Timestamp,
    /// Last call of its launcher.
    pub heartbeat_at: Option<Timestamp>,
    /// When its desktop was ready.
    pub ready_at: Option<Timestamp>,
    /// When its last RDP connection ended.
    pub disconnected_at: Option<Timestamp>,
    /// Until when somebody asked to hold it without an RDP connection.
    pub keep_until: Option<Timestamp>,
    /// When it ends unless somebody connects or keeps it.
    pub ends_at: Option<Timestamp>,
    /// Place in the queue, from 1.
    pub queue_position: Option<u32>,
    /// What it will take, as known when it was accepted.
    pub expected: Expected,
    /// Why it ends or ended.
    pub end_reason: Option<EndReason>,
    /// Why it could not be made.
    pub failure: Option<Failure>,
    /// Its desktop: the last one that was planned for it.
    pub desktop: Option<Desktop>,
    /// Its stages so far.
    pub stages: Vec<Stage>,
    /// Who works for it, as of the last that took it; nobody yet.
    pub owner: Option<ReplicaId>,
    /// Grows with every new owner: what an earlier one commits late is refused.
    pub fence: u64,
}

impl Record {
    /// A session just accepted.
    #[must_use]
    pub fn accepted(
        id: SessionId,
        wish: Wish,
        expected: Expected,
        limits: &Limits,
        now: Timestamp,
    ) -> Self {
        let mut record = Self {
            id,
            wish,
            phase: SessionPhase::Queued,
            seq: 1,
            created_at: now,
            expires_at: after(now, limits.lifetime()),
            last_activity: now,
            heartbeat_at: None,
            ready_at: None,
            disconnected_at: None,
            keep_until: None,
            ends_at: None,
            queue_position: None,
            expected,
            end_reason: None,
            failure: None,
            desktop: None,
            stages: Vec::new(),
            owner: None,
            fence: 0,
        };
        record.begin(StageName::Queued, now);
        record
    }

    /// Its desktop, if something of it may exist.
    #[must_use]
    pub fn live_desktop(&self) -> Option<&Desktop> {
        self.desktop.as_ref().filter(|d| d.may_exist())
    }

    /// Another works for it from now on.
    pub fn take(&mut self, owner: &ReplicaId) {
        if self.owner.as_ref() != Some(owner) {
            self.owner = Some(owner.clone());
            self.fence += 1;
        }
    }

    /// It waits for a desktop to be planned: new, or its last desktop was removed half-made.
    #[must_use]
    pub fn needs_desktop(&self) -> bool {
        matches!(self.phase, SessionPhase::Queued | SessionPhase::Preparing)
            && self.live_desktop().is_none()
    }

    /// The stage under way.
    #[must_use]
    pub fn stage(&self) -> StageName {
        self.stages.last().map_or(StageName::Queued, |s| s.name)
    }

    /// Since when that stage is under way.
    #[must_use]
    pub fn stage_since(&self) -> Timestamp {
        self.stages.last().map_or(self.created_at, |s| s.started_at)
    }

    /// When it left the queue: a desktop is made for it since then, whatever became of the first.
    #[must_use]
    pub fn placed_at(&self) -> Timestamp {
        let queued = self.stages.first().and_then(|s| s.duration_ms);
        after(self.created_at, Duration::from_millis(queued.unwrap_or(0)))
    }

    fn desktop_mut(&mut self, name: DesktopName) -> Result<&mut Desktop, NotNow> {
        self.desktop
            .as_mut()
            .filter(|d| d.name() == name && d.may_exist())
            .ok_or(NotNow)
    }

    fn preparing(&mut self, name: DesktopName) -> Result<&mut Desktop, NotNow> {
        if self.phase != SessionPhase::Preparing {
            return Err(NotNow);
        }
        self.desktop_mut(name)
    }

    fn close_stage(&mut self, now: Timestamp) {
        if let Some(stage) = self.stages.last_mut() {
            stage.progress = None;
            let took = ms_between(stage.started_at, now);
            stage.duration_ms.get_or_insert(took);
        }
    }

    fn begin(&mut self, name: StageName, now: Timestamp) {
        self.close_stage(now);
        self.stages.push(Stage {
            name,
            started_at: now,
            duration_ms: None,
            expected_ms: self.expected.stages.get(&name).copied(),
            progress: None,
        });
    }

    fn at(&mut self, progress: Option<StageProgress>) {
        if let Some(stage) = self.stages.last_mut() {
            stage.progress = progress;
        }
    }

    /// It gets a place and a desktop of that name.
    ///
    /// # Errors
    /// Unless it waits for one.
    pub fn plan(&mut self, name: DesktopName, now: Timestamp) -> Result<(), NotNow> {
        if !self.needs_desktop() {
            return Err(NotNow);
        }
        self.phase = SessionPhase::Preparing;
        self.queue_position = None;
        self.desktop = Some(Desktop::planned(name, self.owner.clone(), now));
        let before = self.stages.last_mut().and_then(|s| s.progress.take());
        self.begin(StageName::Creating, now);
        // Why it is another one is told until there is more to tell of this one.
        self.at(before.filter(|p| matches!(p, StageProgress::MadeAnew { .. })));
        Ok(())
    }

    /// From now on its machine may exist.
    ///
    /// # Errors
    /// Unless it is planned.
    pub fn creating(&mut self, name: DesktopName) -> Result<(), NotNow> {
        self.preparing(name)?.creating()
    }

    /// What making its machine is at; `None`: nothing to tell any more.
    ///
    /// # Errors
    /// Unless it is being created, and that is new. Who adopts a run hears its words again: what was passed does not come back.
    pub fn progressed(
        &mut self,
        name: DesktopName,
        progress: Option<StageProgress>,
    ) -> Result<(), NotNow> {
        let phase = self.preparing(name)?.phase();
        let before = self.stages.last().and_then(|s| s.progress.as_ref());
        let news = match (before, &progress) {
            (Some(before), Some(progress)) => rank(progress) > rank(before),
            (before, progress) => before.is_some() != progress.is_some(),
        };
        if phase != DesktopPhase::Creating || !news {
            return Err(NotNow);
        }
        self.at(progress);
        Ok(())
    }

    /// Its machine was started.
    ///
    /// # Errors
    /// Unless it was being created.
    pub fn booting(&mut self, name: DesktopName, now: Timestamp) -> Result<(), NotNow> {
        self.preparing(name)?.booting()?;
        self.begin(StageName::Booting, now);
        Ok(())
    }

    /// Its desktop has the bootstrap.
    ///
    /// # Errors
    /// Unless it booted.
    pub fn configuring(&mut self, name: DesktopName, now: Timestamp) -> Result<(), NotNow> {
        self.preparing(name)?.configuring()?;
        self.begin(StageName::Configuring, now);
        Ok(())
    }

    /// Its agent announced the RDP server.
    ///
    /// # Errors
    /// Unless it is being configured.
    pub fn announced(
        &mut self,
        name: DesktopName,
        address: SocketAddr,
        certificate: String,
        now: Timestamp,
    ) -> Result<(), NotNow> {
        self.preparing(name)?.announce(address, certificate)?;
        self.begin(StageName::Connecting, now);
        Ok(())
    }

    /// The RDP server answered as announced.
    ///
    /// # Errors
    /// Unless it was announced.
    pub fn proved(&mut self, name: DesktopName) -> Result<(), NotNow> {
        self.preparing(name)?.ready()
    }

    /// The session gets its ready desktop.
    ///
    /// # Errors
    /// Unless the desktop is ready and the session still wants it.
    pub fn claim(
        &mut self,
        name: DesktopName,
        limits: &Limits,
        now: Timestamp,
    ) -> Result<(), NotNow> {
        self.preparing(name)?.claim(now)?;
        self.close_stage(now);
        self.phase = SessionPhase::Ready;
        self.ready_at = Some(now);
        self.schedule(limits);
        Ok(())
    }

    /// So many RDP connections are open.
    ///
    /// # Errors
    /// If that is what was known, or the session is not usable.
    pub fn presence(
        &mut self,
        connections: u32,
        limits: &Limits,
        now: Timestamp,
    ) -> Result<(), NotNow> {
        match (self.phase, connections) {
            (SessionPhase::Ready | SessionPhase::Disconnected, 1..) => {
                self.phase = SessionPhase::Connected;
                self.keep_until = None;
            }
            (SessionPhase::Connected, 0) => {
                self.phase = SessionPhase::Disconnected;
                self.disconnected_at = Some(now);
            }
            _ => return Err(NotNow),
        }
        self.last_activity = now;
        self.schedule(limits);
        Ok(())
    }

    /// A sign of a person.
    pub fn touch(&mut self, now: Timestamp) {
        self.last_activity = self.last_activity.max(now);
    }

    /// Its launcher is there.
    pub fn heartbeat(&mut self, now: Timestamp) {
        self.heartbeat_at = Some(now);
        self.touch(now);
    }

    /// Hold it for so long without an RDP connection; zero gives that up.
    ///
    /// # Errors
    /// Unless it is usable.
    pub fn keep(&mut self, seconds: u32, limits: &Limits, now: Timestamp) -> Result<(), NotNow> {
        let alone_since = match self.phase {
            SessionPhase::Ready => self.ready_at.unwrap_or(now),
            SessionPhase::Connected => now,
            SessionPhase::Disconnected => self.disconnected_at.unwrap_or(now),
            _ => return Err(NotNow),
        };
        let cap = after(alone_since, s(limits.keep_max_s));
        self.keep_until = Some(after(now, s(seconds)).min(cap));
        self.heartbeat(now);
        self.schedule(limits);
        Ok(())
    }

    /// Says when it ends if nobody comes.
    fn schedule(&mut self, limits: &Limits) {
        let rule = match self.phase {
            SessionPhase::Ready => self
                .ready_at
                .map(|at| after(at, s(limits.never_connected_s))),
            SessionPhase::Disconnected => {
                self.disconnected_at.map(|at| after(at, s(limits.idle_s)))
            }
            _ => None,
        };
        let kept = self.keep_until.map(|at| after(at, s(limits.idle_s)));
        self.ends_at = rule.map(|rule| kept.map_or(rule, |kept| kept.max(rule)));
    }

    /// It ends: at once if nothing exists, otherwise as soon as its desktop is gone.
    ///
    /// # Errors
    /// If it is ending or has ended.
    pub fn end(&mut self, reason: EndReason, now: Timestamp) -> Result<(), NotNow> {
        if self.phase.is_final() || self.phase == SessionPhase::Ending {
            return Err(NotNow);
        }
        self.end_reason = Some(reason);
        self.ends_at = None;
        self.queue_position = None;
        if self.live_desktop().is_none() {
            self.close_stage(now);
            self.finish();
            return Ok(());
        }
        self.phase = SessionPhase::Ending;
        self.begin(StageName::Destroying, now);
        if let Some(desktop) = self.desktop.as_mut() {
            // Already being removed, to be made anew: that removal is now the last.
            let _ = desktop.destroy(now);
        }
        Ok(())
    }

    /// It could not be made.
    ///
    /// # Errors
    /// If it is ending or has ended.
    pub fn fail(&mut self, problem: Problem, now: Timestamp) -> Result<(), NotNow> {
        let stage = self.stage();
        let before = self.failure.replace(Failure { stage, problem });
        self.end(EndReason::Failed, now).inspect_err(|_| {
            self.failure = before;
        })
    }

    /// Its half-made desktop is removed and will be replaced by another.
    ///
    /// # Errors
    /// Unless it is being prepared.
    pub fn remake(
        &mut self,
        name: DesktopName,
        because: Setback,
        now: Timestamp,
    ) -> Result<(), NotNow> {
        self.give_up(name, now)?;
        self.at(Some(StageProgress::MadeAnew { because }));
        Ok(())
    }

    fn give_up(&mut self, name: DesktopName, now: Timestamp) -> Result<(), NotNow> {
        let desktop = self.preparing(name)?;
        if desktop.claimed_at().is_some() {
            return Err(NotNow);
        }
        desktop.destroy(now)?;
        self.stages.retain(|s| s.name == StageName::Queued);
        Ok(())
    }

    /// There was no room for its desktop: what there is of it is removed, and it waits again, at its old place.
    ///
    /// # Errors
    /// Unless it is being prepared.
    pub fn requeue(&mut self, name: DesktopName, now: Timestamp) -> Result<(), NotNow> {
        self.give_up(name, now)?;
        self.at(Some(StageProgress::NoRoom));
        self.phase = SessionPhase::Queued;
        if let Some(queued) = self.stages.last_mut() {
            queued.duration_ms = None;
        }
        Ok(())
    }

    /// Its desktop could not be removed.
    ///
    /// # Errors
    /// Unless it is being removed.
    pub fn stuck(&mut self, name: DesktopName, reason: String) -> Result<(), NotNow> {
        let problem = Problem::new(
            mayfly_api::ProblemCode::Internal,
            format!(
                "{name} could not be removed, it is tried again more and more rarely for a day: {reason}"
            ),
        );
        self.desktop_mut(name)?.stuck(reason)?;
        if self.phase == SessionPhase::Ending && self.failure.is_none() {
            let stage = StageName::Destroying;
            self.failure = Some(Failure { stage, problem });
        }
        Ok(())
    }

    /// The machine that its desktop is on is lost: the session ends, and an administrator must look.
    ///
    /// # Errors
    /// If it has no desktop, or that is known.
    pub fn host_lost(&mut self, reason: &str, now: Timestamp) -> Result<(), NotNow> {
        let desktop = self.live_desktop().ok_or(NotNow)?;
        let (name, was_claimed) = (desktop.name(), desktop.claimed_at().is_some());
        let problem = Problem::new(mayfly_api::ProblemCode::ProviderUnavailable, reason);
        // It may be ending already.
        let _ = if was_claimed {
            self.end(EndReason::MachineLost, now)
        } else {
            self.fail(problem, now)
        };
        self.stuck(name, reason.to_owned())
    }

    /// The removal of its stuck desktop is tried again.
    ///
    /// # Errors
    /// Unless the desktop is stuck.
    pub fn retry(&mut self, name: DesktopName) -> Result<(), NotNow> {
        self.desktop_mut(name)?.retry()?;
        self.failure
            .take_if(|failure| failure.stage == StageName::Destroying);
        Ok(())
    }

    /// It was checked that nothing of its desktop is left.
    ///
    /// # Errors
    /// Unless the desktop was being removed.
    pub fn gone(&mut self, name: DesktopName, now: Timestamp) -> Result<(), NotNow> {
        self.desktop_mut(name)?.gone()?;
        if self.phase == SessionPhase::Ending {
            self.close_stage(now);
            self.finish();
        }
        Ok(())
    }

    fn finish(&mut self) {
        // A removal that was stuck for a while and then succeeded is no failure of the session.
        if self
            .failure
            .as_ref()
            .is_some_and(|f| f.stage == StageName::Destroying)
        {
            self.failure = None;
        }
        self.phase = match self.failure {
            Some(_) => SessionPhase::Failed,
            None => SessionPhase::Ended,
        };
    }

    /// Names a commit of it, such as `commit preparing, booting`.
    pub(crate) fn commit(&self) -> String {
        let desktop = self.desktop.as_ref().map(Desktop::phase);
        let desktop = desktop.map_or("no desktop".to_owned(), |phase| format!("{phase:?}"));
        format!("commit {:?}, {desktop}", self.phase).to_lowercase()
    }

    /// As the API shows it. Holds no secret.
    #[must_use]
    pub fn view(&self) -> Session {
        let rdp = self
            .desktop
            .as_ref()
            .filter(|_| self.phase.is_usable())
            .and_then(Desktop::announced)
            .map(|(address, certificate)| RdpEndpoint {
                address,
                certificate_sha256: certificate.to_owned(),
                user: self.wish.user.clone(),
            });
        Session {
            id: self.id,
            phase: self.phase,
            template: self.wish.template.clone(),
            user: self.wish.user.clone(),
            desktop: self
                .desktop
                .as_ref()
                .filter(|_| self.phase != SessionPhase::Queued)
                .map(Desktop::name),
            rdp,
            created_at: self.created_at,
            last_activity: self.last_activity,
            expires_at: self.expires_at,
            ends_at: self.ends_at.filter(|at| *at < self.expires_at),
            stages: self.stages.clone(),
            expected_ready_ms: self.expected.ready,
            queue_position: self.queue_position,
            failure: self.failure.clone(),
            end_reason: self.end_reason,
        }
    }

    /// The phase of its desktop, if something of it may exist.
    #[must_use]
    pub fn desktop_phase(&self) -> Option<DesktopPhase> {
        self.live_desktop().map(Desktop::phase)
    }
}

/// How far making a machine has come, when it is at that.
fn rank(progress: &StageProgress) -> (u8, u32) {
    match progress {
        StageProgress::NoRoom | StageProgress::MadeAnew { .. } | StageProgress::Unknown => (0, 0),
        StageProgress::WaitingForStorage { place } => (1, u32::MAX - place),
        StageProgress::Cloning => (2, 0),
        StageProgress::WaitingForAddress => (3, 0),
        StageProgress::FirstBoot => (4, 0),
        StageProgress::Task { number, .. } => (5, *number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use StageProgress::{Cloning, FirstBoot, MadeAnew, WaitingForAddress, WaitingForStorage};

    #[test]
    fn what_was_passed_does_not_come_back_and_another_desktop_begins_with_why() {
        let wish = Wish::of_somebody(Origin::V1);
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let limits = Limits::default();
        let mut record =
            Record::accepted(SessionId::new(), wish, Expected::default(), &limits, now);
        let [first, second] = [1, 2].map(|n| DesktopName::from_number(n).unwrap());
        let task = |number| StageProgress::Task {
            number,
            name: "x".to_owned(),
        };
        let at = |record: &Record| {
            let (last, over) = record.stages.split_last().unwrap();
            assert!(over.iter().all(|s| s.progress.is_none()), "{over:?}");
            last.progress.clone()
        };

        record.plan(first, now).unwrap();
        let early = record.progressed(first, Some(Cloning));
        assert!(early.is_err(), "it is only planned");
        record.creating(first).unwrap();
        let story = [
            WaitingForStorage { place: 2 },
            WaitingForStorage { place: 1 },
            Cloning,
            WaitingForAddress,
            FirstBoot,
            task(1),
            task(2),
        ];
        for progress in &story {
            record.progressed(first, Some(progress.clone())).unwrap();
            assert_eq!(at(&record).as_ref(), Some(progress));
        }
        for progress in story {
            assert!(record.progressed(first, Some(progress)).is_err());
        }
        assert_eq!(at(&record), Some(task(2)));

        let because = Setback::TookTooLong;
        record.remake(first, because, now).unwrap();
        assert!(record.progressed(first, Some(task(3))).is_err());
        assert_eq!(at(&record), Some(MadeAnew { because }));
        record.gone(first, now).unwrap();
        record.plan(second, now).unwrap();
        record.creating(second).unwrap();
        assert_eq!(at(&record), Some(MadeAnew { because }));
        record.progressed(second, Some(Cloning)).unwrap();
        record.progressed(second, None).unwrap();
        assert_eq!(at(&record), None);
        record.progressed(second, Some(Cloning)).unwrap();
        record.booting(second, now).unwrap();
        assert_eq!(at(&record), None);
        assert!(record.progressed(second, Some(task(1))).is_err());
    }
}
