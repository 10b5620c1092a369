//! The lab: a place of its own for one scenario.
//!
//! # Guarantees
//! * Everything that a lab starts, directly or not, carries the lab's folder in its environment or command line.
//!   When the [`Lab`] is dropped, what still runs of it is ended and the folder is removed; when the test program itself is
//!   killed, a small guard process does the same.
//! * Nothing is touched that the lab did not start: the folder's name is unique.
//! * Two labs at once never meet: folder, loopback addresses (`127.N.`), ports, display and D-Bus session are their own.
//! * Its logs outlive it, in `target/reports/logs/<name>`: those of the last run of that name.

mod appearance;
mod database;
mod desk;
mod guard;
mod guest;
mod launcher;
mod leftovers;
mod orchestrator;
mod process;
mod screen;
mod tray;
mod wait;
mod web;

pub use appearance::{Appearance, Scheme};
pub use database::Database;
pub use desk::{Desk, Notification};
pub use guest::{Guest, Output};
pub use launcher::Launcher;
pub use leftovers::Leftovers;
pub use orchestrator::{Orchestrator, Provider};
pub use process::Process;
pub use screen::{Picture, Screen};
pub use tray::{MenuLine, Tray};
pub use wait::until;
pub use web::Web;

use anyhow::{Context, Result, bail, ensure};
use std::ffi::OsStr;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

/// A place of its own for one scenario. See the module's guarantees.
#[derive(Debug)]
pub struct Lab {
    name: String,
    dir: TempDir,
    slot: Slot,
    groups: Arc<Mutex<Vec<i32>>>,
}

impl Lab {
    /// A fresh lab; `name` is the scenario's, and its logs' when it is over.
    ///
    /// # Errors
    /// When the folder cannot be made or every slot is taken.
    pub fn new(name: &str) -> Result<Self> {
        // Short, because unix sockets below it have 107 bytes for their whole path.
        let dir = tempfile::Builder::new()
            .prefix("lab")
            .tempdir()
            .context("making a temporary folder")?;
        for folder in [
            "home", "config", "data", "cache", "state", "run", "tmp", "log", "machines",
        ] {
            let path = dir.path().join(folder);
            fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        }
        // XDG_RUNTIME_DIR must be private.
        fs::set_permissions(
            dir.path().join("run"),
            std::os::unix::fs::PermissionsExt::from_mode(0o700),
        )?;
        guard::watch_folder(dir.path());
        Ok(Self {
            name: name.to_owned(),
            dir,
            slot: Slot::take()?,
            groups: Arc::default(),
        })
    }

    /// The lab's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A path in the lab's folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// First half of the lab's own loopback addresses, such as `127.101`: for `provider.qemu.address_prefix`.
    #[must_use]
    pub fn address_prefix(&self) -> String {
        format!("127.{}", self.slot.number)
    }

    /// A TCP port of the lab's own on 127.0.0.1, below the range that the kernel hands out. `index` is under 20.
    #[must_use]
    pub fn port(&self, index: u16) -> u16 {
        assert!(index < 20, "a lab has 20 ports");
        20_000 + u16::from(self.slot.number) * 20 + index
    }

    /// A command that sees nothing of the person's own session: environment, home and temporary folder are the lab's.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .current_dir(self.dir())
            .env("LANG", "C.UTF-8")
            .env("HOME", self.path("home"))
            .env("TMPDIR", self.path("tmp"))
            .env("XDG_CONFIG_HOME", self.path("config"))
            .env("XDG_DATA_HOME", self.path("data"))
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("XDG_STATE_HOME", self.path("state"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            // GTK looks for an accessibility bus otherwise, and waits for it.
            .env("NO_AT_BRIDGE", "1")
            .env("RUST_BACKTRACE", "1");
        for name in ["PATH", "MAYFLY_LOG"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command
    }

    /// Starts a command in a process group of its own; its output goes to `log/<name>.log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, name: &str, command: Command) -> Result<Process> {
        self.start_with_input(name, command, b"")
    }

    /// As [`Self::start`], with this as its standard input.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_with_input(&self, name: &str, command: Command, input: &[u8]) -> Result<Process> {
        Process::start(
            name,
            command,
            input,
            &self.path("log").join(format!("{name}.log")),
            Arc::clone(&self.groups),
        )
    }

    /// Process groups that the lab runs itself, such as its screen: not leftovers while they live.
    fn groups(&self) -> Vec<i32> {
        self.groups
            .lock()
            .map(|groups| groups.clone())
            .unwrap_or_default()
    }

    /// What is there of machines and other children: counted from `/proc`, sockets and files.
    #[must_use]
    pub fn leftovers(&self) -> Leftovers {
        Leftovers::count(self.dir(), &self.address_prefix(), &self.groups())
    }

    /// Processes of this lab, told by their environment, whose name has this in it.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn running(&self, part: &str) -> Result<Vec<u32>> {
        let folder = self.dir().to_string_lossy().into_owned();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
            if name.contains(part)
                && String::from_utf8_lossy(&environment).contains(&folder)
                && let Some(pid) = entry.file_name().to_str().and_then(|pid| pid.parse().ok())
            {
                found.push(pid);
            }
        }
        Ok(found)
    }

    /// Fails if anything of a machine is there.
    ///
    /// # Errors
    /// With what is left.
    pub fn nothing_is_left(&self) -> Result<()> {
        let left = self.leftovers();
        ensure!(left.is_empty(), "{left}");
        Ok(())
    }

    /// Where logs and screenshots that should outlive the lab go: `$MAYFLY_REPORTS`, or `target/reports`.
    #[must_use]
    pub fn reports() -> PathBuf {
        std::env::var_os("MAYFLY_REPORTS").map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/reports"),
            PathBuf::from,
        )
    }

    fn keep_logs(&self) -> Result<()> {
        let kept = Self::reports()
            .join("logs")
            .join(self.name.replace(' ', "-"));
        if kept.exists() {
            fs::remove_dir_all(&kept)?;
        }
        fs::create_dir_all(&kept)?;
        for entry in fs::read_dir(self.path("log"))? {
            let entry = entry?;
            fs::copy(entry.path(), kept.join(entry.file_name()))?;
        }
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        leftovers::end_processes(self.dir());
        // Whether the scenario failed is not known here: a test that returns an error does not panic.
        if let Err(error) = self.keep_logs() {
            eprintln!("the logs of {:?} could not be kept: {error:#}", self.name);
        }
        guard::forget_folder(self.dir());
    }
}

/// A number that no other lab of this machine has: whoever listens on `127.N.0.254` has it, and the kernel gives it back.
#[derive(Debug)]
struct Slot {
    number: u8,
    _listener: TcpListener,
}

impl Slot {
    fn take() -> Result<Self> {
        // 127.77 is the default of a real orchestrator on this machine.
        for number in 100..=250 {
            let address = (Ipv4Addr::new(127, number, 0, 254), 20_000);
            if let Ok(listener) = TcpListener::bind(address) {
                return Ok(Self {
                    number,
                    _listener: listener,
                });
            }
        }
        bail!("all 151 lab slots are taken: do other test runs hang?")
    }
}

/// A program of this workspace, as `cargo build` makes it: in `$MAYFLY_PROGRAMS`, or beside this program.
///
/// # Errors
/// When it is not built; says how.
pub fn program(name: &str) -> Result<PathBuf> {
    let folders = match std::env::var_os("MAYFLY_PROGRAMS") {
        Some(folder) => vec![PathBuf::from(folder)],
        // target/debug/deps/some-test, target/debug/demo
        None => std::env::current_exe()?
            .ancestors()
            .skip(1)
            .take(2)
            .map(Path::to_owned)
            .collect(),
    };
    folders
        .iter()
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "{name} is not built in {folders:?}; run `cargo build --package mayfly-orchestrator --package \
                 mayfly-session-manager --package mayfly-launcher`, or the tests by `cargo xtask test`"
            )
        })
}

/// The folder in an environment variable that `cargo xtask test` sets: `MAYFLY_DESKTOP_IMAGE`, `MAYFLY_MICRO_GUEST`.
///
/// # Errors
/// When it is not set or holds no image; says what to do.
pub fn image_folder(variable: &str) -> Result<PathBuf> {
    let folder = std::env::var_os(variable)
        .map(PathBuf::from)
        .with_context(|| {
            format!("{variable} is not set: run this by `cargo xtask test`, or set it to an image folder")
        })?;
    if !folder.join("image.json").is_file() {
        bail!("{variable}={} holds no image.json", folder.display());
    }
    Ok(folder)
}
