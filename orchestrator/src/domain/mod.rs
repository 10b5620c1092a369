//! Desktops that are members of an Active Directory domain: a provider around another one.
//!
//! The account is part of the desktop: made before its machine, removed after it, listed with it. So whatever holds for machines
//! holds for accounts: half-made ones are found and removed, a removal is checked, and the reaper sees those that nobody owns.
//!
//! # Guarantees
//! Those of [`Provider`].
//! * A machine is removed before its account: one that still runs never outlives its membership.
//! * A desktop that is to have an account is noted in a file first. What has no note needs no domain: it is made, seen and removed while
//!   the domain is down. One with a note is not called gone before the domain said so.
//! * A desktop asks that controller first where its account was preset.

mod directory;

pub use directory::{Directory, DirectoryError};

use crate::failpoints::around;
use crate::provider::news::News;
use crate::provider::{
    AgentChannel, Check, CheckStatus, DesktopSpec, Extra, MachineState, Provider, ProviderError,
    Section, absent,
};
use crate::secret::{self, Secrets};
use crate::telemetry;
use anyhow::Context;
use async_trait::async_trait;
use jiff::SignedDuration;
use mayfly_api::agent::Bootstrap;
use mayfly_api::{Absence, DesktopName};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What was found well is looked at again after this.
const CHECKED: Duration = Duration::from_secs(30);
/// What was not, after this: whoever asks meanwhile is told the same.
const CHECKED_ILL: Duration = Duration::from_secs(3);
/// Kerberos refuses a clock that is off by more (RFC 4120, and Active Directory's default).
const MOST_SKEW: SignedDuration = SignedDuration::from_secs(300);
/// Clocks that somebody sets are off by less.
const USUAL_SKEW: SignedDuration = SignedDuration::from_secs(60);

/// `[domain]` of the configuration.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DomainConfig {
    /// DNS name of the domain, such as `ad.example.org`.
    pub name: String,
    /// Domain controllers, by name, in order of preference. An account is preset at the first that answers, and its desktop joins
    /// there; while that one is down, at another that has heard of the account.
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
    /// One file for each desktop that may have an account, with the name of the controller where it was preset.
    notes: PathBuf,
    checked: tokio::sync::Mutex<Option<(Instant, Check)>>,
}

impl Member {
    /// Machines of that provider, accounts of that directory. What must outlive this process is kept in `folder`.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn new(
        machines: Arc<dyn Provider>,
        directory: Arc<Directory>,
        secrets: Arc<Secrets>,
        folder: &Path,
    ) -> anyhow::Result<Self> {
        let notes = folder.join("domain").join(machines.kind());
        std::fs::create_dir_all(&notes)
            .with_context(|| format!("{} cannot be made", notes.display()))?;
        Ok(Self {
            machines,
            directory,
            secrets,
            notes,
            checked: tokio::sync::Mutex::default(),
        })
    }

    fn note(&self, name: DesktopName) -> PathBuf {
        self.notes.join(name.to_string())
    }
}

#[async_trait]
impl Provider for Member {
    fn kind(&self) -> &'static str {
        self.machines.kind()
    }

    async fn preflight(&self) -> Vec<Check> {
        self.machines.preflight().await
    }

    async fn preflight_of(&self, extra: Extra) -> Vec<Check> {
        if extra != Extra::Domain {
            return self.machines.preflight_of(extra).await;
        }
        let mut checked = self.checked.lock().await;
        if let Some((at, found)) = &*checked {
            let ill = found.status == CheckStatus::Error;
            if at.elapsed() < if ill { CHECKED_ILL } else { CHECKED } {
                return vec![found.clone()];
            }
        }
        let found = around("account check", self.directory.check()).await;
        let found = judge(&found);
        *checked = Some((Instant::now(), found.clone()));
        vec![found]
    }

    async fn create(&self, spec: &DesktopSpec) -> Result<(), ProviderError> {
        if spec.in_domain {
            let path = self.note(spec.name);
            let failed = |error: std::io::Error| {
                ProviderError::Failed(format!("{}: {error}", path.display()))
            };
            let mut note = std::fs::File::create_new(&path).map_err(failed)?;
            let password = self.secrets.join_password(spec.name);
            let preset = self.directory.preset(spec.name, &password);
            let server =
                around("account preset", telemetry::call("account preset", preset)).await?;
            note.write_all(server.as_bytes()).map_err(failed)?;
        }
        self.machines.create(spec).await
    }

    fn is_bound(&self) -> bool {
        self.machines.is_bound()
    }

    fn is_followed(&self) -> bool {
        self.machines.is_followed()
    }

    fn news(&self) -> News {
        self.machines.news()
    }

    async fn adopt(&self, name: DesktopName) -> Result<bool, ProviderError> {
        self.machines.adopt(name).await
    }

    async fn state(&self, name: DesktopName) -> Result<MachineState, ProviderError> {
        Ok(match self.machines.state(name).await? {
            MachineState::Absent if self.note(name).exists() => MachineState::Dead {
                reason: "only its computer account exists, or a note of it".to_owned(),
            },
            // Without a note of it, a domain that does not answer has no account either.
            MachineState::Absent
                if around("account look", self.directory.exists(name))
                    .await
                    .unwrap_or(false) =>
            {
                MachineState::Dead {
                    reason: "only its computer account exists".to_owned(),
                }
            }
            state => state,
        })
    }

    async fn bootstrap(
        &self,
        name: DesktopName,
        bootstrap: &Bootstrap,
    ) -> Result<(), ProviderError> {
        let mut bootstrap = bootstrap.clone();
        if let Some(domain) = &mut bootstrap.domain
            && let Ok(at) = std::fs::read_to_string(self.note(name))
        {
            domain.servers.sort_by_key(|server| *server != at);
        }
        self.machines.bootstrap(name, &bootstrap).await
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

    async fn destroy(&self, name: DesktopName) -> Result<Vec<Absence>, ProviderError> {
        let mut gone = self.machines.destroy(name).await?;
        let note = self.note(name);
        let removed = telemetry::call("account remove", self.directory.remove(name));
        match around("account remove", removed).await {
            Ok(_) => gone.push(absent(
                "domain",
                "account",
                format!("the computer {name} on every controller that answers"),
            )),
            Err(error) if note.exists() => return Err(error.into()),
            // One that is there all the same is listed as soon as the domain answers.
            Err(error) => {
                tracing::warn!(desktop = %name, %error, "whether it had an account is not known; there is no note of one");
            }
        }
        match std::fs::remove_file(&note) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(
                ProviderError::Failed(format!("{}: {error}", note.display())),
            ),
            _ => Ok(gone),
        }
    }

    async fn list(&self) -> Result<Vec<DesktopName>, ProviderError> {
        let mut names: BTreeSet<_> = self.machines.list().await?.into_iter().collect();
        let notes = std::fs::read_dir(&self.notes)
            .map_err(|error| ProviderError::Failed(format!("{}: {error}", self.notes.display())))?;
        names.extend(
            notes
                .flatten()
                .filter_map(|note| note.file_name().to_str()?.parse::<DesktopName>().ok()),
        );
        match around("account list", self.directory.list()).await {
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
            DirectoryError::Unreachable(_) => Self::Busy(text),
            DirectoryError::Exists(_) | DirectoryError::Failed(_) => Self::Failed(text),
        }
    }
}

/// What `doctor` says of the domain.
pub async fn checks(config: &DomainConfig) -> Vec<Check> {
    vec![match config.open("") {
        Ok(directory) => judge(&directory.check().await),
        Err(error) => check(CheckStatus::Error, format!("{error:#}")),
    }]
}

/// What each controller said, as one line. The first that can be asked is the one that accounts are preset at and desktops join
/// at: the others' faults cost time, and nobody their desktop.
fn judge(looked: &[(String, Result<SignedDuration, DirectoryError>)]) -> Check {
    use CheckStatus::{Error, Ok as Well, Warning};
    let all: Vec<_> = looked.iter().map(|(at, found)| say(at, found)).collect();
    let asked = |found: &Result<_, DirectoryError>| {
        !found.as_ref().is_err_and(DirectoryError::asked_nothing)
    };
    let first = looked.iter().position(|(_, found)| asked(found));
    let status = match first.map(|first| all[first].0) {
        None => Error,
        Some(Well) if all.iter().any(|(status, _)| *status != Well) => Warning,
        Some(status) => status,
    };
    let words: Vec<_> = all.into_iter().map(|(_, words)| words).collect();
    check(status, words.join("; "))
}

fn say(at: &str, found: &Result<SignedDuration, DirectoryError>) -> (CheckStatus, String) {
    match found {
        Err(error) if error.asked_nothing() => (CheckStatus::Error, error.to_string()),
        Err(error) => (CheckStatus::Error, format!("{at}: {error}")),
        Ok(skew) if skew.abs() <= USUAL_SKEW => (CheckStatus::Ok, format!("{at} is ready")),
        Ok(skew) => (
            if skew.abs() > MOST_SKEW {
                CheckStatus::Error
            } else {
                CheckStatus::Warning
            },
            format!(
                "the clocks of {at} and of this machine, which desktops are set by, differ by {} s, and Kerberos refuses more than \
                 {} s: set both by the same time servers",
                skew.abs().as_secs(),
                MOST_SKEW.as_secs()
            ),
        ),
    }
}

fn check(status: CheckStatus, detail: String) -> Check {
    Check {
        name: "domain".to_owned(),
        status,
        detail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::simulated::{Simulated, SimulatedConfig};

    fn down() -> Result<SignedDuration, DirectoryError> {
        Err(DirectoryError::Unreachable("dc: refused".to_owned()))
    }

    fn off(seconds: i64) -> Result<SignedDuration, DirectoryError> {
        Ok(SignedDuration::from_secs(seconds))
    }

    fn refused() -> Result<SignedDuration, DirectoryError> {
        let account = "svc@ad.example.org".to_owned();
        Err(DirectoryError::Refused { account })
    }

    #[test]
    fn the_first_controller_that_answers_decides_and_the_others_faults_are_told() {
        use CheckStatus::{Error, Ok as Well, Warning};
        for (found, status, words) in [
            (vec![off(0), off(-2)], Well, "dc0 is ready; dc1 is ready"),
            (vec![down(), off(0)], Warning, "no answer from dc: refused"),
            (vec![off(0), down()], Warning, "no answer from dc: refused"),
            (vec![down(), down()], Error, "no answer from dc: refused"),
            (
                vec![off(0), refused()],
                Warning,
                "dc1: the domain does not accept",
            ),
            (vec![down(), refused()], Error, "domain.password_file"),
            (vec![off(-61)], Warning, "differ by 61 s"),
            (vec![off(301)], Error, "Kerberos refuses more than 300 s"),
            (vec![down(), off(301), off(0)], Error, "the clocks of dc1"),
            (vec![off(0), off(301)], Warning, "the clocks of dc1"),
        ] {
            let names = (0..).map(|n| format!("dc{n}"));
            let looked: Vec<_> = names.zip(found).collect();
            let check = judge(&looked);
            assert_eq!(check.status, status, "{check:?}");
            assert!(check.detail.contains(words), "{check:?}");
        }
    }

    /// Simulated machines, and a domain whose controllers do not answer.
    fn members(folder: &Path) -> Member {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        let ca_file = folder.join("ca.pem");
        std::fs::write(&ca_file, params.self_signed(&key).unwrap().pem()).unwrap();
        let config = DomainConfig {
            name: "ad.example.org".to_owned(),
            servers: vec!["127.0.0.1:1".to_owned(), "127.0.0.1:2".to_owned()],
            ca_file: Some(ca_file),
            ..DomainConfig::default()
        };
        let directory = Directory::new(&config, "secret".into(), "1").unwrap();
        let machines = SimulatedConfig {
            boot_ms: 1,
            ..SimulatedConfig::default()
        };
        let machines = Simulated::open(machines, &folder.join("machines")).unwrap();
        let secrets = Secrets::open(&folder.join("secret.key")).unwrap();
        Member::new(
            Arc::new(machines),
            Arc::new(directory),
            Arc::new(secrets),
            folder,
        )
        .unwrap()
    }

    fn desktop(in_domain: bool) -> DesktopSpec {
        DesktopSpec {
            name: DesktopName::from_number(7).unwrap(),
            session: mayfly_api::SessionId::new(),
            cpus: 1,
            memory_mib: 128,
            in_domain,
            playbook: None,
            lifetime: Duration::from_secs(60),
        }
    }

    #[tokio::test]
    async fn while_the_domain_is_down_a_desktop_outside_it_lives_and_dies() {
        let folder = tempfile::tempdir().unwrap();
        let members = members(folder.path());
        let spec = desktop(false);
        let well = |check: &Check| check.status != CheckStatus::Error;
        assert!(members.preflight().await.iter().all(well));
        let told = members.preflight_of(Extra::Domain).await;
        assert!(!told.iter().all(well), "{told:?}");
        members.create(&spec).await.unwrap();
        assert_eq!(members.list().await.unwrap(), [spec.name]);
        members.destroy(spec.name).await.unwrap();
        let state = members.state(spec.name).await.unwrap();
        assert_eq!(state, MachineState::Absent);
        assert_eq!(members.list().await.unwrap(), []);
    }

    #[tokio::test]
    async fn while_the_domain_is_down_no_account_is_believed_gone() {
        let folder = tempfile::tempdir().unwrap();
        let spec = desktop(true);
        let error = members(folder.path()).create(&spec).await.unwrap_err();
        assert!(error.to_string().contains("127.0.0.1:2"), "{error}");
        // Whether its account was made is not known; another process neither.
        let members = members(folder.path());
        assert!(members.destroy(spec.name).await.is_err());
        let state = members.state(spec.name).await.unwrap();
        assert!(matches!(state, MachineState::Dead { .. }), "{state:?}");
        assert_eq!(members.list().await.unwrap(), [spec.name]);
    }
}
