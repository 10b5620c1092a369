//! A child in a process group of its own.

use super::{guard, until};
use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::fs::File;
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// From a polite signal to SIGKILL when a process is dropped.
const PATIENCE: Duration = Duration::from_secs(3);

/// A child in a process group of its own. Dropping it ends the whole group: SIGTERM, patience, SIGKILL.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    groups: Arc<Mutex<Vec<i32>>>,
    ended: Option<ExitStatus>,
}

impl Process {
    pub(super) fn start(
        name: &str,
        mut command: Command,
        input: &[u8],
        log: &Path,
        groups: Arc<Mutex<Vec<i32>>>,
    ) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("writing {}", log.display()))?;
        let program = command.get_program().display().to_string();
        let mut child = command
            .process_group(0)
            .stdin(Stdio::piped())
            .stderr(file.try_clone()?)
            .stdout(file)
            .spawn()
            .with_context(|| format!("starting {name} ({program})"))?;
        let stdin = child.stdin.take();
        let process = Self {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
            groups,
            ended: None,
        };
        guard::watch_group(process.group().as_raw());
        if let Ok(mut groups) = process.groups.lock() {
            groups.push(process.group().as_raw());
        }
        // Whoever does not read its input may close it first.
        let _ = stdin.map(|mut stdin| stdin.write_all(input));
        Ok(process)
    }

    /// What it was started as.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id, which is its group's too.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its output is.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Its output so far, both streams.
    #[must_use]
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Sends a signal to the child alone.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if let Some(status) = self.poll()? {
            bail!("{} has ended already: {status}", self.name);
        }
        nix::sys::signal::kill(self.group(), signal)
            .with_context(|| format!("sending {signal} to {}", self.name))
    }

    /// Its exit status, once it has ended.
    ///
    /// # Errors
    /// When the kernel will not say.
    pub fn poll(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?;
        }
        Ok(self.ended)
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// After `bound`, with the end of its log.
    pub async fn exit(&mut self, bound: Duration) -> Result<ExitStatus> {
        let what = format!(
            "{} ends; its log ends with:\n{}",
            self.name,
            self.last_words()
        );
        until(&what, bound, async || self.poll()).await
    }

    /// Kills it as a crash would: SIGKILL to the child alone, then waits for its end.
    ///
    /// # Errors
    /// When it has ended already.
    pub async fn crash(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        let status = self.exit(Duration::from_secs(10)).await?;
        if status.signal() != Some(Signal::SIGKILL as i32) {
            bail!("{} ended by itself first: {status}", self.name);
        }
        Ok(())
    }

    /// Fails with the end of its log if it has ended.
    ///
    /// # Errors
    /// When it has ended.
    pub fn must_run(&mut self) -> Result<()> {
        match self.poll()? {
            None => Ok(()),
            Some(status) => bail!("{} ended ({status}):\n{}", self.name, self.last_words()),
        }
    }

    /// The last lines of its output.
    #[must_use]
    pub fn last_words(&self) -> String {
        let output = self.output();
        let lines: Vec<&str> = output.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }

    fn group(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let group = self.group();
        let end = Instant::now() + PATIENCE;
        let _ = killpg(group, Signal::SIGTERM);
        // The group lives as long as any member does; its leader must be reaped to leave it.
        loop {
            let _ = self.poll();
            if killpg(group, None) == Err(Errno::ESRCH) {
                break;
            }
            if Instant::now() > end {
                let _ = killpg(group, Signal::SIGKILL);
                let _ = self.child.wait();
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        guard::forget_group(group.as_raw());
        if let Ok(mut groups) = self.groups.lock() {
            groups.retain(|other| *other != group.as_raw());
        }
    }
}
