//! Whether the person likes it dark, told as a desktop tells its programs: by the settings portal
//! (`org.freedesktop.portal.Settings`). It changes while they run, as at dusk.

use super::Desk;
use anyhow::{Context, Result};
use zbus::Connection;
use zbus::fdo;
use zbus::object_server::SignalEmitter;
use zbus::zvariant::Value;

const PATH: &str = "/org/freedesktop/portal/desktop";
const NAMESPACE: &str = "org.freedesktop.appearance";
const KEY: &str = "color-scheme";

/// What the person prefers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Dark on light.
    Light,
    /// Light on dark.
    Dark,
}

impl Scheme {
    /// As CSS calls it in `prefers-color-scheme`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Light => "light",
            Self::Dark => "dark",
        }
    }

    fn number(self) -> u32 {
        match self {
            Self::Dark => 1,
            Self::Light => 2,
        }
    }
}

/// The preference in force on a [`Desk`], until it is dropped. Made before the programs that shall follow it.
#[derive(Debug)]
pub struct Appearance {
    bus: Connection,
}

struct Portal(Scheme);

#[zbus::interface(name = "org.freedesktop.portal.Settings")]
impl Portal {
    /// The number in a variant in a variant, as the portal's first version has it and programs still ask for it.
    fn read(&self, namespace: &str, key: &str) -> fdo::Result<Value<'static>> {
        if (namespace, key) != (NAMESPACE, KEY) {
            return Err(fdo::Error::Failed(format!("no {key} in {namespace}")));
        }
        Ok(Value::Value(Box::new(Value::U32(self.0.number()))))
    }

    #[zbus(signal)]
    async fn setting_changed(
        emitter: &SignalEmitter<'_>,
        namespace: &str,
        key: &str,
        value: Value<'_>,
    ) -> zbus::Result<()>;
}

impl Appearance {
    /// Tells everybody on this desk from now on.
    ///
    /// # Errors
    /// When the desk has a portal already.
    pub async fn start(desk: &Desk, scheme: Scheme) -> Result<Self> {
        let bus = desk.connect().await?;
        bus.object_server().at(PATH, Portal(scheme)).await?;
        bus.request_name("org.freedesktop.portal.Desktop")
            .await
            .context("playing the settings portal")?;
        Ok(Self { bus })
    }

    /// The person changes their mind.
    ///
    /// # Errors
    /// When the bus is gone.
    pub async fn set(&self, scheme: Scheme) -> Result<()> {
        let portal = self
            .bus
            .object_server()
            .interface::<_, Portal>(PATH)
            .await?;
        portal.get_mut().await.0 = scheme;
        let value = Value::U32(scheme.number());
        Portal::setting_changed(portal.signal_emitter(), NAMESPACE, KEY, value).await?;
        Ok(())
    }
}
