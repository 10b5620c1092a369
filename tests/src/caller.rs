//! Somebody at the RDP port, without an RDP client: as much of the protocol as the micro guest speaks.

use anyhow::{Context, Result, bail};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use sha2::{Digest, Sha256};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// TPKT and X.224 connection request with `RDP_NEG_REQ` for TLS (MS-RDPBCGR 2.2.1.1).
const CONNECTION_REQUEST: [u8; 19] = [3, 0, 0, 19, 14, 0xe0, 0, 0, 0, 0, 0, 1, 0, 8, 0, 1, 0, 0, 0];

/// An open connection. The micro guest's agent counts it as a person until it is dropped.
#[derive(Debug)]
pub struct Caller {
    stream: TlsStream<TcpStream>,
    /// SHA-256 of the certificate that the server showed, in hex.
    pub certificate_sha256: String,
}

impl Caller {
    /// Negotiates, shakes hands, and stays.
    ///
    /// # Errors
    /// When nobody answers, or not as an RDP server with TLS does.
    pub async fn connect(address: SocketAddr) -> Result<Self> {
        let mut stream = TcpStream::connect(address)
            .await
            .with_context(|| format!("connecting to {address}"))?;
        stream.write_all(&CONNECTION_REQUEST).await?;
        let mut confirm = [0; 19];
        stream.read_exact(&mut confirm).await?;
        // RDP_NEG_RSP with PROTOCOL_SSL (2.2.1.2).
        if confirm[11] != 2 || confirm[15] != 1 {
            bail!("{address} did not choose TLS: {confirm:02x?}");
        }
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyCertificate))
            .with_no_client_auth();
        let name = ServerName::from(address.ip());
        let mut stream = TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await?;
        // A mere probe leaves after the handshake; this byte says that somebody stays.
        stream.write_all(&[3]).await?;
        let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let certificate = certificates.first().context("no certificate")?;
        let certificate_sha256 =
            data_encoding::HEXLOWER.encode(&Sha256::digest(certificate.as_ref()));
        Ok(Self {
            stream,
            certificate_sha256,
        })
    }

    /// The connection's two ends: whoever sees the same pair later sees the same TCP connection.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn ends(&self) -> Result<(SocketAddr, SocketAddr)> {
        let tcp = self.stream.get_ref().0;
        Ok((tcp.local_addr()?, tcp.peer_addr()?))
    }

    /// Fails if the other side has closed.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn still_there(&mut self) -> Result<()> {
        self.stream.write_all(&[3]).await?;
        self.stream.flush().await.context("the connection is gone")
    }
}

/// The fingerprint is compared by the test; nothing else of a self-signed certificate can be checked.
#[derive(Debug)]
struct AnyCertificate;

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = ring::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = ring::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}
