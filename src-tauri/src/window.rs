//! The one window: made when it is wanted, destroyed when it is closed, so that no web process runs without it.

use crate::commands::Subscription;
use anyhow::Result;
use mayfly_session_manager::{Handle, text::Catalogue, view::Message};
use tauri::{AppHandle, Manager, WebviewUrl, WebviewWindowBuilder, WindowEvent};

const LABEL: &str = "main";

/// Brings the window to the front; makes it first if need be.
pub(crate) fn show(app: &AppHandle, handle: &Handle) -> Result<()> {
    if let Some(window) = app.get_webview_window(LABEL) {
        window.unminimize()?;
        window.show()?;
        window.set_focus()?;
        return Ok(());
    }
    let catalogue = Catalogue::new(&handle.views().borrow().language);
    let window = WebviewWindowBuilder::new(app, LABEL, WebviewUrl::default())
        .title(catalogue.text(&Message::new("app-name")))
        .inner_size(420.0, 520.0)
        .resizable(false)
        .maximizable(false)
        .center()
        .enable_clipboard_access()
        .build()?;
    let app = app.clone();
    window.on_window_event(move |event| {
        if matches!(event, WindowEvent::Destroyed) {
            app.state::<Subscription>().end();
        }
    });
    Ok(())
}

/// Takes the window and its web process away, if there is one.
pub(crate) fn hide(app: &AppHandle) -> Result<()> {
    if let Some(window) = app.get_webview_window(LABEL) {
        window.destroy()?;
    }
    Ok(())
}
