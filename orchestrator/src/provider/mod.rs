//! Where desktops come from. One trait; the control plane knows nothing else about machines.

use async_trait::async_trait;
use mayfly_api::agent::{Bootstrap, FromAgent, ToAgent};
use mayfly_api::{DesktopName, SessionId};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::mpsc;

pub(crate) mod channel;
pub mod conformance;
pub mod qemu;
pub mod simulated;
pub mod terraform;

/// What the control plane commits before a machine is made: enough to find it and remove it.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Hard end of the machine, whatever happens to the orchestrator: its supervisor stops it then.
    pub lifetime: Duration,
}

/// A machine as its provider sees it now.
#[derive(Clone, Debug, PartialEq, Eq)]
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
#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    /// Not yet: the machine boots, its agent is silent. Ask again later.
    #[error("{0}")]
    NotYet(String),
    /// No room (disk, memory, addresses) for another machine now.
    #[error("{0}")]
    NoCapacity(String),
    /// Desktops cannot be made here until an administrator acts; says what to do.
    #[error("{0}")]
    Unavailable(String),
    /// This operation failed; says what, on what.
    #[error("{0}")]
    Failed(String),
}

/// One line of a preflight or `doctor` report.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// Whether desktops can be made in spite of what was found.
    pub status: CheckStatus,
    /// What was found and, unless all is well, what to do.
    pub detail: String,
}

/// Outcome of a [`Check`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
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

    /// Can they be members of the domain? Asked for those alone that are to be: the others need no domain.
    async fn domain_preflight(&self) -> Vec<Check> {
        Vec::new()
    }

    /// Makes and starts a machine.
    async fn create(&self, spec: &DesktopSpec) -> Result<(), ProviderError>;

    /// Whether a create goes on without this process, and `destroy` ends one that goes on. Then [`Provider::create`] may be
    /// dropped at any point, and [`Provider::adopt`] finds it again.
    fn is_followed(&self) -> bool {
        false
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

    /// Removes the machine and everything that was made for it.
    async fn destroy(&self, name: DesktopName) -> Result<(), ProviderError>;

    /// Every machine of ours that exists, in whole or in part.
    async fn list(&self) -> Result<Vec<DesktopName>, ProviderError>;
}

/// Locks of desktops, each for as long as somebody has or waits for it.
type Locks = Mutex<HashMap<DesktopName, Weak<tokio::sync::Mutex<()>>>>;

/// The lock under which one create or destroy at a time runs for each desktop.
fn lock_of(locks: &Locks, name: DesktopName) -> Arc<tokio::sync::Mutex<()>> {
    let mut locks = locks.lock().unwrap_or_else(PoisonError::into_inner);
    locks.retain(|_, lock| lock.strong_count() > 0);
    let known = locks.get(&name).and_then(Weak::upgrade);
    known.unwrap_or_else(|| {
        let lock = Arc::default();
        locks.insert(name, Arc::downgrade(&lock));
        lock
    })
}
