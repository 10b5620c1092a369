//! Names of things: a session's id, a desktop's name.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// One person's use of one desktop. A version 7 UUID, so ids sort by time of creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "openapi", schema(value_type = String, format = "uuid"))]
#[serde(transparent)]
pub struct SessionId(pub uuid::Uuid);

impl SessionId {
    /// A fresh id.
    #[must_use]
    pub fn new() -> Self {
        Self(uuid::Uuid::now_v7())
    }
}

impl Default for SessionId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for SessionId {
    type Err = InvalidName;
    fn from_str(s: &str) -> Result<Self, InvalidName> {
        uuid::Uuid::parse_str(s)
            .map(Self)
            .map_err(|_| InvalidName(s.to_owned()))
    }
}

/// A text that is not a valid id or name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a valid name here")]
pub struct InvalidName(pub String);

/// A desktop's name: `desktop-` and 7 lower-case hex digits, 15 characters in all.
///
/// 15 is the `NetBIOS` limit: with 8 digits, two machines that share the first seven would
/// take each other's account in Active Directory.
///
/// The 28 bits are the desktop's *number*, handed out by the store and never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "openapi", schema(value_type = String, pattern = "^desktop-[0-9a-f]{7}$"))]
pub struct DesktopName(u32);

impl DesktopName {
    /// How many names there are: 2^28.
    pub const LIMIT: u32 = 1 << 28;
    const PREFIX: &str = "desktop-";

    /// The desktop with this number; `None` from 2^28 on.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        (number < Self::LIMIT).then_some(Self(number))
    }

    /// The number in the name.
    #[must_use]
    pub fn number(self) -> u32 {
        self.0
    }
}

impl fmt::Display for DesktopName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:07x}", Self::PREFIX, self.0)
    }
}

impl FromStr for DesktopName {
    type Err = InvalidName;
    fn from_str(s: &str) -> Result<Self, InvalidName> {
        s.strip_prefix(Self::PREFIX)
            .filter(|hex| {
                hex.len() == 7 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
            })
            .and_then(|hex| u32::from_str_radix(hex, 16).ok())
            .map(Self)
            .ok_or_else(|| InvalidName(s.to_owned()))
    }
}

impl Serialize for DesktopName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DesktopName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_desktop_name_fits_netbios_and_reads_back() {
        let name = DesktopName::from_number(0xabc).unwrap();
        assert_eq!(name.to_string(), "desktop-0000abc");
        assert_eq!(name.to_string().len(), 15);
        assert_eq!("desktop-0000abc".parse(), Ok(name));
        assert_eq!(serde_json::to_string(&name).unwrap(), "\"desktop-0000abc\"");
    }

    #[test]
    fn names_of_other_machines_are_not_ours() {
        for other in [
            "desktop-0000ABC",
            "desktop-00000abc",
            "desktop-abc",
            "server-0000abc",
            "desktop-+00abc1",
        ] {
            assert!(other.parse::<DesktopName>().is_err(), "{other}");
        }
        assert_eq!(DesktopName::from_number(DesktopName::LIMIT), None);
    }
}
