//! The launcher's mind: `step(state, moment, event) -> (state, effects)`. No I/O, no clock.
//!
//! # Guarantees (property tests in `core/tests.rs`)
//! * At most one desktop: while one may live, no other is asked for. An answer that comes too late for anybody to
//!   want it is answered with a destroy.
//! * Every session that was made ends destroyed, is kept on purpose, or is left to the orchestrator's lease
//!   ([`Exit::LeftBehind`] says so).
//! * Quit always ends: on the orchestrator's acknowledgement, after [`QUIT_BOUND`], or at the second Quit.
//! * The progress of one request never goes back.

mod show;
#[cfg(test)]
mod tests;

pub use show::{icon, menu, view};

use crate::api::{ApiTrouble, Certainty};
use crate::handle::{Exit, Page};
use crate::rdp::{ClientEnd, ClientTrouble};
use crate::view::{Action, Countdown, Message, RdpOptions, Settings};
use jiff::{Timestamp, ZonedDateTime};
use mayfly_api::{Credentials, RdpClientState, RdpEndpoint, Session, SessionId, SessionPhase};
use secrecy::SecretString;
use std::collections::VecDeque;
use std::time::Duration;

/// Quit waits at most this long for the orchestrator.
pub const QUIT_BOUND: Duration = Duration::from_secs(10);
/// How often the launcher says that it is there.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// A hold is asked for this long, in seconds …
const HOLD_S: u32 = 120;
/// … and renewed this often.
const HOLD_RENEWAL: Duration = Duration::from_secs(30);
/// Attempts to destroy before the person is told.
const DESTROY_ATTEMPTS: u32 = 5;
/// A destruction that takes longer than this is shown as a failure, with the session's id.
const DESTROY_PATIENCE: Duration = Duration::from_secs(120);
/// Lines kept for the diagnostics.
const LOG_LINES: usize = 40;

/// Now, on both clocks.
#[derive(Clone, Debug, PartialEq)]
pub struct Moment {
    /// Since the launcher started; never goes back, may stand still while the machine sleeps.
    pub since_start: Duration,
    /// What the clock on the wall says, in the person's time zone.
    pub wall: ZonedDateTime,
}

/// What a call on a session needs. The address is the one it was made at: settings may have changed since.
#[derive(Clone, Debug)]
pub struct Access {
    /// Address of the orchestrator.
    pub orchestrator: String,
    /// The session.
    pub id: SessionId,
    /// Its secret.
    pub secret: SecretString,
}

/// A call whose answer is the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Heartbeat.
    Beat,
    /// Keep.
    Keep,
    /// Destroy.
    Destroy,
}

/// What became of a session that an earlier launcher left.
#[derive(Clone, Debug)]
pub enum Recovered {
    /// There was none.
    Nothing,
    /// It is known to the orchestrator.
    Found(Access, Box<Session>),
    /// Its secret is lost: it was only in the memory of the launcher that crashed.
    SecretLost(SessionId),
    /// The orchestrator does not know it any more.
    Gone(SessionId),
    /// The orchestrator could not be asked.
    Unknown(SessionId, ApiTrouble),
}

/// What happens.
#[derive(Clone, Debug)]
pub enum Event {
    /// Time passed.
    Tick,
    /// The machine woke from sleep.
    Woke,
    /// The person asks.
    Act(Action),
    /// New settings are in force.
    Settings(Settings),
    /// Whether there is an RDP client, and which.
    ClientFound(u64, Result<String, ClientTrouble>),
    /// Answer to [`Effect::Create`].
    Created(u64, Result<Box<(Access, Session)>, ApiTrouble>),
    /// The session changed.
    Session(Box<Session>),
    /// The stream of changes broke; it heals itself if the trouble is retryable.
    StreamFailed(SessionId, ApiTrouble),
    /// Answer to a call.
    Answer(SessionId, Call, Result<Box<Session>, ApiTrouble>),
    /// Answer to [`Effect::FetchCredentials`].
    Credentials(SessionId, Result<Credentials, ApiTrouble>),
    /// Answer to [`Effect::StartClient`].
    ClientStarted(u64, Result<(), ClientTrouble>),
    /// The client's process ended; with the last lines it wrote.
    ClientEnded(u64, ClientEnd, String),
    /// Answer to [`Effect::Recover`].
    Recovered(Recovered),
    /// Secrets can only be kept in memory, and why.
    SecretsInMemory(String),
}

/// What is to be done outside.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Look for an RDP client.
    FindClient(u64, RdpOptions),
    /// Ask for a desktop. The key makes it safe to repeat.
    Create {
        /// Comes back with the answer.
        attempt: u64,
        /// Address of the orchestrator.
        orchestrator: String,
        /// Idempotency key.
        key: String,
        /// Login name; absent: the orchestrator's default.
        user: Option<String>,
    },
    /// Follow the session's changes, in place of what was followed before.
    Follow(Access),
    /// Follow nothing any more.
    Unfollow,
    /// Get what logs in to the desktop.
    FetchCredentials(Access),
    /// Start the RDP client.
    StartClient {
        /// Comes back with every news of it.
        run: u64,
        /// Where to.
        endpoint: RdpEndpoint,
        /// With what.
        credentials: Credentials,
        /// Title of its window.
        title: String,
        /// How.
        options: RdpOptions,
    },
    /// Stop it.
    StopClient(u64),
    /// Say that the launcher is there.
    Beat(Access, RdpClientState),
    /// Hold the desktop for so many seconds; 0 gives it up.
    Keep(Access, u32),
    /// Destroy it.
    Destroy(Access),
    /// Keep what a launcher after a crash needs to take the session back.
    Remember(Access),
    /// It needs it no more.
    Forget(SessionId),
    /// Look for a session that an earlier launcher left.
    Recover,
    /// Show a notification.
    Notify {
        /// Its title.
        title: Message,
        /// Its text.
        body: Message,
    },
    /// Show a page, or hide the window.
    Window(Option<Page>),
    /// Leave.
    Exit(Exit),
}

/// Everything the launcher knows.
#[derive(Clone, Debug)]
pub struct State {
    now: Moment,
    settings: Settings,
    /// `en` or `fr`, for [`Settings::language`] absent.
    system_language: String,
    user: Option<String>,
    /// Makes idempotency keys unique to this launcher.
    launcher: String,
    secrets_problem: Option<String>,
    phase: Phase,
    /// Counts requests for a desktop.
    attempt: u64,
    /// Counts starts of the RDP client.
    run: u64,
    quitting: Option<Duration>,
    log: VecDeque<String>,
}

#[derive(Clone, Debug)]
enum Phase {
    Home(Option<Message>),
    Recovering(Wanted),
    Creating(Creating),
    Live(Box<Live>),
    /// Something failed and no session is left.
    Failed(Trouble),
    Left,
}

/// Whether the person asked for a desktop meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Nothing,
    Desktop,
}

#[derive(Clone, Debug)]
struct Creating {
    key: String,
    since: Duration,
    step: CreatingStep,
    cancelled: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CreatingStep {
    FindingClient,
    Asking,
}

/// A session and what we do with it.
#[derive(Clone, Debug)]
struct Live {
    access: Access,
    session: Session,
    /// When it was asked for.
    since: Duration,
    fraction: f32,
    stream: Result<(), ApiTrouble>,
    follow_again: Option<Duration>,
    doing: Doing,
    next_beat: Duration,
    hold: Hold,
    /// What the launcher knows of its RDP client.
    client: RdpClientState,
    /// Our client's present or last run reached the desktop.
    run_connected: bool,
    /// An RDP connection seen from now on is not our client's.
    foreign_connection_possible: bool,
    /// Warnings of the end given so far.
    warnings: u8,
}

#[derive(Clone, Debug)]
enum Doing {
    /// Until it is ready.
    Waiting,
    /// Credentials are fetched and the client is started.
    Opening(Opening),
    /// Our client runs.
    Open,
    /// Somebody is connected, not by a client of ours.
    ByHand,
    Countdown {
        reason: Message,
        deadline: Option<Duration>,
        total: Option<Duration>,
    },
    /// It lives without a client.
    Held(Held),
    /// Something failed and the desktop lives.
    Trouble(Trouble),
    Ending(Ending),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opening {
    First,
    Again,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    Kept,
    Lost,
    Crashed,
    Replaced,
    /// A connection that was not our client's ended, for a reason unknown to us.
    Disconnected,
    Recovered,
}

#[derive(Clone, Debug)]
struct Ending {
    since: Duration,
    why: Why,
    attempts: u32,
    next_attempt: Option<Duration>,
    acknowledged: Acknowledged,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Acknowledged {
    No,
    Yes,
}

/// Who ended it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// The person, or their countdown.
    Person,
    /// The person gave up waiting.
    Cancelled,
    /// The orchestrator, by its rules.
    Orchestrator,
}

#[derive(Clone, Debug, PartialEq)]
enum Hold {
    No,
    /// `until`: the template's cap was reached.
    Renewing {
        next: Duration,
        until: Option<Timestamp>,
    },
    /// The orchestrator refuses to hold it any longer.
    Refused,
}

/// Something failed.
#[derive(Clone, Debug)]
struct Trouble {
    kind: TroubleKind,
    headline: Message,
    hint: Message,
    /// The facts, for the diagnostics.
    details: String,
    /// The session it befell, if any.
    session: Option<Box<Session>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum TroubleKind {
    /// No RDP client.
    NoClient,
    /// The request failed. With the key if the orchestrator may have heard it.
    Create(Option<String>),
    /// The desktop could not be made.
    Prepare,
    /// The client could not be started or could not connect.
    Client,
    /// The desktop is not the one announced.
    Certificate,
    /// It could not be destroyed.
    Destroy,
    /// A session of an earlier launcher could not be looked for.
    Recover(SessionId),
    /// The settings file is refused.
    Settings,
}

/// What a new [`State`] starts from.
#[derive(Clone, Debug)]
pub struct Start {
    /// Now.
    pub now: Moment,
    /// The settings in force.
    pub settings: Settings,
    /// Why the file could not be used, if so.
    pub settings_problem: Option<String>,
    /// `en` or `fr`.
    pub system_language: String,
    /// Login name inside the desktop.
    pub user: Option<String>,
    /// Something unique to this launcher.
    pub launcher: String,
}

impl State {
    /// A launcher that has just started, and its first effects: it looks for a session of an earlier one.
    #[must_use]
    pub fn start(start: Start) -> (Self, Vec<Effect>) {
        let mut effects = Vec::new();
        let phase = match start.settings_problem {
            Some(details) => {
                effects.push(Effect::Window(Some(Page::Main)));
                Phase::Failed(Trouble {
                    kind: TroubleKind::Settings,
                    headline: Message::new("error-settings"),
                    hint: Message::new("error-settings-hint").text("reason", &details),
                    details,
                    session: None,
                })
            }
            None => {
                effects.push(Effect::Recover);
                Phase::Recovering(Wanted::Nothing)
            }
        };
        let state = Self {
            now: start.now,
            settings: start.settings,
            system_language: start.system_language,
            user: start.user,
            launcher: start.launcher,
            secrets_problem: None,
            phase,
            attempt: 0,
            run: 0,
            quitting: None,
            log: VecDeque::new(),
        };
        (state, effects)
    }

    /// The settings in force.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// `en` or `fr`.
    #[must_use]
    pub fn language(&self) -> &str {
        let chosen = self.settings.language.as_deref();
        chosen.unwrap_or(&self.system_language)
    }

    /// When [`Event::Tick`] is needed next, on the launcher's own clock; `None`: not before another event.
    #[must_use]
    pub fn wake_at(&self) -> Option<Duration> {
        let now = self.now.since_start;
        let quit = self.quitting.map(|since| since + QUIT_BOUND);
        let soon = |ms| Some(now + Duration::from_millis(ms));
        let phase = match &self.phase {
            Phase::Home(_) | Phase::Failed(_) | Phase::Left | Phase::Recovering(_) => None,
            Phase::Creating(_) => soon(500),
            Phase::Live(live) => match &live.doing {
                Doing::Waiting | Doing::Opening(_) | Doing::Ending(_) => soon(500),
                Doing::Countdown {
                    deadline: Some(deadline),
                    ..
                } => {
                    // To the next whole second of the countdown.
                    let left = deadline.saturating_sub(now);
                    let part = Duration::from_nanos(u64::from(left.subsec_nanos()));
                    let next = if part.is_zero() {
                        Duration::from_secs(1)
                    } else {
                        part
                    };
                    Some(now + next.min(left.max(Duration::from_millis(1))))
                }
                Doing::Trouble(t) if t.kind == TroubleKind::Destroy => None,
                _ => Some(live.next_beat),
            },
        };
        let hold = match &self.phase {
            Phase::Live(live) => match live.hold {
                Hold::Renewing { next, .. } => Some(next),
                Hold::No | Hold::Refused => None,
            },
            _ => None,
        };
        [quit, phase, hold].into_iter().flatten().min()
    }

    /// Remembers a line for the diagnostics; the log file has it as well.
    fn note(&mut self, line: impl AsRef<str>) {
        tracing::info!("{}", line.as_ref());
        if self.log.len() == LOG_LINES {
            self.log.pop_front();
        }
        let time = self.now.wall.strftime("%H:%M:%S");
        self.log.push_back(format!("{time} {}", line.as_ref()));
    }
}

/// What happens next.
#[must_use]
pub fn step(mut state: State, at: Moment, event: Event) -> (State, Vec<Effect>) {
    let mut effects = Vec::new();
    state.now = at;
    if !matches!(state.phase, Phase::Left) {
        state.on(event, &mut effects);
        state.on_time(&mut effects);
    } else if let Event::Created(_, Ok(created)) = event {
        // Nobody wants it any more.
        effects.push(Effect::Destroy(created.0));
    }
    (state, effects)
}

type Effects = Vec<Effect>;

impl State {
    fn on(&mut self, event: Event, fx: &mut Effects) {
        match event {
            Event::Tick => {}
            Event::Woke => self.on_wake(fx),
            Event::Act(action) => self.on_action(action, fx),
            Event::Settings(settings) => {
                self.settings = settings;
                if let Phase::Failed(t) = &self.phase
                    && t.kind == TroubleKind::Settings
                {
                    self.phase = Phase::Recovering(Wanted::Nothing);
                    fx.push(Effect::Recover);
                }
            }
            Event::ClientFound(attempt, found) => self.on_client_found(attempt, found, fx),
            Event::Created(attempt, answer) => self.on_created(attempt, answer, fx),
            Event::Session(session) => self.on_session(*session, fx),
            Event::StreamFailed(id, trouble) => self.on_stream_failed(id, trouble, fx),
            Event::Answer(id, call, answer) => self.on_answer(id, call, answer, fx),
            Event::Credentials(id, answer) => self.on_credentials(id, answer, fx),
            Event::ClientStarted(run, started) => self.on_client_started(run, started, fx),
            Event::ClientEnded(run, end, tail) => self.on_client_ended(run, end, &tail, fx),
            Event::Recovered(recovered) => self.on_recovered(recovered, fx),
            Event::SecretsInMemory(why) => self.secrets_problem = Some(why),
        }
    }

    // ---- the person ----

    fn on_action(&mut self, action: Action, fx: &mut Effects) {
        self.note(format!("action {action:?}"));
        match action {
            Action::OpenWindow => fx.push(Effect::Window(Some(Page::Main))),
            Action::OpenSettings => fx.push(Effect::Window(Some(Page::Settings))),
            Action::Quit => self.on_quit(fx),
            // On the way out, nothing else is begun.
            _ if self.quitting.is_some() => {}
            Action::NewDesktop => self.on_new_desktop(fx),
            Action::Retry => self.on_retry(fx),
            Action::Cancel => self.on_cancel(fx),
            Action::Dismiss => self.on_dismiss(fx),
            Action::Reconnect => {
                if self.live().is_some_and(|l| l.can_reconnect()) {
                    self.open(Opening::Again, fx);
                }
            }
            Action::Keep => {
                let now = self.now.since_start;
                if let Some(live) = self.live()
                    && matches!(live.doing, Doing::Countdown { .. })
                {
                    live.hold_on(Held::Kept, now);
                }
            }
            Action::Destroy => match &self.phase {
                Phase::Live(live) if !matches!(live.doing, Doing::Ending(_)) => {
                    self.end(Why::Person, fx);
                }
                _ => {}
            },
        }
    }

    fn on_new_desktop(&mut self, fx: &mut Effects) {
        fx.push(Effect::Window(Some(Page::Main)));
        match &mut self.phase {
            Phase::Home(_) => self.begin(None, fx),
            Phase::Failed(t) => match &t.kind {
                TroubleKind::Create(key) => {
                    let key = key.clone();
                    self.begin(key, fx);
                }
                TroubleKind::NoClient | TroubleKind::Prepare => self.begin(None, fx),
                // A desktop may still live, or the address to ask is not known.
                _ => {}
            },
            Phase::Recovering(wanted) => *wanted = Wanted::Desktop,
            Phase::Creating(_) | Phase::Live(_) | Phase::Left => {}
        }
    }

    fn on_retry(&mut self, fx: &mut Effects) {
        match &self.phase {
            Phase::Failed(trouble) => match trouble.kind.clone() {
                TroubleKind::Create(key) => self.begin(key, fx),
                TroubleKind::NoClient | TroubleKind::Prepare => self.begin(None, fx),
                TroubleKind::Recover(_) => {
                    self.phase = Phase::Recovering(Wanted::Nothing);
                    fx.push(Effect::Recover);
                }
                _ => {}
            },
            Phase::Live(live) => match &live.doing {
                Doing::Trouble(t) if t.kind == TroubleKind::Destroy => self.end(Why::Person, fx),
                Doing::Trouble(_) => self.open(Opening::Again, fx),
                _ => {}
            },
            _ => {}
        }
    }

    fn on_cancel(&mut self, fx: &mut Effects) {
        let now = self.now.since_start;
        match &mut self.phase {
            Phase::Creating(creating) => match creating.step {
                CreatingStep::FindingClient => self.phase = Phase::Home(None),
                CreatingStep::Asking => {
                    creating.cancelled.get_or_insert(now);
                }
            },
            Phase::Recovering(wanted) => *wanted = Wanted::Nothing,
            Phase::Live(live) => match live.doing {
                Doing::Waiting | Doing::Opening(Opening::First) => self.end(Why::Cancelled, fx),
                // The person's work is in there: only the reconnection is called off.
                Doing::Opening(Opening::Again) => {
                    live.hold_on(Held::Kept, now);
                    fx.push(Effect::StopClient(self.run));
                }
                _ => {}
            },
            _ => {}
        }
    }

    fn on_dismiss(&mut self, fx: &mut Effects) {
        match &self.phase {
            Phase::Home(_) => self.phase = Phase::Home(None),
            Phase::Failed(trouble) => {
                let recover = trouble.kind == TroubleKind::Settings;
                self.phase = Phase::Home(None);
                if recover {
                    self.phase = Phase::Recovering(Wanted::Nothing);
                    fx.push(Effect::Recover);
                }
            }
            Phase::Live(live) => {
                if let Doing::Trouble(t) = &live.doing
                    && t.kind == TroubleKind::Destroy
                {
                    let notice = Message::new("notice-left-behind").text("session", live.access.id);
                    fx.push(Effect::Unfollow);
                    self.phase = Phase::Home(Some(notice));
                }
            }
            _ => {}
        }
    }

    fn on_quit(&mut self, fx: &mut Effects) {
        if self.quitting.is_some() {
            return self.leave_behind(fx);
        }
        self.quitting = Some(self.now.since_start);
        match &mut self.phase {
            Phase::Home(_) => self.exit(Exit::Clean, fx),
            Phase::Failed(trouble) => {
                let exit = match trouble.kind {
                    TroubleKind::Create(Some(_)) => Exit::LeftBehind(None),
                    TroubleKind::Recover(id) => Exit::LeftBehind(Some(id)),
                    _ => Exit::Clean,
                };
                self.exit(exit, fx);
            }
            Phase::Recovering(_) => self.exit(Exit::LeftBehind(None), fx),
            Phase::Creating(creating) => match creating.step {
                CreatingStep::FindingClient => self.exit(Exit::Clean, fx),
                CreatingStep::Asking => {
                    creating.cancelled.get_or_insert(self.now.since_start);
                }
            },
            Phase::Live(live) => match &live.doing {
                Doing::Ending(ending) if ending.acknowledged == Acknowledged::Yes => {
                    self.acknowledged_exit(fx);
                }
                Doing::Ending(_) => {}
                Doing::Waiting => self.end(Why::Cancelled, fx),
                _ => self.end(Why::Person, fx),
            },
            Phase::Left => {}
        }
    }

    fn exit(&mut self, exit: Exit, fx: &mut Effects) {
        self.phase = Phase::Left;
        fx.push(Effect::Exit(exit));
    }

    fn acknowledged_exit(&mut self, fx: &mut Effects) {
        if let Phase::Live(live) = &self.phase {
            let id = live.access.id;
            fx.push(Effect::Forget(id));
            self.exit(Exit::Acknowledged(id), fx);
        }
    }

    fn leave_behind(&mut self, fx: &mut Effects) {
        let exit = match &self.phase {
            Phase::Live(live) => Exit::LeftBehind(Some(live.access.id)),
            _ => Exit::LeftBehind(None),
        };
        self.exit(exit, fx);
    }

    // ---- making one ----

    /// Asks for a desktop; with the key of an earlier request whose outcome is not known.
    fn begin(&mut self, key: Option<String>, fx: &mut Effects) {
        self.attempt += 1;
        let fresh = || format!("{}-{}", self.launcher, self.attempt);
        self.phase = Phase::Creating(Creating {
            key: key.unwrap_or_else(fresh),
            since: self.now.since_start,
            step: CreatingStep::FindingClient,
            cancelled: None,
        });
        fx.push(Effect::FindClient(self.attempt, self.settings.rdp.clone()));
        fx.push(Effect::Window(Some(Page::Main)));
    }

    fn on_client_found(
        &mut self,
        attempt: u64,
        found: Result<String, ClientTrouble>,
        fx: &mut Effects,
    ) {
        let Phase::Creating(creating) = &mut self.phase else {
            return;
        };
        if attempt != self.attempt || creating.step != CreatingStep::FindingClient {
            return;
        }
        match found {
            Ok(client) => {
                creating.step = CreatingStep::Asking;
                fx.push(Effect::Create {
                    attempt,
                    orchestrator: self.settings.orchestrator.clone(),
                    key: creating.key.clone(),
                    user: self.user.clone(),
                });
                self.note(format!("RDP client: {client}"));
            }
            Err(trouble) => {
                let (headline, hint) = trouble.words();
                let details = trouble.to_string();
                self.fail(TroubleKind::NoClient, headline, hint, details, None, fx);
            }
        }
    }

    fn on_created(
        &mut self,
        attempt: u64,
        answer: Result<Box<(Access, Session)>, ApiTrouble>,
        fx: &mut Effects,
    ) {
        let creating = match &self.phase {
            Phase::Creating(c) if attempt == self.attempt => c.clone(),
            _ => {
                if let Ok(created) = answer {
                    fx.push(Effect::Destroy(created.0));
                }
                return;
            }
        };
        match answer {
            Ok(created) => {
                let (access, session) = *created;
                self.note(format!("session {}", access.id));
                fx.push(Effect::Remember(access.clone()));
                fx.push(Effect::Follow(access.clone()));
                self.phase = Phase::Live(Box::new(Live::new(
                    access,
                    session.clone(),
                    creating.since,
                    self.now.since_start,
                )));
                if creating.cancelled.is_some() {
                    self.end(Why::Cancelled, fx);
                }
                self.on_session(session, fx);
            }
            Err(trouble) if creating.cancelled.is_some() => {
                self.note(format!("the cancelled request failed: {trouble}"));
                if self.quitting.is_some() {
                    let exit = match trouble.certainty {
                        Certainty::NotDone => Exit::Clean,
                        Certainty::MayBeDone => Exit::LeftBehind(None),
                    };
                    self.exit(exit, fx);
                } else {
                    self.phase = Phase::Home(Some(Message::new("notice-cancelled")));
                }
            }
            Err(trouble) => {
                let key = match trouble.certainty {
                    Certainty::NotDone => None,
                    Certainty::MayBeDone => Some(creating.key),
                };
                let (headline, hint) = trouble.words(&self.settings.orchestrator);
                let details = trouble.to_string();
                self.fail(TroubleKind::Create(key), headline, hint, details, None, fx);
            }
        }
    }

    /// Tells of a failure; the desktop, if there is one, lives on and is held.
    fn fail(
        &mut self,
        kind: TroubleKind,
        headline: Message,
        hint: Message,
        details: String,
        session: Option<Box<Session>>,
        fx: &mut Effects,
    ) {
        self.note(format!("failed: {details}"));
        fx.push(Effect::Window(Some(Page::Main)));
        fx.push(Effect::Notify {
            title: headline.clone(),
            body: hint.clone(),
        });
        let now = self.now.since_start;
        let mut trouble = Trouble {
            kind,
            headline,
            hint,
            details,
            session,
        };
        match &mut self.phase {
            Phase::Live(live) if trouble.session.is_none() => {
                trouble.session = Some(Box::new(live.session.clone()));
                if trouble.kind == TroubleKind::Destroy {
                    live.hold = Hold::No;
                } else {
                    live.hold_from(now);
                }
                live.watch_for_others();
                live.doing = Doing::Trouble(trouble);
            }
            _ => self.phase = Phase::Failed(trouble),
        }
    }

    // ---- what the orchestrator says ----

    fn live(&mut self) -> Option<&mut Live> {
        match &mut self.phase {
            Phase::Live(live) => Some(live),
            _ => None,
        }
    }

    /// The live session, if it has this id.
    fn live_with(&mut self, id: SessionId) -> Option<&mut Live> {
        self.live().filter(|live| live.access.id == id)
    }

    fn on_session(&mut self, session: Session, fx: &mut Effects) {
        let Some(live) = self.live_with(session.id) else {
            return;
        };
        let phase = session.phase;
        let changed = live.session.phase != phase;
        live.stream = Ok(());
        live.follow_again = None;
        live.session = session;
        match phase {
            SessionPhase::Queued | SessionPhase::Preparing => {}
            SessionPhase::Ready | SessionPhase::Connected | SessionPhase::Disconnected => {
                self.on_usable(phase, fx);
            }
            SessionPhase::Ending => self.on_ending(fx),
            SessionPhase::Ended | SessionPhase::Failed => self.on_final(fx),
        }
        if changed {
            self.note(format!("session is {phase:?}"));
        }
    }

    fn on_usable(&mut self, phase: SessionPhase, fx: &mut Effects) {
        let now = self.now.since_start;
        let Some(live) = self.live() else { return };
        let connected = phase == SessionPhase::Connected;
        match &live.doing {
            Doing::Waiting => self.open(Opening::First, fx),
            Doing::Open if connected => {
                // The RDP connection holds the desktop from here on.
                live.release(fx);
                if !live.run_connected {
                    live.run_connected = true;
                    fx.push(Effect::Window(None));
                }
            }
            // The client tries again by itself.
            Doing::Open if live.run_connected => {
                live.foreign_connection_possible = true;
                live.hold_from(now);
            }
            Doing::ByHand if phase == SessionPhase::Disconnected => {
                live.doing = Doing::Held(Held::Disconnected);
                live.watch_for_others();
                fx.push(Effect::Window(Some(Page::Main)));
                fx.push(Effect::Notify {
                    title: Message::new("held-disconnected"),
                    body: Message::new("notify-disconnected-body"),
                });
            }
            Doing::Countdown { .. } | Doing::Held(_) | Doing::Trouble(_)
                if connected && live.foreign_connection_possible =>
            {
                live.doing = Doing::ByHand;
                live.release(fx);
                live.next_beat = now;
            }
            _ if !connected => live.foreign_connection_possible = true,
            _ => {}
        }
    }

    /// It ends without us having asked, or after we asked.
    fn on_ending(&mut self, fx: &mut Effects) {
        let now = self.now.since_start;
        let run = self.run;
        let Some(live) = self.live() else { return };
        if let Doing::Ending(ending) = &mut live.doing {
            ending.acknowledged = Acknowledged::Yes;
        } else if !matches!(&live.doing, Doing::Trouble(t) if t.kind == TroubleKind::Destroy) {
            live.doing = Doing::Ending(Ending {
                since: now,
                why: Why::Orchestrator,
                attempts: 0,
                next_attempt: None,
                acknowledged: Acknowledged::Yes,
            });
            live.hold = Hold::No;
            let title = show::ended_notice(live.session.end_reason);
            fx.push(Effect::StopClient(run));
            fx.push(Effect::Window(Some(Page::Main)));
            fx.push(Effect::Notify {
                title,
                body: Message::new("notify-ending-body"),
            });
        }
        if self.quitting.is_some() {
            self.acknowledged_exit(fx);
        }
    }

    fn on_final(&mut self, fx: &mut Effects) {
        let run = self.run;
        let Some(live) = self.live() else { return };
        let (why, told) = match &live.doing {
            Doing::Ending(ending) => (ending.why, ending.why == Why::Orchestrator),
            _ => (Why::Orchestrator, false),
        };
        let session = Box::new(live.session.clone());
        fx.push(Effect::StopClient(run));
        fx.push(Effect::Unfollow);
        fx.push(Effect::Forget(session.id));
        if self.quitting.is_some() {
            return self.exit(Exit::Clean, fx);
        }
        match (why, &session.failure) {
            (Why::Orchestrator, Some(failure)) => {
                let headline = Message::new("error-prepare");
                let hint =
                    Message::new("error-prepare-hint").text("detail", &failure.problem.detail);
                let details = format!("{:?}: {}", failure.stage, failure.problem);
                let failed = TroubleKind::Prepare;
                self.fail(failed, headline, hint, details, Some(session), fx);
            }
            (Why::Orchestrator, None) => {
                let notice = show::ended_notice(session.end_reason);
                if !told {
                    fx.push(Effect::Window(Some(Page::Main)));
                    fx.push(Effect::Notify {
                        title: notice.clone(),
                        body: Message::new("notify-ended-body"),
                    });
                }
                self.phase = Phase::Home(Some(notice));
            }
            (Why::Cancelled, _) => {
                self.phase = Phase::Home(Some(Message::new("notice-cancelled")));
            }
            (Why::Person, _) => {
                self.phase = Phase::Home(Some(Message::new("notice-destroyed")));
            }
        }
    }

    /// The orchestrator does not know the session, or not that it is ours.
    fn on_gone(&mut self, fx: &mut Effects) {
        let run = self.run;
        let Some(live) = self.live() else { return };
        let asked = matches!(&live.doing, Doing::Ending(e) if e.why != Why::Orchestrator);
        let id = live.access.id;
        fx.push(Effect::StopClient(run));
        fx.push(Effect::Unfollow);
        fx.push(Effect::Forget(id));
        if self.quitting.is_some() {
            return self.exit(Exit::Clean, fx);
        }
        let notice = if asked {
            "notice-destroyed"
        } else {
            fx.push(Effect::Window(Some(Page::Main)));
            "notice-gone"
        };
        self.phase = Phase::Home(Some(Message::new(notice)));
    }

    fn on_stream_failed(&mut self, id: SessionId, trouble: ApiTrouble, fx: &mut Effects) {
        let now = self.now.since_start;
        let Some(live) = self.live_with(id) else {
            return;
        };
        if trouble.says_gone() {
            return self.on_gone(fx);
        }
        if !trouble.retryable {
            live.follow_again = Some(now + HEARTBEAT);
        }
        let line = format!("no news: {trouble}");
        let first = live.stream.is_ok();
        live.stream = Err(trouble);
        if first {
            self.note(line);
        }
    }

    fn on_answer(
        &mut self,
        id: SessionId,
        call: Call,
        answer: Result<Box<Session>, ApiTrouble>,
        fx: &mut Effects,
    ) {
        let now = self.now.since_start;
        let held_until = self.now.wall.timestamp() + Duration::from_secs(u64::from(HOLD_S));
        let Some(live) = self.live_with(id) else {
            return;
        };
        match answer {
            Ok(session) => {
                // The stream tells the phases in their order; an answer may be older than the last news.
                live.session.ends_at = session.ends_at;
                live.session.expires_at = session.expires_at;
                live.session.last_activity = session.last_activity;
                if let (Call::Keep, Hold::Renewing { until, .. }) = (call, &mut live.hold) {
                    *until = session.ends_at.filter(|end| *end < held_until);
                }
                if call == Call::Destroy
                    && let Doing::Ending(ending) = &mut live.doing
                {
                    ending.acknowledged = Acknowledged::Yes;
                    ending.next_attempt = None;
                    if self.quitting.is_some() && !session.phase.is_final() {
                        return self.acknowledged_exit(fx);
                    }
                }
                if session.phase.is_final() || session.phase == SessionPhase::Ending {
                    self.on_session(*session, fx);
                }
            }
            Err(trouble) if trouble.says_gone() => self.on_gone(fx),
            Err(trouble) => match call {
                Call::Beat => {}
                Call::Keep => {
                    if let Hold::Renewing { next, .. } = &mut live.hold {
                        if trouble.retryable {
                            *next = now + Duration::from_secs(5);
                        } else {
                            live.hold = Hold::Refused;
                        }
                    }
                }
                Call::Destroy => self.on_destroy_failed(&trouble, fx),
            },
        }
    }

    fn on_destroy_failed(&mut self, trouble: &ApiTrouble, fx: &mut Effects) {
        let now = self.now.since_start;
        let quitting = self.quitting.is_some();
        let Some(live) = self.live() else { return };
        let Doing::Ending(ending) = &mut live.doing else {
            return;
        };
        if trouble.retryable && (quitting || ending.attempts < DESTROY_ATTEMPTS) {
            let pause = Duration::from_millis(500 << ending.attempts.min(4));
            ending.next_attempt = Some(now + pause);
        } else if quitting {
            self.leave_behind(fx);
        } else {
            self.destroy_failed(trouble.to_string(), fx);
        }
    }

    fn destroy_failed(&mut self, details: String, fx: &mut Effects) {
        let Some(live) = self.live() else { return };
        let hint = Message::new("error-destroy-hint").text("session", live.access.id);
        let headline = Message::new("error-destroy");
        self.fail(TroubleKind::Destroy, headline, hint, details, None, fx);
    }

    // ---- the RDP client ----

    fn open(&mut self, opening: Opening, fx: &mut Effects) {
        let now = self.now.since_start;
        if let Some(live) = self.live() {
            live.doing = Doing::Opening(opening);
            if opening == Opening::Again {
                // A login can take longer than the orchestrator's idle rule allows.
                live.hold_from(now);
            }
            fx.push(Effect::FetchCredentials(live.access.clone()));
        }
    }

    fn on_credentials(
        &mut self,
        id: SessionId,
        answer: Result<Credentials, ApiTrouble>,
        fx: &mut Effects,
    ) {
        let run = self.run + 1;
        let options = self.settings.rdp.clone();
        let Some(live) = self.live_with(id) else {
            return;
        };
        if !matches!(live.doing, Doing::Opening(_)) {
            return;
        }
        match (answer, &live.session.rdp) {
            (Ok(credentials), Some(endpoint)) => {
                let name = live.session.desktop.map(|d| d.to_string());
                fx.push(Effect::StartClient {
                    run,
                    endpoint: endpoint.clone(),
                    credentials,
                    title: name.unwrap_or_else(|| "Mayfly".to_owned()),
                    options,
                });
                live.run_connected = false;
                self.run = run;
            }
            (Ok(_), None) => {
                let (headline, hint) = (
                    Message::new("error-credentials"),
                    Message::new("error-credentials-hint"),
                );
                let details = "the session has no RDP address".to_owned();
                self.fail(TroubleKind::Client, headline, hint, details, None, fx);
            }
            (Err(trouble), _) if trouble.says_gone() => self.on_gone(fx),
            (Err(trouble), _) => {
                let (headline, hint) = (
                    Message::new("error-credentials"),
                    Message::new("error-credentials-hint"),
                );
                let details = trouble.to_string();
                self.fail(TroubleKind::Client, headline, hint, details, None, fx);
            }
        }
    }

    fn on_client_started(
        &mut self,
        run: u64,
        started: Result<(), ClientTrouble>,
        fx: &mut Effects,
    ) {
        let now = self.now.since_start;
        if run != self.run {
            return;
        }
        let Some(live) = self.live() else { return };
        let Doing::Opening(opening) = live.doing else {
            return;
        };
        match started {
            Ok(()) => {
                live.doing = Doing::Open;
                live.client = RdpClientState::Running;
                live.next_beat = now;
                live.fraction = 1.0;
                if opening == Opening::First {
                    fx.push(Effect::Notify {
                        title: Message::new("notify-ready"),
                        body: Message::new("notify-ready-body"),
                    });
                }
                self.note("RDP client started");
            }
            Err(trouble) => {
                let (headline, hint) = trouble.words();
                let details = trouble.to_string();
                self.fail(TroubleKind::Client, headline, hint, details, None, fx);
            }
        }
    }

    fn on_client_ended(&mut self, run: u64, end: ClientEnd, tail: &str, fx: &mut Effects) {
        let now = self.now.since_start;
        if run != self.run {
            return;
        }
        self.note(format!("RDP client ended: {end}"));
        let Some(live) = self.live() else { return };
        live.client = RdpClientState::Closed;
        live.next_beat = now;
        // A client of ours that ends on the way out, or after its reconnection was called off, is no news.
        if !matches!(live.doing, Doing::Open | Doing::Opening(_)) {
            return;
        }
        // Of a client that took over a connection quickly enough, no change was told.
        let connected = live.run_connected || live.session.phase == SessionPhase::Connected;
        match end {
            ClientEnd::Closed => self.count_down(Message::new("reason-closed"), fx),
            ClientEnd::LoggedOff => self.count_down(Message::new("reason-logged-off"), fx),
            ClientEnd::IdleTimeout => self.count_down(Message::new("reason-timed-out"), fx),
            ClientEnd::Replaced => self.hold(Held::Replaced, fx),
            // After a cut FreeRDP tries again by itself and ends with what befell its last try.
            ClientEnd::Lost | ClientEnd::Name if connected => self.hold(Held::Lost, fx),
            ClientEnd::Killed(_) if connected => self.hold(Held::Crashed, fx),
            _ => {
                let (headline, hint) = end.words();
                let kind = if end == ClientEnd::Certificate {
                    TroubleKind::Certificate
                } else {
                    TroubleKind::Client
                };
                let details = format!("RDP client: {end}\n{tail}");
                self.fail(kind, headline, hint, details, None, fx);
            }
        }
    }

    fn count_down(&mut self, reason: Message, fx: &mut Effects) {
        let now = self.now.since_start;
        let chosen = self.settings.countdown;
        let Some(live) = self.live() else { return };
        let total = length(chosen);
        // The orchestrator's own idle rule is 60 s by default.
        if matches!(chosen, Countdown::TwoMinutes | Countdown::Never) {
            live.hold_from(now);
        }
        live.watch_for_others();
        live.doing = Doing::Countdown {
            reason: reason.clone(),
            deadline: total.map(|total| now + total),
            total,
        };
        fx.push(Effect::Window(Some(Page::Main)));
        fx.push(Effect::Notify {
            title: reason,
            body: match total {
                Some(total) => Message::new("notify-countdown-body")
                    .number("seconds", u32::try_from(total.as_secs()).unwrap_or(0)),
                None => Message::new("notify-never-body"),
            },
        });
    }

    fn hold(&mut self, why: Held, fx: &mut Effects) {
        let now = self.now.since_start;
        let Some(live) = self.live() else { return };
        live.hold_on(why, now);
        fx.push(Effect::Window(Some(Page::Main)));
        fx.push(Effect::Notify {
            title: show::held_headline(why),
            body: Message::new("notify-held-body"),
        });
    }

    // ---- ending one ----

    fn end(&mut self, why: Why, fx: &mut Effects) {
        let (now, run) = (self.now.since_start, self.run);
        let Some(live) = self.live() else { return };
        live.doing = Doing::Ending(Ending {
            since: now,
            why,
            attempts: 1,
            next_attempt: None,
            acknowledged: Acknowledged::No,
        });
        live.hold = Hold::No;
        fx.push(Effect::StopClient(run));
        fx.push(Effect::Destroy(live.access.clone()));
        self.note("destroy");
    }

    // ---- after a crash ----

    fn on_recovered(&mut self, recovered: Recovered, fx: &mut Effects) {
        let Phase::Recovering(wanted) = self.phase else {
            return;
        };
        let now = self.now.since_start;
        let notice = match recovered {
            Recovered::Nothing => None,
            Recovered::SecretLost(id) => {
                fx.push(Effect::Forget(id));
                Some(Message::new("notice-secret-lost").text("session", id))
            }
            Recovered::Gone(id) => {
                fx.push(Effect::Forget(id));
                Some(Message::new("notice-ended-meanwhile"))
            }
            Recovered::Unknown(id, trouble) => {
                let headline = Message::new("error-recover");
                let hint =
                    Message::new("error-recover-hint").text("address", &self.settings.orchestrator);
                let details = trouble.to_string();
                return self.fail(TroubleKind::Recover(id), headline, hint, details, None, fx);
            }
            Recovered::Found(access, session) => {
                fx.push(Effect::Window(Some(Page::Main)));
                fx.push(Effect::Follow(access.clone()));
                let mut live = Live::new(access, (*session).clone(), now, now);
                live.next_beat = now;
                match session.phase {
                    SessionPhase::Connected => live.doing = Doing::ByHand,
                    SessionPhase::Ready | SessionPhase::Disconnected => {
                        live.hold_on(Held::Recovered, now);
                    }
                    _ => {}
                }
                self.phase = Phase::Live(Box::new(live));
                return self.on_session(*session, fx);
            }
        };
        self.phase = Phase::Home(notice);
        if wanted == Wanted::Desktop {
            self.begin(None, fx);
        }
    }

    // ---- time ----

    fn on_wake(&mut self, fx: &mut Effects) {
        let now = self.now.since_start;
        self.note("woke from sleep");
        let Some(live) = self.live() else { return };
        live.next_beat = now;
        fx.push(Effect::Follow(live.access.clone()));
        if let Hold::Renewing { next, .. } = &mut live.hold {
            *next = now;
        }
        // A countdown that ran out unseen would be unfair.
        if let Doing::Countdown {
            deadline, total, ..
        } = &mut live.doing
        {
            *deadline = total.map(|total| now + total);
        }
    }

    fn on_time(&mut self, fx: &mut Effects) {
        let now = self.now.since_start;
        if self.quitting.is_some_and(|since| now >= since + QUIT_BOUND) {
            return self.leave_behind(fx);
        }
        let wall = self.now.wall.timestamp();
        let Some(live) = self.live() else { return };
        live.fraction = live.fraction.max(show::fraction(live, wall));
        if live.follow_again.is_some_and(|at| now >= at) {
            live.follow_again = None;
            fx.push(Effect::Follow(live.access.clone()));
        }
        match &mut live.doing {
            Doing::Countdown {
                deadline: Some(deadline),
                ..
            } if now >= *deadline => return self.end(Why::Person, fx),
            Doing::Ending(ending) => {
                if ending.next_attempt.is_some_and(|at| now >= at) {
                    ending.next_attempt = None;
                    ending.attempts += 1;
                    fx.push(Effect::Destroy(live.access.clone()));
                }
                if now >= ending.since + DESTROY_PATIENCE {
                    let seconds = DESTROY_PATIENCE.as_secs();
                    self.destroy_failed(format!("not gone after {seconds} s"), fx);
                }
                return;
            }
            Doing::Trouble(t) if t.kind == TroubleKind::Destroy => return,
            _ => {}
        }
        if now >= live.next_beat {
            live.next_beat = now + HEARTBEAT;
            fx.push(Effect::Beat(live.access.clone(), live.client));
        }
        if let Hold::Renewing { next, .. } = &mut live.hold
            && now >= *next
        {
            *next = now + HOLD_RENEWAL;
            fx.push(Effect::Keep(live.access.clone(), HOLD_S));
        }
        live.warn(wall, fx);
    }
}

impl Live {
    fn new(access: Access, session: Session, since: Duration, now: Duration) -> Self {
        Self {
            access,
            session,
            since,
            fraction: 0.0,
            stream: Ok(()),
            follow_again: None,
            doing: Doing::Waiting,
            next_beat: now + HEARTBEAT,
            hold: Hold::No,
            client: RdpClientState::NotStarted,
            run_connected: false,
            foreign_connection_possible: false,
            warnings: 0,
        }
    }

    fn can_reconnect(&self) -> bool {
        match &self.doing {
            Doing::Countdown { .. } | Doing::Held(_) | Doing::ByHand => true,
            Doing::Trouble(trouble) => trouble.kind != TroubleKind::Destroy,
            Doing::Waiting | Doing::Opening(_) | Doing::Open | Doing::Ending(_) => false,
        }
    }

    fn hold_on(&mut self, why: Held, now: Duration) {
        self.hold_from(now);
        self.watch_for_others();
        self.doing = Doing::Held(why);
    }

    fn hold_from(&mut self, now: Duration) {
        if self.hold == Hold::No {
            self.hold = Hold::Renewing {
                next: now,
                until: None,
            };
        }
    }

    /// Gives up the hold.
    fn release(&mut self, fx: &mut Effects) {
        if std::mem::replace(&mut self.hold, Hold::No) != Hold::No {
            fx.push(Effect::Keep(self.access.clone(), 0));
        }
    }

    /// From here on our client does not run: a connection that begins now is somebody else's. One that is still
    /// reported may be the echo of ours.
    fn watch_for_others(&mut self) {
        self.foreign_connection_possible = self.session.phase != SessionPhase::Connected;
    }

    /// Warns five minutes and one minute before an end that the launcher cannot put off.
    fn warn(&mut self, wall: Timestamp, fx: &mut Effects) {
        let end = show::unavoidable_end(self);
        let left = end.duration_since(wall).as_secs();
        let due = match left {
            ..=60 => 2,
            61..=300 => 1,
            _ => 0,
        };
        if due > self.warnings {
            self.warnings = due;
            let minutes = if due == 2 { 1 } else { 5 };
            fx.push(Effect::Notify {
                title: Message::new("notify-expiring").number("minutes", minutes),
                body: Message::new("notify-expiring-body"),
            });
        } else if due == 0 {
            self.warnings = 0;
        }
    }
}

fn length(countdown: Countdown) -> Option<Duration> {
    match countdown {
        Countdown::TenSeconds => Some(Duration::from_secs(10)),
        Countdown::ThirtySeconds => Some(Duration::from_secs(30)),
        Countdown::TwoMinutes => Some(Duration::from_secs(120)),
        Countdown::Never => None,
    }
}
