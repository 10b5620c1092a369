//! Does an RDP server answer, and with the announced certificate? An open port proves neither.
//!
//! X.224 connection request with `RDP_NEG_REQ` (MS-RDPBCGR 2.2.1.1), its confirm (2.2.1.2), a TLS handshake, and the
//! SHA-256 of the leaf. Each probe makes xrdp fork a process, so callers pause between probes.

use data_encoding::HEXLOWER;
use mayfly_api::pinned::Pinned;
use rustls::ClientConfig;
use rustls::crypto::ring;
use rustls::pki_types::ServerName;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// TPKT header, X.224 connection request, `RDP_NEG_REQ` for TLS or `CredSSP`.
const REQUEST: [u8; 19] = [
    3, 0, 0, 19, // TPKT: version, reserved, length
    14, 0xe0, 0, 0, 0, 0, 0, // X.224: length, CR, destination, source, class
    1, 0, 8, 0, 3, 0, 0,
    0, // RDP_NEG_REQ: type, flags, length, PROTOCOL_SSL | PROTOCOL_HYBRID
];
const CONFIRM: u8 = 0xd0;
const NEGOTIATION_RESPONSE: u8 = 2;

/// Why a probe did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// It does not answer, or not yet.
    #[error("{0} does not answer as an RDP server: {1}")]
    NoAnswer(SocketAddr, String),
    /// It is not the server that was announced.
    #[error("{address} shows a certificate with SHA-256 {seen}, announced was {announced}")]
    WrongCertificate {
        /// The server.
        address: SocketAddr,
        /// What it shows.
        seen: String,
        /// What it should show.
        announced: String,
    },
}

/// Probes once, within `limit`.
///
/// # Errors
/// See [`ProbeError`].
pub async fn probe(
    address: SocketAddr,
    certificate_sha256: &str,
    limit: Duration,
) -> Result<(), ProbeError> {
    let silent = |what: String| ProbeError::NoAnswer(address, what);
    tokio::time::timeout(limit, handshake(address, certificate_sha256))
        .await
        .unwrap_or_else(|_| Err(silent(format!("nothing within {} s", limit.as_secs_f32()))))
}

async fn handshake(address: SocketAddr, announced: &str) -> Result<(), ProbeError> {
    let io = |e: std::io::Error| ProbeError::NoAnswer(address, e.to_string());
    let mut stream = TcpStream::connect(address).await.map_err(io)?;
    stream.write_all(&REQUEST).await.map_err(io)?;
    let mut answer = [0_u8; 19];
    stream.read_exact(&mut answer).await.map_err(io)?;
    if answer[0] != 3 || answer[5] != CONFIRM || answer[11] != NEGOTIATION_RESPONSE {
        let what = format!("it refuses TLS ({})", HEXLOWER.encode(&answer));
        return Err(ProbeError::NoAnswer(address, what));
    }
    let provider = Arc::new(ring::default_provider());
    let pinned = Arc::new(Pinned::new(announced, provider.clone()));
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| ProbeError::NoAnswer(address, e.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(pinned.clone())
        .with_no_client_auth();
    let done = tokio_rustls::TlsConnector::from(Arc::new(config))
        .connect(ServerName::from(address.ip()), stream)
        .await;
    match (done, pinned.seen()) {
        (Ok(_), _) => Ok(()),
        (Err(_), Some(seen)) if seen != announced => Err(ProbeError::WrongCertificate {
            address,
            seen,
            announced: announced.to_owned(),
        }),
        (Err(error), _) => Err(io(error)),
    }
}
