//! A session as the API shows it.

use crate::{DesktopName, SessionId};
use jiff::Timestamp;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Where a session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum SessionPhase {
    /// Accepted, waiting for a place.
    Queued,
    /// Its desktop is being made.
    Preparing,
    /// The desktop answers over RDP with the announced certificate; nobody has connected yet.
    Ready,
    /// An RDP connection is open.
    Connected,
    /// An RDP connection was open and is not any more.
    Disconnected,
    /// The desktop is being destroyed.
    Ending,
    /// The desktop is gone: checked, not assumed.
    Ended,
    /// The desktop could not be made; what was made of it is gone.
    Failed,
}

impl SessionPhase {
    /// Nothing will change any more.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Ended | Self::Failed)
    }

    /// A person can connect now.
    #[must_use]
    pub fn is_usable(self) -> bool {
        matches!(self, Self::Ready | Self::Connected | Self::Disconnected)
    }
}

/// Body of `POST /api/v1/sessions`. Everything has a default: `{}` is a valid request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct CreateSession {
    /// Login name inside the desktop: `^[a-z_][a-z0-9_-]{0,31}$`, not a system account. Default `user`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Catalogue entry. Default: the orchestrator's first template.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// The person's language as a BCP 47 tag, such as `fr-CA`. Default: the image's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub language: Option<String>,
    /// The person's IANA time zone, such as `Europe/Paris`. Default: the image's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
    /// The person's XKB layout, such as `fr` or `ca`. Default: what their RDP client announces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keyboard: Option<String>,
}

/// Answer to `POST /api/v1/sessions`: 202, after the session was durably accepted.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Created {
    /// The session.
    pub session: Session,
    /// What every later call on this session needs, as `Authorization: Bearer …`. Shown only here
    /// (and again to the same `Idempotency-Key`).
    #[serde(serialize_with = "expose")]
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub secret: SecretString,
}

/// Answer to `GET /api/v1/sessions/{id}/credentials`: what logs in to the desktop.
/// Useless once the session has ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Credentials {
    /// Login name inside the desktop.
    pub user: String,
    /// A password for this session alone. Empty where the person has one of their own: in a domain.
    #[serde(serialize_with = "expose")]
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub password: SecretString,
}

/// Writes a secret where the wire needs it in clear. Every use is a deliberate one.
pub(crate) fn expose<S: serde::Serializer>(
    secret: &SecretString,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(secrecy::ExposeSecret::expose_secret(secret))
}

/// A step on the way, in order. Words for people are in the launcher's catalogue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum StageName {
    /// Waiting for a place.
    Queued,
    /// Disk, network and machine are being made.
    Creating,
    /// The machine starts, until its guest agent answers.
    Booting,
    /// The desktop takes its identity: names, keys, certificate, user.
    Configuring,
    /// Until an X.224 negotiation and TLS handshake shows the announced certificate.
    Connecting,
    /// Until machine, disk and files are checked gone.
    Destroying,
}

impl StageName {
    /// The stages of making a desktop, in order.
    pub const CREATE: [Self; 5] = [
        Self::Queued,
        Self::Creating,
        Self::Booting,
        Self::Configuring,
        Self::Connecting,
    ];
}

/// Why a half-made desktop was given up for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Setback {
    /// The orchestrator was stopped while it made it.
    Interrupted,
    /// Something else was in the way for a moment, such as a lock.
    InTheWay,
    /// It made no progress for too long.
    TookTooLong,
}

/// What a stage is at: codes with their data. Words for people are in the launcher's catalogue.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(tag = "code", rename_all = "snake_case")]
pub enum StageProgress {
    /// It waits again: there was no room for its desktop.
    NoRoom,
    /// Its desktop was given up, and another is made.
    MadeAnew {
        /// Why.
        because: Setback,
    },
    /// It waits until its storage takes another clone.
    WaitingForStorage {
        /// Its place among those that wait, from 1.
        place: u32,
    },
    /// The template is cloned.
    Cloning,
    /// The machine runs, and has told no address yet.
    WaitingForAddress,
    /// A plain template's first boot, which ends before the machine can be configured.
    FirstBoot,
    /// A task of the playbook that configures the machine.
    Task {
        /// How many there were, with it. How many there will be nobody knows: playbooks include others on the way.
        number: u32,
        /// Its name, in the playbook's own words.
        name: String,
    },
    /// A code of a later version: there is nothing to say.
    #[serde(other)]
    Unknown,
}

/// A stage with its times.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Stage {
    /// Which.
    pub name: StageName,
    /// When it began.
    #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
    pub started_at: Timestamp,
    /// How long it took, in milliseconds; absent while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_ms: Option<u64>,
    /// Median of the last runs of this stage, in milliseconds; absent without history.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_ms: Option<u64>,
    /// What it is at, where more than its name is known; only of the last stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<StageProgress>,
}

/// Where and how to connect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct RdpEndpoint {
    /// IP address and port of the desktop's RDP server.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub address: SocketAddr,
    /// SHA-256 of the server's certificate (DER), 64 lower-case hex digits. Pin it.
    pub certificate_sha256: String,
    /// Login name inside the desktop.
    pub user: String,
}

/// Why a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// Somebody asked for it.
    Requested,
    /// Nobody was connected any more for the idle time (60 s by default).
    Idle,
    /// Nobody ever connected.
    NeverConnected,
    /// The launcher vanished before anybody connected.
    Abandoned,
    /// The maximum lifetime was reached.
    Expired,
    /// The machine stopped by itself.
    MachineLost,
    /// It could not be made.
    Failed,
}

/// Why a desktop could not be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Failure {
    /// The step that failed.
    pub stage: StageName,
    /// What failed and what to do.
    pub problem: crate::Problem,
}

/// One person's use of one desktop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Session {
    /// Its id.
    pub id: SessionId,
    /// Where it stands.
    pub phase: SessionPhase,
    /// The catalogue entry it was made from.
    pub template: String,
    /// Login name inside the desktop.
    pub user: String,
    /// Its desktop, as soon as one was chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desktop: Option<DesktopName>,
    /// Where to connect; present while the phase is usable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rdp: Option<RdpEndpoint>,
    /// When it was accepted.
    #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
    pub created_at: Timestamp,
    /// The last sign of a person: a call of their launcher, an RDP connection, input.
    #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
    pub last_activity: Timestamp,
    /// Not later than this it ends: the maximum lifetime.
    #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
    pub expires_at: Timestamp,
    /// When it will end unless somebody connects or keeps it; absent while nothing ends it earlier than `expires_at`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, format = DateTime))]
    pub ends_at: Option<Timestamp>,
    /// The stages so far, in order.
    pub stages: Vec<Stage>,
    /// Median time from request to ready, in milliseconds; absent without history.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_ready_ms: Option<u64>,
    /// Place in the queue, from 1; only while queued.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_position: Option<u32>,
    /// Why it could not be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// Why it ended or is ending.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_reason: Option<EndReason>,
}

/// One event of `GET /api/v1/sessions/{id}/events`: the whole session after a change.
///
/// The SSE `id:` is `seq`, the SSE `event:` is `session`. The first event of every stream is a snapshot,
/// so a client that missed some loses nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SessionEvent {
    /// Grows by one with every change of this session.
    pub seq: u64,
    /// When the change was committed.
    #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
    pub at: Timestamp,
    /// The session after it.
    pub session: Session,
}

/// What the launcher knows of the person's RDP client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum RdpClientState {
    /// Not started yet.
    NotStarted,
    /// Its process runs.
    Running,
    /// It ended.
    Closed,
}

/// Body of `POST /api/v1/sessions/{id}/heartbeat`: the launcher is there.
/// Expected every 15 s; a session without RDP connection that misses it for 90 s is abandoned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Heartbeat {
    /// What the launcher knows of the RDP client.
    pub client: RdpClientState,
}

/// Body of `POST /api/v1/sessions/{id}/keep`: hold the desktop without an RDP connection.
/// Renew it to hold on; the template caps the sum. `0` gives it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Keep {
    /// From now, in seconds; at most 3600 a call.
    pub seconds: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn stage(progress: &serde_json::Value) -> Stage {
        let stage =
            json!({"name": "creating", "started_at": "2026-01-01T00:00:00Z", "progress": progress});
        serde_json::from_value(stage).unwrap()
    }

    #[test]
    fn progress_is_a_code_with_its_data() {
        let task = StageProgress::Task {
            number: 4,
            name: "Install packages".to_owned(),
        };
        for (progress, wire) in [
            (StageProgress::Cloning, json!({"code": "cloning"})),
            (
                StageProgress::MadeAnew {
                    because: Setback::InTheWay,
                },
                json!({"code": "made_anew", "because": "in_the_way"}),
            ),
            (
                task,
                json!({"code": "task", "number": 4, "name": "Install packages"}),
            ),
        ] {
            assert_eq!(serde_json::to_value(&progress).unwrap(), wire);
            assert_eq!(stage(&wire).progress, Some(progress));
        }
    }

    #[test]
    fn a_code_of_a_later_version_costs_nobody_the_session() {
        let later = stage(&json!({"code": "levitating", "height": 3}));
        assert_eq!(later.progress, Some(StageProgress::Unknown));
        assert_eq!(stage(&json!(null)).progress, None);
    }
}
