//! Desktops on this machine: QEMU, an overlay disk each, passt for the network. No server, no root, no set-up.
//!
//! # What there is of a desktop
//! * a folder `<state>/desktops/<name>` with its disk, records and output: made first and removed last, so that
//!   whatever is left after a crash is found by it;
//! * a folder `<runtime>/<name>` with three sockets: `qmp.sock`, `qga.sock`, `agent.sock`;
//! * four processes: supervisor → uplink → passt and QEMU ([`crate::supervise`], [`uplink`]), each with the
//!   folder in its command line. They do not need the orchestrator.
//!
//! # Guarantees
//! Those of [`Provider`]. `destroy` kills without asking: nothing of a desktop is worth keeping, and nothing of it
//! is believed gone before `/proc` and the file system say so.

mod accel;
mod guest_agent;
mod image;
mod machine;
mod preflight;
mod qmp;
pub mod uplink;

pub use accel::Accel;
pub use image::{Image, ImageError};

use super::{
    AgentChannel, Check, DesktopSpec, JOURNAL, Locks, MachineState, Provider, ProviderError,
    Section, Steps, absent, channel, journal,
};
use crate::failpoints::around;
use crate::process::{self, Process};
use crate::supervise::{Cause, Exit, Program, Status, Supervised, Terms};
use accel::Kvm;
use async_trait::async_trait;
use guest_agent::GuestAgentError;
use machine::{Machine, Network, Processor};
use mayfly_api::agent::{BOOTSTRAP_FILE, Bootstrap};
use mayfly_api::{Absence, DesktopName};
use qmp::Qmp;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// The longest path of a unix socket (unix(7)).
const MAX_SOCKET_PATH: usize = 107;
/// A supervisor, passt and QEMU are up in well under a second; a busy host gets this long.
const START: Duration = Duration::from_secs(20);
/// A killed process is gone in milliseconds, unless the kernel is stuck in a disk or a device.
const KILL: Duration = Duration::from_secs(15);
/// Between two looks at something that another process does.
const LOOK: Duration = Duration::from_millis(10);
/// How much of a machine's console is kept, in bytes.
const CONSOLE: u64 = 1 << 20;
/// How much of it is told when a machine ends.
const LAST_WORDS: u64 = 600;

/// `[provider.qemu]` of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QemuConfig {
    /// The image folder (`mayfly-orchestrator image build` prints it).
    pub image: PathBuf,
    /// `auto` (a trial boot on KVM decides), `kvm` or `tcg`.
    pub accel: Accel,
    /// The QEMU program: a name on `PATH` or a path.
    pub binary: PathBuf,
    /// The qemu-img program.
    pub qemu_img: PathBuf,
    /// The passt program. Without it desktops have no network but RDP.
    pub passt: PathBuf,
    /// First two octets of the desktops' addresses.
    pub address_prefix: AddressPrefix,
    /// The port their RDP servers answer on, at an address each.
    pub rdp_port: u16,
    /// Where sockets go; a short path. Default: `run` in the state folder, or `$XDG_RUNTIME_DIR` if that is too long.
    pub runtime_dir: Option<PathBuf>,
}

impl Default for QemuConfig {
    fn default() -> Self {
        Self {
            image: PathBuf::new(),
            accel: Accel::Auto,
            binary: "qemu-system-x86_64".into(),
            qemu_img: "qemu-img".into(),
            passt: "passt".into(),
            address_prefix: AddressPrefix([127, 77]),
            rdp_port: 3389,
            runtime_dir: None,
        }
    }
}

/// The first two octets of a /16 in 127.0.0.0/8, such as `127.77`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AddressPrefix([u8; 2]);

impl TryFrom<String> for AddressPrefix {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let octets = text.split_once('.').and_then(|(first, second)| {
            Some([first.parse::<u8>().ok()?, second.parse::<u8>().ok()?])
        });
        match octets {
            Some([127, 0]) | None | Some([..=126 | 128.., _]) => Err(format!(
                "{text:?} is not a prefix of loopback addresses; it looks like \"127.77\", and not \"127.0\""
            )),
            Some(octets) => Ok(Self(octets)),
        }
    }
}

impl From<AddressPrefix> for String {
    fn from(AddressPrefix([first, second]): AddressPrefix) -> Self {
        format!("{first}.{second}")
    }
}

/// The steps that [`Steps`] is told of.
pub const STEPS: [&str; 8] = [
    "create: folder made",
    "create: disk made",
    "create: socket folder made",
    "create: supervisor started",
    "create: machine runs",
    "destroy: processes gone",
    "destroy: sockets gone",
    "destroy: folder gone",
];

/// The provider `qemu`.
pub struct Qemu {
    config: QemuConfig,
    /// This program, for supervisors and uplinks.
    orchestrator: PathBuf,
    state: PathBuf,
    folders: PathBuf,
    sockets: PathBuf,
    steps: Steps,
    locks: Locks,
    trial: tokio::sync::Mutex<()>,
    version: tokio::sync::OnceCell<String>,
}

impl Qemu {
    /// Desktops kept in `state`, supervised by the program `orchestrator` (normally `/proc/self/exe`).
    /// No two running orchestrators may share a state folder.
    ///
    /// # Errors
    /// [`ProviderError::Unavailable`] if the folders cannot be made or the sockets' paths would be too long.
    pub fn new(
        config: QemuConfig,
        state: &Path,
        orchestrator: PathBuf,
    ) -> Result<Self, ProviderError> {
        let unusable = |folder: &Path, error: io::Error| {
            ProviderError::Unavailable(format!(
                "the folder {} cannot be used: {error}",
                folder.display()
            ))
        };
        let made = |folder: PathBuf| {
            make_folder(&folder)
                .and_then(|()| folder.canonicalize())
                .map_err(|error| unusable(&folder, error))
        };
        let state = made(state.to_owned())?;
        let folders = made(state.join("desktops"))?;
        let sockets = match &config.runtime_dir {
            Some(folder) => folder.clone(),
            None => default_runtime_dir(&state),
        };
        let sockets = made(sockets)?;
        if !fits(&sockets) {
            return Err(ProviderError::Unavailable(format!(
                "the folder for sockets {} has too long a path: with a desktop's name and a socket's in it, it \
                 may have {MAX_SOCKET_PATH} bytes; set provider.qemu.runtime_dir to a shorter one",
                sockets.display()
            )));
        }
        Ok(Self {
            config,
            orchestrator,
            state,
            folders,
            sockets,
            steps: crate::failpoints::steps(),
            locks: Mutex::default(),
            trial: tokio::sync::Mutex::default(),
            version: tokio::sync::OnceCell::new(),
        })
    }

    /// The same with a function that is told of every step; for tests.
    #[must_use]
    pub fn with_steps(mut self, steps: Steps) -> Self {
        self.steps = steps;
        self
    }

    fn machine(&self, name: DesktopName) -> Machine {
        let address = machine::address(self.config.address_prefix.0, name);
        let rdp = SocketAddr::from((address, self.config.rdp_port));
        Machine::new(name, &self.folders, &self.sockets, rdp)
    }

    /// One create or destroy at a time for each desktop.
    async fn lock(&self, name: DesktopName) -> tokio::sync::OwnedMutexGuard<()> {
        super::lock_of(&self.locks, name).lock_owned().await
    }

    fn step(&self, step: &'static str) -> Result<(), ProviderError> {
        debug_assert!(STEPS.contains(&step));
        (self.steps)(step)
    }

    /// What machines run on, with what there is to say about it.
    async fn processor(&self, qemu: &Path, kernel: &Path) -> (Result<Processor, String>, String) {
        if self.config.accel == Accel::Tcg {
            return (
                Ok(Processor::Tcg),
                "software emulation, as configured".to_owned(),
            );
        }
        let verdict = {
            let _one_at_a_time = self.trial.lock().await;
            accel::kvm(qemu, kernel, &self.state.join("accel.json")).await
        };
        match (verdict, self.config.accel) {
            (Kvm::Works, _) => (
                Ok(Processor::Kvm),
                "KVM; a trial boot on it worked".to_owned(),
            ),
            (Kvm::Broken(reason), Accel::Auto) => (
                Ok(Processor::Tcg),
                format!("software emulation, several times slower than KVM: {reason}"),
            ),
            (Kvm::Broken(reason), _) => (
                Err(format!(
                    "provider.qemu.accel is \"kvm\", and KVM cannot be used: {reason}"
                )),
                String::new(),
            ),
        }
    }

    async fn make_disk(&self, machine: &Machine, image: &Image) -> Result<(), ProviderError> {
        let mut make = tokio::process::Command::new(&self.config.qemu_img);
        make.args("create -q -f qcow2 -F qcow2 -b".split(' '))
            .arg(&image.disk)
            .arg(machine.disk())
            .stdin(std::process::Stdio::null())
            .kill_on_drop(true);
        let failed = |why: String| ProviderError::Failed(format!("the disk cannot be made: {why}"));
        // Starts when it is first waited for.
        let made = async { tokio::time::timeout(START, make.output()).await };
        let made = around("qemu-img", made)
            .await
            .map_err(|_| failed("qemu-img hangs".to_owned()))?
            .map_err(|error| failed(format!("{}: {error}", self.config.qemu_img.display())))?;
        if made.status.success() {
            Ok(())
        } else {
            Err(failed(
                String::from_utf8_lossy(&made.stderr).trim().to_owned(),
            ))
        }
    }

    /// Waits until QEMU says that the machine runs.
    async fn wait_until_it_runs(
        &self,
        machine: &Machine,
        mut supervisor: tokio::process::Child,
    ) -> Result<(), ProviderError> {
        let begin = Instant::now();
        let result = loop {
            let supervised = Supervised::at(&machine.folder);
            let supervisor_ended = !matches!(supervisor.try_wait(), Ok(None));
            if supervisor_ended || matches!(supervised.status(), Status::Exited(_)) {
                break Err(ProviderError::Failed(format!(
                    "the machine did not start: {}",
                    ending(&supervised)
                )));
            }
            if is_running(machine).await {
                break Ok(());
            }
            if begin.elapsed() > START {
                break Err(ProviderError::Failed(format!(
                    "the machine did not start within {} s: {}",
                    START.as_secs(),
                    readable(&supervised.last_words(LAST_WORDS))
                )));
            }
            tokio::time::sleep(LOOK).await;
        };
        // Somebody has to take note of its end, or it stays as a zombie.
        tokio::spawn(async move { supervisor.wait().await });
        result
    }

    /// Kills whatever names the desktop's folder until nothing of it is left, and nothing ends any more in its
    /// supervisor's session.
    async fn kill(&self, machine: &Machine, session: Option<i32>) -> Result<(), ProviderError> {
        let begin = Instant::now();
        let mut named = BTreeSet::new();
        loop {
            named.retain(|process: &Process| process.is_alive());
            named.extend(processes(&machine.folder).await?);
            let mut left = named.clone();
            if let Some(session) = session {
                left.extend(blocking(move || process::nameless(session)).await?);
            }
            if left.is_empty() {
                return Ok(());
            }
            let mut refusal = None;
            for process in &named {
                refusal = process
                    .signal(rustix::process::Signal::KILL)
                    .err()
                    .or(refusal);
            }
            if begin.elapsed() > KILL {
                let pids: Vec<_> = left.iter().map(|process| process.pid.to_string()).collect();
                return Err(ProviderError::Failed(format!(
                    "processes of {} do not end: {}{}",
                    machine.folder.display(),
                    pids.join(", "),
                    refusal.map_or_else(String::new, |error| format!(" ({error})")),
                )));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The desktop must run, or there is nobody to talk to.
    async fn require_running(&self, name: DesktopName) -> Result<Machine, ProviderError> {
        match self.state(name).await? {
            MachineState::Running => Ok(self.machine(name)),
            MachineState::Dead { reason } => {
                Err(ProviderError::Failed(format!("{name}: {reason}")))
            }
            MachineState::Absent => Err(ProviderError::Failed(format!("{name} does not exist"))),
        }
    }
}

#[async_trait]
impl Provider for Qemu {
    fn kind(&self) -> &'static str {
        "qemu"
    }

    fn is_bound(&self) -> bool {
        true
    }

    async fn preflight(&self) -> Vec<Check> {
        preflight::checks(self).await
    }

    async fn create(&self, spec: &DesktopSpec) -> Result<(), ProviderError> {
        let _alone = self.lock(spec.name).await;
        let machine = self.machine(spec.name);
        let image = Image::open(&self.config.image).map_err(unavailable)?;
        let qemu = which::which(&self.config.binary).map_err(|error| {
            ProviderError::Unavailable(format!("{}: {error}", self.config.binary.display()))
        })?;
        let (processor, _) = self.processor(&qemu, &image.kernel).await;
        let processor = processor.map_err(ProviderError::Unavailable)?;
        preflight::room(&self.state, spec.memory_mib + processor.overhead_mib())
            .map_err(ProviderError::NoCapacity)?;
        self.check_address(spec.name).await?;
        if machine.sockets.exists() {
            return Err(exists(spec.name));
        }

        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&machine.folder)
            .map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => exists(spec.name),
                _ => failed("cannot make", &machine.folder, &error),
            })?;
        self.step("create: folder made")?;
        self.make_disk(&machine, &image).await?;
        self.step("create: disk made")?;
        make_folder(&machine.sockets)
            .map_err(|error| failed("cannot make", &machine.sockets, &error))?;
        self.step("create: socket folder made")?;

        let command = match which::which(&self.config.passt) {
            Ok(passt) => uplink::command(
                &self.orchestrator,
                &machine.folder,
                &passt,
                &format!("{}/{}", machine.rdp.ip(), machine.rdp.port()),
                machine.command(&qemu, &image, spec, processor, Network::Uplink),
            ),
            Err(_) => machine.command(&qemu, &image, spec, processor, Network::Closed),
        };
        let terms = Terms {
            deadline: spec.lifetime,
            patience: Duration::from_secs(3),
            max_output: CONSOLE,
        };
        let program = Program {
            command: &command,
            environment: None,
        };
        let supervisor = Supervised::at(&machine.folder)
            .start(&self.orchestrator, terms, program)
            .map_err(|error| failed("cannot start", &self.orchestrator, &error))?;
        self.step("create: supervisor started")?;
        self.wait_until_it_runs(&machine, supervisor).await?;
        self.step("create: machine runs")
    }

    async fn state(&self, name: DesktopName) -> Result<MachineState, ProviderError> {
        let machine = self.machine(name);
        let supervised = Supervised::at(&machine.folder);
        if supervised.status() == Status::Running {
            return Ok(MachineState::Running);
        }
        if machine.folder.exists() || machine.sockets.exists() {
            return Ok(MachineState::Dead {
                reason: ending(&supervised),
            });
        }
        Ok(match processes(&machine.folder).await?.as_slice() {
            [] => MachineState::Absent,
            [first, ..] => MachineState::Dead {
                reason: format!("process {} runs without its folder", first.pid),
            },
        })
    }

    async fn bootstrap(
        &self,
        name: DesktopName,
        bootstrap: &Bootstrap,
    ) -> Result<(), ProviderError> {
        let machine = self.require_running(name).await?;
        if !has_guest_agent(&machine).await {
            return Err(ProviderError::NotYet(format!(
                "the guest agent of {name} has not started"
            )));
        }
        let content = serde_json::to_vec(bootstrap)
            .map_err(|error| ProviderError::Failed(format!("the bootstrap of {name}: {error}")))?;
        guest_agent::write_file(&machine.guest_agent(), BOOTSTRAP_FILE, &content)
            .await
            .map_err(|error| match error {
                // Mostly that the folder is not there yet, early in the boot.
                GuestAgentError::Refused { .. } | GuestAgentError::Io(_) => {
                    ProviderError::NotYet(format!("{name}: {error}"))
                }
            })
    }

    async fn agent(&self, name: DesktopName) -> Result<AgentChannel, ProviderError> {
        let machine = self.require_running(name).await?;
        let port = tokio::net::UnixStream::connect(machine.agent())
            .await
            .map_err(|error| failed("cannot connect to", &machine.agent(), &error))?;
        Ok(channel::over(port, CancellationToken::new()))
    }

    async fn rdp_address(&self, name: DesktopName) -> Result<SocketAddr, ProviderError> {
        Ok(self.machine(name).rdp)
    }

    async fn last_words(&self, name: DesktopName) -> Vec<Section> {
        let machine = self.machine(name);
        let supervised = Supervised::at(&machine.folder);
        let mut sections = Vec::new();
        if supervised.status() == Status::Running {
            let shown = async {
                if !has_guest_agent(&machine).await {
                    return Err("the guest agent has not started".to_owned());
                }
                let shown = guest_agent::run(&machine.guest_agent(), &JOURNAL).await;
                shown.map_err(|error| error.to_string())
            };
            sections.push(journal(shown).await);
        }
        // Its older half begins anywhere.
        let half = usize::try_from(CONSOLE / 2).unwrap_or(usize::MAX);
        sections.push(Section::last("console", supervised.output(), half));
        sections
    }

    async fn destroy(&self, name: DesktopName) -> Result<Vec<Absence>, ProviderError> {
        let _alone = self.lock(name).await;
        let machine = self.machine(name);
        let session = Supervised::at(&machine.folder).session();
        self.kill(&machine, session).await?;
        self.step("destroy: processes gone")?;
        remove(&machine.sockets)?;
        self.step("destroy: sockets gone")?;
        remove(&machine.folder)?;
        self.step("destroy: folder gone")?;
        // A supervisor that a create had started but that had not yet shown itself: without the folder it cannot
        // start anything, and now it is seen.
        self.kill(&machine, session).await?;
        match self.state(name).await? {
            MachineState::Absent => {
                let folder = machine.folder.display();
                let processes = format!("processes that name {folder}, in /proc");
                Ok(vec![
                    absent(self.kind(), "machine", processes.clone()),
                    absent(self.kind(), "network", processes),
                    absent(self.kind(), "disk", folder.to_string()),
                    absent(
                        self.kind(),
                        "sockets",
                        machine.sockets.display().to_string(),
                    ),
                ])
            }
            left => Err(ProviderError::Failed(format!(
                "{name} is still there: {left:?}"
            ))),
        }
    }

    async fn list(&self) -> Result<Vec<DesktopName>, ProviderError> {
        let mut names = BTreeSet::new();
        for folder in [&self.folders, &self.sockets] {
            let entries =
                std::fs::read_dir(folder).map_err(|error| failed("cannot read", folder, &error))?;
            for entry in entries {
                let entry = entry.map_err(|error| failed("cannot read", folder, &error))?;
                names.extend(
                    entry
                        .file_name()
                        .to_str()
                        .and_then(|name| name.parse::<DesktopName>().ok()),
                );
            }
        }
        let folders = self.folders.clone();
        names.extend(blocking(move || named_in_command_lines(&folders)).await?);
        Ok(names.into_iter().collect())
    }
}

impl Qemu {
    /// Addresses begin again after 65 024 desktops; the earlier one may still be there.
    async fn check_address(&self, name: DesktopName) -> Result<(), ProviderError> {
        let address = self.machine(name).rdp;
        match self
            .list()
            .await?
            .into_iter()
            .find(|other| *other != name && self.machine(*other).rdp == address)
        {
            Some(other) => Err(ProviderError::Busy(format!(
                "the address {address} is still in use by {other}"
            ))),
            None => Ok(()),
        }
    }
}

async fn is_running(machine: &Machine) -> bool {
    let Ok(mut qmp) = Qmp::connect(&machine.qmp()).await else {
        return false;
    };
    let status = qmp.execute("query-status", json!({})).await;
    status.is_ok_and(|status| status["status"] == "running")
}

/// Whether something in the machine has opened the guest agent's port.
async fn has_guest_agent(machine: &Machine) -> bool {
    let Ok(mut qmp) = Qmp::connect(&machine.qmp()).await else {
        return false;
    };
    let Ok(devices) = qmp.execute("query-chardev", json!({})).await else {
        return false;
    };
    devices.as_array().is_some_and(|devices| {
        devices
            .iter()
            .any(|device| device["label"] == "qga" && device["frontend-open"] == true)
    })
}

async fn blocking<T: Send + 'static>(
    read: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, ProviderError> {
    tokio::task::spawn_blocking(read)
        .await
        .map_err(io::Error::other)
        .and_then(|result| result)
        .map_err(|error| ProviderError::Failed(format!("/proc cannot be read: {error}")))
}

async fn processes(folder: &Path) -> Result<Vec<Process>, ProviderError> {
    let folder = folder.to_owned();
    blocking(move || process::naming(&folder)).await
}

/// Desktops whose folder in `folders` some process names.
fn named_in_command_lines(folders: &Path) -> io::Result<Vec<DesktopName>> {
    /// `/desktop-` and seven digits.
    const LENGTH: usize = 16;
    let needle = folders.as_os_str().as_bytes();
    let mut names = Vec::new();
    for (_, line) in process::all()? {
        for at in 0..line.len().saturating_sub(needle.len() + LENGTH - 1) {
            if let Some([b'/', name @ ..]) = line[at..]
                .strip_prefix(needle)
                .and_then(|rest| rest.get(..LENGTH))
                && let Some(name) = std::str::from_utf8(name).ok().and_then(|n| n.parse().ok())
            {
                names.push(name);
            }
        }
    }
    Ok(names)
}

/// Why a machine does not run, in words.
fn ending(supervised: &Supervised<'_>) -> String {
    let what = match supervised.status() {
        Status::Unknown => "it was only half made".to_owned(),
        Status::Running => "it runs".to_owned(),
        Status::Lost => "it or its supervisor was killed".to_owned(),
        Status::Exited(Exit {
            cause: Cause::Deadline,
            ..
        }) => "its lifetime ended".to_owned(),
        Status::Exited(Exit {
            cause: Cause::Stopped,
            ..
        }) => "it was stopped".to_owned(),
        Status::Exited(Exit { code: Some(0), .. }) => "it switched itself off".to_owned(),
        Status::Exited(Exit {
            code: Some(code), ..
        }) => format!("it ended with exit code {code}"),
        Status::Exited(Exit { signal, .. }) => {
            format!(
                "it was ended by {}",
                signal.unwrap_or_else(|| "a signal".to_owned())
            )
        }
    };
    match readable(&supervised.last_words(LAST_WORDS)) {
        words if words.is_empty() => what,
        words => format!("{what}; its last words: {words}"),
    }
}

/// A console's output without what only a terminal understands.
fn readable(text: &str) -> String {
    text.chars()
        .filter(|c| *c == '\n' || !c.is_control())
        .collect()
}

fn make_folder(folder: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(folder)
}

fn remove(folder: &Path) -> Result<(), ProviderError> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failed("cannot remove", folder, &error))
        }
        _ => Ok(()),
    }
}

fn failed(what: &str, path: &Path, error: &io::Error) -> ProviderError {
    ProviderError::Failed(format!("{what} {}: {error}", path.display()))
}

fn exists(name: DesktopName) -> ProviderError {
    ProviderError::Failed(format!("{name} exists already"))
}

fn unavailable(error: impl std::fmt::Display) -> ProviderError {
    ProviderError::Unavailable(error.to_string())
}

fn fits(sockets: &Path) -> bool {
    const LONGEST: &str = "/desktop-0000000/agent.sock";
    sockets.as_os_str().len() + LONGEST.len() <= MAX_SOCKET_PATH
}

/// A folder that no other orchestrator uses: `list` takes what is in it for ours.
fn default_runtime_dir(state: &Path) -> PathBuf {
    let beside = state.join("run");
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(base) if !fits(&beside) => {
            use sha2::{Digest, Sha256};
            let digest = Sha256::digest(state.as_os_str().as_bytes());
            let short = data_encoding::HEXLOWER.encode(&digest[..4]);
            Path::new(&base).join(format!("mayfly-{short}"))
        }
        _ => beside,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_has_defaults_and_refuses_what_it_does_not_know() {
        let config: QemuConfig = toml::from_str("image = \"/i\"\naccel = \"tcg\"").unwrap();
        assert_eq!(config.accel, Accel::Tcg);
        assert_eq!(String::from(config.address_prefix), "127.77");
        for wrong in [
            "imaeg = \"/i\"",
            "accel = \"fast\"",
            "address_prefix = \"10.0\"",
            "address_prefix = \"127.0\"",
            "address_prefix = \"127\"",
        ] {
            assert!(toml::from_str::<QemuConfig>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn too_long_a_path_for_sockets_is_refused_with_what_to_do() {
        let state = tempfile::tempdir().unwrap();
        let config = QemuConfig {
            runtime_dir: Some(state.path().join("x".repeat(90))),
            ..QemuConfig::default()
        };
        let error = Qemu::new(config, state.path(), "x".into()).err().unwrap();
        assert!(error.to_string().contains("runtime_dir"), "{error}");
    }

    #[tokio::test]
    async fn a_missing_image_makes_the_provider_unavailable_and_leaves_nothing() {
        let state = tempfile::tempdir().unwrap();
        let qemu = Qemu::new(QemuConfig::default(), state.path(), "x".into()).unwrap();
        let spec = DesktopSpec {
            name: DesktopName::from_number(1).unwrap(),
            session: mayfly_api::SessionId::new(),
            in_domain: false,
            playbook: None,
            cpus: 1,
            memory_mib: 64,
            lifetime: Duration::from_secs(60),
        };
        let error = qemu.create(&spec).await.unwrap_err();
        assert!(matches!(error, ProviderError::Unavailable(_)), "{error}");
        assert_eq!(qemu.list().await.unwrap(), []);
    }

    #[test]
    fn consoles_are_made_readable() {
        assert_eq!(readable("\u{1b}[0mok\r\nyes\u{7}"), "[0mok\nyes");
    }

    #[test]
    fn desktops_are_found_by_processes_alone() {
        let folders = Path::new("/nowhere/qemu-test/desktops");
        let mut child = std::process::Command::new("sleep")
            .arg0("/nowhere/qemu-test/desktops/desktop-00000ff/passt")
            .arg("60")
            .spawn()
            .unwrap();
        let found = named_in_command_lines(folders).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, [DesktopName::from_number(0xff).unwrap()]);
    }

    use std::os::unix::process::CommandExt;
}
