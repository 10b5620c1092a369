//! The person's terminal: single keys in, one line that changes or plain lines out.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use tokio::sync::mpsc;

/// Keys as they are pressed. Gives the terminal back as it was when dropped.
pub(crate) struct Keys {
    keys: mpsc::UnboundedReceiver<char>,
    #[cfg(unix)]
    before: Option<nix::sys::termios::Termios>,
}

impl Keys {
    /// `None` where nobody can press a key.
    pub(crate) fn open() -> Option<Self> {
        if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
            return None;
        }
        let (send, keys) = mpsc::unbounded_channel();
        std::thread::spawn(move || {
            while let Some(key) = key() {
                if send.send(key.to_ascii_lowercase()).is_err() {
                    return;
                }
            }
        });
        Some(Self {
            keys,
            #[cfg(unix)]
            before: single_keys(),
        })
    }

    pub(crate) async fn next(&mut self) -> Option<char> {
        self.keys.recv().await
    }
}

/// Waits for a key; `None` when there will be no more.
#[cfg(unix)]
fn key() -> Option<char> {
    use std::io::Read;
    let mut byte = [0];
    std::io::stdin().read_exact(&mut byte).ok()?;
    Some(char::from(byte[0]))
}

/// Waits for a key; `None` when there will be no more. The console gives it without Enter and without echo.
#[cfg(windows)]
fn key() -> Option<char> {
    console::Term::stderr().read_char().ok()
}

/// Keys without Enter and without echo; Ctrl-C stays a signal.
#[cfg(unix)]
fn single_keys() -> Option<nix::sys::termios::Termios> {
    use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
    let before = tcgetattr(std::io::stdin()).ok()?;
    let mut now = before.clone();
    now.local_flags
        .remove(LocalFlags::ICANON | LocalFlags::ECHO);
    tcsetattr(std::io::stdin(), SetArg::TCSANOW, &now).ok()?;
    Some(before)
}

impl Drop for Keys {
    fn drop(&mut self) {
        #[cfg(unix)]
        if let Some(before) = &self.before {
            use nix::sys::termios::{SetArg, tcsetattr};
            let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, before);
        }
    }
}

/// What is told: on a terminal, a line that changes; elsewhere, a line for every change of words.
pub(crate) struct Teller {
    bar: ProgressBar,
    plain: Option<String>,
}

impl Teller {
    pub(crate) fn new() -> Self {
        let plain = (!std::io::stderr().is_terminal()).then(String::new);
        let bar = ProgressBar::with_draw_target(Some(1000), ProgressDrawTarget::hidden());
        Self { bar, plain }
    }

    fn show(&mut self, template: &str) {
        if self.bar.is_hidden() {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style.progress_chars("━╸─"));
        }
    }

    /// A bar with words, and more words after it.
    pub(crate) fn progress(&mut self, fraction: f32, words: &str, more: &str) {
        if self.plain.is_some() {
            return self.line_once(words);
        }
        self.show("{bar:30.cyan} {msg}");
        self.bar
            .set_message(format!("{words} {more}").trim_end().to_owned());
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "0 to 1"
        )]
        self.bar
            .set_position((fraction.clamp(0.0, 1.0) * 1000.0) as u64);
    }

    /// Words that change in place.
    pub(crate) fn status(&mut self, words: &str, more: &str) {
        if self.plain.is_some() {
            return self.line_once(words);
        }
        self.show("{msg}");
        self.bar
            .set_message(format!("{words} {more}").trim_end().to_owned());
        self.bar.tick();
    }

    /// A line that stays.
    pub(crate) fn line(&mut self, words: &str) {
        self.clear();
        eprintln!("{words}");
    }

    fn line_once(&mut self, words: &str) {
        if let Some(last) = &mut self.plain
            && last != words
        {
            words.clone_into(last);
            eprintln!("{words}");
        }
    }

    /// Takes the changing line away.
    pub(crate) fn clear(&mut self) {
        if !self.bar.is_hidden() {
            self.bar.finish_and_clear();
            self.bar = ProgressBar::with_draw_target(Some(1000), ProgressDrawTarget::hidden());
        }
    }
}
