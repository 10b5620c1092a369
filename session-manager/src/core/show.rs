//! What a state looks like: view, menu, icon. Pure functions of the state.

use super::{
    Acknowledged, Creating, CreatingStep, Doing, Ending, Held, Hold, Live, Opening, Phase, State,
    Trouble, TroubleKind, Why,
};
use crate::view::{Action, MenuEntry, Message, Screen, StageStatus, StageView, TrayIcon, View};
use jiff::Timestamp;
use mayfly_api::{EndReason, Session, SessionPhase, Setback, Stage, StageName, StageProgress};
use std::time::Duration;

/// Weight of a stage without history, in milliseconds.
fn usual(stage: StageName) -> u32 {
    match stage {
        StageName::Queued => 200,
        StageName::Creating | StageName::Destroying => 1_000,
        StageName::Booting => 15_000,
        StageName::Configuring => 2_000,
        StageName::Connecting => 1_000,
    }
}

/// The part of the bar that opening the client takes.
const OPENING: f32 = 0.04;

/// The last run of a stage: a desktop that was begun anew has several.
fn last(session: &Session, name: StageName) -> Option<&Stage> {
    session.stages.iter().rev().find(|s| s.name == name)
}

fn since_ms(wall: Timestamp, then: Timestamp) -> u64 {
    u64::try_from(wall.duration_since(then).as_millis()).unwrap_or(0)
}

/// Part done, 0 to 1. Within a stage it slows down as it outlasts its usual time, and never reaches the next.
pub(super) fn fraction(live: &Live, wall: Timestamp) -> f32 {
    if !matches!(live.doing, Doing::Waiting) {
        return 1.0 - OPENING;
    }
    let (mut done, mut all) = (0.0, 0.0);
    for name in StageName::CREATE {
        let stage = last(&live.session, name);
        let expected = stage.and_then(|s| s.expected_ms);
        let weight = expected.map_or(f64::from(usual(name)), |ms| {
            f64::from(u32::try_from(ms).unwrap_or(u32::MAX)).max(1.0)
        });
        all += weight;
        done += match stage {
            Some(s) if s.duration_ms.is_some() => weight,
            Some(s) => {
                let elapsed = u32::try_from(since_ms(wall, s.started_at)).unwrap_or(u32::MAX);
                weight * (1.0 - (-1.5 * f64::from(elapsed) / weight).exp())
            }
            None => 0.0,
        };
    }
    #[expect(clippy::cast_possible_truncation, reason = "between 0 and 1")]
    let part = (done / all) as f32;
    part * (1.0 - OPENING)
}

/// When the session ends whatever the launcher does.
pub(super) fn unavoidable_end(live: &Live) -> Timestamp {
    let capped = match live.hold {
        Hold::Renewing { until, .. } => until,
        Hold::No | Hold::Refused => None,
    };
    let end = live.session.expires_at;
    capped.map_or(end, |capped| capped.min(end))
}

fn stages(session: &Session, wall: Timestamp, failed: Option<StageName>) -> Vec<StageView> {
    StageName::CREATE
        .into_iter()
        .map(|name| {
            let stage = last(session, name);
            let status = match stage {
                _ if failed == Some(name) => StageStatus::Failed,
                None => StageStatus::Pending,
                Some(stage) if stage.duration_ms.is_some() => StageStatus::Done,
                Some(_) => StageStatus::Current,
            };
            let running = |stage: &Stage| match status {
                StageStatus::Current => Some(since_ms(wall, stage.started_at) / 1000 * 1000),
                _ => None,
            };
            StageView {
                name,
                status,
                elapsed_ms: stage.and_then(|s| s.duration_ms.or_else(|| running(s))),
            }
        })
        .collect()
}

fn pending() -> Vec<StageView> {
    StageName::CREATE
        .into_iter()
        .map(|name| StageView {
            name,
            status: StageStatus::Pending,
            elapsed_ms: None,
        })
        .collect()
}

fn stage_words(session: &Session) -> Message {
    let current = session.stages.last().map(|s| s.name);
    Message::new(match current.unwrap_or(StageName::Queued) {
        StageName::Queued => "stage-queued",
        StageName::Creating => "stage-creating",
        StageName::Booting => "stage-booting",
        StageName::Configuring => "stage-configuring",
        StageName::Connecting => "stage-connecting",
        StageName::Destroying => "stage-destroying",
    })
}

/// Words for what the stage under way is at.
fn detail(session: &Session) -> Option<Message> {
    Some(match session.stages.last()?.progress.as_ref()? {
        StageProgress::NoRoom => Message::new("detail-no-room"),
        StageProgress::MadeAnew { because } => Message::new(match because {
            Setback::Interrupted => "detail-anew-interrupted",
            Setback::InTheWay => "detail-anew-in-the-way",
            Setback::TookTooLong => "detail-anew-too-long",
        }),
        StageProgress::WaitingForStorage { place } => {
            Message::new("detail-storage").number("place", *place)
        }
        StageProgress::Cloning => Message::new("detail-cloning"),
        StageProgress::WaitingForAddress => Message::new("detail-address"),
        StageProgress::FirstBoot => Message::new("detail-first-boot"),
        StageProgress::Task { number, name } => Message::new("detail-task")
            .number("number", *number)
            .text("name", name),
        StageProgress::Unknown => return None,
    })
}

/// Words for a session that ends or ended by itself.
pub(super) fn ended_notice(reason: Option<EndReason>) -> Message {
    Message::new(match reason {
        Some(EndReason::Requested) => "notice-requested",
        Some(EndReason::Idle) => "notice-idle",
        Some(EndReason::NeverConnected) => "notice-never-connected",
        Some(EndReason::Abandoned) => "notice-abandoned",
        Some(EndReason::Expired) => "notice-expired",
        Some(EndReason::MachineLost) => "notice-machine-lost",
        Some(EndReason::Failed) => "notice-failed",
        None => "notice-gone",
    })
}

/// Words for a desktop without a client.
pub(super) fn held_headline(why: Held) -> Message {
    Message::new(match why {
        Held::Kept => "held-kept",
        Held::Lost => "held-lost",
        Held::Crashed => "held-crashed",
        Held::Replaced => "held-replaced",
        Held::Disconnected => "held-disconnected",
        Held::Recovered => "held-recovered",
    })
}

fn desktop(session: &Session) -> String {
    session.desktop.map_or_else(String::new, |d| d.to_string())
}

impl State {
    fn millis_since(&self, then: Duration) -> u64 {
        let elapsed = self.now.since_start.saturating_sub(then);
        elapsed.as_secs() * 1000
    }

    fn clock(&self, at: Timestamp) -> String {
        let at = at.to_zoned_datetime(self.now.wall.time_zone().clone());
        at.strftime("%H:%M").to_string()
    }

    fn ending_headline(&self, why: Why) -> Message {
        Message::new(match why {
            _ if self.quitting.is_some() => "ending-quitting",
            Why::Cancelled => "ending-cancelled",
            Why::Person | Why::Orchestrator => "ending-destroying",
        })
    }

    fn creating_screen(&self, creating: &Creating) -> Screen {
        if let Some(since) = creating.cancelled {
            return Screen::Ending {
                headline: self.ending_headline(Why::Cancelled),
                elapsed_ms: self.millis_since(since),
            };
        }
        Screen::Progress {
            headline: Message::new(match creating.step {
                CreatingStep::FindingClient => "progress-checking",
                CreatingStep::Asking => "progress-asking",
            }),
            detail: None,
            stages: pending(),
            fraction: 0.0,
            elapsed_ms: self.millis_since(creating.since),
            expected_ms: None,
            hint: None,
        }
    }

    fn progress_hint(&self, live: &Live) -> Option<Message> {
        let session = &live.session;
        if live.stream.is_err() {
            return Some(Message::new("hint-no-answer").text("address", &live.access.orchestrator));
        }
        if let (SessionPhase::Queued, Some(place)) = (session.phase, session.queue_position) {
            return Some(Message::new("hint-queue").number("place", place));
        }
        let elapsed = self.now.since_start.saturating_sub(live.since);
        let expected = session.expected_ready_ms.map(Duration::from_millis)?;
        (matches!(live.doing, Doing::Waiting) && elapsed > expected * 2)
            .then(|| Message::new("hint-longer"))
    }

    fn hold_hint(&self, live: &Live) -> Option<Message> {
        if live.stream.is_err() {
            return Some(Message::new("hint-no-answer").text("address", &live.access.orchestrator));
        }
        let until = match live.hold {
            Hold::Renewing { .. } => unavoidable_end(live),
            Hold::No | Hold::Refused => live.session.ends_at.unwrap_or(live.session.expires_at),
        };
        let id = match live.hold {
            Hold::Renewing { .. } => "hint-kept-until",
            Hold::No | Hold::Refused => "hint-ends-at",
        };
        Some(Message::new(id).text("time", self.clock(until)))
    }

    fn live_screen(&self, live: &Live) -> Screen {
        let session = &live.session;
        let wall = self.now.wall.timestamp();
        let address = session.rdp.as_ref().map(|rdp| rdp.address.to_string());
        match &live.doing {
            Doing::Waiting | Doing::Opening(_) => Screen::Progress {
                headline: match live.doing {
                    Doing::Opening(_) => Message::new("progress-opening"),
                    _ => stage_words(session),
                },
                detail: detail(session),
                stages: stages(session, wall, None),
                fraction: live.fraction,
                elapsed_ms: self.millis_since(live.since),
                expected_ms: session.expected_ready_ms,
                hint: self.progress_hint(live),
            },
            Doing::Open => Screen::InUse {
                headline: Message::new("in-use").text("desktop", desktop(session)),
                hint: live.stream.is_err().then(|| {
                    Message::new("hint-no-answer").text("address", &live.access.orchestrator)
                }),
                address,
                client_open: true,
            },
            Doing::ByHand => Screen::InUse {
                headline: Message::new("in-use-by-hand").text("desktop", desktop(session)),
                hint: None,
                address,
                client_open: false,
            },
            Doing::Held(why) => Screen::InUse {
                headline: held_headline(*why),
                hint: self.hold_hint(live),
                address,
                client_open: false,
            },
            Doing::Countdown {
                reason,
                deadline,
                total,
            } => {
                let seconds = |d: Duration| {
                    let up = d + Duration::from_millis(999);
                    u32::try_from(up.as_secs()).unwrap_or(u32::MAX)
                };
                Screen::Countdown {
                    reason: reason.clone(),
                    remaining_s: deadline.map(|d| seconds(d.saturating_sub(self.now.since_start))),
                    total_s: total.map(seconds),
                }
            }
            Doing::Trouble(trouble) => self.error_screen(trouble, address),
            Doing::Ending(Ending { since, why, .. }) => Screen::Ending {
                headline: self.ending_headline(*why),
                elapsed_ms: self.millis_since(*since),
            },
        }
    }

    fn error_screen(&self, trouble: &Trouble, address: Option<String>) -> Screen {
        let wall = self.now.wall.timestamp();
        let session = trouble.session.as_deref();
        let failed = session
            .and_then(|s| s.failure.as_ref())
            .map(|failure| failure.stage);
        let actions = match trouble.kind {
            TroubleKind::Create(_) | TroubleKind::Prepare | TroubleKind::Recover(_) => {
                vec![Action::Retry, Action::Dismiss]
            }
            TroubleKind::NoClient => vec![Action::Retry, Action::OpenSettings, Action::Dismiss],
            TroubleKind::Settings => vec![Action::OpenSettings, Action::Dismiss],
            TroubleKind::Client => vec![Action::Retry, Action::OpenSettings, Action::Destroy],
            TroubleKind::Certificate => vec![Action::Destroy, Action::Retry],
            TroubleKind::Destroy => vec![Action::Retry, Action::Dismiss],
        };
        Screen::Error {
            headline: trouble.headline.clone(),
            hint: trouble.hint.clone(),
            // All of them done tell nothing of what failed later, and take the room of what to do.
            stages: match (session, failed) {
                (Some(session), Some(_)) => stages(session, wall, failed),
                _ => Vec::new(),
            },
            diagnostics: self.diagnostics(trouble),
            actions,
            // Nobody is sent by hand to a machine that is not the one announced.
            address: address.filter(|_| {
                !matches!(
                    trouble.kind,
                    TroubleKind::Certificate | TroubleKind::Destroy
                )
            }),
        }
    }

    /// Plain text in English for whoever helps. Nothing in it is secret: secrets never get into trouble or log.
    fn diagnostics(&self, trouble: &Trouble) -> String {
        let mut lines = vec![
            format!(
                "Mayfly {} on {} {}",
                env!("CARGO_PKG_VERSION"),
                std::env::consts::OS,
                std::env::consts::ARCH
            ),
            format!("time: {}", self.now.wall.strftime("%Y-%m-%d %H:%M:%S %:z")),
            format!("orchestrator: {}", self.settings.orchestrator),
        ];
        if let Some(session) = &trouble.session {
            lines.push(format!("session: {} ({:?})", session.id, session.phase));
            lines.push(format!("desktop: {}", desktop(session)));
            for stage in &session.stages {
                let took = match stage.duration_ms {
                    Some(ms) => format!("{ms} ms"),
                    None => "not finished".to_owned(),
                };
                lines.push(format!("stage {:?}: {took}", stage.name));
            }
        }
        lines.push(format!("failed: {:?}", trouble.kind));
        lines.push(trouble.details.trim_end().to_owned());
        lines.extend(self.log.iter().cloned());
        lines.join("\n")
    }
}

/// The picture for the window.
#[must_use]
pub fn view(state: &State) -> View {
    let screen = match &state.phase {
        Phase::Home(notice) => Screen::Home {
            notice: notice.clone(),
        },
        Phase::Recovering(_) => Screen::Home {
            notice: Some(Message::new("notice-looking")),
        },
        Phase::Creating(creating) => state.creating_screen(creating),
        Phase::Live(live) => state.live_screen(live),
        Phase::Failed(trouble) => state.error_screen(trouble, None),
        Phase::Left => Screen::Home { notice: None },
    };
    View {
        screen,
        language: state.language().to_owned(),
        secrets_notice: state
            .secrets_problem
            .as_ref()
            .map(|why| Message::new("secrets-in-memory").text("reason", why)),
    }
}

/// The lines of the tray menu.
#[must_use]
pub fn menu(state: &State) -> Vec<MenuEntry> {
    let item = |id: &str, action| MenuEntry::Item {
        label: Message::new(id),
        action,
    };
    let reconnect = || item("action-reconnect", Action::Reconnect);
    let destroy = || item("action-destroy", Action::Destroy);
    let retry = || item("action-retry", Action::Retry);
    let (status, verbs, quit) = match &state.phase {
        Phase::Home(_) | Phase::Recovering(_) | Phase::Left => (
            Message::new("menu-no-desktop"),
            vec![item("action-new-desktop", Action::NewDesktop)],
            "menu-quit",
        ),
        Phase::Failed(trouble) => (trouble.headline.clone(), vec![retry()], "menu-quit"),
        Phase::Creating(creating) if creating.cancelled.is_some() => {
            (state.ending_headline(Why::Cancelled), vec![], "menu-quit")
        }
        Phase::Creating(_) => (
            Message::new("menu-preparing"),
            vec![item("action-cancel", Action::Cancel)],
            "menu-quit-cancel",
        ),
        Phase::Live(live) => {
            let name = desktop(&live.session);
            let (status, verbs) = match &live.doing {
                Doing::Waiting => (
                    stage_words(&live.session),
                    vec![item("action-cancel", Action::Cancel)],
                ),
                Doing::Opening(Opening::First | Opening::Again) => (
                    Message::new("progress-opening"),
                    vec![item("action-cancel", Action::Cancel)],
                ),
                Doing::Open => (
                    Message::new("in-use").text("desktop", name),
                    vec![destroy()],
                ),
                Doing::ByHand => (
                    Message::new("in-use-by-hand").text("desktop", name),
                    vec![reconnect(), destroy()],
                ),
                Doing::Countdown { .. } => (
                    Message::new("menu-countdown"),
                    vec![reconnect(), item("action-keep", Action::Keep), destroy()],
                ),
                Doing::Held(why) => (held_headline(*why), vec![reconnect(), destroy()]),
                Doing::Trouble(t) if t.kind == TroubleKind::Destroy => {
                    (t.headline.clone(), vec![retry()])
                }
                Doing::Trouble(t) => (t.headline.clone(), vec![retry(), destroy()]),
                Doing::Ending(ending) => (state.ending_headline(ending.why), vec![]),
            };
            let quit = match &live.doing {
                Doing::Waiting => "menu-quit-cancel",
                Doing::Ending(e) if e.acknowledged == Acknowledged::Yes => "menu-quit",
                _ => "menu-quit-destroy",
            };
            (status, verbs, quit)
        }
    };
    let mut entries = vec![MenuEntry::Status { label: status }];
    entries.extend(verbs);
    entries.push(MenuEntry::Separator);
    entries.push(item("action-open-window", Action::OpenWindow));
    entries.push(item("action-open-settings", Action::OpenSettings));
    entries.push(MenuEntry::Separator);
    entries.push(item(quit, Action::Quit));
    entries
}

/// The look of the tray icon.
#[must_use]
pub fn icon(state: &State) -> TrayIcon {
    match &state.phase {
        Phase::Home(_) | Phase::Recovering(_) | Phase::Left => TrayIcon::Idle,
        Phase::Failed(_) => TrayIcon::Attention,
        Phase::Creating(_) => TrayIcon::Busy,
        Phase::Live(live) => match &live.doing {
            Doing::Waiting | Doing::Opening(_) | Doing::Ending(_) => TrayIcon::Busy,
            Doing::Open | Doing::ByHand => TrayIcon::Active,
            Doing::Countdown { .. } | Doing::Held(_) | Doing::Trouble(_) => TrayIcon::Attention,
        },
    }
}
