//! What is remembered of machines that Terraform makes: where each was placed, and Terraform's state of it under its lock.
//!
//! # Guarantees
//! * A machine is reserved once; state and lock of one that is not reserved do not exist and cannot be made.
//! * A state is saved only by who holds its lock. Locking and unlocking may be said twice, as by a caller that missed the answer.
//! * What an operation returned is durable.

use super::StoreError;
use async_trait::async_trait;
use mayfly_api::DesktopName;

/// A machine that may exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reserved {
    /// Its desktop.
    pub name: DesktopName,
    /// The node it was placed on. It may have been migrated since.
    pub node: String,
    /// Its memory.
    pub memory_mib: u32,
    /// The storage that its disk is cloned on.
    pub storage: String,
}

/// What became of an attempt to reserve a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserving {
    /// It is reserved, and counts as being cloned.
    Done,
    /// It was reserved before.
    Taken,
    /// So many are being cloned on its storage already.
    Waits,
}

/// What became of an attempt to lock, unlock or save.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Locking {
    /// Done.
    Done,
    /// Somebody else holds the lock, and said this of themselves (JSON).
    Held(String),
    /// There is no such machine, or nobody holds its lock.
    Nothing,
}

/// See the module.
#[async_trait]
pub trait Machines: Send + Sync + 'static {
    /// Reserves a machine, if fewer than `clones` are being cloned on its storage.
    async fn reserve(&self, machine: &Reserved, clones: u32) -> Result<Reserving, StoreError>;

    /// It is cloned: another may be.
    async fn cloned(&self, name: DesktopName) -> Result<(), StoreError>;

    /// Every machine that may exist.
    async fn reserved(&self) -> Result<Vec<Reserved>, StoreError>;

    /// Locks its state.
    async fn lock(&self, name: DesktopName, id: &str, info: &str) -> Result<Locking, StoreError>;

    /// Unlocks its state.
    async fn unlock(&self, name: DesktopName, id: &str) -> Result<Locking, StoreError>;

    /// Saves its state under the lock with that id.
    async fn save(&self, name: DesktopName, id: &str, state: &[u8]) -> Result<Locking, StoreError>;

    /// Its state, if it has one.
    async fn state(&self, name: DesktopName) -> Result<Option<Vec<u8>>, StoreError>;

    /// Forgets it, with lock and state.
    async fn release(&self, name: DesktopName) -> Result<(), StoreError>;
}
