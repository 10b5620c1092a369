//! `mayfly connect`: from nothing to a desktop to nothing.

use super::terminal::{Keys, Teller};
use super::{DONE, FAILED, INTERRUPTED, LEFT_BEHIND};
use clap::{Args, ValueEnum};
use mayfly_session_manager::notify;
use mayfly_session_manager::settings::{self, Places};
use mayfly_session_manager::text::Catalogue;
use mayfly_session_manager::view::{Action, Countdown, Message, Screen, View};
use mayfly_session_manager::{Adapters, Config, Exit, Handle, spawn};

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Login name inside the desktop.
    #[arg(long)]
    user: Option<String>,
    /// Path of the RDP client.
    #[arg(long)]
    client: Option<String>,
    /// From closing the client to the end.
    #[arg(long)]
    countdown: Option<Length>,
    /// Address of the orchestrator.
    #[arg(long)]
    orchestrator: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Length {
    #[value(name = "10s")]
    TenSeconds,
    #[value(name = "30s")]
    ThirtySeconds,
    #[value(name = "2min")]
    TwoMinutes,
    Never,
}

pub(crate) async fn run(options: Options, places: Places) -> anyhow::Result<i32> {
    let mut config = Config::load(places);
    if let Some(problem) = config.settings_problem {
        return Err(problem.into());
    }
    config.user = options.user;
    let settings = &mut config.settings;
    if let Some(client) = options.client {
        settings.rdp.client = Some(client);
    }
    if let Some(orchestrator) = options.orchestrator {
        settings.orchestrator = orchestrator;
    }
    if let Some(countdown) = options.countdown {
        settings.countdown = match countdown {
            Length::TenSeconds => Countdown::TenSeconds,
            Length::ThirtySeconds => Countdown::ThirtySeconds,
            Length::TwoMinutes => Countdown::TwoMinutes,
            Length::Never => Countdown::Never,
        };
    }
    settings::check(settings)?;
    let adapters = Adapters {
        // The terminal says it all.
        notifier: std::sync::Arc::new(notify::Silent),
        ..Adapters::system()
    };
    let handle = spawn(config, adapters);
    handle.act(Action::NewDesktop);
    Ok(Session::new(handle).run().await)
}

/// What happens at the terminal.
struct Session {
    handle: Handle,
    words: Catalogue,
    teller: Teller,
    keys: Option<Keys>,
    interrupts: u32,
    /// What the process says in the end, if nothing is left behind.
    code: i32,
    /// What was said last, so that it is said once.
    said: String,
    begun: bool,
}

impl Session {
    fn new(handle: Handle) -> Self {
        let words = Catalogue::new(&handle.views().borrow().language);
        Self {
            handle,
            words,
            teller: Teller::new(),
            keys: Keys::open(),
            interrupts: 0,
            code: DONE,
            said: String::new(),
            begun: false,
        }
    }

    async fn run(mut self) -> i32 {
        let handle = self.handle.clone();
        let exit = async move { handle.wait_exit().await };
        tokio::pin!(exit);
        let mut views = self.handle.views();
        let mut ends = Ends::new();
        let exit = loop {
            let view = views.borrow_and_update().clone();
            self.show(&view);
            tokio::select! {
                exit = &mut exit => break exit,
                _ = views.changed() => {}
                end = ends.next() => self.on_end(end),
                Some(key) = key(&mut self.keys) => self.on_key(key, &view.screen),
            }
        };
        self.teller.clear();
        match exit {
            Exit::Clean => self.code,
            Exit::Acknowledged(id) => {
                self.say(&Message::new("cli-acknowledged").text("session", id));
                self.code
            }
            Exit::LeftBehind(id) => {
                self.say(&match id {
                    Some(id) => Message::new("cli-left-behind").text("session", id),
                    None => Message::new("cli-left-behind-unknown"),
                });
                LEFT_BEHIND
            }
        }
    }

    fn say(&mut self, message: &Message) {
        let text = self.words.text(message);
        self.teller.line(&text);
    }

    /// Says something that stays, once.
    fn say_once(&mut self, lines: &[String]) {
        let text = lines.join("\n");
        if text != self.said {
            self.teller.line(&text);
            self.said = text;
        }
    }

    fn on_end(&mut self, end: End) {
        self.code = INTERRUPTED;
        self.interrupts += 1;
        match (end, self.interrupts) {
            (End::Interrupt, 1) => {
                self.say(&Message::new("cli-stopping"));
                // Whichever makes sense now.
                self.handle.act(Action::Cancel);
                self.handle.act(Action::Destroy);
            }
            (End::Interrupt, _) => {
                self.handle.act(Action::Quit);
                self.handle.act(Action::Quit);
            }
            (End::Leave, _) => self.handle.act(Action::Quit),
        }
    }

    fn on_key(&mut self, key: char, screen: &Screen) {
        let action = match (key, screen) {
            ('r', Screen::Error { .. }) => Action::Retry,
            ('r', _) => Action::Reconnect,
            ('k', _) => Action::Keep,
            ('d', _) => Action::Destroy,
            _ => return,
        };
        self.handle.act(action);
    }

    fn show(&mut self, view: &View) {
        let text = |message: &Message| self.words.text(message);
        match &view.screen {
            Screen::Home { notice } => {
                let words = notice.as_ref().map(text);
                // Before the request was heard, there is nothing to leave for.
                if self.begun {
                    self.teller.clear();
                    if let Some(words) = words {
                        self.say_once(&[words]);
                    }
                    self.handle.act(Action::Quit);
                }
            }
            Screen::Progress {
                headline,
                detail,
                fraction,
                elapsed_ms,
                expected_ms,
                hint,
                ..
            } => {
                self.begun = true;
                if self.interrupts == 0 {
                    // Tried again.
                    self.code = DONE;
                }
                let mut more = format!("· {} s", elapsed_ms / 1000);
                if let Some(hint) = hint {
                    more = format!("{more} · {}", text(hint));
                } else if let Some(usual) = expected_ms {
                    let seconds = u32::try_from(usual.div_ceil(1000)).unwrap_or(u32::MAX);
                    let usual = Message::new("cli-expected").number("seconds", seconds);
                    more = format!("{more} · {}", text(&usual));
                }
                let mut words = text(headline);
                if let Some(detail) = detail {
                    words = format!("{words} · {}", text(detail));
                }
                self.teller.progress(*fraction, &words, &more);
            }
            Screen::InUse {
                headline,
                hint,
                address,
                client_open,
            } => {
                self.begun = true;
                let mut lines = vec![text(headline)];
                lines.extend(hint.as_ref().map(text));
                if !client_open {
                    lines.extend(address.as_ref().map(|address| {
                        text(&Message::new("cli-address").text("address", address))
                    }));
                    if self.keys.is_some() {
                        lines.push(text(&Message::new("cli-keys-held")));
                    }
                }
                self.say_once(&lines);
            }
            Screen::Countdown {
                reason,
                remaining_s,
                ..
            } => {
                let left = match remaining_s {
                    Some(left) => Message::new("cli-countdown").number("seconds", *left),
                    None => Message::new("cli-kept"),
                };
                let mut more = format!("· {}", text(&left));
                if self.keys.is_some() {
                    more = format!("{more} · {}", text(&Message::new("cli-keys-countdown")));
                }
                let words = text(reason);
                self.teller.status(&words, &more);
            }
            Screen::Ending {
                headline,
                elapsed_ms,
            } => {
                let words = text(headline);
                let more = format!("· {} s", elapsed_ms / 1000);
                self.teller.status(&words, &more);
            }
            Screen::Error {
                headline,
                hint,
                diagnostics,
                actions,
                address,
                ..
            } => {
                self.begun = true;
                let mut lines = vec![text(headline), text(hint)];
                lines.extend(
                    address
                        .as_ref()
                        .map(|address| text(&Message::new("cli-address").text("address", address))),
                );
                tracing::info!("{diagnostics}");
                let lives = actions.contains(&Action::Destroy);
                let wait = lives && self.keys.is_some() && self.interrupts == 0;
                if wait {
                    lines.push(text(&Message::new("cli-keys-held")));
                }
                self.say_once(&lines);
                self.code = self.code.max(FAILED);
                if lives && !wait {
                    self.handle.act(Action::Destroy);
                } else if !lives {
                    self.handle.act(Action::Quit);
                }
            }
        }
    }
}

async fn key(keys: &mut Option<Keys>) -> Option<char> {
    match keys {
        Some(keys) => keys.next().await,
        None => std::future::pending().await,
    }
}

/// Somebody wants us gone.
#[derive(Clone, Copy)]
enum End {
    /// Ctrl-C: destroy and see it gone.
    Interrupt,
    /// SIGTERM, SIGHUP, the console's window closed: destroy and leave within the bound.
    Leave,
}

#[cfg(unix)]
struct Ends {
    interrupt: Option<tokio::signal::unix::Signal>,
    terminate: Option<tokio::signal::unix::Signal>,
    hangup: Option<tokio::signal::unix::Signal>,
}

#[cfg(unix)]
impl Ends {
    fn new() -> Self {
        use tokio::signal::unix::{SignalKind, signal};
        Self {
            interrupt: signal(SignalKind::interrupt()).ok(),
            terminate: signal(SignalKind::terminate()).ok(),
            hangup: signal(SignalKind::hangup()).ok(),
        }
    }

    async fn next(&mut self) -> End {
        async fn one(signal: &mut Option<tokio::signal::unix::Signal>) {
            match signal {
                Some(signal) => drop(signal.recv().await),
                None => std::future::pending().await,
            }
        }
        tokio::select! {
            () = one(&mut self.interrupt) => End::Interrupt,
            () = one(&mut self.terminate) => End::Leave,
            () = one(&mut self.hangup) => End::Leave,
        }
    }
}

#[cfg(windows)]
struct Ends {
    interrupt: Option<tokio::signal::windows::CtrlC>,
    close: Option<tokio::signal::windows::CtrlClose>,
}

#[cfg(windows)]
impl Ends {
    fn new() -> Self {
        use tokio::signal::windows::{ctrl_c, ctrl_close};
        Self {
            interrupt: ctrl_c().ok(),
            close: ctrl_close().ok(),
        }
    }

    async fn next(&mut self) -> End {
        let interrupt = async { self.interrupt.as_mut()?.recv().await };
        let close = async { self.close.as_mut()?.recv().await };
        tokio::select! {
            Some(()) = interrupt => End::Interrupt,
            Some(()) = close => End::Leave,
            else => std::future::pending().await,
        }
    }
}
