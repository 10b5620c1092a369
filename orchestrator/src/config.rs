//! The configuration: one TOML file, overridden by the environment; what it does not know it refuses.
//!
//! Every key has a default, so no file is needed. The environment variable
//! `MAYFLY_LIMITS__IDLE_S=120` overrides `[limits] idle_s`, `MAYFLY_LISTEN` overrides `listen`, and so on.

use crate::agents::AgentsConfig;
use crate::ansible::AnsibleConfig;
use crate::domain::DomainConfig;
use crate::provider::Extra;
use crate::provider::qemu::QemuConfig;
use crate::provider::simulated::SimulatedConfig;
use crate::provider::terraform::TerraformConfig;
use crate::pve::preflight::Rest;
use crate::store::postgres::StoreConfig;
use crate::telemetry::TelemetryConfig;
use mayfly_api::StageName;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the configuration is looked for when none is named.
pub const DEFAULT_FILE: &str = "/etc/mayfly/orchestrator.toml";
const ENVIRONMENT: &str = "MAYFLY_";
/// Thirty days: nobody keeps a desktop that long on purpose.
const MOST_KEPT_S: u32 = 2_592_000;
/// Only variables that begin with one of these are ours: others with that prefix belong to other parts.
const OVERRIDABLE: [&str; 9] = [
    "listen",
    "state_dir",
    "limits",
    "agents",
    "ansible",
    "domain",
    "provider",
    "store",
    "telemetry",
];

/// Why the configuration cannot be used: names the file or variable, the key, and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration file {path}: {cause}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        cause: std::io::Error,
    },
    /// Wrong TOML, an unknown key, a wrong type.
    #[error("{origin}: {cause}")]
    Parse {
        /// The file, or the file and the environment.
        origin: String,
        /// The cause, with line and key.
        cause: Box<toml::de::Error>,
    },
    /// A value out of range.
    #[error("{origin}: {key} = {value}: {allowed}")]
    Value {
        /// The file.
        origin: String,
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What is allowed, and why.
        allowed: String,
    },
    /// No home for the state.
    #[error("no folder for the state: set state_dir in the configuration, or HOME")]
    NoHome,
}

/// Everything that can be configured.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the API answers. Loopback only, until people can log in.
    pub listen: SocketAddr,
    /// Database, key and providers' state. Default: `/var/lib/mayfly` for root, `$XDG_STATE_HOME/mayfly` for others.
    pub state_dir: PathBuf,
    /// Where sessions are remembered, if not in the state folder.
    pub store: StoreConfig,
    /// Times and numbers.
    pub limits: Limits,
    /// Where agents of desktops on other machines call.
    pub agents: AgentsConfig,
    /// How desktops of plain templates are configured.
    pub ansible: AnsibleConfig,
    /// The Active Directory domain of templates that say so.
    pub domain: DomainConfig,
    /// Where traces are sent.
    pub telemetry: TelemetryConfig,
    /// The catalogue; the first is the default.
    pub template: Vec<Template>,
    /// Where desktops come from.
    pub provider: Providers,
}

/// Times and numbers.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// A desktop ends this long after its last RDP connection, or after the end of a keep.
    pub idle_s: u32,
    /// A desktop that nobody ever connected to ends this long after it was ready.
    pub never_connected_s: u32,
    /// A session without RDP connection whose launcher is silent this long ends.
    pub lease_s: u32,
    /// A session ends this long after it was accepted, whatever happens.
    pub lifetime_s: u32,
    /// Longest time a desktop can be kept without an RDP connection, in all.
    pub keep_max_s: u32,
    /// A session whose desktop is not ready so long after it got its place has failed, however many desktops were tried.
    pub create_timeout_s: u32,
    /// Longest time at the stage `creating`. A desktop that takes longer at a stage is removed and another is made, at most twice.
    pub creating_timeout_s: u32,
    /// Longest time at the stage `booting`.
    pub booting_timeout_s: u32,
    /// Longest time at the stage `configuring`.
    pub configuring_timeout_s: u32,
    /// Longest time at the stage `connecting`.
    pub connecting_timeout_s: u32,
    /// A desktop that could not be made is left so long for an administrator to look at. 0: it is removed at once.
    pub keep_failed_s: u32,
    /// A desktop whose machine runs and whose agent is silent this long ends; an agent that hears nothing this long, and
    /// sees nobody connected, powers its machine off.
    pub silence_s: u32,
    /// The machine of an orchestrator that shares its database with others is lost so long after its lease, and the desktops on it are stuck.
    pub host_lost_s: u32,
    /// What no desktop owns is removed so long after it was seen for the second time. 0: at once.
    pub quarantine_s: u32,
    /// So many desktops are made at a time.
    pub concurrent_creates: u32,
    /// So many desktops exist at a time; more sessions wait.
    pub max_desktops: u32,
    /// So many sessions may wait; more are refused.
    pub max_queued: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            idle_s: 60,
            never_connected_s: 300,
            lease_s: 90,
            lifetime_s: 28_800,
            keep_max_s: 3_600,
            create_timeout_s: 600,
            creating_timeout_s: 500,
            booting_timeout_s: 180,
            configuring_timeout_s: 180,
            connecting_timeout_s: 120,
            keep_failed_s: 0,
            silence_s: 600,
            host_lost_s: 600,
            quarantine_s: 60,
            concurrent_creates: 2,
            max_desktops: 10,
            max_queued: 100,
        }
    }
}

/// A catalogue entry.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// What sessions ask for.
    pub name: String,
    /// `qemu`, `terraform` or `simulated`.
    pub provider: ProviderKind,
    /// Processors.
    #[serde(default = "default_cpus")]
    pub cpus: u32,
    /// Memory, in MiB.
    #[serde(default = "default_memory_mib")]
    pub memory_mib: u32,
    /// In place of [`Limits::keep_max_s`], for desktops of this template.
    #[serde(default)]
    pub keep_max_s: Option<u32>,
    /// Whether desktops are members of the domain, and people log in with their accounts there.
    #[serde(default)]
    pub domain: bool,
    /// What is mounted for people of the domain.
    #[serde(default)]
    pub shares: Vec<mayfly_api::agent::Share>,
    /// The playbook that makes a desktop of each machine, if the template is a plain one.
    #[serde(default)]
    pub playbook: Option<PathBuf>,
}

impl Template {
    /// What its desktops want beside a machine.
    #[must_use]
    pub fn extras(&self) -> Vec<Extra> {
        let domain = self.domain.then_some(Extra::Domain);
        let playbook = self.playbook.as_ref().map(|_| Extra::Playbook);
        domain.into_iter().chain(playbook).collect()
    }
}

fn default_cpus() -> u32 {
    2
}

fn default_memory_mib() -> u32 {
    1536
}

/// The providers there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProviderKind {
    /// Virtual machines on this host.
    Qemu,
    /// Virtual machines on Proxmox VE, made by Terraform or OpenTofu.
    Terraform,
    /// No machines at all: for tests and demonstrations.
    Simulated,
}

impl ProviderKind {
    /// As the configuration and the store write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Terraform => "terraform",
            Self::Simulated => "simulated",
        }
    }
}

/// Where desktops come from.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Providers {
    /// `[provider.qemu]`
    pub qemu: QemuConfig,
    /// `[provider.terraform]`
    pub terraform: TerraformConfig,
    /// `[provider.simulated]`
    pub simulated: SimulatedConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 5000)),
            state_dir: PathBuf::new(),
            store: StoreConfig::default(),
            limits: Limits::default(),
            agents: AgentsConfig::default(),
            ansible: AnsibleConfig::default(),
            domain: DomainConfig::default(),
            telemetry: TelemetryConfig::default(),
            template: vec![Template {
                name: "desktop".to_owned(),
                provider: ProviderKind::Qemu,
                cpus: default_cpus(),
                memory_mib: default_memory_mib(),
                keep_max_s: None,
                domain: false,
                shares: Vec::new(),
                playbook: None,
            }],
            provider: Providers::default(),
        }
    }
}

impl Config {
    /// Reads `file`, or [`DEFAULT_FILE`] if it exists, or nothing; then the environment; then checks every value.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let file = match file {
            Some(file) => Some(file),
            None => Some(Path::new(DEFAULT_FILE)).filter(|f| f.exists()),
        };
        let text = match file {
            None => String::new(),
            Some(path) => std::fs::read_to_string(path).map_err(|cause| ConfigError::Read {
                path: path.to_owned(),
                cause,
            })?,
        };
        let origin = file.map_or_else(
            || "the built-in configuration".to_owned(),
            |f| f.display().to_string(),
        );
        Self::read(&text, &origin, std::env::vars())
    }

    /// The configuration in `text`, which `origin` names in errors, overridden by `environment`.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn read(
        text: &str,
        origin: &str,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let parse = |origin: String| {
            move |cause| ConfigError::Parse {
                origin,
                cause: Box::new(cause),
            }
        };
        // The text alone first: only that error can show the line.
        let mut config: Self = toml::from_str(text).map_err(parse(origin.to_owned()))?;
        let mut origin = origin.to_owned();
        let overrides: Vec<_> = environment
            .into_iter()
            .filter_map(|(name, value)| {
                let path = name.strip_prefix(ENVIRONMENT)?.to_lowercase();
                let key = path.split("__").next()?;
                OVERRIDABLE.contains(&key).then_some((path, value))
            })
            .collect();
        if !overrides.is_empty() {
            origin = format!("{origin} with the variables {ENVIRONMENT}…");
            let mut table: toml::Table = toml::from_str(text).map_err(parse(origin.clone()))?;
            for (path, value) in overrides {
                set(&mut table, &path, &value);
            }
            config = toml::Value::Table(table)
                .try_into()
                .map_err(parse(origin.clone()))?;
        }
        if config.state_dir.as_os_str().is_empty() {
            config.state_dir = default_state_dir()?;
        }
        config.check(&origin)?;
        Ok(config)
    }

    fn check(&self, origin: &str) -> Result<(), ConfigError> {
        let wrong = |key: &str, value: String, allowed: &str| {
            Err(ConfigError::Value {
                origin: origin.to_owned(),
                key: key.to_owned(),
                value,
                allowed: allowed.to_owned(),
            })
        };
        if !self.listen.ip().is_loopback() {
            return wrong(
                "listen",
                self.listen.to_string(),
                "only a loopback address such as 127.0.0.1:5000 is allowed: there is no login yet, \
                 so whoever reaches the API can make desktops",
            );
        }
        if !self.state_dir.is_absolute() {
            return wrong(
                "state_dir",
                self.state_dir.display().to_string(),
                "an absolute path is needed",
            );
        }
        if let Some(allowed) = self.store.wrong() {
            // Its value may hold a password.
            return wrong("store.url", "…".to_owned(), allowed);
        }
        if let Some(allowed) = self.telemetry.wrong() {
            // Its value may hold a password.
            return wrong("telemetry.otlp_endpoint", "…".to_owned(), allowed);
        }
        let l = &self.limits;
        for (key, value, range) in [
            ("limits.idle_s", l.idle_s, 1..=86_400),
            ("limits.never_connected_s", l.never_connected_s, 1..=86_400),
            ("limits.lease_s", l.lease_s, 1..=86_400),
            ("limits.lifetime_s", l.lifetime_s, 1..=2_592_000),
            ("limits.keep_max_s", l.keep_max_s, 0..=MOST_KEPT_S),
            ("limits.create_timeout_s", l.create_timeout_s, 1..=86_400),
            (
                "limits.creating_timeout_s",
                l.creating_timeout_s,
                1..=86_400,
            ),
            ("limits.booting_timeout_s", l.booting_timeout_s, 1..=86_400),
            (
                "limits.configuring_timeout_s",
                l.configuring_timeout_s,
                1..=86_400,
            ),
            (
                "limits.connecting_timeout_s",
                l.connecting_timeout_s,
                1..=86_400,
            ),
            ("limits.keep_failed_s", l.keep_failed_s, 0..=86_400),
            ("limits.silence_s", l.silence_s, 10..=86_400),
            ("limits.quarantine_s", l.quarantine_s, 0..=86_400),
            ("limits.concurrent_creates", l.concurrent_creates, 1..=1_000),
            ("limits.max_desktops", l.max_desktops, 1..=60_000),
            ("limits.max_queued", l.max_queued, 0..=100_000),
        ] {
            if !range.contains(&value) {
                let allowed = format!("{} to {} is allowed", range.start(), range.end());
                return wrong(key, value.to_string(), &allowed);
            }
        }
        if !(1..=43_200).contains(&self.ansible.timeout_s) {
            let value = self.ansible.timeout_s.to_string();
            return wrong("ansible.timeout_s", value, "1 to 43200 is allowed");
        }
        if !self.playbooks().is_empty() {
            let (made, configured) = (
                self.provider.terraform.apply_timeout_s,
                self.ansible.timeout_s,
            );
            let least = made.saturating_add(configured);
            for (key, value) in [
                ("limits.creating_timeout_s", l.creating_timeout_s),
                ("limits.create_timeout_s", l.create_timeout_s),
            ] {
                if value <= least {
                    let allowed = format!(
                        "more than {least} is needed, since a template has a playbook: \
                         provider.terraform.apply_timeout_s ({made}) and ansible.timeout_s ({configured}) have to end before it"
                    );
                    return wrong(key, value.to_string(), &allowed);
                }
            }
        }
        let terraform = &self.provider.terraform;
        if !(1..terraform.apply_timeout_s).contains(&terraform.address_timeout_s) {
            return wrong(
                "provider.terraform.address_timeout_s",
                terraform.address_timeout_s.to_string(),
                "at least 1 is needed, and less than provider.terraform.apply_timeout_s, which it is a part of",
            );
        }
        let clones = self.provider.terraform.proxmox.clones;
        if !(1..=100).contains(&clones) {
            let key = "provider.terraform.proxmox.clones";
            return wrong(key, clones.to_string(), "1 to 100 is allowed");
        }
        let first = self.provider.terraform.first_vm_id;
        let highest = 999_999_999 - mayfly_api::DesktopName::LIMIT;
        if !(100..=highest).contains(&first) {
            let allowed = format!("100 to {highest} is allowed");
            return wrong(
                "provider.terraform.first_vm_id",
                first.to_string(),
                &allowed,
            );
        }
        let here = self.agents.listen.filter(|_| self.agents.address.is_none());
        if here.is_some_and(|listen| listen.ip().is_unspecified()) {
            return wrong(
                "agents.listen",
                self.agents
                    .listen
                    .map(|l| l.to_string())
                    .unwrap_or_default(),
                "desktops cannot call every address: set agents.address to the one that they reach",
            );
        }
        if self.uses(ProviderKind::Terraform) && self.agents.listen.is_none() {
            return wrong(
                "agents.listen",
                "nothing".to_owned(),
                "desktops of the provider terraform need a place to call, such as \"10.0.0.5:5001\"",
            );
        }
        if self.template.is_empty() {
            return wrong("template", "[]".to_owned(), "at least one is needed");
        }
        for (i, t) in self.template.iter().enumerate() {
            let valid = (1..=64).contains(&t.name.len())
                && t.name
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
            if !valid || self.template[..i].iter().any(|o| o.name == t.name) {
                return wrong(
                    "template.name",
                    t.name.clone(),
                    "1 to 64 letters, digits, '.', '_' and '-', each name once",
                );
            }
            if !(1..=64).contains(&t.cpus) {
                return wrong("template.cpus", t.cpus.to_string(), "1 to 64 is allowed");
            }
            if !(128..=1_048_576).contains(&t.memory_mib) {
                return wrong(
                    "template.memory_mib",
                    t.memory_mib.to_string(),
                    "128 to 1048576 is allowed",
                );
            }
            if t.keep_max_s.is_some_and(|s| s > MOST_KEPT_S) {
                let value = t.keep_max_s.unwrap_or_default().to_string();
                let allowed = format!("0 to {MOST_KEPT_S} is allowed");
                return wrong("template.keep_max_s", value, &allowed);
            }
            if let Some(playbook) = &t.playbook {
                let value = playbook.display().to_string();
                if t.provider != ProviderKind::Terraform {
                    let allowed =
                        "only desktops of the provider terraform are configured by a playbook";
                    return wrong("template.playbook", value, allowed);
                }
                if !playbook.is_absolute() {
                    return wrong("template.playbook", value, "an absolute path is needed");
                }
            }
        }
        Ok(())
    }

    /// Whether a template wants that provider.
    #[must_use]
    pub fn uses(&self, provider: ProviderKind) -> bool {
        self.template.iter().any(|t| t.provider == provider)
    }

    /// Whether a template's desktops are members of the domain.
    #[must_use]
    pub fn uses_domain(&self) -> bool {
        self.template.iter().any(|t| t.domain)
    }

    /// The playbooks of all templates.
    #[must_use]
    pub fn playbooks(&self) -> BTreeSet<PathBuf> {
        let playbooks = self.template.iter().filter_map(|t| t.playbook.clone());
        playbooks.collect()
    }

    /// What is left to do in machines of the provider `terraform`.
    #[must_use]
    pub fn rest(&self) -> Rest {
        if self.playbooks().is_empty() {
            Rest::Nothing
        } else {
            Rest::Configure
        }
    }

    /// The limits of a template's desktops.
    #[must_use]
    pub fn limits_of(&self, template: &str) -> Limits {
        let mut limits = self.limits.clone();
        let own = self
            .find_template(Some(template))
            .and_then(|t| t.keep_max_s);
        limits.keep_max_s = own.unwrap_or(limits.keep_max_s);
        limits
    }

    /// The template of that name, or the first.
    #[must_use]
    pub fn find_template(&self, name: Option<&str>) -> Option<&Template> {
        match name {
            None => self.template.first(),
            Some(name) => self.template.iter().find(|t| t.name == name),
        }
    }
}

impl Limits {
    /// Longest time at that stage, in seconds, and the key that sets it.
    #[must_use]
    pub fn of_stage(&self, stage: StageName) -> Option<(u32, &'static str)> {
        match stage {
            StageName::Queued | StageName::Destroying => None,
            StageName::Creating => Some((self.creating_timeout_s, "limits.creating_timeout_s")),
            StageName::Booting => Some((self.booting_timeout_s, "limits.booting_timeout_s")),
            StageName::Configuring => {
                Some((self.configuring_timeout_s, "limits.configuring_timeout_s"))
            }
            StageName::Connecting => {
                Some((self.connecting_timeout_s, "limits.connecting_timeout_s"))
            }
        }
    }

    /// [`Limits::lifetime_s`]
    #[must_use]
    pub fn lifetime(&self) -> Duration {
        crate::clock::s(self.lifetime_s)
    }
}

/// Sets `a__b__c` in nested tables. A value that is not TOML by itself is a string.
fn set(table: &mut toml::Table, path: &str, value: &str) {
    let parsed = toml::from_str::<toml::Table>(&format!("v = {value}"))
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| toml::Value::String(value.to_owned()));
    match path.split_once("__") {
        None => {
            table.insert(path.to_owned(), parsed);
        }
        Some((head, rest)) => {
            let inner = table
                .entry(head)
                .or_insert_with(|| toml::Value::Table(toml::Table::new()));
            // A value that is not a table (such as the list of templates) is replaced, and then refused by its type.
            if !inner.is_table() {
                *inner = toml::Value::Table(toml::Table::new());
            }
            if let Some(inner) = inner.as_table_mut() {
                set(inner, rest, value);
            }
        }
    }
}

fn default_state_dir() -> Result<PathBuf, ConfigError> {
    if nix::unistd::geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib/mayfly"));
    }
    directories::BaseDirs::new()
        .and_then(|dirs| Some(dirs.state_dir()?.join("mayfly")))
        .ok_or(ConfigError::NoHome)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        Config::read(text, "mayfly.toml", [])
    }

    #[test]
    fn nothing_is_a_valid_configuration() {
        let config = read("").unwrap();
        assert_eq!(config.listen.to_string(), "127.0.0.1:5000");
        assert_eq!(config.limits.idle_s, 60);
    }

    #[test]
    fn a_template_can_cap_how_long_its_desktops_are_kept() {
        let text = "[[template]]\nname = \"exam\"\nprovider = \"simulated\"\nkeep_max_s = 5\n\
                    [[template]]\nname = \"lab\"\nprovider = \"simulated\"\n";
        let config = read(text).unwrap();
        assert_eq!(config.limits_of("exam").keep_max_s, 5);
        assert_eq!(config.limits_of("lab").keep_max_s, config.limits.keep_max_s);
        assert!(read(&text.replace("= 5", "= 9000000")).is_err());
    }

    #[test]
    fn an_error_names_the_file_the_key_and_what_is_allowed() {
        for (text, words) in [
            ("listn = 1", vec!["mayfly.toml", "listn", "listen"]),
            ("[limits]\nidle = 1", vec!["mayfly.toml", "idle", "idle_s"]),
            ("[limits]\nidle_s = \"x\"", vec!["mayfly.toml", "idle_s"]),
            ("[limits]\nidle_s = 0", vec!["limits.idle_s", "1 to 86400"]),
            (
                "listen = \"0.0.0.0:5000\"",
                vec!["listen", "loopback", "no login"],
            ),
            (
                "[[template]]\nname = \"a\"\nprovider = \"vmware\"",
                vec!["vmware", "qemu", "simulated"],
            ),
            ("template = []", vec!["template", "at least one"]),
            (
                "[agents]\nlisten = \"0.0.0.0:5001\"",
                vec!["agents.listen", "agents.address"],
            ),
            (
                "[[template]]\nname = \"a\"\nprovider = \"terraform\"",
                vec!["agents.listen", "5001"],
            ),
            ("state_dir = \"here\"", vec!["state_dir", "absolute"]),
            ("[store]\npassword = \"x\"", vec!["password_file"]),
            (
                "[store]\nurl = \"mysql://db/mayfly\"",
                vec!["store.url", "postgres://mayfly@db.example/mayfly"],
            ),
            (
                "[provider.terraform]\naddress_timeout_s = 480",
                vec![
                    "provider.terraform.address_timeout_s = 480",
                    "apply_timeout_s",
                ],
            ),
            (
                "[[template]]\nname = \"a\"\nprovider = \"qemu\"\nplaybook = \"/p.yml\"\n\
                 [limits]\ncreating_timeout_s = 2000\ncreate_timeout_s = 2000",
                vec!["template.playbook", "/p.yml", "terraform"],
            ),
            (
                "[[template]]\nname = \"a\"\nprovider = \"terraform\"\nplaybook = \"/p.yml\"\n\
                 [agents]\nlisten = \"10.0.0.5:5001\"\n[limits]\ncreating_timeout_s = 2000",
                vec![
                    "limits.create_timeout_s = 600",
                    "1380",
                    "ansible.timeout_s (900)",
                ],
            ),
        ] {
            let error = read(text).unwrap_err().to_string();
            for word in words {
                assert!(error.contains(word), "{text:?}: {error:?} lacks {word:?}");
            }
        }
    }

    #[test]
    fn a_password_in_the_url_of_the_store_is_refused_and_not_shown() {
        for url in [
            "postgres://mayfly:hunter2@db/mayfly",
            "postgres://db/mayfly?user=mayfly&password=hunter2",
        ] {
            let error = read(&format!("[store]\nurl = {url:?}")).unwrap_err();
            let error = error.to_string();
            assert!(error.contains("store.password_file"), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        let url = "postgres://mayfly@db:5433/mayfly?sslmode=verify-full";
        assert!(read(&format!("[store]\nurl = {url:?}")).is_ok());
    }

    #[test]
    fn the_environment_overrides_the_file_and_is_checked_like_it() {
        let with = |name: &str, value: &str| {
            Config::read(
                "[limits]\nidle_s = 5",
                "mayfly.toml",
                [(name.to_owned(), value.to_owned())],
            )
        };
        let config = with("MAYFLY_LIMITS__IDLE_S", "7").unwrap();
        assert_eq!(config.limits.idle_s, 7);
        let config = with("MAYFLY_LISTEN", "127.0.0.1:1").unwrap();
        assert_eq!((config.listen.port(), config.limits.idle_s), (1, 5));
        let error = with("MAYFLY_LIMITS__IDEL_S", "7").unwrap_err();
        assert!(error.to_string().contains("idel_s"), "{error}");
    }
}
