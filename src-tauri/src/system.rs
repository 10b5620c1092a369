//! What differs between systems: signals, a tray that may be missing, and a web view that needs help.

use anyhow::Result;
use mayfly_session_manager::{Handle, view::Action};

/// Some web views draw nothing with NVIDIA's driver unless told not to share buffers (tauri-apps/tauri#9304).
/// The process starts again in place with the variable set: it must be there before anything else runs.
#[cfg(target_os = "linux")]
pub(crate) fn help_the_web_view() {
    use std::os::unix::process::CommandExt;
    const VARIABLE: &str = "WEBKIT_DISABLE_DMABUF_RENDERER";
    let nvidia = ["/proc/driver/nvidia/version", "/sys/module/nvidia"]
        .iter()
        .any(|path| std::path::Path::new(path).exists());
    if !nvidia || std::env::var_os(VARIABLE).is_some() {
        return;
    }
    if let Ok(program) = std::env::current_exe() {
        let error = std::process::Command::new(program)
            .args(std::env::args_os().skip(1))
            .env(VARIABLE, "1")
            .exec();
        tracing::warn!(%error, "cannot start again with {VARIABLE}=1: the window may stay blank");
    }
}

/// Only Linux needs it.
#[cfg(not(target_os = "linux"))]
pub(crate) fn help_the_web_view() {}

/// The end of the person's session, Ctrl-C and `kill` are the menu's Quit; a second one forces it.
#[cfg(unix)]
pub(crate) async fn quit_on_signals(handle: Handle) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    loop {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
        handle.act(Action::Quit);
    }
}

/// The same for a console, which a release has none of: there the window toolkit tells the end (`RunEvent::Exit`).
#[cfg(windows)]
pub(crate) async fn quit_on_signals(handle: Handle) -> Result<()> {
    loop {
        tokio::signal::ctrl_c().await?;
        handle.act(Action::Quit);
    }
}

/// Opens the window when nobody shows tray items (GNOME without the AppIndicator extension).
/// A panel that starts together with us gets two seconds.
#[cfg(target_os = "linux")]
pub(crate) async fn open_without_tray(handle: Handle) -> Result<()> {
    use futures_util::StreamExt;
    use std::time::Duration;
    let watched = async {
        let bus = zbus::Connection::session().await?;
        let names = zbus::fdo::DBusProxy::new(&bus).await?;
        let watcher = zbus::names::BusName::try_from("org.kde.StatusNotifierWatcher")?;
        let mut changes = names
            .receive_name_owner_changed_with_args(&[(0, watcher.as_str())])
            .await?;
        if !names.name_has_owner(watcher).await? {
            changes.next().await;
        }
        anyhow::Ok(())
    };
    match tokio::time::timeout(Duration::from_secs(2), watched).await {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => tracing::warn!("no session bus, so no tray: {error:#}"),
        Err(_) => tracing::info!("nobody shows tray items here: opening the window"),
    }
    handle.act(Action::OpenWindow);
    Ok(())
}

/// Elsewhere the tray is always there.
#[cfg(not(target_os = "linux"))]
pub(crate) async fn open_without_tray(_handle: Handle) -> Result<()> {
    Ok(())
}
