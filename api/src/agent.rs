//! What the orchestrator and the agent inside a desktop say to each other.
//!
//! Two ways, never mixed:
//!
//! * the [`Bootstrap`] goes in through the QEMU guest agent (`guest-file-write`, Proxmox's
//!   `agent/file-write`) to [`BOOTSTRAP_FILE`], in a tmpfs folder of mode 0700 that the image made;
//! * everything after it is one JSON message a line over a channel of the desktop's own: the virtio-serial
//!   port [`VIRTIO_PORT`] with the `qemu` provider; where there is no such port, TLS to the [`Line`] that the bootstrap
//!   names, on which the agent first says its [`Call`].
//!
//! A side ignores lines that it cannot read: the other side may be newer.

use crate::{DesktopName, SessionId};
use jiff::Timestamp;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// Where the agent waits for its bootstrap, inside the desktop.
/// The writer is not atomic: the agent reads again until the JSON is whole, then removes the file.
pub const BOOTSTRAP_FILE: &str = "/run/mayfly/bootstrap/bootstrap.json";

/// Name of the virtio-serial port: `/dev/virtio-ports/…` inside the desktop.
pub const VIRTIO_PORT: &str = "org.mayfly.agent.0";

/// What a desktop needs to know about itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Bootstrap {
    /// The session it is for.
    pub session: SessionId,
    /// The desktop's host name.
    pub host_name: String,
    /// What the agent proves itself with in [`FromAgent::Ready`].
    #[serde(serialize_with = "crate::session::expose")]
    pub token: SecretString,
    /// Login name of the one person allowed in.
    pub user: String,
    /// Their password, for this session alone.
    #[serde(serialize_with = "crate::session::expose")]
    pub password: SecretString,
    /// The orchestrator's clock: the guest's may be hours off after a resume.
    pub now: Timestamp,
    /// BCP 47 tag, such as `fr-FR`; absent: the image's default.
    #[serde(default)]
    pub language: Option<String>,
    /// IANA time zone; absent: the image's default.
    #[serde(default)]
    pub time_zone: Option<String>,
    /// XKB layout; absent: what the RDP client announces.
    #[serde(default)]
    pub keyboard: Option<String>,
    /// If nobody is connected and the orchestrator stays silent this long, the agent powers the machine off.
    pub silence_limit_s: u32,
    /// The domain that the desktop joins; absent: the person's account is made in the desktop, with `password`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<Domain>,
    /// Where the agent calls; absent: it has the virtio-serial port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<Line>,
}

/// A desktop's membership in an Active Directory domain.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Domain {
    /// DNS name of the domain.
    pub name: String,
    /// Domain controllers, by name, in order of preference.
    pub servers: Vec<String>,
    /// Whom to ask for names of the domain; none: the network's own name servers.
    #[serde(default)]
    pub dns_servers: Vec<IpAddr>,
    /// What is mounted when the person logs in.
    #[serde(default)]
    pub shares: Vec<Share>,
    /// The one-time password that the computer's account was preset with. Useless after the join.
    #[serde(serialize_with = "crate::session::expose")]
    pub secret: SecretString,
}

/// A network share, mounted at login and unmounted at logout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// The file server, by name.
    pub server: String,
    /// The share; `{user}` in it is the login name.
    pub share: String,
    /// Where it is mounted: below the home, or absolute; `{user}` in it is the login name.
    pub mount: String,
    /// `krb5` (default): by the person's ticket. `ntlmssp`: by the password they logged in with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub security: Option<String>,
    /// More options of mount.cifs(8).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub options: Option<String>,
}

/// Where the orchestrator waits for agents that have no port of their own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// `host:port`, as the desktop reaches it.
    pub address: String,
    /// The same of other orchestrators, one of which may work for the session one day.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<String>,
    /// SHA-256 of the certificate that must be shown there (DER), 64 lower-case hex digits.
    pub certificate_sha256: String,
}

/// The first thing that an agent says on a [`Line`]; unanswered if it is not accepted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Call {
    /// The session in the bootstrap.
    pub session: SessionId,
    /// The token in the bootstrap.
    #[serde(serialize_with = "crate::session::expose")]
    pub token: SecretString,
    /// The desktop that calls: the host name in the bootstrap.
    pub desktop: DesktopName,
}

/// From the agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromAgent {
    /// The channel is open. Sent every 2 s until the bootstrap was read, then once more.
    Hello {
        /// The agent's version.
        version: String,
        /// `/proc/sys/kernel/random/boot_id`.
        boot_id: String,
    },
    /// The machine has its identity and its RDP server runs. Repeated until answered with [`ToAgent::Ack`].
    Ready {
        /// The session in the bootstrap.
        session: SessionId,
        /// The token in the bootstrap.
        #[serde(serialize_with = "crate::session::expose")]
        token: SecretString,
        /// SHA-256 of the RDP server's certificate (DER), 64 lower-case hex digits.
        certificate_sha256: String,
        /// The machine's public SSH host key, as in `ssh_host_ed25519_key.pub`, if it has one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ssh_host_key: Option<String>,
        /// How long each step of the personalisation took.
        #[serde(default)]
        steps_ms: Vec<(String, u64)>,
    },
    /// The machine could not take its identity.
    Failed {
        /// The step.
        step: String,
        /// What failed; holds no secret.
        message: String,
    },
    /// Evidence that a person is there. Every 2 s, and at once when `connections` changes.
    Evidence {
        /// ESTABLISHED xorgxrdp `xrdp_display_N` sockets. A bare TCP connection to port 3389 does not count.
        connections: u32,
        /// X idle time (`MIT-SCREEN-SAVER`) of the most recently used display, in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        idle_ms: Option<u64>,
    },
    /// Something that the person will miss, and an administrator can mend; the desktop goes on.
    Trouble {
        /// What; holds no secret.
        message: String,
    },
    /// Nobody is logged in any more and every network share is unmounted, or could not be: answers [`ToAgent::Leave`].
    Left,
}

/// To the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToAgent {
    /// Heard. Answers every message; its absence is the silence that [`Bootstrap::silence_limit_s`] bounds.
    Ack,
    /// Warn the person: the desktop ends soon.
    Warn {
        /// In this many seconds.
        ends_in_s: u32,
    },
    /// The end was called off; withdraw the warning.
    Unwarn,
    /// The machine is stopped in a moment: end the person's session and unmount what they have mounted, so that nothing they
    /// saved is lost.
    Leave,
}
