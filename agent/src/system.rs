//! What the agent does to the machine other than reading and writing files: the edge that tests replace.

use jiff::Timestamp;
use nix::sys::time::TimeSpec;
use nix::time::ClockId;
use std::io::{self, Write as _};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// A command that hangs is given up after this.
const PATIENCE: Duration = Duration::from_secs(120);

/// Why a command did not work.
#[derive(Debug)]
pub(crate) struct CommandError(String);

#[cfg(test)]
impl CommandError {
    pub(crate) fn new(message: String) -> Self {
        Self(message)
    }
}

impl std::fmt::Display for CommandError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for CommandError {}

/// The machine.
pub(crate) trait System: Send + Sync {
    /// Runs a program of the image to its end and returns what it printed. What is secret goes in `input`, its standard input,
    /// never in `arguments`, which every process of the machine can read.
    fn run(&self, program: &str, arguments: &[&str], input: &str) -> Result<String, CommandError>;
    /// The wall clock.
    fn now(&self) -> Timestamp;
    /// Sets the wall clock.
    fn set_now(&self, now: Timestamp) -> io::Result<()>;
    /// Time since boot; goes on when the agent is restarted, and does not jump.
    fn uptime(&self) -> Duration;
    /// Sets the kernel's host name.
    fn set_host_name(&self, name: &str) -> io::Result<()>;
    /// Powers the machine off: politely, and by the kernel if that takes too long.
    fn power_off(&self);
}

/// The machine that the agent runs on.
pub(crate) struct Linux;

impl System for Linux {
    fn run(&self, program: &str, arguments: &[&str], input: &str) -> Result<String, CommandError> {
        let failed = |what: &str| CommandError(format!("{program}: {what}"));
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| failed(&error.to_string()))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A program that does not read its input says by its exit status whether that matters.
            let _ = stdin.write_all(input.as_bytes());
        }
        let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
        let (done, output) = mpsc::channel();
        thread::spawn(move || done.send(child.wait_with_output()));
        let output = match output.recv_timeout(PATIENCE) {
            Ok(output) => output.map_err(|error| failed(&error.to_string()))?,
            Err(_) => {
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
                return Err(failed(&format!(
                    "no end after {} s, killed",
                    PATIENCE.as_secs()
                )));
            }
        };
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let words =
            [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned());
        // Its errors come last.
        let last = words
            .iter()
            .rev()
            .find_map(|words| words.lines().rfind(|line| !line.trim().is_empty()))
            .unwrap_or("it said nothing");
        Err(failed(&format!("{}: {last}", output.status)))
    }

    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn set_now(&self, now: Timestamp) -> io::Result<()> {
        let time = TimeSpec::new(now.as_second(), now.subsec_nanosecond().into());
        Ok(nix::time::clock_settime(ClockId::CLOCK_REALTIME, time)?)
    }

    fn uptime(&self) -> Duration {
        // CLOCK_BOOTTIME cannot fail on the kernels that the agent runs on (man clock_gettime).
        nix::time::clock_gettime(ClockId::CLOCK_BOOTTIME)
            .map(Duration::from)
            .unwrap_or_default()
    }

    fn set_host_name(&self, name: &str) -> io::Result<()> {
        Ok(nix::unistd::sethostname(name)?)
    }

    fn power_off(&self) {
        if let Err(error) = self.run("systemctl", &["poweroff"], "") {
            tracing::error!(%error, "the polite power-off failed");
        }
        thread::spawn(|| {
            thread::sleep(Duration::from_secs(45));
            nix::unistd::sync();
            let error = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_POWER_OFF);
            tracing::error!(?error, "the kernel refused to power off");
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_gets_its_input_and_returns_what_it_printed() {
        assert_eq!(Linux.run("cat", &[], "hello").unwrap(), "hello");
    }

    #[test]
    fn a_command_that_fails_says_its_last_word() {
        let error = Linux
            .run("sh", &["-c", "echo no room >&2; exit 3"], "")
            .unwrap_err();
        assert_eq!(error.to_string(), "sh: exit status: 3: no room");
        assert!(Linux.run("/nonexistent/program", &[], "").is_err());
    }
}
