//! The tray app, started on a [`Desk`] as a person starts it.

use super::{Desk, Lab, Process, Tray, Web, program};
use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use std::process::ExitStatus;
use std::time::Duration;

/// A running `mayfly-launcher`.
#[derive(Debug)]
pub struct Launcher {
    process: Process,
    inspector: u16,
    driver: u16,
}

impl Launcher {
    /// Starts it with settings that name this orchestrator.
    ///
    /// # Errors
    /// When it is not built or cannot be started.
    pub fn start(lab: &Lab, desk: &Desk, orchestrator: &str) -> Result<Self> {
        Self::start_with(
            lab,
            desk,
            &format!("orchestrator = {orchestrator:?}\nlanguage = \"en\"\n"),
        )
    }

    /// Starts it with these settings (TOML, see `mayfly_session_manager::view::Settings`).
    ///
    /// # Errors
    /// When it is not built or cannot be started.
    pub fn start_with(lab: &Lab, desk: &Desk, settings: &str) -> Result<Self> {
        let folder = lab.path("config/mayfly");
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("settings.toml"), settings)?;
        let inspector = lab.port(1);
        let mut command = lab.command(program("mayfly-launcher")?);
        desk.environment(&mut command);
        command
            .env("MAYFLY_CONFIG_DIR", &folder)
            .env("MAYFLY_DATA_DIR", lab.path("data/mayfly"))
            .env("TAURI_WEBVIEW_AUTOMATION", "true")
            .env("WEBKIT_INSPECTOR_SERVER", format!("127.0.0.1:{inspector}"));
        Ok(Self {
            process: lab.start("launcher", command)?,
            inspector,
            driver: lab.port(2),
        })
    }

    /// Its tray icon, as soon as the panel has it.
    ///
    /// # Errors
    /// When it ended or no icon appears.
    pub async fn tray(&mut self, desk: &Desk) -> Result<Tray> {
        self.process.must_run()?;
        let tray = Tray::wait(desk, Duration::from_secs(30)).await;
        tray.with_context(|| format!("the launcher says:\n{}", self.process.last_words()))
    }

    /// Its window's page, as soon as it has one. One at a time.
    ///
    /// # Errors
    /// When no window opens.
    pub async fn web(&mut self, lab: &Lab) -> Result<Web> {
        self.process.must_run()?;
        let web = Web::attach(lab, self.inspector, self.driver).await;
        web.with_context(|| format!("the launcher says:\n{}", self.process.last_words()))
    }

    /// Its process: signals, log.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Kills it as a crash would.
    ///
    /// # Errors
    /// When it had ended before.
    pub async fn crash(&mut self) -> Result<()> {
        self.process.crash().await
    }

    /// Asks it to quit by SIGTERM, as the end of a person's session does, and waits for its end.
    ///
    /// # Errors
    /// When it does not end in time: Quit always ends.
    pub async fn quit(&mut self) -> Result<ExitStatus> {
        self.process.signal(Signal::SIGTERM)?;
        self.process.exit(Duration::from_secs(30)).await
    }
}
