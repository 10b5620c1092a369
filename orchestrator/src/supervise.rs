//! `mayfly-orchestrator supervise`: a small process that holds one child for the orchestrator and outlives it.
//!
//! # Guarantees
//! * The record is on disk before the child starts; a record that cannot be written means no child.
//! * The child has a process group of its own, its output goes to a file of bounded size, and nothing of this
//!   depends on the orchestrator: it may be killed at any moment without stopping the child or losing a line.
//! * The deadline is held here: one SIGINT to the child's group, patience, then SIGKILL. Like the control plane's clock it
//!   does not count time in which the host slept: nobody wakes a machine to see their desktop die.
//! * Once the child has ended, for whatever reason, the rest of its group is killed, and then the exit record is
//!   written and flushed to the disk.
//! * A reader ([`Supervised`]) never trusts a bare pid; see [`crate::process`].
//!
//! # Files in the record folder
//! `record.json`, `exit.json`, `output.log` and its older half `output.old.log`, `supervisor.log`.

use crate::failpoints;
use crate::process::{Process, boot_id};
use anyhow::{Context, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

const RECORD: &str = "record.json";
const EXIT: &str = "exit.json";
const OUTPUT: &str = "output.log";
const OLD_OUTPUT: &str = "output.old.log";
const OWN_LOG: &str = "supervisor.log";

/// Arguments of `supervise`.
#[derive(Debug, clap::Args)]
pub struct SuperviseCommand {
    /// Existing folder for record, output and exit record
    #[arg(long, value_name = "DIR")]
    record: PathBuf,
    /// The child is stopped after this many seconds
    #[arg(long, value_name = "SECONDS")]
    deadline_s: u64,
    /// Between SIGINT and SIGKILL, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    patience_s: u64,
    /// How much of the output is kept: between this and half of it, the newest
    #[arg(long, value_name = "BYTES", default_value_t = 16 << 20)]
    max_output: u64,
    /// The child and its arguments
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// What is known of a child from its beginning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// Another boot of the host: nothing of this runs any more.
    boot_id: String,
    supervisor: Process,
    /// Absent until it was started.
    child: Option<Process>,
    argv0: String,
    deadline: jiff::Timestamp,
}

/// Why a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// By itself.
    Itself,
    /// The supervisor was asked to stop it.
    Stopped,
    /// Its deadline passed.
    Deadline,
}

/// How a child ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Why.
    pub cause: Cause,
    /// Its exit code, if it has one.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<String>,
    /// When.
    pub at: jiff::Timestamp,
    /// Processor time of it and of those children that it waited for, in milliseconds (getrusage(2)).
    #[serde(default)]
    pub cpu_ms: u64,
}

/// What there is of a supervised child.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// No record: it never started.
    Unknown,
    /// The supervisor runs, so the child does, or will be told about in a moment.
    Running,
    /// It ended and says how.
    Exited(Exit),
    /// The supervisor was killed: the child ended without a word, or runs without a deadline.
    Lost,
}

/// The orchestrator's side: a child by its record folder.
#[derive(Clone, Debug)]
pub struct Supervised<'a> {
    folder: &'a Path,
}

/// How a child is to be held.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// It is stopped after this.
    pub deadline: Duration,
    /// Between SIGINT and SIGKILL.
    pub patience: Duration,
    /// How much of its output is kept, in bytes.
    pub max_output: u64,
}

/// What is run.
#[derive(Clone, Copy, Debug)]
pub struct Program<'a> {
    /// The program and its arguments.
    pub command: &'a [OsString],
    /// Its environment, and nothing but it; `None`: ours.
    pub environment: Option<&'a [(OsString, OsString)]>,
}

impl<'a> Supervised<'a> {
    /// The child whose record is, or will be, in `folder`.
    #[must_use]
    pub fn at(folder: &'a Path) -> Self {
        Self { folder }
    }

    /// Starts `program` under a supervisor, whose binary is `orchestrator`. Returns once the supervisor is started.
    ///
    /// # Errors
    /// The supervisor cannot be started.
    pub fn start(
        &self,
        orchestrator: &Path,
        terms: Terms,
        program: Program<'_>,
    ) -> io::Result<tokio::process::Child> {
        let log = File::create(self.folder.join(OWN_LOG))?;
        let mut supervisor = tokio::process::Command::new(orchestrator);
        if let Some(environment) = program.environment {
            supervisor.env_clear().envs(environment.iter().cloned());
        }
        supervisor
            .arg("supervise")
            .arg("--record")
            .arg(self.folder)
            .args(["--deadline-s", &terms.deadline.as_secs().to_string()])
            .args(["--patience-s", &terms.patience.as_secs().to_string()])
            .args(["--max-output", &terms.max_output.to_string()])
            .arg("--")
            .args(program.command)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .current_dir("/");
        let name = program.command.first().map(Path::new);
        let name = name.and_then(Path::file_name).unwrap_or_default();
        failpoints::between(
            || format!("start {}", name.display()),
            || supervisor.spawn(),
        )
    }

    /// What there is of it now.
    #[must_use]
    pub fn status(&self) -> Status {
        if let Some(exit) = read_json::<Exit>(&self.folder.join(EXIT)) {
            return Status::Exited(exit);
        }
        match self.record() {
            None => Status::Unknown,
            Some(record)
                // Once the child has ended the supervisor will say how.
                if record.boot_id == boot_id() && record.supervisor.is_alive() =>
            {
                Status::Running
            }
            // The exit record may have been written since the first look.
            Some(_) => read_json(&self.folder.join(EXIT)).map_or(Status::Lost, Status::Exited),
        }
    }

    /// Asks the supervisor to stop the child: SIGINT to its group, patience, SIGKILL. Does not wait.
    ///
    /// # Errors
    /// The supervisor cannot be signalled.
    pub fn stop(&self) -> io::Result<()> {
        match self.record() {
            Some(record) if record.boot_id == boot_id() => {
                record.supervisor.signal(rustix::process::Signal::TERM)
            }
            _ => Ok(()),
        }
    }

    /// The session (setsid(2)) of the supervisor and all that it started; `None` before its record is written.
    #[must_use]
    pub fn session(&self) -> Option<i32> {
        self.record()
            .filter(|record| record.boot_id == boot_id())
            .map(|record| record.supervisor.pid)
    }

    /// The last words: at most `limit` bytes of the newest output of the child, or else of the supervisor.
    #[must_use]
    pub fn last_words(&self, limit: u64) -> String {
        [OUTPUT, OLD_OUTPUT, OWN_LOG]
            .iter()
            .map(|file| tail(&self.folder.join(file), limit))
            .find(|words| !words.is_empty())
            .unwrap_or_default()
    }

    /// All of its output that is kept.
    #[must_use]
    pub fn output(&self) -> String {
        [OLD_OUTPUT, OUTPUT]
            .iter()
            .map(|file| std::fs::read(self.folder.join(file)).unwrap_or_default())
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .collect()
    }

    fn record(&self) -> Option<Record> {
        read_json(&self.folder.join(RECORD))
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

fn tail(path: &Path, limit: u64) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(limit)))?;
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    String::from_utf8_lossy(&read().unwrap_or_default())
        .trim()
        .to_owned()
}

/// Writes a file whole or not at all, and only returns when it would survive a power cut.
fn write_json(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    let folder = path.parent().context("a record needs a folder")?;
    let mut file = tempfile::NamedTempFile::new_in(folder)
        .with_context(|| format!("{} cannot be written", path.display()))?;
    serde_json::to_writer(&mut file, value)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    File::open(folder)?.sync_all()?;
    Ok(())
}

/// Runs the supervisor until its child has ended.
///
/// # Errors
/// The record cannot be written or the child cannot be started; then nothing runs.
pub fn run(command: &SuperviseCommand) -> anyhow::Result<()> {
    let signals = SigSet::from_iter([
        Signal::SIGCHLD,
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
    ]);
    // The child does not inherit this: the standard library gives it an empty mask.
    signals.thread_block()?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    // Whoever was started in the background of a script ignores SIGINT, and a program that was started so can never heed it.
    // A signal with a handler is back at its default in the child (execve(2)); the handler itself never runs: see above.
    signal_hook::flag::register(Signal::SIGINT as i32, Arc::default())?;
    // EPERM: already the leader of a group, started from a shell.
    nix::unistd::setsid().ok();

    let deadline = Deadline::after(Duration::from_secs(command.deadline_s))?;
    let (argv0, arguments) = command
        .command
        .split_first()
        .context("there is no command to supervise")?;
    let mut record = Record {
        boot_id: boot_id(),
        supervisor: Process::of(i32::try_from(std::process::id())?).context("/proc is missing")?,
        child: None,
        argv0: argv0.to_string_lossy().into_owned(),
        deadline: jiff::Timestamp::now()
            .checked_add(jiff::SignedDuration::from_secs(i64::try_from(
                command.deadline_s,
            )?))
            .context("the deadline is too far away")?,
    };
    write_json(&command.record.join(RECORD), &record)?;

    let (reader, writer) = io::pipe()?;
    let mut output = Output::create(&command.record, command.max_output)?;
    let mut child = start(argv0, arguments, writer, &mut output)?;
    // Until it is waited for its number cannot be given to anybody else.
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let copier = std::thread::spawn(move || output.copy(reader));
    record.child = Process::of(pid.as_raw());
    write_json(&command.record.join(RECORD), &record)?;

    let mut cause = Cause::Itself;
    let mut kill_at: Option<Deadline> = None;
    loop {
        while let Some(signal) = signals.read_signal()? {
            let signal = Signal::try_from(i32::try_from(signal.ssi_signo)?)?;
            if matches!(signal, Signal::SIGINT | Signal::SIGTERM) && kill_at.is_none() {
                cause = Cause::Stopped;
                kill_at = Some(interrupt(pid, command.patience_s)?);
            }
        }
        let ended = waitid(
            Id::Pid(pid),
            WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT,
        )?;
        if ended != WaitStatus::StillAlive {
            break;
        }
        if kill_at.is_none() && deadline.is_over()? {
            cause = Cause::Deadline;
            kill_at = Some(interrupt(pid, command.patience_s)?);
        }
        if let Some(kill_at) = &kill_at
            && kill_at.is_over()?
        {
            killpg(pid, Signal::SIGKILL).ok();
        }
        let next = kill_at.as_ref().unwrap_or(&deadline);
        let mut descriptors = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut descriptors, next.wait()?) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    killpg(pid, Signal::SIGKILL).ok();
    let status = child.wait()?;
    // The pipe ends with the last process of the group; one that left the group must not hold us up.
    let patience = Deadline::after(Duration::from_secs(1))?;
    while !copier.is_finished() && !patience.is_over()? {
        std::thread::sleep(Duration::from_millis(5));
    }
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    let exit = Exit {
        cause,
        code: status.code(),
        signal: signal.map(|number| {
            Signal::try_from(number).map_or_else(|_| number.to_string(), |s| s.to_string())
        }),
        at: jiff::Timestamp::now(),
        cpu_ms: cpu_of_children()?,
    };
    // The folder may have been removed meanwhile; then nobody wants to know.
    if command.record.exists() {
        write_json(&command.record.join(EXIT), &exit)?;
    }
    Ok(())
}

fn start(
    argv0: &OsStr,
    arguments: &[OsString],
    writer: io::PipeWriter,
    output: &mut Output,
) -> anyhow::Result<std::process::Child> {
    let spawned = Command::new(argv0)
        .args(arguments)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn();
    match spawned {
        Ok(child) => Ok(child),
        Err(error) => {
            let message = format!("{} cannot be started: {error}", argv0.to_string_lossy());
            writeln!(output.file, "{message}")?;
            bail!(message)
        }
    }
}

fn interrupt(group: Pid, patience_s: u64) -> anyhow::Result<Deadline> {
    killpg(group, Signal::SIGINT).ok();
    Deadline::after(Duration::from_secs(patience_s))
}

/// A moment on the clock that stands still while the host sleeps (`CLOCK_MONOTONIC`, clock_gettime(2)).
struct Deadline(Duration);

impl Deadline {
    fn after(duration: Duration) -> anyhow::Result<Self> {
        Ok(Self(Self::now()?.saturating_add(duration)))
    }

    fn now() -> nix::Result<Duration> {
        clock_gettime(ClockId::CLOCK_MONOTONIC).map(Into::into)
    }

    fn is_over(&self) -> nix::Result<bool> {
        Ok(Self::now()? >= self.0)
    }

    /// How long poll(2) may wait.
    fn wait(&self) -> anyhow::Result<PollTimeout> {
        let left = self.0.saturating_sub(Self::now()?);
        let bounded = left.clamp(Duration::from_millis(20), Duration::from_secs(60));
        Ok(PollTimeout::try_from(bounded)?)
    }
}

/// A file that keeps the newest output and never grows beyond its bound.
struct Output {
    folder: PathBuf,
    file: File,
    written: u64,
    half: u64,
}

impl Output {
    fn create(folder: &Path, max: u64) -> io::Result<Self> {
        Ok(Self {
            folder: folder.to_owned(),
            file: File::create(folder.join(OUTPUT))?,
            written: 0,
            half: max / 2,
        })
    }

    fn copy(&mut self, mut reader: io::PipeReader) {
        let mut buffer = vec![0; 64 << 10];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return,
                // A full disk must not stop the child: it goes on unheard.
                Ok(length) => self.write(&buffer[..length]).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.written > self.half {
            std::fs::rename(self.folder.join(OUTPUT), self.folder.join(OLD_OUTPUT))?;
            self.file = File::create(self.folder.join(OUTPUT))?;
            self.written = 0;
        }
        self.written += bytes.len() as u64;
        self.file.write_all(bytes)
    }
}

fn cpu_of_children() -> nix::Result<u64> {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_CHILDREN)?;
    let ms = |time: nix::sys::time::TimeVal| time.tv_sec() * 1000 + time.tv_usec() / 1000;
    let all = ms(usage.user_time()) + ms(usage.system_time());
    Ok(u64::try_from(all).unwrap_or_default())
}
