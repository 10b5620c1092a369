//! What desktops that failed left to read ([`crate::last_words`]), as it is kept.
//!
//! # Guarantees
//! * What was kept of a desktop first stays; it is forgotten with its session.
//! * Of a session, no more than [`LONGEST`](crate::last_words::LONGEST) bytes are kept: those of its latest desktops; and of all,
//!   the latest [`DESKTOPS`].

use super::StoreError;
use async_trait::async_trait;
use jiff::Timestamp;
use mayfly_api::{DesktopName, SessionId};
use std::fmt;
use std::str::FromStr;

/// Words of so many desktops are kept: a site where everything fails must not fill its disk.
pub const DESKTOPS: usize = 200;

/// What one desktop left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Its session.
    pub session: SessionId,
    /// The desktop.
    pub desktop: DesktopName,
    /// When it was collected.
    pub at: Timestamp,
    /// All of it: of at most [`LONGEST`](crate::last_words::LONGEST) bytes, without secrets.
    pub text: String,
}

/// Whose words are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// Those of all desktops of a session.
    Session(SessionId),
    /// Those of one desktop.
    Desktop(DesktopName),
}

impl FromStr for Whose {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let desktop = text.parse().map(Self::Desktop);
        desktop
            .or_else(|_| text.parse().map(Self::Session))
            .map_err(|_| {
                format!("{text:?} is neither the id of a session nor the name of a desktop, such as desktop-000001f")
            })
    }
}

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Session(id) => write!(f, "session {id}"),
            Self::Desktop(name) => name.fmt(f),
        }
    }
}

/// See the module.
#[async_trait]
pub trait Words: Send + Sync + 'static {
    /// Keeps what a desktop left.
    async fn keep(&self, words: &Kept) -> Result<(), StoreError>;

    /// What is kept, the earliest desktop's first.
    async fn kept(&self, whose: Whose) -> Result<Vec<Kept>, StoreError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_words_is_said_by_a_name_or_an_id() {
        let id = SessionId::new();
        assert_eq!(id.to_string().parse(), Ok(Whose::Session(id)));
        let desktop = DesktopName::from_number(31).unwrap();
        assert_eq!("desktop-000001f".parse(), Ok(Whose::Desktop(desktop)));
        assert!("desktop-1".parse::<Whose>().is_err());
    }
}
