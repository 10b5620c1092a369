//! Where a launcher's own words go: standard error, and a file a day in the person's data folder.
//!
//! # Guarantees
//! * No secret is in them: secrets have no readable form ([`secrecy`]).
//! * Seven files at most; an older one goes when a new day begins.
//! * A panic is written down too: a tray app has no terminal to show it.
//! * A folder that cannot be written costs the file, never the launcher.

use crate::settings::Places;
use std::io::IsTerminal;
use tracing_appender::rolling::{RollingFileAppender, Rotation};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, fmt};

/// Days of which a file is kept.
const DAYS: usize = 7;

/// Begins. `MAYFLY_LOG` says how much is told, such as `debug`; without it standard error gets `on_terminal` and the file
/// `info`.
pub fn start(places: Option<&Places>, on_terminal: &str) {
    let filter = |default: &str| {
        EnvFilter::try_from_env("MAYFLY_LOG").unwrap_or_else(|_| EnvFilter::new(default))
    };
    let file = places.map(|places| {
        // The appender complains, in its own way, of a folder that is not there yet; of any other trouble it tells below.
        let _ = std::fs::create_dir_all(places.log_dir());
        RollingFileAppender::builder()
            .rotation(Rotation::DAILY)
            .filename_prefix("mayfly")
            .filename_suffix("log")
            .max_log_files(DAYS)
            .build(places.log_dir())
    });
    let (file, refusal) = match file {
        Some(Ok(file)) => (Some(file), None),
        Some(Err(error)) => (None, Some(error)),
        None => (None, None),
    };
    let file = file.map(|file| {
        fmt::layer()
            .with_ansi(false)
            .with_writer(file)
            .with_filter(filter("info"))
    });
    let terminal = fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .with_filter(filter(on_terminal));
    tracing_subscriber::registry()
        .with(file)
        .with(terminal)
        .init();
    if let Some(error) = refusal {
        tracing::warn!("no log file is kept: {error}");
    }
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tracing::error!("{panic}");
        print(panic);
    }));
}
