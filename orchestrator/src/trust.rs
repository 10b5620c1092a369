//! Whose certificate is believed: that of a Proxmox VE API, or of a domain controller.

use data_encoding::HEXLOWER_PERMISSIVE;
use jiff::Timestamp;
use mayfly_api::pinned::Pinned;
use rustls::crypto::ring;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::UnixTime;
use rustls::pki_types::pem::PemObject;
use rustls::{CertificateError, ClientConfig, RootCertStore};
use std::error::Error;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

/// Why nobody can be believed: what is wrong, and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The fingerprint.
    #[error(
        "{0:?} is no SHA-256 fingerprint: 32 bytes in hexadecimal digits, with or without colons"
    )]
    Fingerprint(String),
    /// The authority's file.
    #[error("the certificate authority in {} cannot be used: {what}", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The system trusts nobody.
    #[error(
        "this system has no certificate authorities ({0}): install ca-certificates, or give the authority's file or the \
         fingerprint"
    )]
    NoRoots(String),
    /// TLS itself.
    #[error("TLS cannot be used: {0}")]
    Tls(String),
}

/// Whose certificate is believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Signed by an authority of the system: nodes with a certificate from a public or company authority.
    System,
    /// Signed by an authority in this PEM file. A cluster's own is `/etc/pve/pve-root-ca.pem` on each of its nodes.
    Authority(PathBuf),
    /// This very certificate, whatever else is in it: what `pvenode cert info` shows on the node.
    Fingerprint(Fingerprint),
}

/// SHA-256 of a certificate. Written with or without colons, in either case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fingerprint(String);

impl FromStr for Fingerprint {
    type Err = TrustError;

    fn from_str(text: &str) -> Result<Self, TrustError> {
        let wrong = || TrustError::Fingerprint(text.to_owned());
        let digits: String = text.trim().chars().filter(|c| *c != ':').collect();
        let bytes = HEXLOWER_PERMISSIVE
            .decode(digits.as_bytes())
            .map_err(|_| wrong())?;
        if bytes.len() != 32 {
            return Err(wrong());
        }
        Ok(Self(digits.to_ascii_lowercase()))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Trust {
    /// The settings of rustls, and the pin if there is one: it remembers what was shown.
    pub(crate) fn tls(&self) -> Result<(ClientConfig, Option<Arc<Pinned>>), TrustError> {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|e| TrustError::Tls(e.to_string()))?;
        if let Self::Fingerprint(Fingerprint(announced)) = self {
            let pinned = Arc::new(Pinned::new(announced, provider));
            let config = builder
                .dangerous()
                .with_custom_certificate_verifier(pinned.clone())
                .with_no_client_auth();
            return Ok((config, Some(pinned)));
        }
        let config = builder
            .with_root_certificates(self.roots()?)
            .with_no_client_auth();
        Ok((config, None))
    }

    fn roots(&self) -> Result<RootCertStore, TrustError> {
        let mut roots = RootCertStore::empty();
        match self {
            Self::Authority(path) => {
                let wrong = |what: String| TrustError::Authority {
                    path: path.clone(),
                    what,
                };
                let file = std::fs::read(path).map_err(|e| wrong(e.to_string()))?;
                for certificate in CertificateDer::pem_slice_iter(&file) {
                    let certificate = certificate.map_err(|e| wrong(e.to_string()))?;
                    roots.add(certificate).map_err(|e| wrong(e.to_string()))?;
                }
                if roots.is_empty() {
                    return Err(wrong("no certificate in it (PEM is wanted)".to_owned()));
                }
            }
            Self::System | Self::Fingerprint(_) => {
                let found = rustls_native_certs::load_native_certs();
                roots.add_parsable_certificates(found.certs);
                if roots.is_empty() {
                    let why = found.errors.first().map(ToString::to_string);
                    return Err(TrustError::NoRoots(why.unwrap_or_default()));
                }
            }
        }
        Ok(roots)
    }
}

/// Why a certificate was not believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Distrust {
    /// What is wrong with it.
    pub(crate) cause: String,
    /// What to do about that; `None`: it is signed by nobody known, or is not the one that was announced.
    pub(crate) advice: Option<&'static str>,
}

impl Distrust {
    /// Reads it from why a connection failed, if the certificate is why.
    pub(crate) fn of(error: &(dyn Error + 'static)) -> Option<Self> {
        let Some(rustls::Error::InvalidCertificate(what)) =
            causes(error).find_map(<dyn Error>::downcast_ref::<rustls::Error>)
        else {
            return None;
        };
        let day = |time: &UnixTime| {
            let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
            Timestamp::from_second(seconds).map_or_else(|_| "?".to_owned(), |t| t.to_string())
        };
        let (cause, advice) = match what {
            CertificateError::ExpiredContext { not_after, .. } => (
                format!("it ended at {}", day(not_after)),
                Some("renew it there, unless it is this machine's clock that is wrong"),
            ),
            CertificateError::NotValidYetContext { not_before, .. } => (
                format!("it begins at {}", day(not_before)),
                Some("set this machine's clock, or that of the machine that signed it"),
            ),
            CertificateError::NotValidForNameContext { .. } => (
                what.to_string(),
                Some("configure a name that is in it, or renew it with this one"),
            ),
            _ => (what.to_string(), None),
        };
        Some(Self { cause, advice })
    }
}

/// An error and all that it comes from. What an I/O error wraps is not its `source`.
pub(crate) fn causes<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| {
        let wrapped = error
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::get_ref)
            .map(|wrapped| wrapped as &(dyn Error + 'static));
        wrapped.or_else(|| error.source())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Directory, DomainConfig};
    use crate::pve::{Client, Endpoint, Limits, Token, call};
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
    use rustls::ServerConfig;
    use rustls::pki_types::PrivateKeyDer;
    use std::path::Path;
    use tokio_rustls::TlsAcceptor;

    /// The address of a server whose certificate is for `name` and valid through that year; `ca.pem` signed it.
    async fn server(folder: &Path, name: &str, year: i32) -> String {
        let mut authority = CertificateParams::new(Vec::new()).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority_key = KeyPair::generate().unwrap();
        let authority_pem = authority.self_signed(&authority_key).unwrap().pem();
        std::fs::write(folder.join("ca.pem"), authority_pem).unwrap();
        let mut shown = CertificateParams::new(vec![name.to_owned()]).unwrap();
        shown.not_before = date_time_ymd(year, 1, 1);
        shown.not_after = date_time_ymd(year + 1, 1, 1);
        let key = KeyPair::generate().unwrap();
        let signer = Issuer::new(authority, authority_key);
        let shown = shown.signed_by(&key, &signer).unwrap();
        let tls = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![shown.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = acceptor.accept(stream).await;
            }
        });
        address
    }

    #[tokio::test]
    async fn a_certificate_that_is_not_believed_is_told_with_what_to_do() {
        let now = i32::from(jiff::tz::TimeZone::UTC.to_datetime(Timestamp::now()).year());
        for (name, year, cause, advice) in [
            (
                "127.0.0.1",
                2020,
                "it ended at 2021-01-01T00:00:00Z",
                "renew it there",
            ),
            (
                "127.0.0.1",
                2120,
                "it begins at 2120-01-01T00:00:00Z",
                "set this machine's clock",
            ),
            (
                "other.example",
                now,
                "certificate not valid for name",
                "configure a name that is in it",
            ),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let server = server(folder.path(), name, year).await;
            let ca_file = folder.path().join("ca.pem");
            let site = Client::new(&Endpoint {
                address: format!("https://{server}"),
                token: Token::new("mayfly@pve!test", "secret".into()).unwrap(),
                trust: Trust::Authority(ca_file.clone()),
                limits: Limits::default(),
            });
            let site = site.unwrap().send(&call::version()).await.unwrap_err();
            let config = DomainConfig {
                servers: vec![server.clone()],
                ca_file: Some(ca_file),
                ..DomainConfig::default()
            };
            let directory = Directory::new(&config, "secret".into(), "1").unwrap();
            let domain = directory.check().await.remove(0).1.unwrap_err();
            for said in [site.to_string(), domain.to_string()] {
                let first = format!("{server} is not trusted ({cause}");
                assert!(said.contains(&first), "{said}");
                assert!(said.contains(&format!("): {advice}")), "{said}");
            }
        }
    }

    #[test]
    fn a_fingerprint_is_taken_as_proxmox_shows_it() {
        let shown = "AB:".repeat(31) + "0F";
        let plain = "ab".repeat(31) + "0f";
        assert_eq!(shown.parse::<Fingerprint>().unwrap().to_string(), plain);
        assert_eq!(
            shown.parse::<Fingerprint>().unwrap(),
            plain.parse().unwrap()
        );
        for bad in ["", "ab", &plain[1..], &"zz".repeat(32)] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_file_without_certificates_is_refused_by_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let trust = Trust::Authority(file.path().to_owned());
        let error = trust.tls().unwrap_err().to_string();
        assert!(
            error.contains(&file.path().display().to_string()),
            "{error}"
        );
        assert!(error.contains("no certificate in it"), "{error}");
    }
}
