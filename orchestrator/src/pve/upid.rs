//! The name of a task: `UPID:node:pid:pstart:starttime:type:id:user:`.

use super::name::NodeName;
use std::fmt;
use std::str::FromStr;

/// A text that is no UPID.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no name of a task (UPID:node:pid:pstart:starttime:type:id:user:)")]
pub struct UpidError(String);

/// The name of one task, unique in its cluster. What Proxmox VE's own `PVE::Tools::upid_decode` takes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Upid {
    text: String,
    node: NodeName,
    kind: String,
}

impl Upid {
    /// As Proxmox VE writes it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The node that the task runs on: it alone can be asked about it.
    #[must_use]
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// What is done: `qmclone`, `qmstart`, `qmdestroy` and so on.
    #[must_use]
    pub fn kind(&self) -> &str {
        &self.kind
    }
}

impl FromStr for Upid {
    type Err = UpidError;

    fn from_str(text: &str) -> Result<Self, UpidError> {
        let wrong = || UpidError(text.to_owned());
        let parts: Vec<&str> = text.split(':').collect();
        let ["UPID", node, pid, pstart, starttime, kind, id, user, ""] = parts[..] else {
            return Err(wrong());
        };
        let hex = |part: &str, lengths: &[usize]| {
            lengths.contains(&part.len()) && part.bytes().all(|b| b.is_ascii_hexdigit())
        };
        let word = |part: &str| !part.contains(char::is_whitespace);
        // Nine digits of `pstart` are an uptime of more than 497 days.
        let good = hex(pid, &[8])
            && hex(pstart, &[8, 9])
            && hex(starttime, &[8])
            && !kind.is_empty()
            && !user.is_empty()
            && [kind, id, user].into_iter().all(word);
        if !good {
            return Err(wrong());
        }
        Ok(Self {
            node: node.parse().map_err(|_| wrong())?,
            kind: kind.to_owned(),
            text: text.to_owned(),
        })
    }
}

impl fmt::Display for Upid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl<'de> serde::Deserialize<'de> for Upid {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_upid_names_its_node_and_what_is_done() {
        for text in [
            "UPID:pve1:0003C9E2:0A1B2C3D:675F0A11:qmclone:9000:mayfly@pve!orchestrator:",
            // More than 497 days up; no id.
            "UPID:pve-2:0003C9E2:10A1B2C3D:675F0A11:startall::root@pam:",
        ] {
            let upid: Upid = text.parse().unwrap();
            assert_eq!(upid.to_string(), text);
        }
        let upid: Upid = "UPID:pve1:0003C9E2:0A1B2C3D:675F0A11:qmclone:9000:a@pve!b:"
            .parse()
            .unwrap();
        assert_eq!((upid.node().as_str(), upid.kind()), ("pve1", "qmclone"));
    }

    #[test]
    fn what_is_no_upid_is_refused() {
        for text in [
            "",
            "OK",
            "UPID:pve1:0003C9E2:0A1B2C3D:675F0A11:qmclone:9000:a@pve",
            "UPID:pve1:0003C9E2:0A1B2C3D:675F0A11:qmclone:9000:a@pve:more",
            "UPID:pve1:3C9E2:0A1B2C3D:675F0A11:qmclone:9000:a@pve:",
            "UPID:pve1:0003C9EG:0A1B2C3D:675F0A11:qmclone:9000:a@pve:",
            "UPID:pve1:0003C9E2:0A1B2C3D:675F0A11::9000:a@pve:",
            "UPID:pve1:0003C9E2:0A1B2C3D:675F0A11:qmclone:9000::",
            "UPID:../x:0003C9E2:0A1B2C3D:675F0A11:qmclone:9000:a@pve:",
            "UPID:pve1:0003C9E2:0A1B2C3D:675F0A11:qm clone:9000:a@pve:",
        ] {
            assert!(text.parse::<Upid>().is_err(), "{text:?}");
        }
    }
}
