//! A process, so that it is never mistaken for another one.
//!
//! A bare pid says little: the kernel hands it out again. A [`Process`] is a pid *and* the moment it started
//! (`/proc/<pid>/stat`, field 22; proc(5)), and signals go through a pidfd that was opened before that moment was
//! compared, so a signal reaches this process or none.

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// One process of this boot of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since the host booted.
    pub start_time: u64,
}

impl Process {
    /// The process that has this number now; `None` if none does, or only a zombie.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        Self::with_session(pid).map(|(process, _)| process)
    }

    /// The process that has this number now, and the number of its session.
    fn with_session(pid: i32) -> Option<(Self, i32)> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is the program's name in parentheses and may hold anything, `)` included.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?;
        let session = fields.nth(2)?.parse().ok()?;
        let threads: u32 = fields.nth(13)?.parse().ok()?;
        let start_time = fields.nth(1)?.parse().ok()?;
        // The first thread may be a zombie while others still hold the process's files and sockets.
        let is_gone = matches!(state, "Z" | "X") && threads <= 1;
        (!is_gone).then_some((Self { pid, start_time }, session))
    }

    /// Whether it still runs.
    #[must_use]
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends it a signal. A process that has ended is not an error.
    ///
    /// # Errors
    /// Those of pidfd_open(2) and pidfd_send_signal(2): mostly that it belongs to somebody else.
    pub fn signal(self, signal: Signal) -> io::Result<()> {
        let Some(pid) = Pid::from_raw(self.pid) else {
            return Ok(());
        };
        let sent = pidfd_open(pid, PidfdFlags::empty()).and_then(|fd| {
            if self.is_alive() {
                pidfd_send_signal(fd, signal)
            } else {
                Ok(())
            }
        });
        match sent {
            Err(rustix::io::Errno::SRCH) => Ok(()),
            other => Ok(other?),
        }
    }
}

/// Every live process whose command line names `folder` or something in it.
///
/// A process that is ending has no command line any more while it still holds its sockets: whoever waits for an
/// end keeps what was found and asks [`Process::is_alive`], and asks [`nameless`] for those that began to end before.
///
/// # Errors
/// `/proc` cannot be read.
pub fn naming(folder: &Path) -> io::Result<Vec<Process>> {
    let mut found = Vec::new();
    for (process, command_line) in all()? {
        if names(&command_line, folder) {
            found.push(process);
        }
    }
    Ok(found)
}

/// Every process of this session that has no command line: it is ending, or about to become another program.
///
/// To wait for, never to signal: once a session has ended, its number is given to another.
///
/// # Errors
/// `/proc` cannot be read.
pub fn nameless(session: i32) -> io::Result<Vec<Process>> {
    let mut found = Vec::new();
    for (process, command_line) in all()? {
        let of_session = || Process::with_session(process.pid).is_some_and(|(_, s)| s == session);
        if command_line.is_empty() && of_session() {
            found.push(process);
        }
    }
    Ok(found)
}

/// Every live process in whose environment is `mark`, a whole `NAME=value`. Programs that a child starts inherit it, whatever
/// their command lines and groups are.
///
/// # Errors
/// `/proc` cannot be read.
pub fn marked(mark: &OsStr) -> io::Result<Vec<Process>> {
    let mut found = Vec::new();
    for (process, _) in all()? {
        // Of other users' processes it cannot be read: those are not ours.
        let environment =
            std::fs::read(format!("/proc/{}/environ", process.pid)).unwrap_or_default();
        if environment.split(|b| *b == 0).any(|v| v == mark.as_bytes()) {
            found.push(process);
        }
    }
    Ok(found)
}

/// Every live process with its command line, arguments separated by NUL.
///
/// # Errors
/// `/proc` cannot be read.
pub fn all() -> io::Result<Vec<(Process, Vec<u8>)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A process may end between any two of these reads; then it is simply not there.
        if let (Some(process), Ok(command_line)) = (
            Process::of(pid),
            std::fs::read(format!("/proc/{pid}/cmdline")),
        ) {
            found.push((process, command_line));
        }
    }
    Ok(found)
}

/// Whether `command_line` holds `folder` as a whole path or as the beginning of one.
fn names(command_line: &[u8], folder: &Path) -> bool {
    let needle = folder.as_os_str().as_bytes();
    command_line
        .windows(needle.len().max(1))
        .enumerate()
        .any(|(at, window)| {
            window == needle
                && matches!(
                    command_line.get(at + needle.len()),
                    None | Some(b'/' | b'\0' | b',')
                )
        })
}

/// Identifies this boot of the host; a [`Process`] from another boot means nothing.
#[must_use]
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    fn sleeper() -> (Child, Process) {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(i32::try_from(child.id()).unwrap()).unwrap();
        (child, process)
    }

    #[test]
    fn a_process_that_took_over_a_pid_is_never_signalled() {
        let (mut child, process) = sleeper();
        let predecessor = Process {
            start_time: process.start_time - 1,
            ..process
        };
        predecessor.signal(Signal::KILL).unwrap();
        assert!(!predecessor.is_alive());
        assert!(process.is_alive());
        process.signal(Signal::KILL).unwrap();
        child.wait().unwrap();
        assert!(!process.is_alive());
        process.signal(Signal::KILL).unwrap();
    }

    #[test]
    fn a_zombie_is_gone() {
        let (mut child, process) = sleeper();
        child.kill().unwrap();
        while process.is_alive() {
            std::thread::yield_now();
        }
        child.wait().unwrap();
    }

    #[test]
    fn a_process_without_a_command_line_is_found_by_its_session() {
        // Its first thread has ended, so the kernel shows no command line; another thread holds its files.
        let script = "import ctypes, os, threading, time; os.setsid(); \
                      threading.Thread(target=time.sleep, args=(60,)).start(); ctypes.CDLL(None).pthread_exit(None)";
        let mut child = Command::new("python3")
            .args(["-c", script])
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let begin = std::time::Instant::now();
        let process = loop {
            if let [process] = nameless(pid).unwrap()[..] {
                break process;
            }
            assert!(begin.elapsed().as_secs() < 30, "it is never found");
            std::thread::yield_now();
        };
        assert_eq!(process.pid, pid);
        assert!(
            naming(Path::new("python3"))
                .unwrap()
                .iter()
                .all(|p| *p != process)
        );
        process.signal(Signal::KILL).unwrap();
        child.wait().unwrap();
        assert_eq!(nameless(pid).unwrap(), []);
    }

    #[test]
    fn a_folder_is_named_whole_or_not_at_all() {
        let folder = Path::new("/var/d/desktop-0000001");
        for line in [
            &b"qemu\0-drive\0file=/var/d/desktop-0000001/disk,format=qcow2\0"[..],
            b"supervise\0--record\0/var/d/desktop-0000001\0",
            b"x\0dir=/var/d/desktop-0000001,y\0",
        ] {
            assert!(names(line, folder));
        }
        for line in [
            &b"qemu\0/var/d/desktop-00000012/disk\0"[..],
            b"qemu\0/var/d/desktop-0000002\0",
            b"",
        ] {
            assert!(!names(line, folder));
        }
    }
}
