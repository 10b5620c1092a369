//! Desktops whose template is plain: a provider around another one, which has Ansible configure each machine before it is used.
//!
//! The playbook is part of the create. Its run has a folder `<state>/ansible/<name>`, made before the machine: so nobody takes a
//! machine for whole that was made and not configured.
//!
//! # Guarantees
//! Those of [`Provider`], and:
//! * A playbook that fails, does nothing or takes too long fails the create, with the task's name and its reason.
//! * The machine's SSH host key is the one that was read from inside the machine.
//! * A run goes on without this process and is found again; when `destroy` returns, no process of it is left.

mod events;
mod playbook;

use crate::clock::s;
use crate::provider::news::News;
use crate::provider::{
    AgentChannel, Check, CheckStatus, DesktopSpec, Extra, Locks, MachineState, Provider,
    ProviderError, Section, SshServer, Steps, absent, lock_of,
};
use crate::run::{Language, Run, one_line};
use crate::secret::Secrets;
use anyhow::Context;
use async_trait::async_trait;
use mayfly_api::agent::Bootstrap;
use mayfly_api::{Absence, DesktopName, StageProgress};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two looks whether a machine can be configured yet.
const LOOK: Duration = Duration::from_millis(500);
/// Ansible loads half of itself to say its version.
const VERSION: Duration = Duration::from_secs(60);
/// Names the playbook in a desktop's folder.
const PLAN: &str = "playbook";

/// `[ansible]` of the configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AnsibleConfig {
    /// `ansible-playbook`: a name on `PATH` or a path.
    pub program: PathBuf,
    /// A machine that is not configured so long after it was made has failed.
    pub timeout_s: u32,
    /// The agent's program that the playbook puts into the machine.
    pub agent: PathBuf,
    /// Files with the site's variables, which win over those of playbooks and roles. `ansible-vault` may have encrypted them.
    pub variables: Vec<PathBuf>,
    /// The file with the vault's password, or a program that prints it.
    pub vault_password_file: Option<PathBuf>,
}

impl Default for AnsibleConfig {
    fn default() -> Self {
        Self {
            program: "ansible-playbook".into(),
            timeout_s: 900,
            agent: "/usr/lib/mayfly/mayfly-agent".into(),
            variables: Vec::new(),
            vault_password_file: None,
        }
    }
}

/// The steps that [`Steps`] is told of.
pub const STEPS: [&str; 6] = [
    "create: planned",
    "create: machine runs",
    "create: playbook started",
    "create: configured",
    "destroy: playbook ended",
    "destroy: machine gone",
];

/// How playbooks talk.
const LANGUAGE: Language = Language {
    progress: events::progress,
    stage: events::stage,
    failure: events::failure,
    words: str::to_owned,
};

/// A provider whose desktops are configured by a playbook if their template says so.
pub struct Ansible {
    machines: Arc<dyn Provider>,
    config: AnsibleConfig,
    playbooks: BTreeSet<PathBuf>,
    orchestrator: PathBuf,
    secrets: Arc<Secrets>,
    folder: PathBuf,
    steps: Steps,
    /// The machines' own, so that both tell one story.
    news: News,
    locks: Locks,
}

impl Ansible {
    /// Machines of that provider, configured by these playbooks. `orchestrator` is this program, for supervisors; `state` the
    /// state folder.
    ///
    /// # Errors
    /// The folder of runs cannot be made.
    pub fn new(
        machines: Arc<dyn Provider>,
        config: AnsibleConfig,
        playbooks: BTreeSet<PathBuf>,
        orchestrator: PathBuf,
        state: &Path,
        secrets: Arc<Secrets>,
    ) -> anyhow::Result<Self> {
        let folder = state.join("ansible");
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .with_context(|| format!("{} cannot be made", folder.display()))?;
        Ok(Self {
            news: machines.news(),
            machines,
            config,
            playbooks,
            orchestrator,
            secrets,
            folder: folder.canonicalize()?,
            steps: crate::failpoints::steps(),
            locks: Locks::default(),
        })
    }

    /// The same with a function that is told of every step; for tests.
    #[must_use]
    pub fn with_steps(mut self, steps: Steps) -> Self {
        self.steps = steps;
        self
    }

    fn step(&self, step: &'static str) -> Result<(), ProviderError> {
        debug_assert!(STEPS.contains(&step));
        (self.steps)(step)
    }

    /// One create or destroy at a time for each desktop.
    async fn lock(&self, name: DesktopName) -> tokio::sync::OwnedMutexGuard<()> {
        lock_of(&self.locks, name).lock_owned().await
    }

    fn run(&self, name: DesktopName) -> Run {
        Run::at(self.folder.join(name.to_string()))
    }

    /// The playbook that this desktop was meant for.
    fn planned(&self, name: DesktopName) -> Result<Option<PathBuf>, ProviderError> {
        let path = self.run(name).folder().join(PLAN);
        match std::fs::read(&path) {
            Ok(plan) => Ok(Some(OsStr::from_bytes(&plan).into())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(&path, &error)),
        }
    }

    fn plan(&self, name: DesktopName, playbook: &Path) -> Result<(), ProviderError> {
        let run = self.run(name);
        let folder = run.folder();
        let made = std::fs::DirBuilder::new().mode(0o700).create(folder);
        made.and_then(|()| std::fs::write(folder.join(PLAN), playbook.as_os_str().as_bytes()))
            .map_err(|error| match error.kind() {
                ErrorKind::AlreadyExists => ProviderError::Failed(format!("{name} exists already")),
                _ => failed(folder, &error),
            })
    }

    /// The private key that the machine lets in.
    fn key(&self, name: DesktopName) -> Result<SecretString, ProviderError> {
        let seed = self.secrets.ssh_key_seed(name);
        let pair = ssh_key::private::Ed25519Keypair::from_seed(seed.expose_secret());
        let key = ssh_key::PrivateKey::from(pair).to_openssh(ssh_key::LineEnding::LF);
        let key = key.map_err(|e| ProviderError::Failed(format!("the key of {name}: {e}")))?;
        Ok(key.as_str().into())
    }

    /// What a run's words must not hold: the lines of that key.
    fn secrets_of(&self, name: DesktopName) -> Result<Vec<SecretString>, ProviderError> {
        let key = self.key(name)?;
        let lines = key.expose_secret().lines();
        let lines = lines.filter(|line| !line.starts_with('-'));
        Ok(lines.map(SecretString::from).collect())
    }

    /// Waits until the machine can be configured, starts the playbook and waits for its end.
    async fn configure(&self, name: DesktopName, playbook: &Path) -> Result<(), ProviderError> {
        let timeout = s(self.config.timeout_s);
        let begin = Instant::now();
        let server = loop {
            let why = match self.machines.ssh(name).await {
                Ok(server) => break server,
                Err(ProviderError::NotYet(why)) => {
                    self.news.tell(name, Some(StageProgress::FirstBoot));
                    why
                }
                Err(error) => return Err(error),
            };
            if begin.elapsed() >= timeout {
                return Err(ProviderError::Failed(format!(
                    "{name} could not be configured within {} s (ansible.timeout_s): {why}",
                    self.config.timeout_s
                )));
            }
            tokio::time::sleep(LOOK).await;
        };
        let program = which::which(&self.config.program).map_err(|error| {
            ProviderError::Unavailable(format!("{}: {error}", self.config.program.display()))
        })?;
        let config = AnsibleConfig {
            program,
            ..self.config.clone()
        };
        let run = self.run(name);
        let left = timeout.saturating_sub(begin.elapsed());
        let key = self.key(name)?;
        playbook::prepare(&run, &config, playbook, name, &server, &key, left)
            .and_then(|order| run.start(&self.orchestrator, order))
            .map_err(|error| failed(run.folder(), &error))?;
        self.step(STEPS[2])?;
        self.configured(name, playbook).await
    }

    /// Waits for the end of a playbook that was started.
    async fn configured(&self, name: DesktopName, playbook: &Path) -> Result<(), ProviderError> {
        let run = self.run(name);
        let told = |progress| self.news.tell(name, Some(progress));
        let said = run.wait(LANGUAGE, &self.secrets_of(name)?, told).await;
        // The connection that all tasks shared, and then the key.
        run.end().await.map_err(ProviderError::Failed)?;
        let work = playbook::work(&run);
        remove(&work)?;
        let why = match said {
            Ok(said) if events::reached(&said, &name.to_string()) => return Ok(()),
            Ok(_) => "it has nothing for the group ephemeral_desktop".to_owned(),
            Err(why) => why,
        };
        Err(ProviderError::Failed(format!(
            "{} did not configure {name}: {why}",
            playbook.display()
        )))
    }
}

#[async_trait]
impl Provider for Ansible {
    fn kind(&self) -> &'static str {
        self.machines.kind()
    }

    async fn preflight(&self) -> Vec<Check> {
        self.machines.preflight().await
    }

    async fn preflight_of(&self, extra: Extra) -> Vec<Check> {
        if extra == Extra::Playbook && !self.playbooks.is_empty() {
            return checks(&self.config, &self.playbooks);
        }
        self.machines.preflight_of(extra).await
    }

    async fn create(&self, spec: &DesktopSpec) -> Result<(), ProviderError> {
        let Some(playbook) = &spec.playbook else {
            return self.machines.create(spec).await;
        };
        let _alone = self.lock(spec.name).await;
        self.plan(spec.name, playbook)?;
        self.step(STEPS[0])?;
        self.machines.create(spec).await?;
        self.step(STEPS[1])?;
        self.configure(spec.name, playbook).await?;
        self.step(STEPS[3])
    }

    fn is_bound(&self) -> bool {
        self.machines.is_bound()
    }

    fn is_followed(&self) -> bool {
        self.machines.is_followed()
    }

    fn news(&self) -> News {
        self.news.clone()
    }

    async fn adopt(&self, name: DesktopName) -> Result<bool, ProviderError> {
        let Some(playbook) = self.planned(name)? else {
            return self.machines.adopt(name).await;
        };
        let _alone = self.lock(name).await;
        if !self.machines.adopt(name).await? {
            return Ok(false);
        }
        let run = self.run(name);
        let configured = if run.is_followed() {
            self.configured(name, &playbook).await
        } else if playbook::work(&run).exists() {
            // It was being started, or was killed: what it did nobody knows.
            return Ok(false);
        } else {
            self.configure(name, &playbook).await
        };
        match configured {
            Ok(()) => Ok(true),
            Err(error) => {
                tracing::warn!(desktop = %name, %error, "the playbook of an earlier process failed");
                Ok(false)
            }
        }
    }

    async fn state(&self, name: DesktopName) -> Result<MachineState, ProviderError> {
        match self.machines.state(name).await? {
            MachineState::Absent if self.run(name).folder().exists() => Ok(MachineState::Dead {
                reason: "only the folder of its playbook exists".to_owned(),
            }),
            state => Ok(state),
        }
    }

    async fn bootstrap(
        &self,
        name: DesktopName,
        bootstrap: &Bootstrap,
    ) -> Result<(), ProviderError> {
        self.machines.bootstrap(name, bootstrap).await
    }

    async fn agent(&self, name: DesktopName) -> Result<AgentChannel, ProviderError> {
        self.machines.agent(name).await
    }

    async fn rdp_address(&self, name: DesktopName) -> Result<SocketAddr, ProviderError> {
        self.machines.rdp_address(name).await
    }

    async fn last_words(&self, name: DesktopName) -> Vec<Section> {
        let mut sections = self.machines.last_words(name).await;
        let run = self.run(name);
        if let (true, Ok(secrets)) = (run.folder().exists(), self.secrets_of(name)) {
            sections.push(run.said("ansible", LANGUAGE, &secrets));
        }
        sections
    }

    async fn ssh(&self, name: DesktopName) -> Result<SshServer, ProviderError> {
        self.machines.ssh(name).await
    }

    async fn destroy(&self, name: DesktopName) -> Result<Vec<Absence>, ProviderError> {
        let _alone = self.lock(name).await;
        let run = self.run(name);
        if run.folder().exists() {
            run.end().await.map_err(ProviderError::Failed)?;
            self.step(STEPS[4])?;
        }
        let mut gone = self.machines.destroy(name).await?;
        self.step(STEPS[5])?;
        remove(run.folder())?;
        let folder = run.folder().display().to_string();
        gone.push(absent("ansible", "run of the playbook", folder));
        Ok(gone)
    }

    async fn list(&self) -> Result<Vec<DesktopName>, ProviderError> {
        let mut names: BTreeSet<_> = self.machines.list().await?.into_iter().collect();
        let entries = std::fs::read_dir(&self.folder).map_err(|e| failed(&self.folder, &e))?;
        names.extend(
            entries
                .flatten()
                .filter_map(|e| e.file_name().to_str()?.parse::<DesktopName>().ok()),
        );
        Ok(names.into_iter().collect())
    }
}

/// What is missing here before these playbooks can be run; nothing is said if there are none.
#[must_use]
pub fn checks(config: &AnsibleConfig, playbooks: &BTreeSet<PathBuf>) -> Vec<Check> {
    if playbooks.is_empty() {
        return Vec::new();
    }
    let mut missing: Vec<String> = [
        (
            config.program.as_path(),
            "install it, or set ansible.program",
        ),
        (Path::new("ssh"), "install the OpenSSH client"),
    ]
    .into_iter()
    .filter_map(|(program, advice)| {
        let error = which::which(program).err()?;
        Some(format!("{}: {error}; {advice}", program.display()))
    })
    .collect();
    let files = playbooks
        .iter()
        .map(|file| (file, "template.playbook"))
        .chain([(&config.agent, "ansible.agent")])
        .chain(config.variables.iter().map(|f| (f, "ansible.variables")))
        .chain(
            config
                .vault_password_file
                .iter()
                .map(|f| (f, "ansible.vault_password_file")),
        );
    missing.extend(files.filter_map(|(file, key)| {
        let error = std::fs::File::open(file).err()?;
        Some(format!("{}: {error}; set {key}", file.display()))
    }));
    if missing.is_empty() {
        let detail = config.program.display().to_string();
        return vec![check(CheckStatus::Ok, detail)];
    }
    missing
        .into_iter()
        .map(|detail| check(CheckStatus::Error, detail))
        .collect()
}

/// What `doctor` says: the same, and which version it is.
pub async fn examine(config: &AnsibleConfig, playbooks: &BTreeSet<PathBuf>) -> Vec<Check> {
    let found = checks(config, playbooks);
    if playbooks.is_empty() || found.iter().any(|check| check.status != CheckStatus::Ok) {
        return found;
    }
    let (status, detail) = match version(&config.program).await {
        Ok(version) => (CheckStatus::Ok, version),
        Err(why) => {
            let detail = format!("{} --version: {why}", config.program.display());
            (CheckStatus::Error, detail)
        }
    };
    vec![check(status, detail)]
}

/// The first line of what it says of itself; or that it is there and broken.
async fn version(program: &Path) -> Result<String, String> {
    let asked = tokio::process::Command::new(program)
        .arg("--version")
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(VERSION, asked)
        .await
        .map_err(|_| "it hangs".to_owned())?
        .map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(one_line(&String::from_utf8_lossy(&output.stderr)));
    }
    let said = String::from_utf8_lossy(&output.stdout);
    Ok(said.lines().next().unwrap_or_default().to_owned())
}

fn check(status: CheckStatus, detail: String) -> Check {
    Check {
        name: "ansible".to_owned(),
        status,
        detail,
    }
}

fn remove(folder: &Path) -> Result<(), ProviderError> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(failed(folder, &error)),
        _ => Ok(()),
    }
}

fn failed(path: &Path, error: &std::io::Error) -> ProviderError {
    ProviderError::Failed(format!("{}: {error}", path.display()))
}
