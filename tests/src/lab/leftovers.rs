//! What is left of machines and children: counted from `/proc`, sockets and files, never from Mayfly's own records.

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpgid};
use serde::Serialize;
use std::fmt;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// Everything that is left, one line each. Empty is what a test wants.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Leftovers(pub Vec<String>);

impl Leftovers {
    /// Nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Counts what carries the lab's folder or address range. Processes of `own_groups` are the lab's and do not count.
    pub(super) fn count(lab: &Path, address_prefix: &str, own_groups: &[i32]) -> Self {
        let needle = lab.to_string_lossy();
        let mut left: Vec<String> = processes(&needle)
            .into_iter()
            .filter(|(pid, _)| {
                !getpgid(Some(*pid)).is_ok_and(|group| own_groups.contains(&group.as_raw()))
            })
            .map(|(pid, command)| format!("process {pid}: {command}"))
            .collect();
        for folder in ["machines", "tmp"] {
            files(&lab.join(folder), &mut |path| {
                left.push(format!("file {}", path.display()));
            });
        }
        // The orchestrator's own state may stay; what belongs to a desktop may not.
        files(&lab.join("state"), &mut |path| {
            let text = path.strip_prefix(lab).unwrap_or(path).to_string_lossy();
            let of_a_desktop = text.contains("desktop-") || text.ends_with(".qcow2");
            if of_a_desktop || text.ends_with(".sock") && text != "state/admin.sock" {
                left.push(format!("file {}", path.display()));
            }
        });
        let machines = lab.join("machines");
        let machines = machines.to_string_lossy();
        left.extend(
            unix_sockets()
                .into_iter()
                .filter(|socket| socket.contains(&*machines))
                .map(|socket| format!("socket {socket}")),
        );
        left.extend(
            tcp_listeners(&fs::read_to_string("/proc/net/tcp").unwrap_or_default())
                .into_iter()
                .filter(|address| {
                    address.starts_with(&format!("{address_prefix}."))
                        // The lab's own mark, see `Slot`.
                        && !address.starts_with(&format!("{address_prefix}.0.254:"))
                })
                .map(|address| format!("listener {address}")),
        );
        Self(left)
    }
}

impl fmt::Display for Leftovers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("nothing is left");
        }
        write!(f, "left over:\n  {}", self.0.join("\n  "))
    }
}

/// Ends every process that carries the lab's folder, until none is left or a bound has passed.
pub(super) fn end_processes(lab: &Path) {
    let needle = lab.to_string_lossy();
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let left = processes(&needle);
        if left.is_empty() || Instant::now() > end {
            break;
        }
        for (pid, _) in left {
            let _ = kill(pid, Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Processes with this text in their command line or environment, other than this one. Zombies have neither.
fn processes(needle: &str) -> Vec<(Pid, String)> {
    let own = std::process::id();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != own)
        .filter_map(|pid| {
            let read = |file: &str| {
                let bytes = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
                String::from_utf8_lossy(&bytes).replace('\0', " ")
            };
            let command = read("cmdline");
            let ours = command.contains(needle) || read("environ").contains(needle);
            ours.then(|| (Pid::from_raw(pid.cast_signed()), command))
        })
        .collect()
}

/// Paths of all unix sockets of this machine, abstract ones with a leading `@`.
fn unix_sockets() -> Vec<String> {
    fs::read_to_string("/proc/net/unix")
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split_whitespace().nth(7))
        .map(str::to_owned)
        .collect()
}

/// `a.b.c.d:port` of every listener in `/proc/net/tcp` (proc(5): addresses are hexadecimal in host byte order).
fn tcp_listeners(table: &str) -> Vec<String> {
    table
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace().skip(1);
            let (address, port) = words.next()?.split_once(':')?;
            // 0A is LISTEN.
            if words.nth(1)? != "0A" {
                return None;
            }
            let [a, b, c, d] = u32::from_str_radix(address, 16).ok()?.to_ne_bytes();
            let port = u16::from_str_radix(port, 16).ok()?;
            Some(format!("{a}.{b}.{c}.{d}:{port}"))
        })
        .collect()
}

fn files(folder: &Path, found: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        found(&entry.path());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&entry.path(), found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::Lab;

    #[test]
    fn listeners_are_read_from_the_kernels_table() {
        let table = "  sl  local_address rem_address   st tx_queue\n   \
             0: 0500A87F:0D3D 00000000:0000 0A 00000000:00000000\n   \
             1: 0100007F:1388 0100007F:9C40 01 00000000:00000000\n";
        // Little endian, as on every machine that Mayfly supports.
        assert_eq!(tcp_listeners(table), ["127.168.0.5:3389"]);
    }

    #[test]
    fn a_forgotten_process_socket_file_and_listener_are_named_and_then_ended() {
        let lab = Lab::new("leftovers").unwrap();
        assert_eq!(lab.leftovers(), Leftovers::default());

        // In a session of its own, as a supervised machine is.
        let mut machine = lab.command("setsid");
        machine.args(["--fork", "sleep", "1000"]);
        let mut starter = lab.start("starter", machine).unwrap();
        while starter.poll().unwrap().is_none() {
            std::thread::yield_now();
        }
        let socket = lab.path("machines/qga.sock");
        let _socket = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let address = format!("{}.0.7:3389", lab.address_prefix());
        let _listener = std::net::TcpListener::bind(&address).unwrap();

        // Between setsid and sleep it has neither command line nor environment.
        let end = Instant::now() + Duration::from_secs(60);
        while !lab.leftovers().to_string().contains(": sleep 1000") && Instant::now() < end {
            std::thread::yield_now();
        }
        let left = lab.leftovers().to_string();
        for sign in [
            ": sleep 1000".to_owned(),
            format!("file {}", socket.display()),
            format!("socket {}", socket.display()),
            format!("listener {address}"),
        ] {
            assert!(left.contains(&sign), "{sign} is missing in {left}");
        }
        let folder = lab.dir().to_owned();
        drop(starter);
        drop(lab);
        assert!(processes(&folder.to_string_lossy()).is_empty());
        assert!(!folder.exists());
    }
}
