//! Where desktops come from. One trait; the control plane knows nothing else about machines.

use async_trait::async_trait;
use jiff::Timestamp;
use mayfly_api::agent::{Bootstrap, FromAgent, ToAgent};
use mayfly_api::{Absence, DesktopName, SessionId};
use news::News;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::mpsc;

pub(crate) mod channel;
pub mod conformance;
pub mod news;
pub mod qemu;
pub mod simulated;
pub mod site;
pub mod terraform;

/// What the control plane commits before a machine is made: enough to find it and remove it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DesktopSpec {
    /// Its name; the number in it is never used twice.
    pub name: DesktopName,
    /// The session that it is made for.
    pub session: SessionId,
    /// Processors.
    pub cpus: u32,
    /// Memory, in MiB.
    pub memory_mib: u32,
    /// Whether it is a member of the domain.
    pub in_domain: bool,
    /// The playbook that configures it, if its template is plain.
    pub playbook: Option<PathBuf>,
    /// Hard end of the machine, whatever happens to the orchestrator: its supervisor stops it then.
    pub lifetime: Duration,
}

/// A machine as its provider sees it now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MachineState {
    /// It runs.
    Running,
    /// It exists, whole or in part (a disk, a dead process, a record), and does not run.
    Dead {
        /// The last words of the machine or of what made it.
        reason: String,
    },
    /// Nothing of it exists.
    Absent,
}

/// Why a provider could not do something.
#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
pub enum ProviderError {
    /// Not yet: the machine boots, its agent is silent. Ask again later.
    #[error("{0}")]
    NotYet(String),
    /// No room (memory, addresses) for another machine until one of those that are there is gone.
    #[error("{0}")]
    NoCapacity(String),
    /// Something else was in the way, such as a lock: another attempt may succeed.
    #[error("{0}")]
    Busy(String),
    /// Desktops cannot be made here until an administrator acts; says what to do.
    #[error("{0}")]
    Unavailable(String),
    /// This operation failed; says what, on what.
    #[error("{0}")]
    Failed(String),
}

/// One line of a preflight or `doctor` report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// Whether desktops can be made in spite of what was found.
    pub status: CheckStatus,
    /// What was found and, unless all is well, what to do.
    pub detail: String,
}

/// Outcome of a [`Check`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckStatus {
    /// As it should be.
    Ok,
    /// Works, with a drawback.
    Warning,
    /// Desktops cannot be made.
    Error,
}

/// The two directions of a desktop's agent channel. Dropping it closes the connection; the machine goes on.
#[derive(Debug)]
pub struct AgentChannel {
    /// Messages from the agent; ends when the machine or the connection does.
    pub from_agent: mpsc::Receiver<FromAgent>,
    /// Messages to the agent.
    pub to_agent: mpsc::Sender<ToAgent>,
}

/// A part of what is left to read of a desktop, as it was said: neither bounded nor free of secrets, see [`crate::last_words`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// What it is, in a word: `console`, `journal`.
    pub title: &'static str,
    /// What was said. Bytes that are no UTF-8 were replaced.
    pub text: String,
}

impl Section {
    /// A text of which whoever wrote it down kept only the last `limit` bytes or more: if there are so many, its first line may be
    /// the rest of one, and is left out.
    pub(crate) fn last(title: &'static str, text: String, limit: usize) -> Self {
        let text = match text.split_once('\n') {
            Some((_, rest)) if text.len() >= limit => rest.to_owned(),
            _ => text,
        };
        Self { title, text }
    }
}

/// A machine's SSH server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SshServer {
    /// Where it answers.
    pub address: SocketAddr,
    /// The account that the desktop's key is let into.
    pub user: String,
    /// Its key, as the machine itself has it: read from inside, not from the network.
    pub host_key: ssh_key::PublicKey,
}

/// What some templates want beside a machine: while it cannot be had, the others go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extra {
    /// Membership in the domain.
    Domain,
    /// A playbook that configures the machine.
    Playbook,
}

/// Called with the name of every step of a create or destroy that is done. A test stops there, as a crash would.
pub type Steps = Arc<dyn Fn(&'static str) -> Result<(), ProviderError> + Send + Sync>;

/// Makes, shows and removes machines.
///
/// # Guarantees every provider gives (the conformance suite checks them)
/// * `create` returns once the machine is started or has failed. Called again for a name that exists it fails and changes nothing.
/// * `destroy` is idempotent and total: it works on a whole machine, on half of one, on none, and returns only after it has
///   *checked* that nothing of the machine is left.
/// * `list` names everything that exists, half-made machines included, also after a crash between any two steps.
/// * Machines outlive the orchestrator: a new process finds them by `list` and `state`, and reaches them by `agent`.
#[async_trait]
pub trait Provider: Send + Sync + 'static {
    /// `qemu`, `simulated`, `terraform`.
    fn kind(&self) -> &'static str;

    /// Can desktops be made? Cheap enough to be asked before each create.
    async fn preflight(&self) -> Vec<Check>;

    /// The same of what only some templates want beside a machine.
    async fn preflight_of(&self, _: Extra) -> Vec<Check> {
        Vec::new()
    }

    /// Makes and starts a machine.
    async fn create(&self, spec: &DesktopSpec) -> Result<(), ProviderError>;

    /// Whether a create goes on without this process, and `destroy` ends one that goes on. Then [`Provider::create`] may be
    /// dropped at any point, and [`Provider::adopt`] finds it again.
    fn is_followed(&self) -> bool {
        false
    }

    /// Whether its machines are on this one, where no other orchestrator reaches them.
    fn is_bound(&self) -> bool {
        false
    }

    /// What its creates, and those that it adopts, are at: as far as it tells.
    fn news(&self) -> News {
        News::default()
    }

    /// Waits for a create that an earlier process began. `false`: it does not go on, or failed; what there is of the machine is to
    /// be removed.
    async fn adopt(&self, _: DesktopName) -> Result<bool, ProviderError> {
        Ok(false)
    }

    /// What there is of a machine now.
    async fn state(&self, name: DesktopName) -> Result<MachineState, ProviderError>;

    /// Writes the bootstrap into the machine. [`ProviderError::NotYet`] while its guest agent does not answer.
    async fn bootstrap(
        &self,
        name: DesktopName,
        bootstrap: &Bootstrap,
    ) -> Result<(), ProviderError>;

    /// Opens the channel to the machine's agent. One at a time per machine.
    async fn agent(&self, name: DesktopName) -> Result<AgentChannel, ProviderError>;

    /// Where the machine's RDP server answers.
    async fn rdp_address(&self, name: DesktopName) -> Result<SocketAddr, ProviderError>;

    /// What can be read of a machine, or of what made it, when it has failed and before it is removed; nothing if there is none.
    /// Bounded in time and size, and changes nothing. What cannot be had is a section that says why.
    async fn last_words(&self, _: DesktopName) -> Vec<Section> {
        Vec::new()
    }

    /// Where Ansible reaches the machine, once its first boot is over and its host key does not change any more;
    /// [`ProviderError::NotYet`] until then.
    async fn ssh(&self, _: DesktopName) -> Result<SshServer, ProviderError> {
        let kind = self.kind();
        Err(ProviderError::Unavailable(format!(
            "machines of the provider {kind} cannot be configured by Ansible"
        )))
    }

    /// Removes the machine and everything that was made for it; what was then looked for and not found.
    async fn destroy(&self, name: DesktopName) -> Result<Vec<Absence>, ProviderError>;

    /// Every machine of ours that exists, in whole or in part.
    async fn list(&self) -> Result<Vec<DesktopName>, ProviderError>;
}

/// `by` has just looked for something and not found it.
pub(crate) fn absent(by: &str, what: &str, place: impl Into<String>) -> Absence {
    Absence {
        what: what.to_owned(),
        place: place.into(),
        by: by.to_owned(),
        checked_at: Timestamp::now(),
    }
}

/// Shows the kernel's warnings and the end of the journal of what a desktop is made of: agent, RDP server, domain, first boot.
/// The shell bounds its size.
const JOURNAL: [&str; 3] = [
    "/bin/sh",
    "-c",
    "show() { journalctl --no-pager -q -b -o short-iso \"$@\"; }; \
     { show -k -p warning -n 300; \
     show -n 4000 -u mayfly-agent -u xrdp -u xrdp-sesman -u sssd -u cloud-init-local -u cloud-init-main \
     -u cloud-init-network -u cloud-init -u cloud-config -u cloud-final; } 2>&1 | tail -c 300000",
];
/// The size that it bounds it to, in bytes.
const JOURNAL_BYTES: usize = 300_000;
/// A guest agent that is slow must not cost the other sections.
const JOURNAL_LIMIT: Duration = Duration::from_secs(10);

/// The section of a journal that [`JOURNAL`] shows.
async fn journal(shown: impl Future<Output = Result<String, String>>) -> Section {
    let shown = tokio::time::timeout(JOURNAL_LIMIT, shown).await;
    let shown = shown.unwrap_or_else(|_| Err("the guest agent does not answer".to_owned()));
    let shown = shown.unwrap_or_else(|why| format!("It cannot be read: {why}"));
    Section::last("journal", shown, JOURNAL_BYTES)
}

/// Locks of desktops, each for as long as somebody has or waits for it.
pub(crate) type Locks = Mutex<HashMap<DesktopName, Weak<tokio::sync::Mutex<()>>>>;

/// The lock under which one create or destroy at a time runs for each desktop.
pub(crate) fn lock_of(locks: &Locks, name: DesktopName) -> Arc<tokio::sync::Mutex<()>> {
    let mut locks = locks.lock().unwrap_or_else(PoisonError::into_inner);
    locks.retain(|_, lock| lock.strong_count() > 0);
    let known = locks.get(&name).and_then(Weak::upgrade);
    known.unwrap_or_else(|| {
        let lock = Arc::default();
        locks.insert(name, Arc::downgrade(&lock));
        lock
    })
}
