//! Runs the core: feeds it events, runs its effects, pushes what it shows.

use crate::handle::{Exit, Handle, Request, Tray, WindowWish};
use crate::notify::Notifier;
use crate::secrets::SecretStore;
use crate::settings::{self, Places, SettingsError};
use crate::view::{Action, Screen, Settings, TrayIcon, View};
use std::sync::Arc;
use tokio::sync::{mpsc, watch};

/// What a surface gives the manager.
pub struct Config {
    /// Where files are.
    pub places: Places,
    /// The settings in force.
    pub settings: Settings,
    /// Why the settings file could not be used, if so: `settings` are the defaults then, and the person is told.
    pub settings_problem: Option<SettingsError>,
    /// Login name inside the desktop; absent: the orchestrator's default.
    pub user: Option<String>,
}

impl Config {
    /// Settings from the file in `places`.
    #[must_use]
    pub fn load(places: Places) -> Self {
        let (settings, settings_problem) = match settings::load(&places.settings_file()) {
            Ok(settings) => (settings, None),
            Err(problem) => (Settings::default(), Some(problem)),
        };
        Self {
            places,
            settings,
            settings_problem,
            user: None,
        }
    }
}

/// The world outside, replaceable in tests.
pub struct Adapters {
    /// Where secrets are kept.
    pub secrets: Box<dyn SecretStore>,
    /// Who shows notifications.
    pub notifier: Arc<dyn Notifier>,
}

/// Starts the manager on the current tokio runtime.
#[must_use]
pub fn spawn(config: Config, _adapters: Adapters) -> Handle {
    let (requests, mut inbox) = mpsc::unbounded_channel();
    let view = View {
        screen: Screen::Home { notice: None },
        language: "en".to_owned(),
        secrets_notice: None,
    };
    let (view_out, views) = watch::channel(view);
    let (tray_out, trays) = watch::channel(Tray {
        menu: Vec::new(),
        icon: TrayIcon::Idle,
    });
    let (window_out, windows) = watch::channel(WindowWish::default());
    let (settings_out, settings) = watch::channel(config.settings.clone());
    let (exit_out, exit) = watch::channel(None);
    tokio::spawn(async move {
        while let Some(request) = inbox.recv().await {
            match request {
                Request::Act(Action::Quit) => break,
                Request::Act(_) => {}
                Request::Save(settings, answer) => {
                    let saved = settings::save(&config.places.settings_file(), &settings);
                    let _ = answer.send(saved);
                }
            }
        }
        exit_out.send_replace(Some(Exit::Clean));
        drop((view_out, tray_out, window_out, settings_out));
    });
    Handle {
        requests,
        views,
        trays,
        windows,
        settings,
        exit,
    }
}
