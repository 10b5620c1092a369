//! Where the session's secret is kept, so that a launcher started after a crash can take its session back.
//!
//! The keyring of the person's session is asked on a thread of its own, each call with a time limit: a keyring that is
//! locked waits for a dialogue that may never be answered. After a failure the secrets stay in memory and the person
//! is told.

use secrecy::{ExposeSecret, SecretString};
use std::collections::HashMap;
use std::sync::mpsc;
use std::time::Duration;
use tokio::sync::oneshot;

/// Name under which the keyring lists our entries.
const SERVICE: &str = "mayfly";
/// Longest wait for one call.
const PATIENCE: Duration = Duration::from_secs(3);

/// A place for secrets. Calls may block: [`Secrets`] runs them on a thread of their own.
pub trait SecretStore: Send + 'static {
    /// Keeps a secret under a name.
    ///
    /// # Errors
    /// In words, if the store refuses.
    fn set(&mut self, name: &str, secret: &SecretString) -> Result<(), String>;

    /// The secret under this name, if there is one.
    ///
    /// # Errors
    /// In words, if the store refuses.
    fn get(&mut self, name: &str) -> Result<Option<SecretString>, String>;

    /// Forgets a name. Unknown names are fine.
    ///
    /// # Errors
    /// In words, if the store refuses.
    fn remove(&mut self, name: &str) -> Result<(), String>;
}

/// The operating system's keyring: Secret Service, Keychain, Credential Manager.
#[derive(Debug, Default)]
pub struct Keyring;

impl Keyring {
    fn entry(name: &str) -> Result<keyring::Entry, String> {
        // `Entry::new` says only that there is no store; the cause is here.
        keyring::Entry::store_status()
            .as_ref()
            .map_err(ToString::to_string)?;
        keyring::Entry::new(SERVICE, name).map_err(|e| e.to_string())
    }
}

impl SecretStore for Keyring {
    fn set(&mut self, name: &str, secret: &SecretString) -> Result<(), String> {
        Self::entry(name)?
            .set_password(secret.expose_secret())
            .map_err(|e| e.to_string())
    }

    fn get(&mut self, name: &str) -> Result<Option<SecretString>, String> {
        match Self::entry(name)?.get_password() {
            Ok(secret) => Ok(Some(secret.into())),
            Err(keyring::Error::NoEntry) => Ok(None),
            Err(e) => Err(e.to_string()),
        }
    }

    fn remove(&mut self, name: &str) -> Result<(), String> {
        match Self::entry(name)?.delete_credential() {
            Ok(()) | Err(keyring::Error::NoEntry) => Ok(()),
            Err(e) => Err(e.to_string()),
        }
    }
}

/// The memory of this process.
#[derive(Debug, Default)]
pub struct Memory(HashMap<String, SecretString>);

impl SecretStore for Memory {
    fn set(&mut self, name: &str, secret: &SecretString) -> Result<(), String> {
        self.0.insert(name.to_owned(), secret.clone());
        Ok(())
    }

    fn get(&mut self, name: &str) -> Result<Option<SecretString>, String> {
        Ok(self.0.get(name).cloned())
    }

    fn remove(&mut self, name: &str) -> Result<(), String> {
        self.0.remove(name);
        Ok(())
    }
}

type Job = Box<dyn FnOnce(&mut dyn SecretStore) + Send>;

/// A store on its own thread, with a time limit on every call. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Secrets {
    jobs: mpsc::Sender<Job>,
    patience: Duration,
}

impl Secrets {
    /// Takes the store to its thread, which ends with the last clone.
    #[must_use]
    pub fn new(store: Box<dyn SecretStore>) -> Self {
        Self::with_patience(store, PATIENCE)
    }

    fn with_patience(mut store: Box<dyn SecretStore>, patience: Duration) -> Self {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let thread = std::thread::Builder::new().name("secrets".to_owned());
        let spawned = thread.spawn(move || {
            for job in inbox {
                job(&mut *store);
            }
        });
        if let Err(error) = spawned {
            // Every call then fails with its time limit.
            tracing::error!(%error, "no thread for the keyring");
        }
        Self { jobs, patience }
    }

    async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut dyn SecretStore) -> Result<T, String> + Send + 'static,
    ) -> Result<T, String> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |store| {
            // Nobody waits any more: the time limit has passed.
            let _ = answer.send(job(store));
        });
        self.jobs.send(job).map_err(|e| e.to_string())?;
        match tokio::time::timeout(self.patience, answered).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err("the keyring's thread has stopped".to_owned()),
            Err(_) => Err(format!(
                "the keyring did not answer within {} s; is it locked?",
                self.patience.as_secs()
            )),
        }
    }

    /// See [`SecretStore::set`].
    ///
    /// # Errors
    /// In words, also when the time limit passed.
    pub async fn set(&self, name: String, secret: SecretString) -> Result<(), String> {
        self.run(move |store| store.set(&name, &secret)).await
    }

    /// See [`SecretStore::get`].
    ///
    /// # Errors
    /// In words, also when the time limit passed.
    pub async fn get(&self, name: String) -> Result<Option<SecretString>, String> {
        self.run(move |store| store.get(&name)).await
    }

    /// See [`SecretStore::remove`].
    ///
    /// # Errors
    /// In words, also when the time limit passed.
    pub async fn remove(&self, name: String) -> Result<(), String> {
        self.run(move |store| store.remove(&name)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Locked(std::sync::mpsc::Receiver<()>);
    impl SecretStore for Locked {
        fn set(&mut self, _: &str, _: &SecretString) -> Result<(), String> {
            let _ = self.0.recv();
            Ok(())
        }
        fn get(&mut self, _: &str) -> Result<Option<SecretString>, String> {
            Ok(None)
        }
        fn remove(&mut self, _: &str) -> Result<(), String> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_locked_keyring_does_not_hold_the_launcher_up() {
        let (_unlock, locked) = std::sync::mpsc::channel();
        let secrets = Secrets::with_patience(Box::new(Locked(locked)), Duration::from_millis(20));
        let error = secrets.set("a".into(), "b".into()).await.unwrap_err();
        assert!(error.contains("did not answer"), "{error}");
    }

    #[tokio::test]
    async fn memory_gives_back_what_it_was_given_until_it_is_removed() {
        let secrets = Secrets::new(Box::new(Memory::default()));
        assert!(secrets.get("a".into()).await.unwrap().is_none());
        secrets.set("a".into(), "b".into()).await.unwrap();
        let kept = secrets.get("a".into()).await.unwrap().unwrap();
        assert_eq!(kept.expose_secret(), "b");
        secrets.remove("a".into()).await.unwrap();
        assert!(secrets.get("a".into()).await.unwrap().is_none());
    }
}
