//! Names that Proxmox VE takes: parsed once, so that a call cannot be built with a wrong one.

use std::fmt;
use std::str::FromStr;

/// A name that Proxmox VE would refuse.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is no {what}: {allowed}")]
pub struct NameError {
    what: &'static str,
    value: String,
    allowed: &'static str,
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $allowed:literal, $good:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// As Proxmox VE writes it.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                let good: fn(&str) -> bool = $good;
                if good(text) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(NameError {
                        what: $what,
                        value: text.to_owned(),
                        allowed: $allowed,
                    })
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let text = String::deserialize(from)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

name!(
    /// Name of a node (format `pve-node`).
    NodeName,
    "name of a node",
    "letters, digits and, between them, hyphens",
    |text| {
        !text.is_empty()
            && !text.starts_with('-')
            && !text.ends_with('-')
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    }
);

name!(
    /// Name of a storage (format `pve-storage-id`).
    StorageName,
    "name of a storage",
    "a letter, then letters, digits, `-`, `_` or `.`; a letter or digit at the end",
    |text| {
        text.len() >= 2
            && text.starts_with(|c: char| c.is_ascii_alphabetic())
            && text.ends_with(|c: char| c.is_ascii_alphanumeric())
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    }
);

name!(
    /// Name of a pool (format `pve-poolid`).
    PoolName,
    "name of a pool",
    "letters, digits, `-`, `_` and `.`, in up to three levels with `/` between them",
    |text| {
        text.split('/').count() <= 3
            && text.split('/').all(|level| {
                !level.is_empty()
                    && level
                        .bytes()
                        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
            })
    }
);

/// Number of a guest, unique in its cluster: 100 to 999999999.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmId(u32);

impl VmId {
    /// The number.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for VmId {
    type Error = NameError;

    fn try_from(number: u32) -> Result<Self, NameError> {
        if (100..=999_999_999).contains(&number) {
            Ok(Self(number))
        } else {
            Err(NameError {
                what: "number of a guest",
                value: number.to_string(),
                allowed: "100 to 999999999",
            })
        }
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A guest where it is now. An administrator may migrate it: look in [`cluster_resources`](super::call::cluster_resources)
/// before acting on one that was found long ago.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Guest {
    /// The node it is on.
    pub node: NodeName,
    /// Its number.
    pub id: VmId,
}

impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VM {} on node {}", self.id, self.node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_proxmox_would_refuse_are_refused() {
        for bad in ["", "-a", "a-", "a_b", "a b", "a/../b"] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad:?}");
        }
        for good in ["pve1", "p", "Node-2"] {
            assert!(good.parse::<NodeName>().is_ok(), "{good:?}");
        }
        assert!("local-lvm".parse::<StorageName>().is_ok());
        assert!("1st".parse::<StorageName>().is_err());
        assert!("daas/linux".parse::<PoolName>().is_ok());
        assert!("a/b/c/d".parse::<PoolName>().is_err());
        assert!("a//b".parse::<PoolName>().is_err());
        let error = VmId::try_from(99).unwrap_err().to_string();
        assert_eq!(error, "\"99\" is no number of a guest: 100 to 999999999");
    }
}
