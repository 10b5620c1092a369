//! A desktop: one virtual machine and all that dies with it.
//!
//! # Guarantees
//! The fields that matter can only be changed by the verbs here, and each verb goes forward:
//! `planned → creating → booting → configuring → ready → claimed → destroying → gone`, any of them to `destroying`,
//! `destroying ⇄ stuck`. No verb leads out of `gone`, and a desktop that was claimed only moves towards it.
//! The schema says the same again (`migrations/`).

use crate::store::replicas::ReplicaId;
use jiff::Timestamp;
use mayfly_api::DesktopName;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Where a desktop stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DesktopPhase {
    /// Its name is committed; nothing of it exists.
    Planned,
    /// Its machine may exist in part.
    Creating,
    /// Its machine runs; its guest agent does not answer yet.
    Booting,
    /// It has its bootstrap and takes its identity.
    Configuring,
    /// It answers over RDP with the announced certificate.
    Ready,
    /// It belongs to a session for good.
    Claimed,
    /// It is being removed.
    Destroying,
    /// It could not be removed; an operator must look. Tried again from time to time.
    Stuck,
    /// Nothing of it is left: checked.
    Gone,
}

/// A verb came in a phase in which it means nothing; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not in this phase")]
pub struct NotNow;

/// One desktop. See the module for what its verbs guarantee.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Desktop {
    name: DesktopName,
    phase: DesktopPhase,
    created_at: Timestamp,
    claimed_at: Option<Timestamp>,
    destroying_at: Option<Timestamp>,
    address: Option<SocketAddr>,
    certificate_sha256: Option<String>,
    stuck_reason: Option<String>,
    host: Option<ReplicaId>,
}

/// A desktop as the store keeps it.
#[derive(Clone, Debug)]
pub struct StoredDesktop {
    /// See [`Desktop::name`].
    pub name: DesktopName,
    /// See [`Desktop::phase`].
    pub phase: DesktopPhase,
    /// See [`Desktop::created_at`].
    pub created_at: Timestamp,
    /// See [`Desktop::claimed_at`].
    pub claimed_at: Option<Timestamp>,
    /// See [`Desktop::destroying_at`].
    pub destroying_at: Option<Timestamp>,
    /// See [`Desktop::announced`].
    pub address: Option<SocketAddr>,
    /// See [`Desktop::announced`].
    pub certificate_sha256: Option<String>,
    /// See [`Desktop::stuck_reason`].
    pub stuck_reason: Option<String>,
    /// See [`Desktop::host`].
    pub host: Option<ReplicaId>,
}

impl Desktop {
    /// A desktop of which only the name exists.
    #[must_use]
    pub fn planned(name: DesktopName, host: Option<ReplicaId>, now: Timestamp) -> Self {
        Self {
            name,
            phase: DesktopPhase::Planned,
            created_at: now,
            claimed_at: None,
            destroying_at: None,
            address: None,
            certificate_sha256: None,
            stuck_reason: None,
            host,
        }
    }

    /// A desktop read from the store, which holds only what a desktop once was.
    #[must_use]
    pub fn restore(stored: StoredDesktop) -> Self {
        let StoredDesktop {
            name,
            phase,
            created_at,
            claimed_at,
            destroying_at,
            address,
            certificate_sha256,
            stuck_reason,
            host,
        } = stored;
        Self {
            name,
            phase,
            created_at,
            claimed_at,
            destroying_at,
            address,
            certificate_sha256,
            stuck_reason,
            host,
        }
    }

    /// The orchestrator that planned it, on whose machine it is if its provider makes desktops there.
    #[must_use]
    pub fn host(&self) -> Option<&ReplicaId> {
        self.host.as_ref()
    }

    /// Its name, never used for another.
    #[must_use]
    pub fn name(&self) -> DesktopName {
        self.name
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> DesktopPhase {
        self.phase
    }

    /// When it was planned.
    #[must_use]
    pub fn created_at(&self) -> Timestamp {
        self.created_at
    }

    /// When a session got it. Once set, never changed.
    #[must_use]
    pub fn claimed_at(&self) -> Option<Timestamp> {
        self.claimed_at
    }

    /// When its removal began.
    #[must_use]
    pub fn destroying_at(&self) -> Option<Timestamp> {
        self.destroying_at
    }

    /// Where its RDP server answers and the SHA-256 of the certificate it must show, once its agent said so.
    #[must_use]
    pub fn announced(&self) -> Option<(SocketAddr, &str)> {
        Some((self.address?, self.certificate_sha256.as_deref()?))
    }

    /// Why it could not be removed.
    #[must_use]
    pub fn stuck_reason(&self) -> Option<&str> {
        self.stuck_reason.as_deref()
    }

    /// Something of it may exist.
    #[must_use]
    pub fn may_exist(&self) -> bool {
        self.phase != DesktopPhase::Gone
    }

    fn step(&mut self, from: DesktopPhase, to: DesktopPhase) -> Result<(), NotNow> {
        if self.phase != from {
            return Err(NotNow);
        }
        self.phase = to;
        Ok(())
    }

    /// From now on its machine may exist.
    ///
    /// # Errors
    /// Unless it is planned.
    pub fn creating(&mut self) -> Result<(), NotNow> {
        self.step(DesktopPhase::Planned, DesktopPhase::Creating)
    }

    /// Its machine was started.
    ///
    /// # Errors
    /// Unless it is being created.
    pub fn booting(&mut self) -> Result<(), NotNow> {
        self.step(DesktopPhase::Creating, DesktopPhase::Booting)
    }

    /// It has its bootstrap.
    ///
    /// # Errors
    /// Unless it boots.
    pub fn configuring(&mut self) -> Result<(), NotNow> {
        self.step(DesktopPhase::Booting, DesktopPhase::Configuring)
    }

    /// Its agent said where and with which certificate it answers.
    ///
    /// # Errors
    /// Unless it is being configured and has not said it before.
    pub fn announce(&mut self, address: SocketAddr, certificate: String) -> Result<(), NotNow> {
        if self.phase != DesktopPhase::Configuring || self.announced().is_some() {
            return Err(NotNow);
        }
        self.address = Some(address);
        self.certificate_sha256 = Some(certificate);
        Ok(())
    }

    /// It was seen to answer with that certificate.
    ///
    /// # Errors
    /// Unless it is being configured and has announced one.
    pub fn ready(&mut self) -> Result<(), NotNow> {
        self.announced().ok_or(NotNow)?;
        self.step(DesktopPhase::Configuring, DesktopPhase::Ready)
    }

    /// A session gets it, for good.
    ///
    /// # Errors
    /// Unless it is ready; so it is claimed at most once.
    pub fn claim(&mut self, now: Timestamp) -> Result<(), NotNow> {
        self.step(DesktopPhase::Ready, DesktopPhase::Claimed)?;
        self.claimed_at = Some(now);
        Ok(())
    }

    /// It is to be removed.
    ///
    /// # Errors
    /// If that was decided before.
    pub fn destroy(&mut self, now: Timestamp) -> Result<(), NotNow> {
        if self.phase >= DesktopPhase::Destroying {
            return Err(NotNow);
        }
        self.phase = DesktopPhase::Destroying;
        self.destroying_at = Some(now);
        Ok(())
    }

    /// It could not be removed, again and again.
    ///
    /// # Errors
    /// Unless it is being removed.
    pub fn stuck(&mut self, reason: String) -> Result<(), NotNow> {
        self.step(DesktopPhase::Destroying, DesktopPhase::Stuck)?;
        self.stuck_reason = Some(reason);
        Ok(())
    }

    /// Its removal is tried again.
    ///
    /// # Errors
    /// Unless it is stuck.
    pub fn retry(&mut self) -> Result<(), NotNow> {
        self.step(DesktopPhase::Stuck, DesktopPhase::Destroying)?;
        self.stuck_reason = None;
        Ok(())
    }

    /// It was checked that nothing of it is left.
    ///
    /// # Errors
    /// Unless it was being removed.
    pub fn gone(&mut self) -> Result<(), NotNow> {
        match self.phase {
            DesktopPhase::Destroying | DesktopPhase::Stuck => {
                self.phase = DesktopPhase::Gone;
                Ok(())
            }
            _ => Err(NotNow),
        }
    }
}
