//! Notifications of the desktop the person sits at. Never the only way to act, never awaited.

/// Shows notifications.
pub trait Notifier: Send + Sync + 'static {
    /// Shows one, in the background; failures are only logged.
    fn notify(&self, title: &str, body: &str);
}

/// Shows nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Notifier for Silent {
    fn notify(&self, _title: &str, _body: &str) {}
}

/// The notification service of the person's session.
#[derive(Clone, Copy, Debug, Default)]
pub struct System;

impl Notifier for System {
    fn notify(&self, title: &str, body: &str) {
        let mut note = notify_rust::Notification::new();
        note.appname("Mayfly").summary(title).body(body);
        #[cfg(all(unix, not(target_os = "macos")))]
        {
            note.icon("mayfly");
            // In a task of its own: a missing service must hold nothing up.
            tokio::spawn(async move {
                match note.show_async().await {
                    // The connection must stay open while the note is shown, or some services withdraw it.
                    Ok(handle) => {
                        tokio::time::sleep(std::time::Duration::from_secs(30)).await;
                        drop(handle);
                    }
                    Err(error) => tracing::debug!(%error, "no notification"),
                }
            });
        }
        #[cfg(not(all(unix, not(target_os = "macos"))))]
        {
            std::thread::spawn(move || {
                if let Err(error) = note.show() {
                    tracing::debug!(%error, "no notification");
                }
            });
        }
    }
}
