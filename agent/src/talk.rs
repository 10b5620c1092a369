//! What the agent says to the orchestrator, and when: a pure state machine. The edges bring [`Event`]s with the monotonic
//! time, and carry out the [`Effect`]s.
//!
//! Promises:
//! * `Ready` (or `Failed`) is repeated until an `Ack` came that can only be for it, and said again on every new connection:
//!   an orchestrator that died after it acknowledged, and before it remembered, loses nothing.
//! * `Evidence` follows only an acknowledged `Ready`: every 2 s, and at once when the number of connections changed.
//! * The machine is powered off only after nobody was connected *and* the orchestrator was silent for the whole limit,
//!   and never before it had its bootstrap: a machine parked for its first session waits for as long as it takes.

use crate::line::Calling;
use mayfly_api::agent::{FromAgent, ToAgent};
use std::time::{Duration, Instant};

/// Between two of the same message.
const REPEAT: Duration = Duration::from_secs(2);
/// Until a power-off that did not work is tried again.
const POWER_OFF_AGAIN: Duration = Duration::from_secs(60);

/// The one person of this desktop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Person {
    /// Login name.
    pub(crate) user: String,
    /// BCP 47 tag.
    pub(crate) language: Option<String>,
    /// Their account is the domain's.
    pub(crate) in_domain: bool,
    /// Where their network shares are mounted.
    pub(crate) shares: Vec<String>,
    /// Power off after this much silence.
    pub(crate) silence_limit: Duration,
}

/// What happened.
#[derive(Debug)]
pub(crate) enum Event {
    /// Somebody opened the other end of the port.
    HostConnected,
    /// Nobody has the other end open any more.
    HostGone,
    /// The orchestrator said something.
    Heard(ToAgent),
    /// The bootstrap was read; the second says whom to call, if there is no port.
    Taken(Person, Option<Calling>),
    /// The machine has its identity, or could not take it: a [`FromAgent::Ready`] or [`FromAgent::Failed`].
    Settled(FromAgent),
    /// The person's session has ended and their shares are unmounted, as well as could be.
    Left,
    /// They are logged in, and nothing is mounted at these places.
    SharesMissing(Vec<String>),
    /// A look at the desktop, twice a second: also the clock of everything that is repeated.
    Looked {
        /// Open RDP connections.
        connections: u32,
        /// X idle time in milliseconds.
        idle_ms: Option<u64>,
    },
}

/// What to do.
#[derive(Debug)]
pub(crate) enum Effect {
    /// Say it to the orchestrator. It may be lost.
    Send(FromAgent),
    /// Show it to the person.
    Notice(Notice),
    /// End the person's session and unmount their shares, then say [`Event::Left`].
    Leave,
    /// Power the machine off.
    PowerOff,
}

/// What the person is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// The desktop ends in this many seconds.
    EndsIn(u32),
    /// It does not end after all.
    CalledOff,
    /// Their network shares are not mounted at these places.
    SharesMissing(Vec<String>),
}

enum Stage {
    Waiting,
    Personalising,
    /// `acks`: how many more must come before one is surely for the outcome.
    Announcing {
        outcome: FromAgent,
        acks: u32,
    },
    Reporting {
        outcome: FromAgent,
    },
}

/// The state of the conversation.
pub(crate) struct Talk {
    hello: FromAgent,
    stage: Stage,
    host: Host,
    silence_limit: Option<Duration>,
    /// When the orchestrator was last heard or a person last connected.
    last_sign: Instant,
    powered_off: Option<Instant>,
    connections: u32,
    warned: Option<u32>,
}

/// The other end of the port.
enum Host {
    Gone,
    There {
        /// Messages of this connection that no `Ack` answered yet.
        unanswered: u32,
        last_said: Option<Instant>,
    },
}

impl Talk {
    pub(crate) fn new(version: &str, boot_id: &str, now: Instant) -> Self {
        Self {
            hello: FromAgent::Hello {
                version: version.to_owned(),
                boot_id: boot_id.to_owned(),
            },
            stage: Stage::Waiting,
            host: Host::Gone,
            silence_limit: None,
            last_sign: now,
            powered_off: None,
            connections: 0,
            warned: None,
        }
    }

    /// One step. `now` never goes back.
    pub(crate) fn step(&mut self, event: Event, now: Instant) -> Vec<Effect> {
        match event {
            Event::HostConnected => {
                self.host = Host::There {
                    unanswered: 0,
                    last_said: None,
                };
                self.stage = match std::mem::replace(&mut self.stage, Stage::Waiting) {
                    Stage::Announcing { outcome, .. } | Stage::Reporting { outcome } => {
                        Stage::Announcing { outcome, acks: 1 }
                    }
                    stage => stage,
                };
                self.say(self.standing(), now)
            }
            Event::HostGone => {
                self.host = Host::Gone;
                vec![]
            }
            Event::Heard(message) => self.heard(&message, now),
            Event::Taken(person, _) => {
                self.silence_limit = Some(person.silence_limit);
                self.last_sign = now;
                self.stage = Stage::Personalising;
                self.say(Some(self.hello.clone()), now)
            }
            Event::Settled(outcome) => {
                let acks = match self.host {
                    Host::There { unanswered, .. } => unanswered + 1,
                    Host::Gone => 1,
                };
                self.stage = Stage::Announcing {
                    outcome: outcome.clone(),
                    acks,
                };
                self.say(Some(outcome), now)
            }
            Event::Left => self.say(Some(FromAgent::Left), now),
            Event::SharesMissing(places) => {
                let message = format!("no network share is mounted at {}", places.join(", "));
                let mut effects = self.say(Some(FromAgent::Trouble { message }), now);
                effects.push(Effect::Notice(Notice::SharesMissing(places)));
                effects
            }
            Event::Looked {
                connections,
                idle_ms,
            } => self.looked(connections, idle_ms, now),
        }
    }

    /// What a host that has just connected must hear.
    fn standing(&self) -> Option<FromAgent> {
        match &self.stage {
            Stage::Waiting | Stage::Personalising => Some(self.hello.clone()),
            Stage::Announcing { outcome, .. } | Stage::Reporting { outcome } => {
                Some(outcome.clone())
            }
        }
    }

    fn say(&mut self, message: Option<FromAgent>, now: Instant) -> Vec<Effect> {
        match (&mut self.host, message) {
            (
                Host::There {
                    unanswered,
                    last_said,
                },
                Some(message),
            ) => {
                *unanswered += 1;
                *last_said = Some(now);
                vec![Effect::Send(message)]
            }
            _ => vec![],
        }
    }

    fn heard(&mut self, message: &ToAgent, now: Instant) -> Vec<Effect> {
        self.last_sign = now;
        match *message {
            ToAgent::Ack => {
                if let Host::There { unanswered, .. } = &mut self.host {
                    *unanswered = unanswered.saturating_sub(1);
                }
                if let Stage::Announcing { outcome, acks } = &mut self.stage {
                    *acks -= 1;
                    if *acks == 0 {
                        self.stage = Stage::Reporting {
                            outcome: outcome.clone(),
                        };
                    }
                }
                vec![]
            }
            ToAgent::Warn { ends_in_s } if self.warned == Some(ends_in_s) => vec![],
            ToAgent::Warn { ends_in_s } => {
                self.warned = Some(ends_in_s);
                vec![Effect::Notice(Notice::EndsIn(ends_in_s))]
            }
            ToAgent::Unwarn if self.warned.take().is_some() => {
                vec![Effect::Notice(Notice::CalledOff)]
            }
            ToAgent::Unwarn => vec![],
            ToAgent::Leave => vec![Effect::Leave],
        }
    }

    fn looked(&mut self, connections: u32, idle_ms: Option<u64>, now: Instant) -> Vec<Effect> {
        let changed = std::mem::replace(&mut self.connections, connections) != connections;
        if connections > 0 {
            self.last_sign = now;
        }
        let silent = self
            .silence_limit
            .is_some_and(|limit| now.duration_since(self.last_sign) >= limit);
        let tried_lately = self
            .powered_off
            .is_some_and(|at| now.duration_since(at) < POWER_OFF_AGAIN);
        if silent && !tried_lately {
            self.powered_off = Some(now);
            return vec![Effect::PowerOff];
        }

        let due = match self.host {
            Host::Gone => false,
            Host::There { last_said, .. } => {
                last_said.is_none_or(|at| now.duration_since(at) >= REPEAT)
            }
        };
        let message = match &self.stage {
            Stage::Waiting if due => Some(self.hello.clone()),
            Stage::Announcing { outcome, .. } if due => Some(outcome.clone()),
            Stage::Reporting {
                outcome: FromAgent::Ready { .. },
            } if due || changed => Some(FromAgent::Evidence {
                connections,
                idle_ms,
            }),
            _ => None,
        };
        self.say(message, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mayfly_api::SessionId;

    /// A conversation on a clock of its own.
    struct Scene {
        talk: Talk,
        now: Instant,
    }

    impl Scene {
        fn new() -> Self {
            let now = Instant::now();
            Self {
                talk: Talk::new("1", "boot", now),
                now,
            }
        }

        /// What is said after the event: one letter a message, `!` for a power-off, `n` for a notice.
        fn on(&mut self, event: Event) -> String {
            let effects = self.talk.step(event, self.now);
            effects
                .iter()
                .map(|effect| match effect {
                    Effect::Send(FromAgent::Hello { .. }) => 'H',
                    Effect::Send(FromAgent::Ready { .. }) => 'R',
                    Effect::Send(FromAgent::Failed { .. }) => 'F',
                    Effect::Send(FromAgent::Evidence { .. }) => 'E',
                    Effect::Send(FromAgent::Left) => 'L',
                    Effect::Send(FromAgent::Trouble { .. }) => 'T',
                    Effect::Notice(_) => 'n',
                    Effect::Leave => 'l',
                    Effect::PowerOff => '!',
                })
                .collect()
        }

        /// What is said while this many half seconds pass with this many connections.
        fn pass(&mut self, half_seconds: u32, connections: u32) -> String {
            let mut said = String::new();
            for _ in 0..half_seconds {
                self.now += Duration::from_millis(500);
                said += &self.on(Event::Looked {
                    connections,
                    idle_ms: None,
                });
            }
            said
        }

        fn settled() -> Self {
            let mut scene = Self::new();
            scene.on(Event::HostConnected);
            scene.on(Event::Heard(ToAgent::Ack));
            scene.on(taken());
            scene.on(Event::Heard(ToAgent::Ack));
            assert_eq!(scene.on(ready()), "R");
            scene.on(Event::Heard(ToAgent::Ack));
            scene
        }
    }

    fn taken() -> Event {
        let person = Person {
            user: "ada".into(),
            language: None,
            in_domain: false,
            shares: vec![],
            silence_limit: Duration::from_secs(60),
        };
        Event::Taken(person, None)
    }

    fn ready() -> Event {
        Event::Settled(FromAgent::Ready {
            session: SessionId::new(),
            token: "t".into(),
            certificate_sha256: String::new(),
            ssh_host_key: None,
            steps_ms: vec![],
        })
    }

    #[test]
    fn a_share_that_is_not_there_is_told_to_the_person_and_to_the_orchestrator() {
        let mut scene = Scene::settled();
        let places = || Event::SharesMissing(vec!["/home/ada/Partage".into()]);
        assert_eq!(scene.on(places()), "Tn");
        scene.on(Event::HostGone);
        assert_eq!(scene.on(places()), "n");
    }

    #[test]
    fn leaves_when_it_is_told_and_says_when_that_is_done() {
        let mut scene = Scene::settled();
        assert_eq!(scene.on(Event::Heard(ToAgent::Leave)), "l");
        assert_eq!(scene.on(Event::Left), "L");
    }

    #[test]
    fn says_hello_every_two_seconds_until_it_has_its_bootstrap_and_once_more() {
        let mut scene = Scene::new();
        assert_eq!(scene.pass(20, 0), "", "nobody listens");
        assert_eq!(scene.on(Event::HostConnected), "H");
        assert_eq!(scene.pass(8, 0), "HH");
        assert_eq!(scene.on(taken()), "H");
        assert_eq!(scene.pass(20, 0), "");
    }

    #[test]
    fn repeats_ready_until_an_ack_can_only_be_for_it() {
        let mut scene = Scene::new();
        scene.on(Event::HostConnected);
        scene.on(taken());
        assert_eq!(scene.on(ready()), "R");
        scene.on(Event::Heard(ToAgent::Ack)); // for the first Hello
        scene.on(Event::Heard(ToAgent::Ack)); // for the second
        assert_eq!(scene.pass(4, 0), "R");
        scene.on(Event::Heard(ToAgent::Ack));
        assert_eq!(scene.pass(8, 0), "EE");
    }

    #[test]
    fn says_ready_again_to_every_new_host() {
        let mut scene = Scene::settled();
        scene.on(Event::HostGone);
        assert_eq!(scene.pass(20, 0), "");
        assert_eq!(scene.on(Event::HostConnected), "R");
        assert_eq!(scene.pass(4, 0), "R");
        scene.on(Event::Heard(ToAgent::Ack));
        assert_eq!(scene.pass(4, 0), "E");
    }

    #[test]
    fn a_change_of_connections_is_said_at_once() {
        let mut scene = Scene::settled();
        scene.pass(4, 0);
        assert_eq!(scene.pass(1, 1), "E");
        assert_eq!(scene.pass(1, 1), "");
        assert_eq!(scene.pass(1, 0), "E");
    }

    #[test]
    fn a_failure_is_repeated_until_heard_and_no_evidence_follows() {
        let mut scene = Scene::new();
        scene.on(taken());
        scene.on(Event::HostConnected);
        scene.on(Event::Heard(ToAgent::Ack));
        let failed = FromAgent::Failed {
            step: "user".into(),
            message: "no room".into(),
        };
        assert_eq!(scene.on(Event::Settled(failed)), "F");
        assert_eq!(scene.pass(4, 0), "F");
        scene.on(Event::Heard(ToAgent::Ack));
        assert_eq!(scene.pass(20, 0), "");
    }

    #[test]
    fn powers_off_only_after_the_whole_limit_without_host_and_without_person() {
        let mut scene = Scene::settled();
        scene.on(Event::HostGone);
        assert_eq!(scene.pass(600, 1), "", "a person works on");
        assert_eq!(
            scene.pass(119, 0),
            "",
            "a dropped connection is not the end"
        );
        assert_eq!(scene.pass(1, 0), "!");
        assert_eq!(scene.pass(119, 0), "", "not again at once");
        assert_eq!(scene.pass(1, 0), "!");
    }

    #[test]
    fn a_parked_machine_never_powers_off() {
        let mut scene = Scene::new();
        assert_eq!(scene.pass(10_000, 0), "");
    }

    #[test]
    fn an_orchestrator_that_answers_holds_the_machine() {
        let mut scene = Scene::settled();
        for _ in 0..10 {
            assert!(!scene.pass(100, 0).contains('!'));
            scene.on(Event::Heard(ToAgent::Ack));
        }
    }

    #[test]
    fn a_warning_is_shown_once_and_withdrawn_once() {
        let mut scene = Scene::settled();
        assert_eq!(scene.on(Event::Heard(ToAgent::Unwarn)), "");
        assert_eq!(
            scene.on(Event::Heard(ToAgent::Warn { ends_in_s: 300 })),
            "n"
        );
        assert_eq!(scene.on(Event::Heard(ToAgent::Warn { ends_in_s: 300 })), "");
        assert_eq!(scene.on(Event::Heard(ToAgent::Warn { ends_in_s: 60 })), "n");
        assert_eq!(scene.on(Event::Heard(ToAgent::Unwarn)), "n");
        assert_eq!(scene.on(Event::Heard(ToAgent::Unwarn)), "");
    }
}
