//! What was checked to be gone of desktops ([`crate::receipt`]), as it is kept.
//!
//! # Guarantees
//! Of a desktop that was checked more than once the last check is kept; it is forgotten with its session.

use super::StoreError;
use super::words::Whose;
use async_trait::async_trait;
use mayfly_api::{Removal, SessionId};

/// See the module.
#[async_trait]
pub trait Receipts: Send + Sync + 'static {
    /// Keeps what was checked of a desktop of that session.
    async fn keep_receipt(&self, session: SessionId, removal: &Removal) -> Result<(), StoreError>;

    /// What is kept, the earliest desktop's first.
    async fn receipts(&self, whose: Whose) -> Result<Vec<(SessionId, Removal)>, StoreError>;
}
