//! The mind, alone: scripted stories, then any order of events.

use super::*;
use crate::api::ApiTroubleKind;
use crate::text::Catalogue;
use crate::view::{Screen, TrayIcon};
use jiff::tz::TimeZone;
use mayfly_api::{DesktopName, Failure, Problem, Setback, Stage, StageName, StageProgress};
use mayfly_api::{EndReason, ProblemCode};
use proptest::prelude::*;
use std::collections::BTreeMap;

const FULL: Duration = Duration::from_secs(10);

fn moment(since_start: Duration) -> Moment {
    let start: Timestamp = "2026-11-23T12:00:00Z".parse().unwrap();
    Moment {
        since_start,
        wall: (start + since_start).to_zoned_datetime(TimeZone::UTC),
    }
}

fn session(id: SessionId, phase: SessionPhase) -> Session {
    let start = moment(Duration::ZERO).wall.timestamp();
    let rdp = RdpEndpoint {
        address: "127.77.0.1:3389".parse().unwrap(),
        certificate_sha256: "ab".repeat(32),
        user: "user".into(),
    };
    Session {
        id,
        phase,
        template: "default".into(),
        user: "user".into(),
        desktop: DesktopName::from_number(1),
        rdp: phase.is_usable().then_some(rdp),
        created_at: start,
        last_activity: start,
        expires_at: start + Duration::from_secs(8 * 3600),
        ends_at: None,
        stages: Vec::new(),
        expected_ready_ms: Some(20_000),
        queue_position: None,
        failure: None,
        end_reason: None,
    }
}

fn trouble(kind: ApiTroubleKind, certainty: Certainty) -> ApiTrouble {
    ApiTrouble {
        words: "it failed".into(),
        retryable: kind == ApiTroubleKind::Unreachable,
        kind,
        certainty,
    }
}

fn unreachable() -> ApiTrouble {
    trouble(ApiTroubleKind::Unreachable, Certainty::NotDone)
}

fn credentials() -> Credentials {
    Credentials {
        user: "user".into(),
        password: "secret-password".into(),
    }
}

/// A launcher on the bench: what goes in and what came out.
struct Bench {
    state: Option<State>,
    now: Duration,
    out: Vec<Effect>,
    id: SessionId,
}

fn access(id: SessionId) -> Access {
    Access {
        orchestrator: Settings::default().orchestrator,
        id,
        secret: "secret".into(),
    }
}

impl Bench {
    fn new(countdown: Countdown) -> Self {
        let (state, out) = State::start(Start {
            now: moment(Duration::ZERO),
            settings: Settings {
                countdown,
                ..Settings::default()
            },
            settings_problem: None,
            system_language: "en".into(),
            user: None,
            launcher: "launcher".into(),
        });
        assert!(matches!(out[..], [Effect::Recover]));
        let mut bench = Self {
            state: Some(state),
            now: Duration::ZERO,
            out,
            id: SessionId::new(),
        };
        bench.on(Event::Recovered(Recovered::Nothing));
        bench
    }

    fn state(&self) -> &State {
        self.state.as_ref().unwrap()
    }

    fn on(&mut self, event: Event) -> &mut Self {
        let (state, out) = step(self.state.take().unwrap(), moment(self.now), event);
        self.state = Some(state);
        self.out = out;
        self
    }

    fn act(&mut self, action: Action) -> &mut Self {
        self.on(Event::Act(action))
    }

    fn after(&mut self, seconds: u64) -> &mut Self {
        self.now += Duration::from_secs(seconds);
        self.on(Event::Tick)
    }

    fn phase(&mut self, phase: SessionPhase) -> &mut Self {
        let session = session(self.id, phase);
        self.on(Event::Session(Box::new(session)))
    }

    fn created(&mut self) -> &mut Self {
        let attempt = self.state().attempt;
        let created = (access(self.id), session(self.id, SessionPhase::Queued));
        self.on(Event::Created(attempt, Ok(Box::new(created))))
    }

    fn requested(countdown: Countdown) -> Self {
        let mut bench = Self::new(countdown);
        bench.act(Action::NewDesktop);
        bench.on(Event::ClientFound(1, Ok("xfreerdp 2.11.7".into())));
        assert!(bench.did(|e| matches!(e, Effect::Create { .. })));
        bench
    }

    fn ready(countdown: Countdown) -> Self {
        let mut bench = Self::requested(countdown);
        bench.created().phase(SessionPhase::Ready);
        assert!(bench.did(|e| matches!(e, Effect::FetchCredentials(_))));
        bench
    }

    fn open(countdown: Countdown) -> Self {
        let mut bench = Self::ready(countdown);
        let id = bench.id;
        bench.on(Event::Credentials(id, Ok(credentials())));
        assert!(bench.did(|e| matches!(e, Effect::StartClient { run: 1, .. })));
        bench.on(Event::ClientStarted(1, Ok(())));
        bench.phase(SessionPhase::Connected);
        bench
    }

    fn ended(&mut self, end: ClientEnd) -> &mut Self {
        let run = self.state().run;
        self.on(Event::ClientEnded(run, end, "its last words".into()))
    }

    fn did(&self, what: impl Fn(&Effect) -> bool) -> bool {
        self.out.iter().any(what)
    }

    fn destroys(&self) -> bool {
        self.did(|e| matches!(e, Effect::Destroy(a) if a.id == self.id))
    }

    fn exit(&self) -> Option<Exit> {
        self.out.iter().find_map(|e| match e {
            Effect::Exit(exit) => Some(*exit),
            _ => None,
        })
    }

    fn screen(&self) -> Screen {
        view(self.state()).screen
    }

    fn headline(&self) -> String {
        match self.screen() {
            Screen::Home { notice } => notice.map(|n| n.id).unwrap_or_default(),
            Screen::Progress { headline, .. }
            | Screen::InUse { headline, .. }
            | Screen::Ending { headline, .. }
            | Screen::Error { headline, .. } => headline.id,
            Screen::Countdown { reason, .. } => reason.id,
        }
    }

    fn actions(&self) -> Vec<Action> {
        menu(self.state())
            .into_iter()
            .filter_map(|entry| match entry {
                crate::view::MenuEntry::Item { action, .. } => Some(action),
                _ => None,
            })
            .collect()
    }
}

#[test]
fn a_closed_client_counts_down_and_then_destroys() {
    let mut bench = Bench::open(Countdown::TenSeconds);
    bench.ended(ClientEnd::Closed);
    assert_eq!(bench.headline(), "reason-closed");
    assert!(bench.did(|e| matches!(e, Effect::Window(Some(Page::Main)))));
    bench.after(9);
    assert!(matches!(
        bench.screen(),
        Screen::Countdown {
            remaining_s: Some(1),
            total_s: Some(10),
            ..
        }
    ));
    assert!(!bench.destroys());
    bench.after(1);
    assert!(bench.destroys());
    bench.phase(SessionPhase::Ending).phase(SessionPhase::Ended);
    assert_eq!(bench.headline(), "notice-destroyed");
    assert!(bench.did(|e| matches!(e, Effect::Forget(id) if *id == bench.id)));
}

#[test]
fn the_countdown_wakes_up_once_a_second_and_an_idle_launcher_never() {
    let mut bench = Bench::open(Countdown::TenSeconds);
    bench.ended(ClientEnd::Closed);
    assert_eq!(
        bench.state().wake_at(),
        Some(bench.now + Duration::from_secs(1))
    );
    assert_eq!(Bench::new(Countdown::TenSeconds).state().wake_at(), None);
}

#[test]
fn every_countdown_has_its_length_and_the_long_ones_hold_the_desktop() {
    for (countdown, seconds, holds) in [
        (Countdown::TenSeconds, Some(10), false),
        (Countdown::ThirtySeconds, Some(30), false),
        (Countdown::TwoMinutes, Some(120), true),
        (Countdown::Never, None, true),
    ] {
        let mut bench = Bench::open(countdown);
        bench.ended(ClientEnd::LoggedOff);
        let kept = bench.did(|e| matches!(e, Effect::Keep(_, 120)));
        assert_eq!(kept, holds, "{countdown:?}");
        let Screen::Countdown {
            total_s,
            remaining_s,
            ..
        } = bench.screen()
        else {
            panic!("{countdown:?}: {:?}", bench.screen());
        };
        assert_eq!((total_s, remaining_s), (seconds, seconds));
        if let Some(seconds) = seconds {
            bench.after(u64::from(seconds));
            assert!(bench.destroys(), "{countdown:?}");
        } else {
            bench.after(3600);
            assert!(!bench.destroys());
            assert!(bench.did(|e| matches!(e, Effect::Keep(_, 120))));
        }
    }
}

#[test]
fn a_lost_connection_is_not_a_closed_client() {
    for (end, headline) in [
        (ClientEnd::Lost, "held-lost"),
        (ClientEnd::Name, "held-lost"),
        (ClientEnd::Killed(9), "held-crashed"),
        (ClientEnd::Replaced, "held-replaced"),
    ] {
        let mut bench = Bench::open(Countdown::TenSeconds);
        bench.ended(end);
        assert_eq!(bench.headline(), headline);
        assert!(bench.did(|e| matches!(e, Effect::Keep(_, 120))));
        bench.after(3600);
        assert!(!bench.destroys());
        bench.act(Action::Reconnect);
        assert!(bench.did(|e| matches!(e, Effect::FetchCredentials(_))));
        let id = bench.id;
        bench.on(Event::Credentials(id, Ok(credentials())));
        assert!(!bench.did(|e| matches!(e, Effect::Keep(_, 0))));
        bench.on(Event::ClientStarted(2, Ok(())));
        assert!(!bench.did(|e| matches!(e, Effect::Keep(_, 0))));
        bench.phase(SessionPhase::Connected);
        assert!(
            bench.did(|e| matches!(e, Effect::Keep(_, 0))),
            "the hold is given up"
        );
        assert_eq!(bench.headline(), "in-use");
    }
}

#[test]
fn a_client_that_took_a_connection_over_unseen_lost_it_all_the_same() {
    let mut bench = Bench::open(Countdown::TenSeconds);
    bench.ended(ClientEnd::Lost).act(Action::Reconnect);
    let id = bench.id;
    bench.on(Event::Credentials(id, Ok(credentials())));
    bench.on(Event::ClientStarted(2, Ok(())));
    bench.ended(ClientEnd::Lost);
    assert_eq!(bench.headline(), "held-lost");
}

#[test]
fn a_client_that_tries_again_by_itself_is_held() {
    let mut bench = Bench::open(Countdown::TenSeconds);
    bench.phase(SessionPhase::Disconnected);
    assert!(bench.did(|e| matches!(e, Effect::Keep(_, 120))));
    bench.phase(SessionPhase::Connected);
    assert!(bench.did(|e| matches!(e, Effect::Keep(_, 0))));
}

#[test]
fn a_session_belongs_to_the_orchestrator_that_made_it_whatever_the_settings_say_meanwhile() {
    let mut bench = Bench::requested(Countdown::TenSeconds);
    let other = Settings {
        orchestrator: "http://127.0.0.1:5999".into(),
        ..Settings::default()
    };
    bench.on(Event::Settings(other));
    bench.created();
    let made_at = Settings::default().orchestrator;
    assert!(bench.did(|e| matches!(e, Effect::Follow(a) if a.orchestrator == made_at)));
}

#[test]
fn a_client_that_never_connected_shows_the_address_to_connect_by_hand() {
    let mut bench = Bench::ready(Countdown::TenSeconds);
    let id = bench.id;
    bench.on(Event::Credentials(id, Ok(credentials())));
    bench.on(Event::ClientStarted(1, Ok(())));
    bench.ended(ClientEnd::Lost);
    let Screen::Error {
        headline,
        address,
        actions,
        diagnostics,
        ..
    } = bench.screen()
    else {
        panic!("{:?}", bench.screen());
    };
    assert_eq!(headline.id, "error-connect");
    assert_eq!(address.as_deref(), Some("127.77.0.1:3389"));
    assert_eq!(actions[0], Action::Retry);
    assert!(diagnostics.contains("its last words"));
    assert!(diagnostics.contains(&id.to_string()));
    assert!(!diagnostics.contains("secret"), "{diagnostics}");
}

#[test]
fn a_wrong_certificate_is_a_security_error_and_never_tried_again_by_itself() {
    let mut bench = Bench::open(Countdown::TenSeconds);
    bench.ended(ClientEnd::Certificate);
    let Screen::Error {
        headline,
        address,
        actions,
        ..
    } = bench.screen()
    else {
        panic!("{:?}", bench.screen());
    };
    assert_eq!(headline.id, "error-certificate");
    assert_eq!(address, None, "nobody is sent there by hand");
    assert_eq!(actions[0], Action::Destroy);
    bench.after(600);
    assert!(!bench.did(|e| matches!(e, Effect::FetchCredentials(_) | Effect::StartClient { .. })));
}

#[test]
fn cancel_during_the_request_destroys_what_comes_of_it() {
    let mut bench = Bench::requested(Countdown::TenSeconds);
    bench.act(Action::Cancel);
    assert_eq!(bench.headline(), "ending-cancelled");
    bench.created();
    assert!(bench.destroys());
    bench.phase(SessionPhase::Ended);
    assert_eq!(bench.headline(), "notice-cancelled");
}

#[test]
fn cancel_of_a_reconnection_does_not_cost_the_desktop() {
    let mut bench = Bench::open(Countdown::TenSeconds);
    bench.ended(ClientEnd::Closed);
    bench.act(Action::Reconnect).act(Action::Cancel);
    assert_eq!(bench.headline(), "held-kept");
    assert!(!bench.destroys());
}

#[test]
fn a_client_that_is_missing_is_told_before_anything_is_asked_for() {
    let mut bench = Bench::new(Countdown::TenSeconds);
    bench.act(Action::NewDesktop);
    assert!(!bench.did(|e| matches!(e, Effect::Create { .. })));
    let missing = ClientTrouble::NotFound {
        looked_for: "xfreerdp".into(),
    };
    bench.on(Event::ClientFound(1, Err(missing)));
    assert_eq!(bench.headline(), "error-no-client");
    assert_eq!(icon(bench.state()), TrayIcon::Attention);
}

#[test]
fn an_orchestrator_that_cannot_be_reached_says_what_to_check_and_retry_begins_anew() {
    let mut bench = Bench::requested(Countdown::TenSeconds);
    bench.on(Event::Created(1, Err(unreachable())));
    let Screen::Error { hint, actions, .. } = bench.screen() else {
        panic!("{:?}", bench.screen());
    };
    assert_eq!(hint.id, "error-unreachable-hint");
    assert_eq!(actions, [Action::Retry, Action::Dismiss]);
    bench.act(Action::Retry);
    bench.on(Event::ClientFound(2, Ok(String::new())));
    assert!(bench.did(|e| matches!(e, Effect::Create { key, .. } if key == "launcher-2")));
}

#[test]
fn a_request_whose_answer_was_lost_is_repeated_with_the_same_key() {
    let mut bench = Bench::requested(Countdown::TenSeconds);
    let lost = trouble(ApiTroubleKind::Unreachable, Certainty::MayBeDone);
    bench.on(Event::Created(1, Err(lost)));
    bench.act(Action::NewDesktop);
    bench.on(Event::ClientFound(2, Ok(String::new())));
    assert!(bench.did(|e| matches!(e, Effect::Create { key, .. } if key == "launcher-1")));
}

#[test]
fn a_second_click_does_not_make_a_second_desktop() {
    let mut bench = Bench::requested(Countdown::TenSeconds);
    bench.act(Action::NewDesktop);
    assert!(!bench.did(|e| matches!(e, Effect::FindClient(..) | Effect::Create { .. })));
    bench.created().act(Action::NewDesktop);
    assert!(!bench.did(|e| matches!(e, Effect::FindClient(..) | Effect::Create { .. })));
}

#[test]
fn a_desktop_that_could_not_be_made_keeps_the_step_that_failed() {
    let mut bench = Bench::requested(Countdown::TenSeconds);
    bench.created();
    let mut failed = session(bench.id, SessionPhase::Failed);
    let started_at = failed.created_at;
    let stage = |name, duration_ms| Stage {
        name,
        started_at,
        duration_ms,
        expected_ms: None,
        progress: None,
    };
    failed.stages = vec![
        stage(StageName::Creating, Some(300)),
        stage(StageName::Booting, None),
    ];
    failed.failure = Some(Failure {
        stage: StageName::Booting,
        problem: Problem::new(ProblemCode::CreateFailed, "no guest agent after 600 s"),
    });
    bench.on(Event::Session(Box::new(failed)));
    let Screen::Error { stages, hint, .. } = bench.screen() else {
        panic!("{:?}", bench.screen());
    };
    let status: Vec<_> = stages.iter().map(|s| (s.name, s.status)).collect();
    assert!(status.contains(&(StageName::Creating, crate::view::StageStatus::Done)));
    assert!(status.contains(&(StageName::Booting, crate::view::StageStatus::Failed)));
    assert!(format!("{hint:?}").contains("no guest agent"));
    assert!(bench.did(|e| matches!(e, Effect::Forget(_))));
}

#[test]
fn a_client_that_fails_shows_no_steps_of_the_desktop_that_was_made() {
    let mut bench = Bench::open(Countdown::TenSeconds);
    bench.ended(ClientEnd::Credentials);
    let Screen::Error {
        stages, address, ..
    } = bench.screen()
    else {
        panic!("{:?}", bench.screen());
    };
    assert!(stages.is_empty());
    assert!(address.is_some());
}

#[test]
fn a_destruction_that_fails_is_repeated_and_then_shows_the_session_for_the_administrator() {
    let mut bench = Bench::open(Countdown::TenSeconds);
    let id = bench.id;
    bench.act(Action::Destroy);
    for attempt in 1..DESTROY_ATTEMPTS {
        assert!(bench.destroys(), "attempt {attempt}");
        bench.on(Event::Answer(id, Call::Destroy, Err(unreachable())));
        assert!(!bench.destroys());
        bench.after(10);
    }
    bench.on(Event::Answer(id, Call::Destroy, Err(unreachable())));
    let Screen::Error {
        headline,
        hint,
        actions,
        ..
    } = bench.screen()
    else {
        panic!("{:?}", bench.screen());
    };
    assert_eq!(headline.id, "error-destroy");
    assert!(format!("{hint:?}").contains(&id.to_string()));
    assert_eq!(actions, [Action::Retry, Action::Dismiss]);
    bench.after(60);
    assert!(
        !bench.did(|e| matches!(e, Effect::Beat(..))),
        "the lease is let run out"
    );
    bench.act(Action::Retry);
    assert!(bench.destroys());
}

#[test]
fn quit_destroys_and_leaves_on_the_acknowledgement() {
    let mut bench = Bench::open(Countdown::TenSeconds);
    let id = bench.id;
    bench.act(Action::Quit);
    assert!(bench.destroys());
    assert!(bench.did(|e| matches!(e, Effect::StopClient(1))));
    assert_eq!(bench.headline(), "ending-quitting");
    let ending = session(id, SessionPhase::Ending);
    bench.on(Event::Answer(id, Call::Destroy, Ok(Box::new(ending))));
    assert_eq!(bench.exit(), Some(Exit::Acknowledged(id)));
    assert!(bench.did(|e| matches!(e, Effect::Forget(_))));
}

#[test]
fn quit_ends_after_its_bound_and_at_once_the_second_time() {
    let mut bench = Bench::open(Countdown::TenSeconds);
    let id = bench.id;
    bench.act(Action::Quit).after(9);
    assert_eq!(bench.exit(), None);
    bench.after(1);
    assert_eq!(bench.exit(), Some(Exit::LeftBehind(Some(id))));

    let mut bench = Bench::requested(Countdown::TenSeconds);
    bench.act(Action::Quit).act(Action::Quit);
    assert_eq!(bench.exit(), Some(Exit::LeftBehind(None)));
    bench.created();
    assert!(
        bench.destroys(),
        "an answer that comes too late is destroyed"
    );
}

#[test]
fn quit_without_a_desktop_leaves_at_once() {
    let mut bench = Bench::new(Countdown::TenSeconds);
    assert_eq!(bench.act(Action::Quit).exit(), Some(Exit::Clean));
}

#[test]
fn a_desktop_that_ends_by_itself_is_told() {
    for (reason, notice) in [
        (EndReason::MachineLost, "notice-machine-lost"),
        (EndReason::Expired, "notice-expired"),
        (EndReason::Idle, "notice-idle"),
        (EndReason::Requested, "notice-requested"),
    ] {
        let mut bench = Bench::open(Countdown::TenSeconds);
        let mut ending = session(bench.id, SessionPhase::Ending);
        ending.end_reason = Some(reason);
        bench.on(Event::Session(Box::new(ending.clone())));
        assert!(bench.did(|e| matches!(e, Effect::Notify { title, .. } if title.id == notice)));
        assert!(bench.did(|e| matches!(e, Effect::StopClient(1))));
        ending.phase = SessionPhase::Ended;
        bench.on(Event::Session(Box::new(ending)));
        assert_eq!(bench.headline(), notice);
    }
}

#[test]
fn a_session_that_the_orchestrator_does_not_know_any_more_is_told() {
    let mut bench = Bench::open(Countdown::TenSeconds);
    let gone = trouble(
        ApiTroubleKind::Problem(ProblemCode::NotFound),
        Certainty::NotDone,
    );
    let id = bench.id;
    bench.on(Event::Answer(id, Call::Beat, Err(gone)));
    assert_eq!(bench.headline(), "notice-gone");
}

#[test]
fn after_a_crash_a_desktop_that_lives_is_offered_again() {
    for (phase, headline) in [
        (SessionPhase::Disconnected, "held-recovered"),
        (SessionPhase::Ready, "held-recovered"),
        (SessionPhase::Connected, "in-use-by-hand"),
        (SessionPhase::Preparing, "stage-queued"),
    ] {
        let (state, _) = State::start(Start {
            now: moment(Duration::ZERO),
            settings: Settings::default(),
            settings_problem: None,
            system_language: "fr".into(),
            user: None,
            launcher: "next".into(),
        });
        let id = SessionId::new();
        let access = access(id);
        let mut bench = Bench {
            state: Some(state),
            now: Duration::ZERO,
            out: vec![],
            id,
        };
        // Impatience while it is looked for must not make a second one.
        bench.act(Action::NewDesktop);
        let found = Recovered::Found(access, Box::new(session(id, phase)));
        bench.on(Event::Recovered(found));
        assert_eq!(bench.headline(), headline, "{phase:?}");
        assert!(bench.did(|e| matches!(e, Effect::Follow(_))));
        assert!(!bench.did(|e| matches!(e, Effect::FindClient(..))));
        assert!(bench.actions().contains(&match phase {
            SessionPhase::Preparing => Action::Cancel,
            _ => Action::Reconnect,
        }));
    }
}

#[test]
fn a_connection_by_hand_ends_in_the_orchestrators_own_idle_rule() {
    let mut bench = Bench::open(Countdown::TenSeconds);
    bench.ended(ClientEnd::Lost);
    // The echo of our own client is not a connection by hand.
    bench.phase(SessionPhase::Connected);
    assert_eq!(bench.headline(), "held-lost");
    bench
        .phase(SessionPhase::Disconnected)
        .phase(SessionPhase::Connected);
    assert_eq!(bench.headline(), "in-use-by-hand");
    let mut gone = session(bench.id, SessionPhase::Disconnected);
    gone.ends_at = Some("2026-11-23T12:34:00Z".parse().unwrap());
    bench.on(Event::Session(Box::new(gone)));
    let Screen::InUse { headline, hint, .. } = bench.screen() else {
        panic!("{:?}", bench.screen());
    };
    assert_eq!(headline.id, "held-disconnected");
    assert_eq!(
        hint,
        Some(Message::new("hint-ends-at").text("time", "12:34"))
    );
    assert!(!bench.did(|e| matches!(e, Effect::Keep(..))));
}

#[test]
fn a_hold_shows_the_templates_cap_when_it_is_reached() {
    let mut bench = Bench::open(Countdown::TenSeconds);
    bench.ended(ClientEnd::Closed).act(Action::Keep);
    assert!(bench.did(|e| matches!(e, Effect::Keep(_, 120))));
    let id = bench.id;
    let mut answer = session(id, SessionPhase::Disconnected);
    answer.ends_at = Some(moment(bench.now + Duration::from_secs(90)).wall.timestamp());
    bench.on(Event::Answer(id, Call::Keep, Ok(Box::new(answer))));
    let Screen::InUse { hint, .. } = bench.screen() else {
        panic!("{:?}", bench.screen());
    };
    assert_eq!(
        hint,
        Some(Message::new("hint-kept-until").text("time", "12:01"))
    );
    assert!(
        bench.did(|e| matches!(e, Effect::Notify { title, .. } if title.id == "notify-expiring"))
    );
    let refused = trouble(
        ApiTroubleKind::Problem(ProblemCode::Conflict),
        Certainty::NotDone,
    );
    bench
        .on(Event::Answer(id, Call::Keep, Err(refused)))
        .after(60);
    assert!(
        !bench.did(|e| matches!(e, Effect::Keep(..))),
        "it is not asked again"
    );
}

#[test]
fn a_countdown_that_ran_during_sleep_starts_again() {
    let mut bench = Bench::open(Countdown::TenSeconds);
    bench.ended(ClientEnd::Closed).after(5);
    bench.now += Duration::from_secs(3600);
    bench.on(Event::Woke);
    assert!(!bench.destroys());
    assert!(bench.did(|e| matches!(e, Effect::Follow(_))));
    bench.after(9);
    assert!(!bench.destroys());
    bench.after(1);
    assert!(bench.destroys());
}

#[test]
fn heartbeats_say_whether_the_client_runs() {
    let mut bench = Bench::requested(Countdown::Never);
    bench.created().after(15);
    assert!(bench.did(|e| matches!(e, Effect::Beat(_, RdpClientState::NotStarted))));
    let mut bench = Bench::open(Countdown::Never);
    bench.after(15);
    assert!(bench.did(|e| matches!(e, Effect::Beat(_, RdpClientState::Running))));
    bench.ended(ClientEnd::Closed);
    assert!(bench.did(|e| matches!(e, Effect::Beat(_, RdpClientState::Closed))));
}

#[test]
fn it_takes_longer_than_usual_after_twice_the_usual_time() {
    let mut bench = Bench::requested(Countdown::TenSeconds);
    bench.created().phase(SessionPhase::Preparing).after(39);
    let hint = |bench: &Bench| match bench.screen() {
        Screen::Progress { hint, .. } => hint.map(|h| h.id),
        other => panic!("{other:?}"),
    };
    assert_eq!(hint(&bench), None);
    bench.after(2);
    assert_eq!(hint(&bench).as_deref(), Some("hint-longer"));
    let id = bench.id;
    bench.on(Event::StreamFailed(id, unreachable()));
    assert_eq!(hint(&bench).as_deref(), Some("hint-no-answer"));
}

#[test]
fn what_a_stage_is_at_is_said_in_words_of_the_catalogue() {
    let mut bench = Bench::requested(Countdown::TenSeconds);
    bench.created();
    let task = StageProgress::Task {
        number: 4,
        name: "Install packages".into(),
    };
    let interrupted = Setback::Interrupted;
    for (progress, french) in [
        (None, None),
        (Some(StageProgress::Unknown), None),
        (
            Some(StageProgress::NoRoom),
            Some("Il n’y a pas de place pour un autre bureau en ce moment"),
        ),
        (
            Some(StageProgress::MadeAnew {
                because: interrupted,
            }),
            Some("Nouvel essai : le premier a été interrompu"),
        ),
        (
            Some(StageProgress::WaitingForStorage { place: 2 }),
            Some("En attente du stockage, numéro 2 dans la file"),
        ),
        (Some(task), Some("Tâche 4 : Install packages")),
    ] {
        let mut session = session(bench.id, SessionPhase::Preparing);
        session.stages = vec![Stage {
            name: StageName::Creating,
            started_at: session.created_at,
            duration_ms: None,
            expected_ms: None,
            progress: progress.clone(),
        }];
        bench.on(Event::Session(Box::new(session)));
        let Screen::Progress { detail, .. } = bench.screen() else {
            panic!("{:?}", bench.screen());
        };
        let words = detail.map(|detail| Catalogue::new("fr").text(&detail));
        assert_eq!(words.as_deref(), french, "{progress:?}");
    }
}

#[test]
fn a_settings_file_that_is_refused_is_told_and_a_session_is_looked_for_after_it() {
    let (state, out) = State::start(Start {
        now: moment(Duration::ZERO),
        settings: Settings::default(),
        settings_problem: Some("unknown key `colour`".into()),
        system_language: "en".into(),
        user: None,
        launcher: "launcher".into(),
    });
    assert!(!out.iter().any(|e| matches!(e, Effect::Recover)));
    let mut bench = Bench {
        state: Some(state),
        now: Duration::ZERO,
        out,
        id: SessionId::new(),
    };
    assert_eq!(bench.headline(), "error-settings");
    bench.act(Action::Dismiss);
    assert!(bench.did(|e| matches!(e, Effect::Recover)));
}

#[test]
fn quit_names_its_effect_in_the_menu() {
    let quit = |bench: &Bench| match menu(bench.state()).pop() {
        Some(crate::view::MenuEntry::Item {
            label,
            action: Action::Quit,
        }) => label.id,
        other => panic!("{other:?}"),
    };
    assert_eq!(quit(&Bench::new(Countdown::TenSeconds)), "menu-quit");
    assert_eq!(
        quit(&Bench::requested(Countdown::TenSeconds)),
        "menu-quit-cancel"
    );
    assert_eq!(
        quit(&Bench::open(Countdown::TenSeconds)),
        "menu-quit-destroy"
    );
}

// ---- any order of events ----

/// What may happen next.
#[derive(Clone, Debug)]
enum Op {
    Act(Action),
    Wait(u64),
    Woke,
    /// Something that was asked outside is answered.
    Answer(usize, Outcome),
    /// The orchestrator moves a session on.
    Move(usize, SessionPhase),
    ClientEnds(ClientEnd),
}

#[derive(Clone, Copy, Debug)]
enum Outcome {
    Good,
    /// It had no effect, try again.
    Lost,
    /// It had its effect, the answer was lost.
    AnswerLost,
    Refused,
    Gone,
}

fn op() -> impl Strategy<Value = Op> {
    use Action as A;
    let action = prop::sample::select(vec![
        A::NewDesktop,
        A::NewDesktop,
        A::Cancel,
        A::Reconnect,
        A::Keep,
        A::Destroy,
        A::Retry,
        A::Dismiss,
        A::OpenWindow,
    ]);
    let outcome = prop::sample::select(vec![
        Outcome::Good,
        Outcome::Good,
        Outcome::Good,
        Outcome::Good,
        Outcome::Lost,
        Outcome::AnswerLost,
        Outcome::Refused,
        Outcome::Gone,
    ]);
    let phase = prop::sample::select(vec![
        SessionPhase::Preparing,
        SessionPhase::Ready,
        SessionPhase::Connected,
        SessionPhase::Disconnected,
        SessionPhase::Ending,
        SessionPhase::Ended,
        SessionPhase::Failed,
    ]);
    let end = prop::sample::select(vec![
        ClientEnd::Closed,
        ClientEnd::Lost,
        ClientEnd::Killed(9),
        ClientEnd::Certificate,
        ClientEnd::Unknown(7),
    ]);
    prop_oneof![
        4 => action.prop_map(Op::Act),
        2 => (0_u64..40).prop_map(Op::Wait),
        1 => Just(Op::Woke),
        8 => (any::<usize>(), outcome).prop_map(|(i, o)| Op::Answer(i, o)),
        3 => (any::<usize>(), phase).prop_map(|(i, p)| Op::Move(i, p)),
        2 => end.prop_map(Op::ClientEnds),
    ]
}

/// The orchestrator and everything else outside, as far as the promises go.
#[derive(Default)]
struct Outside {
    asked: Vec<Effect>,
    by_key: BTreeMap<String, SessionId>,
    /// Sessions that the launcher was told of, and whether their end was asked for or has begun.
    known: BTreeMap<SessionId, bool>,
    over: BTreeMap<SessionId, bool>,
    /// Sessions that the person left to the orchestrator after a destruction failed.
    dismissed: Vec<SessionId>,
    running: Option<u64>,
    exit: Option<Exit>,
}

impl Outside {
    fn take(&mut self, effects: &[Effect]) {
        for effect in effects {
            match effect {
                Effect::Destroy(access) => {
                    self.known.insert(access.id, true);
                    self.asked.push(effect.clone());
                }
                Effect::StopClient(run) if self.running == Some(*run) => self.running = None,
                Effect::Exit(exit) => {
                    assert!(self.exit.is_none(), "it leaves once");
                    self.exit = Some(*exit);
                }
                Effect::FindClient(..)
                | Effect::Create { .. }
                | Effect::FetchCredentials(_)
                | Effect::StartClient { .. }
                | Effect::Beat(..)
                | Effect::Keep(..) => self.asked.push(effect.clone()),
                _ => {}
            }
        }
    }

    fn answer(&mut self, index: usize, outcome: Outcome) -> Option<Event> {
        if self.asked.is_empty() {
            return None;
        }
        let effect = self.asked.remove(index % self.asked.len());
        let error = match outcome {
            Outcome::Good | Outcome::Lost => unreachable(),
            Outcome::AnswerLost => trouble(ApiTroubleKind::Unreachable, Certainty::MayBeDone),
            Outcome::Refused => trouble(
                ApiTroubleKind::Problem(ProblemCode::Conflict),
                Certainty::NotDone,
            ),
            Outcome::Gone => trouble(
                ApiTroubleKind::Problem(ProblemCode::NotFound),
                Certainty::NotDone,
            ),
        };
        let good = matches!(outcome, Outcome::Good);
        let happened = matches!(outcome, Outcome::Good | Outcome::AnswerLost);
        let not_found = ClientTrouble::NotFound {
            looked_for: String::new(),
        };
        Some(match effect {
            Effect::FindClient(attempt, _) => Event::ClientFound(
                attempt,
                if good {
                    Ok(String::new())
                } else {
                    Err(not_found)
                },
            ),
            Effect::Create { attempt, key, .. } => {
                if happened {
                    self.by_key.entry(key.clone()).or_default();
                }
                if !good {
                    return Some(Event::Created(attempt, Err(error)));
                }
                let id = self.by_key[&key];
                self.known.entry(id).or_insert(false);
                let created = (access(id), session(id, SessionPhase::Queued));
                Event::Created(attempt, Ok(Box::new(created)))
            }
            Effect::FetchCredentials(access) => {
                if matches!(outcome, Outcome::Gone) {
                    self.over.insert(access.id, true);
                }
                Event::Credentials(access.id, if good { Ok(credentials()) } else { Err(error) })
            }
            Effect::StartClient { run, .. } => {
                if good {
                    self.running = Some(run);
                }
                Event::ClientStarted(run, if good { Ok(()) } else { Err(not_found) })
            }
            Effect::Beat(access, _) | Effect::Keep(access, _) | Effect::Destroy(access)
                if matches!(outcome, Outcome::Gone) =>
            {
                self.over.insert(access.id, true);
                Event::Answer(access.id, Call::Beat, Err(error))
            }
            Effect::Beat(access, _) => Self::answered(access.id, Call::Beat, good, error),
            Effect::Keep(access, _) => Self::answered(access.id, Call::Keep, good, error),
            Effect::Destroy(access) => Self::answered(access.id, Call::Destroy, good, error),
            _ => return None,
        })
    }

    fn answered(id: SessionId, call: Call, good: bool, error: ApiTrouble) -> Event {
        let phase = match call {
            Call::Destroy => SessionPhase::Ending,
            _ => SessionPhase::Ready,
        };
        let answer = if good {
            Ok(Box::new(session(id, phase)))
        } else {
            Err(error)
        };
        Event::Answer(id, call, answer)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_nothing_is_left_behind_in_silence(
        ops in prop::collection::vec(op(), 1..120),
    ) {
        let mut bench = Bench::new(Countdown::TenSeconds);
        let mut outside = Outside::default();
        let mut fraction: (u64, f32) = (0, 0.0);
        for op in ops {
            match op {
                Op::Act(action) => {
                    if let (Action::Dismiss, Phase::Live(live)) = (action, &bench.state().phase)
                        && matches!(live.doing, Doing::Trouble(_))
                    {
                        outside.dismissed.push(live.access.id);
                    }
                    bench.act(action);
                }
                Op::Wait(seconds) => { bench.after(seconds); }
                Op::Woke => { bench.on(Event::Woke); }
                Op::Answer(index, outcome) => {
                    let Some(event) = outside.answer(index, outcome) else { continue };
                    bench.on(event);
                }
                Op::Move(index, phase) => {
                    if outside.known.is_empty() { continue }
                    let id = *outside.known.keys().nth(index % outside.known.len()).unwrap();
                    if outside.over.get(&id) == Some(&true) { continue }
                    if phase.is_final() { outside.over.insert(id, true); }
                    if phase == SessionPhase::Ending { outside.known.insert(id, true); }
                    bench.on(Event::Session(Box::new(session(id, phase))));
                }
                Op::ClientEnds(end) => {
                    let Some(run) = outside.running.take() else { continue };
                    bench.on(Event::ClientEnded(run, end, String::new()));
                }
            }
            outside.take(&bench.out);
            let current = match &bench.state().phase {
                Phase::Live(live) => Some(live.access.id),
                _ => None,
            };
            for (id, asked_to_end) in &outside.known {
                prop_assert!(
                    *asked_to_end
                        || outside.over.get(id) == Some(&true)
                        || Some(*id) == current
                        || outside.dismissed.contains(id),
                    "session {id} lives and nobody minds it"
                );
            }
            if let Screen::Progress { fraction: now, .. } = bench.screen() {
                let attempt = bench.state().attempt;
                prop_assert!(fraction.0 != attempt || now >= fraction.1, "it went back");
                prop_assert!((0.0..=1.0).contains(&now));
                fraction = (attempt, now);
            }
            // Something always wakes a launcher that has work.
            if let Phase::Live(live) = &bench.state().phase {
                let waits = matches!(&live.doing, Doing::Trouble(t) if t.kind == TroubleKind::Destroy);
                prop_assert!(waits || bench.state().wake_at().is_some());
            }
        }
        bench.act(Action::Quit);
        outside.take(&bench.out);
        for _ in 0..3 {
            if outside.exit.is_none() {
                bench.after(FULL.as_secs() / 2);
                outside.take(&bench.out);
            }
        }
        let exit = outside.exit.expect("Quit always ends");
        let all_minded = outside.known.iter().all(|(id, asked)| {
            *asked || outside.over.get(id) == Some(&true) || outside.dismissed.contains(id)
        });
        prop_assert!(all_minded || matches!(exit, Exit::LeftBehind(_)), "{exit:?}");
        // What comes too late is destroyed.
        while let Some(event) = outside.answer(0, Outcome::Good) {
            bench.on(event);
            outside.take(&bench.out);
            let only_destroys = bench.out.iter().all(|e| matches!(e, Effect::Destroy(_)));
            prop_assert!(only_destroys, "{:?}", bench.out);
        }
        let minded_in_the_end = outside.known.iter().all(|(id, asked)| {
            *asked
                || outside.over.get(id) == Some(&true)
                || outside.dismissed.contains(id)
                || exit == Exit::LeftBehind(Some(*id))
        });
        prop_assert!(minded_in_the_end);
    }
}
