//! What outlives a crash of the launcher: which sessions it made, where. No secrets: those are in the keyring.
//!
//! One file a session, `sessions/<id>.json`, and a lock beside it that its launcher holds while it lives: the system
//! frees it on any death, so a session without a living launcher is told from another launcher's.

use crate::settings::write_atomically;
use jiff::Timestamp;
use mayfly_api::SessionId;
use serde::{Deserialize, Serialize};
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

/// A session that a launcher of this person made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The session.
    pub id: SessionId,
    /// Address of its orchestrator.
    pub orchestrator: String,
    /// When it was made.
    pub started_at: Timestamp,
}

/// Says that the session's launcher lives, for as long as it exists.
#[derive(Debug)]
pub struct Claim {
    _lock: File,
}

/// The records in a data folder.
#[derive(Clone, Debug)]
pub struct Records {
    folder: PathBuf,
}

impl Records {
    /// Those in `data_dir`.
    #[must_use]
    pub fn new(data_dir: &Path) -> Self {
        Self {
            folder: data_dir.join("sessions"),
        }
    }

    fn file(&self, id: SessionId, extension: &str) -> PathBuf {
        self.folder.join(format!("{id}.{extension}"))
    }

    /// Writes a record and claims it.
    ///
    /// # Errors
    /// The file system's.
    pub fn add(&self, record: &Record) -> io::Result<Claim> {
        let json = serde_json::to_vec(record).map_err(io::Error::other)?;
        write_atomically(&self.file(record.id, "json"), &json)?;
        match self.claim(record.id)? {
            Some(claim) => Ok(claim),
            None => Err(io::Error::other("another launcher has it")),
        }
    }

    /// Claims a session, unless a living launcher has it.
    ///
    /// # Errors
    /// The file system's.
    pub fn claim(&self, id: SessionId) -> io::Result<Option<Claim>> {
        let lock = File::create(self.file(id, "lock"))?;
        match lock.try_lock() {
            Ok(()) => Ok(Some(Claim { _lock: lock })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Forgets a session. Unknown ones are fine.
    pub fn remove(&self, id: SessionId) {
        for extension in ["json", "lock"] {
            // What stays is looked at again at the next start.
            let _ = std::fs::remove_file(self.file(id, extension));
        }
    }

    /// All records, the latest first. What cannot be read is left alone.
    #[must_use]
    pub fn all(&self) -> Vec<Record> {
        let Ok(entries) = std::fs::read_dir(&self.folder) else {
            return Vec::new();
        };
        let mut records: Vec<Record> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|e| e == "json"))
            .filter_map(|path| serde_json::from_slice(&std::fs::read(path).ok()?).ok())
            .collect();
        records.sort_by_key(|record| std::cmp::Reverse(record.started_at));
        records
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_claimed_by_one_launcher_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path());
        let record = Record {
            id: SessionId::new(),
            orchestrator: "http://127.0.0.1:5000".into(),
            started_at: Timestamp::now(),
        };
        let claim = records.add(&record).unwrap();
        assert_eq!(records.all(), std::slice::from_ref(&record));
        assert!(records.claim(record.id).unwrap().is_none());
        drop(claim);
        assert!(records.claim(record.id).unwrap().is_some());
        records.remove(record.id);
        assert!(records.all().is_empty());
    }
}
