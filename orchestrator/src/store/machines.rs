//! What is remembered of machines that Terraform makes: where each was placed, and Terraform's state of it under its lock.
//!
//! # Guarantees
//! * A machine is reserved once; state and lock of one that is not reserved do not exist and cannot be made.
//! * A state is saved only by who holds its lock. Locking and unlocking may be said twice, as by a caller that missed the answer.
//! * What an operation returned is durable.

use super::StoreError;
use super::sqlite::{SqliteStore, desktop_name};
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

impl SqliteStore {
    /// Runs a change that only who holds the lock may make, and says why if it changed nothing.
    async fn under_lock(
        &self,
        name: DesktopName,
        change: sqlx::query::Query<'_, sqlx::Sqlite, sqlx::sqlite::SqliteArguments>,
    ) -> Result<Locking, StoreError> {
        let mut tx = self.begin().await?;
        if change.execute(&mut *tx).await?.rows_affected() > 0 {
            tx.commit().await?;
            return Ok(Locking::Done);
        }
        let held: Option<Option<String>> =
            sqlx::query_scalar("SELECT lock FROM machine WHERE number = ?")
                .bind(name.number())
                .fetch_optional(&mut *tx)
                .await?;
        Ok(held.flatten().map_or(Locking::Nothing, Locking::Held))
    }
}

#[async_trait]
impl Machines for SqliteStore {
    async fn reserve(&self, machine: &Reserved, clones: u32) -> Result<Reserving, StoreError> {
        let mut tx = self.begin().await?;
        let cloning: u32 =
            sqlx::query_scalar("SELECT count(*) FROM machine WHERE storage = ? AND cloning = 1")
                .bind(&machine.storage)
                .fetch_one(&mut *tx)
                .await?;
        if cloning >= clones {
            return Ok(Reserving::Waits);
        }
        let done = sqlx::query(
            "INSERT INTO machine (number, node, memory_mib, storage, cloning) VALUES (?, ?, ?, ?, 1) ON CONFLICT DO NOTHING",
        )
        .bind(machine.name.number())
        .bind(&machine.node)
        .bind(machine.memory_mib)
        .bind(&machine.storage)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(if done.rows_affected() > 0 {
            Reserving::Done
        } else {
            Reserving::Taken
        })
    }

    async fn cloned(&self, name: DesktopName) -> Result<(), StoreError> {
        sqlx::query("UPDATE machine SET cloning = 0 WHERE number = ?")
            .bind(name.number())
            .execute(&self.writer)
            .await?;
        Ok(())
    }

    async fn reserved(&self) -> Result<Vec<Reserved>, StoreError> {
        let rows: Vec<(i64, String, u32, String)> =
            sqlx::query_as("SELECT number, node, memory_mib, storage FROM machine ORDER BY number")
                .fetch_all(&self.readers)
                .await?;
        rows.into_iter()
            .map(|(number, node, memory_mib, storage)| {
                Ok(Reserved {
                    name: desktop_name(number)?,
                    node,
                    memory_mib,
                    storage,
                })
            })
            .collect()
    }

    async fn lock(&self, name: DesktopName, id: &str, info: &str) -> Result<Locking, StoreError> {
        let change = sqlx::query(
            "UPDATE machine SET lock_id = ?1, lock = ?2 WHERE number = ?3 AND (lock_id IS NULL OR lock_id = ?1)",
        );
        let change = change.bind(id).bind(info).bind(name.number());
        self.under_lock(name, change).await
    }

    async fn unlock(&self, name: DesktopName, id: &str) -> Result<Locking, StoreError> {
        let change = sqlx::query(
            "UPDATE machine SET lock_id = NULL, lock = NULL WHERE number = ? AND (lock_id IS NULL OR lock_id = ?)",
        );
        self.under_lock(name, change.bind(name.number()).bind(id))
            .await
    }

    async fn save(&self, name: DesktopName, id: &str, state: &[u8]) -> Result<Locking, StoreError> {
        let change = sqlx::query("UPDATE machine SET state = ? WHERE number = ? AND lock_id = ?");
        self.under_lock(name, change.bind(state).bind(name.number()).bind(id))
            .await
    }

    async fn state(&self, name: DesktopName) -> Result<Option<Vec<u8>>, StoreError> {
        let state: Option<Option<Vec<u8>>> =
            sqlx::query_scalar("SELECT state FROM machine WHERE number = ?")
                .bind(name.number())
                .fetch_optional(&self.readers)
                .await?;
        Ok(state.flatten())
    }

    async fn release(&self, name: DesktopName) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM machine WHERE number = ?")
            .bind(name.number())
            .execute(&self.writer)
            .await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_state_is_saved_only_under_its_lock_and_ends_with_its_machine() {
        let folder = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&folder.path().join("db")).await.unwrap();
        let name = DesktopName::from_number(3).unwrap();
        let machine = Reserved {
            name,
            node: "pve1".to_owned(),
            memory_mib: 512,
            storage: "ceph".to_owned(),
        };
        let held = Locking::Held("{\"who\":\"a\"}".to_owned());

        assert_eq!(store.lock(name, "a", "{}").await.unwrap(), Locking::Nothing);
        let reserve = async |m: &Reserved| store.reserve(m, 2).await.unwrap();
        assert_eq!(reserve(&machine).await, Reserving::Done);
        assert_eq!(reserve(&machine).await, Reserving::Taken);
        assert_eq!(store.reserved().await.unwrap(), [machine]);

        let not_locked = store.save(name, "a", b"1").await.unwrap();
        assert_eq!(not_locked, Locking::Nothing);
        let locked = store.lock(name, "a", "{\"who\":\"a\"}").await.unwrap();
        assert_eq!(locked, Locking::Done);
        let again = store.lock(name, "a", "{\"who\":\"a\"}").await.unwrap();
        assert_eq!(again, Locking::Done, "its answer was lost");
        assert_eq!(store.lock(name, "b", "{}").await.unwrap(), held);
        assert_eq!(store.save(name, "b", b"2").await.unwrap(), held);
        assert_eq!(store.save(name, "a", b"1").await.unwrap(), Locking::Done);
        assert_eq!(store.unlock(name, "b").await.unwrap(), held);
        assert_eq!(store.unlock(name, "a").await.unwrap(), Locking::Done);
        assert_eq!(store.unlock(name, "a").await.unwrap(), Locking::Done);
        assert_eq!(store.save(name, "a", b"3").await.unwrap(), Locking::Nothing);
        assert_eq!(store.state(name).await.unwrap().unwrap(), b"1");

        store.release(name).await.unwrap();
        assert_eq!(store.state(name).await.unwrap(), None);
        assert_eq!(store.lock(name, "a", "{}").await.unwrap(), Locking::Nothing);
    }

    #[tokio::test]
    async fn a_storage_takes_only_so_many_clones_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&folder.path().join("db")).await.unwrap();
        let reserve = async |number, storage: &str| {
            let machine = Reserved {
                name: DesktopName::from_number(number).unwrap(),
                node: "pve1".to_owned(),
                memory_mib: 512,
                storage: storage.to_owned(),
            };
            store.reserve(&machine, 2).await.unwrap()
        };
        assert_eq!(reserve(1, "a").await, Reserving::Done);
        assert_eq!(reserve(2, "a").await, Reserving::Done);
        assert_eq!(reserve(3, "a").await, Reserving::Waits);
        assert_eq!(reserve(4, "b").await, Reserving::Done);
        // One is cloned, one is removed half-way.
        let name = |number| DesktopName::from_number(number).unwrap();
        store.cloned(name(1)).await.unwrap();
        assert_eq!(reserve(3, "a").await, Reserving::Done);
        assert_eq!(reserve(5, "a").await, Reserving::Waits);
        store.release(name(2)).await.unwrap();
        assert_eq!(reserve(5, "a").await, Reserving::Done);
    }
}
