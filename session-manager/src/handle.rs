//! What a surface (the tray app, the terminal) holds of a running session manager.
//!
//! Cheap to clone. Everything is pushed when it changes and only then: an idle launcher does nothing.

use crate::settings::SettingsError;
use crate::view::{Action, MenuEntry, Settings, TrayIcon, View};
use mayfly_api::SessionId;
use tokio::sync::{mpsc, oneshot, watch};

/// The tray: menu and icon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tray {
    /// The lines of the menu.
    pub menu: Vec<MenuEntry>,
    /// The icon.
    pub icon: TrayIcon,
}

/// Which page a window shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// The [`View`]'s screen.
    Main,
    /// The settings.
    Settings,
}

/// What the manager wants of the window now.
///
/// `revision` grows with every wish, so asking twice for the same page raises the window again.
/// At the start: revision 0, hidden.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowWish {
    /// Counts the wishes.
    pub revision: u64,
    /// The page to show; `None`: hide.
    pub page: Option<Page>,
}

/// How the manager ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Nothing of ours is left.
    Clean,
    /// The orchestrator has acknowledged the destruction and is at it.
    Acknowledged(SessionId),
    /// The bound passed, or the person forced it: the orchestrator was not heard, and ends the session
    /// by its own rules.
    LeftBehind(Option<SessionId>),
}

/// What the surface asks of the manager.
#[derive(Debug)]
pub(crate) enum Request {
    Act(Action),
    Save(Settings, oneshot::Sender<Result<(), SettingsError>>),
}

/// A running session manager.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(crate) requests: mpsc::UnboundedSender<Request>,
    pub(crate) views: watch::Receiver<View>,
    pub(crate) trays: watch::Receiver<Tray>,
    pub(crate) windows: watch::Receiver<WindowWish>,
    pub(crate) settings: watch::Receiver<Settings>,
    pub(crate) exit: watch::Receiver<Option<Exit>>,
}

impl Handle {
    /// The person asks for something. An action that makes no sense now is ignored.
    pub fn act(&self, action: Action) {
        // A manager that has ended needs no more actions.
        let _ = self.requests.send(Request::Act(action));
    }

    /// The picture for the window.
    #[must_use]
    pub fn views(&self) -> watch::Receiver<View> {
        self.views.clone()
    }

    /// Menu and icon of the tray.
    #[must_use]
    pub fn trays(&self) -> watch::Receiver<Tray> {
        self.trays.clone()
    }

    /// Whether and with what page the window is wanted.
    #[must_use]
    pub fn windows(&self) -> watch::Receiver<WindowWish> {
        self.windows.clone()
    }

    /// The settings in force.
    #[must_use]
    pub fn settings(&self) -> watch::Receiver<Settings> {
        self.settings.clone()
    }

    /// Checks, saves and uses new settings.
    ///
    /// # Errors
    /// See [`SettingsError`]; the old ones stay in force.
    pub async fn save_settings(&self, settings: Settings) -> Result<(), SettingsError> {
        let (answer, answered) = oneshot::channel();
        let _ = self.requests.send(Request::Save(settings, answer));
        answered.await.unwrap_or(Err(SettingsError::Stopped))
    }

    /// Waits until the manager has ended; at most about ten seconds after [`Action::Quit`].
    pub async fn wait_exit(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or(Exit::LeftBehind(None)),
            Err(_) => Exit::LeftBehind(None),
        }
    }
}
