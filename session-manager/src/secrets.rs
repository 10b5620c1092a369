//! Where the session's secret is kept, so that a launcher started after a crash can take its session back.

use secrecy::SecretString;

/// A place for secrets. Calls may block: they run on a thread of their own with a time limit.
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
