//! The worker of one session: observe, decide, do, commit; again, until the session is over.
//!
//! # Guarantees
//! * A worker waits only for what concerns its own session, so none holds up another.
//! * It can be dropped anywhere: the next one looks at the row and the machine and goes on.

use crate::clock::between;
use crate::control::Shared;
use crate::decide::{Action, Announcement, Evidence, Facts, Failed, Op, decide};
use crate::desktop::{Desktop, DesktopPhase, NotNow};
use crate::failpoints::around;
use crate::last_words;
use crate::provider::news::Listener;
use crate::provider::{AgentChannel, DesktopSpec, MachineState, Provider, ProviderError};
use crate::rdp_probe::{ProbeError, probe};
use crate::receipt;
use crate::session::Record;
use crate::store::replicas::ReplicaId;
use crate::store::{Change, StoreError};
use jiff::Timestamp;
use mayfly_api::agent::{self, Bootstrap, FromAgent, ToAgent};
use mayfly_api::{
    DesktopName, EndReason, Problem, ProblemCode, SessionId, SessionPhase, StageProgress,
};
use secrecy::ExposeSecret;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

/// Pause between two looks at a machine.
const LOOK: Duration = Duration::from_secs(2);
/// Pause between two attempts to write the bootstrap.
const BOOTSTRAP_RETRY: Duration = Duration::from_millis(200);
/// Pause between two probes of the RDP server; each makes it fork.
const PROBE_RETRY: Duration = Duration::from_secs(1);
const PROBE_LIMIT: Duration = Duration::from_secs(10);
/// So many probes may see another certificate: the agent may still be restarting its server.
const WRONG_CERTIFICATES: u32 = 3;
/// A desktop of a domain gets so long to end its person's session and unmount their shares: 5 s inside, and the way there.
const LEAVE: Duration = Duration::from_secs(10);
/// How often the last sign of a person is written down while they are connected.
const ACTIVITY: Duration = Duration::from_secs(30);
/// The machine's own hard end comes this much later than the session's: it is the net below the control plane.
pub(crate) const LIFETIME_MARGIN: Duration = Duration::from_secs(600);

/// Works for the session until it is over or another's, or the orchestrator stops. One that is new and followed since before it was
/// accepted need not be read.
pub async fn run(shared: Arc<Shared>, id: SessionId, new: Option<(Record, watch::Receiver<u64>)>) {
    let (mut worker, mut signals) = Worker::new(shared.clone(), id);
    if let Some((record, changes)) = new {
        worker.changes = changes;
        worker.new = Some(record);
    }
    loop {
        match worker.step(&mut signals).await {
            Ok(Next::Again) => {}
            Ok(Next::Afresh) => (worker, signals) = Worker::new(shared.clone(), id),
            Ok(Next::Stop) => return,
            Err(error) => {
                error!(session = %id, %error, "the store failed; trying again");
                tokio::select! {
                    () = tokio::time::sleep(Duration::from_secs(1)) => {}
                    () = worker.term.cancelled() => return,
                }
            }
        }
    }
}

enum Next {
    Again,
    /// It was another's in between: what this worker saw is old.
    Afresh,
    Stop,
}

/// What happened to a machine, said by a task of this worker.
enum Signal {
    Agent(FromAgent),
    Lost(String),
}

type Signals = mpsc::Receiver<(DesktopName, Signal)>;

struct Worker {
    shared: Arc<Shared>,
    id: SessionId,
    /// Cancelled when no more may be done.
    term: CancellationToken,
    /// What the session was taken under; every commit carries it.
    fence: Option<u64>,
    /// As it was accepted, before the first look at it.
    new: Option<Record>,
    since: Timestamp,
    facts: Option<Facts>,
    changes: watch::Receiver<u64>,
    signal: mpsc::Sender<(DesktopName, Signal)>,
    /// The operation under way; aborted when dropped.
    operation: JoinSet<(Op, Result<(), Failed>)>,
    /// What making the machine is at.
    news: Listener,
    /// The tasks that follow the machine; aborted when dropped.
    companions: JoinSet<()>,
    to_agent: mpsc::Sender<ToAgent>,
    /// How many desktops this process replaced.
    remade: u32,
    /// The desktop was stuck when it was last looked at.
    stuck: bool,
}

impl Worker {
    fn new(shared: Arc<Shared>, id: SessionId) -> (Self, Signals) {
        let (signal, signals) = mpsc::channel(32);
        let worker = Self {
            since: shared.clock.now(),
            changes: shared.hub.follow(id),
            term: shared.tenure.token(),
            shared,
            id,
            fence: None,
            new: None,
            facts: None,
            signal,
            operation: JoinSet::new(),
            news: Listener::default(),
            companions: JoinSet::new(),
            to_agent: mpsc::channel(1).0,
            remade: 0,
            stuck: false,
        };
        (worker, signals)
    }

    async fn step(&mut self, signals: &mut Signals) -> Result<Next, StoreError> {
        if self.term.is_cancelled() || !self.shared.tenure.is_held() {
            return Ok(Next::Stop);
        }
        let record = match self.new.take() {
            Some(record) => record,
            None => {
                self.changes.mark_unchanged();
                let Some(record) = self.shared.store.get(self.id).await? else {
                    return Ok(Next::Stop);
                };
                record
            }
        };
        if record.owner.as_ref() != Some(self.shared.store.me()) {
            debug!(session = %self.id, "another orchestrator works for it");
            return Ok(Next::Stop);
        }
        if *self.fence.get_or_insert(record.fence) != record.fence {
            return Ok(Next::Afresh);
        }
        let Some(provider) = self.shared.provider(&record.wish.provider) else {
            // Its template was taken out of the configuration while it lived.
            error!(session = %self.id, provider = record.wish.provider, "no such provider is configured; its desktop is left alone");
            return Ok(Next::Stop);
        };
        let host = record.live_desktop().and_then(Desktop::host);
        if let Some(host) = host.filter(|h| provider.is_bound() && *h != self.shared.store.me()) {
            return self.host_lost(&record, host).await;
        }
        self.look_at(&record, &provider).await;
        let now = self.shared.clock.now();
        let limits = &self.shared.config.limits;
        let action = decide(&record, self.facts.as_ref(), limits, self.since, now);
        if let Action::Wait(until) = action {
            return self.wait(signals, &provider, until).await;
        }
        if action == Action::Stop {
            return Ok(Next::Stop);
        }
        self.act(action, &record, &provider, now).await?;
        Ok(Next::Again)
    }

    /// Its desktop is on a machine whose orchestrator is not there any more, and nobody else reaches it.
    async fn host_lost(&mut self, record: &Record, host: &ReplicaId) -> Result<Next, StoreError> {
        if record.desktop_phase() != Some(DesktopPhase::Stuck) {
            let called = self.shared.store.called(host).await?;
            let reason = format!(
                "its machine is on {}, where no orchestrator was seen for {} s (limits.host_lost_s); it is removed when that one is back",
                called.as_deref().unwrap_or("an unknown host"),
                self.shared.config.limits.host_lost_s
            );
            error!(session = %self.id, %host, reason, "its host is lost");
            let now = self.shared.clock.now();
            self.commit(Change::Told, move |r| r.host_lost(&reason, now))
                .await?;
        }
        tokio::select! {
            () = self.term.cancelled() => return Ok(Next::Stop),
            _ = self.changes.changed() => {}
        }
        Ok(Next::Again)
    }

    /// Facts are about the live desktop; companions follow its machine while it should run.
    async fn look_at(&mut self, record: &Record, provider: &Arc<dyn Provider>) {
        let Some(desktop) = record.live_desktop() else {
            self.facts = None;
            self.companions.shutdown().await;
            return;
        };
        let name = desktop.name();
        if self.facts.as_ref().is_none_or(|f| f.name != name) {
            self.companions.shutdown().await;
            self.operation.shutdown().await;
            self.facts = Some(Facts {
                followed: provider.is_followed(),
                remade: self.remade,
                ..Facts::new(name, self.shared.clock.now())
            });
        }
        let was_stuck = std::mem::replace(&mut self.stuck, desktop.phase() == DesktopPhase::Stuck);
        if was_stuck
            && !self.stuck
            && let Some(facts) = self.facts.as_mut()
        {
            // An administrator has its removal tried again, as if for the first time.
            (facts.removals_failed, facts.removal_failed) = (0, None);
        }
        let runs = matches!(
            desktop.phase(),
            DesktopPhase::Booting
                | DesktopPhase::Configuring
                | DesktopPhase::Ready
                | DesktopPhase::Claimed
        );
        if !runs {
            self.companions.shutdown().await;
        } else if self.companions.is_empty() {
            let (to_agent, outgoing) = mpsc::channel(4);
            self.to_agent = to_agent;
            let signal = self.signal.clone();
            self.companions
                .spawn(follow_agent(provider.clone(), name, signal, outgoing));
            let signal = self.signal.clone();
            self.companions
                .spawn(look_after(provider.clone(), name, signal));
        }
    }

    async fn wait(
        &mut self,
        signals: &mut Signals,
        provider: &Arc<dyn Provider>,
        until: Option<Timestamp>,
    ) -> Result<Next, StoreError> {
        tokio::select! {
            () = self.term.cancelled() => return Ok(Next::Stop),
            _ = self.changes.changed() => {}
            Some((name, signal)) = signals.recv() => self.heard(provider, name, signal).await?,
            progress = self.news.next() => self.progressed(progress).await?,
            Some(done) = self.operation.join_next() => {
                self.done(done, provider.kind());
                // Before its stage is over.
                if let Some(last) = self.news.unheard() {
                    self.progressed(Some(last)).await?;
                }
            }
            () = self.shared.clock.sleep_until(until) => {}
        }
        Ok(Next::Again)
    }

    fn done(
        &mut self,
        done: Result<(Op, Result<(), Failed>), tokio::task::JoinError>,
        provider: &str,
    ) {
        let now = self.shared.clock.now();
        let Some(facts) = self.facts.as_mut() else {
            return;
        };
        let busy = facts.busy.take();
        let (op, result) = match (done, busy) {
            (Ok(done), _) => done,
            (Err(error), Some(op)) => {
                let what = format!("{op:?} broke: {error}");
                (op, Err(for_good(ProblemCode::Internal, what)))
            }
            (Err(_), None) => return,
        };
        if result.is_err() && op != Op::Adopt {
            self.shared.metrics.operation_failed(provider, op);
        }
        if let Err(failed) = &result {
            let (session, desktop, reason) = (self.id, facts.name, failed.reason());
            match op {
                Op::Adopt => debug!(%session, %desktop, reason, "not adopted"),
                Op::Destroy => warn!(%session, %desktop, reason, "not removed; trying again"),
                _ => warn!(%session, %desktop, ?op, reason, "failed"),
            }
        }
        facts.done(op, result, now);
    }

    async fn heard(
        &mut self,
        provider: &Arc<dyn Provider>,
        name: DesktopName,
        signal: Signal,
    ) -> Result<(), StoreError> {
        let now = self.shared.clock.now();
        let Some(facts) = self.facts.as_mut().filter(|f| f.name == name) else {
            return Ok(());
        };
        match signal {
            Signal::Lost(reason) => {
                if facts.lost.is_none() {
                    warn!(session = %self.id, desktop = %name, reason, "the machine does not run any more");
                }
                facts.lost = Some(reason);
            }
            Signal::Agent(FromAgent::Hello { version, boot_id }) => {
                debug!(session = %self.id, desktop = %name, version, boot_id, "the agent is there");
            }
            // Whoever asked listens for it.
            Signal::Agent(FromAgent::Left) => {}
            Signal::Agent(FromAgent::Trouble { message }) => {
                warn!(session = %self.id, desktop = %name, message, "its agent reports trouble");
            }
            Signal::Agent(FromAgent::Failed { step, message }) => {
                facts.failed = Some(for_good(
                    ProblemCode::CreateFailed,
                    format!("{name} could not take its identity at the step {step:?}: {message}"),
                ));
            }
            Signal::Agent(FromAgent::Ready {
                session,
                token,
                certificate_sha256,
                steps_ms,
                ..
            }) => {
                let known = self.shared.secrets.agent_token(self.id);
                let proven =
                    session == self.id && crate::secret::same(&known, token.expose_secret());
                if !proven || !is_sha256(&certificate_sha256) {
                    warn!(session = %self.id, desktop = %name, "an agent without the right token, or with a malformed certificate, was ignored");
                } else if facts.announced.is_none() {
                    debug!(session = %self.id, desktop = %name, ?steps_ms, "the agent is ready");
                    match provider.rdp_address(name).await {
                        Ok(address) => {
                            facts.announced = Some(Announcement {
                                address,
                                certificate_sha256,
                            });
                        }
                        Err(error) => facts.failed = Some(error.into()),
                    }
                }
            }
            Signal::Agent(FromAgent::Evidence { connections, .. }) => {
                facts.evidence = Some(Evidence {
                    at: now,
                    connections,
                });
                if connections > 0 {
                    self.note_activity(now).await?;
                }
            }
        }
        Ok(())
    }

    /// Tells what making the machine is at.
    async fn progressed(&self, progress: Option<StageProgress>) -> Result<(), StoreError> {
        if let Some(name) = self.facts.as_ref().map(|facts| facts.name) {
            self.update(move |record| match record.progressed(name, progress) {
                Ok(()) => Change::Told,
                Err(NotNow) => Change::Nothing,
            })
            .await?;
        }
        Ok(())
    }

    async fn note_activity(&self, now: Timestamp) -> Result<(), StoreError> {
        self.update(move |record| {
            if between(record.last_activity, now) < ACTIVITY {
                return Change::Nothing;
            }
            record.touch(now);
            Change::Quiet
        })
        .await?;
        Ok(())
    }

    async fn act(
        &mut self,
        action: Action,
        record: &Record,
        provider: &Arc<dyn Provider>,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let limits = self.shared.config.limits.clone();
        let Some(name) = record.live_desktop().map(Desktop::name) else {
            // Without a desktop only its end can be committed.
            if let Action::End(reason) = action {
                self.end(reason, now).await?;
            }
            return Ok(());
        };
        match action {
            Action::Wait(_) | Action::Stop => {}
            Action::Create => {
                if self
                    .commit(Change::Quiet, move |r| r.creating(name))
                    .await?
                {
                    self.start(Op::Create, record, provider);
                }
            }
            Action::Start(op) => self.start(op, record, provider),
            Action::Abandon => {
                self.operation.shutdown().await;
                if let Some(facts) = self.facts.as_mut() {
                    if facts.busy == Some(Op::Destroy) {
                        warn!(session = %self.id, desktop = %name, "its removal does not end; trying again");
                        let metrics = &self.shared.metrics;
                        metrics.operation_failed(provider.kind(), Op::Destroy);
                    }
                    facts.abandon(now);
                }
            }
            Action::Booting => {
                self.commit(Change::Told, move |r| r.booting(name, now))
                    .await?;
            }
            Action::Configuring => {
                self.commit(Change::Told, move |r| r.configuring(name, now))
                    .await?;
            }
            Action::Announced(Announcement {
                address,
                certificate_sha256,
            }) => {
                self.commit(Change::Told, move |r| {
                    r.announced(name, address, certificate_sha256, now)
                })
                .await?;
            }
            Action::Proved => {
                self.commit(Change::Quiet, move |r| r.proved(name)).await?;
            }
            Action::Claim => {
                if self
                    .commit(Change::Told, move |r| r.claim(name, &limits, now))
                    .await?
                {
                    info!(session = %self.id, desktop = %name, "ready");
                }
            }
            Action::Presence(connections) => {
                info!(session = %self.id, desktop = %name, connections, "RDP connections");
                self.commit(Change::Told, move |r| r.presence(connections, &limits, now))
                    .await?;
            }
            Action::Warn { ends_in_s } => {
                if let Some(facts) = self.facts.as_mut() {
                    facts.warned += 1;
                }
                // Full or closed: the agent is not there to warn anybody.
                let _ = self.to_agent.try_send(ToAgent::Warn { ends_in_s });
            }
            Action::End(reason) => self.end(reason, now).await?,
            Action::Fail(problem) => {
                warn!(session = %self.id, desktop = %name, problem = problem.detail, "could not be made");
                self.commit(Change::Told, move |r| r.fail(problem, now))
                    .await?;
            }
            Action::Remake(setback, reason) => {
                warn!(session = %self.id, desktop = %name, reason, "another replaces it");
                if self
                    .commit(Change::Told, move |r| r.remake(name, setback, now))
                    .await?
                {
                    self.remade += 1;
                }
            }
            Action::Requeue(reason) => {
                warn!(session = %self.id, desktop = %name, reason, "no room; its session waits");
                self.shared.found_no_room(&record.wish.template);
                self.commit(Change::Told, move |r| r.requeue(name, now))
                    .await?;
            }
            Action::Stuck(reason) => {
                error!(session = %self.id, desktop = %name, reason, "could not be removed; an operator must look");
                self.commit(Change::Told, move |r| r.stuck(name, reason))
                    .await?;
            }
            Action::Gone => {
                info!(session = %self.id, desktop = %name, "gone");
                if record.phase != SessionPhase::Queued {
                    self.shared.room_was_made();
                }
                self.commit(Change::Told, move |r| r.gone(name, now))
                    .await?;
            }
        }
        Ok(())
    }

    /// Ends the session, unless the launcher spoke since it was decided: that is looked at again in the transaction.
    async fn end(&self, reason: EndReason, now: Timestamp) -> Result<(), StoreError> {
        let limits = self.shared.config.limits.clone();
        let (facts, since) = (self.facts.clone(), self.since);
        let decided = Action::End(reason);
        let ended = self.commit(Change::Told, move |record| {
            if decide(record, facts.as_ref(), &limits, since, now) == decided {
                record.end(reason, now)
            } else {
                Err(NotNow)
            }
        });
        if ended.await? {
            info!(session = %self.id, ?reason, "ends");
        }
        Ok(())
    }

    /// Commits a verb; `false` if it came too late, because somebody else changed the session meanwhile.
    async fn commit(
        &self,
        change: Change,
        verb: impl FnOnce(&mut Record) -> Result<(), NotNow> + Send + 'static,
    ) -> Result<bool, StoreError> {
        let done = self.update(move |record| match verb(record) {
            Ok(()) => change,
            Err(NotNow) => Change::Nothing,
        });
        let changed = done.await?;
        self.shared.dispatch.notify_one();
        Ok(changed != Change::Nothing)
    }

    /// Changes the session, unless another has taken it.
    async fn update(
        &self,
        change: impl FnOnce(&mut Record) -> Change + Send + 'static,
    ) -> Result<Change, StoreError> {
        let fence = self.fence;
        let done = self.shared.update(self.id, move |record| {
            if fence == Some(record.fence) {
                change(record)
            } else {
                Change::Nothing
            }
        });
        Ok(done.await?.map_or(Change::Nothing, |(_, change)| change))
    }

    fn start(&mut self, op: Op, record: &Record, provider: &Arc<dyn Provider>) {
        let Some(facts) = self.facts.as_mut() else {
            return;
        };
        // The next step finds out that it is over.
        if !self.shared.tenure.is_held() {
            return;
        }
        facts.begin(op, self.shared.clock.now());
        let name = facts.name;
        let provider = provider.clone();
        if matches!(op, Op::Create | Op::Adopt) {
            self.news = provider.news().follow(name);
        }
        debug!(session = %self.id, desktop = %name, ?op, "starts");
        let kind = provider.kind();
        let work: Pin<Box<dyn Future<Output = _> + Send>> = match op {
            Op::Create => {
                let spec = self.spec(name, record);
                Box::pin(async move {
                    let made = around("create", provider.create(&spec)).await;
                    (op, made.map_err(Failed::from))
                })
            }
            Op::Adopt => Box::pin(async move {
                let adopted = match around("adopt", provider.adopt(name)).await {
                    Ok(true) => Ok(()),
                    Ok(false) => {
                        let what = format!("nothing makes {name} any more");
                        Err(for_good(ProblemCode::CreateFailed, what))
                    }
                    Err(error) => Err(error.into()),
                };
                (op, adopted)
            }),
            Op::Bootstrap => {
                let bootstrap = self.bootstrap(name, record);
                Box::pin(async move { (op, hand_over(&*provider, name, bootstrap).await) })
            }
            Op::Probe => {
                let announced = record.desktop.as_ref().and_then(Desktop::announced);
                let announced = announced.map(|(a, c)| (a, c.to_owned()));
                Box::pin(async move {
                    let Some((address, certificate)) = announced else {
                        let what = "nothing was announced to probe";
                        return (op, Err(for_good(ProblemCode::Internal, what)));
                    };
                    (op, prove(address, &certificate).await)
                })
            }
            Op::Destroy => {
                let used = record
                    .desktop
                    .as_ref()
                    .is_some_and(|d| d.claimed_at().is_some());
                let may_have_open_files = used && self.domain(name, record).is_some();
                let facts = self.facts.as_ref();
                let failed = facts.is_some_and(|facts| last_words::are_wanted(record, facts));
                let (shared, session) = (self.shared.clone(), self.id);
                Box::pin(async move {
                    if failed {
                        let words = last_words::keep(shared.clone(), &*provider, session, name);
                        around("last words", words).await;
                    }
                    if may_have_open_files
                        && around(
                            "leave",
                            tokio::time::timeout(LEAVE, leave(&*provider, name)),
                        )
                        .await
                        .is_err()
                    {
                        warn!(desktop = %name, "its shares were not unmounted in time; it is removed all the same");
                    }
                    let gone = async {
                        let checked = around("destroy", provider.destroy(name)).await?;
                        let kept = receipt::keep(&shared, session, name, checked).await;
                        kept.map_err(|error| {
                            let why = format!("the receipt of {name} could not be kept: {error}");
                            for_good(ProblemCode::Internal, why)
                        })
                    };
                    (op, gone.await)
                })
            }
        };
        let (shared, session) = (self.shared.clone(), self.id);
        self.operation.spawn(async move {
            let (traces, clock) = (&shared.traces, &shared.clock);
            traces.operation(clock, session, name, kind, op, work).await
        });
    }

    fn spec(&self, name: DesktopName, record: &Record) -> DesktopSpec {
        let config = &self.shared.config;
        let template = config.find_template(Some(&record.wish.template));
        let (cpus, memory_mib) = template.map_or((2, 1536), |t| (t.cpus, t.memory_mib));
        let in_domain = template.is_some_and(|t| t.domain);
        let left = between(self.shared.clock.now(), record.expires_at);
        DesktopSpec {
            name,
            session: self.id,
            in_domain,
            playbook: template.and_then(|t| t.playbook.clone()),
            cpus,
            memory_mib,
            lifetime: left + LIFETIME_MARGIN,
        }
    }

    /// What a desktop must know of the domain, if its template is of it.
    fn domain(&self, name: DesktopName, record: &Record) -> Option<agent::Domain> {
        let config = &self.shared.config;
        let template = config.find_template(Some(&record.wish.template))?;
        template.domain.then(|| agent::Domain {
            name: config.domain.name.clone(),
            servers: config.domain.servers.clone(),
            dns_servers: config.domain.dns_servers.clone(),
            shares: template.shares.clone(),
            secret: self.shared.secrets.join_password(name),
        })
    }

    fn bootstrap(&self, name: DesktopName, record: &Record) -> Bootstrap {
        let secrets = &self.shared.secrets;
        Bootstrap {
            session: self.id,
            host_name: name.to_string(),
            token: secrets.agent_token(self.id),
            user: record.wish.user.clone(),
            password: self.shared.password_of(record),
            now: Timestamp::now(),
            language: record.wish.language.clone(),
            time_zone: record.wish.time_zone.clone(),
            keyboard: record.wish.keyboard.clone(),
            silence_limit_s: self.shared.config.limits.silence_s,
            domain: self.domain(name, record),
            line: None,
        }
    }
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn for_good(code: ProblemCode, what: impl Into<String>) -> Failed {
    Failed::ForGood(Problem::new(code, what))
}

impl From<ProviderError> for Failed {
    fn from(error: ProviderError) -> Self {
        match error {
            ProviderError::NoCapacity(why) => Self::NoRoom(why),
            ProviderError::Busy(why) => Self::InTheWay(why),
            ProviderError::Unavailable(why) => for_good(ProblemCode::ProviderUnavailable, why),
            ProviderError::NotYet(why) | ProviderError::Failed(why) => {
                for_good(ProblemCode::CreateFailed, why)
            }
        }
    }
}

/// Writes the bootstrap as soon as the machine takes it. The overall limit is the decider's.
async fn hand_over(
    provider: &dyn Provider,
    name: DesktopName,
    mut bootstrap: Bootstrap,
) -> Result<(), Failed> {
    loop {
        bootstrap.now = Timestamp::now();
        match around("bootstrap", provider.bootstrap(name, &bootstrap)).await {
            Ok(()) => return Ok(()),
            Err(ProviderError::NotYet(_)) => tokio::time::sleep(BOOTSTRAP_RETRY).await,
            Err(error) => return Err(error.into()),
        }
    }
}

/// Has the desktop end its person's session and unmount their shares.
async fn leave(provider: &dyn Provider, name: DesktopName) {
    loop {
        // The channel of before was closed with everything that followed the machine; the agent opens another.
        if let Ok(AgentChannel {
            mut from_agent,
            to_agent,
        }) = provider.agent(name).await
            && to_agent.send(ToAgent::Leave).await.is_ok()
        {
            while let Some(message) = from_agent.recv().await {
                if matches!(message, FromAgent::Left) {
                    return;
                }
            }
        }
        if !matches!(provider.state(name).await, Ok(MachineState::Running)) {
            return;
        }
        tokio::time::sleep(BOOTSTRAP_RETRY).await;
    }
}

/// Probes until the RDP server answers as announced. The overall limit is the decider's.
async fn prove(address: std::net::SocketAddr, certificate: &str) -> Result<(), Failed> {
    let mut wrong = 0;
    loop {
        match around("probe", probe(address, certificate, PROBE_LIMIT)).await {
            Ok(()) => return Ok(()),
            Err(error @ ProbeError::WrongCertificate { .. }) => {
                wrong += 1;
                if wrong >= WRONG_CERTIFICATES {
                    return Err(for_good(ProblemCode::CreateFailed, error.to_string()));
                }
            }
            Err(error @ ProbeError::NoAnswer(..)) => debug!(%error, "not yet"),
        }
        tokio::time::sleep(PROBE_RETRY).await;
    }
}

/// Keeps a channel to the agent open, answers every message, and passes them on.
async fn follow_agent(
    provider: Arc<dyn Provider>,
    name: DesktopName,
    signal: mpsc::Sender<(DesktopName, Signal)>,
    mut outgoing: mpsc::Receiver<ToAgent>,
) {
    loop {
        match around("agent", provider.agent(name)).await {
            Ok(AgentChannel {
                mut from_agent,
                to_agent,
            }) => loop {
                tokio::select! {
                    message = from_agent.recv() => {
                        let Some(message) = message else { break };
                        if to_agent.send(ToAgent::Ack).await.is_err() {
                            break;
                        }
                        if signal.send((name, Signal::Agent(message))).await.is_err() {
                            return;
                        }
                    }
                    Some(message) = outgoing.recv() => {
                        if to_agent.send(message).await.is_err() {
                            break;
                        }
                    }
                }
            },
            Err(error) => debug!(desktop = %name, %error, "no channel to the agent yet"),
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Says when the machine does not run any more.
async fn look_after(
    provider: Arc<dyn Provider>,
    name: DesktopName,
    signal: mpsc::Sender<(DesktopName, Signal)>,
) {
    loop {
        let lost = match around("state", provider.state(name)).await {
            Ok(MachineState::Running) => None,
            Ok(MachineState::Dead { reason }) => Some(reason),
            Ok(MachineState::Absent) => Some("nothing of it exists".to_owned()),
            Err(error) => {
                warn!(desktop = %name, %error, "its state is not known");
                None
            }
        };
        if let Some(reason) = lost
            && signal.send((name, Signal::Lost(reason))).await.is_err()
        {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
}
