//! What the service tells systemd, if systemd started it: that it is ready, alive, or stopping.
//!
//! # Guarantees
//! * The watchdog is fed by who has just seen that the service is alive ([`vitals::alive`]), never by a mere timer.
//! * Without systemd nothing happens.

use crate::control::Control;
use crate::vitals;
use sd_notify::NotifyState;
use std::os::fd::AsFd;
use tracing::{error, warn};

fn tell(what: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(what) {
        warn!(%error, "systemd could not be told");
    }
}

/// Sessions are taken from now on.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// It stops. Desktops go on.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Feeds the watchdog while the service is alive, four times as often as is asked for. For ever.
pub async fn feed(control: Control) {
    let Some(limit) = sd_notify::watchdog_enabled() else {
        return std::future::pending().await;
    };
    loop {
        match vitals::alive(&control).await {
            Ok(()) => tell(&[NotifyState::Watchdog]),
            Err(why) => error!(why = why.detail, "systemd is not told that this is alive"),
        }
        tokio::time::sleep(limit / 4).await;
    }
}

/// Whether standard error goes to systemd's journal: systemd names the device and the file in `JOURNAL_STREAM`.
#[must_use]
pub fn reads_stderr(journal_stream: Option<&str>, stderr: impl AsFd) -> bool {
    let Ok(found) = nix::sys::stat::fstat(&stderr) else {
        return false;
    };
    let found = format!("{}:{}", found.st_dev, found.st_ino);
    journal_stream == Some(&*found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journal_is_known_by_its_file() {
        let (_, journal) = std::os::unix::net::UnixStream::pair().unwrap();
        let file = std::fs::File::from(std::os::fd::OwnedFd::from(journal));
        let stat = nix::sys::stat::fstat(&file).unwrap();
        let named = format!("{}:{}", stat.st_dev, stat.st_ino);
        assert!(reads_stderr(Some(&named), &file));
        assert!(!reads_stderr(Some("8:1"), &file));
        assert!(!reads_stderr(None, &file));
    }
}
