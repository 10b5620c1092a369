//! The API token that Mayfly logs in with.

use http::HeaderValue;
use secrecy::{ExposeSecret, SecretString};

use super::client::SettingsError;

/// An API token: no ticket, no CSRF token, no end of a session.
#[derive(Clone, Debug)]
pub struct Token {
    id: String,
    secret: SecretString,
}

impl Token {
    /// `id` is `user@realm!name`; `secret` is what Proxmox VE showed once when the token was made.
    ///
    /// # Errors
    /// If the id is not of that form, or the secret is empty or cannot be in a header.
    pub fn new(id: &str, secret: SecretString) -> Result<Self, SettingsError> {
        let visible = |text: &str| text.bytes().all(|b| b.is_ascii_graphic());
        let (user, name) = id.split_once('!').unwrap_or((id, ""));
        let (login, realm) = user.rsplit_once('@').unwrap_or((user, ""));
        if [login, realm, name].iter().any(|part| part.is_empty())
            || !visible(id)
            || id.contains(['=', '/', ':'])
        {
            return Err(SettingsError::TokenId(id.to_owned()));
        }
        let hidden = secret.expose_secret();
        if hidden.is_empty() || !visible(hidden) {
            return Err(SettingsError::TokenSecret(id.to_owned()));
        }
        Ok(Self {
            id: id.to_owned(),
            secret,
        })
    }

    /// `user@realm!name`.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The value of `Authorization`; marked, so that nothing shows it.
    pub(super) fn header(&self) -> Result<HeaderValue, SettingsError> {
        let text = format!("PVEAPIToken={}={}", self.id, self.secret.expose_secret());
        let mut value =
            HeaderValue::try_from(text).map_err(|_| SettingsError::TokenSecret(self.id.clone()))?;
        value.set_sensitive(true);
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_shows_its_id_and_never_its_secret() {
        let token = Token::new("mayfly@pve!orchestrator", "5a7c-secret".into()).unwrap();
        let header = token.header().unwrap();
        assert!(header.is_sensitive());
        assert_eq!(
            header.as_bytes(),
            b"PVEAPIToken=mayfly@pve!orchestrator=5a7c-secret"
        );
        assert!(!format!("{token:?} {header:?}").contains("5a7c"));
    }

    #[test]
    fn what_is_no_token_is_refused_without_its_secret_shown() {
        for id in [
            "mayfly@pve",
            "mayfly!a",
            "@pve!a",
            "a@pve!",
            "a@pve!b c",
            "a@pve!b=c",
        ] {
            assert!(Token::new(id, "x".into()).is_err(), "{id}");
        }
        let error = Token::new("a@pve!b", "sec ret".into()).unwrap_err();
        assert!(!error.to_string().contains("sec ret"), "{error}");
        assert!(Token::new("a@pve!b", "".into()).is_err());
    }
}
