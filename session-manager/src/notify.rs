//! Notifications of the desktop the person sits at. Never the only way to act, never awaited.

/// Shows notifications.
pub trait Notifier: Send + Sync + 'static {
    /// Shows one, in the background; failures are only logged.
    fn notify(&self, title: &str, body: &str);
}
