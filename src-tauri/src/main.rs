//! Mayfly in the tray. Adapters only: what happens is decided in `mayfly-session-manager`; here its pictures are shown
//! and what people choose is sent back.
//!
//! # Guarantees
//! * Idle means idle: nothing runs until something changes, and no web process until a window opens.
//! * One launcher for each person: a second start opens the window of the first.
//! * Quit, a signal or the end of the person's session destroys what lives, and always ends.

#![cfg_attr(all(windows, not(debug_assertions)), windows_subsystem = "windows")]

mod commands;
mod system;
mod tray;
mod window;

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use mayfly_session_manager::{Adapters, Config, Exit, Handle, log, settings::Places, view::Action};
use std::{future::Future, process::ExitCode, time::Duration};
use tauri::{AppHandle, Manager, RunEvent};
use tray::Tray;

/// How long the window toolkit and the manager may take to end once the manager has decided to.
const QUIT_BOUND: Duration = Duration::from_secs(5);

/// Mayfly in the tray: a fresh desktop when you ask for one, gone when you close it.
///
/// `MAYFLY_CONFIG_DIR` and `MAYFLY_DATA_DIR` replace the person's folders. What happened is in `log` in the second.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Open the window at once.
    #[arg(long)]
    open_window: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let places = Places::of_person();
    log::start(places.as_ref(), "info");
    system::help_the_web_view();
    match run(&options, places) {
        Ok(Exit::Clean | Exit::Acknowledged(_)) => ExitCode::SUCCESS,
        Ok(Exit::LeftBehind(session)) => {
            tracing::warn!(
                ?session,
                "left without an answer from the orchestrator, which ends the session by its own rules"
            );
            ExitCode::FAILURE
        }
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options, places: Option<Places>) -> Result<Exit> {
    let places = places.context("no home folder: set MAYFLY_CONFIG_DIR and MAYFLY_DATA_DIR")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Two may wait for the main thread (tray, window) while it waits for the manager, which needs a third.
        .worker_threads(3)
        .enable_all()
        .build()?;
    tauri::async_runtime::set(runtime.handle().clone());

    // In a second launcher this call hands over to the first and ends the process: nothing may run before it.
    let app = build()?;

    let inside = runtime.enter();
    let handle = mayfly_session_manager::spawn(Config::load(places), Adapters::system());
    app.manage(handle.clone());
    drop(inside);
    app.manage(commands::Subscription::default());
    if options.open_window {
        handle.act(Action::OpenWindow);
    }
    let left = handle.clone();
    app.run_return(move |app, event| match event {
        // Not in Tauri's `setup`: an error there is a panic (tauri-apps/tauri#12815).
        RunEvent::Ready => start(app, &handle),
        // The last window was closed: the tray stays. A code means that we leave on purpose.
        RunEvent::ExitRequested {
            code: None, api, ..
        } => api.prevent_exit(),
        // Windows and macOS tell the end of the person's session only so, and end the process after it.
        RunEvent::Exit => {
            handle.act(Action::Quit);
            tauri::async_runtime::block_on(wait_exit(&handle));
        }
        _ => {}
    });
    let exit = runtime.block_on(wait_exit(&left));
    // What stands still now must not hold the process: Quit always ends.
    runtime.shutdown_background();
    Ok(exit)
}

/// How the manager ended, within the bound.
async fn wait_exit(handle: &Handle) -> Exit {
    tokio::time::timeout(QUIT_BOUND, handle.wait_exit())
        .await
        .unwrap_or(Exit::LeftBehind(None))
}

/// The application, or the reason why it cannot be.
fn build() -> Result<tauri::App> {
    let builder = tauri::Builder::default()
        .plugin(tauri_plugin_single_instance::init(|app, _, _| {
            if let Some(handle) = app.try_state::<Handle>() {
                handle.act(Action::OpenWindow);
            }
        }))
        .invoke_handler(tauri::generate_handler![
            commands::subscribe,
            commands::act,
            commands::settings,
            commands::save_settings
        ]);
    // The window toolkit panics when there is no display.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        builder.build(tauri::generate_context!())
    }))
    .map_err(|_| anyhow!("there is no display to open windows on; in a terminal use `mayfly`"))?
    .context("Mayfly cannot start")
}

/// Puts the item into the tray, and follows the manager.
fn start(app: &AppHandle, handle: &Handle) {
    // An icon in the Dock would open nothing.
    #[cfg(target_os = "macos")]
    if let Err(error) = app.set_activation_policy(tauri::ActivationPolicy::Accessory) {
        tracing::warn!(%error, "the Dock shows an icon");
    }
    match Tray::new(app, handle) {
        Ok(tray) => {
            app.manage(tray);
            task("tray", follow_tray(app.clone(), handle.clone()));
            task("tray host", system::open_without_tray(handle.clone()));
        }
        Err(error) => {
            tracing::warn!("no tray, so the window opens instead: {error:#}");
            handle.act(Action::OpenWindow);
        }
    }
    task("window", follow_window(app.clone(), handle.clone()));
    task("signals", system::quit_on_signals(handle.clone()));
    task("exit", leave(app.clone(), handle.clone()));
}

/// Runs in the background; a failure is told, never silent.
fn task(name: &'static str, work: impl Future<Output = Result<()>> + Send + 'static) {
    tauri::async_runtime::spawn(async move {
        if let Err(error) = work.await {
            tracing::error!("{name}: {error:#}");
        }
    });
}

/// Redraws menu and icon when they change, until the manager ends; the language comes with the view.
async fn follow_tray(app: AppHandle, handle: Handle) -> Result<()> {
    let (mut trays, mut views) = (handle.trays(), handle.views());
    let mut language = views.borrow().language.clone();
    loop {
        tokio::select! {
            Ok(()) = trays.changed() => {}
            Ok(view) = views.wait_for(|view| view.language != language) => {
                language.clone_from(&view.language);
            }
            else => return Ok(()),
        }
        app.state::<Tray>().show(&app, &handle)?;
    }
}

/// Opens and hides the window as the manager wishes, until it ends.
async fn follow_window(app: AppHandle, handle: Handle) -> Result<()> {
    let mut windows = handle.windows();
    loop {
        let wish = *windows.borrow_and_update();
        match wish.page {
            Some(_) => window::show(&app, &handle)?,
            None => window::hide(&app)?,
        }
        if windows.changed().await.is_err() {
            return Ok(());
        }
    }
}

/// Ends the application when the manager has ended.
async fn leave(app: AppHandle, handle: Handle) -> Result<()> {
    handle.wait_exit().await;
    app.exit(0);
    // Should the window toolkit stand still, the process still ends.
    tokio::time::sleep(QUIT_BOUND).await;
    std::process::exit(1);
}
