//! The tray item: shows the manager's menu and icon, and sends back what was chosen.
//!
//! # Guarantees
//! * Nothing is redrawn that did not change. A menu that only got other words keeps its items, so that an open menu
//!   stays open while the progress in its first line moves.
//! * A system without a tray costs nothing but the tray: [`Tray::new`] says so, and the windows do the rest.

use anyhow::{Context, Result, anyhow};
use mayfly_session_manager::{
    Handle,
    text::Catalogue,
    view::{Action, MenuEntry, TrayIcon},
};
use std::sync::{Mutex, PoisonError};
use tauri::{
    AppHandle, Wry,
    image::Image,
    menu::{IsMenuItem, Menu, MenuItem, PredefinedMenuItem},
    tray::{MouseButton, MouseButtonState, TrayIconBuilder, TrayIconEvent},
};

/// What one line of the menu shows. Two equal lines look and act the same.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Line {
    /// Words, and what choosing them does; `None` cannot be chosen.
    Item(String, Option<Action>),
    Separator,
}

impl Line {
    fn of(entry: &MenuEntry, catalogue: &Catalogue) -> Self {
        match entry {
            MenuEntry::Status { label } => Self::Item(catalogue.text(label), None),
            MenuEntry::Item { label, action } => Self::Item(catalogue.text(label), Some(*action)),
            MenuEntry::Separator => Self::Separator,
        }
    }

    /// Whether only words differ.
    fn same_kind(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Item(_, one), Self::Item(_, two)) => one == two,
            (Self::Separator, Self::Separator) => true,
            _ => false,
        }
    }
}

/// The item in the tray.
pub(crate) struct Tray {
    item: tauri::tray::TrayIcon,
    shown: Mutex<Shown>,
}

/// The menu's items, one for each line; separators have none.
type Items = Vec<Option<MenuItem<Wry>>>;

/// What the tray shows now.
struct Shown {
    lines: Vec<Line>,
    items: Items,
    icon: TrayIcon,
}

impl Tray {
    /// Puts the item into the tray. Only on the main thread.
    ///
    /// # Errors
    /// When the system has no library for it (`libayatana-appindicator3-1` on Linux).
    pub(crate) fn new(app: &AppHandle, handle: &Handle) -> Result<Self> {
        let tray = handle.trays().borrow().clone();
        let lines = lines(&tray.menu, &handle.views().borrow().language);
        let (menu, items) = build(app, &lines)?;
        let chosen = handle.clone();
        let clicked = handle.clone();
        let builder = TrayIconBuilder::with_id("mayfly")
            .icon(picture(tray.icon)?)
            .icon_as_template(true)
            .tooltip("Mayfly")
            .menu(&menu)
            // Windows and macOS tell clicks; Linux always shows the menu, whose items open the window.
            .show_menu_on_left_click(cfg!(target_os = "macos"))
            .on_menu_event(move |_, event| {
                if let Ok(action) = serde_json::from_str(&event.id().0) {
                    chosen.act(action);
                }
            })
            .on_tray_icon_event(move |_, event| {
                if let TrayIconEvent::Click {
                    button: MouseButton::Left,
                    button_state: MouseButtonState::Up,
                    ..
                } = event
                    && cfg!(target_os = "windows")
                {
                    clicked.act(Action::OpenWindow);
                }
            });
        // The library is loaded now, and its loader panics when it is missing.
        let built = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| builder.build(app)));
        let item = built
            .map_err(|_| {
                anyhow!(
                    "the tray library is missing: install the package libayatana-appindicator3-1"
                )
            })?
            .context("the tray item cannot be made")?;
        let shown = Mutex::new(Shown {
            lines,
            items,
            icon: tray.icon,
        });
        Ok(Self { item, shown })
    }

    /// Shows what the manager wants shown now.
    pub(crate) fn show(&self, app: &AppHandle, handle: &Handle) -> Result<()> {
        let tray = handle.trays().borrow().clone();
        let lines = lines(&tray.menu, &handle.views().borrow().language);
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if shown.icon != tray.icon {
            self.item
                .set_icon_with_as_template(Some(picture(tray.icon)?), true)?;
            shown.icon = tray.icon;
        }
        if shown.lines == lines {
            return Ok(());
        }
        let same_kinds = shown.lines.len() == lines.len()
            && shown.lines.iter().zip(&lines).all(|(a, b)| a.same_kind(b));
        if same_kinds {
            for ((old, new), item) in shown.lines.iter().zip(&lines).zip(&shown.items) {
                if let (Line::Item(words, _), Some(item), true) = (new, item, old != new) {
                    item.set_text(words)?;
                }
            }
        } else {
            let (menu, items) = build(app, &lines)?;
            self.item.set_menu(Some(menu))?;
            shown.items = items;
        }
        shown.lines = lines;
        Ok(())
    }
}

fn lines(menu: &[MenuEntry], language: &str) -> Vec<Line> {
    let catalogue = Catalogue::new(language);
    menu.iter()
        .map(|entry| Line::of(entry, &catalogue))
        .collect()
}

/// The menu of these lines. An item's id is its action as JSON, so that there is no table of ids.
fn build(app: &AppHandle, lines: &[Line]) -> Result<(Menu<Wry>, Items)> {
    let menu = Menu::new(app)?;
    let mut items = Vec::new();
    for line in lines {
        let item = match line {
            Line::Item(words, Some(action)) => Some(MenuItem::with_id(
                app,
                serde_json::to_string(action)?,
                words,
                true,
                None::<&str>,
            )?),
            Line::Item(words, None) => Some(MenuItem::new(app, words, false, None::<&str>)?),
            Line::Separator => None,
        };
        match &item {
            Some(item) => menu.append(item as &dyn IsMenuItem<Wry>)?,
            None => menu.append(&PredefinedMenuItem::separator(app)?)?,
        }
        items.push(item);
    }
    Ok((menu, items))
}

/// The picture of a state.
fn picture(icon: TrayIcon) -> Result<Image<'static>> {
    let png: &[u8] = match icon {
        TrayIcon::Idle => include_bytes!("../../icons/tray-idle.png"),
        TrayIcon::Busy => include_bytes!("../../icons/tray-busy.png"),
        TrayIcon::Active => include_bytes!("../../icons/tray-active.png"),
        TrayIcon::Attention => include_bytes!("../../icons/tray-attention.png"),
    };
    Ok(Image::from_bytes(png)?)
}
