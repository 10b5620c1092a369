//! One key on disk, every other secret derived from it: nothing secret is stored, and a restart can answer again.
//!
//! A secret is `HMAC-SHA256(key, label ‖ 0 ‖ id)`, of a session or of a desktop. Labels keep the uses apart; without the key none of them
//! tells anything about another.

use anyhow::{Context, ensure};
use data_encoding::BASE32_NOPAD;
use data_encoding::{BASE64URL_NOPAD, HEXLOWER};
use hmac::{Hmac, KeyInit, Mac};
use mayfly_api::{DesktopName, SessionId};
use secrecy::{ExposeSecret, SecretBox, SecretString};
use sha2::Sha256;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

const KEY_BYTES: usize = 32;

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Reading or writing failed.
    #[error("the key file {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The file is not a key.
    #[error(
        "the key file {0} does not hold {KEY_BYTES} bytes; restore it from a backup, or remove it when no session is alive"
    )]
    NotAKey(PathBuf),
    /// Others may read it.
    #[error("the key file {0} can be read by others; run: chmod 600 {0}")]
    Open(PathBuf),
    /// The system gives no random numbers.
    #[error("no random numbers from the system: {0}")]
    Random(getrandom::Error),
}

/// The key that every secret comes from.
pub struct Secrets(SecretBox<[u8; KEY_BYTES]>);

impl Secrets {
    /// Reads the key file, or makes it (mode 0600, whole or not at all).
    ///
    /// # Errors
    /// See [`KeyError`].
    pub fn open(path: &Path) -> Result<Self, KeyError> {
        let io = |source| KeyError::Io {
            path: path.to_owned(),
            source,
        };
        if !path.try_exists().map_err(io)? {
            let mut key = [0_u8; KEY_BYTES];
            getrandom::fill(&mut key).map_err(KeyError::Random)?;
            let part = path.with_extension("part");
            match std::fs::remove_file(&part) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(e)),
                _ => {}
            }
            let mut file = std::fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&part)
                .map_err(io)?;
            file.write_all(&key).map_err(io)?;
            file.sync_all().map_err(io)?;
            std::fs::rename(&part, path).map_err(io)?;
        }
        if std::fs::metadata(path).map_err(io)?.permissions().mode() & 0o077 != 0 {
            return Err(KeyError::Open(path.to_owned()));
        }
        let bytes = std::fs::read(path).map_err(io)?;
        let key: [u8; KEY_BYTES] = bytes
            .try_into()
            .map_err(|_| KeyError::NotAKey(path.to_owned()))?;
        Ok(Self(SecretBox::new(Box::new(key))))
    }

    fn derive(&self, label: &str, of: &[u8]) -> [u8; 32] {
        // A key of any length is valid for HMAC (RFC 2104).
        let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(self.0.expose_secret().as_slice())
            .expect("HMAC takes a key of any length");
        mac.update(label.as_bytes());
        mac.update(&[0]);
        mac.update(of);
        mac.finalize().into_bytes().into()
    }

    /// All secrets of a session and of a desktop of it.
    #[must_use]
    pub fn of(&self, session: SessionId, desktop: DesktopName) -> [SecretString; 5] {
        [
            self.session_secret(session),
            self.agent_token(session),
            self.password(session),
            self.join_password(desktop),
            self.terraform_password(desktop),
        ]
    }

    /// What calls on this session carry as `Authorization: Bearer …`.
    #[must_use]
    pub fn session_secret(&self, session: SessionId) -> SecretString {
        BASE64URL_NOPAD
            .encode(&self.derive("session secret", session.0.as_bytes()))
            .into()
    }

    /// What the desktop's agent proves itself with.
    #[must_use]
    pub fn agent_token(&self, session: SessionId) -> SecretString {
        BASE64URL_NOPAD
            .encode(&self.derive("agent token", session.0.as_bytes()))
            .into()
    }

    /// The person's password in their desktop: 128 bits in letters and digits that no keyboard layout or shell mangles.
    #[must_use]
    pub fn password(&self, session: SessionId) -> SecretString {
        BASE32_NOPAD
            .encode(&self.derive("desktop password", session.0.as_bytes())[..16])
            .to_lowercase()
            .into()
    }

    /// What a Terraform run shows to load and save the state of its machine.
    #[must_use]
    pub fn terraform_password(&self, name: DesktopName) -> SecretString {
        BASE64URL_NOPAD
            .encode(&self.derive("terraform state", &name.number().to_be_bytes()))
            .into()
    }

    /// What marks machines and accounts as this installation's: 8 hexadecimal digits, and no secret.
    #[must_use]
    pub fn installation(&self) -> String {
        HEXLOWER.encode(&self.derive("installation", &[])[..4])
    }

    /// The one-time password that a desktop's computer account is preset with: letters of three kinds and digits, as domains want.
    #[must_use]
    pub fn join_password(&self, name: DesktopName) -> SecretString {
        let bytes = self.derive("domain join", &name.number().to_be_bytes());
        format!("Aa1{}", BASE64URL_NOPAD.encode(&bytes)).into()
    }

    /// The seed (RFC 8032, 32 bytes) of the key that a desktop is configured with over SSH.
    #[must_use]
    pub fn ssh_key_seed(&self, name: DesktopName) -> SecretBox<[u8; 32]> {
        SecretBox::new(Box::new(
            self.derive("ssh key", &name.number().to_be_bytes()),
        ))
    }
}

/// The secret in a file that nobody else may read, without the white space around it.
///
/// # Errors
/// If it cannot be read, is empty, or others may read it.
pub fn from_file(path: &Path) -> anyhow::Result<SecretString> {
    let shown = path.display();
    let mode = std::fs::metadata(path)
        .with_context(|| format!("{shown}"))?
        .permissions()
        .mode();
    ensure!(
        mode & 0o077 == 0,
        "{shown} can be read by others; run: chmod 600 {shown}"
    );
    let text = std::fs::read_to_string(path).with_context(|| format!("{shown}"))?;
    ensure!(!text.trim().is_empty(), "{shown} is empty");
    Ok(text.trim().into())
}

/// Compares in constant time.
#[must_use]
pub fn same(a: &SecretString, b: &str) -> bool {
    use subtle::ConstantTimeEq;
    a.expose_secret().as_bytes().ct_eq(b.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_is_private_and_gives_the_same_secrets_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret.key");
        let session = SessionId::new();
        let first = Secrets::open(&path).unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let again = Secrets::open(&path).unwrap();
        assert!(same(
            &first.session_secret(session),
            again.session_secret(session).expose_secret()
        ));
        assert!(!same(
            &first.session_secret(session),
            first.agent_token(session).expose_secret()
        ));
        assert!(!same(
            &first.password(session),
            first.password(SessionId::new()).expose_secret()
        ));
        assert_eq!(first.password(session).expose_secret().len(), 26);
    }

    #[test]
    fn a_key_that_others_can_read_or_that_was_cut_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret.key");
        std::fs::write(&path, b"short").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Secrets::open(&path), Err(KeyError::Open(_))));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(matches!(Secrets::open(&path), Err(KeyError::NotAKey(_))));
    }
}
