//! An orchestrator of the lab's own.

use super::{Database, Guest, Lab, Process, program, until};
use anyhow::{Context, Result, ensure};
use mayfly_api::client::Client;
use mayfly_api::{DesktopName, SessionId};
use nix::sys::signal::Signal;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// Starting includes a trial boot of the emulator.
const START: Duration = Duration::from_secs(60);
/// An orderly stop is bounded by the orchestrator itself.
const STOP: Duration = Duration::from_secs(30);

/// Where its desktops come from.
#[derive(Clone, Debug)]
pub enum Provider {
    /// No machines: an actor that plays them.
    Simulated,
    /// The same, with these keys of `[provider.simulated]`, such as `boot_ms = 4000`.
    SimulatedWith(&'static str),
    /// Real machines from this image folder (see [`super::image_folder`]).
    Qemu(PathBuf),
    /// Machines of a site; these parts of a configuration name it (see [`crate::site::Site::configuration`]).
    Terraform(String),
}

/// A running `mayfly-orchestrator serve`.
#[derive(Debug)]
pub struct Orchestrator {
    process: Process,
    config: PathBuf,
    machines: PathBuf,
    url: String,
    client: Client,
}

impl Orchestrator {
    /// Starts it and waits until it answers. `limits` goes into the configuration's `[limits]`, such as `idle_s = 5`.
    ///
    /// # Errors
    /// When it is not built or does not come up; with the end of its log.
    pub async fn start(lab: &Lab, provider: &Provider, limits: &str) -> Result<Self> {
        Self::start_on(lab, provider, limits, &Database::default()).await
    }

    /// The same, on this database.
    ///
    /// # Errors
    /// When it is not built or does not come up; with the end of its log.
    pub async fn start_on(
        lab: &Lab,
        provider: &Provider,
        limits: &str,
        database: &Database,
    ) -> Result<Self> {
        let listen = format!("127.0.0.1:{}", lab.port(0));
        let machines = lab.path("machines");
        let simulated = |keys: &str| {
            format!(
                "[provider.simulated]\naddress_prefix = {:?}\n{keys}\n",
                lab.address_prefix()
            )
        };
        let (kind, section) = match provider {
            Provider::Simulated => ("simulated", simulated("")),
            Provider::SimulatedWith(keys) => ("simulated", simulated(keys)),
            Provider::Qemu(image) => (
                "qemu",
                format!(
                    "[provider.qemu]\nimage = {image:?}\nruntime_dir = {machines:?}\naddress_prefix = {:?}\n",
                    lab.address_prefix()
                ),
            ),
            Provider::Terraform(site) => ("terraform", site.clone()),
        };
        let config = lab.path("config/orchestrator.toml");
        std::fs::write(
            &config,
            format!(
                "listen = {listen:?}\nstate_dir = {:?}\n[limits]\nquarantine_s = 0\n{limits}\n[[template]]\nname = \"desktop\"\n\
                 provider = {kind:?}\n{section}\n{}",
                lab.path("state"),
                database.section
            ),
        )?;
        let url = format!("http://{listen}");
        let mut orchestrator = Self {
            process: lab.start("orchestrator", Self::command(lab, &config)?)?,
            client: Client::new(&url)?,
            config,
            machines,
            url,
        };
        orchestrator.answers().await?;
        Ok(orchestrator)
    }

    fn command(lab: &Lab, config: &std::path::Path) -> Result<Command> {
        let mut command = lab.command(program("mayfly-orchestrator")?);
        command.arg("serve").arg("--config").arg(config);
        Ok(command)
    }

    async fn answers(&mut self) -> Result<()> {
        let health = format!("{}/healthz", self.url);
        let http = reqwest::Client::builder()
            .no_proxy()
            .timeout(Duration::from_secs(5))
            .build()?;
        until("the orchestrator answers", START, async || {
            self.process.must_run()?;
            let answer = http.get(&health).send().await;
            Ok(answer.is_ok_and(|a| a.status().is_success()).then_some(()))
        })
        .await
    }

    /// Its address, such as `http://127.0.0.1:22000`.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The typed client of its API.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The inside of one of its real desktops.
    #[must_use]
    pub fn guest(&self, desktop: DesktopName) -> Guest {
        Guest::at(&self.machines.join(desktop.to_string()).join("qga.sock"))
    }

    /// What it keeps of a session's failed desktop, as an administrator reads it.
    ///
    /// # Errors
    /// When it keeps nothing.
    pub fn logs(&self, lab: &Lab, session: SessionId) -> Result<String> {
        self.administer(lab, &["logs", &session.to_string()])
    }

    /// What it says to an administrator on its machine.
    ///
    /// # Errors
    /// When it refuses.
    pub fn administer(&self, lab: &Lab, arguments: &[&str]) -> Result<String> {
        let mut command = lab.command(program("mayfly-orchestrator")?);
        command.args(arguments).arg("--config").arg(&self.config);
        let output = command.output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{said}");
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Its process: signals, log.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Kills it as a crash would: SIGKILL, in the middle of whatever it does.
    ///
    /// # Errors
    /// When it had ended before.
    pub async fn crash(&mut self) -> Result<()> {
        self.process.crash().await
    }

    /// Stops it as an administrator would: SIGTERM, and waits.
    ///
    /// # Errors
    /// When it does not end in time.
    pub async fn stop(&mut self) -> Result<()> {
        self.process.signal(Signal::SIGTERM)?;
        self.process.exit(STOP).await.map(drop)
    }

    /// Starts it again, with the same state, and waits until it answers.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn start_again(&mut self, lab: &Lab) -> Result<()> {
        let command = Self::command(lab, &self.config)?;
        self.process = lab
            .start("orchestrator", command)
            .context("starting the orchestrator again")?;
        self.answers().await
    }

    /// Starts it again with this in its environment, and does not wait.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_told(&mut self, lab: &Lab, (name, value): (&str, &str)) -> Result<()> {
        let mut command = Self::command(lab, &self.config)?;
        command.env(name, value);
        self.process = lab.start("orchestrator", command)?;
        Ok(())
    }
}
