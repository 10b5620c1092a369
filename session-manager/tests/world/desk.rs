//! A desk of the tests' own: a whole session manager between its keyring, its RDP client and its orchestrator.

use super::{FakeClient, Making, Orchestrator, PATIENCE};
use mayfly_session_manager::notify::Silent;
use mayfly_session_manager::secrets::{Memory, SecretStore};
use mayfly_session_manager::settings::Places;
use mayfly_session_manager::view::{Countdown, Screen, Settings};
use mayfly_session_manager::{Adapters, Config, Handle, spawn};
use secrecy::SecretString;
use std::sync::{Arc, Mutex};

/// A keyring that outlives the launcher, as the real one does.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Memory>>);

impl SecretStore for Shared {
    fn set(&mut self, name: &str, secret: &SecretString) -> Result<(), String> {
        self.0.lock().unwrap().set(name, secret)
    }
    fn get(&mut self, name: &str) -> Result<Option<SecretString>, String> {
        self.0.lock().unwrap().get(name)
    }
    fn remove(&mut self, name: &str) -> Result<(), String> {
        self.0.lock().unwrap().remove(name)
    }
}

pub(crate) struct Desk {
    pub(crate) dir: tempfile::TempDir,
    keyring: Shared,
    pub(crate) client: FakeClient,
    pub(crate) orchestrator: Orchestrator,
}

impl Drop for Desk {
    fn drop(&mut self) {
        super::remove(self.dir.path());
    }
}

impl Desk {
    pub(crate) async fn new(making: Making) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            keyring: Shared::default(),
            client: FakeClient::new(),
            orchestrator: Orchestrator::start(making).await,
        }
    }

    pub(crate) fn places(&self) -> Places {
        Places {
            config_dir: self.dir.path().join("config"),
            data_dir: self.dir.path().join("data"),
        }
    }

    pub(crate) fn launcher(&self, countdown: Countdown) -> Handle {
        let mut config = Config::load(self.places());
        config.settings = Settings {
            orchestrator: self.orchestrator.address.clone(),
            countdown,
            language: Some("en".into()),
            ..Settings::default()
        };
        config.settings.rdp.client = Some(self.client.path().display().to_string());
        let adapters = Adapters {
            secrets: Box::new(self.keyring.clone()),
            notifier: Arc::new(Silent),
        };
        spawn(config, adapters)
    }
}

pub(crate) async fn screen(handle: &Handle, what: &str, is: impl Fn(&Screen) -> bool) -> Screen {
    let mut views = handle.views();
    let shown = views.wait_for(|view| is(&view.screen));
    match tokio::time::timeout(PATIENCE, shown).await {
        Ok(view) => view.unwrap().screen.clone(),
        Err(_) => panic!(
            "{what} was not shown, but {:?}",
            handle.views().borrow().screen
        ),
    }
}

pub(crate) fn in_use(screen: &Screen) -> bool {
    matches!(
        screen,
        Screen::InUse {
            client_open: true,
            ..
        }
    )
}
