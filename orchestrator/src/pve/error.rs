//! What goes wrong with Proxmox VE, read from where it says so: the HTTP reason phrase, the `errors` of the body, the exit
//! status of a task.

use super::upid::Upid;
use std::collections::BTreeMap;
use std::time::Duration;

/// Whether a call changes anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It reads.
    Reads,
    /// It changes something.
    Changes,
}

/// What to do after an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Nothing was done, or doing it twice is as good as once. The same call may be sent again after a pause.
    Again,
    /// It may have been done. Look at what there is before anything is sent again.
    Look,
    /// Nothing was done, since the guest's number is taken: with another one.
    OtherId,
    /// The same call fails again until a person or another call changes something.
    Never,
}

/// What Proxmox VE means, as far as something can be done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Another task holds the guest's, template's or storage's lock.
    Locked,
    /// A guest with that number exists.
    IdTaken,
    /// There is no guest with that number on that node.
    NoSuchGuest,
    /// The guest's agent does not answer, or not yet.
    AgentSilent,
    /// The guest has no such file, says its agent.
    NoSuchFile,
    /// Too few nodes of the cluster see each other: nothing can be changed.
    NoQuorum,
    /// A storage is full.
    NoSpace,
    /// Anything else; read the reason.
    Other,
}

impl Cause {
    /// Reads what Proxmox VE's Perl sources say when they die. Texts, not codes: it has no others.
    #[must_use]
    pub fn of(text: &str) -> Self {
        let has = |words: &str| text.contains(words);
        // `VM quit/powerdown failed - got timeout` is no lock, `qmp command 'guest-ping' failed - got timeout` neither.
        if has("can't lock file") || has("got lock request timeout") || has("is locked (") {
            Self::Locked
        } else if has("config file already exists")
            || (has("already exists") && (text.starts_with("VM ") || text.starts_with("CT ")))
            || has("already exists on node")
        {
            Self::IdTaken
        } else if has("guest agent is not running")
            || has("No QEMU guest agent configured")
            || (has("qmp command 'guest-") && has("got timeout"))
        {
            Self::AgentSilent
        } else if text.starts_with("Agent error") && has("No such file or directory") {
            Self::NoSuchFile
        } else if has("onfiguration file '") && has("does not exist") {
            Self::NoSuchGuest
        } else if has("no quorum") {
            Self::NoQuorum
        } else if has("No space left on device")
            || has("out of space")
            || has("not enough free space")
            || has("nsufficient free space")
        {
            Self::NoSpace
        } else {
            Self::Other
        }
    }

    fn retry(self) -> Retry {
        match self {
            Self::Locked | Self::AgentSilent | Self::NoQuorum => Retry::Again,
            Self::IdTaken => Retry::OtherId,
            Self::NoSuchGuest | Self::NoSuchFile | Self::NoSpace | Self::Other => Retry::Never,
        }
    }
}

/// Why a call or a task failed: what, on what, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum PveError {
    /// No connection; nothing was sent.
    #[error(
        "{address} cannot be reached ({cause}): check the address, the network, and that pveproxy runs there"
    )]
    Unreachable {
        /// The API that was asked.
        address: String,
        /// What the network said.
        cause: String,
    },
    /// The certificate is not to be believed; nothing was sent.
    #[error("the certificate of {address} is not trusted ({cause}): {advice}")]
    Certificate {
        /// The API that was asked.
        address: String,
        /// What is wrong with it.
        cause: String,
        /// What to do.
        advice: &'static str,
    },
    /// The connection ended before the answer did.
    #[error("{call}: {address} ended the connection before it answered ({cause})")]
    BrokenOff {
        /// What was asked.
        call: String,
        /// Whether it changes anything.
        effect: Effect,
        /// The API that was asked.
        address: String,
        /// What the network said.
        cause: String,
    },
    /// No answer in time.
    #[error("{call}: {address} did not answer within {} s", limit.as_secs_f32())]
    NoAnswer {
        /// What was asked.
        call: String,
        /// Whether it changes anything.
        effect: Effect,
        /// The API that was asked.
        address: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The node that was asked cannot reach the one that is meant (595 to 599, what `AnyEvent::HTTP` says in pveproxy).
    #[error(
        "{call}: the node cannot be reached from the one that was asked ({status} {reason}): is it up?"
    )]
    NodeUnreachable {
        /// What was asked.
        call: String,
        /// Whether it changes anything.
        effect: Effect,
        /// 595: no connection. 596 to 599: later than that.
        status: u16,
        /// What the proxy said.
        reason: String,
    },
    /// The token is not known, or has ended (401).
    #[error(
        "{call}: the token {token} is not accepted ({reason}): correct its id and secret, or make one with \
         `pveum user token add`"
    )]
    Unauthorized {
        /// What was asked.
        call: String,
        /// Its id.
        token: String,
        /// What Proxmox VE said.
        reason: String,
    },
    /// The token may not do that (403).
    #[error("{call}: {reason}: {}", permission_advice(path.as_deref(), privilege.as_deref()))]
    Forbidden {
        /// What was asked.
        call: String,
        /// Where a privilege is missing, if Proxmox VE says so.
        path: Option<String>,
        /// Which; several with `|` between them if one of them is enough.
        privilege: Option<String>,
        /// What Proxmox VE said.
        reason: String,
    },
    /// Any other answer that is no success.
    #[error("{call}: {status} {reason}{}", shown(errors))]
    Refused {
        /// What was asked.
        call: String,
        /// Whether it changes anything.
        effect: Effect,
        /// HTTP status.
        status: u16,
        /// HTTP reason phrase.
        reason: String,
        /// What is wrong with which parameter.
        errors: BTreeMap<String, String>,
        /// What it means.
        cause: Cause,
    },
    /// An answer that is not what Proxmox VE's description of its API says.
    #[error("{call}: the answer is not understood ({what}): is that a Proxmox VE API?")]
    Strange {
        /// What was asked.
        call: String,
        /// Whether it changes anything.
        effect: Effect,
        /// What is wrong with it.
        what: String,
    },
    /// A task ended, and not well.
    #[error("task {upid} failed: {exit}{}", last_words(log))]
    TaskFailed {
        /// The task.
        upid: Upid,
        /// Its exit status.
        exit: String,
        /// The last lines of its log, if they could be had.
        log: Vec<String>,
        /// What it means.
        cause: Cause,
    },
    /// A task had not ended when the time was up. It goes on.
    #[error("task {upid} did not end within {} s{}", limit.as_secs_f32(), after(last.as_deref()))]
    TaskRuns {
        /// The task.
        upid: Upid,
        /// How long it was waited for.
        limit: Duration,
        /// The last thing that went wrong with asking, if anything did.
        last: Option<String>,
    },
}

impl PveError {
    /// An answer that is no success.
    pub(super) fn refused(
        call: String,
        effect: Effect,
        token: &str,
        status: u16,
        reason: String,
        errors: BTreeMap<String, String>,
    ) -> Self {
        match status {
            401 => Self::Unauthorized {
                call,
                token: token.to_owned(),
                reason,
            },
            403 => {
                let (path, privilege) = permission(&reason);
                Self::Forbidden {
                    call,
                    path,
                    privilege,
                    reason,
                }
            }
            595..=599 => Self::NodeUnreachable {
                call,
                effect,
                status,
                reason,
            },
            _ => {
                let cause = std::iter::once(&reason)
                    .chain(errors.values())
                    .map(|text| Cause::of(text))
                    .find(|cause| *cause != Cause::Other)
                    .unwrap_or(Cause::Other);
                Self::Refused {
                    call,
                    effect,
                    status,
                    reason,
                    errors,
                    cause,
                }
            }
        }
    }

    /// What to do now.
    #[must_use]
    pub fn retry(&self) -> Retry {
        let unless_changed = |effect: &Effect| match effect {
            Effect::Reads => Retry::Again,
            Effect::Changes => Retry::Look,
        };
        match self {
            Self::Unreachable { .. } | Self::NodeUnreachable { status: 595, .. } => Retry::Again,
            Self::BrokenOff { effect, .. }
            | Self::NoAnswer { effect, .. }
            | Self::NodeUnreachable { effect, .. } => unless_changed(effect),
            // What a proxy in front of the API says.
            Self::Refused {
                effect,
                status: 502..=504,
                ..
            } => unless_changed(effect),
            Self::Refused { cause, .. } => cause.retry(),
            Self::Strange {
                effect: Effect::Changes,
                ..
            }
            | Self::TaskRuns { .. } => Retry::Look,
            // A task may fail when half of its work is done.
            Self::TaskFailed { cause, .. } => match cause {
                Cause::IdTaken => Retry::OtherId,
                Cause::Locked | Cause::NoQuorum | Cause::AgentSilent => Retry::Look,
                Cause::NoSuchGuest | Cause::NoSuchFile | Cause::NoSpace | Cause::Other => {
                    Retry::Never
                }
            },
            Self::Certificate { .. }
            | Self::Unauthorized { .. }
            | Self::Forbidden { .. }
            | Self::Strange { .. } => Retry::Never,
        }
    }

    /// What Proxmox VE means, if it said why.
    #[must_use]
    pub fn cause(&self) -> Cause {
        match self {
            Self::Refused { cause, .. } | Self::TaskFailed { cause, .. } => *cause,
            _ => Cause::Other,
        }
    }
}

/// `Permission check failed (/vms/100, VM.Clone)`
fn permission(reason: &str) -> (Option<String>, Option<String>) {
    let inner = reason
        .split_once("Permission check failed (")
        .and_then(|(_, rest)| rest.split_once(')'));
    match inner.and_then(|(inner, _)| inner.split_once(", ")) {
        Some((path, privilege)) if path.starts_with('/') => {
            (Some(path.to_owned()), Some(privilege.to_owned()))
        }
        _ => (None, None),
    }
}

fn permission_advice(path: Option<&str>, privilege: Option<&str>) -> String {
    match (path, privilege) {
        (Some(path), Some(privilege)) => {
            let privilege = privilege.replace('|', " or ");
            format!("give the token and its user {privilege} on {path}")
        }
        _ => "the token or its user lacks a privilege; the preflight names which".to_owned(),
    }
}

fn shown(errors: &BTreeMap<String, String>) -> String {
    let list: Vec<String> = errors
        .iter()
        .map(|(name, what)| format!("{name}: {what}"))
        .collect();
    if list.is_empty() {
        String::new()
    } else {
        format!(" ({})", list.join("; "))
    }
}

fn last_words(log: &[String]) -> String {
    if log.is_empty() {
        String::new()
    } else {
        format!("; its log ends with: {}", log.join(" | "))
    }
}

fn after(last: Option<&str>) -> String {
    last.map(|last| format!("; asking for it failed last with: {last}"))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(effect: Effect, status: u16, reason: &str) -> PveError {
        PveError::refused(
            "POST /x".to_owned(),
            effect,
            "mayfly@pve!a",
            status,
            reason.to_owned(),
            BTreeMap::new(),
        )
    }

    #[test]
    fn what_may_be_sent_again_is_told_apart() {
        use Effect::{Changes, Reads};
        let lock = "can't lock file '/var/lock/qemu-server/lock-100.conf' - got timeout";
        let storage = "cfs-lock 'storage-nfs' error: got lock request timeout";
        let taken = "unable to create VM 101: config file already exists";
        let agent = "VM 100 qmp command 'guest-ping' failed - got timeout";
        let gone = "Configuration file 'nodes/pve1/qemu-server/100.conf' does not exist";
        let file = "Agent error: failed to open file '/x' (mode: 'r'): No such file or directory";
        for (effect, status, reason, cause, retry) in [
            (Changes, 500, lock, Cause::Locked, Retry::Again),
            (Changes, 500, storage, Cause::Locked, Retry::Again),
            (
                Changes,
                500,
                "VM is locked (clone)",
                Cause::Locked,
                Retry::Again,
            ),
            (Changes, 500, taken, Cause::IdTaken, Retry::OtherId),
            (
                Reads,
                500,
                "QEMU guest agent is not running",
                Cause::AgentSilent,
                Retry::Again,
            ),
            (Reads, 500, agent, Cause::AgentSilent, Retry::Again),
            (Reads, 500, gone, Cause::NoSuchGuest, Retry::Never),
            (Reads, 500, file, Cause::NoSuchFile, Retry::Never),
            (
                Changes,
                500,
                "cluster not ready - no quorum?",
                Cause::NoQuorum,
                Retry::Again,
            ),
            (
                Changes,
                500,
                "VM quit/powerdown failed - got timeout",
                Cause::Other,
                Retry::Never,
            ),
            (Changes, 500, "boom", Cause::Other, Retry::Never),
            (
                Changes,
                501,
                "Method 'POST /x' not implemented",
                Cause::Other,
                Retry::Never,
            ),
            (
                Changes,
                503,
                "Service Unavailable",
                Cause::Other,
                Retry::Look,
            ),
            (Reads, 502, "Bad Gateway", Cause::Other, Retry::Again),
            (Changes, 595, "No route to host", Cause::Other, Retry::Again),
            (
                Changes,
                596,
                "Connection timed out",
                Cause::Other,
                Retry::Look,
            ),
            (
                Reads,
                596,
                "Connection timed out",
                Cause::Other,
                Retry::Again,
            ),
            (
                Changes,
                401,
                "invalid token value!",
                Cause::Other,
                Retry::Never,
            ),
        ] {
            let error = refused(effect, status, reason);
            assert_eq!((error.cause(), error.retry()), (cause, retry), "{error}");
        }
    }

    #[test]
    fn a_number_that_is_taken_is_read_from_the_errors_of_the_body() {
        let errors = BTreeMap::from([("vmid".to_owned(), "VM 100 already exists".to_owned())]);
        let reason = "Parameter verification failed.".to_owned();
        let error = PveError::refused("GET /x".into(), Effect::Reads, "t", 400, reason, errors);
        assert_eq!(error.retry(), Retry::OtherId);
        assert_eq!(
            error.to_string(),
            "GET /x: 400 Parameter verification failed. (vmid: VM 100 already exists)"
        );
    }

    #[test]
    fn a_missing_privilege_is_named_with_its_path() {
        let error = refused(
            Effect::Changes,
            403,
            "Permission check failed (/vms/100, VM.Clone)",
        );
        let PveError::Forbidden {
            path, privilege, ..
        } = &error
        else {
            panic!("{error}");
        };
        assert_eq!(path.as_deref(), Some("/vms/100"));
        assert_eq!(privilege.as_deref(), Some("VM.Clone"));
        let said = error.to_string();
        assert!(
            said.ends_with("give the token and its user VM.Clone on /vms/100"),
            "{said}"
        );

        let vague = refused(Effect::Changes, 403, "Permission check failed");
        assert!(
            vague.to_string().contains("the preflight names which"),
            "{vague}"
        );
    }
}
