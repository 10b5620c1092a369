//! Whose certificate is believed: that of a Proxmox VE API, or of a domain controller.

use data_encoding::HEXLOWER_PERMISSIVE;
use mayfly_api::pinned::Pinned;
use rustls::crypto::ring;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
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

#[cfg(test)]
mod tests {
    use super::*;

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
