//! Desktops that are members of an Active Directory domain: a provider around another one.
//!
//! The account is part of the desktop: made before its machine, removed after it, listed with it. So whatever holds for machines
//! holds for accounts: half-made ones are found and removed, a removal is checked, and the reaper sees those that nobody owns.
//!
//! # Guarantees
//! Those of [`Provider`]. A machine is removed before its account: one that still runs never outlives its membership.

mod directory;

pub use directory::{Directory, DirectoryError};

use crate::provider::{
    AgentChannel, Check, CheckStatus, DesktopSpec, MachineState, Provider, ProviderError, Section,
};
use crate::secret::{self, Secrets};
use anyhow::Context;
use async_trait::async_trait;
use mayfly_api::DesktopName;
use mayfly_api::agent::Bootstrap;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What was found well is looked at again after this.
const CHECKED: Duration = Duration::from_secs(30);

/// `[domain]` of the configuration.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DomainConfig {
    /// DNS name of the domain, such as `ad.example.org`.
    pub name: String,
    /// Domain controllers, by name, in order of preference. Presets and removals go to the first that answers; desktops join at
    /// the first of the list, so while that one is down no desktop can join.
    pub servers: Vec<String>,
    /// Whom desktops ask for names of the domain, where their network's own name servers do not know them.
    pub dns_servers: Vec<IpAddr>,
    /// The authority that signed the controllers' certificates; without it, those of the system.
    pub ca_file: Option<PathBuf>,
    /// The account that manages computers, as `name@domain` or by its DN.
    pub account: String,
    /// A file of mode 0600 with its password.
    pub password_file: PathBuf,
    /// DN of the organisational unit that desktops' accounts are in, and nothing else.
    pub ou: String,
}

impl DomainConfig {
    /// The directory, with the password that is read now. Accounts are marked as those of `installation`.
    ///
    /// # Errors
    /// What is wrong with the settings.
    pub fn open(&self, installation: &str) -> anyhow::Result<Directory> {
        for (key, missing) in [
            ("name", self.name.is_empty()),
            ("servers", self.servers.is_empty()),
            ("account", self.account.is_empty()),
            ("ou", self.ou.is_empty()),
        ] {
            anyhow::ensure!(
                !missing,
                "a template is a member of the domain: set domain.{key}"
            );
        }
        let password = secret::from_file(&self.password_file).context("domain.password_file")?;
        Directory::new(self, password, installation).context("domain")
    }
}

/// A provider whose desktops are members of a domain if their template says so.
pub struct Member {
    machines: Arc<dyn Provider>,
    directory: Arc<Directory>,
    secrets: Arc<Secrets>,
    checked: tokio::sync::Mutex<Option<Instant>>,
}

impl Member {
    /// Machines of that provider, accounts of that directory.
    #[must_use]
    pub fn new(
        machines: Arc<dyn Provider>,
        directory: Arc<Directory>,
        secrets: Arc<Secrets>,
    ) -> Self {
        Self {
            machines,
            directory,
            secrets,
            checked: tokio::sync::Mutex::default(),
        }
    }
}

#[async_trait]
impl Provider for Member {
    fn kind(&self) -> &'static str {
        self.machines.kind()
    }

    async fn preflight(&self) -> Vec<Check> {
        let mut found = self.machines.preflight().await;
        let mut checked = self.checked.lock().await;
        if !checked.is_some_and(|at| at.elapsed() < CHECKED) {
            let check = check_of(&self.directory).await;
            *checked = (check.status == CheckStatus::Ok).then(Instant::now);
            found.push(check);
        }
        found
    }

    async fn create(&self, spec: &DesktopSpec) -> Result<(), ProviderError> {
        if spec.in_domain {
            let password = self.secrets.join_password(spec.name);
            self.directory.preset(spec.name, &password).await?;
        }
        self.machines.create(spec).await
    }

    fn is_followed(&self) -> bool {
        self.machines.is_followed()
    }

    async fn adopt(&self, name: DesktopName) -> Result<bool, ProviderError> {
        self.machines.adopt(name).await
    }

    async fn state(&self, name: DesktopName) -> Result<MachineState, ProviderError> {
        match self.machines.state(name).await? {
            MachineState::Absent if self.directory.exists(name).await? => Ok(MachineState::Dead {
                reason: "only its computer account exists".to_owned(),
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
        self.machines.last_words(name).await
    }

    async fn destroy(&self, name: DesktopName) -> Result<(), ProviderError> {
        self.machines.destroy(name).await?;
        self.directory.remove(name).await?;
        Ok(())
    }

    async fn list(&self) -> Result<Vec<DesktopName>, ProviderError> {
        let mut names: BTreeSet<_> = self.machines.list().await?.into_iter().collect();
        match self.directory.list().await {
            Ok(accounts) => names.extend(accounts),
            // What is not listed is not missed: machines without owner are removed even while the domain is down.
            Err(error) => tracing::warn!(%error, "accounts of desktops could not be listed"),
        }
        Ok(names.into_iter().collect())
    }
}

impl From<DirectoryError> for ProviderError {
    fn from(error: DirectoryError) -> Self {
        let text = error.to_string();
        match error {
            DirectoryError::Certificate { .. }
            | DirectoryError::Refused { .. }
            | DirectoryError::Forbidden { .. }
            | DirectoryError::NoSuchUnit(_) => Self::Unavailable(text),
            DirectoryError::Unreachable(_)
            | DirectoryError::Exists(_)
            | DirectoryError::Failed(_) => Self::Failed(text),
        }
    }
}

/// What `doctor` says of the domain.
pub async fn checks(config: &DomainConfig) -> Vec<Check> {
    vec![match config.open("") {
        Ok(directory) => check_of(&directory).await,
        Err(error) => check(CheckStatus::Error, format!("{error:#}")),
    }]
}

async fn check_of(directory: &Directory) -> Check {
    match directory.check().await {
        Ok(()) => check(CheckStatus::Ok, format!("{directory:?}")),
        Err(error) => check(CheckStatus::Error, error.to_string()),
    }
}

fn check(status: CheckStatus, detail: String) -> Check {
    Check {
        name: "domain".to_owned(),
        status,
        detail,
    }
}
