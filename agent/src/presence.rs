//! Whether a person is there: open RDP connections, and how long ago the last input was.
//!
//! A connection counts when xorgxrdp has one: the X server listens on a unix socket `…/xrdp_display_N`, and xrdp is connected to it
//! for exactly as long as a logged-in client is there. A TCP connection to port 3389 counts for nothing: scanners and
//! health checks make those too. Paths: `/run/xrdp/sockdir/` (Debian's 0.9), `/run/xrdp/sockdir/<uid>/` (0.10), `/tmp/.xrdp/`
//! (upstream's 0.9).
//!
//! X servers and their files belong to the person, so they are asked on a thread of its own: one that hangs costs the idle time,
//! nothing else.

use crate::talk::{Event, Person};
use anyhow::{Context as _, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use x11rb::connection::Connection as _;
use x11rb::protocol::screensaver::ConnectionExt as _;
use x11rb::rust_connection::{DefaultStream, RustConnection};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(500);
/// An idle time older than this is not evidence.
const FRESH: Duration = Duration::from_secs(5);
/// No `.Xauthority` is larger.
const MAX_XAUTHORITY: u64 = 64 * 1024;

/// Every xrdp display, with its open connections.
pub(crate) type Displays = BTreeMap<u32, u32>;

/// Shared between the threads that look and those that need to know.
#[derive(Clone, Default)]
pub(crate) struct Presence {
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    displays: Displays,
    /// The last input: how long before which moment.
    idle: Option<(Duration, Instant)>,
}

impl Presence {
    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The displays that there are now.
    pub(crate) fn displays(&self) -> Displays {
        self.seen().displays.clone()
    }

    /// Looks twice a second, until the receiver is gone.
    pub(crate) fn watch(&self, events: &Sender<Event>) {
        loop {
            let displays = fs::read("/proc/net/unix")
                .map(|bytes| displays(&String::from_utf8_lossy(&bytes)))
                .unwrap_or_default();
            let connections = displays.values().sum();
            let idle_ms = {
                let mut seen = self.seen();
                seen.displays = displays;
                seen.idle
                    .filter(|(_, at)| at.elapsed() < FRESH)
                    .map(|(idle, _)| u64::try_from(idle.as_millis()).unwrap_or(u64::MAX))
            };
            let looked = Event::Looked {
                connections,
                idle_ms,
            };
            if events.send(looked).is_err() {
                return;
            }
            thread::sleep(LOOK);
        }
    }

    /// From now on, also asks this person's X servers for the time of the last input.
    pub(crate) fn follow_input(&self, person: &Person) {
        let (presence, user) = (self.clone(), person.user.clone());
        thread::spawn(move || {
            let mut open: BTreeMap<u32, Server> = BTreeMap::new();
            loop {
                let displays = presence.displays();
                open.retain(|display, _| displays.contains_key(display));
                let mut last: Option<Duration> = None;
                for number in displays.keys().copied() {
                    match idle(&mut open, number, &user) {
                        Ok(idle) => last = Some(last.map_or(idle, |other| other.min(idle))),
                        Err(error) => {
                            tracing::debug!("no idle time of display {number}: {error:#}");
                            open.remove(&number);
                        }
                    }
                }
                presence.seen().idle = last.map(|idle| (idle, Instant::now()));
                thread::sleep(2 * LOOK);
            }
        });
    }
}

/// A connection to an X server.
struct Server {
    connection: RustConnection,
    root: u32,
}

fn idle(open: &mut BTreeMap<u32, Server>, display: u32, user: &str) -> anyhow::Result<Duration> {
    let server = match open.entry(display) {
        std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
        std::collections::btree_map::Entry::Vacant(entry) => entry.insert(connect(display, user)?),
    };
    let info = server
        .connection
        .screensaver_query_info(server.root)?
        .reply()?;
    Ok(Duration::from_millis(info.ms_since_user_input.into()))
}

fn connect(display: u32, user: &str) -> anyhow::Result<Server> {
    let stream = UnixStream::connect(format!("/tmp/.X11-unix/X{display}"))?;
    let path = format!("{}/.Xauthority", home(user)?);
    // The person may put anything there: a link, a pipe, something endless.
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK)
        .open(&path)
        .with_context(|| format!("opening {path}"))?;
    ensure!(file.metadata()?.is_file(), "{path} is not a file");
    let mut bytes = vec![];
    file.take(MAX_XAUTHORITY).read_to_end(&mut bytes)?;
    let cookie = cookie(&bytes, display).with_context(|| format!("no cookie in {path}"))?;
    let (stream, _) = DefaultStream::from_unix_stream(stream)?;
    let connection = RustConnection::connect_to_stream_with_auth_info(
        stream,
        0,
        COOKIE.into(),
        cookie.to_owned(),
    )?;
    let root = connection.setup().roots.first().context("no screen")?.root;
    Ok(Server { connection, root })
}

fn home(user: &str) -> anyhow::Result<String> {
    let passwd = fs::read_to_string("/etc/passwd")?;
    passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields[0] == user)
        .and_then(|fields| fields.get(5).map(|home| (*home).to_owned()))
        .with_context(|| format!("no account {user}"))
}

const COOKIE: &str = "MIT-MAGIC-COOKIE-1";

/// The cookie of a display in an `.Xauthority` file (man Xsecurity; libXau's `AuRead.c`: a big-endian 16-bit family, then address,
/// display number, name and data, each after its big-endian 16-bit length).
fn cookie(mut file: &[u8], display: u32) -> Option<&[u8]> {
    fn counted<'a>(file: &mut &'a [u8]) -> Option<&'a [u8]> {
        let (length, rest) = file.split_first_chunk::<2>()?;
        let (value, rest) = rest.split_at_checked(u16::from_be_bytes(*length).into())?;
        *file = rest;
        Some(value)
    }
    loop {
        file = file.get(2..)?;
        let _address = counted(&mut file)?;
        let number = counted(&mut file)?;
        let name = counted(&mut file)?;
        let data = counted(&mut file)?;
        let this_display = number.is_empty() || number == display.to_string().as_bytes();
        if this_display && name == COOKIE.as_bytes() {
            return Some(data);
        }
    }
}

/// The xrdp displays in a `/proc/net/unix`, with their connections.
///
/// A line is `Num RefCount Protocol Flags Type St Inode Path`; a listening socket has the flag `__SO_ACCEPTCON` (0x10000), an
/// established one `St` 03 (`SS_CONNECTED`). An accepted socket carries the listener's path; the connecting end has none, so
/// each connection is seen once.
fn displays(proc_net_unix: &str) -> Displays {
    let mut displays = Displays::new();
    for line in proc_net_unix.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (Some(flags), Some(kind), Some(state), Some(path)) =
            (fields.nth(3), fields.next(), fields.next(), fields.nth(1))
        else {
            continue;
        };
        let Some(display) = display_of(path) else {
            continue;
        };
        let connections = displays.entry(display).or_default();
        if flags == "00000000" && kind == "0001" && state == "03" {
            *connections += 1;
        }
    }
    displays
}

fn display_of(path: &str) -> Option<u32> {
    let ours = ["/run/xrdp/", "/var/run/xrdp/", "/tmp/.xrdp/"];
    if !ours.iter().any(|folder| path.starts_with(folder)) {
        return None;
    }
    let (_, name) = path.rsplit_once('/')?;
    let number = name.strip_prefix("xrdp_display_")?;
    number
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| number.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    // Captured in desktops of Debian 12 (xrdp 0.9.21) and Debian 13 (xrdp 0.10.1), cut down to what is about X and xrdp: before
    // anybody connected, with a client logged in, and after that client was killed.
    const IDLE: &str = include_str!("testdata/xrdp-0.9-idle");
    const CONNECTED: [&str; 2] = [
        include_str!("testdata/xrdp-0.9-connected"),
        include_str!("testdata/xrdp-0.10-connected"),
    ];
    const DROPPED: [&str; 2] = [
        include_str!("testdata/xrdp-0.9-dropped"),
        include_str!("testdata/xrdp-0.10-dropped"),
    ];

    #[test]
    fn a_logged_in_client_counts_once_and_until_it_is_gone() {
        assert_eq!(displays(IDLE), Displays::new());
        for connected in CONNECTED {
            assert_eq!(displays(connected), Displays::from([(10, 1)]));
        }
        for dropped in DROPPED {
            assert_eq!(displays(dropped), Displays::from([(10, 0)]));
        }
    }

    #[test]
    fn sockets_of_others_do_not_count() {
        for path in [
            "/tmp/xrdp_display_10",
            "@/run/xrdp/sockdir/xrdp_display_10",
            "/run/xrdp/sockdir/xrdp_display_",
            "/run/xrdp/sockdir/xrdp_display_x",
            "/run/xrdp/sockdir/xrdp_disconnect_display_10",
        ] {
            let line = format!("0: 00000003 00000000 00000000 0001 03 1 {path}\n");
            assert_eq!(displays(&line), Displays::new(), "{path}");
        }
    }

    #[test]
    fn the_cookie_of_the_display_is_found() {
        let entry = |number: &str, name: &str, data: &[u8]| {
            let mut bytes = vec![1, 0];
            for field in [b"desktop-0000abc", number.as_bytes(), name.as_bytes(), data] {
                bytes.extend(u16::try_from(field.len()).unwrap().to_be_bytes());
                bytes.extend(field);
            }
            bytes
        };
        let file = [
            entry("11", COOKIE, b"other"),
            entry("10", "XDM-AUTHORIZATION-1", b"x"),
            entry("10", COOKIE, b"sixteen bytes ok"),
        ]
        .concat();
        assert_eq!(cookie(&file, 10), Some(b"sixteen bytes ok".as_slice()));
        assert_eq!(cookie(&file, 12), None);
        for cut in 0..file.len() {
            let _ = cookie(&file[..cut], 10);
        }
    }
}
