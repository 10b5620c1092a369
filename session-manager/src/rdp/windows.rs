//! What only Windows has: how new processes treat the console, and the Credential Manager entry that `mstsc` reads.

use super::microsoft::MstscPlan;
use keyring_core::{Entry, Error};
use secrecy::ExposeSecret;
use std::collections::HashMap;
use std::io;

/// Ctrl-C in the launcher's console does not reach the process.
pub(super) const CREATE_NEW_PROCESS_GROUP: u32 = 0x0000_0200;
/// A program for consoles gets none to show: the tray app has no console, and one would appear for it.
pub(super) const CREATE_NO_WINDOW: u32 = 0x0800_0000;

/// The entry that `mstsc` looks up by its target. It dies with the person's log-on at the latest.
#[derive(Debug)]
pub(super) struct Credential(Entry);

impl Credential {
    /// Names the entry; nothing is written.
    pub(super) fn of(plan: &MstscPlan) -> io::Result<Self> {
        // Sets the default store of the process.
        keyring::Entry::store_status()
            .as_ref()
            .map_err(|error| io::Error::other(error.to_string()))?;
        let modifiers = HashMap::from([
            ("target", plan.credential_target.as_str()),
            ("persistence", "Session"),
        ]);
        // With a target of its own, an entry is not found by service and user.
        Entry::new_with_modifiers("mayfly", &plan.user, &modifiers)
            .map(Self)
            .map_err(io::Error::other)
    }

    pub(super) fn write(&self, plan: &MstscPlan) -> io::Result<()> {
        self.0
            .set_password(plan.password.expose_secret())
            .map_err(io::Error::other)?;
        // With a target of its own, an entry has no user, or that of an entry before it.
        self.0
            .update_attributes(&HashMap::from([("username", plan.user.as_str())]))
            .map_err(io::Error::other)
    }

    /// Removes the entry. None is fine.
    pub(super) fn remove(&self) -> io::Result<()> {
        match self.0.delete_credential() {
            Ok(()) | Err(Error::NoEntry) => Ok(()),
            Err(error) => Err(io::Error::other(error)),
        }
    }
}
