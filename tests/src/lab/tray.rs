//! A tray icon as the panel sees it: the item that a program registered, its menu, and a click in it, over D-Bus.
//!
//! StatusNotifierItem (freedesktop.org) for the icon, `com.canonical.dbusmenu` for the menu.

use super::{Desk, until};
use anyhow::{Context, Result, bail};
use std::collections::HashMap;
use std::time::Duration;
use zbus::zvariant::{OwnedValue, Structure, Value};
use zbus::{Connection, Proxy};

const WATCHER: &str = "org.kde.StatusNotifierWatcher";

/// A tray icon.
#[derive(Clone, Debug)]
pub struct Tray {
    bus: Connection,
    service: String,
    path: String,
    menu: String,
}

/// A line of the menu.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MenuLine {
    /// Number that a click names.
    pub id: i32,
    /// Its words, without the mark of the access key; empty for a separator.
    pub label: String,
    /// Whether it can be chosen.
    pub enabled: bool,
}

impl Tray {
    /// Waits for the first tray icon in the session's panel.
    ///
    /// # Errors
    /// After `bound`.
    pub async fn wait(desk: &Desk, bound: Duration) -> Result<Self> {
        let watcher = Proxy::new(desk.bus(), WATCHER, "/StatusNotifierWatcher", WATCHER).await?;
        until("the panel has a tray icon", bound, async || {
            // Not the cached value: this waits for a change.
            let items: Vec<String> = desk
                .bus()
                .call_method(
                    Some(watcher.destination()),
                    watcher.path(),
                    Some("org.freedesktop.DBus.Properties"),
                    "Get",
                    &(WATCHER, "RegisteredStatusNotifierItems"),
                )
                .await?
                .body()
                .deserialize::<OwnedValue>()?
                .try_into()?;
            let Some((service, path)) = items.first().and_then(|item| split(item)) else {
                return Ok(None);
            };
            let tray = Self::open(desk.bus(), service, path).await;
            Ok(tray.ok())
        })
        .await
    }

    async fn open(bus: &Connection, service: &str, path: &str) -> Result<Self> {
        let item = Proxy::new(bus, service, path, "org.kde.StatusNotifierItem").await?;
        let menu: zbus::zvariant::OwnedObjectPath = item.get_property("Menu").await?;
        Ok(Self {
            bus: bus.clone(),
            service: service.to_owned(),
            path: path.to_owned(),
            menu: menu.to_string(),
        })
    }

    /// Name or path of the icon that it shows now.
    ///
    /// # Errors
    /// When the program does not answer.
    pub async fn icon(&self) -> Result<String> {
        let path = self.path.as_str();
        let item = Proxy::new(
            &self.bus,
            self.service.as_str(),
            path,
            "org.kde.StatusNotifierItem",
        );
        Ok(item.await?.get_property("IconName").await?)
    }

    /// The menu now, from top to bottom.
    ///
    /// # Errors
    /// When the program does not answer.
    pub async fn menu(&self) -> Result<Vec<MenuLine>> {
        type Layout = (u32, (i32, HashMap<String, OwnedValue>, Vec<OwnedValue>));
        let (_, (_, _, children)): Layout = self
            .menu_proxy()
            .await?
            .call("GetLayout", &(0_i32, 1_i32, Vec::<&str>::new()))
            .await
            .context("reading the tray menu")?;
        children.into_iter().map(read_line).collect()
    }

    /// Clicks the line with these words, as soon as it can be chosen.
    ///
    /// # Errors
    /// After 30 s, with the menu as it is then.
    pub async fn click(&self, label: &str) -> Result<()> {
        let mut seen = Vec::new();
        let what = format!("the tray menu offers {label:?}");
        let found = until(&what, Duration::from_secs(30), async || {
            seen = self.menu().await?;
            Ok(seen
                .iter()
                .find(|line| line.enabled && line.label == label)
                .map(|line| line.id))
        })
        .await;
        let id = found.with_context(|| format!("the menu is {seen:?}"))?;
        let () = self
            .menu_proxy()
            .await?
            .call("Event", &(id, "clicked", Value::from(0_i32), 0_u32))
            .await
            .with_context(|| format!("clicking {label:?} in the tray menu"))?;
        Ok(())
    }

    async fn menu_proxy(&self) -> Result<Proxy<'_>> {
        let path = self.menu.as_str();
        let proxy = Proxy::new(
            &self.bus,
            self.service.as_str(),
            path,
            "com.canonical.dbusmenu",
        );
        Ok(proxy.await?)
    }
}

/// `:1.7/org/ayatana/…` into name and path.
fn split(item: &str) -> Option<(&str, &str)> {
    item.find('/').map(|at| item.split_at(at))
}

fn read_line(value: OwnedValue) -> Result<MenuLine> {
    let line: Structure<'_> = value.try_into()?;
    let [Value::I32(id), Value::Dict(properties), _] = line.fields() else {
        bail!("a menu line has another shape than com.canonical.dbusmenu's");
    };
    let label: Option<String> = properties.get(&"label")?;
    let enabled: Option<bool> = properties.get(&"enabled")?;
    let kind: Option<String> = properties.get(&"type")?;
    Ok(MenuLine {
        id: *id,
        // A doubled underscore is a real one, a single one marks the access key.
        label: label
            .unwrap_or_default()
            .replace("__", "\u{0}")
            .replace('_', "")
            .replace('\u{0}', "_"),
        enabled: enabled.unwrap_or(true) && kind.as_deref() != Some("separator"),
    })
}
