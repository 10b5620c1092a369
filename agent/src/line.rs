//! The line to the orchestrator for a machine without a virtio-serial port of ours: TLS over TCP, one JSON message a line.
//!
//! The orchestrator is known by the fingerprint in the bootstrap and by nothing else: no authority, no host name, no date (this
//! machine's clock may be wrong). It knows the agent by the [`Call`], which is the first thing said. As on the port, a message
//! that cannot be said now is dropped, because everything that matters is repeated; a line that breaks, or on which nothing
//! answers any more, is opened again for as long as the machine lives, to each orchestrator of the bootstrap in turn: only one of
//! them works for the session, and the others close without a word.

use crate::port::Lines;
use crate::talk::Event;
use anyhow::{Context as _, ensure};
use mayfly_api::agent::{self, Call, FromAgent};
use mayfly_api::pinned::Pinned;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use std::io::{self, Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// Between two attempts to open the line.
const PAUSE: Duration = Duration::from_secs(1);
/// Until a connection stands, or a message is taken by the network.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a message may lie here while nothing is heard: one thread reads and writes.
const TURN: Duration = Duration::from_millis(100);
/// The orchestrator answers whatever is said: a line on which nothing came back for this long is dead.
const SILENCE: Duration = Duration::from_secs(20);
/// Messages that wait for their turn.
const QUEUE: usize = 32;

/// Whom to call, and what to say first.
#[derive(Clone, Debug)]
pub(crate) struct Calling {
    /// Where the orchestrator waits.
    pub(crate) line: agent::Line,
    /// Who calls.
    pub(crate) call: Call,
}

/// The line.
pub(crate) struct Line(SyncSender<FromAgent>);

impl Line {
    /// Opens it, and keeps it open, in a thread of its own.
    pub(crate) fn open(calling: Calling, events: Sender<Event>) -> Self {
        let (messages, outgoing) = sync_channel(QUEUE);
        thread::spawn(move || keep_open(&calling, &outgoing, &events));
        Self(messages)
    }

    /// Says it, or drops it if too much waits already. Never blocks.
    pub(crate) fn send(&self, message: FromAgent) {
        if self.0.try_send(message).is_err() {
            tracing::debug!("dropped a message: the line is busy");
        }
    }
}

fn keep_open(calling: &Calling, outgoing: &Receiver<FromAgent>, events: &Sender<Event>) {
    let mut complained = false;
    let agent::Line {
        address, others, ..
    } = &calling.line;
    for address in std::iter::once(address).chain(others).cycle() {
        match connect(calling, address) {
            Ok(stream) => {
                complained = false;
                // What was meant for an earlier connection is said again on this one.
                while outgoing.try_recv().is_ok() {}
                if events.send(Event::HostConnected).is_err() {
                    return;
                }
                let ended = converse(stream, outgoing, events);
                tracing::info!(?ended, "the line to the orchestrator ended");
                if events.send(Event::HostGone).is_err() {
                    return;
                }
            }
            Err(error) if !complained => {
                complained = true;
                tracing::warn!(
                    address,
                    error = format!("{error:#}"),
                    "the orchestrator cannot be called; trying on"
                );
            }
            Err(_) => {}
        }
        thread::sleep(PAUSE);
    }
}

type Stream = StreamOwned<ClientConnection, TcpStream>;

/// Connects and says who calls.
fn connect(calling: &Calling, address: &str) -> anyhow::Result<Stream> {
    let certificate_sha256 = &calling.line.certificate_sha256;
    let mut refused = io::Error::other("the name has no address");
    let socket = address
        .to_socket_addrs()?
        .find_map(|place| {
            TcpStream::connect_timeout(&place, PATIENCE)
                .map_err(|error| refused = error)
                .ok()
        })
        .ok_or(refused)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned::new(certificate_sha256, provider)))
        .with_no_client_auth();
    let connection = ClientConnection::new(Arc::new(config), "mayfly".try_into()?)?;
    let mut stream = StreamOwned::new(connection, socket);
    let mut line = serde_json::to_vec(&calling.call)?;
    line.push(b'\n');
    // The first write shakes hands.
    stream.write_all(&line).context("shaking hands")?;
    stream.flush()?;
    ensure!(!stream.conn.is_handshaking(), "the handshake did not end");
    stream.sock.set_read_timeout(Some(TURN))?;
    Ok(stream)
}

/// Until the line breaks, or the agent ends.
fn converse(
    mut stream: Stream,
    outgoing: &Receiver<FromAgent>,
    events: &Sender<Event>,
) -> io::Result<()> {
    let mut lines = Lines::default();
    let mut buffer = [0; 4096];
    let mut unanswered: Option<Instant> = None;
    loop {
        loop {
            match outgoing.try_recv() {
                Ok(message) => {
                    let mut line = serde_json::to_vec(&message)?;
                    line.push(b'\n');
                    stream.write_all(&line)?;
                    unanswered.get_or_insert_with(Instant::now);
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Ok(()),
            }
        }
        stream.flush()?;
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => {
                unanswered = None;
                for message in lines.feed(&buffer[..read]) {
                    if events.send(Event::Heard(message)).is_err() {
                        return Ok(());
                    }
                }
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::TimedOut
                        | io::ErrorKind::Interrupted
                ) =>
            {
                if unanswered.is_some_and(|since| since.elapsed() >= SILENCE) {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "nobody answers"));
                }
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use data_encoding::HEXLOWER;
    use mayfly_api::agent::ToAgent;
    use mayfly_api::{DesktopName, SessionId};
    use rcgen::{CertificateParams, KeyPair};
    use rustls::{ServerConfig, ServerConnection};
    use sha2::{Digest as _, Sha256};
    use std::io::{BufRead as _, BufReader};
    use std::net::TcpListener;
    use std::sync::mpsc::channel;

    /// An orchestrator's end of the line, and its fingerprint.
    fn orchestrator() -> (TcpListener, Arc<ServerConfig>, String) {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::default().self_signed(&key).unwrap();
        let fingerprint = HEXLOWER.encode(&Sha256::digest(certificate.der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                key.serialize_der().try_into().unwrap(),
            )
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        (listener, Arc::new(config), fingerprint)
    }

    fn calling(listener: &TcpListener, fingerprint: &str) -> Calling {
        Calling {
            line: agent::Line {
                address: listener.local_addr().unwrap().to_string(),
                others: Vec::new(),
                certificate_sha256: fingerprint.to_owned(),
            },
            call: Call {
                session: SessionId::new(),
                token: "a token".into(),
                desktop: DesktopName::from_number(7).unwrap(),
            },
        }
    }

    fn accept(
        listener: &TcpListener,
        config: &Arc<ServerConfig>,
    ) -> BufReader<StreamOwned<ServerConnection, TcpStream>> {
        let (socket, _) = listener.accept().unwrap();
        let connection = ServerConnection::new(Arc::clone(config)).unwrap();
        BufReader::new(StreamOwned::new(connection, socket))
    }

    #[test]
    fn the_agent_says_who_it_is_then_both_talk_and_a_broken_line_is_opened_again() {
        let (listener, config, fingerprint) = orchestrator();
        let (events, inbox) = channel();
        let line = Line::open(calling(&listener, &fingerprint), events);
        for _ in 0..2 {
            let mut theirs = accept(&listener, &config);
            let mut said = String::new();
            theirs.read_line(&mut said).unwrap();
            let call: Call = serde_json::from_str(&said).unwrap();
            assert_eq!(call.desktop.to_string(), "desktop-0000007");
            assert!(matches!(inbox.recv().unwrap(), Event::HostConnected));
            line.send(FromAgent::Evidence {
                connections: 3,
                idle_ms: None,
            });
            said.clear();
            theirs.read_line(&mut said).unwrap();
            assert!(said.contains("\"connections\":3"), "{said}");
            theirs.get_mut().write_all(b"{\"type\":\"ack\"}\n").unwrap();
            theirs.get_mut().flush().unwrap();
            assert!(matches!(inbox.recv().unwrap(), Event::Heard(ToAgent::Ack)));
            drop(theirs);
            assert!(matches!(inbox.recv().unwrap(), Event::HostGone));
        }
    }

    #[test]
    fn who_does_not_work_for_the_session_closes_and_the_next_is_called() {
        let (listener, config, fingerprint) = orchestrator();
        let gone = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut calling = calling(&gone, &fingerprint);
        drop(gone);
        let (closes, others) = (
            TcpListener::bind("127.0.0.1:0").unwrap(),
            &mut calling.line.others,
        );
        others.extend([&closes, &listener].map(|l| l.local_addr().unwrap().to_string()));
        let (events, inbox) = channel();
        let line = Line::open(calling, events);
        let mut theirs = accept(&closes, &config);
        theirs.read_line(&mut String::new()).unwrap();
        drop(theirs);
        let mut theirs = accept(&listener, &config);
        theirs.read_line(&mut String::new()).unwrap();
        for _ in 0..2 {
            while !matches!(inbox.recv().unwrap(), Event::HostConnected) {}
        }
        line.send(FromAgent::Left);
        let mut said = String::new();
        theirs.read_line(&mut said).unwrap();
        assert!(said.contains("left"), "{said}");
    }

    #[test]
    fn another_orchestrator_is_told_nothing() {
        let (listener, config, _) = orchestrator();
        let calling = calling(&listener, &"00".repeat(32));
        let theirs = thread::spawn(move || {
            let mut theirs = accept(&listener, &config);
            let mut said = String::new();
            (theirs.read_line(&mut said).is_err(), said)
        });
        let error = format!(
            "{:#}",
            connect(&calling, &calling.line.address).unwrap_err()
        );
        assert!(error.contains("certificate"), "{error}");
        let (refused, said) = theirs.join().unwrap();
        assert!(refused && said.is_empty(), "{said}");
    }
}
