//! The virtio-serial port to the orchestrator: one JSON message a line, both ways.
//!
//! A virtio-serial port is not a socket. While nobody has the host's end open, `poll` reports it readable and hung up at once, a
//! read returns 0, and a blocking write waits for ever (Linux, `drivers/char/virtio_console.c`). So: the file is non-blocking; a
//! hang-up is looked at again a few times a second instead of polled in a circle; and a message that does not fit now is dropped,
//! because everything that matters is repeated. The host may come and go at any time; what one host left half-said ends with it.

use crate::talk::Event;
use mayfly_api::agent::{FromAgent, ToAgent};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// Between two looks at a port that nobody has open on the host, and between two attempts to open it.
const PAUSE: Duration = Duration::from_millis(250);
/// A line longer than this is not ours.
const MAX_LINE: usize = 64 * 1024;

/// The port.
pub(crate) struct Port {
    path: PathBuf,
    file: Mutex<Option<File>>,
}

impl Port {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self {
            path,
            file: Mutex::new(None),
        }
    }

    /// Says it, or drops it if it cannot be said now. Never blocks.
    pub(crate) fn send(&self, message: &FromAgent) {
        let mut line = match serde_json::to_vec(message) {
            Ok(line) => line,
            Err(error) => return tracing::error!(%error, "a message that cannot be written"),
        };
        line.push(b'\n');
        let guard = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        // One write is one virtio buffer, up to 32 KiB: it is taken whole or not at all.
        match guard.as_ref().map(|mut file| file.write(&line)) {
            Some(Ok(n)) if n == line.len() => {}
            Some(Err(error)) if error.kind() != io::ErrorKind::WouldBlock => {
                tracing::warn!(%error, "the port to the orchestrator cannot be written");
            }
            _ => tracing::debug!("dropped a message: nobody listens"),
        }
    }

    /// Brings what the host says and whether it is there, until the receiver is gone.
    pub(crate) fn listen(&self, events: &Sender<Event>) {
        let mut complained = Complained::No;
        loop {
            let mut opened = false;
            let result = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(nix::libc::O_NONBLOCK)
                .open(&self.path)
                .and_then(|file| {
                    opened = true;
                    let reader = file.try_clone()?;
                    *self.file.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
                    read(reader, events)
                });
            *self.file.lock().unwrap_or_else(PoisonError::into_inner) = None;
            match result {
                Ok(()) => return,
                Err(error) if complained == Complained::No => {
                    // At boot udev may still have to make the link.
                    tracing::warn!(port = %self.path.display(), %error, "waiting for the port to the orchestrator");
                    complained = Complained::Yes;
                }
                Err(_) => {}
            }
            // Without a port there may be a line, and its host is not gone.
            if opened && events.send(Event::HostGone).is_err() {
                return;
            }
            thread::sleep(PAUSE);
        }
    }
}

#[derive(PartialEq)]
enum Complained {
    No,
    Yes,
}

/// Reads until the receiver is gone (`Ok`) or the port fails.
fn read(mut file: File, events: &Sender<Event>) -> io::Result<()> {
    let mut lines = Lines::default();
    let mut connected = false;
    let mut buffer = [0; 4096];
    loop {
        let timeout = if connected {
            PollTimeout::NONE
        } else {
            PollTimeout::ZERO
        };
        let mut poll = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
        match nix::poll::poll(&mut poll, timeout) {
            Err(nix::errno::Errno::EINTR) => continue,
            result => result?,
        };
        let seen = poll[0].revents().unwrap_or(PollFlags::POLLERR);
        if seen.intersects(PollFlags::POLLERR | PollFlags::POLLNVAL) {
            return Err(io::Error::other("the port is gone"));
        }
        let hung_up = seen.contains(PollFlags::POLLHUP);
        if !hung_up && !connected {
            connected = true;
            if events.send(Event::HostConnected).is_err() {
                return Ok(());
            }
        }
        // A port that nobody has open on the host is readable too: it reads 0 bytes.
        let mut read = 0;
        if seen.contains(PollFlags::POLLIN) {
            read = match file.read(&mut buffer) {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) =>
                {
                    0
                }
                result => result?,
            };
            for message in lines.feed(&buffer[..read]) {
                if events.send(Event::Heard(message)).is_err() {
                    return Ok(());
                }
            }
        }
        if hung_up && read == 0 {
            lines = Lines::default();
            if std::mem::take(&mut connected) && events.send(Event::HostGone).is_err() {
                return Ok(());
            }
            thread::sleep(PAUSE);
        }
    }
}

/// Cuts a stream of bytes into messages. Lines that are not a message are passed over: the other side may be newer.
#[derive(Default)]
pub(crate) struct Lines {
    begun: Vec<u8>,
    overlong: bool,
}

impl Lines {
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Vec<ToAgent> {
        let mut messages = vec![];
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.begun.len() + part.len() > MAX_LINE {
                self.overlong = true;
                self.begun.clear();
            }
            if !self.overlong {
                self.begun.extend_from_slice(part);
            }
            if part.ends_with(b"\n") {
                match serde_json::from_slice(&self.begun) {
                    Ok(message) => messages.push(message),
                    Err(_) => tracing::debug!("passed over a line that is not a message"),
                }
                self.begun.clear();
                self.overlong = false;
            }
        }
        messages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_may_come_in_pieces() {
        let mut lines = Lines::default();
        let stream = b"{\"type\":\"ack\"}\n{\"type\":\"warn\",\"ends_in_s\":60}\r\n";
        let messages: Vec<_> = stream
            .iter()
            .flat_map(|byte| lines.feed(&[*byte]))
            .collect();
        assert_eq!(messages, [ToAgent::Ack, ToAgent::Warn { ends_in_s: 60 }]);
    }

    #[test]
    fn what_is_not_a_message_is_passed_over() {
        let mut lines = Lines::default();
        let stream =
            b"\n{\"type\":\"fly\"}\nleft half-s\xff\n{\"type\":\"unwarn\"}\n{\"type\":\"ack\"";
        assert_eq!(lines.feed(stream), [ToAgent::Unwarn]);
        assert_eq!(lines.feed(b"}\n"), [ToAgent::Ack]);
    }

    #[test]
    fn an_endless_line_takes_no_memory_and_ends_at_its_newline() {
        let mut lines = Lines::default();
        for _ in 0..100 {
            assert!(lines.feed(&[b'x'; 4096]).is_empty());
            assert!(lines.begun.len() <= MAX_LINE);
        }
        assert_eq!(lines.feed(b"\n{\"type\":\"ack\"}\n"), [ToAgent::Ack]);
    }
}
