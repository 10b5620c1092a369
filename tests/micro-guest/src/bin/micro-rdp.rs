//! What answers on port 3389 of the micro guest in the place of xrdp: the X.224 negotiation and the TLS handshake of RDP
//! (MS-RDPBCGR 1.3.1.1, 2.2.1.1, 2.2.1.2), and nothing of a desktop.
//!
//! While a client holds its TLS connection, it holds what xorgxrdp has for a logged-in one: an ESTABLISHED unix socket
//! `xrdp_display_N`, so that the agent's evidence is real. A client counts once it sent a byte inside TLS, or stayed for a second
//! after the handshake: a probe that looks at the certificate and goes does not count, as with xrdp.

use anyhow::{Context as _, bail};
use clap::Parser;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, Stream};
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// A client that stayed this long in silence counts.
const STAYED: Duration = Duration::from_secs(1);
/// A client that does not finish its handshake is dropped.
const HANDSHAKE: Duration = Duration::from_secs(30);
const PROTOCOL_SSL: u32 = 1;

/// Answers RDP clients up to their login, and shows the agent that they are there.
#[derive(Debug, Parser)]
struct Arguments {
    /// Address to listen on.
    #[arg(long, default_value = "0.0.0.0:3389")]
    listen: SocketAddr,
    /// The certificate (PEM) that the agent made.
    #[arg(long, default_value = "/etc/xrdp/mayfly-cert.pem")]
    cert: PathBuf,
    /// Its key (PEM).
    #[arg(long, default_value = "/etc/xrdp/mayfly-key.pem")]
    key: PathBuf,
    /// The socket that stands for xorgxrdp's.
    #[arg(long, default_value = "/run/xrdp/sockdir/xrdp_display_10")]
    display: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let certificates = CertificateDer::pem_file_iter(&arguments.cert)
        .and_then(Iterator::collect)
        .with_context(|| format!("reading {}", arguments.cert.display()))?;
    let key = PrivateKeyDer::from_pem_file(&arguments.key)
        .with_context(|| format!("reading {}", arguments.key.display()))?;
    let tls = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .context("the certificate and the key")?;
    let tls = Arc::new(tls);

    if let Some(folder) = arguments.display.parent() {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let _ = fs::remove_file(&arguments.display);
    let display = UnixListener::bind(&arguments.display)
        .with_context(|| format!("listening at {}", arguments.display.display()))?;
    let display = Arc::new(Mutex::new((arguments.display, display)));

    let listener = TcpListener::bind(arguments.listen)
        .with_context(|| format!("listening at {}", arguments.listen))?;
    for client in listener.incoming() {
        let client = client.context("accepting a client")?;
        let (tls, display) = (Arc::clone(&tls), Arc::clone(&display));
        thread::spawn(move || {
            let attach = || attach(&display);
            if let Err(error) = serve(client, tls, attach) {
                eprintln!("micro-rdp: {error:#}");
            }
        });
    }
    Ok(())
}

/// Both ends of a connection to the display's socket; it is ESTABLISHED until they are dropped.
type Attached = (UnixStream, UnixStream);

fn attach(display: &Mutex<(PathBuf, UnixListener)>) -> io::Result<Attached> {
    // One at a time, so that connection and acceptance belong together.
    let guard = display.lock().unwrap_or_else(PoisonError::into_inner);
    let (path, listener) = &*guard;
    let client = UnixStream::connect(path)?;
    let (server, _) = listener.accept()?;
    Ok((client, server))
}

/// Serves a client until it goes.
fn serve(
    mut client: TcpStream,
    tls: Arc<ServerConfig>,
    attach: impl Fn() -> io::Result<Attached>,
) -> anyhow::Result<()> {
    client.set_read_timeout(Some(HANDSHAKE))?;
    if !negotiate(&mut client)? {
        return Ok(());
    }
    let mut tls = ServerConnection::new(tls)?;
    while tls.is_handshaking() {
        tls.complete_io(&mut client).context("the TLS handshake")?;
    }

    client.set_read_timeout(Some(STAYED))?;
    let mut attached = None;
    let mut buffer = [0; 4096];
    loop {
        let gone = match Stream::new(&mut tls, &mut client).read(&mut buffer) {
            Ok(n) => n == 0,
            Err(error) => !matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
            ),
        };
        if gone {
            return Ok(());
        }
        if attached.is_none() {
            attached = Some(attach().context("the display's socket")?);
            client.set_read_timeout(None)?;
        }
    }
}

/// Answers the X.224 connection request. Says whether TLS follows: a client that does not offer it is refused, as xrdp does with
/// `security_layer=tls`.
fn negotiate(client: &mut TcpStream) -> anyhow::Result<bool> {
    let mut header = [0; 4];
    client.read_exact(&mut header)?;
    let [3, _, high, low] = header else {
        bail!("not a TPKT header: {header:x?}");
    };
    let length = usize::from(u16::from_be_bytes([high, low]));
    if !(11..=512).contains(&length) {
        bail!("not the length of an X.224 connection request: {length}");
    }
    let mut request = vec![0; length - 4];
    client.read_exact(&mut request)?;
    if request[1] & 0xf0 != 0xe0 {
        bail!("not an X.224 connection request: {:#x}", request[1]);
    }
    // RDP_NEG_REQ is the last eight bytes: type 1, flags, length 8, protocols; all little-endian.
    let protocols = match request.split_last_chunk::<8>() {
        Some((_, [1, _, 8, 0, protocols @ ..])) => u32::from_le_bytes(*protocols),
        _ => 0,
    };
    let tls = protocols & PROTOCOL_SSL != 0;
    // RDP_NEG_RSP with PROTOCOL_SSL, or RDP_NEG_FAILURE with SSL_REQUIRED_BY_SERVER: both end in 1.
    let kind = if tls { 2 } else { 3 };
    client.write_all(&[
        3, 0, 0, 19, 14, 0xd0, 0, 0, 0, 0, 0, kind, 0, 8, 0, 1, 0, 0, 0,
    ])?;
    Ok(tls)
}
