//! What the page may ask: these four, named in `build.rs`, allowed in `capabilities/window.json`.

#![expect(
    clippy::needless_pass_by_value,
    reason = "Tauri gives commands their arguments by value"
)]

use mayfly_session_manager::{
    Handle, Page,
    view::{Action, Message, Settings, View},
};
use serde::Serialize;
use std::sync::{Mutex, PoisonError};
use tauri::{State, async_runtime::JoinHandle, ipc::Channel};

/// What the page is told. `ui/src/backend.ts` has the same type.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "news", rename_all = "snake_case")]
pub(crate) enum News {
    /// The whole picture, first of all and after every change.
    View { view: Box<View> },
    /// The page wanted: the state's screen, or the settings.
    Page { page: PageKind },
}

/// [`Page`] as the web page reads it.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum PageKind {
    Main,
    Settings,
}

/// Who listens to the manager: the page of the window that lives, and no other.
#[derive(Default)]
pub(crate) struct Subscription(Mutex<Option<JoinHandle<()>>>);

impl Subscription {
    /// Stops telling.
    pub(crate) fn end(&self) {
        self.replace(None);
    }

    fn replace(&self, task: Option<JoinHandle<()>>) {
        let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = std::mem::replace(&mut *current, task) {
            old.abort();
        }
    }
}

/// Tells the page the picture of now, then every change, until it goes away.
#[tauri::command]
pub(crate) fn subscribe(
    channel: Channel<News>,
    handle: State<'_, Handle>,
    subscription: State<'_, Subscription>,
) {
    let (mut views, mut windows) = (handle.views(), handle.windows());
    let task = tauri::async_runtime::spawn(async move {
        views.mark_changed();
        windows.mark_changed();
        loop {
            let news = tokio::select! {
                biased;
                Ok(()) = views.changed() => News::View { view: Box::new(views.borrow_and_update().clone()) },
                Ok(()) = windows.changed() => match windows.borrow_and_update().page {
                    Some(Page::Main) => News::Page { page: PageKind::Main },
                    Some(Page::Settings) => News::Page { page: PageKind::Settings },
                    None => continue,
                },
                else => return,
            };
            if channel.send(news).is_err() {
                return;
            }
        }
    });
    subscription.replace(Some(task));
}

/// Does what a button says.
#[tauri::command]
pub(crate) fn act(action: Action, handle: State<'_, Handle>) {
    handle.act(action);
}

/// The settings in force.
#[tauri::command]
pub(crate) fn settings(handle: State<'_, Handle>) -> Settings {
    handle.settings().borrow().clone()
}

/// Checks and saves settings.
///
/// # Errors
/// In words of the catalogue, when they are refused.
#[tauri::command]
pub(crate) async fn save_settings(
    settings: Settings,
    handle: State<'_, Handle>,
) -> Result<(), Message> {
    handle
        .save_settings(settings)
        .await
        .map_err(|error| error.words())
}
